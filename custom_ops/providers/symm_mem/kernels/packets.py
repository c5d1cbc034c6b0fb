"""Functions that the kernels share: counting calls, owning rows, summing over ranks and slices."""

# In Triton a tuple grows by addition, and its type with it.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from fusewire.custom_ops._triton_private import compute_cache_keys
from fusewire.custom_ops.providers.symm_mem.kernels.counters import add_counter
from fusewire.custom_ops.providers.symm_mem.kernels.memory import (
    COUNTER_LOG2,
    FLAG_CALL_BITS,
    FLAG_OPTION_BITS,
    SENTINEL,
    WAIT_SLICE,
    poll_sums,
    put_tagged,
    store16,
)
from fusewire.custom_ops.providers.symm_mem.kernels.pairs import add_pairs
from fusewire.custom_ops.providers.symm_mem.kernels.rows import (
    high,
    load_weight,
    low,
    sum_of_squares,
    words_of,
)

# Not specialised on 1 or on multiples of 16: one compiled kernel serves all sizes and layouts.
INTS = (
    *("tokens", "shard", "rank", "lookahead", "result_lag", "slots", "slot_bytes", "source_bytes", "results", "rstds"),
    *("slices_at", "squares_at", "inbox", "partial_flags", "result_flags", "flag_bytes", "quant_at"),
)


@triton.jit
def end_call(ctl: tl.tensor, COUNTER: tl.constexpr, THREADS: tl.constexpr) -> None:
    """Count the end of this block's call: together all blocks add 2**16 to the counter."""
    tl.debug_barrier()  # all threads have read the counter
    first = tl.program_id(0) == 0
    amount = tl.where(first, (1 << COUNTER_LOG2) - tl.num_programs(0) + 1, 1).to(tl.int64)
    add_counter(ctl.to(tl.int64) + 8 * COUNTER, amount, tl.arange(0, THREADS) == 0)


@triton.jit
def tag_of(call: tl.tensor) -> tl.tensor:
    """Return the call's number as an int32 tag, never 0."""
    return ((call & 0x7FFFFFFF) + 1).to(tl.int32)


@triton.jit
def flag_of(call: tl.tensor, tokens: tl.tensor, OPTIONS: tl.constexpr) -> tl.tensor:
    """Return a flag's value: the call's number, and what its writer and reader must have alike."""
    alike = (tokens.to(tl.int64) << FLAG_OPTION_BITS) | OPTIONS
    return (alike << FLAG_CALL_BITS) | (call & ((1 << FLAG_CALL_BITS) - 1))


@triton.jit
def fill_nan(
    out: tl.tensor,
    rows: tl.tensor,
    start: tl.tensor,
    stride: tl.tensor,
    byte: tl.tensor,
    mask: tl.tensor,
    ROW: tl.constexpr,
) -> None:
    """Store NaN to rows start, start + stride, ... of a result; `byte`: of packets, where mask."""
    nan = tl.full(byte.shape, SENTINEL, tl.int32)
    for row in range(start, rows, stride):
        store16(out.to(tl.int64) + tl.cast(row, tl.int64) * ROW + byte, (nan, nan, nan, nan), mask, False)


@triton.jit
def rows_of(rank: tl.tensor, tokens: tl.tensor, shard: tl.tensor) -> tl.tensor:
    """Return how many rows a rank owns."""
    return tl.minimum(tl.maximum(tokens - rank * shard, 0), shard)


@triton.jit
def peer_at(rank: tl.tensor, peer_rotation: tl.tensor, j: tl.constexpr, WORLD: tl.constexpr) -> tl.tensor:
    """Return the j-th peer, 1 <= j < WORLD, that a block sends to, starting at peer_rotation.

    Blocks start with different peers, so that all links are in use at any time: 5% more throughput
    than if all blocks send to the same peer at once.
    """
    return (rank + 1 + (peer_rotation + j - 1) % (WORLD - 1)) % WORLD


@triton.jit
def recomputed(value: tl.tensor) -> tl.tensor:
    """Return the 32-bit value, hidden from the compiler's loop-invariant code motion.

    Values derived from it are recomputed where they are used: with 8 ranks there are more
    loop-invariant addresses than registers.
    """
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", (value,), dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def packet_of(words: tl.tuple, N: tl.constexpr) -> tl.tuple:
    """Return the four words of packet N."""
    return (words[4 * N], words[4 * N + 1], words[4 * N + 2], words[4 * N + 3])


@triton.jit
def load_scale(
    weight: tl.tensor, packet: tl.tensor, mask: tl.tensor, KIND: tl.constexpr, WKIND: tl.constexpr
) -> tl.tuple:
    """Return the weight's words of packets, or a placeholder if there is no weight."""
    return load_weight(weight.to(tl.int64), packet, mask, KIND, WKIND) if WKIND >= 0 else (mask,)


@triton.jit
def accumulate(
    sums: tl.tuple, words: tl.tuple, src: tl.constexpr, mine: tl.tuple, rank: tl.tensor, KIND: tl.constexpr
) -> tl.tuple:
    """Add rank src's packet (this rank's own is `mine`) to the eight fp32 sums of a packet."""
    out = ()
    for k in tl.static_range(4):
        word = tl.where(rank == src, mine[k], words[k])
        if src == 0:
            out = out + (low(word, KIND), high(word, KIND))
        else:
            out = out + (sums[2 * k] + low(word, KIND), sums[2 * k + 1] + high(word, KIND))
    return out


@triton.jit
def sum_ranks(
    sources: tl.tuple,
    mine: tl.tuple,
    rank: tl.tensor,
    WORLD: tl.constexpr,
    KIND: tl.constexpr,
) -> tl.tuple:
    """Sum the packets of ranks 0, 1, ... in that order, and round."""
    sums = ()
    for src in tl.static_range(WORLD):
        sums = accumulate(sums, packet_of(sources, src), src, mine, rank, KIND)
    return words_of(sums, KIND, True)


@triton.jit
def squares_of(
    words: tl.tuple, mask: tl.tensor, KIND: tl.constexpr, WIDE: tl.constexpr, BATCH_INVARIANT: tl.constexpr
) -> tl.tensor:
    """Return the sum of squares of a block's numbers where mask (fp32).

    A scalar; BATCH_INVARIANT: by `add_pairs`, so a tensor of equal values.
    """
    squares = tl.where(mask, sum_of_squares(words, KIND, WIDE, BATCH_INVARIANT), 0.0)
    return add_pairs(squares, mask.shape[0]) if BATCH_INVARIANT else tl.sum(squares, axis=0)


@triton.jit
def slices_sum(
    value: tl.tensor,
    at: tl.tensor,
    part: tl.tensor,
    call: tl.tensor,
    ctl: tl.tensor,
    rank: tl.tensor,
    lane: tl.tensor,
    USED: tl.constexpr,
    BATCH_INVARIANT: tl.constexpr,
) -> tl.tensor:
    """Sum an fp32 value over the USED blocks with packets of a row, in slice order.

    BATCH_INVARIANT: neighbouring slices are added until one value is left. The blocks exchange
    tagged words at `at` in this GPU's memory; `part` is this block's slice.
    """
    if USED > 1:
        JOIN: tl.constexpr = "pairs" if BATCH_INVARIANT else "sum"
        put_tagged(at + part * 8, value, tag_of(call), lane == 0)
        value = poll_sums((), (at,), tag_of(call), ctl, WAIT_SLICE, rank, 0, 1, USED, True, JOIN)[0].to(
            tl.float32, bitcast=True
        )
    return value


@triton.jit
def poisoned(words: tl.tuple, bad: tl.tensor) -> tl.tuple:
    """Return the words, or NaNs where a wait gave up (`bad` > 0), so that old data is not used."""
    out = ()
    for k in tl.static_range(4):
        out = out + (tl.where(bad > 0, SENTINEL, words[k]),)
    return out


compute_cache_keys(globals())
