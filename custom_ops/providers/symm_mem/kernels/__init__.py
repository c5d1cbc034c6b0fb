"""The Triton kernels: what they share, and why no rank overwrites what another still reads.

Three kernels sum (tokens, hidden) activations over R ranks, add the residual and normalise, by
stores to the peers' memory (never multicast). Each sums in rank order in fp32, so all ranks get
equal bits:

* `one_shot.one_shot_kernel`: each rank pushes all its rows to every peer, and every rank sums, adds
  and normalises all rows. (R - 1) T H numbers leave each rank, in one hop: least latency.
* `two_shot_data.two_shot_data_kernel`: rows belong to ranks, in blocks of ceil(T / R). Partial rows
  are pushed to their owner, who sums, adds, normalises and pushes the result to the peers:
  2 (R - 1) / R T H numbers, two hops. Data is its own flag.
* `two_shot_flags.two_shot_flags_kernel`: the same with one flag a row. Nothing to reset, and
  results can land in the output itself: most throughput for many tokens.

`memory` has the single accesses (packets of 16 bytes, tagged words, flags, bounded waits), `rows`
the arithmetic on packets, `packets` what the kernels share; `peer_copy` is a plain copy to measure
the links with.

**Arguments.** All kernels take, in this order: `ctl` (the control block, int64 words, see
`layout`), `x`, `residual`, `weight`, `inner_weight`, `norm_out`, `residual_out` (addresses,
contiguous, on 16-byte boundaries; None where there is none), counts and byte offsets, `eps`, `bias`
(fp32: added to the mean square, and to the weight), `inner_eps`, `inner_bias` (fp32, the inner
norm's, or None), then constants:

    WORLD, HIDDEN          ranks; hidden size in elements
    KIND, WKIND            number of x's and the weight's dtype (rows.BF16, ...); -1 for no weight
    HAS_RESIDUAL           whether a residual is added
    WRITE_RESIDUAL         whether residual_out is written
    INNER, INNER_WKIND, INNER_ROUND_FIRST   an RMSNorm of the sum before the residual is added
    ROUND_FIRST            the form "round_then_scale"
    SLICES, BLOCK, UNROLL, THREADS          as in `launch_config.LaunchConfig`

INNER changes nothing that travels. Blocks that share a row then exchange two sums of squares, in
words of their own.

REPLICATE_RESIDUAL two-shots leave the complete residual on every rank: the owner pushes the rounded
residual and its sum of squares (with flags: 1 / rms), and every rank scales all rows. Else the
residual stays sharded, and the owner pushes normalised rows. Data as flag with few rows sends
unnormalised ones in either case, so that the owner need not wait for a row's other slices.

**Slot reuse.**

(I) A rank that has ended call n knows that every rank has begun call n, and so has ended call
n - 1: launches on a stream do not overlap. In a one-shot it has received something from every
rank. In a two-shot it has rows from each owner, and an owner (it may be that rank itself) needs
partial rows from every rank before it sends any. A rank pushes for call n + 1 only after it has
ended call n. Hence:

* One-shot packets of call n go to slot n % 2, and their reader resets them to the sentinel in call
  n. They are written again in call n + 2, by ranks that have ended call n + 1: by (I), after the
  reader has ended call n. Slots alternate per one-shot call; other calls between only widen the gap.
* Partial rows, data as flag: two slots and the argument again.
* Results, data as flag: one area. Rank p reads and resets the rows of owner o in call n; o writes
  them again in call n + 1 after it has p's partial row of call n + 1 (of the same row and slice),
  so p has ended call n.
* Partial rows with flags: one area. An owner has read row i of call n before it pushes the result
  of row i. Rank p pushes for call n + 1 after it has all results of call n, so after every owner
  has read all of its rows.
* Results with flags, and output buffers handed out in place: o writes row i on rank p in call n + 1
  after it has seen p's flag of call n + 1. All that p put on its stream before that call, readers
  of the old output included, is over by then.
* Tagged words and flags name their call. Each is written again at the earliest in the next call of
  its kind, by a writer who waits for the same things as with the data they go with. Tags repeat
  after 2**31 calls.

**What is not formally promised.** With data as its own flag, a reset and the next write of the same
packet come from different GPUs and are ordered by kernel boundaries and relaxed traffic only, with
no fence between them. PTX's memory model does not promise that order; that GPUs keep it is tested
on real ones (tests/gpu/symm_mem_check.py). The protocol with flags has a fence or an acquire on
every such path.

**Progress.** A block does its pushes of a step before any wait of that step, and waits only for
pushes of the same or an earlier step. Blocks that work on one row must be on the GPU at once: the
SLICES blocks of a row, and in a data-as-flag two-shot the blocks that copy parts of one row. Blocks
that own whole rows (one-shot with SLICES == 1, two-shot with flags) are right with any number of
them resident. The host launches no more blocks than fit on the GPU (`check_launch_config`). Kernels
of other streams that never end can still keep blocks out; then the waits time out.

**Counting calls.** A launch adds exactly 2**16 to its counter, whatever its grid (block 0 adds the
rest). A block reads the counter before its own share is in, so `counter >> 16` is the number of
calls before this one, the same for all blocks. Nothing is counted on the host, so CUDA graphs
replay. Ranks must make the same calls in the same order.
"""
