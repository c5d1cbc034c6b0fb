"""All-reduce + residual + RMSNorm with the residual sharded by rows, and conversions of rows.

The rows of x, flattened to (T, hidden), are divided among R ranks: rank r owns rows r * S to
min((r + 1) * S, T), with S = ceil(T / R). A *shard* is (S, hidden), with zeros past the owned rows.
This is sequence parallelism (Korthikanti et al., 2022, arXiv:2205.05198): reduce-scatter, add,
norm, all-gather.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusewire.custom_ops._torch_private import all_gather, reduce_scatter
from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm, check_group_name, no_backward, resolve_group
from fusewire.custom_ops.ops.norms import SCALE_THEN_ROUND, NormSpec, add_normalize, check_norm_args
from fusewire.custom_ops.ops.registration import register_autograd, register_op
from fusewire.errors import ArgumentError

# (x, residual or None, weight, eps, weight_bias, form) -> (norm, sum).
AddNorm = Callable[[Tensor, Tensor | None, NormSpec], tuple[Tensor, Tensor]]
# The `inner_form` of a call without an inner norm.
NO_INNER = ""


def rows_per_rank(tokens: int, world_size: int) -> int:
    """Return S = ceil(tokens / world_size); tokens may be symbolic."""
    return (tokens + world_size - 1) // world_size


def own_rows(x: Tensor, rank: int, world_size: int) -> Tensor:
    """Return a rank's shard (S, hidden) of x (..., hidden), zeros past the rows it owns."""
    rows = x.reshape(-1, x.shape[-1])
    tokens = rows.shape[0]
    size = rows_per_rank(tokens, world_size)
    start = min(rank * size, tokens)
    owned = rows[start : min(start + size, tokens)]
    return F.pad(owned, (0, 0, 0, size - owned.shape[0])) if owned.shape[0] < size else owned.clone()


def check_sharded(x: Tensor, residual: Tensor | None, *rest: Any) -> None:
    """Raise ArgumentError if these cannot be a sharded operator's arguments.

    Args:
        rest: the operator's other arguments, the group's name last.
    """
    norm, inner = NormSpec(*rest[:4]), NormSpec(*rest[4:8])
    check_norm_args(x, norm)
    check_group_name(rest[-1])
    if inner.form != NO_INNER:
        check_norm_args(x, inner)
        if residual is None:
            raise ArgumentError("an inner norm is followed by the residual add; pass the residual's shard")
    if residual is not None:
        check_norm_args(residual, norm)
        if residual.dim() != 2 or residual.device != x.device:
            raise ArgumentError(
                "the residual must be this rank's shard of shape [ceil(tokens / world size), "
                f"{x.shape[-1]}] on {x.device}, not {list(residual.shape)} on {residual.device}; "
                "fusewire::shard_rows makes one"
            )


def _fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    hidden = x.shape[-1]
    size = rows_per_rank(x.numel() // hidden, resolve_group(rest[-1]).size())
    return (
        torch.empty(x.shape, dtype=x.dtype, device=x.device),
        torch.empty((size, hidden), dtype=x.dtype, device=x.device),
    )


@register_op(fake=_fake, check=check_sharded, derives_from=(all_reduce_rms_norm, lambda a: (*a[:6], a[10])))
def all_reduce_rms_norm_sharded(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float = 1e-6,
    weight_bias: float = 0.0,
    form: str = SCALE_THEN_ROUND,
    inner_weight: Tensor | None = None,
    inner_eps: float = 1e-6,
    inner_weight_bias: float = 0.0,
    inner_form: str = NO_INNER,
    group_name: str = "",
) -> tuple[Tensor, Tensor]:
    """Compute `all_reduce_rms_norm` with the residual sharded by rows. A collective.

        s = this rank's rows of the sum of x over the ranks
        r = round(residual + s); with an inner norm residual + RMSNorm(s); without a residual s
        norm = RMSNorm(r), gathered from all ranks; as in `all_reduce_rms_norm`, of the unrounded
            sum in a form of a wide sum

    Args:
        x: this rank's partial sums (..., hidden), T rows in all; the same shape and dtype on every
            rank.
        residual: this rank's shard (S, hidden), S = ceil(T / world size), or None.
        weight, eps, weight_bias, form: as in `fusewire.rms_norm`.
        inner_weight, inner_eps, inner_weight_bias, inner_form: a norm between the sum and the
            residual add (see `all_reduce_sandwich_norm`); inner_form "" for none.
        group_name: the process group's name.

    Returns:
        (norm, r): norm of x's shape and dtype, complete on every rank; r this rank's shard (S,
        hidden), zeros past the rows it owns.

    Raises:
        ArgumentError: shapes, dtypes or devices do not fit.
        ProcessGroupError: there is no such group.
        TrainingError: in backward; the operator is for inference.
    """
    norm = NormSpec(weight, eps, weight_bias, form)
    inner = NormSpec(inner_weight, inner_eps, inner_weight_bias, inner_form)
    return compute_sharded(add_normalize, x, residual, norm, inner, group_name)


def compute_sharded(
    add_norm: AddNorm, x: Tensor, residual: Tensor | None, norm: NormSpec, inner: NormSpec, group_name: str
) -> tuple[Tensor, Tensor]:
    """Compute `all_reduce_rms_norm_sharded` with reduce-scatter and all-gather. A collective.

    Args:
        add_norm: computes the add and the norm.
        inner: the inner norm; its form is NO_INNER if there is none.
    """
    normed, shard = own_norm(add_norm, x, residual, norm, inner, group_name)
    return gather_rows.native(normed, x, group_name), shard


def own_norm(
    add_norm: AddNorm, x: Tensor, residual: Tensor | None, norm: NormSpec, inner: NormSpec, group_name: str
) -> tuple[Tensor, Tensor]:
    """Return this rank's rows (norm, sum) of a sharded operator. A collective."""
    world_size = resolve_group(group_name).size()
    rows = x.contiguous().reshape(-1, x.shape[-1])
    tokens = rows.shape[0]
    size = rows_per_rank(tokens, world_size)
    if residual is not None and isinstance(size, int) and residual.shape[0] != size:
        raise ArgumentError(
            f"the residual has {residual.shape[0]} rows; the shard of {tokens} tokens on {world_size} ranks has {size}"
        )
    if not _divides(tokens, world_size):
        rows = F.pad(rows, (0, 0, 0, size * world_size - tokens))
    shard = reduce_scatter(rows, world_size, group_name)
    if inner.form != NO_INNER:
        shard, _ = add_norm(shard, None, inner)
    return add_norm(shard, residual, norm)


def _divides(tokens: int, world_size: int) -> bool:
    """Return whether the ranks share the rows evenly, as far as known without a guard."""
    rest = tokens % world_size
    return rest == 0 if isinstance(rest, int) else rest.node.maybe_as_int() == 0


def _fake_shard_rows(x: Tensor, group_name: str) -> Tensor:
    size = rows_per_rank(x.numel() // x.shape[-1], resolve_group(group_name).size())
    return torch.empty((size, x.shape[-1]), dtype=x.dtype, device=x.device)


# Never inlined in graphs: it depends on the rank, and ranks share compile caches.
@register_op(fake=_fake_shard_rows, inlines=False, batch_invariant=True)
def shard_rows(x: Tensor, group_name: str) -> Tensor:
    """Return this rank's shard (S, hidden) of x (..., hidden), which is equal on all ranks."""
    group = resolve_group(group_name)
    return own_rows(x, group.rank(), group.size())


def _fake_gather_rows(shard: Tensor, like: Tensor, group_name: str) -> Tensor:
    return torch.empty(like.shape, dtype=shard.dtype, device=shard.device)


@register_op(fake=_fake_gather_rows, batch_invariant=True)
def gather_rows(shard: Tensor, like: Tensor, group_name: str) -> Tensor:
    """Return all ranks' shards (S, hidden) as one tensor of `like`'s shape. A collective."""
    world_size = resolve_group(group_name).size()
    tokens = like.numel() // like.shape[-1] if like.shape[-1] else 0
    rows = all_gather(shard.contiguous(), world_size, group_name)
    if not _divides(tokens, world_size):
        rows = rows[:tokens].clone()
    return rows.reshape(like.shape)


for _op in (all_reduce_rms_norm_sharded, shard_rows, gather_rows):
    register_autograd(_op, no_backward(_op.name))
