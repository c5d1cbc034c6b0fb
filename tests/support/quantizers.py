"""Quantisations of a norm to FP8 as programs write them, with its spec or why it is not fused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusewire.custom_ops.ops.quantization import CAST_SATURATES, QuantSpec

FP8 = torch.float8_e4m3fn
MAX = 448.0
SCALE = torch.tensor([0.0371])
VLLM_FLOOR = 1.0 / (448.0 * 512.0)
Quantizer = Callable[[Tensor, Tensor], Any]  # (norm, scale of shape [1]) -> FP8 values, and scales if dynamic


def inputs(*shape: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    """Return an all-reduce's input, a residual, a weight, and a static scale."""
    generator = torch.Generator().manual_seed(3)
    x, r = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    return x, r, (torch.rand(shape[-1], generator=generator) + 0.5).to(dtype), SCALE


def _leaves(results: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(results) if isinstance(leaf, Tensor)]


def assert_same(got: Any, wanted: Any) -> None:
    """Check that all tensors of two results have the same dtypes, shapes, strides and bits."""
    for one, other in zip(_leaves(got), _leaves(wanted), strict=True):
        assert (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
        assert torch.equal(*(tensor.reshape(-1).contiguous().view(torch.uint8) for tensor in (one, other))), one.dtype


def _cast(q: Tensor) -> Tensor:
    return q.clamp(-MAX, MAX).to(FP8)


def _by_rows(n: Tensor, size: int, *, floor: float = 0.0) -> tuple[Tensor, Tensor]:
    groups = n.view(-1, size)
    amax = groups.abs().amax(-1, keepdim=True).float()
    scale = (amax.clamp(min=floor) if floor else amax) / MAX
    return _cast(groups / scale).view(n.shape), scale.view(*n.shape[:-1], -1)


def vllm_static(n: Tensor, s: Tensor) -> Tensor:
    """vLLM's QuantFP8.forward_native with a static scale."""
    return _cast(n.to(torch.float32) * s.to(torch.float32).reciprocal())


def vllm_token(n: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """vLLM's QuantFP8.forward_native for each token."""
    x_max = n.abs().amax(dim=-1).unsqueeze(-1).to(torch.float32)
    scale = (x_max / MAX).clamp(min=VLLM_FLOOR)
    return _cast(n.to(torch.float32) * scale.reciprocal()), scale


def vllm_group(n: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """vLLM's QuantFP8.forward_native for groups of 128, with scales in columns."""
    groups = n.view(-1, n.shape[-1] // 128, 128)
    absmax = groups.abs().max(dim=-1, keepdim=True)[0].float()
    scales = (absmax / MAX).clamp(min=VLLM_FLOOR)
    q = _cast(groups / scales).view(n.shape)
    scales = scales.squeeze(-1).reshape(*n.shape[:-1], n.shape[-1] // 128)
    return q, scales.transpose(-2, -1).contiguous().transpose(-1, -2)


def torchao_row(n: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """torchao's Float8Tensor.from_hp with PerRow."""
    flat = n.reshape(-1, n.shape[-1])
    scale = (flat.abs().amax(dim=[1], keepdim=True) / MAX).reshape(flat.shape[0], 1).to(torch.float32)
    return _cast(flat.to(torch.float32) / scale), scale


def torchao_static(n: Tensor, s: Tensor) -> Tensor:
    return _cast(n.to(torch.float32) / s)


def deep_gemm(n: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """DeepGEMM's per_token_cast_to_fp8, with which transformers' fine-grained FP8 quantises."""
    flat = n.view(-1, n.shape[-1])
    padded = torch.empty((flat.shape[0], flat.shape[1]), dtype=flat.dtype, device=flat.device).fill_(0)
    padded[:, : flat.shape[1]] = flat
    groups = padded.view(flat.shape[0], -1, 128)
    amax = groups.abs().float().amax(dim=2).view(flat.shape[0], -1).clamp(1e-4)
    sf = amax / MAX
    return (groups * (1.0 / sf.unsqueeze(2))).to(FP8).view(flat.shape)[:, : flat.shape[1]].contiguous(), sf


# By name: the function, and its spec for a norm in bfloat16.
READ: dict[str, tuple[Quantizer, QuantSpec]] = {
    "divide": (lambda n, s: _cast(n.float() / s), QuantSpec("tensor")),
    "divide, no clamp": (lambda n, s: (n.float() / s).to(FP8), QuantSpec("tensor", clamp=CAST_SATURATES)),
    "divide, promoted": (lambda n, s: _cast(n / s), QuantSpec("tensor")),
    "divide by no dimensions": (lambda n, s: _cast(n.float() / s[0]), QuantSpec("tensor")),
    "multiply": (lambda n, s: _cast(s * n.float()), QuantSpec("tensor", apply="multiply")),
    "divide narrow": (lambda n, s: _cast(n / s.bfloat16()), QuantSpec("tensor", narrow=True)),
    "divide by bfloat16": (lambda n, s: _cast(n.float() / s.bfloat16()), QuantSpec("tensor")),
    "one over": (lambda n, s: _cast(n.float() * (1.0 / s)), QuantSpec("tensor", apply="reciprocal")),
    "vLLM static": (vllm_static, QuantSpec("tensor", apply="reciprocal")),
    "vLLM token": (vllm_token, QuantSpec("token", apply="reciprocal", scale_floor=VLLM_FLOOR)),
    "vLLM group": (vllm_group, QuantSpec("group", scale_floor=VLLM_FLOOR)),
    "torchao row": (torchao_row, QuantSpec("token", narrow_scale=True)),
    "torchao static": (torchao_static, QuantSpec("tensor")),
    "DeepGEMM": (deep_gemm, QuantSpec("group", apply="reciprocal", amax_floor=1e-4)),
    "token": (lambda n, s: _by_rows(n, n.shape[-1], floor=1e-12), QuantSpec("token", amax_floor=1e-12)),
    "group": (lambda n, s: _by_rows(n, 128), QuantSpec("group")),
    "token narrow": (
        lambda n, s: ((n / (scale := n.abs().amax(-1, True) / MAX)).to(FP8), scale),
        QuantSpec("token", narrow_scale=True, narrow=True),
    ),
    "token by a tensor": (
        lambda n, s: (
            _cast(n.float() / (scale := n.float().abs().amax(-1, True) / torch.full((1,), MAX, device=n.device))),
            scale,
        ),
        QuantSpec("token"),
    ),
    "token by a factor": (
        lambda n, s: (_cast(n.float() / (scale := n.float().abs().amax(-1, True) * (1.0 / MAX))), scale),
        QuantSpec("token", amax_by="multiply"),
    ),
    "token, bounded": (
        lambda n, s: (_cast(n.float() / (scale := n.abs().amax(-1, True).float().minimum(s) / MAX)), scale),
        QuantSpec("token"),
    ),
    "token, floor below the bound": (
        lambda n, s: (
            _cast(n.float() / (scale := n.float().abs().amax(-1, True).clamp(min=1e-3).minimum(s) / MAX)),
            scale,
        ),
        QuantSpec("token", amax_floor=1e-3),
    ),
    "token, floor in bfloat16": (
        lambda n, s: (
            _cast(n.float() / (scale := (n.abs().amax(-1, True).clamp(min=1e-3) / MAX).float())),
            scale,
        ),
        QuantSpec("token", amax_floor=float(torch.tensor(1e-3).bfloat16()), narrow_scale=True),
    ),
    "powers of two": (
        lambda n, s: (
            _cast(
                n.float()
                / (scale := torch.exp2(torch.ceil(torch.log2((n.float().abs().amax(-1, True) / MAX).clamp(min=1e-10)))))
            ),
            scale,
        ),
        QuantSpec("token", scale_floor=1e-10, power_of_two=True),
    ),
}

# By name: the function, and words of the reason.
REFUSED: dict[str, tuple[Quantizer, str]] = {
    "a number": (lambda n, s: _cast(n.float() / 0.37), "scale is the number 0.37"),
    "no dimensions": (lambda n, s: _cast(n / s[0]), "without dimensions"),
    "other clamp": (lambda n, s: (n.float() / s).clamp(-240, 240).to(FP8), "clamps to max 240, min -240"),
    "half a clamp": (lambda n, s: (n.float() / s).clamp(max=MAX).to(FP8), "not to \\+-448"),
    "other dtype": (lambda n, s: (n.float() / s).to(torch.float8_e5m2), "to torch.float8_e5m2"),
    "no scale": (lambda n, s: n.to(FP8), "no norm divided or multiplied"),
    "rounded quotient": (lambda n, s: _cast((n.float() / s).bfloat16()), "rounds the quotient once more"),
    "channels": (
        lambda n, s: _cast(n.float() / torch.linspace(1, 2, n.shape[-1], device=n.device)),
        "given, and more than one",
    ),
    "whole tensor": (
        lambda n, s: (_cast(n.float() / (scale := n.float().abs().max() / MAX)), scale),
        "one scale is of the whole tensor",
    ),
    "groups of 64": (
        lambda n, s: _by_rows(n, 64),
        "its groups have 64 values",
    ),
    "inverse scale": (
        lambda n, s: ((n.float() * (scale := MAX / n.float().abs().amax(-1, True))).to(FP8), 1.0 / scale),
        "448 / the largest value",
    ),
    "floor above the bound": (
        lambda n, s: (
            _cast(n.float() / (scale := n.float().abs().amax(-1, True).minimum(s).clamp(min=1e-3) / MAX)),
            scale,
        ),
        "in a way that is not known",
    ),
    "other divisor": (
        lambda n, s: (_cast(n.float() / (scale := n.float().abs().amax(-1, True) / 240.0)), scale),
        "in a way that is not known",
    ),
    "floor after the power": (
        lambda n, s: (
            _cast(
                n.float()
                / (scale := torch.exp2(torch.ceil(torch.log2(n.float().abs().amax(-1, True) / MAX))).clamp(min=1e-10))
            ),
            scale,
        ),
        "in a way that is not known",
    ),
    "float64 scale": (lambda n, s: _cast((n.double() / s.double()).float()), ""),
    "signed maximum": (
        lambda n, s: (_cast(n.float() / (scale := n.float().amax(-1, True) / MAX)), scale),
        "in a way that is not known",
    ),
    "upper bound as a number": (
        lambda n, s: (_cast(n.float() / (scale := n.float().abs().amax(-1, True).clamp(max=3.0) / MAX)), scale),
        "clamps the scale in a way",
    ),
}
