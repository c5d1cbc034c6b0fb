"""vLLM's FP8 operators, written again from their kernels (csrc/quantization/w8a8/fp8, 0.32), and
how vLLM calls them.
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


def operators() -> list[torch.library.Library]:
    """Define the operators while the library lives."""
    engine = torch.library.Library("_C", "FRAGMENT")
    for schema, function in (
        ("static_scaled_fp8_quant(Tensor! result, Tensor input, Tensor scale, (int, int)? group_shape=None)", _static),
        ("dynamic_scaled_fp8_quant(Tensor! result, Tensor input, Tensor! scale)", _whole),
        (
            "dynamic_per_token_scaled_fp8_quant(Tensor! result, Tensor input, Tensor! scale, Tensor? scale_ub)",
            _token,
        ),
        (
            "per_token_group_fp8_quant(Tensor input, Tensor! output_q, Tensor! output_s, int group_size, float eps, "
            "float fp8_min, float fp8_max, bool scale_ue8m0, bool dummy_is_scale_transposed, "
            "bool dummy_is_tma_aligned)",
            _group,
        ),
    ):
        name = schema.partition("(")[0]
        engine.define(f"{schema} -> ()")
        engine.impl(name, function, "CompositeExplicitAutograd")
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
