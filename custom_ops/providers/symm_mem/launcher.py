"""Provider `symm_mem`: all-reduce + residual + RMSNorm in one Triton kernel over torch's symmetric memory.

    norm, residual_out = one_shot(workspace, x, residual, weight, eps, weight_bias, form)  # few tokens
    norm, residual_out = two_shot(workspace, ...)  # more tokens
    norm, residual_shard = two_shot_sharded(workspace, ...)  # the residual stays sharded by rows
    norm, residual_out = one_shot(..., inner=InnerNorm(weight, eps, weight_bias, form))  # norms before and after

What they compute, for x of shape (..., hidden) on each rank of the workspace's group (T tokens, R ranks): s =
sum over ranks in rank order in fp32, rounded to x's dtype; r = round(s + residual), or s without a residual;
norm = RMSNorm(r) (Zhang and Sennrich, 2019, arXiv:1910.07467) in one of the forms of
`fusewire.custom_ops.ops.norms`. With an inner norm, as in Gemma 2 and 3 and GLM-4, r = round(residual + n), n =
RMSNorm(s) in the inner form. Results are deterministic and equal bit for bit across ranks. Every rank must
make the same calls in the same order, with equal shapes, dtypes and options, one call at a time (not on two
streams at once).

Triton is imported and kernels are compiled at the first call of their kind (see `compiling_only`), so call
once before capturing a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from fusewire.custom_ops.ops.norms import ROUND_THEN_SCALE
from fusewire.custom_ops.providers.symm_mem.arguments import (
    KINDS,
    InnerNorm,
    check_inner,
    output_like,
    prepared,
    residual_like,
    residual_shard,
    weight_for,
)
from fusewire.custom_ops.providers.symm_mem.launch_cache import key_of, remember, repeated
from fusewire.custom_ops.providers.symm_mem.launch_config import (
    Plan,
    check_plan,
    plan_one_shot,
    plan_two_shot_data,
    plan_two_shot_flags,
)
from fusewire.custom_ops.providers.symm_mem.workspace import SymmMemWorkspace, owned_rows, shard_rows
from fusewire.custom_ops.providers.triton_cache import shared_cache
from fusewire.errors import ArgumentError

DATA = "data"  # data as flag: lower latency
FLAGS = "flags"  # one flag a row: more throughput
_NO_WEIGHT = -1
_TENSORS = 6  # the kernels' first arguments

# Kernels by all that they were compiled by. Threads may both compile one and keep either: the two are the same.
_compiled: dict[Any, Any] = {}
_compile_only: ContextVar[bool] = ContextVar("fusewire_symm_mem_compile_only", default=False)
compiles_only: Callable[[], bool] = _compile_only.get


@contextmanager
def compiling_only() -> Iterator[None]:
    """Inside, calls compile what they would launch and launch nothing; their results are uninitialised.

    A rank that compiles while its peers already wait in the kernel makes them wait for the compiler, perhaps
    past the time limit. So compile on all ranks, let them meet, then call. Calls of other threads are launched
    meanwhile as ever; threads that are started inside do not inherit it.
    """
    token = _compile_only.set(True)
    try:
        with shared_cache():
            yield
    finally:
        _compile_only.reset(token)


def one_shot(
    ws: SymmMemWorkspace,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    weight_bias: float,
    form: str,
    norm_out: Tensor | None = None,
    residual_out: Tensor | None = None,
    *,
    need_residual: bool = True,
    inner: InnerNorm | None = None,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor | None]:
    """All ranks push all rows to all peers, in one hop: lowest latency, (R - 1) T H numbers out of each rank.

    Args:
        ws: the workspace, of x's hidden size and dtype.
        x: this rank's partial sums, (..., hidden), at most `ws.layout.one_shot_tokens` rows.
        residual: of x's shape and dtype, equal on all ranks, or None.
        weight: (hidden,), any floating dtype, or None.
        eps: added to the mean square.
        weight_bias: added to the weight (Gemma: 1.0). Ignored without a weight.
        form: "scale_then_round" or "round_then_scale".
        norm_out: where the norm goes, of x's shape and dtype, contiguous and not x itself; made if None.
        residual_out: likewise for r; may be `residual` itself.
        need_residual: False leaves r out; the second result is then None.
        inner: an RMSNorm of s before the residual is added, which must then be given.
        plan: launch parameters, equal on all ranks; by default `plan_one_shot`.

    Returns:
        The norm and r, of x's shape and dtype.

    Raises:
        ArgumentError: arguments that do not fit each other or the workspace.
        PeerTimeoutError: an earlier call waited for a peer in vain.
        WorkspaceError: the workspace is closed.
    """
    usual = plan is None and inner is None and norm_out is None and residual_out is None and need_residual
    key = key_of(one_shot, x, residual, weight, eps, weight_bias, form) if usual else None
    if not compiles_only() and (results := repeated(ws, key, x, residual, weight)) is not None:
        return results
    rows, tokens = prepared(ws, x, weight, eps, weight_bias, form, ws.layout.one_shot_tokens, "one-shot")
    check_inner(inner, residual, x)
    residual = residual_like(residual, x)
    norm_out = output_like(norm_out, x, x, "norm_out")
    residual_out = output_like(residual_out, x, x, "residual_out") if need_residual else None
    if tokens == 0:
        return norm_out, residual_out
    plan = plan or plan_one_shot(tokens, ws.layout.packets, ws.multiprocessors)
    layout, at = ws.layout, ws.layout.offsets
    source = layout.one_shot_tokens * layout.row_bytes
    _launch(
        ws,
        "one_shot_kernel",
        plan,
        (ws.ctl, rows, residual, weight_for(weight), norm_out, residual_out, tokens, ws.rank),
        (at["one_shot_slots"], ws.world_size * source, source, at["one_shot_slices"], eps, weight_bias),
        inner,
        (form == ROUND_THEN_SCALE, plan.slices, plan.block, plan.threads, plan.pdl),
        key,
    )
    return norm_out, residual_out


def two_shot(
    ws: SymmMemWorkspace,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    weight_bias: float,
    form: str,
    norm_out: Tensor | None = None,
    residual_out: Tensor | None = None,
    *,
    need_residual: bool = True,
    inner: InnerNorm | None = None,
    protocol: str | None = None,
    output: int | None = None,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Rows are summed by their owner, who pushes r and its squares; every rank normalises all rows: 2 (R - 1) / R T H
    numbers out.

    Arguments, results and errors as `one_shot`, but up to `ws.layout.max_tokens` rows, and

    Args:
        protocol: "data" (up to `ws.layout.data_tokens` rows) or "flags"; by default "data" while it fits.
        output: a number of one of the workspace's output buffers: r is left there, without a copy, and
            residual_out must be None. Only with "flags". See `SymmMemWorkspace.output` for how long it lives.
    """
    if output is not None and (residual_out is not None or not need_residual):
        raise ArgumentError("output names the buffer of the residual: leave residual_out None and need_residual True")
    usual = plan is None and inner is None and norm_out is None and residual_out is None and need_residual
    usual = usual and protocol is None and output is None
    key = key_of(two_shot, x, residual, weight, eps, weight_bias, form) if usual else None
    if not compiles_only() and (results := repeated(ws, key, x, residual, weight)) is not None:
        return results
    rows, tokens = prepared(ws, x, weight, eps, weight_bias, form, ws.layout.max_tokens, "two-shot")
    check_inner(inner, residual, x)
    residual = residual_like(residual, x)
    norm_out = output_like(norm_out, x, x, "norm_out")
    if output is not None:
        residual_out = output_like(ws.output(output, tokens).view(x.shape), x, x, "the output buffer")
    elif need_residual:
        residual_out = output_like(residual_out, x, x, "residual_out")
    if tokens:
        norm = (weight, eps, weight_bias, form)
        _two_shot(ws, rows, tokens, residual, norm, norm_out, residual_out, True, inner, protocol, output, plan, key)
    return norm_out, residual_out


def two_shot_sharded(
    ws: SymmMemWorkspace,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    weight_bias: float,
    form: str,
    norm_out: Tensor | None = None,
    residual_out: Tensor | None = None,
    *,
    need_residual: bool = True,
    inner: InnerNorm | None = None,
    protocol: str | None = None,
    output: int | None = None,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As `two_shot`, but each rank adds and normalises only its own rows and pushes them (few rows are pushed as in
    `two_shot`, with their squares); the residual stays sharded.

    Rank r owns rows r * S to min((r + 1) * S, T) of the flattened x, S = `shard_rows(T, R)` = ceil(T / R).

    Args:
        residual: this rank's rows, (S, hidden) or only the `owned_rows(T, R, rank)` first of them; rows past
            the owned ones are not read.
        norm_out: the complete norm, of x's shape.
        residual_out: (S, hidden), made if None; rows past the owned ones become zeros.
        output: the norm is left in that output buffer, without a copy; norm_out must then be None.

    Returns:
        The norm, of x's shape, complete on every rank; and this rank's rows of r, (S, hidden), or None.
    """
    if output is not None and norm_out is not None:
        raise ArgumentError("output names the buffer of the norm: leave norm_out None")
    rows, tokens = prepared(ws, x, weight, eps, weight_bias, form, ws.layout.max_tokens, "two-shot")
    shard, owned = shard_rows(tokens, ws.world_size), owned_rows(tokens, ws.world_size, ws.rank)
    check_inner(inner, residual, x)
    residual = residual_shard(residual, x, shard, owned, ws)
    if need_residual and residual_out is None:
        residual_out = x.new_empty((shard, ws.hidden))
    elif need_residual:
        residual_out = output_like(residual_out, x.new_empty((shard, ws.hidden), device="meta"), x, "residual_out")
    else:
        residual_out = None
    if output is not None:
        norm_out = ws.output(output, tokens).view(x.shape)
    norm_out = output_like(norm_out, x, x, "norm_out")
    if tokens:
        norm = (weight, eps, weight_bias, form)
        _two_shot(ws, rows, tokens, residual, norm, norm_out, residual_out, False, inner, protocol, output, plan)
    return norm_out, residual_out


def _two_shot(
    ws: SymmMemWorkspace,
    rows: Tensor,
    tokens: int,
    residual: Tensor | None,
    norm: tuple[Tensor | None, float, float, str],
    norm_out: Tensor,
    residual_out: Tensor | None,
    full: bool,
    inner: InnerNorm | None,
    protocol: str | None,
    output: int | None,
    plan: Plan | None,
    again: Hashable = None,
) -> None:
    layout, at, (weight, eps, weight_bias, form) = ws.layout, ws.layout.offsets, norm
    protocol = protocol or (DATA if tokens <= layout.data_tokens and output is None else FLAGS)
    if protocol not in (DATA, FLAGS):
        raise ArgumentError(f"protocol is {protocol!r}; it must be {DATA!r}, {FLAGS!r} or None")
    if protocol == DATA and (tokens > layout.data_tokens or output is not None):
        raise ArgumentError(
            f'protocol "data" takes at most {layout.data_tokens} tokens in this workspace, and no output '
            f'buffer; x has {tokens} tokens and output is {output}. Use "flags", or make the workspace with '
            "more data_tokens"
        )
    shard = shard_rows(tokens, ws.world_size)
    tensors = (ws.ctl, rows, residual, weight_for(weight), norm_out, residual_out, tokens, shard, ws.rank)
    rounding = form == ROUND_THEN_SCALE
    if protocol == DATA:
        plan = plan or plan_two_shot_data(shard, layout.packets, ws.world_size, ws.multiprocessors)
        source = layout.data_shard * layout.row_bytes
        slots = (at["data_slots"], ws.world_size * source, source)
        numbers = (*slots, at["data_results"], at["data_squares"], at["data_slices"], eps, weight_bias)
        tiles = (rounding, full, plan.slices, plan.block, plan.unroll, plan.threads, plan.pdl)
        _launch(ws, "two_shot_data_kernel", plan, tensors, numbers, inner, tiles, again)
    else:
        plan = plan or plan_two_shot_flags(shard, layout.packets, ws.world_size, ws.multiprocessors, full)
        results = at["results"] if output is None else at[f"output{output}"]
        areas = (at["inbox"], layout.flags_shard * layout.row_bytes, results, at["flags_rstds"])
        flags = (at["partial_flags"], at["result_flags"], 8 * layout.flags_shard)
        _launch(
            ws,
            "two_shot_flags_kernel",
            plan,
            tensors,
            (plan.ahead, plan.lag, *areas, *flags, eps, weight_bias),
            inner,
            (rounding, full, output is not None, plan.block, plan.threads, plan.pdl),
            again,
        )


def _inner_arguments(inner: InnerNorm | None) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The kernels' arguments and constants for an inner norm."""
    if inner is None:
        return (None, None, None), (False, _NO_WEIGHT, False)
    weight = weight_for(inner.weight)
    kind = _NO_WEIGHT if weight is None else KINDS[weight.dtype]
    # Floats, since Triton would take the types of these from their values.
    return (weight, float(inner.eps), float(inner.weight_bias)), (True, kind, inner.form == ROUND_THEN_SCALE)


def _launch(
    ws: SymmMemWorkspace,
    name: str,
    plan: Plan,
    tensors: tuple[Any, ...],
    numbers: tuple[Any, ...],
    inner: InnerNorm | None,
    options: tuple[Any, ...],
    again: Hashable = None,
) -> None:
    """Launch a kernel: its tensors and counts, its offsets and scalars, the inner norm, and its last constants.

    The constants between those follow from the tensors. A compiled kernel depends on nothing else (integers
    are not specialised, tensors are aligned), so after the first time Triton's argument analysis is skipped.
    `again`: what the same call is known by the next time.
    """
    residual, weight, residual_out = tensors[2], tensors[3], tensors[5]
    inner_values, inner_kinds = _inner_arguments(inner)
    weight_kind = _NO_WEIGHT if weight is None else KINDS[weight.dtype]
    kinds = (
        ws.world_size,
        ws.hidden,
        KINDS[ws.dtype],
        weight_kind,
        residual is not None,
        residual_out is not None,
        *inner_kinds,
    )
    key = (name, ws.device.index, plan.warps, kinds, options)
    args = (*tensors, *numbers, *inner_values, *kinds, *options)
    if ws.device.index is not None and torch.cuda.current_device() != ws.device.index:
        with torch.cuda.device(ws.device):
            _run(key, name, ws, plan, args)
        return
    launched = _run(key, name, ws, plan, args)
    if launched is not None and again is not None:
        remember(ws, again, launched, plan.programs, args[_TENSORS:])


def _run(key: Any, name: str, ws: SymmMemWorkspace, plan: Plan, args: tuple[Any, ...]) -> Any:
    """Launch, or compile where nothing else is asked for; the compiled kernel, if it was launched."""
    compiled = _compiled.get(key)
    reason = check_plan(plan, ws.layout.packets, ws.multiprocessors) if compiled is None else None
    if reason:
        raise ArgumentError(f"this plan cannot be used: {reason}")
    grid = (plan.programs, 1, 1)
    if compiled is not None:
        if not compiles_only():
            # Addresses, since of each tensor Triton would ask the driver whose memory it is.
            pointers = [None if tensor is None else tensor.data_ptr() for tensor in args[:_TENSORS]]
            compiled[grid](*pointers, *args[_TENSORS:])
            return compiled
        return None
    from fusewire.custom_ops.providers.symm_mem.kernels import two_shot_data as symm_mem_kernels
    from fusewire.custom_ops.providers.symm_mem.kernels import two_shot_flags as symm_mem_flags

    kernel = getattr(symm_mem_flags if hasattr(symm_mem_flags, name) else symm_mem_kernels, name)
    if compiles_only():
        kernel.warmup(*args, grid=grid, **plan.options)
        return None
    launched = kernel[grid](*args, **plan.options)
    if hasattr(launched, "__getitem__"):
        _compiled[key] = launched
    return None  # a kernel that has been launched before is launched the same way again
