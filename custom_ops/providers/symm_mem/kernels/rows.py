"""Arithmetic of the kernels on packed 32-bit words.

A packet of 16 bytes holds eight bf16 or fp16 numbers, or four fp32 ones, as four int32 tensors.
KIND says which. `low` and `high` return a word's two halves in fp32 (fp32 words have only the low
one). With WIDE, a packet is instead eight fp32 tensors: a sum that is not rounded to KIND, a 16-bit
dtype. Only `load_weight` accesses memory.
"""

# In Triton a tuple grows by addition, and its type with it.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from fusewire.custom_ops._triton_private import compute_cache_keys
from fusewire.custom_ops.providers.symm_mem.kernels.memory import load8, load16

BF16 = tl.constexpr(0)
FP16 = tl.constexpr(1)
FP32 = tl.constexpr(2)
NONE = tl.constexpr(-1)  # there is no weight


@triton.jit
def low(word: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """Return the first number of a word, in fp32."""
    if KIND == BF16:
        value = (word << 16).to(tl.float32, bitcast=True)
    elif KIND == FP16:
        value = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        value = word.to(tl.float32, bitcast=True)
    return value


@triton.jit
def high(word: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """Return the second number of a word, in fp32; 0 for fp32 words, whose results ignore it."""
    if KIND == BF16:
        value = (word & -65536).to(tl.float32, bitcast=True)
    elif KIND == FP16:
        value = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        value = tl.zeros_like(word).to(tl.float32)
    return value


@triton.jit
def rounded(value: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """Round fp32 to KIND (to nearest, ties to even) and back."""
    if KIND == BF16:
        value = value.to(tl.bfloat16).to(tl.float32)
    elif KIND == FP16:
        value = value.to(tl.float16).to(tl.float32)
    return value


@triton.jit
def _bits16(value: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    half = value.to(tl.bfloat16) if KIND == BF16 else value.to(tl.float16)
    return half.to(tl.uint16, bitcast=True).to(tl.int32)


@triton.jit
def packed(lo: tl.tensor, hi: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """Round two fp32 tensors to KIND and pack them into words."""
    return lo.to(tl.int32, bitcast=True) if KIND == FP32 else _bits16(lo, KIND) | (_bits16(hi, KIND) << 16)


@triton.jit
def low_of(words: tl.tuple, K: tl.constexpr, KIND: tl.constexpr, WIDE: tl.constexpr) -> tl.tensor:
    """Return the first of the two numbers at place K of a packet, in fp32."""
    return words[2 * K] if WIDE else low(words[K], KIND)


@triton.jit
def high_of(words: tl.tuple, K: tl.constexpr, KIND: tl.constexpr, WIDE: tl.constexpr) -> tl.tensor:
    """Return the second of the two numbers at place K of a packet, in fp32."""
    return words[2 * K + 1] if WIDE else high(words[K], KIND)


@triton.jit
def words_of(words: tl.tuple, KIND: tl.constexpr, WIDE: tl.constexpr) -> tl.tuple:
    """Return a packet's four words; a wide packet is rounded to KIND."""
    out = words
    if WIDE:
        out = ()
        for k in tl.static_range(4):
            out = out + (packed(words[2 * k], words[2 * k + 1], KIND),)
    return out


@triton.jit
def added(words: tl.tuple, residual: tl.tuple, KIND: tl.constexpr, WIDE: tl.constexpr) -> tl.tuple:
    """Add two packets' numbers in fp32; round once, or with WIDE return the wide packet."""
    out = ()
    for k in tl.static_range(4):
        lo = low(words[k], KIND) + low(residual[k], KIND)
        hi = high(words[k], KIND) + high(residual[k], KIND)
        out = out + ((lo, hi) if WIDE else (packed(lo, hi, KIND),))
    return out


@triton.jit
def sum_of_squares(words: tl.tuple, KIND: tl.constexpr, WIDE: tl.constexpr, BATCH_INVARIANT: tl.constexpr) -> tl.tensor:
    """Return the sum of squares of a packet's numbers, in fp32, one value per packet.

    BATCH_INVARIANT: neighbours are added until one value is left.
    """
    if BATCH_INVARIANT:
        pairs = ()
        for k in tl.static_range(4):
            square = low_of(words, k, KIND, WIDE) * low_of(words, k, KIND, WIDE)
            if KIND != FP32:
                square += high_of(words, k, KIND, WIDE) * high_of(words, k, KIND, WIDE)
            pairs = pairs + (square,)
        total = (pairs[0] + pairs[1]) + (pairs[2] + pairs[3])  # type: ignore[misc]
    else:
        total = low_of(words, 0, KIND, WIDE) * low_of(words, 0, KIND, WIDE)
        for k in tl.static_range(1, 4):
            total += low_of(words, k, KIND, WIDE) * low_of(words, k, KIND, WIDE)
        if KIND != FP32:
            for k in tl.static_range(4):
                total += high_of(words, k, KIND, WIDE) * high_of(words, k, KIND, WIDE)
    return total


@triton.jit
def load_weight(
    base: tl.tensor, packet: tl.tensor, mask: tl.tensor, KIND: tl.constexpr, WKIND: tl.constexpr
) -> tl.tuple:
    """Load the weight's words of packets of KIND.

    Returns 4 words per packet; 8 for 16-bit activations with an fp32 weight, 2 for the reverse.
    """
    if WKIND == NONE:
        words = (mask,)
    elif KIND == FP32 and WKIND != FP32:
        words = load8(base + packet.to(tl.int64) * 8, mask)
    elif KIND != FP32 and WKIND == FP32:
        addr = base + packet.to(tl.int64) * 32
        words = load16(addr, mask, False) + load16(addr + 16, mask, False)
    else:
        words = load16(base + packet.to(tl.int64) * 16, mask, False)
    return words


@triton.jit
def _weight_low(words: tl.tuple, K: tl.constexpr, KIND: tl.constexpr, WKIND: tl.constexpr) -> tl.tensor:
    if KIND == FP32 and WKIND != FP32:
        value = low(words[K // 2], WKIND) if K % 2 == 0 else high(words[K // 2], WKIND)
    elif KIND != FP32 and WKIND == FP32:
        value = low(words[2 * K], WKIND)
    else:
        value = low(words[K], WKIND)
    return value


@triton.jit
def _weight_high(words: tl.tuple, K: tl.constexpr, KIND: tl.constexpr, WKIND: tl.constexpr) -> tl.tensor:
    return low(words[2 * K + 1], WKIND) if (KIND != FP32 and WKIND == FP32) else high(words[K], WKIND)


@triton.jit
def _scaled(
    value: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    KIND: tl.constexpr,
    WKIND: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
) -> tl.tensor:
    scale = bias + weight
    if ROUND_FIRST:
        # The source computes in its own dtypes: bias + weight is rounded to the weight's dtype.
        scale = rounded(scale, WKIND)
        value = rounded(value, KIND)
    return value * scale


@triton.jit
def normalized(
    words: tl.tuple,
    rstd: tl.tensor,
    weight: tl.tuple,
    bias: tl.tensor,
    KIND: tl.constexpr,
    WKIND: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    WIDE: tl.constexpr,
) -> tl.tuple:
    """Return a packet's numbers times rstd, scaled by the weight and rounded, in either form."""
    out = ()
    for k in tl.static_range(4):
        lo = low_of(words, k, KIND, WIDE) * rstd
        hi = high_of(words, k, KIND, WIDE) * rstd
        if WKIND != NONE:
            lo = _scaled(lo, _weight_low(weight, k, KIND, WKIND), bias, KIND, WKIND, ROUND_FIRST)
            if KIND != FP32:
                hi = _scaled(hi, _weight_high(weight, k, KIND, WKIND), bias, KIND, WKIND, ROUND_FIRST)
        out = out + (packed(lo, hi, KIND),)
    return out


@triton.jit
def reciprocal_rms(
    sum_squares: tl.tensor, eps: tl.tensor, HIDDEN: tl.constexpr, BATCH_INVARIANT: tl.constexpr
) -> tl.tensor:
    """Return 1 / sqrt(mean of squares + eps).

    BATCH_INVARIANT: each step correctly rounded, as in the batch-invariant norms.
    """
    if BATCH_INVARIANT:
        value = tl.div_rn(1.0, tl.sqrt_rn(sum_squares * (1.0 / HIDDEN) + eps))
    else:
        value = tl.math.rsqrt(sum_squares / HIDDEN + eps)
    return value


compute_cache_keys(globals())
