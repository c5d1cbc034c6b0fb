"""Operators that quantise to FP8, in graphs that a serving engine hands over, as data.

An operator of that name need not be registered. vLLM's kernels (csrc/quantization/w8a8/fp8) divide
as IEEE 754 says, and read the norm in fp32. NaN differs: their clamp makes it 448, and ours keeps
it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from fusewire.custom_ops.ops.quantization import FP8_MAX, GROUP, GROUP_SIZE, RECIPROCAL, TENSOR, TOKEN, QuantSpec


@dataclass(frozen=True)
class QuantOp:
    """An operator that writes a quantised tensor, and its scales if it computes them.

    Attributes:
        spec: its arithmetic, without what `floor` and the layout of its scales add.
        result: the argument that it writes the FP8 values to; `input` is what it reads.
        scale: the argument that is the static scale, or that it writes the scales to.
        bound: the argument that is the upper bound of the largest values, or "".
        floor: the argument that is the least of the largest values, or "".
        required: the values that arguments must have, with what another value means.
    """

    spec: QuantSpec
    result: str = "result"
    scale: str = "scale"
    bound: str = ""
    floor: str = ""
    required: Mapping[str, tuple[Any, str]] = field(default_factory=lambda: MappingProxyType({}))


QUANT_OPS = {
    "_C::static_scaled_fp8_quant": QuantOp(QuantSpec(TENSOR, RECIPROCAL)),
    "_C::dynamic_per_token_scaled_fp8_quant": QuantOp(
        QuantSpec(TOKEN, scale_floor=1.0 / (FP8_MAX * 512.0)), bound="scale_ub"
    ),
    "_C::per_token_group_fp8_quant": QuantOp(
        QuantSpec(GROUP),
        "output_q",
        "output_s",
        floor="eps",
        required=MappingProxyType(
            {
                "group_size": (GROUP_SIZE, f"the operators know groups of {GROUP_SIZE}"),
                "fp8_min": (-FP8_MAX, "the operators clamp to +-448"),
                "fp8_max": (FP8_MAX, "the operators clamp to +-448"),
                "scale_ue8m0": (False, "vLLM's versions round scales to powers of two differently"),
            }
        ),
    ),
}
_NVFP4 = "NVFP4 (4 bits, a scale for each 16 values) for Blackwell GPUs, which no operator here computes"
_MXFP8 = "MXFP8 (a power of two for each 32 values) for Blackwell GPUs, which no operator here computes"
# Operators that quantise and are left as they are, and why.
UNREAD_QUANT_OPS = {
    "_C::dynamic_scaled_fp8_quant": "its one scale is of the whole tensor, for which every rank needs every row",
    "_C::per_token_group_fp8_quant_packed": "it packs scales that are powers of two into int32, for Blackwell GPUs",
    "_C::scaled_fp4_quant": _NVFP4,
    "vllm::flashinfer_nvfp4_quantize": _NVFP4,
    "vllm::mxfp8_quantize": _MXFP8,
    "vllm::flashinfer_mxfp8_quantize_8x4": _MXFP8,
    "triton::quantize_fp8_row": "torchao's kernel (mslk), whose rounding is its own",
    "triton::quantize_fp8_tensor": "torchao's kernel (mslk), and one scale of the whole tensor",
}


@dataclass(frozen=True, eq=False)  # hashed by identity, since mappings have no hash
class NormQuantOp:
    """An operator of vLLM's that is an RMSNorm and its quantisation in one.

    The arguments `result`, `input`, `residual`, `weight`, `scale` and `epsilon` have one meaning in
    all of them. The weight has the input's dtype. A residual, if there is one, is written in place.
    The norm's form depends on vLLM's version: see fusion_passes/analysis/norm_quant_forms.py.

    Attributes:
        quant: the operator of QUANT_OPS that quantises the norm alike.
        renamed: the arguments of `quant` by the names of those that they take their values from.
        constants: the arguments of `quant` that are always the same.
        must_be_none: arguments that are None in what `quant` computes.
    """

    quant: str
    renamed: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    must_be_none: tuple[str, ...] = ()


_STATIC = NormQuantOp(
    "_C::static_scaled_fp8_quant",
    MappingProxyType({"result": "result", "scale": "scale"}),
)
NORM_QUANT_OPS = {
    "_C::rms_norm_static_fp8_quant": _STATIC,
    "_C::fused_add_rms_norm_static_fp8_quant": _STATIC,
    "_C::rms_norm_dynamic_per_token_quant": NormQuantOp(
        "_C::dynamic_per_token_scaled_fp8_quant",
        MappingProxyType({"result": "result", "scale": "scale", "scale_ub": "scale_ub"}),
    ),
    "_C::rms_norm_per_block_quant": NormQuantOp(
        "_C::per_token_group_fp8_quant",
        MappingProxyType(
            {
                "output_q": "result",
                "output_s": "scale",
                "group_size": "group_size",
                "dummy_is_scale_transposed": "is_scale_transposed",
            }
        ),
        # max(a / 448, 1 / (448 * 512)) is max(a, 1 / 512) / 448, bit for bit.
        MappingProxyType(
            {
                "eps": 1.0 / 512.0,
                "fp8_min": -FP8_MAX,
                "fp8_max": FP8_MAX,
                "scale_ue8m0": False,
                "dummy_is_tma_aligned": False,
            }
        ),
        ("scale_ub",),
    ),
}
