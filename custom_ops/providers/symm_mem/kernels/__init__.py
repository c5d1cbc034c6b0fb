"""Triton kernels, and the proof that no rank overwrites data that another rank still reads.

Three kernels sum (tokens, hidden) activations over R ranks, add the residual and normalise. They
store to the peers' memory (no multicast). Each sums in rank order in fp32, so all ranks get equal
bits:

* `one_shot.one_shot_kernel`: each rank pushes all its rows to every peer and computes all rows.
  Each rank sends (R - 1) T H numbers, in one hop: lowest latency.
* `two_shot_data.two_shot_data_kernel`: each rank owns a block of ceil(T / R) rows. Partial rows are
  pushed to their owner, which sums, adds, normalises and pushes the result to the peers:
  2 (R - 1) / R T H numbers, two hops. The data is its own flag.
* `two_shot_flags.two_shot_flags_kernel`: the same with one flag per row. Nothing needs a reset, and
  results can be written into the output itself: highest throughput for many tokens.

`memory` has the memory accesses, `counters` those of the control block, `rows` the arithmetic on
packets, `pairs` batch-invariant sums, `quantize` FP8 results, `packets` shared functions,
`quantize_rows` a kernel that only quantises, and `peer_copy` a plain copy that measures the links.

**Arguments.** All kernels take, in this order: `ctl` (the control block, int64 words, see
`layout`), `x`, `residual`, `weight`, `inner_weight`, `norm_out`, `residual_out` (addresses,
contiguous, on 16-byte boundaries; None where there is none), `quant_scale`, `quantized_out`,
`scales_out` (a quantisation's given scale or bound, one fp32 number; its results; None where there
is none), counts and byte offsets, `eps`, `bias` (fp32: added to the mean square, and to the
weight), `inner_eps`, `inner_bias` (fp32, the inner norm's, or None), `quant_at` (byte offset of
what a quantisation exchanges, or None), then constants:

    WORLD, HIDDEN          ranks; hidden size in elements
    KIND, WKIND            number of x's and the weight's dtype (rows.BF16, ...); -1 for no weight
    HAS_RESIDUAL           whether a residual is added
    WRITE_RESIDUAL         whether residual_out is written
    INNER, INNER_WKIND, INNER_ROUND_FIRST   an RMSNorm of the sum before the residual is added
    ROUND_FIRST            whether the norm is rounded before it is multiplied by the weight
    WIDE_SUM               whether the norm reads the sum with the residual before it is rounded;
                           for 16-bit dtypes and with a residual only
    BATCH_INVARIANT        whether a row's bits depend on that row and the hidden size alone
    WRITE_NORM             whether norm_out is written
    QUANT                  the text of the QuantSpec by which the norm is quantised to FP8, or ""
    SLICES, BLOCK, UNROLL, THREADS          as in `launch_config.LaunchConfig`

**Batch-invariant.** The sums over ranks are in rank order whatever the launch. The sum of a row's
squares is not: it depends on BLOCK, SLICES and THREADS, which depend on the number of tokens. With
BATCH_INVARIANT it is one tree for all launches, that of the batch-invariant norms
(`fusewire.custom_ops.providers.batch_invariant.triton_norm.chunk_of`): neighbours are added until
one value is left, in a packet, in a warp, in a block, then over slices, each of which is a subtree.
1 / rms and the scaling round as those norms do, and nothing is fused to a multiply-add.

INNER does not change what is sent. Blocks that share a row then exchange two sums of squares, each
in its own word.

**FP8.** The norm is rounded to x's dtype and then quantised as native does it, bit for bit. In a
one-shot each rank quantises all rows. Blocks that share a row exchange its largest value in words
of their own; with scales of groups, a slice has whole groups. In a two-shot the owner of a row
computes its scales and sends them beside the row, behind the same flag. With a sharded residual and
no norm as a result, only FP8 rows and scales travel back: half the bytes of 16-bit rows. Otherwise
every rank quantises the rows that it has. Data as flag has no FP8 results: a token's scale needs
the whole row, so what saves a wait there (rows leave before their slices meet) could not be kept.
Two-shots of few tokens use flags instead. Rows that are lost are NaN in FP8 (0x7f), and so are
their scales.

A two-shot with REPLICATE_RESIDUAL leaves the complete residual on every rank: the owner pushes the
rounded residual and its sum of squares (with flags: 1 / rms), and every rank scales all rows. With
WIDE_SUM a rounded residual cannot be normalised: the owner pushes what it adds to the residual, and
every rank adds it to its own residual again.
Without REPLICATE_RESIDUAL the residual stays sharded and the owner pushes normalised rows. With few
rows, two_shot_data pushes unnormalised rows in both cases, so the owner need not wait for other
slices; not with WIDE_SUM and a sharded residual, for which a rank lacks the rows to add.

**Slot reuse.**

(I) A rank that has ended call n knows that every rank has begun call n and so has ended call n - 1,
because launches on a stream do not overlap. In a one-shot it has received something from every
rank. In a two-shot it has rows from each owner (one may be itself), and an owner needs partial rows
from every rank before it sends any. A rank pushes for call n + 1 only after it has ended call n.
Hence:

* One-shot: packets of call n go to slot n % 2, to a place that depends on the call
  (`layout.shift_of`), and their reader resets them to the sentinel in call n. Ranks that have ended
  call n + 1 write there again in call n + 2: by (I), after the reader has ended call n. Slots
  alternate per one-shot call, so other calls in between only add distance.
* Partial rows, data as flag: two slots and the same argument.
* Results, data as flag: one area. Rank p reads and resets the rows of owner o in call n; o writes
  so p has ended call n.
* Partial rows with flags: one area. An owner has read row i of call n before it pushes the result
  of row i. Rank p pushes for call n + 1 after it has all results of call n, so after every owner
  has read all of its rows.
* Results with flags, their scales, and output buffers: o writes row i on rank p in call n + 1 after
  it has seen p's flag of call n + 1. All work that p put on its stream before that call, including
  readers of the old output, has ended by then.
* Tagged words and flags contain their call's number, flags also its tokens and options. Each is
  written again in the next call of its kind at the earliest, by a writer that waits for the same
  events as for the data. Tags repeat after 2**31 calls.

**After a fault.** (I) holds only as long as no rank gives up. A rank that has given up in call n
and went on would write slots that a late peer still reads, and would take the peer's late data of
call n for that of a later call. So after a rank has given up, its kernels send nothing, wait for
nothing and store NaN. A late peer gets what was sent for call n, or waits past its limit and gives
up too. tests/support/simulator.py (`late`) runs this.

**What the memory model does not promise.** With data as its own flag, a reset and the next write of
the same packet come from different GPUs. Only kernel boundaries and relaxed accesses order them,
without a fence. PTX's memory model does not promise that order; tests/gpu/symm_mem_check.py tests
it on real GPUs. The protocol with flags has a fence or an acquire on every such path.

**Progress.** A block does its pushes of a step before any wait of that step, and waits only for
pushes of the same or an earlier step. How many blocks of a launch must be resident, that is on
their GPU at once:

* Blocks that own whole rows (one-shot with SLICES == 1, two-shot with flags): one, whatever other
  ranks have room for, if a GPU starts blocks in the order of their numbers. A block waits only for
  the blocks of its number on the peers. So the unfinished block with the least number of all ranks
  is resident wherever it is unfinished, and goes on. GPUs start blocks in that order, but CUDA does
  not promise it. In other orders ranks with room for some blocks may start different ones.
* The SLICES blocks of a row wait for each other, so they must be resident together.
* In two_shot_data a row also waits for the tiles in which peers copy its parts, and a tile for the
  owners of all its rows. So blocks that copy parts of one row must be resident together, and blocks
  whose rows share a tile. With few rows these are all blocks of the launch.

The host launches no more blocks than an idle GPU has room for (`check_launch_config`). Beside
another kernel there may be room for fewer. If that kernel ends by itself, the call is late; if it
waits for this call or for a peer, blocks that must be resident may never be, and the waits time
out. tests/kernels/test_symm_mem_controls.py launches with less room.

**Counting calls.** A launch adds exactly 2**16 to its counter, whatever its grid (block 0 adds the
remainder). A block reads the counter before it adds its share, so `counter >> 16` is the number of
earlier calls, the same for all blocks. The host counts nothing, so CUDA graphs can replay. All
ranks must make the same calls in the same order.
"""
