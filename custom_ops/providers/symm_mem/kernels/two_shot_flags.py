"""Two-shot all-reduce + residual + RMSNorm with one flag per row (proof: kernels/__init__)."""

# In Triton a tuple grows by addition, and its type with it.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from fusewire.custom_ops._triton_private import compute_cache_keys
from fusewire.custom_ops.providers.symm_mem.kernels.counters import has_failed, read_counter
from fusewire.custom_ops.providers.symm_mem.kernels.memory import (
    COUNTER_LOG2,
    CTL_FLAGS,
    CTL_PEERS,
    SENTINEL,
    WAIT_PARTIAL_FLAG,
    WAIT_RESULT_FLAG,
    load16,
    load_i64,
    prefetch,
    put_tagged,
    set_flags,
    store16,
    wait_flag,
)
from fusewire.custom_ops.providers.symm_mem.kernels.packets import (
    INTS,
    accumulate,
    end_call,
    flag_of,
    load_scale,
    packet_of,
    peer_at,
    poisoned,
    recomputed,
    rows_of,
    squares_of,
    tag_of,
)
from fusewire.custom_ops.providers.symm_mem.kernels.quantize import (
    NAN_SCALE,
    given_scale,
    is_dynamic,
    largest_of,
    load4,
    load_fp8,
    nan_fp8,
    packets_per_scale,
    poisoned_fp8,
    quant_code,
    quantized,
    scale_index,
    scale_of,
    scales_per_row,
    staged_scales,
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


@triton.jit
def base_of(ctl_at: tl.tensor, peer: tl.tensor) -> tl.tensor:
    """Return the address of a peer's buffer (int64)."""
    return load_i64(ctl_at + 8 * CTL_PEERS + tl.cast(peer, tl.int64) * 8, peer >= 0)


@triton.jit(do_not_specialize=INTS, do_not_specialize_on_alignment=("quant_scale",))
def two_shot_flags_kernel(
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
    lookahead: tl.int32,
    result_lag: tl.int32,
    inbox: tl.int64,
    source_bytes: tl.int64,
    results: tl.int64,
    rstds: tl.int64,
    partial_flags: tl.int64,
    result_flags: tl.int64,
    flag_bytes: tl.int64,
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
    IN_PLACE: tl.constexpr,
    BLOCK: tl.constexpr,
    THREADS: tl.constexpr,
) -> None:
    """Push partial rows to their owners, compute own rows and push them, take the peers' rows.

    A block takes row i of every rank's shard at a time: i starts at its number and advances by the
    grid's size (a stride). In step s it pushes its partial rows of stride s, finishes its own row
    of stride s - lookahead, signals both, and takes the peers' rows of stride s - lookahead -
    result_lag. This overlaps partial rows, results and local work, and partial rows are still in
    L2.

    Row stores are weak. After a barrier of the block, one thread per peer sets its flags:
    fence.acq_rel.sys, then relaxed stores of the call's number. A reader acquires the flag at
    system scope before a barrier and loads rows after it. Flags contain their call's number, so
    nothing is reset, and its tokens and options, so that a rank that makes another call is noticed.
    A block owns whole rows, so one resident block is enough (Progress). Rows whose wait gave up
    become NaN.

    Args (the others are in the package's docstring):
        tokens: rows of x and norm_out, (tokens, hidden). With REPLICATE_RESIDUAL also of residual
            and residual_out; else these are this rank's own rows, (shard, hidden).
        shard, rank: rows per rank; this rank.
        lookahead: strides between partial rows and their results; at least 1 if there are several.
        result_lag: strides between own rows and the peers' rows; not negative.
        inbox, source_bytes: byte offset of the partial rows; bytes of one rank's.
        results: byte offset of the peers' rows (tokens, hidden). With IN_PLACE it is the output
            itself (the norm, or the residual with REPLICATE_RESIDUAL), and nothing is copied. If
            the norm is only quantised and the residual sharded, these are FP8 rows.
        rstds: byte offset of the tagged words with 1 / rms of each row.
        partial_flags, result_flags, flag_bytes: byte offsets of the flags; bytes of one rank's.
        quant_at: byte offset of the rows' computed scales (fp32), which the owner sends.
    """
    PACKETS: tl.constexpr = HIDDEN // 4 if KIND == FP32 else HIDDEN // 8
    ROW: tl.constexpr = PACKETS * 16
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    # FP8 rows travel, half the bytes or less, unless the norm itself must travel.
    SEND_FP8: tl.constexpr = QUANT != "" and not REPLICATE_RESIDUAL and not WRITE_NORM
    NUMBERS: tl.constexpr = HIDDEN // PACKETS
    SCALES: tl.constexpr = scales_per_row(QUANT, HIDDEN)
    LANES: tl.constexpr = packets_per_scale(QUANT, HIDDEN, PACKETS)
    packet = tl.arange(0, BLOCK)
    mask = packet < PACKETS
    byte = packet.to(tl.int64) * 16
    x_at = x.to(tl.int64)
    ctl_at = ctl.to(tl.int64)
    call = (read_counter(ctl_at + 8 * CTL_FLAGS) >> COUNTER_LOG2) + 1
    own = tl.load(ctl + CTL_PEERS + rank)
    thread = tl.arange(0, THREADS)
    failed = has_failed(ctl_at).to(tl.int32)
    is_peer = (thread < WORLD) & (thread != rank) & (failed == 0)
    OPTIONS: tl.constexpr = REPLICATE_RESIDUAL + 2 * IN_PLACE + 4 * INNER + 8 * HAS_RESIDUAL + 16 * WIDE_SUM
    flag_value = flag_of(call, tokens, OPTIONS)
    if QUANT != "":
        flag_value = flag_of(call, tokens ^ (quant_code(QUANT, WRITE_NORM) << 16), OPTIONS)
        given = given_scale(quant_scale)
    peer_base = load_i64(ctl_at + 8 * CTL_PEERS + thread.to(tl.int64) * 8, is_peer)
    peer_rows = rows_of(thread, tokens, shard)
    mine_rows = rows_of(rank, tokens, shard)
    # Flags that peers write here, by writer; then flags that this rank writes there.
    flags_in = own + thread.to(tl.int64) * flag_bytes
    flags_out = peer_base + rank * flag_bytes
    KEEP: tl.constexpr = WKIND >= 0 and BLOCK // THREADS <= 2  # the weight stays in registers
    GROUP: tl.constexpr = max(1, 8 * THREADS // BLOCK)  # rows in flight
    ADD_TAKEN: tl.constexpr = REPLICATE_RESIDUAL and WIDE_SUM
    # With the residual's as many; divisions need registers.
    TAKEN: tl.constexpr = max(1, GROUP // 2) if ADD_TAKEN or QUANT != "" else GROUP
    kept_scale = load_scale(weight, packet, mask, KIND, WKIND if KEEP else -1)
    steps = (shard + programs - 1) // programs + lookahead + result_lag
    for s in range(steps):
        # Push this rank's partial rows to their owners.
        i = pid + s * programs
        pushed = i < shard
        if pushed:
            peer_rotation = recomputed(pid)
            for g in tl.static_range(1, WORLD, GROUP):
                partial = ()
                for j in tl.static_range(g, g + GROUP):
                    if j < WORLD:
                        peer = peer_at(rank, peer_rotation, j, WORLD)
                        valid = mask & (i < rows_of(peer, tokens, shard))
                        at = tl.cast(peer * shard + i, tl.int64) * ROW + byte
                        partial = partial + load16(x_at + at, valid, False)
                for j in tl.static_range(g, g + GROUP):
                    if j < WORLD:
                        peer = peer_at(rank, peer_rotation, j, WORLD)
                        valid = mask & (i < rows_of(peer, tokens, shard))
                        base = base_of(ctl_at, peer)
                        at = base + inbox + rank * source_bytes + tl.cast(i, tl.int64) * ROW + byte
                        store16(at, packet_of(partial, j - g), valid & (failed == 0), False)
        # Finish this rank's own row.
        done = i - lookahead * programs
        finished = (done >= 0) & (done < mine_rows)
        if finished:
            local = tl.cast(done, tl.int64) * ROW + byte
            first_row = tl.cast(rank * shard, tl.int64) * ROW
            at = first_row + local
            kept = at if REPLICATE_RESIDUAL else local
            # Load into L2 while waiting for flags; the registers are for the peers' parts.
            prefetch(x_at + at, mask)
            if HAS_RESIDUAL:
                prefetch(residual.to(tl.int64) + kept, mask)
            flag = flags_in + partial_flags + tl.cast(done, tl.int64) * 8
            late = wait_flag(flag, flag_value, is_peer, ctl_at, WAIT_PARTIAL_FLAG, thread, False)
            bad = tl.maximum(tl.max(late, axis=0), failed)
            tl.debug_barrier()
            sums = ()
            none = recomputed(0)
            for src in tl.static_range(WORLD):
                # This rank's own part is in x.
                part_at = tl.where(rank == src, x_at + first_row, own + inbox + (none + src) * source_bytes)
                words = load16(part_at + local, mask, True)
                sums = accumulate(sums, words, src, words, rank, KIND)
            add = load16(residual.to(tl.int64) + kept, mask, False) if HAS_RESIDUAL else (mask,)
            scale = kept_scale if KEEP else load_scale(weight, packet, mask, KIND, WKIND)
            addend = poisoned(words_of(sums, KIND, True), bad)
            if INNER:
                inner_scale = load_scale(inner_weight, packet, mask, KIND, INNER_WKIND)
                inner_squares = squares_of(addend, mask, KIND, False, BATCH_INVARIANT)
                inner_rstd = reciprocal_rms(inner_squares, inner_eps, HIDDEN, BATCH_INVARIANT)
                addend = normalized(
                    addend, inner_rstd, inner_scale, inner_bias, KIND, INNER_WKIND, INNER_ROUND_FIRST, False
                )
            total = added(addend, add, KIND, WIDE_SUM) if HAS_RESIDUAL else addend
            squares = tl.sum(sum_of_squares(total, KIND, WIDE_SUM, False), axis=0)
            if INNER or BATCH_INVARIANT:
                squares = squares_of(total, mask, KIND, WIDE_SUM, BATCH_INVARIANT)
            rstd = reciprocal_rms(squares, eps, HIDDEN, BATCH_INVARIANT)
            norm = normalized(total, rstd, scale, bias, KIND, WKIND, ROUND_FIRST, WIDE_SUM)
            summed = words_of(total, KIND, WIDE_SUM)
            sent = norm
            if REPLICATE_RESIDUAL:
                sent = addend if WIDE_SUM else summed
            peer_rotation = recomputed(pid)
            if QUANT != "":
                row = rank * shard + done
                largest = largest_of(norm, mask, HIDDEN, PACKETS, KIND, QUANT)
                row_scale = scale_of(largest, given, quant_scale is not None, KIND, QUANT)
                fp8 = quantized(norm, row_scale, KIND, QUANT)
                place = tl.cast(row, tl.int64) * HIDDEN + packet.to(tl.int64) * NUMBERS
            for j in tl.static_range(1, WORLD):
                base = base_of(ctl_at, peer_at(rank, peer_rotation, j, WORLD))
                if SEND_FP8:
                    store_fp8(base + results + place, fp8, mask & (failed == 0), KIND)
                else:
                    store16(base + results + at, sent, mask & (failed == 0), False)
            if REPLICATE_RESIDUAL:
                row_at = peer_base + rstds + tl.cast(rank * shard + done, tl.int64) * 8
                # Of a tensor of equal values, one for each thread.
                one = tl.max(tl.reshape(rstd, (BLOCK // THREADS, THREADS)), axis=0) if BATCH_INVARIANT else rstd
                put_tagged(row_at, one, tag_of(call), is_peer)
            if WRITE_NORM:
                store16(norm_out.to(tl.int64) + at, norm, mask, False)
            if QUANT != "":
                store_fp8(quantized_out.to(tl.int64) + place, fp8, mask, KIND)
            if is_dynamic(QUANT):
                scales_at = quant_at + tl.cast(row, tl.int64) * (SCALES * 4)
                scales = staged_scales(row_scale, own + scales_at, packet, mask, HIDDEN, PACKETS, QUANT)
                for j in tl.static_range(1, WORLD):
                    base = base_of(ctl_at, peer_at(rank, peer_rotation, j, WORLD))
                    store4(base + scales_at + packet * 4, scales, (packet < SCALES) & (failed == 0))
                index = scale_index(row, packet, tokens, HIDDEN, QUANT)
                store4(scales_out.to(tl.int64) + index * 4, scales, packet < SCALES)
            if WRITE_RESIDUAL:
                store16(residual_out.to(tl.int64) + kept, summed, mask, False)
        if WRITE_RESIDUAL and not REPLICATE_RESIDUAL:  # noqa: SIM102
            if (done >= mine_rows) & (done < shard):  # a row of the shard without a token
                zeros = tl.zeros([BLOCK], tl.int32)
                there = residual_out.to(tl.int64) + tl.cast(done, tl.int64) * ROW + byte
                store16(there, (zeros, zeros, zeros, zeros), mask, False)
        if pushed | finished:
            tl.debug_barrier()
            first = flags_out + partial_flags + tl.cast(i, tl.int64) * 8
            second = flags_out + result_flags + tl.cast(done, tl.int64) * 8
            set_flags(is_peer & (i < peer_rows), first, is_peer & finished, second, flag_value)
        # Take the peers' rows.
        taken = i - (lookahead + result_lag) * programs
        if (taken >= 0) & (taken < shard):
            flag = flags_in + result_flags + tl.cast(taken, tl.int64) * 8
            waits = is_peer & (taken < peer_rows)
            late = wait_flag(flag, flag_value, waits, ctl_at, WAIT_RESULT_FLAG, thread, True)
            bad = tl.maximum(tl.max(late, axis=0), failed)
            tl.debug_barrier()
            peer_rotation = recomputed(pid)
            if is_dynamic(QUANT):
                for j in tl.static_range(1, WORLD):
                    peer = peer_at(rank, peer_rotation, j, WORLD)
                    valid = (packet < SCALES) & (taken < rows_of(peer, tokens, shard))
                    row = tl.cast(peer * shard + taken, tl.int64)
                    scales = load4(own + quant_at + (row * SCALES + packet) * 4, valid)
                    scales = tl.where(bad > 0, NAN_SCALE, scales)
                    index = scale_index(row, packet, tokens, HIDDEN, QUANT)
                    store4(scales_out.to(tl.int64) + index * 4, scales, valid)
            if SEND_FP8:
                if not IN_PLACE:
                    for g in tl.static_range(1, WORLD, TAKEN):
                        arrived = ()
                        for j in tl.static_range(g, g + TAKEN):
                            if j < WORLD:
                                peer = peer_at(rank, peer_rotation, j, WORLD)
                                valid = mask & (taken < rows_of(peer, tokens, shard))
                                row = tl.cast(peer * shard + taken, tl.int64)
                                place = row * HIDDEN + packet.to(tl.int64) * NUMBERS
                                arrived = arrived + load_fp8(own + results + place, valid)
                        for j in tl.static_range(g, g + TAKEN):
                            if j < WORLD:
                                peer = peer_at(rank, peer_rotation, j, WORLD)
                                valid = mask & (taken < rows_of(peer, tokens, shard))
                                row = tl.cast(peer * shard + taken, tl.int64)
                                place = row * HIDDEN + packet.to(tl.int64) * NUMBERS
                                got = poisoned_fp8(arrived, j - g, bad)
                                store_fp8(quantized_out.to(tl.int64) + place, got, valid, KIND)
            elif REPLICATE_RESIDUAL or not IN_PLACE or QUANT != "":
                scale = kept_scale if KEEP else load_scale(weight, packet, mask, KIND, WKIND)
                for g in tl.static_range(1, WORLD, TAKEN):
                    arrived = ()
                    rms = ()
                    adds = ()
                    for j in tl.static_range(g, g + TAKEN):
                        if j < WORLD:
                            peer = peer_at(rank, peer_rotation, j, WORLD)
                            valid = mask & (taken < rows_of(peer, tokens, shard))
                            row = tl.cast(peer * shard + taken, tl.int64)
                            arrived = arrived + load16(own + results + row * ROW + byte, valid, True)
                            if ADD_TAKEN:
                                adds = adds + load16(residual.to(tl.int64) + row * ROW + byte, valid, False)
                            if REPLICATE_RESIDUAL:
                                here = taken < rows_of(peer, tokens, shard)
                                rms = rms + (load_i64(own + rstds + row * 8, here),)
                    for j in tl.static_range(g, g + TAKEN):
                        if j < WORLD:
                            peer = peer_at(rank, peer_rotation, j, WORLD)
                            here = taken < rows_of(peer, tokens, shard)
                            row = tl.cast(peer * shard + taken, tl.int64)
                            at = row * ROW + byte
                            got = poisoned(packet_of(arrived, j - g), bad)
                            if REPLICATE_RESIDUAL:
                                rstd = rms[j - g].to(tl.int32).to(tl.float32, bitcast=True)
                                total = added(got, packet_of(adds, j - g), KIND, True) if ADD_TAKEN else got
                                norm = normalized(total, rstd, scale, bias, KIND, WKIND, ROUND_FIRST, WIDE_SUM)
                                if WRITE_NORM:
                                    store16(norm_out.to(tl.int64) + at, norm, mask & here, False)
                                if WRITE_RESIDUAL and (ADD_TAKEN or not IN_PLACE):
                                    summed = words_of(total, KIND, WIDE_SUM)
                                    store16(residual_out.to(tl.int64) + at, summed, mask & here, False)
                            else:
                                norm = got
                                if not IN_PLACE:
                                    store16(norm_out.to(tl.int64) + at, got, mask & here, False)
                            if QUANT != "":
                                row_scale = given
                                if is_dynamic(QUANT):
                                    scale_at = row * SCALES + packet // LANES
                                    scales = load4(own + quant_at + scale_at * 4, mask & here)
                                    row_scale = scales.to(tl.float32, bitcast=True)
                                fp8 = quantized(norm, row_scale, KIND, QUANT)
                                place = row * HIDDEN + packet.to(tl.int64) * NUMBERS
                                store_fp8(quantized_out.to(tl.int64) + place, fp8, mask & here, KIND)
            if IN_PLACE:  # noqa: SIM102 (the one is known at compile time, the other not)
                if bad > 0:
                    nan = tl.full([BLOCK], SENTINEL, tl.int32)
                    for j in tl.static_range(1, WORLD):
                        peer = peer_at(rank, peer_rotation, j, WORLD)
                        valid = mask & (taken < rows_of(peer, tokens, shard))
                        row = tl.cast(peer * shard + taken, tl.int64)
                        if SEND_FP8:
                            at = own + results + row * HIDDEN + packet.to(tl.int64) * NUMBERS
                            store_fp8(at, nan_fp8(packet), valid, KIND)
                        else:
                            at = own + results + row * ROW + byte
                            store16(at, (nan, nan, nan, nan), valid, False)
    end_call(ctl, CTL_FLAGS, THREADS)


compute_cache_keys(globals())
