"""One-shot all-reduce + residual + RMSNorm: every rank sums all rows (proof: kernels/__init__)."""

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
    CTL_ONE_SHOT,
    CTL_PEERS,
    CTL_ZEROS,
    SENTINEL,
    WAIT_ONE_SHOT,
    load16,
    poll16,
    sanitize,
    store16,
)
from fusewire.custom_ops.providers.symm_mem.kernels.packets import (
    INTS,
    end_call,
    fill_nan,
    load_scale,
    peer_at,
    slices_sum,
    squares_of,
    sum_ranks,
)
from fusewire.custom_ops.providers.symm_mem.kernels.quantize import (
    fill_nan_fp8,
    given_scale,
    is_dynamic,
    largest_of,
    packets_per_scale,
    quantized,
    says,
    scale_index,
    scale_of,
    slice_packets,
    slices_largest,
    store4,
    store_fp8,
)
from fusewire.custom_ops.providers.symm_mem.kernels.rows import (
    FP32,
    added,
    normalized,
    reciprocal_rms,
    sum_of_squares,
    words_of,
)


@triton.jit(do_not_specialize=INTS, do_not_specialize_on_alignment=("quant_scale",))
def one_shot_kernel(
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
    rank: tl.int32,
    slots: tl.int64,
    slot_bytes: tl.int64,
    source_bytes: tl.int64,
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
    SLICES: tl.constexpr,
    BLOCK: tl.constexpr,
    THREADS: tl.constexpr,
) -> None:
    """Push all rows to every peer; sum, add and normalise all rows here.

    SLICES consecutive blocks share a row, and each group of blocks takes rows in strides. A block
    pushes its part of a row to the peers' slots of this call (relaxed stores, data as flag), polls
    its own slots until every rank's part has arrived, and resets them to the sentinel. Blocks of
    one row exchange their sums of squares in tagged words of this GPU's memory; they must be
    resident together.

    Args (the others are in the package's docstring):
        tokens, rank: rows of x, residual and both results, all (tokens, hidden); this rank.
        slots, slot_bytes: byte offset of the two slots in the symmetric buffer; bytes of a slot.
        source_bytes: bytes of one rank's part of a slot.
        slices_at: byte offset of the tagged words, a cache line per row.
        quant_at: byte offset of the tagged words with slices' largest values, a line per row.
    """
    PACKETS: tl.constexpr = HIDDEN // 4 if KIND == FP32 else HIDDEN // 8
    # BATCH_INVARIANT: whole blocks, which are subtrees of the row; the last may have no packets.
    SLICE: tl.constexpr = BLOCK if BATCH_INVARIANT else slice_packets(QUANT, HIDDEN, PACKETS, SLICES)
    USED: tl.constexpr = (PACKETS + SLICE - 1) // SLICE
    NUMBERS: tl.constexpr = HIDDEN // PACKETS
    LANES: tl.constexpr = packets_per_scale(QUANT, HIDDEN, PACKETS)
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
    lost = tl.where(has_failed(ctl_at), tokens, 0)
    if WRITE_NORM:
        fill_nan(norm_out, lost, start, stride, byte, mask, PACKETS * 16)
    if WRITE_RESIDUAL:
        fill_nan(residual_out, lost, start, stride, byte, mask, PACKETS * 16)
    if QUANT != "":
        fill_nan_fp8(quantized_out, scales_out, lost, start, stride, packet, mask, HIDDEN, PACKETS, KIND, QUANT)
        given = given_scale(quant_scale)
    for row in range(start, tokens - lost, stride):
        at = tl.cast(row, tl.int64) * (PACKETS * 16) + byte
        clean = sanitize(mine)
        for j in tl.static_range(1, WORLD):
            store16(peers[j - 1] + slot + rank * source_bytes + at, clean, mask, True)
        add = load16(residual.to(tl.int64) + at, mask, False) if HAS_RESIDUAL else mine
        scale = load_scale(weight, packet, mask, KIND, WKIND)
        inner_scale = load_scale(inner_weight, packet, mask, KIND, INNER_WKIND) if INNER else scale
        addrs = ()
        for src in tl.static_range(WORLD):
            here = own + slot + src * source_bytes + at
            addrs = addrs + (tl.where(mask & (rank != src), here, ctl_at + 8 * CTL_ZEROS),)
        sources = poll16(addrs, ctl_at, WAIT_ONE_SHOT, 0, WORLD, 1, False)
        addend = sum_ranks(sources, mine, rank, WORLD, KIND)
        if INNER:
            inner_at = own + slices_at + tl.cast(row, tl.int64) * CACHE_LINE_BYTES + CACHE_LINE_BYTES // 2
            squares = squares_of(addend, mask, KIND, False, BATCH_INVARIANT)
            squares = slices_sum(squares, inner_at, part, call, ctl_at, rank, lane, USED, BATCH_INVARIANT)
            inner_rstd = reciprocal_rms(squares, inner_eps, HIDDEN, BATCH_INVARIANT)
            addend = normalized(
                addend, inner_rstd, inner_scale, inner_bias, KIND, INNER_WKIND, INNER_ROUND_FIRST, False
            )
        total = added(addend, add, KIND, WIDE_SUM) if HAS_RESIDUAL else addend
        squares = tl.sum(sum_of_squares(total, KIND, WIDE_SUM, False), axis=0)
        if INNER or BATCH_INVARIANT:
            squares = squares_of(total, mask, KIND, WIDE_SUM, BATCH_INVARIANT)
        exchange = own + slices_at + tl.cast(row, tl.int64) * CACHE_LINE_BYTES
        squares = slices_sum(squares, exchange, part, call, ctl_at, rank, lane, USED, BATCH_INVARIANT)
        rstd = reciprocal_rms(squares, eps, HIDDEN, BATCH_INVARIANT)
        norm = normalized(total, rstd, scale, bias, KIND, WKIND, ROUND_FIRST, WIDE_SUM)
        if WRITE_NORM:
            store16(norm_out.to(tl.int64) + at, norm, mask, False)
        if WRITE_RESIDUAL:
            store16(residual_out.to(tl.int64) + at, words_of(total, KIND, WIDE_SUM), mask, False)
        if QUANT != "":
            largest = largest_of(norm, mask, HIDDEN, PACKETS, KIND, QUANT)
            if says(QUANT, "token"):
                line = own + quant_at + tl.cast(row, tl.int64) * CACHE_LINE_BYTES
                largest = slices_largest(largest, line, part, call, ctl_at, rank, lane, SLICES)
            row_scale = scale_of(largest, given, quant_scale is not None, KIND, QUANT)
            place = tl.cast(row, tl.int64) * HIDDEN + packet.to(tl.int64) * NUMBERS
            store_fp8(quantized_out.to(tl.int64) + place, quantized(norm, row_scale, KIND, QUANT), mask, KIND)
            if is_dynamic(QUANT):
                index = scale_index(row, packet // LANES, tokens, HIDDEN, QUANT)
                bits = row_scale.to(tl.int32, bitcast=True)
                store4(scales_out.to(tl.int64) + index * 4, bits, mask & (packet % LANES == 0))
        empty = tl.full([BLOCK], SENTINEL, tl.int32)
        for src in tl.static_range(WORLD):
            here = own + slot + src * source_bytes + at
            store16(here, (empty, empty, empty, empty), mask & (rank != src), False)
        following = x.to(tl.int64) + tl.cast(row + stride, tl.int64) * (PACKETS * 16) + byte
        mine = load16(following, mask & (row + stride < tokens), False)
    end_call(ctl, CTL_ONE_SHOT, THREADS)


compute_cache_keys(globals())
