"""All-reduce + residual + RMSNorm in one kernel each, by stores to the peers' memory (never multicast).

Three kernels for (tokens, hidden) activations, all summing in rank order in fp32, so that every rank gets equal bits:

* `one_shot_kernel`: each rank pushes all its rows to every peer; every rank sums, adds and normalises all rows.
  (R - 1) * T * H numbers leave each rank, in one hop: least latency.
* `two_shot_data_kernel`: rows belong to ranks, in blocks of ceil(T / R). Partial rows are pushed to their owner, who sums,
  adds, normalises and pushes the result to the peers: 2 (R - 1) / R * T * H numbers, two hops. Data as flag.
* `two_shot_flags_kernel`: the same with one flag a row and no clearing: most throughput for many tokens.

FULL two-shots leave the complete residual on every rank: the owner pushes the rounded residual and 1 / rms, and every rank
scales the rows itself. Else the residual stays sharded, and the owner pushes normalised rows.

Why no rank overwrites what another still reads
-----------------------------------------------
(I) *A rank that has ended call n knows that every rank has begun call n, and so has ended call n - 1* (launches on a
stream do not overlap; with programmatic dependent launch every kernel first waits for the ones before it). One-shot: it
has received something from every rank. Two-shot: a rank needs rows from each owner, and an owner (it may be that rank
itself) needs partial rows from every rank before it sends any. Hence, as a rank pushes for call n + 1 only after it has
ended call n:

* one-shot packets for call n go to slot n % 2. The reader resets them to the sentinel in call n. They are written again in
  call n + 2, by ranks that have ended call n + 1, so by (I) after the reader has ended call n. Slots alternate per one-shot
  call, and other calls between only make the gaps longer.
* partial rows, data as flag: the same two slots, the same argument.
* results, data as flag: one area. Rank p reads and resets the rows of owner o in call n; o writes them again in call n + 1
  after it has received p's partial rows of call n + 1, so p has ended call n. (o waits for p's share of that very row.)
* partial rows with flags: one area. The owner has read row i of call n before it pushes the result of row i. Rank p pushes
  for call n + 1 after it has received all results of call n, so every owner has read all of them.
* results with flags, and output buffers handed out in place: o writes row i on rank p in call n + 1 after it has seen p's
  flag of call n + 1, so all that p put on the stream before that call, readers of the old output included, is over.
* tagged words and flags name the call, are overwritten in the next one at the earliest, and are read before by the same
  arguments as the data they go with. Tags repeat after 2**31 calls; flags do not.

Why it cannot deadlock
----------------------
All blocks of a grid fit on the GPU together (at most one a multiprocessor, or two of few threads; the host sees to it),
and each does its pushes of step s before it waits for anything of step s. What step s waits for was pushed by the peers in
an earlier step, or in the same step before any wait; so the least step at which a block hangs has no cause.

State on the device
-------------------
Every launch adds exactly 2**16 to its counter, whatever its grid: block 0 adds the remainder. A block reads the counter
before its own share is in, so `counter >> 16` is the number of calls ended, the same for all blocks of the launch. Nothing on the
host counts, so CUDA graphs replay. Ranks must make the same calls in the same order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusewire.custom_ops.providers.symm_mem_math import (
    FP32,
    add_rounded,
    high,
    load_weight,
    low,
    normalized,
    packed,
    reciprocal_rms,
    sum_of_squares,
)
from fusewire.custom_ops.providers.symm_mem_ptx import (
    COUNTER_LOG2,
    CTL_DATA,
    CTL_FLAGS,
    CTL_ONE_SHOT,
    CTL_PEERS,
    CTL_ZEROS,
    SENTINEL,
    WAIT_ONE_SHOT,
    WAIT_PARTIAL_DATA,
    WAIT_PARTIAL_FLAG,
    WAIT_RESULT_DATA,
    WAIT_RESULT_FLAG,
    WAIT_SLICE,
    add_counter,
    grid_dependency_launch,
    grid_dependency_wait,
    load16,
    load_i64,
    poll16,
    poll_tagged,
    put_tagged,
    read_counter,
    sanitize,
    set_flag,
    store16,
    wait_flag,
)


@triton.jit
def _begin(ctl: tl.tensor, COUNTER: tl.constexpr, PDL: tl.constexpr) -> tl.tensor:
    if PDL:
        grid_dependency_wait()
    return read_counter(ctl.to(tl.int64) + 8 * COUNTER) >> COUNTER_LOG2


@triton.jit
def _end(ctl: tl.tensor, COUNTER: tl.constexpr, THREADS: tl.constexpr) -> None:
    tl.debug_barrier()  # all threads have read the counter
    first = tl.program_id(0) == 0
    amount = tl.where(first, (1 << COUNTER_LOG2) - tl.num_programs(0) + 1, 1).to(tl.int64)
    add_counter(ctl.to(tl.int64) + 8 * COUNTER, amount, tl.arange(0, THREADS) == 0)


@triton.jit
def _tag(call: tl.tensor) -> tl.tensor:
    """The call as a tag, never 0."""
    return ((call & 0x7FFFFFFF) + 1).to(tl.int32)


@triton.jit
def _rows_of(rank: tl.tensor, tokens: tl.tensor, shard: tl.tensor) -> tl.tensor:
    return tl.minimum(tl.maximum(tokens - rank * shard, 0), shard)


@triton.jit
def _sum_rows(
    sources: tl.tuple,
    mine: tl.tuple,
    rank: tl.tensor,
    residual: tl.tuple,
    WORLD: tl.constexpr,
    KIND: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
) -> tl.tuple:
    """Packets summed over ranks 0, 1, ... in fp32 and rounded; plus the residual, rounded again."""
    out = ()
    for k in tl.static_range(4):
        word = tl.where(rank == 0, mine[k], sources[k])
        lo = low(word, KIND)
        hi = high(word, KIND)
        for src in tl.static_range(1, WORLD):
            word = tl.where(rank == src, mine[k], sources[4 * src + k])
            lo += low(word, KIND)
            hi += high(word, KIND)
        word = packed(lo, hi, KIND)
        if HAS_RESIDUAL:
            word = add_rounded(word, residual[k], KIND)
        out = out + (word,)  # noqa: RUF005
    return out


@triton.jit
def _slices_sum(
    value: tl.tensor,
    at: tl.tensor,
    part: tl.tensor,
    call: tl.tensor,
    ctl: tl.tensor,
    rank: tl.tensor,
    lane: tl.tensor,
    SLICES: tl.constexpr,
) -> tl.tensor:
    """Sum `value` over the blocks that share a row, in slice order, through tagged words in this GPU's own memory."""
    if SLICES > 1:
        put_tagged(at + part * 8, value, _tag(call), lane == 0)
        addrs = ()
        for s in tl.static_range(SLICES):
            addrs = addrs + (at + s * 8,)  # noqa: RUF005
        bits = poll_tagged(addrs, _tag(call), ctl, WAIT_SLICE, rank, SLICES, True)
        value = bits[0].to(tl.float32, bitcast=True)
        for s in tl.static_range(1, SLICES):
            value += bits[s].to(tl.float32, bitcast=True)
    return value


@triton.jit
def one_shot_kernel(
    ctl: tl.tensor,
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    norm_out: tl.tensor,
    residual_out: tl.tensor,
    tokens: tl.tensor,
    rank: tl.tensor,
    slots: tl.tensor,
    slot_bytes: tl.tensor,
    source_bytes: tl.tensor,
    slices_at: tl.tensor,
    eps: tl.tensor,
    bias: tl.tensor,
    WORLD: tl.constexpr,
    HIDDEN: tl.constexpr,
    KIND: tl.constexpr,
    WKIND: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    WRITE_RESIDUAL: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK: tl.constexpr,
    THREADS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """SLICES consecutive blocks share a row. `slots`, `slices_at`: byte offsets into the symmetric buffer."""
    PACKETS: tl.constexpr = HIDDEN // 4 if KIND == FP32 else HIDDEN // 8
    SLICE: tl.constexpr = (PACKETS + SLICES - 1) // SLICES
    ctl_at = ctl.to(tl.int64)
    call = _begin(ctl, CTL_ONE_SHOT, PDL)
    own = tl.load(ctl + CTL_PEERS + rank)
    lane = tl.arange(0, BLOCK)
    part = tl.program_id(0) % SLICES
    packet = part * SLICE + lane
    mask = (lane < SLICE) & (packet < PACKETS)
    byte = packet.to(tl.int64) * 16
    slot = slots + (call & 1) * slot_bytes
    scale = load_weight(weight.to(tl.int64), packet, mask, KIND, WKIND) if WKIND >= 0 else (mask,)
    for row in range(tl.program_id(0) // SLICES, tokens, tl.num_programs(0) // SLICES):
        at = tl.cast(row, tl.int64) * (PACKETS * 16) + byte
        mine = load16(x.to(tl.int64) + at, mask, False)
        clean = sanitize(mine)
        for j in tl.static_range(1, WORLD):
            peer = tl.load(ctl + CTL_PEERS + (rank + j) % WORLD)
            store16(peer + slot + rank * source_bytes + at, clean, mask, True)
        if PDL:
            grid_dependency_launch()
        add = load16(residual.to(tl.int64) + at, mask, False) if HAS_RESIDUAL else mine
        addrs = ()
        for src in tl.static_range(WORLD):
            arrives = mask & (rank != src)
            addrs = addrs + (  # noqa: RUF005
                tl.where(arrives, own + slot + src * source_bytes + at, ctl_at + 8 * CTL_ZEROS),
            )
        sources = poll16(addrs, ctl_at, WAIT_ONE_SHOT, 0, WORLD, 1, False)
        total = _sum_rows(sources, mine, rank, add, WORLD, KIND, HAS_RESIDUAL)
        squares = tl.sum(sum_of_squares(total, KIND), axis=0)
        exchange = own + slices_at + tl.cast(row, tl.int64) * (8 * SLICES)
        squares = _slices_sum(squares, exchange, part, call, ctl_at, rank, lane, SLICES)
        rstd = reciprocal_rms(squares, eps, HIDDEN)
        norm = normalized(total, rstd, scale, bias, KIND, WKIND, ROUND_FIRST)
        store16(norm_out.to(tl.int64) + at, norm, mask, False)
        if WRITE_RESIDUAL:
            store16(residual_out.to(tl.int64) + at, total, mask, False)
        empty = tl.full([BLOCK], SENTINEL, tl.int32)
        for src in tl.static_range(WORLD):
            reset = mask & (rank != src)
            store16(own + slot + src * source_bytes + at, (empty, empty, empty, empty), reset, False)
    _end(ctl, CTL_ONE_SHOT, THREADS)


@triton.jit
def two_shot_data_kernel(
    ctl: tl.tensor,
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    norm_out: tl.tensor,
    residual_out: tl.tensor,
    tokens: tl.tensor,
    shard: tl.tensor,
    rank: tl.tensor,
    slots: tl.tensor,
    slot_bytes: tl.tensor,
    source_bytes: tl.tensor,
    results: tl.tensor,
    rstds: tl.tensor,
    slices_at: tl.tensor,
    eps: tl.tensor,
    bias: tl.tensor,
    WORLD: tl.constexpr,
    HIDDEN: tl.constexpr,
    KIND: tl.constexpr,
    WKIND: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    WRITE_RESIDUAL: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    FULL: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
    THREADS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """`shard` rows a rank. `slots` (partial rows), `results`, `rstds`, `slices_at`: byte offsets into the symmetric buffer.

    FULL: residual and residual_out are (tokens, hidden); else (shard, hidden), this rank's own rows.
    """
    PACKETS: tl.constexpr = HIDDEN // 4 if KIND == FP32 else HIDDEN // 8
    SLICE: tl.constexpr = (PACKETS + SLICES - 1) // SLICES
    ROW: tl.constexpr = PACKETS * 16
    ctl_at = ctl.to(tl.int64)
    call = _begin(ctl, CTL_DATA, PDL)
    own = tl.load(ctl + CTL_PEERS + rank)
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    slot = slots + (call & 1) * slot_bytes
    thread = tl.arange(0, THREADS)
    # Partial rows to their owners: a flat copy, all peers at once.
    TILE: tl.constexpr = THREADS * UNROLL
    tiles = (shard * PACKETS + TILE - 1) // TILE * (WORLD - 1)
    for t in range(pid, tiles, programs):
        owner = (rank + 1 + t % (WORLD - 1)) % WORLD
        q = t // (WORLD - 1) * TILE + tl.arange(0, TILE)
        mask = q < _rows_of(owner, tokens, shard) * PACKETS
        source = x.to(tl.int64) + tl.cast(owner * shard, tl.int64) * ROW + q.to(tl.int64) * 16
        target = tl.load(ctl + CTL_PEERS + owner) + slot + rank * source_bytes + q.to(tl.int64) * 16
        store16(target, sanitize(load16(source, mask, False)), mask, True)
    if PDL:
        grid_dependency_launch()
    # This rank's own rows.
    lane = tl.arange(0, BLOCK)
    part = pid % SLICES
    packet = part * SLICE + lane
    mask = (lane < SLICE) & (packet < PACKETS)
    byte = packet.to(tl.int64) * 16
    groups = programs // SLICES
    mine_rows = _rows_of(rank, tokens, shard)
    scale = load_weight(weight.to(tl.int64), packet, mask, KIND, WKIND) if WKIND >= 0 else (mask,)
    for i in range(tl.where(pid < groups * SLICES, pid // SLICES, mine_rows), mine_rows, groups):
        local = tl.cast(i, tl.int64) * ROW + byte
        at = tl.cast(rank * shard, tl.int64) * ROW + local
        kept = at if FULL else local
        mine = load16(x.to(tl.int64) + at, mask, False)
        add = load16(residual.to(tl.int64) + kept, mask, False) if HAS_RESIDUAL else mine
        addrs = ()
        for src in tl.static_range(WORLD):
            arrives = mask & (rank != src)
            addrs = addrs + (  # noqa: RUF005
                tl.where(arrives, own + slot + src * source_bytes + local, ctl_at + 8 * CTL_ZEROS),
            )
        sources = poll16(addrs, ctl_at, WAIT_PARTIAL_DATA, 0, WORLD, 1, False)
        total = _sum_rows(sources, mine, rank, add, WORLD, KIND, HAS_RESIDUAL)
        squares = tl.sum(sum_of_squares(total, KIND), axis=0)
        exchange = own + slices_at + tl.cast(i, tl.int64) * (8 * SLICES)
        squares = _slices_sum(squares, exchange, part, call, ctl_at, rank, lane, SLICES)
        rstd = reciprocal_rms(squares, eps, HIDDEN)
        norm = normalized(total, rstd, scale, bias, KIND, WKIND, ROUND_FIRST)
        clean = sanitize(total) if FULL else sanitize(norm)
        for j in tl.static_range(1, WORLD):
            peer = tl.load(ctl + CTL_PEERS + (rank + j) % WORLD)
            store16(peer + results + at, clean, mask, True)
            if FULL:
                row_at = peer + rstds + tl.cast(rank * shard + i, tl.int64) * 8
                put_tagged(row_at, rstd, _tag(call), (lane == 0) & (part == 0))
        store16(norm_out.to(tl.int64) + at, norm, mask, False)
        if WRITE_RESIDUAL:
            store16(residual_out.to(tl.int64) + kept, total, mask, False)
        empty = tl.full([BLOCK], SENTINEL, tl.int32)
        for src in tl.static_range(WORLD):
            reset = mask & (rank != src)
            store16(own + slot + src * source_bytes + local, (empty, empty, empty, empty), reset, False)
    # The other owners' rows, as they arrive.
    for t in range(pid, tiles, programs):
        owner = (rank + 1 + t % (WORLD - 1)) % WORLD
        first = t // (WORLD - 1) * TILE
        limit = _rows_of(owner, tokens, shard) * PACKETS
        if first < limit:
            start = tl.cast(owner * shard, tl.int64) * ROW
            addrs = ()
            for u in tl.static_range(UNROLL):
                q = first + u * THREADS + thread
                here = own + results + start + q.to(tl.int64) * 16
                addrs = addrs + (tl.where(q < limit, here, ctl_at + 8 * CTL_ZEROS),)  # noqa: RUF005
            words = poll16(addrs, ctl_at, WAIT_RESULT_DATA, owner, UNROLL, 0, True)
            if FULL:
                rows = ()
                for u in tl.static_range(UNROLL):
                    q = tl.minimum(first + u * THREADS + thread, limit - 1)
                    rows = rows + (own + rstds + (owner * shard + q // PACKETS).to(tl.int64) * 8,)  # noqa: RUF005
                bits = poll_tagged(rows, _tag(call), ctl_at, WAIT_RESULT_DATA, owner, UNROLL, True)
            empty = tl.full([THREADS], SENTINEL, tl.int32)
            for u in tl.static_range(UNROLL):
                q = first + u * THREADS + thread
                there = start + q.to(tl.int64) * 16
                got = (words[4 * u], words[4 * u + 1], words[4 * u + 2], words[4 * u + 3])
                if FULL:
                    row_scale = load_weight(weight.to(tl.int64), q % PACKETS, q < limit, KIND, WKIND)
                    rstd = bits[u].to(tl.float32, bitcast=True)
                    norm = normalized(got, rstd, row_scale, bias, KIND, WKIND, ROUND_FIRST)
                    store16(norm_out.to(tl.int64) + there, norm, q < limit, False)
                    if WRITE_RESIDUAL:
                        store16(residual_out.to(tl.int64) + there, got, q < limit, False)
                else:
                    store16(norm_out.to(tl.int64) + there, got, q < limit, False)
                store16(own + results + there, (empty, empty, empty, empty), q < limit, False)
    _end(ctl, CTL_DATA, THREADS)
