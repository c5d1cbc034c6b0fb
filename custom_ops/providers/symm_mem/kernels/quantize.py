"""Quantisation of normalised packets to FP8 (float8_e4m3fn), with native's bits.

QUANT is the text of a `fusewire.custom_ops.ops.quantization.QuantSpec`, "" for none. It names the
kind, and the options that differ from their defaults. A packet of
eight 16-bit numbers becomes two words of four FP8 numbers each; one of four fp32 numbers becomes
one word. A NaN becomes 0x7f. The largest absolute value is taken over the bits of |n| as integers,
among which NaN is the largest, so that the scale of a row with a NaN is NaN too.
"""

# In Triton a tuple grows by addition, and its type with it.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment,misc"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from fusewire.custom_ops._triton_private import compute_cache_keys
from fusewire.custom_ops.providers.symm_mem.kernels.memory import WAIT_SLICE, poll_sums, put_tagged
from fusewire.custom_ops.providers.symm_mem.kernels.packets import tag_of
from fusewire.custom_ops.providers.symm_mem.kernels.rows import FP32, high, low, rounded

NAN_BYTES = tl.constexpr(0x7F7F7F7F)  # four NaNs in FP8
NAN_SCALE = tl.constexpr(0x7FC00000)  # one in fp32
_ABSOLUTE = tl.constexpr(0x7FFFFFFF)
_FP8_MAX = tl.constexpr(448.0)
_INVERSE_MAX = tl.constexpr(1.0 / 448.0)


@triton.constexpr_function
def says(QUANT: str, option: str) -> bool:
    """Return whether the text has an option that is not the default, or a kind."""
    return option in QUANT.split(" ")


@triton.constexpr_function
def number(QUANT: str, name: str) -> float:
    """Return the number of an option; 0 for none."""
    found = [part.partition("=")[2] for part in QUANT.split(" ") if part.partition("=")[0] == name]
    return float(found[0]) if found else 0.0


@triton.constexpr_function
def is_dynamic(QUANT: str) -> bool:
    """Return whether the norm is quantised by scales that are computed from it."""
    return QUANT.split(" ")[0] in ("token", "group")


@triton.constexpr_function
def scales_per_row(QUANT: str, HIDDEN: int) -> int:
    """Return the number of scales of a row, at least 1."""
    return HIDDEN // 128 if QUANT.split(" ")[0] == "group" else 1


@triton.constexpr_function
def packets_per_scale(QUANT: str, HIDDEN: int, PACKETS: int) -> int:
    """Return the number of packets that share a scale."""
    return 128 * PACKETS // HIDDEN if QUANT.split(" ")[0] == "group" else PACKETS


@triton.constexpr_function
def slice_packets(QUANT: str, HIDDEN: int, PACKETS: int, SLICES: int) -> int:
    """Return the packets of a slice of a row; whole groups, if these have scales."""
    packets = (PACKETS + SLICES - 1) // SLICES
    each = 128 * PACKETS // HIDDEN if QUANT.split(" ")[0] == "group" else 1
    return (packets + each - 1) // each * each


@triton.constexpr_function
def quant_code(QUANT: str, WRITE_NORM: bool) -> int:
    """Return three bits for what calls with this quantisation send."""
    kind = {"tensor": 1, "token": 2, "group": 3}[QUANT.split(" ")[0]]
    return kind + 4 * WRITE_NORM


@triton.constexpr_function
def _column_step(QUANT: str) -> int:
    """Return what the height of a column of scales is a multiple of; 0 for scales in rows."""
    parts = QUANT.split(" ")
    return 1 if "layout=columns" in parts else 4 if "layout=aligned_columns" in parts else 0


@triton.jit
def scale_index(row: tl.tensor, group: tl.tensor, tokens: tl.tensor, HIDDEN: tl.constexpr, QUANT: tl.constexpr) -> Any:
    """Return where the result has a scale, in elements (int64)."""
    STEP: tl.constexpr = _column_step(QUANT)
    if STEP == 0:
        index = tl.cast(row, tl.int64) * scales_per_row(QUANT, HIDDEN) + group
    else:
        index = group.to(tl.int64) * ((tokens + STEP - 1) // STEP * STEP) + row
    return index


@triton.jit
def store8(addr: tl.tensor, words: tl.tuple, mask: tl.tensor) -> None:
    """Store two int32 tensors as 8 bytes at each address where mask."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $4, 0; @p st.global.v2.b32 [$1], {$2, $3}; mov.b32 $0, 0; }",
        "=r,l,r,r,r",
        (addr, words[0], words[1], mask.to(tl.int32)),
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def store4(addr: tl.tensor, word: tl.tensor, mask: tl.tensor) -> None:
    """Store an int32 tensor at each address where mask."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.global.b32 [$1], $2; mov.b32 $0, 0; }",
        "=r,l,r,r",
        (addr, word, mask.to(tl.int32)),
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def store_fp8(addr: tl.tensor, words: tl.tuple, mask: tl.tensor, KIND: tl.constexpr) -> None:
    """Store a packet's FP8 numbers at each address where mask."""
    if KIND == FP32:
        store4(addr, words[0], mask)
    else:
        store8(addr, words, mask)


@triton.jit
def load4(addr: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Load the int32 at each address, which a peer may have written; zero where masked."""
    return tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; @p ld.relaxed.sys.global.b32 $0, [$1]; }",
        "=&r,l,r",
        (addr, mask.to(tl.int32)),
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def load_fp8(addr: tl.tensor, mask: tl.tensor) -> tl.tuple:
    """Load the FP8 numbers of a packet of 16-bit numbers, which a peer has written."""
    return tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $3, 0; mov.b32 $0, 0; mov.b32 $1, 0; "
        "@p ld.relaxed.sys.global.v2.b32 {$0, $1}, [$2]; }",
        "=&r,=&r,l,r",
        (addr, mask.to(tl.int32)),
        dtype=(tl.int32, tl.int32),
        is_pure=False,
        pack=1,
    )


@triton.jit
def nan_fp8(shape_of: tl.tensor) -> tl.tuple:
    """Return NaNs in FP8 for a packet of any KIND."""
    word = tl.full(shape_of.shape, NAN_BYTES, tl.int32)
    return (word, word)


@triton.jit
def poisoned_fp8(words: tl.tuple, N: tl.constexpr, bad: tl.tensor) -> tl.tuple:
    """Return packet N's two words, or NaNs where a wait gave up (`bad` > 0)."""
    return (tl.where(bad > 0, NAN_BYTES, words[2 * N]), tl.where(bad > 0, NAN_BYTES, words[2 * N + 1]))


@triton.jit
def fill_nan_fp8(
    out: tl.tensor,
    scales_out: tl.tensor,
    rows: tl.tensor,
    start: tl.tensor,
    stride: tl.tensor,
    packet: tl.tensor,
    mask: tl.tensor,
    HIDDEN: tl.constexpr,
    PACKETS: tl.constexpr,
    KIND: tl.constexpr,
    QUANT: tl.constexpr,
) -> None:
    """Store NaN to the quantised rows start, start + stride, ... and to their scales."""
    LANES: tl.constexpr = packets_per_scale(QUANT, HIDDEN, PACKETS)
    NUMBERS: tl.constexpr = HIDDEN // PACKETS
    for row in range(start, rows, stride):
        at = out.to(tl.int64) + tl.cast(row, tl.int64) * HIDDEN + packet.to(tl.int64) * NUMBERS
        store_fp8(at, nan_fp8(packet), mask, KIND)
        if is_dynamic(QUANT):
            index = scale_index(row, packet // LANES, rows, HIDDEN, QUANT)
            word = tl.full(packet.shape, NAN_SCALE, tl.int32)
            store4(scales_out.to(tl.int64) + index * 4, word, mask & (packet % LANES == 0))


@triton.constexpr_function
def _group_asm(lanes: int) -> str:
    steps = [1 << k for k in reversed(range(lanes.bit_length() - 1))]
    moves = [f"shfl.sync.bfly.b32 t, $0, {step}, 0x1f, 0xffffffff; max.s32 $0, $0, t;" for step in steps]
    return " ".join(["{ .reg .b32 t; mov.b32 $0, $1;", *moves, "}"])


@triton.jit
def group_largest(bits: tl.tensor, LANES: tl.constexpr) -> tl.tensor:
    """Return the largest of each LANES (a power of two, at most 32) neighbouring int32 numbers.

    Neighbouring elements belong to neighbouring threads of a warp, of which all take part.
    """
    return tl.inline_asm_elementwise(_group_asm(LANES), "=&r,r", (bits,), dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def largest_of(
    words: tl.tuple,
    mask: tl.tensor,
    HIDDEN: tl.constexpr,
    PACKETS: tl.constexpr,
    KIND: tl.constexpr,
    QUANT: tl.constexpr,
) -> tl.tensor:
    """Return the largest absolute value of the block's packets or groups, as fp32 bits."""
    bits = tl.zeros_like(words[0])
    if is_dynamic(QUANT):
        for k in tl.static_range(4):
            bits = tl.maximum(bits, low(words[k], KIND).to(tl.int32, bitcast=True) & _ABSOLUTE)
            if KIND != FP32:
                bits = tl.maximum(bits, high(words[k], KIND).to(tl.int32, bitcast=True) & _ABSOLUTE)
        bits = tl.where(mask, bits, 0)
        if says(QUANT, "group"):
            bits = group_largest(bits, packets_per_scale(QUANT, HIDDEN, PACKETS))
        else:
            bits = tl.max(bits, axis=0)
    return bits


@triton.jit
def slices_largest(
    bits: tl.tensor,
    at: tl.tensor,
    part: tl.tensor,
    call: tl.tensor,
    ctl: tl.tensor,
    rank: tl.tensor,
    lane: tl.tensor,
    SLICES: tl.constexpr,
) -> tl.tensor:
    """Return the largest bits of the blocks that share a row, as `packets.slices_sum` sums."""
    if SLICES > 1:
        put_tagged(at + part * 8, bits.to(tl.float32, bitcast=True), tag_of(call), lane == 0)
        bits = poll_sums((), (at,), tag_of(call), ctl, WAIT_SLICE, rank, 0, 1, SLICES, True, "largest")[0]
    return bits


@triton.jit
def given_scale(scale: tl.tensor) -> tl.tensor:
    """Return the call's own number: a scale, or the bound of the largest values; 0 for none."""
    return tl.load(scale) if scale is not None else 0.0


@triton.jit
def scale_of(
    bits: tl.tensor, given: tl.tensor, BOUNDED: tl.constexpr, KIND: tl.constexpr, QUANT: tl.constexpr
) -> tl.tensor:
    """Return the scale (fp32): the given one, or that of the largest absolute values' bits."""
    if is_dynamic(QUANT):
        value = bits.to(tl.float32, bitcast=True)
        # Comparisons with NaN are false, so NaN stays.
        if number(QUANT, "amax_floor") > 0.0:
            value = tl.where(value < number(QUANT, "amax_floor"), number(QUANT, "amax_floor"), value)
            if says(QUANT, "narrow_scale=True") and not BOUNDED:
                value = rounded(value, KIND)  # the floor is
        if BOUNDED:
            value = tl.where(given < value, given, value)
            value = tl.where(given != given, given, value)
        value = value * _INVERSE_MAX if says(QUANT, "amax_by=multiply") else tl.div_rn(value, _FP8_MAX)
        if says(QUANT, "narrow_scale=True"):
            value = rounded(value, KIND)
        if number(QUANT, "scale_floor") > 0.0:
            value = tl.where(value < number(QUANT, "scale_floor"), number(QUANT, "scale_floor"), value)
    else:
        value = given
    return value


@triton.jit
def fused(a: tl.tensor, b: tl.tensor, c: tl.tensor) -> tl.tensor:
    """Return a * b + c in fp32, rounded once."""
    return tl.fma(a, b, c)


@triton.jit
def divided(value: tl.tensor, factor: tl.tensor, divisor: tl.tensor, inverse: tl.tensor) -> tl.tensor:
    """Return value / scale, correctly rounded (below 2**-100 not); scale as `divisor_of` has it.

    With the inverse correctly rounded, one correction makes the quotient wrong by less than a unit
    in the last place, and a second one right (Markstein, 1990). Quotients that are zero, infinite
    or NaN need none, and are the plain product.
    """
    scaled = value * factor
    first = scaled * inverse
    quotient = first
    for _ in tl.static_range(2):
        quotient = fused(fused(-divisor, quotient, scaled), inverse, quotient)
    return tl.where(tl.abs(quotient) > 0.0, quotient, first)


@triton.jit
def divisor_of(scale: tl.tensor) -> tl.tuple:
    """Return (factor, divisor, inverse): a power of two, factor * scale, and 1 / divisor.

    Corrections of quotients neither overflow nor underflow with them. They are the same for all
    numbers of a scale, and so cheaper than a division for each.
    """
    exponent = (scale.to(tl.int32, bitcast=True) >> 23) & 255
    exponent = tl.where(exponent == 0, 254 - (127 + 64), exponent)  # denormal: by 2**64
    factor = (tl.maximum(254 - exponent, 1) << 23).to(tl.float32, bitcast=True)
    divisor = scale * factor
    return (factor, divisor, tl.div_rn(1.0, divisor))


@triton.jit
def _applied(value: tl.tensor, factors: tl.tuple, KIND: tl.constexpr, QUANT: tl.constexpr) -> tl.tensor:
    multiplies: tl.constexpr = says(QUANT, "apply=multiply") or says(QUANT, "apply=reciprocal")
    value = value * factors[0] if multiplies else divided(value, factors[0], factors[1], factors[2])
    return rounded(value, KIND) if says(QUANT, "narrow=True") else value


@triton.jit
def fp8_word(a: tl.tensor, b: tl.tensor, c: tl.tensor, d: tl.tensor) -> tl.tensor:
    """Round four fp32 tensors to FP8, to nearest even, at most 448 in size; pack them in a word."""
    return tl.inline_asm_elementwise(
        "{ .reg .b16 x, y; cvt.rn.satfinite.e4m3x2.f32 x, $2, $1; "
        "cvt.rn.satfinite.e4m3x2.f32 y, $4, $3; mov.b32 $0, {x, y}; }",
        "=r,r,r,r,r",
        (
            a.to(tl.int32, bitcast=True),
            b.to(tl.int32, bitcast=True),
            c.to(tl.int32, bitcast=True),
            d.to(tl.int32, bitcast=True),
        ),
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def quantized(words: tl.tuple, scale: tl.tensor, KIND: tl.constexpr, QUANT: tl.constexpr) -> tl.tuple:
    """Return a packet of the norm, divided by its scale, as words of FP8."""
    scale = rounded(scale, KIND) if says(QUANT, "narrow=True") else scale
    if says(QUANT, "apply=multiply"):
        factors = (scale,)
    elif says(QUANT, "apply=reciprocal"):
        inverse = tl.div_rn(1.0, scale)
        factors = (rounded(inverse, KIND) if says(QUANT, "narrow=True") else inverse,)
    else:
        factors = divisor_of(scale)
    values = ()
    for k in tl.static_range(4):
        values = values + (_applied(low(words[k], KIND), factors, KIND, QUANT),)
        if KIND != FP32:
            values = values + (_applied(high(words[k], KIND), factors, KIND, QUANT),)
    out = (fp8_word(values[0], values[1], values[2], values[3]),)
    if KIND != FP32:
        out = out + (fp8_word(values[4], values[5], values[6], values[7]),)
    return out


@triton.jit
def staged_scales(
    scale: tl.tensor,
    at: tl.tensor,
    packet: tl.tensor,
    mask: tl.tensor,
    HIDDEN: tl.constexpr,
    PACKETS: tl.constexpr,
    QUANT: tl.constexpr,
) -> tl.tensor:
    """Return the bits of a row's scales, the i-th in element i, so that their stores are coalesced.

    Scales of groups go through memory of this GPU at `at`, with a barrier of the block.
    """
    bits = scale.to(tl.int32, bitcast=True)
    if says(QUANT, "group"):
        LANES: tl.constexpr = packets_per_scale(QUANT, HIDDEN, PACKETS)
        store4(at + (packet // LANES) * 4, bits, mask & (packet % LANES == 0))
        tl.debug_barrier()
        bits = load4(at + packet * 4, packet < scales_per_row(QUANT, HIDDEN))
    return bits


compute_cache_keys(globals())
