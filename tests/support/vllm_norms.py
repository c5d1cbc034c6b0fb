"""vLLM's norms, written again from their definition (vllm/ir/ops/layernorm.py in 0.32), and their
operators."""

from __future__ import annotations

import torch
from torch import Tensor


def _scaled(wide: Tensor, weight: Tensor | None, epsilon: float, dtype: torch.dtype) -> Tensor:
    normed = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + epsilon)
    if weight is not None:
        normed = normed.to(weight.dtype) * weight
    return normed.to(dtype)


def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    assert variance_size is None
    return _scaled(x.to(torch.float32), weight, epsilon, x.dtype)


def fused_add_rms_norm(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[Tensor, Tensor]:
    assert variance_size is None
    wide = x.to(torch.float32) + x_residual.to(torch.float32)
    return _scaled(wide, weight, epsilon, x.dtype), wide.to(x.dtype)


def operators() -> list[torch.library.Library]:
    """Define `vllm::all_reduce` (which copies) and `vllm_ir::*` while the libraries live."""
    engine, ir = torch.library.Library("vllm", "FRAGMENT"), torch.library.Library("vllm_ir", "FRAGMENT")
    engine.define("all_reduce(Tensor tensor, str group_name) -> Tensor")
    engine.impl("all_reduce", lambda tensor, group_name: tensor.clone(), "CompositeExplicitAutograd")
    ir.define("rms_norm(Tensor x, Tensor? weight, float epsilon, int? variance_size=None) -> Tensor")
    ir.define(
        "fused_add_rms_norm(Tensor x, Tensor x_residual, Tensor? weight, float epsilon, int? "
        "variance_size=None) -> (Tensor, Tensor)"
    )
    ir.impl("rms_norm", rms_norm, "CompositeExplicitAutograd")
    ir.impl("fused_add_rms_norm", fused_add_rms_norm, "CompositeExplicitAutograd")
    return [engine, ir]
