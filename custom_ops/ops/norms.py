"""Define RMSNorm and add + RMSNorm in plain PyTorch, and check their arguments.

RMSNorm (Zhang and Sennrich, 2019, arXiv:1910.07467): `x / sqrt(mean(x^2) + eps) * weight`, over the
last dimension. Models agree on that and differ in where they round to the activation's dtype;
`form` says where:

- `"scale_then_round"`: the product with the weight is taken in fp32 and rounded once (Gemma,
  torch.nn.RMSNorm, OLMo 2; fused kernels do the same);
- `"round_then_scale"`: the normalised value is rounded, then multiplied by the weight in its own
  dtype (Llama, Qwen);
- `"wide_sum_scale_then_round"`, `"wide_sum_round_then_scale"`: the same, but the norm reads the sum
  of x and the residual before it is rounded (vLLM). The sum that is returned is rounded. Without a
  residual, and for fp32 and fp64 activations, these are the forms above.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusewire.custom_ops.ops.registration import register_autograd, register_op
from fusewire.errors import ArgumentError

SCALE_THEN_ROUND = "scale_then_round"
ROUND_THEN_SCALE = "round_then_scale"
_WIDE_SUM = "wide_sum_"
WIDE_SUM_SCALE_THEN_ROUND = f"{_WIDE_SUM}{SCALE_THEN_ROUND}"
WIDE_SUM_ROUND_THEN_SCALE = f"{_WIDE_SUM}{ROUND_THEN_SCALE}"
FORMS = (SCALE_THEN_ROUND, ROUND_THEN_SCALE, WIDE_SUM_SCALE_THEN_ROUND, WIDE_SUM_ROUND_THEN_SCALE)
# The norms' batch-invariant providers. They agree bit for bit, so each rank may choose either.
TRITON_NORM = "triton_batch_invariant"
TORCH_NORM = "torch_batch_invariant"
BATCH_INVARIANT_NORMS = f"{TRITON_NORM},{TORCH_NORM}"
# Without fp8: its values have no meaning without a scale, and it promotes with no other dtype.
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_DTYPE_NAMES = "bfloat16, float16, float32 or float64"


class NormSpec(NamedTuple):
    """An RMSNorm, but for what it is of; in the order of every operator's parameters.

    Attributes:
        weight: (hidden,), any floating dtype, or None for no multiplication.
        eps: added to the mean square. May be symbolic.
        weight_bias: added to the weight; 1.0 is Gemma's `1 + weight`. Ignored without a weight.
        form: one of FORMS.
    """

    weight: Tensor | None
    eps: float
    weight_bias: float
    form: str


def rounds_first(form: str) -> bool:
    """Return whether a norm of this form is rounded before the product with the weight."""
    return form.endswith(ROUND_THEN_SCALE)


def with_wide_sum(form: str) -> str:
    """Return the form that differs from this one only by the norm of the unrounded sum."""
    return form if form.startswith(_WIDE_SUM) else f"{_WIDE_SUM}{form}"


def without_wide_sum(form: str) -> str:
    """Return the form that differs from this one only by the norm of the rounded sum."""
    return form.removeprefix(_WIDE_SUM)


def keeps_wide_sum(form: str, dtype: torch.dtype) -> bool:
    """Return whether the norm of a sum in this dtype reads the sum before it is rounded."""
    return form.startswith(_WIDE_SUM) and computed_in(dtype) != dtype


def forms_of(dtype: torch.dtype) -> tuple[str, ...]:
    """Return the forms that differ from each other for activations of this dtype."""
    return tuple(form for form in FORMS if keeps_wide_sum(form, dtype) or not form.startswith(_WIDE_SUM))


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that norms and sums of this dtype are computed in: at least fp32."""
    return torch.promote_types(dtype, torch.float32)


def check_norm_args(x: Tensor, norm: NormSpec, residual: Tensor | None = None) -> None:
    """Raise ArgumentError if these cannot be a norm's arguments."""
    weight, eps, _, form = norm
    if x.dim() == 0 or x.dtype not in _DTYPES:
        raise ArgumentError(
            f"x must be a floating-point tensor ({_DTYPE_NAMES}) of shape (..., hidden), not {x.dtype} {list(x.shape)}"
        )
    if form not in FORMS:
        raise ArgumentError(f"form is {form!r}; it must be one of {', '.join(map(repr, FORMS))}")
    if isinstance(eps, (int, float)) and not eps >= 0:
        raise ArgumentError(f"eps is {eps}; it must be zero or positive")
    if weight is not None:
        if weight.dim() != 1 or weight.shape[0] != x.shape[-1]:
            raise ArgumentError(
                f"the weight has shape {list(weight.shape)}; for x of shape {list(x.shape)} it "
                f"must be [{x.shape[-1]}], one number per hidden unit"
            )
        _check_beside(x, "weight", weight)
    if residual is not None:
        if residual.shape != x.shape:
            raise ArgumentError(
                f"the residual has shape {list(residual.shape)} but x has {list(x.shape)}; they must be equal"
            )
        _check_beside(x, "residual", residual)


def _check_beside(x: Tensor, name: str, other: Tensor) -> None:
    if other.dtype not in _DTYPES:
        raise ArgumentError(f"the {name} must be floating-point ({_DTYPE_NAMES}), not {other.dtype}")
    if other.device != x.device:
        raise ArgumentError(f"the {name} is on {other.device} but x is on {x.device}; put them on one device")


def normalize(x: Tensor, norm: NormSpec, dtype: torch.dtype | None = None) -> Tensor:
    """Return the RMSNorm of x (..., hidden), computed in fp32 (fp64 for fp64), in x's dtype.

    With `dtype`, x is an unrounded sum of that dtype, and the norm is rounded to it.
    """
    dtype = dtype or x.dtype
    wide = x.to(computed_in(x.dtype))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)
    return scale_and_round(normed, norm, dtype)


def scale_and_round(normed: Tensor, norm: NormSpec, dtype: torch.dtype) -> Tensor:
    """Return the normalised values (fp32 or fp64) times the weight, rounded to a dtype."""
    weight, _, weight_bias, form = norm
    if weight is None:
        return normed.to(dtype)
    if rounds_first(form):
        return (normed.to(dtype) * (weight + weight_bias if weight_bias else weight)).to(dtype)
    scale = weight.to(normed.dtype)
    return (normed * (scale + weight_bias if weight_bias else scale)).to(dtype)


def add_residual(x: Tensor, residual: Tensor) -> Tensor:
    """Return x + residual, taken in the wider dtype (at least fp32) and rounded to x's."""
    if residual.dtype == x.dtype:
        return x + residual  # rounds once too; models write this, so Inductor sees the same graph
    return add_wide(x, residual).to(x.dtype)


def add_wide(x: Tensor, residual: Tensor) -> Tensor:
    """Return x + residual in the wider dtype, at least fp32."""
    wide = computed_in(torch.promote_types(x.dtype, residual.dtype))
    return x.to(wide) + residual.to(wide)


def add_normalize(
    x: Tensor, residual: Tensor | None, norm: NormSpec, normalize: Callable[..., Tensor] = normalize
) -> tuple[Tensor, Tensor]:
    """Return (norm, sum) of x and the residual, if there is one, in plain PyTorch.

    Args:
        normalize: computes the norm, with the parameters of `norms.normalize`.
    """
    if residual is not None and keeps_wide_sum(norm.form, x.dtype):
        total = add_wide(x, residual)
        return normalize(total, norm, x.dtype), total.to(x.dtype)
    summed = x if residual is None else add_residual(x, residual)
    return normalize(summed, norm), summed


def _fake_rms_norm(x: Tensor, *_: object) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def fake_add_norm(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    """Return fake results (norm, sum) of x's shape and dtype."""
    return _fake_rms_norm(x), _fake_rms_norm(x)


@register_op(fake=_fake_rms_norm, check=lambda x, *norm: check_norm_args(x, NormSpec(*norm)))
def rms_norm(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, weight_bias: float = 0.0, form: str = SCALE_THEN_ROUND
) -> Tensor:
    """Compute RMSNorm over the last dimension.

    Args:
        x: activations (..., hidden), any floating dtype.
        weight: (hidden,), any floating dtype, or None for a weightless norm (nothing is
            multiplied).
        eps: added to the mean square.
        weight_bias: added to the weight; 1.0 is Gemma's `1 + weight`. Ignored without a weight.
        form: where the source rounded, see the module's text.

    Returns:
        The normalised activations, of x's shape and dtype, contiguous.

    Raises:
        ArgumentError: shapes, dtypes or devices do not fit.
    """
    return normalize(x.contiguous(), NormSpec(weight, eps, weight_bias, form))


@register_op(fake=fake_add_norm, check=lambda x, residual, *norm: check_norm_args(x, NormSpec(*norm), residual))
def fused_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    weight_bias: float = 0.0,
    form: str = SCALE_THEN_ROUND,
) -> tuple[Tensor, Tensor]:
    """Compute `r = x + residual`, and RMSNorm of r. Nothing is written in place.

    The norm is of the rounded r, or in a form "wide_sum_..." of the sum before it is rounded.

    Args:
        x: activations (..., hidden).
        residual: of x's shape, any floating dtype.
        weight, eps, weight_bias, form: as in `rms_norm`.

    Returns:
        (norm, r), both of x's shape and **x's dtype**, whatever the residual's and the weight's.

    Raises:
        ArgumentError: shapes, dtypes or devices do not fit.
    """
    return add_normalize(x.contiguous(), residual, NormSpec(weight, eps, weight_bias, form))


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tensors = [value if isinstance(value, Tensor) else None for value in inputs]
    ctx.save_for_backward(*tensors)
    ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]


def _backward_of(native: Any) -> Any:
    """Return a backward that differentiates native itself, computed again from the saved inputs."""

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        values = [
            saved if saved is not None else other for saved, other in zip(ctx.saved_tensors, ctx.others, strict=True)
        ]
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]

        def of_wanted(*tensors: Tensor) -> Any:
            called = list(values)
            for i, tensor in zip(wanted, tensors, strict=True):
                called[i] = tensor
            return native(*called[:-1])  # the last input is the policy, which native does not take

        outputs, vjp = torch.func.vjp(of_wanted, *(values[i] for i in wanted))  # type: ignore[misc]
        full = tuple(
            torch.zeros_like(out) if grad is None else grad
            for out, grad in zip(outputs if isinstance(outputs, tuple) else (outputs,), grads, strict=True)
        )
        found = vjp(full if isinstance(outputs, tuple) else full[0])
        result: list[Tensor | None] = [None] * len(values)
        for i, grad in zip(wanted, found, strict=True):
            result[i] = grad
        return tuple(result)

    return backward


for _op in (rms_norm, fused_add_rms_norm):
    register_autograd(_op, _backward_of(_op.native), setup_context=_save_inputs)
