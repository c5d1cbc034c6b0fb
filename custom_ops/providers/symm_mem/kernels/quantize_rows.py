"""Quantise rows to FP8 in a kernel of its own, with the arithmetic of `quantize`."""

from __future__ import annotations

import triton
import triton.language as tl

from fusewire.custom_ops._triton_private import compute_cache_keys
from fusewire.custom_ops.providers.symm_mem.kernels.memory import load16
from fusewire.custom_ops.providers.symm_mem.kernels.quantize import (
    given_scale,
    is_dynamic,
    largest_of,
    packets_per_scale,
    quantized,
    scale_index,
    scale_of,
    store4,
    store_fp8,
)
from fusewire.custom_ops.providers.symm_mem.kernels.rows import FP32


@triton.jit(do_not_specialize=("tokens",), do_not_specialize_on_alignment=("quant_scale",))
def quantize_rows_kernel(
    norm: tl.tensor,
    quant_scale: tl.tensor,
    quantized_out: tl.tensor,
    scales_out: tl.tensor,
    tokens: tl.int32,
    HIDDEN: tl.constexpr,
    KIND: tl.constexpr,
    QUANT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Quantise a row of norm (tokens, HIDDEN); arguments as in the package's other kernels."""
    PACKETS: tl.constexpr = HIDDEN // 4 if KIND == FP32 else HIDDEN // 8
    LANES: tl.constexpr = packets_per_scale(QUANT, HIDDEN, PACKETS)
    row = tl.program_id(0)
    packet = tl.arange(0, BLOCK)
    mask = packet < PACKETS
    at = norm.to(tl.int64) + tl.cast(row, tl.int64) * (PACKETS * 16) + packet.to(tl.int64) * 16
    words = load16(at, mask, False)
    largest = largest_of(words, mask, HIDDEN, PACKETS, KIND, QUANT)
    scale = scale_of(largest, given_scale(quant_scale), quant_scale is not None, KIND, QUANT)
    place = tl.cast(row, tl.int64) * HIDDEN + packet.to(tl.int64) * (HIDDEN // PACKETS)
    store_fp8(quantized_out.to(tl.int64) + place, quantized(words, scale, KIND, QUANT), mask, KIND)
    if is_dynamic(QUANT):
        index = scale_index(row, packet // LANES, tokens, HIDDEN, QUANT)
        bits = scale.to(tl.int32, bitcast=True)
        store4(scales_out.to(tl.int64) + index * 4, bits, mask & (packet % LANES == 0))


compute_cache_keys(globals())
