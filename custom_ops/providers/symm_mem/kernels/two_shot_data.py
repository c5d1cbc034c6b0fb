"""Two-shot all-reduce + residual + RMSNorm, data as its own flag (proof: kernels/__init__)."""

# In Triton a tuple grows by addition, and its type with it.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from fusewire.custom_ops._triton_private import compute_cache_keys
from fusewire.custom_ops.providers.symm_mem.kernels.counters import has_failed, read_counter
from fusewire.custom_ops.providers.symm_mem.kernels.memory import (
    CACHE_LINE_BYTES,
    COUNTER_LOG2,
    CTL_DATA,
    CTL_PEERS,
    CTL_ZEROS,
    SENTINEL,
    WAIT_PARTIAL_DATA,
    WAIT_RESULT_DATA,
    load16,
    poll16,
    poll_sums,
    put_tagged,
    sanitize,
    store16,
)
from fusewire.custom_ops.providers.symm_mem.kernels.packets import (
    INTS,
    end_call,
    fill_nan,
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
    added,
    normalized,
    reciprocal_rms,
    sum_of_squares,
    words_of,
)


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
    """Load a tile of packets of this rank's partial rows, zeros past the end."""
    owner = peer_at(rank, tile, 1, WORLD)
    q = tile // (WORLD - 1) * TILE + tl.arange(0, TILE)
    at = tl.cast(owner * shard, tl.int64) * (PACKETS * 16) + q.to(tl.int64) * 16
    return load16(x.to(tl.int64) + at, q < rows_of(owner, tokens, shard) * PACKETS, False)


@triton.jit(do_not_specialize=INTS, do_not_specialize_on_alignment=("quant_scale",))
def two_shot_data_kernel(
    ctl: tl.tensor,
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    inner_weight: tl.tensor,
    norm_out: tl.tensor,
    residual_out: tl.tensor,
    quant_scale: tl.tensor,
    quantized_out: tl.tensor,
    scales_out: tl.tensor,
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
    inner_eps: tl.tensor,
    inner_bias: tl.tensor,
    quant_at: tl.tensor,
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
    WIDE_SUM: tl.constexpr,
    BATCH_INVARIANT: tl.constexpr,
    WRITE_NORM: tl.constexpr,
    QUANT: tl.constexpr,
    REPLICATE_RESIDUAL: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
    THREADS: tl.constexpr,
) -> None:
    """Push partial rows to their owners, compute own rows and push them, take the peers' rows.

    Partial rows go out as a flat copy in tiles of THREADS * UNROLL packets. Then SLICES consecutive
    blocks share an own row: they poll the partial rows, reset them, and push the result (if it is
    not normalised, with the row's squares in tagged words). Last, the peers' rows are polled in
    tiles, written to the results and reset. Stores to peers are relaxed, without fences: each
    packet is its own flag. Blocks with rows or tiles in common must be resident together.

    Args (the others are in the package's docstring):
        tokens: rows of x and norm_out, (tokens, hidden). With REPLICATE_RESIDUAL also of residual
            and residual_out; else these are this rank's own rows, (shard, hidden).
        shard, rank: rows per rank; this rank.
        slots, slot_bytes, source_bytes: byte offset of two slots; bytes of a slot, of a rank's
            part.
        results: byte offset of the peers' rows, (tokens, hidden).
        squares_at: byte offset of the rows' squares, cache lines of tagged words.
        slices_at: byte offset of the words that a row's blocks exchange, a cache line per row.
    """
    tl.static_assert(QUANT == "", "two_shot_data does not quantise")
    PACKETS: tl.constexpr = HIDDEN // 4 if KIND == FP32 else HIDDEN // 8
    # BATCH_INVARIANT: whole blocks, which are subtrees of the row. The last may have no
    # packets; they wait for no peer, so nothing may wait for their words, which can be a call
    # ahead.
    SLICE: tl.constexpr = BLOCK if BATCH_INVARIANT else (PACKETS + SLICES - 1) // SLICES
    USED: tl.constexpr = (PACKETS + SLICE - 1) // SLICE
    ROW: tl.constexpr = PACKETS * 16
    TILE: tl.constexpr = THREADS * UNROLL
    # With few slices the owner pushes rows without waiting for its other slices, and a thread reads
    # one word with squares per slice; else one word, the sum (BATCH_INVARIANT: 1 / rms, for whose
    # exact division registers are lacking sooner). With WIDE_SUM, rows can be normalised elsewhere
    # only where the whole residual is.
    ELSEWHERE: tl.constexpr = REPLICATE_RESIDUAL or not WIDE_SUM
    FEW: tl.constexpr = ELSEWHERE and USED > 1 and USED * UNROLL <= 16
    SQUARES_PER_ROW: tl.constexpr = USED if FEW and not (BATCH_INVARIANT and USED * UNROLL > 8) else 1
    SEND_UNNORMALIZED: tl.constexpr = REPLICATE_RESIDUAL or FEW
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    # Push partial rows to their owners: a flat copy to all peers at once, one tile ahead.
    # Instructions issue in order, so start the first loads before the first use of any.
    tiles = (shard * PACKETS + TILE - 1) // TILE * (WORLD - 1)
    words = _load_tile(x, pid, rank, tokens, shard, WORLD, PACKETS, TILE)
    ctl_at = ctl.to(tl.int64)
    counter = read_counter(ctl_at + 8 * CTL_DATA)
    own = tl.load(ctl + CTL_PEERS + rank)
    call = counter >> COUNTER_LOG2
    slot = slots + (call & 1) * slot_bytes
    lost = tl.where(has_failed(ctl_at), tokens, 0)
    lost_kept = tl.where(lost > 0, tokens if REPLICATE_RESIDUAL else shard, 0)
    tokens -= lost
    shard = tl.where(lost > 0, 0, shard)
    tiles = tl.where(lost > 0, 0, tiles)
    for t in range(pid, tiles, programs):
        target = tl.load(ctl + CTL_PEERS + peer_at(rank, t, 1, WORLD)) + slot + rank * source_bytes
        following = _load_tile(x, t + programs, rank, tokens, shard, WORLD, PACKETS, TILE)
        q = t // (WORLD - 1) * TILE + tl.arange(0, TILE)
        mask = q < rows_of(peer_at(rank, t, 1, WORLD), tokens, shard) * PACKETS
        store16(target + q.to(tl.int64) * 16, sanitize(words), mask, True)
        words = following
    # This rank's own rows.
    lane = tl.arange(0, BLOCK)
    part = pid % SLICES
    packet = part * SLICE + lane
    mask = (lane < SLICE) & (packet < PACKETS)
    byte = packet.to(tl.int64) * 16
    groups = programs // SLICES
    mine_rows = rows_of(rank, tokens, shard)
    begin = tl.where(pid < groups * SLICES, pid // SLICES, lost + lost_kept)
    fill_nan(norm_out, lost, begin, groups, byte, mask, ROW)
    if WRITE_RESIDUAL:
        fill_nan(residual_out, lost_kept, begin, groups, byte, mask, ROW)
    for i in range(tl.where(pid < groups * SLICES, pid // SLICES, mine_rows), mine_rows, groups):
        local = tl.cast(i, tl.int64) * ROW + byte
        at = tl.cast(rank * shard, tl.int64) * ROW + local
        kept = at if REPLICATE_RESIDUAL else local
        mine = load16(x.to(tl.int64) + at, mask, False)
        add = load16(residual.to(tl.int64) + kept, mask, False) if HAS_RESIDUAL else mine
        scale = load_scale(weight, packet, mask, KIND, WKIND)
        inner_scale = load_scale(inner_weight, packet, mask, KIND, INNER_WKIND) if INNER else scale
        addrs = ()
        for src in tl.static_range(WORLD):
            here = own + slot + src * source_bytes + local
            addrs = addrs + (tl.where(mask & (rank != src), here, ctl_at + 8 * CTL_ZEROS),)
        sources = poll16(addrs, ctl_at, WAIT_PARTIAL_DATA, 0, WORLD, 1, False)
        addend = sum_ranks(sources, mine, rank, WORLD, KIND)
        if INNER:
            inner_at = own + slices_at + tl.cast(i, tl.int64) * CACHE_LINE_BYTES + CACHE_LINE_BYTES // 2
            squares = squares_of(addend, mask, KIND, False, BATCH_INVARIANT)
            squares = slices_sum(squares, inner_at, part, call, ctl_at, rank, lane, USED, BATCH_INVARIANT)
            inner_rstd = reciprocal_rms(squares, inner_eps, HIDDEN, BATCH_INVARIANT)
            addend = normalized(
                addend, inner_rstd, inner_scale, inner_bias, KIND, INNER_WKIND, INNER_ROUND_FIRST, False
            )
        total = added(addend, add, KIND, WIDE_SUM) if HAS_RESIDUAL else addend
        if SEND_UNNORMALIZED:
            clean = sanitize(addend if WIDE_SUM else total)
            for j in tl.static_range(1, WORLD):
                # By rows: a peer needs all blocks of a row, so they send to it at the same time.
                peer = tl.load(ctl + CTL_PEERS + peer_at(rank, i, j, WORLD))
                store16(peer + results + at, clean, mask, True)
        squares = tl.sum(sum_of_squares(total, KIND, WIDE_SUM, False), axis=0)
        if INNER or BATCH_INVARIANT:
            squares = squares_of(total, mask, KIND, WIDE_SUM, BATCH_INVARIANT)
        line = squares_at + tl.cast((rank * shard + i) * SLICES, tl.int64) * CACHE_LINE_BYTES
        if SQUARES_PER_ROW > 1:
            for j in tl.static_range(1, WORLD):
                peer = tl.load(ctl + CTL_PEERS + peer_at(rank, i, j, WORLD))
                put_tagged(peer + line + part * 8, squares, tag_of(call), lane == 0)
        exchange = own + slices_at + tl.cast(i, tl.int64) * CACHE_LINE_BYTES
        squares = slices_sum(squares, exchange, part, call, ctl_at, rank, lane, USED, BATCH_INVARIANT)
        own_rstd = reciprocal_rms(squares, eps, HIDDEN, BATCH_INVARIANT)
        norm = normalized(total, own_rstd, scale, bias, KIND, WKIND, ROUND_FIRST, WIDE_SUM)
        if SQUARES_PER_ROW == 1:
            clean = sanitize(norm)
            for j in tl.static_range(1, WORLD):
                peer = tl.load(ctl + CTL_PEERS + peer_at(rank, i, j, WORLD))
                if SEND_UNNORMALIZED:
                    sent = own_rstd if BATCH_INVARIANT else squares
                    put_tagged(peer + line + part * CACHE_LINE_BYTES, sent, tag_of(call), lane == 0)
                else:
                    store16(peer + results + at, clean, mask, True)
        store16(norm_out.to(tl.int64) + at, norm, mask, False)
        if WRITE_RESIDUAL:
            store16(residual_out.to(tl.int64) + kept, words_of(total, KIND, WIDE_SUM), mask, False)
        empty = tl.full([BLOCK], SENTINEL, tl.int32)
        for src in tl.static_range(WORLD):
            here = own + slot + src * source_bytes + local
            store16(here, (empty, empty, empty, empty), mask & (rank != src), False)
    if WRITE_RESIDUAL and not REPLICATE_RESIDUAL:  # rows of the shard without a token
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
            if SEND_UNNORMALIZED:
                lines = ()
                scales = ()
                adds = ()
                for u in tl.static_range(UNROLL):
                    q = tl.minimum(first + u * THREADS + thread, limit - 1)
                    line = (owner * shard + q // PACKETS) * SLICES
                    line = line if SQUARES_PER_ROW > 1 else line + q % PACKETS // SLICE
                    lines = lines + (own + squares_at + line.to(tl.int64) * CACHE_LINE_BYTES,)
                    scales = scales + (load_scale(weight, q % PACKETS, q >= 0, KIND, WKIND),)
                    if WIDE_SUM:
                        there = start + (first + u * THREADS + thread).to(tl.int64) * 16
                        valid = first + u * THREADS + thread < limit
                        adds = adds + load16(residual.to(tl.int64) + there, valid, False)
                arrived = poll_sums(
                    *(addrs, lines, tag_of(call), ctl_at, WAIT_RESULT_DATA, owner),
                    *(UNROLL, UNROLL, SQUARES_PER_ROW, True, "pairs" if BATCH_INVARIANT else "sum"),
                )
            else:
                arrived = poll16(addrs, ctl_at, WAIT_RESULT_DATA, owner, UNROLL, 0, True)
            empty = tl.full([THREADS], SENTINEL, tl.int32)
            for u in tl.static_range(UNROLL):
                q = first + u * THREADS + thread
                there = start + q.to(tl.int64) * 16
                got = packet_of(arrived, u)
                norm = got
                total = got
                if SEND_UNNORMALIZED:
                    total = added(got, packet_of(adds, u), KIND, True) if WIDE_SUM else got
                    rstd = arrived[4 * UNROLL + u].to(tl.float32, bitcast=True)
                    if SQUARES_PER_ROW > 1 or not BATCH_INVARIANT:
                        rstd = reciprocal_rms(rstd, eps, HIDDEN, BATCH_INVARIANT)
                    norm = normalized(total, rstd, scales[u], bias, KIND, WKIND, ROUND_FIRST, WIDE_SUM)
                store16(norm_out.to(tl.int64) + there, norm, q < limit, False)
                if REPLICATE_RESIDUAL and WRITE_RESIDUAL:
                    store16(residual_out.to(tl.int64) + there, words_of(total, KIND, WIDE_SUM), q < limit, False)
                store16(own + results + there, (empty, empty, empty, empty), q < limit, False)
    end_call(ctl, CTL_DATA, THREADS)


compute_cache_keys(globals())
