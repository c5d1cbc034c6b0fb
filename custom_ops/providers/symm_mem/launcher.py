"""All-reduce + residual + RMSNorm in one Triton kernel over torch's symmetric memory.

    spec = NormSpec(weight, eps, weight_bias, form)
    norm, residual_out = one_shot(workspace, x, residual, spec)
    norm, residual_out = two_shot(workspace, ...)  # more tokens
    norm, residual_shard = two_shot_sharded(workspace, ...)  # the residual stays sharded by rows
    norm, residual_out = one_shot(..., inner=inner_spec)  # two norms
    norm, residual_out, fp8, scales = one_shot(..., quantization=Quantization(quant, None, True))

For x of shape (..., hidden) on each rank of the workspace's group (T tokens, R ranks): s is the sum
over ranks, in rank order in fp32, rounded to x's dtype; r = round(s + residual), or s without a
residual; norm = RMSNorm(r) in one of the forms of `fusewire.custom_ops.ops.norms`, in those of a
wide sum RMSNorm(s + residual). With an inner norm, as in Gemma 2 and 3 and GLM-4, n = RMSNorm(s) in
the inner form takes the place of s.
Results are deterministic and equal bit for bit across ranks.

Every call is a collective: all ranks make the same calls in the same order, with equal shapes,
dtypes and options, one call at a time (not on two streams at once).

Each function has two halves: `..._launch` checks the arguments and returns a `Launch`; `run`
launches it. `prepared_launch` reuses launches for calls that differ only in addresses. The first
call of a kind imports Triton and compiles (see `compiling_only`): make it before capturing a CUDA
graph.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Concatenate, ParamSpec

import torch
from torch import Tensor

from fusewire.custom_ops._triton_private import shared_cache
from fusewire.custom_ops.ops.norms import NormSpec
from fusewire.custom_ops.ops.quantization import FP8
from fusewire.custom_ops.ops.sharded_norm import rows_per_rank
from fusewire.custom_ops.providers.symm_mem.arguments import (
    Norms,
    Quantization,
    check_call,
    check_inner,
    output_like,
    quant_tensors,
    residual_like,
    residual_shard,
)
from fusewire.custom_ops.providers.symm_mem.assemble import NOTHING, Call, assemble
from fusewire.custom_ops.providers.symm_mem.launch_config import (
    ONE_SHOT_KERNEL,
    Launch,
    LaunchConfig,
    check_launch_config,
    launch_config_one_shot,
    launch_config_two_shot_data,
    launch_config_two_shot_flags,
)
from fusewire.custom_ops.providers.symm_mem.layout import owned_rows, shift_of
from fusewire.custom_ops.providers.symm_mem.workspace import SymmMemWorkspace
from fusewire.errors import ArgumentError

DATA = "data"  # data as flag: lower latency
FLAGS = "flags"  # one flag a row: more throughput

P = ParamSpec("P")

_compile_only: ContextVar[bool] = ContextVar("fusewire_symm_mem_compile_only", default=False)
compiles_only: Callable[[], bool] = _compile_only.get


@contextmanager
def compiling_only() -> Iterator[None]:
    """Make calls inside compile their kernels and launch nothing; results are uninitialised.

    If a rank compiles while its peers already wait in the kernel, their wait may time out. So
    compile on all ranks, then vote, then call. Applies to this thread (and context) only.
    """
    token = _compile_only.set(True)
    try:
        with shared_cache():
            yield
    finally:
        _compile_only.reset(token)


def one_shot_launch(
    ws: SymmMemWorkspace,
    x: Tensor,
    residual: Tensor | None,
    norm: NormSpec,
    norm_out: Tensor | None = None,
    residual_out: Tensor | None = None,
    *,
    need_residual: bool = True,
    inner: NormSpec | None = None,
    quantization: Quantization | None = None,
    batch_invariant: bool = False,
    config: LaunchConfig | None = None,
) -> Launch:
    """Return the launch of a one-shot, which sends (R - 1) T H numbers from each rank in one hop.

    Args:
        ws: the workspace, of x's hidden size and dtype.
        x: this rank's partial sums, (..., hidden), at most `ws.layout.one_shot_tokens` rows.
        residual: of x's shape and dtype, equal on all ranks, or None.
        norm: the norm of the sum, with the residual if there is one.
        norm_out: memory for the norm, of x's shape and dtype, contiguous, not x; new if None.
        residual_out: likewise for r; may be `residual` itself.
        need_residual: False does not write r; the second result is then None.
        inner: an RMSNorm of s before the residual add; needs a residual.
        quantization: quantise the norm to FP8 too; with_norm False then writes no norm.
        batch_invariant: add squares in an order that depends on the hidden size alone, with the
            arithmetic of the batch-invariant norms. Equal on all ranks.
        config: equal on all ranks; by default `launch_config_one_shot`. For tests and sweeps.

    Returns:
        The launch; its results are the norm and r, of x's shape and dtype; with a quantisation
        also the quantised norm, of x's shape, and its scales, or None if they are given.

    Raises:
        ArgumentError: the arguments do not fit each other or the workspace.
        PeerTimeoutError: a peer did not take part in an earlier call.
        WorkspaceError: the workspace is closed.
    """
    rows, tokens = check_call(ws, x, norm, ws.layout.one_shot_tokens, "one-shot")
    check_inner(inner, residual, x)
    residual = residual_like(residual, x)
    norm_out = _norm_out(norm_out, x, quantization)
    residual_out = output_like(residual_out, x, x, "residual_out") if need_residual else None
    layout, at = ws.layout, ws.layout.offsets
    source = layout.one_shot_source
    call = Call(
        (rows, residual, norm_out, residual_out),
        Norms(norm, inner, batch_invariant),
        quant_tensors(quantization, x),
    )
    if not tokens:
        return assemble(ws, "", NOTHING, call, (), None, ())
    config = config or launch_config_one_shot(tokens, layout.packets, ws.multiprocessors)
    slots = at["one_shot_slots"] + shift_of(tokens, False, inner is not None)
    numbers = (tokens, ws.rank, slots, ws.world_size * source, source, at["one_shot_slices"])
    tiles = (config.slices, config.block, config.threads)
    return assemble(ws, ONE_SHOT_KERNEL, config, call, numbers, at["one_shot_largest"], tiles)


def two_shot_launch(
    ws: SymmMemWorkspace,
    x: Tensor,
    residual: Tensor | None,
    norm: NormSpec,
    norm_out: Tensor | None = None,
    residual_out: Tensor | None = None,
    *,
    need_residual: bool = True,
    inner: NormSpec | None = None,
    quantization: Quantization | None = None,
    batch_invariant: bool = False,
    protocol: str | None = None,
    output: int | None = None,
    config: LaunchConfig | None = None,
) -> Launch:
    """Return the launch of a two-shot: owners sum rows and push them; all ranks normalise all rows.

    Each rank sends 2 (R - 1) / R T H numbers in two hops. Arguments, results and errors are those
    of `one_shot_launch`, but for up to `ws.layout.max_tokens` rows, and with

    Args:
        protocol: "data" (up to `ws.layout.data_tokens` rows) or "flags"; "data" if it fits by
            default.
        output: the number of a workspace's output buffer that receives r without a copy. Needs
            "flags" and no residual_out. `SymmMemWorkspace.output` documents its lifetime.
    """
    if output is not None and (residual_out is not None or not need_residual):
        raise ArgumentError("output names the buffer of the residual: leave residual_out None and need_residual True")
    rows, tokens = check_call(ws, x, norm, ws.layout.max_tokens, "two-shot")
    check_inner(inner, residual, x)
    residual = residual_like(residual, x)
    norm_out = _norm_out(norm_out, x, quantization)
    if output is not None:
        residual_out = output_like(ws.output(output, tokens).view(x.shape), x, x, "the output buffer")
    else:
        residual_out = output_like(residual_out, x, x, "residual_out") if need_residual else None
    norms = Norms(norm, inner, batch_invariant)
    call = Call((rows, residual, norm_out, residual_out), norms, quant_tensors(quantization, x))
    return _two_shot(ws, tokens, call, True, protocol, (None, output, None), config)


def two_shot_sharded_launch(
    ws: SymmMemWorkspace,
    x: Tensor,
    residual: Tensor | None,
    norm: NormSpec,
    norm_out: Tensor | None = None,
    residual_out: Tensor | None = None,
    *,
    need_residual: bool = True,
    inner: NormSpec | None = None,
    quantization: Quantization | None = None,
    batch_invariant: bool = False,
    protocol: str | None = None,
    output: int | None = None,
    config: LaunchConfig | None = None,
) -> Launch:
    """Return the launch of a two-shot with a sharded residual: ranks add and normalise own rows.

    Owners push normalised rows, or, if there are few, rows and squares as in `two_shot_launch`,
    whose arguments apply. Rank r owns rows r * S to min((r + 1) * S, T) of the flattened x, S =
    ceil(T / R).

    Args:
        residual: this rank's rows, (S, hidden) or only the `owned_rows(T, R, rank)` first of them;
            rows past the owned ones are not read.
        norm_out: the complete norm, of x's shape.
        residual_out: (S, hidden), made if None; rows past the owned ones become zeros.
        output: the output buffer that receives the norm, or the quantised norm if there is no
            other, without a copy; needs no norm_out.

    Returns:
        The launch; its results are the norm, of x's shape, complete on every rank, and this rank's
        rows of r, (S, hidden), or None.
    """
    if output is not None and norm_out is not None:
        raise ArgumentError("output names the buffer of the norm: leave norm_out None")
    rows, tokens = check_call(ws, x, norm, ws.layout.max_tokens, "two-shot")
    shard, owned = rows_per_rank(tokens, ws.world_size), owned_rows(tokens, ws.world_size, ws.rank)
    check_inner(inner, residual, x)
    residual = residual_shard(residual, x, shard, owned, ws)
    if not need_residual:
        residual_out = None
    elif residual_out is None:
        residual_out = x.new_empty((shard, ws.hidden))
    else:
        residual_out = output_like(residual_out, x.new_empty((shard, ws.hidden), device="meta"), x, "residual_out")
    quantized_out: Tensor | None = None
    outputs: tuple[int | None, int | None, int | None] = (output, None, None)
    if output is not None and quantization is not None and not quantization.with_norm:
        quantized_out, outputs = ws.output(output, tokens, FP8).view(x.shape), (None, None, output)
    elif output is not None:
        norm_out = ws.output(output, tokens).view(x.shape)
    norm_out = _norm_out(norm_out, x, quantization)
    norms = Norms(norm, inner, batch_invariant)
    call = Call((rows, residual, norm_out, residual_out), norms, quant_tensors(quantization, x, quantized_out))
    return _two_shot(ws, tokens, call, False, protocol, outputs, config)


def _norm_out(norm_out: Tensor | None, x: Tensor, quantization: Quantization | None) -> Tensor | None:
    """Return memory for the norm; None if the call does not write it."""
    if quantization is not None and not quantization.with_norm:
        if norm_out is not None:
            raise ArgumentError("norm_out is given, but the quantisation is without the norm; leave norm_out None")
        return None
    return output_like(norm_out, x, x, "norm_out")


def _two_shot(
    ws: SymmMemWorkspace,
    tokens: int,
    call: Call,
    replicate_residual: bool,
    protocol: str | None,
    outputs: tuple[int | None, int | None, int | None],
    config: LaunchConfig | None,
) -> Launch:
    """Return the launch of a two-shot. `outputs`: of its first three results."""
    layout, at = ws.layout, ws.layout.offsets
    output = next((slot for slot in outputs if slot is not None), None)
    shard = rows_per_rank(tokens, ws.world_size)
    if not tokens:
        return assemble(ws, "", NOTHING, call, (), None, ())
    if _protocol(ws, tokens, protocol, output, call.quant is not None) == DATA:
        config = config or launch_config_two_shot_data(shard, layout.packets, ws.world_size, ws.multiprocessors)
        source = layout.data_source
        counts = (tokens, shard, ws.rank)
        shift = shift_of(tokens, not replicate_residual, call.norms.inner is not None)
        slots = (at["data_slots"] + shift, ws.world_size * source, source)
        areas = (at["data_results"], at["data_squares"], at["data_slices"])
        constants = (replicate_residual, config.slices, config.block, config.unroll, config.threads)
        return assemble(ws, "two_shot_data_kernel", config, call, (*counts, *slots, *areas), None, constants)
    config = config or launch_config_two_shot_flags(
        shard, layout.packets, ws.world_size, ws.multiprocessors, replicate_residual
    )
    results = at["results"] if output is None else at[f"output{output}"]
    numbers = (
        *(tokens, shard, ws.rank, config.lookahead, config.result_lag),
        *(at["inbox"], layout.flags_shard * layout.row_bytes, results, at["flags_rstds"]),
        *(at["partial_flags"], at["result_flags"], 8 * layout.flags_shard),
    )
    tiles = (replicate_residual, output is not None, config.block, config.threads)
    return assemble(ws, "two_shot_flags_kernel", config, call, numbers, at["flags_scales"], tiles, outputs)


def _protocol(ws: SymmMemWorkspace, tokens: int, protocol: str | None, output: int | None, quantizes: bool) -> str:
    """Return the two-shot protocol: the requested one if it can serve, or the faster one."""
    fits = tokens <= ws.layout.data_tokens and output is None and not quantizes
    protocol = protocol or (DATA if fits else FLAGS)
    if protocol not in (DATA, FLAGS):
        raise ArgumentError(f"protocol is {protocol!r}; it must be {DATA!r}, {FLAGS!r} or None")
    if protocol == DATA and not fits:
        raise ArgumentError(
            f'protocol "data" takes at most {ws.layout.data_tokens} tokens in this workspace, no output '
            f"buffer and no quantisation; x has {tokens} tokens and output is {output}. Use "
            '"flags", or make the workspace with more data_tokens'
        )
    return protocol


def kernel(name: str) -> Any:
    """Return a kernel by its name. Imports Triton."""
    from fusewire.custom_ops.providers.symm_mem.kernels.one_shot import one_shot_kernel
    from fusewire.custom_ops.providers.symm_mem.kernels.two_shot_data import two_shot_data_kernel
    from fusewire.custom_ops.providers.symm_mem.kernels.two_shot_flags import two_shot_flags_kernel

    return {k.__name__: k for k in (one_shot_kernel, two_shot_data_kernel, two_shot_flags_kernel)}[name]


def run(ws: SymmMemWorkspace, launch: Launch) -> Any:
    """Launch on the current stream of the workspace's GPU; in `compiling_only` only compile.

    Returns:
        Triton's compiled kernel, or None if nothing was launched.

    Raises:
        ArgumentError: the launch configuration cannot be used.
    """
    config = launch.config
    if not config.programs:
        return None
    reason = check_launch_config(config, ws.layout.packets, ws.multiprocessors, launch.kernel)
    if reason:
        raise ArgumentError(f"this launch configuration cannot be used: {reason}")
    grid, arguments = (config.programs, 1, 1), (*launch.tensors, *launch.arguments)
    # Triton launches on the current device.
    away = ws.device.index is not None and torch.cuda.current_device() != ws.device.index
    with torch.cuda.device(ws.device) if away else contextlib.nullcontext():
        if compiles_only():
            kernel(launch.kernel).warmup(*arguments, grid=grid, **launch.options)
            return None
        return kernel(launch.kernel)[grid](*arguments, **launch.options)


def _direct(
    make: Callable[Concatenate[SymmMemWorkspace, P], Launch],
) -> Callable[Concatenate[SymmMemWorkspace, P], tuple[Tensor | None, ...]]:
    """Return a function that makes the launch, runs it and returns its results."""

    @functools.wraps(make)
    def call(ws: SymmMemWorkspace, /, *args: P.args, **options: P.kwargs) -> tuple[Tensor | None, ...]:
        launch = make(ws, *args, **options)
        run(ws, launch)
        return launch.results

    return call


one_shot = _direct(one_shot_launch)
two_shot = _direct(two_shot_launch)
two_shot_sharded = _direct(two_shot_sharded_launch)
