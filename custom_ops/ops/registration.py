"""Declare operators with torch.library, and register their backward."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, overload

import torch

from fusewire.custom_ops._torch_private import AFTER_AUTOGRAD, BACKEND_KEYS, autograd_kernel
from fusewire.custom_ops.ops.registry import NATIVE, IrOp, Provider, add_op, all_ops, always
from fusewire.errors import SchemaError

_LIBRARY = torch.library.Library("fusewire", "DEF")


@overload
def register_op(fn: Callable[..., Any], /) -> IrOp: ...


@overload
def register_op(
    *,
    fake: Callable[..., Any] | None = ...,
    check: Callable[..., None] | None = ...,
    derives_from: tuple[IrOp, Callable[[tuple[Any, ...]], tuple[Any, ...]]] | None = ...,
    inlines: bool = ...,
    batch_invariant: bool = ...,
) -> Callable[[Callable[..., Any]], IrOp]: ...


def register_op(
    fn: Callable[..., Any] | None = None,
    /,
    *,
    fake: Callable[..., Any] | None = None,
    check: Callable[..., None] | None = None,
    derives_from: tuple[IrOp, Callable[[tuple[Any, ...]], tuple[Any, ...]]] | None = None,
    inlines: bool = True,
    batch_invariant: bool = False,
) -> IrOp | Callable[[Callable[..., Any]], IrOp]:
    """Declare an operator whose native semantics (provider `native`) are the decorated function.

    Args:
        fn: native, with annotated parameters (torch.library infers the schema from them).
        fake: computes the outputs' shapes and dtypes from fake tensors; native itself by default.
        check: raises ArgumentError for arguments that no provider can take; called before dispatch.
        derives_from: the operator whose providers compute this one, and a function that converts
            this op's arguments to that op's.
        inlines: False keeps native out of graphs, required if native depends on the rank.
        batch_invariant: whether native is batch-invariant, as in `register_impl`.

    Raises:
        SchemaError: an operator of that name exists.
    """
    if fn is None:
        return functools.partial(
            register_op,  # type: ignore[return-value]
            fake=fake,
            check=check,
            derives_from=derives_from,
            inlines=inlines,
            batch_invariant=batch_invariant,
        )
    name = fn.__name__
    if name in all_ops():
        raise SchemaError(f"fusewire::{name} is registered already")
    op = IrOp(name, fn, inspect.signature(fn), inlines=inlines)
    if derives_from is not None:
        op.derives_from, op.base_args = derives_from
    schema = torch.library.infer_schema(fn, mutates_args=())
    head, arrow, returns = schema.rpartition(" -> ")
    separator = "" if head.endswith("()") else ", "
    _LIBRARY.define(f'{name}{head[:-1]}{separator}str policy=""){arrow}{returns}')

    def dispatch(*args: Any, policy: str = "") -> Any:
        if len(args) > n_params:
            args, policy = args[:n_params], args[n_params]
        bound = args + defaults[len(args) :]
        if check is not None:
            check(*bound)
        if op.selector is not None:
            return op.selector(op, bound, policy).fn(*bound)
        return op.choose(*bound, policy=policy).provider.fn(*bound)

    def fake_dispatch(*args: Any, policy: str = "") -> Any:
        bound = args[:n_params]
        bound = bound + defaults[len(bound) :]
        if check is not None:
            check(*bound)
        return (fake or fn)(*bound)

    n_params = len(op.signature.parameters)
    defaults = tuple(p.default for p in op.signature.parameters.values())
    op.run = _keywords_to_positions(op, dispatch)
    _LIBRARY.impl(name, op.run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fusewire::{name}", _keywords_to_positions(op, fake_dispatch), lib=_LIBRARY)
    op.torch_op = getattr(torch.ops.fusewire, name).default
    op.providers[NATIVE] = Provider(NATIVE, name, fn, always, always, always, batch_invariant)
    add_op(op)
    return op


def register_autograd(op: IrOp, backward: Callable[..., Any], setup_context: Callable[..., None] | None = None) -> None:
    """Register an operator's backward; without a gradient, calls take half of torch's host time.

    With grad mode off and only the backend's kernel left to dispatch to (no tracing, no subclass),
    it calls that kernel directly. torch's own version dispatches a second time.
    """
    with_gradient = autograd_kernel(op.torch_op, backward, setup_context)
    below, kernels, run = AFTER_AUTOGRAD, BACKEND_KEYS, op.run

    def autograd(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() and (keyset & below).highestPriorityTypeId() in kernels:
            return run(*args, **kwargs)
        return with_gradient(keyset, *args, **kwargs)

    _LIBRARY.impl(op.name, autograd, "Autograd", with_keyset=True)


def _keywords_to_positions(op: IrOp, fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls `fn`, which takes positions, with positions or keywords."""
    parameters = op.signature.parameters

    def call(*args: Any, **kwargs: Any) -> Any:
        if not kwargs:
            return fn(*args)
        policy = kwargs.pop("policy", "")
        rest = (kwargs.get(p.name, p.default) for p in list(parameters.values())[len(args) :])
        return fn(*args, *rest, policy=policy)

    return call
