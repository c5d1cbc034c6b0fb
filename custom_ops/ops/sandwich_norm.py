"""Define all-reduce, norm, residual add, norm in one call, as in Gemma 2 and GLM-4."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusewire.custom_ops.ops.all_reduce_norm import (
    all_reduce_rms_norm,
    all_reduce_sum,
    check_group_name,
    no_backward,
    resolve_group,
)
from fusewire.custom_ops.ops.norms import (
    SCALE_THEN_ROUND,
    NormSpec,
    add_normalize,
    check_norm_args,
    fake_add_norm,
    normalize,
)
from fusewire.custom_ops.ops.registration import register_autograd, register_op


def _check(x: Tensor, residual: Tensor, *rest: Any) -> None:
    check_norm_args(x, NormSpec(*rest[:4]), residual)
    check_norm_args(x, NormSpec(*rest[4:8]))
    check_group_name(rest[8])


@register_op(fake=fake_add_norm, check=_check, derives_from=(all_reduce_rms_norm, lambda a: (a[0], None, *a[6:])))
def all_reduce_sandwich_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float = 1e-6,
    weight_bias: float = 0.0,
    form: str = SCALE_THEN_ROUND,
    inner_weight: Tensor | None = None,
    inner_eps: float = 1e-6,
    inner_weight_bias: float = 0.0,
    inner_form: str = SCALE_THEN_ROUND,
    group_name: str = "",
) -> tuple[Tensor, Tensor]:
    """Sum x over the ranks, normalise, add the residual, normalise again. A collective.

        n = RMSNorm(sum of x over the ranks; inner_weight, inner_eps, inner_weight_bias, inner_form)
        r = round(residual + n)
        norm = RMSNorm(r; weight, eps, weight_bias, form); in a wide-sum form of residual + n

    `all_reduce_rms_norm`'s provider serves it: with one kernel for the whole if it has one, else
    with its all-reduce + norm, then add + norm in a second kernel.

    Args:
        x: this rank's partial sums (..., hidden); the same shape and dtype on every rank.
        residual: of x's shape.
        weight, eps, weight_bias, form: of the second norm, as in `fusewire.rms_norm`.
        inner_weight, inner_eps, inner_weight_bias, inner_form: of the first.
        group_name: the process group's name.

    Returns:
        (norm, r), both of x's shape and dtype. Nothing is written in place.

    Raises:
        ArgumentError: shapes, dtypes or devices do not fit.
        ProcessGroupError: there is no such group.
        TrainingError: in backward; the operator is for inference.
    """
    if not torch.compiler.is_compiling() and type(x) in (Tensor, torch.nn.Parameter):
        resolve_group(group_name)
    first = NormSpec(inner_weight, inner_eps, inner_weight_bias, inner_form)
    inner = normalize(all_reduce_sum(x, group_name), first)
    return add_normalize(inner, residual, NormSpec(weight, eps, weight_bias, form))


register_autograd(all_reduce_sandwich_norm, no_backward(all_reduce_sandwich_norm.name))
