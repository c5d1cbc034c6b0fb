"""All-reduce + residual + RMSNorm in one kernel each, by stores to the peers' memory (never multicast).

Three kernels for (tokens, hidden) activations; each sums in rank order in fp32, so all ranks get equal bits:

* `one_shot_kernel`: each rank pushes all its rows to every peer, and every rank sums, adds and normalises all
  rows. (R - 1) T H numbers leave each rank, in one hop: least latency.
* `two_shot_data_kernel`: rows belong to ranks, in blocks of ceil(T / R). Partial rows are pushed to their
  owner, who sums, adds, normalises and pushes the result to the peers: 2 (R - 1) / R T H numbers, two hops.
* `two_shot_flags_kernel` (in symm_mem_flags.py): the same with one flag a row instead of data as its own
  flag; nothing to reset, and results can land in the output itself: most throughput for many tokens.

INNER puts an RMSNorm of the sum before the residual, where a row is summed; what travels stays the same. Blocks
that share a row then exchange two sums of squares, in words of their own: in one call a word means one thing.

FULL two-shots leave the complete residual on every rank: the owner pushes the rounded residual and its sum of
squares (with flags: 1 / rms), and every rank scales all rows. Else the residual stays sharded, and the owner pushes
normalised rows; but data as flag with few rows goes as in a FULL one, which need not wait for a row's other slices.

Why no rank overwrites what another still reads:

(I) A rank that has ended call n knows that every rank has begun call n, and so has ended call n - 1: launches on a
stream do not overlap (with programmatic dependent launch a kernel first waits for those before it). In a one-shot it
has received something from every rank. In a two-shot it has rows from each owner, and an owner (it may be that rank
itself) needs partial rows from every rank before it sends any. A rank pushes for call n + 1 only after it has ended
call n. Hence:

* One-shot packets of call n go to slot n % 2, and their reader resets them to the sentinel in call n. They are
  written again in call n + 2, by ranks that have ended call n + 1: by (I), after the reader has ended call n. Slots
  alternate per one-shot call; other calls in between only widen the gap.
* Partial rows, data as flag: two slots and the argument again.
* Results, data as flag: one area. Rank p reads and resets the rows of owner o in call n; o writes them again in call
  n + 1 after it has p's partial row of call n + 1 (of the same row and slice), so p has ended call n.
* Partial rows with flags: one area. An owner has read row i of call n before it pushes the result of row i. Rank p
  pushes for call n + 1 after it has all results of call n, so after every owner has read all of its rows.
* Results with flags, and output buffers handed out in place: o writes row i on rank p in call n + 1 after it has seen
  p's flag of call n + 1. All that p put on its stream before that call, readers of the old output included, is over
  by then.
* Tagged words and flags name their call; each is written again at the earliest in the next call of its kind, by a
  writer who waits for the same things as with the data they go with. Tags repeat after 2**31 calls.

Why it cannot deadlock: all blocks of a grid are on the GPU at once (the host sees to it), so waiting blocks keep none
from running. A block does its pushes of a step before any wait of that step, and waits only for pushes of the same or
an earlier step; so no block can be the first to wait for ever.

State on the device: a launch adds exactly 2**16 to its counter, whatever its grid (block 0 adds the rest). A block
reads the counter before its own share is in, so `counter >> 16` is the number of calls before this one, the same for
all blocks. Nothing is counted on the host, so CUDA graphs replay. Ranks must make the same calls in the same order.
"""

# In Triton a tuple grows by addition, and its type with it.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from fusewire.custom_ops.providers.symm_mem.kernels.memory import (
    COUNTER_LOG2,
    CTL_DATA,
    CTL_ONE_SHOT,
    CTL_PEERS,
    CTL_ZEROS,
    LINE,
    SENTINEL,
    WAIT_ONE_SHOT,
    WAIT_PARTIAL_DATA,
    WAIT_RESULT_DATA,
    grid_dependency_launch,
    grid_dependency_wait,
    load16,
    poll16,
    poll_sums,
    put_tagged,
    read_counter,
    sanitize,
    store16,
)
from fusewire.custom_ops.providers.symm_mem.kernels.packets import (
    INTS,
    add_normalized,
    end_call,
    load_scale,
    packet_of,
    peer_at,
    rows_of,
    slices_sum,
    squares_of,
    sum_ranks,
    tag_of,
)
from fusewire.custom_ops.providers.symm_mem.kernels.rows import (
    FP32,
    normalized,
    reciprocal_rms,
    sum_of_squares,
)
from fusewire.custom_ops.providers.triton_cache import settle_keys


@triton.jit(do_not_specialize=INTS)
def one_shot_kernel(
    ctl: tl.tensor,
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    norm_out: tl.tensor,
    residual_out: tl.tensor,
    tokens: tl.int32,
    rank: tl.int32,
    slots: tl.int64,
    slot_bytes: tl.int64,
    source_bytes: tl.int64,
    slices_at: tl.int64,
    eps: tl.float32,
    bias: tl.float32,
    inner_weight: tl.tensor,
    inner_eps: tl.tensor,
    inner_bias: tl.tensor,
    WORLD: tl.constexpr,
    HIDDEN: tl.constexpr,
    KIND: tl.constexpr,
    WKIND: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    WRITE_RESIDUAL: tl.constexpr,
    INNER: tl.constexpr,
    INNER_WKIND: tl.constexpr,
    INNER_ROUND_FIRST: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK: tl.constexpr,
    THREADS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """SLICES consecutive blocks share a row. `slots`, `slices_at`: byte offsets into the symmetric buffer."""
    PACKETS: tl.constexpr = HIDDEN // 4 if KIND == FP32 else HIDDEN // 8
    SLICE: tl.constexpr = (PACKETS + SLICES - 1) // SLICES
    if PDL:
        grid_dependency_wait()
    lane = tl.arange(0, BLOCK)
    part = tl.program_id(0) % SLICES
    packet = part * SLICE + lane
    mask = (lane < SLICE) & (packet < PACKETS)
    byte = packet.to(tl.int64) * 16
    start = tl.program_id(0) // SLICES
    stride = tl.num_programs(0) // SLICES
    # Instructions issue in order: start all loads before the first use of any.
    mine = load16(x.to(tl.int64) + tl.cast(start, tl.int64) * (PACKETS * 16) + byte, mask, False)
    ctl_at = ctl.to(tl.int64)
    counter = read_counter(ctl_at + 8 * CTL_ONE_SHOT)
    own = tl.load(ctl + CTL_PEERS + rank)
    peers = ()
    for j in tl.static_range(1, WORLD):
        peers = peers + (tl.load(ctl + CTL_PEERS + peer_at(rank, tl.program_id(0), j, WORLD)),)
    call = counter >> COUNTER_LOG2
    slot = slots + (call & 1) * slot_bytes
    for row in range(start, tokens, stride):
        at = tl.cast(row, tl.int64) * (PACKETS * 16) + byte
        clean = sanitize(mine)
        for j in tl.static_range(1, WORLD):
            store16(peers[j - 1] + slot + rank * source_bytes + at, clean, mask, True)
        if PDL:
            grid_dependency_launch()
        add = load16(residual.to(tl.int64) + at, mask, False) if HAS_RESIDUAL else mine
        scale = load_scale(weight, packet, mask, KIND, WKIND)
        inner_scale = load_scale(inner_weight, packet, mask, KIND, INNER_WKIND) if INNER else scale
        addrs = ()
        for src in tl.static_range(WORLD):
            here = own + slot + src * source_bytes + at
            addrs = addrs + (tl.where(mask & (rank != src), here, ctl_at + 8 * CTL_ZEROS),)
        sources = poll16(addrs, ctl_at, WAIT_ONE_SHOT, 0, WORLD, 1, False)
        total = sum_ranks(sources, mine, rank, add, WORLD, KIND, HAS_RESIDUAL and not INNER)
        if INNER:
            inner_at = own + slices_at + tl.cast(row, tl.int64) * LINE + LINE // 2
            squares = squares_of(total, mask, KIND)
            squares = slices_sum(squares, inner_at, part, call, ctl_at, rank, lane, SLICES)
            total = add_normalized(
                total, add, squares, inner_scale, inner_eps, inner_bias, HIDDEN, KIND, INNER_WKIND, INNER_ROUND_FIRST
            )
        squares = squares_of(total, mask, KIND) if INNER else tl.sum(sum_of_squares(total, KIND), axis=0)
        exchange = own + slices_at + tl.cast(row, tl.int64) * LINE
        squares = slices_sum(squares, exchange, part, call, ctl_at, rank, lane, SLICES)
        norm = normalized(total, reciprocal_rms(squares, eps, HIDDEN), scale, bias, KIND, WKIND, ROUND_FIRST)
        store16(norm_out.to(tl.int64) + at, norm, mask, False)
        if WRITE_RESIDUAL:
            store16(residual_out.to(tl.int64) + at, total, mask, False)
        empty = tl.full([BLOCK], SENTINEL, tl.int32)
        for src in tl.static_range(WORLD):
            here = own + slot + src * source_bytes + at
            store16(here, (empty, empty, empty, empty), mask & (rank != src), False)
        following = x.to(tl.int64) + tl.cast(row + stride, tl.int64) * (PACKETS * 16) + byte
        mine = load16(following, mask & (row + stride < tokens), False)
    end_call(ctl, CTL_ONE_SHOT, THREADS)


@triton.jit
def _load_tile(
    x: tl.tensor,
    tile: tl.tensor,
    rank: tl.tensor,
    tokens: tl.tensor,
    shard: tl.tensor,
    WORLD: tl.constexpr,
    PACKETS: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tuple:
    """Packets of a tile of this rank's partial rows, zeros past the end."""
    owner = peer_at(rank, tile, 1, WORLD)
    q = tile // (WORLD - 1) * TILE + tl.arange(0, TILE)
    at = tl.cast(owner * shard, tl.int64) * (PACKETS * 16) + q.to(tl.int64) * 16
    return load16(x.to(tl.int64) + at, q < rows_of(owner, tokens, shard) * PACKETS, False)


@triton.jit(do_not_specialize=INTS)
def two_shot_data_kernel(
    ctl: tl.tensor,
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    norm_out: tl.tensor,
    residual_out: tl.tensor,
    tokens: tl.int32,
    shard: tl.int32,
    rank: tl.int32,
    slots: tl.int64,
    slot_bytes: tl.int64,
    source_bytes: tl.int64,
    results: tl.int64,
    squares_at: tl.int64,
    slices_at: tl.int64,
    eps: tl.float32,
    bias: tl.float32,
    inner_weight: tl.tensor,
    inner_eps: tl.tensor,
    inner_bias: tl.tensor,
    WORLD: tl.constexpr,
    HIDDEN: tl.constexpr,
    KIND: tl.constexpr,
    WKIND: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    WRITE_RESIDUAL: tl.constexpr,
    INNER: tl.constexpr,
    INNER_WKIND: tl.constexpr,
    INNER_ROUND_FIRST: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    FULL: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
    THREADS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """`shard` rows a rank. `slots` (partial rows), `results`, `squares_at`, `slices_at`: byte offsets into the
    symmetric buffer.

    FULL: residual and residual_out are (tokens, hidden); else (shard, hidden), this rank's own rows.
    """
    PACKETS: tl.constexpr = HIDDEN // 4 if KIND == FP32 else HIDDEN // 8
    SLICE: tl.constexpr = (PACKETS + SLICES - 1) // SLICES
    ROW: tl.constexpr = PACKETS * 16
    TILE: tl.constexpr = THREADS * UNROLL
    # How many words with squares a thread reads for a row: one of each slice while those are few, else one with their
    # sum. With the former the owner need not wait for its slices, so then, too, rows go out before they are normalised.
    WORDS: tl.constexpr = SLICES if SLICES * UNROLL <= 16 else 1
    RAW: tl.constexpr = FULL or WORDS > 1
    if PDL:
        grid_dependency_wait()
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    # Partial rows to their owners: a flat copy to all peers at once, one tile ahead. Instructions issue in
    # order: start the first loads before the first use of any.
    tiles = (shard * PACKETS + TILE - 1) // TILE * (WORLD - 1)
    words = _load_tile(x, pid, rank, tokens, shard, WORLD, PACKETS, TILE)
    ctl_at = ctl.to(tl.int64)
    counter = read_counter(ctl_at + 8 * CTL_DATA)
    own = tl.load(ctl + CTL_PEERS + rank)
    call = counter >> COUNTER_LOG2
    slot = slots + (call & 1) * slot_bytes
    for t in range(pid, tiles, programs):
        target = tl.load(ctl + CTL_PEERS + peer_at(rank, t, 1, WORLD)) + slot + rank * source_bytes
        following = _load_tile(x, t + programs, rank, tokens, shard, WORLD, PACKETS, TILE)
        q = t // (WORLD - 1) * TILE + tl.arange(0, TILE)
        mask = q < rows_of(peer_at(rank, t, 1, WORLD), tokens, shard) * PACKETS
        store16(target + q.to(tl.int64) * 16, sanitize(words), mask, True)
        words = following
    if PDL:
        grid_dependency_launch()
    # This rank's own rows.
    lane = tl.arange(0, BLOCK)
    part = pid % SLICES
    packet = part * SLICE + lane
    mask = (lane < SLICE) & (packet < PACKETS)
    byte = packet.to(tl.int64) * 16
    groups = programs // SLICES
    mine_rows = rows_of(rank, tokens, shard)
    for i in range(tl.where(pid < groups * SLICES, pid // SLICES, mine_rows), mine_rows, groups):
        local = tl.cast(i, tl.int64) * ROW + byte
        at = tl.cast(rank * shard, tl.int64) * ROW + local
        kept = at if FULL else local
        mine = load16(x.to(tl.int64) + at, mask, False)
        add = load16(residual.to(tl.int64) + kept, mask, False) if HAS_RESIDUAL else mine
        scale = load_scale(weight, packet, mask, KIND, WKIND)
        inner_scale = load_scale(inner_weight, packet, mask, KIND, INNER_WKIND) if INNER else scale
        addrs = ()
        for src in tl.static_range(WORLD):
            here = own + slot + src * source_bytes + local
            addrs = addrs + (tl.where(mask & (rank != src), here, ctl_at + 8 * CTL_ZEROS),)
        sources = poll16(addrs, ctl_at, WAIT_PARTIAL_DATA, 0, WORLD, 1, False)
        total = sum_ranks(sources, mine, rank, add, WORLD, KIND, HAS_RESIDUAL and not INNER)
        if INNER:
            inner_at = own + slices_at + tl.cast(i, tl.int64) * LINE + LINE // 2
            squares = squares_of(total, mask, KIND)
            squares = slices_sum(squares, inner_at, part, call, ctl_at, rank, lane, SLICES)
            total = add_normalized(
                total, add, squares, inner_scale, inner_eps, inner_bias, HIDDEN, KIND, INNER_WKIND, INNER_ROUND_FIRST
            )
        if RAW:
            clean = sanitize(total)
            for j in tl.static_range(1, WORLD):
                # By rows, so that all blocks of a row send to a peer at the same time, which needs all of it.
                peer = tl.load(ctl + CTL_PEERS + peer_at(rank, i, j, WORLD))
                store16(peer + results + at, clean, mask, True)
        squares = squares_of(total, mask, KIND) if INNER else tl.sum(sum_of_squares(total, KIND), axis=0)
        line = squares_at + tl.cast((rank * shard + i) * SLICES, tl.int64) * LINE
        if WORDS > 1:
            for j in tl.static_range(1, WORLD):
                peer = tl.load(ctl + CTL_PEERS + peer_at(rank, i, j, WORLD))
                put_tagged(peer + line + part * 8, squares, tag_of(call), lane == 0)
        exchange = own + slices_at + tl.cast(i, tl.int64) * LINE
        squares = slices_sum(squares, exchange, part, call, ctl_at, rank, lane, SLICES)
        norm = normalized(total, reciprocal_rms(squares, eps, HIDDEN), scale, bias, KIND, WKIND, ROUND_FIRST)
        if WORDS == 1:
            clean = sanitize(norm)
            for j in tl.static_range(1, WORLD):
                peer = tl.load(ctl + CTL_PEERS + peer_at(rank, i, j, WORLD))
                if RAW:
                    put_tagged(peer + line + part * LINE, squares, tag_of(call), lane == 0)
                else:
                    store16(peer + results + at, clean, mask, True)
        store16(norm_out.to(tl.int64) + at, norm, mask, False)
        if WRITE_RESIDUAL:
            store16(residual_out.to(tl.int64) + kept, total, mask, False)
        empty = tl.full([BLOCK], SENTINEL, tl.int32)
        for src in tl.static_range(WORLD):
            here = own + slot + src * source_bytes + local
            store16(here, (empty, empty, empty, empty), mask & (rank != src), False)
    if WRITE_RESIDUAL and not FULL:  # rows of the shard that no token is for
        zeros = tl.zeros([BLOCK], tl.int32)
        for i in range(tl.where(pid < groups * SLICES, mine_rows + pid // SLICES, shard), shard, groups):
            there = residual_out.to(tl.int64) + tl.cast(i, tl.int64) * ROW + byte
            store16(there, (zeros, zeros, zeros, zeros), mask, False)
    # The other owners' rows, as they arrive.
    thread = tl.arange(0, THREADS)
    for t in range(pid, tiles, programs):
        owner = peer_at(rank, t, 1, WORLD)
        first = t // (WORLD - 1) * TILE
        limit = rows_of(owner, tokens, shard) * PACKETS
        if first < limit:
            start = tl.cast(owner * shard, tl.int64) * ROW
            addrs = ()
            for u in tl.static_range(UNROLL):
                q = first + u * THREADS + thread
                here = own + results + start + q.to(tl.int64) * 16
                addrs = addrs + (tl.where(q < limit, here, ctl_at + 8 * CTL_ZEROS),)
            if RAW:
                lines = ()
                scales = ()
                for u in tl.static_range(UNROLL):
                    q = tl.minimum(first + u * THREADS + thread, limit - 1)
                    line = (owner * shard + q // PACKETS) * SLICES
                    line = line if WORDS > 1 else line + q % PACKETS // SLICE
                    lines = lines + (own + squares_at + line.to(tl.int64) * LINE,)
                    scales = scales + (load_scale(weight, q % PACKETS, q >= 0, KIND, WKIND),)
                arrived = poll_sums(
                    addrs, lines, tag_of(call), ctl_at, WAIT_RESULT_DATA, owner, UNROLL, UNROLL, WORDS, True
                )
            else:
                arrived = poll16(addrs, ctl_at, WAIT_RESULT_DATA, owner, UNROLL, 0, True)
            empty = tl.full([THREADS], SENTINEL, tl.int32)
            for u in tl.static_range(UNROLL):
                q = first + u * THREADS + thread
                there = start + q.to(tl.int64) * 16
                got = packet_of(arrived, u)
                norm = got
                if RAW:
                    rstd = reciprocal_rms(arrived[4 * UNROLL + u].to(tl.float32, bitcast=True), eps, HIDDEN)
                    norm = normalized(got, rstd, scales[u], bias, KIND, WKIND, ROUND_FIRST)
                store16(norm_out.to(tl.int64) + there, norm, q < limit, False)
                if FULL and WRITE_RESIDUAL:
                    store16(residual_out.to(tl.int64) + there, got, q < limit, False)
                store16(own + results + there, (empty, empty, empty, empty), q < limit, False)
    end_call(ctl, CTL_DATA, THREADS)


settle_keys(globals())
