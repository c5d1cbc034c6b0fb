"""Define the fused operator: all-reduce, residual add and RMSNorm in one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusewire.custom_ops._torch_private import all_gather, all_reduce, process_group
from fusewire.custom_ops.ops.group_names import ENGINE_ALL_REDUCES
from fusewire.custom_ops.ops.norms import SCALE_THEN_ROUND, NormSpec, add_normalize, check_norm_args, fake_add_norm
from fusewire.custom_ops.ops.registration import register_autograd, register_op
from fusewire.custom_ops.ops.registry import YES, Support
from fusewire.errors import ArgumentError, ProcessGroupError, TrainingError


def resolve_group(group_name: str) -> dist.ProcessGroup:
    """Return the process group of that name.

    Raises:
        ProcessGroupError: torch.distributed is not initialised, or knows no such group.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ProcessGroupError(
            f"no process group: {group_name!r} was asked for, but torch.distributed is not "
            "initialised in this process; call torch.distributed.init_process_group first"
        )
    try:
        return process_group(group_name)
    except Exception as error:
        raise ProcessGroupError(
            f"there is no process group named {group_name!r} in this process ({error}); pass the "
            "group_name of a group that this rank belongs to"
        ) from error


def check_group_name(group_name: str) -> None:
    """Raise ArgumentError if the name is empty."""
    if not group_name:
        raise ArgumentError("group_name is empty; pass the name of the process group to reduce over")


def _check(x: Tensor, residual: Tensor | None, *rest: Any) -> None:
    *norm, group_name = rest
    check_norm_args(x, NormSpec(*norm), residual)
    check_group_name(group_name)


def all_reduce_sum(x: Tensor, group_name: str) -> Tensor:
    """Return the sum of x over the ranks by the group's own all-reduce. A collective.

    It is the engine's, if `name_group` was given one.
    """
    engines = ENGINE_ALL_REDUCES.get(group_name)
    return all_reduce(x.contiguous(), group_name) if engines is None else engines(x.contiguous())


@register_op(fake=fake_add_norm, check=_check)
def all_reduce_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float = 1e-6,
    weight_bias: float = 0.0,
    form: str = SCALE_THEN_ROUND,
    group_name: str = "",
) -> tuple[Tensor, Tensor]:
    """Sum x over the ranks, add the residual, normalise. A collective of the whole group.

        s = sum of x over the ranks, rounded to x.dtype
        r = round(s + residual), or s without a residual
        norm = RMSNorm(r), in a form "wide_sum_..." RMSNorm(s + residual); see
            fusewire.custom_ops.ops.norms

    Native uses the group's own all-reduce, in the backend's order and rounding, so it equals the
    unfused program bit for bit. FlashInfer's kernels and symm_mem sum in rank order in fp32 and
    round once.

    Args:
        x: this rank's partial sums (..., hidden); the same shape and dtype on every rank.
        residual: of x's shape, or None. Like the weight, equal on all ranks: native adds each
            rank's own, a kernel may add that of the rank that sums the row.
        weight: (hidden,), or None for a weightless norm.
        eps, weight_bias, form: as in `fusewire.rms_norm`.
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
    return add_normalize(all_reduce_sum(x, group_name), residual, NormSpec(weight, eps, weight_bias, form))


def sum_in_rank_order(x: Tensor, group_name: str) -> Tensor:
    """Return the sum over the ranks in rank order, in fp32 (fp64 for fp64). A collective.

    It is rounded once to x's dtype. Every rank gathers all partial sums: world_size / 2 times the
    bytes of a ring all-reduce. The result does not depend on the backend or the number of tokens.
    """
    world_size = resolve_group(group_name).size()
    parts = all_gather(x.contiguous().reshape(1, -1), world_size, group_name)
    wide = torch.promote_types(x.dtype, torch.float32)
    total = parts[0].to(wide)
    for rank in range(1, world_size):
        total = total + parts[rank].to(wide)
    return total.to(x.dtype).reshape(x.shape)


def can_gather(x: Tensor, *rest: Any) -> Support:
    """Return whether the group of such a call can gather x. Every rank gets the same answer."""
    kind = x.device.type
    if kind == "cpu":
        return YES
    gloo = f"{kind}:gloo" in dist.get_backend_config(resolve_group(rest[-1])).split(",")
    return Support.all_of(
        (not gloo, f"the group's backend for {kind} is gloo, which cannot gather {kind} tensors; use NCCL"),
    )


@all_reduce_rms_norm.register_impl("rank_ordered", supports_args=can_gather)
def all_reduce_rms_norm_rank_ordered(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    """Compute as native, but sum in rank order in fp32: the reference for kernels."""
    *norm, group_name = rest
    return add_normalize(sum_in_rank_order(x, group_name), residual, NormSpec(*norm))


def no_backward(op_name: str) -> Callable[..., None]:
    """Return the backward of an operator that has none: it raises TrainingError."""

    def refuse(ctx: Any, *grads: Tensor | None) -> None:
        raise TrainingError(
            f"fusewire::{op_name} is for inference and has no backward; run the model under "
            "torch.no_grad(), or compile the training step without fusewire"
        )

    return refuse


register_autograd(all_reduce_rms_norm, no_backward(all_reduce_rms_norm.name))
