"""Choose the provider of a derived op of `all_reduce_rms_norm`: sandwich, sharded, quantised.

Derived ops have no costs and no vote of their own: the provider that would serve the plain operator
at this size serves them. If it has one kernel for the whole op (`WorkspaceProvider.bind_derived`),
that runs, else the provider's all-reduce followed by the rest. The choice depends only on data that
is the same on every rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

from fusewire.custom_ops._torch_private import is_capturing
from fusewire.custom_ops.dispatch import dispatcher as dispatch
from fusewire.custom_ops.dispatch.compare_calls import compare_call, compare_provider, comparing
from fusewire.custom_ops.dispatch.decisions import Decision
from fusewire.custom_ops.dispatch.served import counter_of
from fusewire.custom_ops.ops.all_reduce_norm import resolve_group
from fusewire.custom_ops.ops.norms import (
    BATCH_INVARIANT_NORMS,
    TRITON_NORM,
    NormSpec,
    add_normalize,
    fused_add_rms_norm,
    rms_norm,
)
from fusewire.custom_ops.ops.quantization import quantize_by_kernel
from fusewire.custom_ops.ops.quantized_norm import (
    all_reduce_rms_norm_quantized,
    all_reduce_rms_norm_quantized_sharded,
    compute_quantized_sharded,
    with_quantized,
)
from fusewire.custom_ops.ops.registry import NATIVE, IrOp, Provider
from fusewire.custom_ops.ops.sandwich_norm import all_reduce_sandwich_norm
from fusewire.custom_ops.ops.sharded_norm import (
    NO_INNER,
    AddNorm,
    all_reduce_rms_norm_sharded,
    compute_sharded,
    gather_rows,
    own_rows,
)
from fusewire.custom_ops.workspaces.capture import capturing
from fusewire.custom_ops.workspaces.provider import PROVIDERS


def select(op: IrOp, args: tuple[Any, ...], policy: str) -> Provider:
    """Return the provider for a call of a derived op, with an `fn` that has the op's parameters.

    Raises: as `fusewire.custom_ops.dispatch.dispatcher.select`.
    """
    assert op.derives_from is not None
    if comparing():
        compare_call(op, args, policy)
    decision = dispatch.decide(op.derives_from, op.base_args(args), policy)
    if comparing():
        compare_provider(op, args, decision)
    residual, weight, inner_weight = args[1], args[2], args[6]
    key = (
        op.name,
        None if residual is None else residual.dtype,
        None if weight is None else weight.dtype,
        None if inner_weight is None else inner_weight.dtype,
        args[9],
        *(value.dtype if isinstance(value, Tensor) else value for value in args[10:-1]),
    )
    found = decision.derived.get(key)
    if found is None:
        provider = dataclasses.replace(decision.provider, fn=_function(op, decision, args))
        variant = "" if decision.bound is None else decision.bound[2]
        found = provider, counter_of(op.name, args[0], args[-1], provider.name, variant, decision.served.reason)
        if not capturing():  # during capture a provider may not have been able to test its kernel
            decision.derived[key] = found
    provider, served = found
    if served.on_gpu and is_capturing():
        served.captured += 1
    else:
        served.calls += 1
    return provider


def _function(op: IrOp, decision: Decision, args: tuple[Any, ...]) -> Callable[..., Any]:
    provider = decision.provider
    whole = _whole(op, decision, args)
    if whole is not None:
        return whole
    if op in _QUANTIZED:
        return _quantized(op, decision, args)
    add_norm = _add_norm_for(provider, args[0])
    if op is all_reduce_sandwich_norm:
        return op.native if add_norm is add_normalize and provider.name == NATIVE else _sandwich(provider, add_norm)
    return _sharded_native(add_norm) if _gathers(provider) else _sharded_by_full_sum(provider, add_norm)


def _whole(op: IrOp, decision: Decision, args: tuple[Any, ...]) -> Callable[..., Any] | None:
    """Return the provider's one kernel for the whole op, or None."""
    if decision.bound is None:
        return None
    name, workspace, variant, output = decision.bound
    return PROVIDERS[name].bind_derived(workspace, variant, op.name, args, output)


def _gathers(provider: Provider) -> bool:
    """Return whether sharded ops run as reduce-scatter and all-gather without a kernel.

    FlashInfer has no sharded kernel, and these move as many bytes as it does. A reduce-scatter does
    not add in rank order, so batch-invariant providers do without.
    """
    return (provider.name == NATIVE or provider.name in PROVIDERS) and not provider.batch_invariant


def _by_policy(policy: str) -> AddNorm:
    """Return add + norm computed by the norms' own providers."""

    def add_norm(x: Tensor, residual: Tensor | None, norm: NormSpec) -> tuple[Tensor, Tensor]:
        if residual is None:
            plain = (x, *norm)
            return rms_norm.choose(*plain, policy=policy).provider.fn(*plain), x
        added = (x, residual, *norm)
        both: tuple[Tensor, Tensor] = fused_add_rms_norm.choose(*added, policy=policy).provider.fn(*added)
        return both

    return add_norm


_invariant = _by_policy(BATCH_INVARIANT_NORMS)
_kernel = _by_policy(f"{TRITON_NORM},{NATIVE}")


def _add_norm_for(provider: Provider, x: Tensor) -> AddNorm:
    if provider.batch_invariant:
        return _invariant
    return _kernel if dispatch.on_gpu(x) else add_normalize


# The functions below return functions of the parameters (x, residual, weight, eps, weight_bias,
# form, inner_weight, inner_eps, inner_weight_bias, inner_form, group_name).


def _sandwich(provider: Provider, add_norm: AddNorm) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the sandwich norm as the provider's all-reduce + norm, then add + norm."""

    def run(x: Tensor, residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        inner, _ = provider.fn(x, None, *rest[4:])
        return add_norm(inner, residual, NormSpec(*rest[:4]))

    return run


def _sharded_native(add_norm: AddNorm) -> Callable[..., tuple[Tensor, Tensor]]:
    if add_norm is add_normalize:
        return all_reduce_rms_norm_sharded.native

    def run(*args: Any) -> tuple[Tensor, Tensor]:
        x, residual, norm, inner = *args[:2], NormSpec(*args[2:6]), NormSpec(*args[6:10])
        return compute_sharded(add_norm, x, residual, norm, inner, args[10])

    return run


def _sharded_by_full_sum(provider: Provider, add_norm: AddNorm) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the sharded op from a user's provider, which sums all rows on every rank."""

    def run(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
        norm, inner, group_name = NormSpec(*rest[:4]), NormSpec(*rest[4:8]), rest[8]
        group = resolve_group(group_name)
        _, full = provider.fn(x, None, None, norm.eps, 0.0, norm.form, group_name)
        shard = own_rows(full, group.rank(), group.size())
        if inner.form != NO_INNER:
            shard, _ = add_norm(shard, None, inner)
        normed, shard = add_norm(shard, residual, norm)
        return gather_rows.native(normed, x, group_name), shard

    return run


def _quantized(op: IrOp, decision: Decision, args: tuple[Any, ...]) -> Callable[..., Any]:
    """Return a quantised op as the provider's plain op and a quantisation with native's bits."""
    provider, plain_args = decision.provider, (*args[:10], args[-1])
    if op is all_reduce_rms_norm_quantized:
        if args[9] == NO_INNER:
            return _then_quantize(provider.fn, 6)
        return _then_quantize(_function(all_reduce_sandwich_norm, decision, plain_args), 10)
    if _gathers(provider) and _whole(all_reduce_rms_norm_sharded, decision, plain_args) is None:
        return _quantized_sharded_native(_add_norm_for(provider, args[0]))
    return _then_quantize(_function(all_reduce_rms_norm_sharded, decision, plain_args), 10)


def _then_quantize(plain: Callable[..., tuple[Tensor, Tensor]], taken: int) -> Callable[..., Any]:
    """Return a plain op, which takes so many parameters before the group, then quantisation."""

    def run(*args: Any) -> tuple[Tensor, ...]:
        norm, added = plain(*args[:taken], args[-1])
        scale, quant, with_norm = args[10:13]
        return with_quantized(norm, added, scale, quant, with_norm, quantize_by_kernel)

    return run


def _quantized_sharded_native(add_norm: AddNorm) -> Callable[..., Any]:
    def run(*args: Any) -> tuple[Tensor, ...]:
        x, residual, norm, inner = *args[:2], NormSpec(*args[2:6]), NormSpec(*args[6:10])
        scale, quant, with_norm, group_name = args[10:]
        return compute_quantized_sharded(
            add_norm, x, residual, norm, inner, scale, quant, with_norm, group_name, quantize_by_kernel
        )

    return run


_QUANTIZED = (all_reduce_rms_norm_quantized, all_reduce_rms_norm_quantized_sharded)
for _op in (all_reduce_sandwich_norm, all_reduce_rms_norm_sharded, *_QUANTIZED):
    _op.selector = select
