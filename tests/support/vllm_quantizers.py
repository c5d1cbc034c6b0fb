"""vLLM's FP8 operators, written again from their kernels (csrc/quantization/w8a8/fp8 in 0.32, and
those that join a norm to them, in 0.26 to 0.33), and how vLLM calls them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FLOOR = torch.tensor(1.0) / (448.0 * 512.0)


def _cast(q: Tensor, out: Tensor) -> None:
    out.copy_(q.clamp(-448, 448).to(out.dtype))


def _static(result: Tensor, input: Tensor, scale: Tensor, group_shape: Any = None) -> None:
    _cast(input.float() * (1.0 / scale.repeat_interleave(input.shape[-1] // scale.numel())), result)


def _whole(result: Tensor, input: Tensor, scale: Tensor) -> None:
    scale.copy_((input.float().abs().max() / 448.0).reshape(scale.shape))
    _static(result, input, scale)


def _token(result: Tensor, input: Tensor, scale: Tensor, scale_ub: Tensor | None) -> None:
    amax = input.float().abs().amax(-1, keepdim=True)
    amax = amax if scale_ub is None else amax.minimum(scale_ub)
    scale.copy_((amax / torch.tensor(448.0)).maximum(FLOOR))
    _cast(input.float() / scale, result)


def _group(
    input: Tensor,
    output_q: Tensor,
    output_s: Tensor,
    group_size: int,
    eps: float,
    fp8_min: float,
    fp8_max: float,
    scale_ue8m0: bool,
    dummy_is_scale_transposed: bool = False,
    dummy_is_tma_aligned: bool = False,
) -> None:
    groups = input.float().view(-1, input.shape[-1] // group_size, group_size)
    scale = groups.abs().amax(-1).clamp(min=eps) / fp8_max
    output_s.copy_(scale)
    _cast((groups / scale[..., None]).view(input.shape), output_q)


def _normed(wide: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return the norm of fp32 values, rounded to the weight's dtype and again after the product."""
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(weight.dtype) * weight


def _norm_static(
    result: Tensor, input: Tensor, weight: Tensor, scale: Tensor, epsilon: float, rounds_first: bool = False
) -> None:
    wide = input.float()
    norm = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon) * weight.float()
    _static(result, _normed(wide, weight, epsilon) if rounds_first else norm.to(weight.dtype), scale)


def _add_norm_static(
    result: Tensor,
    input: Tensor,
    residual: Tensor,
    weight: Tensor,
    scale: Tensor,
    epsilon: float,
    rounds_first: bool = False,
) -> None:
    residual.add_(input)
    _norm_static(result, residual, weight, scale, epsilon, rounds_first)


def _dynamic_norm(input: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None) -> Tensor:
    wide = input.float()
    if residual is not None:
        wide = wide + residual.float()
        residual.copy_(wide)
    return _normed(wide, weight, epsilon)


def _norm_token(
    result: Tensor,
    input: Tensor,
    weight: Tensor,
    scale: Tensor,
    epsilon: float,
    scale_ub: Tensor | None,
    residual: Tensor | None,
) -> None:
    norm = _dynamic_norm(input, weight, epsilon, residual)
    if result.dtype == torch.int8:
        scale.copy_(norm.float().abs().amax(-1, keepdim=True) / 127)
        result.copy_((norm.float() / scale).round())
    else:
        _token(result, norm, scale, scale_ub)


def _norm_block(
    result: Tensor,
    input: Tensor,
    weight: Tensor,
    scale: Tensor,
    epsilon: float,
    scale_ub: Tensor | None,
    residual: Tensor | None,
    group_size: int,
    is_scale_transposed: bool,
) -> None:
    norm = _dynamic_norm(input, weight, epsilon, residual)
    groups = norm.float().view(-1, input.shape[-1] // group_size, group_size)
    amax = groups.abs().amax(-1)
    amax = amax if scale_ub is None else amax.minimum(scale_ub)
    scale.copy_((amax / torch.tensor(448.0)).maximum(FLOOR))
    _cast((groups / scale[..., None]).view(input.shape), result)


_OPERATORS = (
    ("static_scaled_fp8_quant(Tensor! result, Tensor input, Tensor scale, (int, int)? group_shape=None)", _static),
    ("dynamic_scaled_fp8_quant(Tensor! result, Tensor input, Tensor! scale)", _whole),
    (
        "dynamic_per_token_scaled_fp8_quant(Tensor! result, Tensor input, Tensor! scale, Tensor? scale_ub)",
        _token,
    ),
    (
        "per_token_group_fp8_quant(Tensor input, Tensor! output_q, Tensor! output_s, int group_size, float eps, "
        "float fp8_min, float fp8_max, bool scale_ue8m0, bool dummy_is_scale_transposed, bool dummy_is_tma_aligned)",
        _group,
    ),
    (
        "rms_norm_static_fp8_quant(Tensor! result, Tensor input, Tensor weight, Tensor scale, float epsilon)",
        _norm_static,
    ),
    (
        "fused_add_rms_norm_static_fp8_quant(Tensor! result, Tensor input, Tensor! residual, Tensor weight, "
        "Tensor scale, float epsilon)",
        _add_norm_static,
    ),
    (
        "rms_norm_dynamic_per_token_quant(Tensor! result, Tensor input, Tensor weight, Tensor! scale, "
        "float epsilon, Tensor? scale_ub, Tensor!? residual)",
        _norm_token,
    ),
    (
        "rms_norm_per_block_quant(Tensor! result, Tensor input, Tensor weight, Tensor! scale, float epsilon, "
        "Tensor? scale_ub, Tensor!? residual, int group_size, bool is_scale_transposed)",
        _norm_block,
    ),
)


def operators(**changed: Any) -> list[torch.library.Library]:
    """Define the operators while the library lives; `changed` has other functions for some."""
    engine = torch.library.Library("_C", "FRAGMENT")
    for schema, function in _OPERATORS:
        name = schema.partition("(")[0]
        engine.define(f"{schema} -> ()")
        engine.impl(name, changed.get(name, function), "CompositeExplicitAutograd")
        torch.library.register_fake(f"_C::{name}", lambda *args, **kwargs: None, lib=engine)
    return [engine]


def static(n: Tensor, s: Tensor, like: Tensor | None = None) -> Tensor:
    result = torch.empty(n.shape, dtype=FP8) if like is None else like
    torch.ops._C.static_scaled_fp8_quant(result, n, s, (-1, -1))
    return result


def whole(n: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    result, scale = torch.empty(n.shape, dtype=FP8), torch.empty(1)
    torch.ops._C.dynamic_scaled_fp8_quant(result, n, scale)
    return result, scale


def token(n: Tensor, s: Tensor | None) -> tuple[Tensor, Tensor]:
    rows = n.view(-1, n.shape[-1])
    result, scale = torch.empty(rows.shape, dtype=FP8), torch.empty(rows.shape[0], 1)
    torch.ops._C.dynamic_per_token_scaled_fp8_quant(result, rows, scale, s)
    return result, scale


def group(
    n: Tensor, s: Tensor, *, layout: str = "rows", size: int = 128, ue8m0: bool = False, eps: float = 1e-10
) -> tuple[Tensor, Tensor]:
    tokens, groups = n.shape[0], n.shape[-1] // size
    result, scale = torch.empty(n.shape, dtype=FP8), torch.empty(tokens, groups)
    if layout == "columns":
        scale = torch.empty(groups, tokens).permute(-1, -2)
    elif layout == "aligned_columns":
        scale = torch.empty_strided((tokens, groups), (1, (tokens + 3) // 4 * 4))
    torch.ops._C.per_token_group_fp8_quant(
        n, result, scale, size, eps, -448.0, 448.0, ue8m0, layout != "rows", layout == "aligned_columns"
    )
    return result, scale
