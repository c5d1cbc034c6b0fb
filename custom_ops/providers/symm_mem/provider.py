"""The provider `symm_mem`: its supported calls, limits, workspaces and bound calls."""

from __future__ import annotations

import bisect
import functools
import importlib.util
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusewire.custom_ops.coordination.log import log_line
from fusewire.custom_ops.coordination.timeouts import check_kernel_timeouts, kernel_timeout_s
from fusewire.custom_ops.coordination.vote import Channel, vote
from fusewire.custom_ops.dispatch.cost_formula import data_tokens
from fusewire.custom_ops.dispatch.cost_tables import SYMM_ONE_SHOT, SYMM_TWO_SHOT
from fusewire.custom_ops.dispatch.dispatcher import served_by
from fusewire.custom_ops.environment import BATCH_INVARIANT_VARIABLE, env_flag
from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm, resolve_group
from fusewire.custom_ops.ops.norms import NormSpec
from fusewire.custom_ops.ops.quantized_norm import (
    all_reduce_rms_norm_quantized,
    all_reduce_rms_norm_quantized_sharded,
)
from fusewire.custom_ops.ops.registry import YES, Support
from fusewire.custom_ops.ops.sandwich_norm import all_reduce_sandwich_norm
from fusewire.custom_ops.ops.sharded_norm import all_reduce_rms_norm_sharded
from fusewire.custom_ops.providers.symm_mem import launcher as symm_mem
from fusewire.custom_ops.providers.symm_mem import self_test
from fusewire.custom_ops.providers.symm_mem.arguments import Quantization, unsupported_quant
from fusewire.custom_ops.providers.symm_mem.launch_config import Launch
from fusewire.custom_ops.providers.symm_mem.layout import MAX_WORLD_SIZE, Layout, unsupported_reason
from fusewire.custom_ops.providers.symm_mem.precompile import compilations
from fusewire.custom_ops.providers.symm_mem.prepared_launch import PreparedCall
from fusewire.custom_ops.providers.symm_mem.protocol import differences, least_multiprocessors, protocol
from fusewire.custom_ops.providers.symm_mem.workspace import SymmMemWorkspace
from fusewire.custom_ops.workspaces.provider import PROVIDERS, Request, Workspace, WorkspaceProvider, device_facts
from fusewire.errors import FusewireError, ProcessGroupError, WorkspaceError

PROVIDER = "symm_mem"
_QUANTIZED = (all_reduce_rms_norm_quantized.name, all_reduce_rms_norm_quantized_sharded.name)
_SHARDED = (all_reduce_rms_norm_sharded.name, all_reduce_rms_norm_quantized_sharded.name)
_WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# The largest workspace in bytes: every peer maps all of it.
MAX_BYTES = 1 << 30
# Above this number of tokens one-shot is slower, so its buffers are not made larger.
ONE_SHOT_TOKENS = 128
# Sizes of the layout that ranks compare: not multiples of large powers of two, so that differences
# in alignment show, and above all limits between protocols.
_PROBE_HIDDEN, _PROBE_TOKENS = 2888, 8001


def supported() -> Support:
    """Return whether this machine can run the kernels."""
    if not torch.cuda.is_available():
        return Support.no("torch finds no CUDA GPU; symm_mem's kernels run on NVIDIA GPUs")
    if torch.version.hip is not None:
        return Support.no("torch is built for ROCm; symm_mem's kernels are written for NVIDIA GPUs")
    major, minor = torch.cuda.get_device_capability()
    return Support.all_of(
        (
            importlib.util.find_spec("triton") is not None,
            "Triton is not installed (it comes with PyTorch for CUDA)",
        ),
        (major >= 8, f"compute capability {major}.{minor}; symm_mem needs 8.0 or newer"),
    )


def supports_args(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    *rest: Any,
) -> Support:
    """Return whether the kernels support such a call. Every rank gets the same answer."""
    try:
        world_size = resolve_group(rest[-1]).size()
    except ProcessGroupError as error:
        return Support.no(str(error))
    hidden = x.shape[-1]
    if not isinstance(hidden, int):
        return Support.no("the hidden size is symbolic; compile with it static (torch._dynamo.mark_static)")
    reason = unsupported_reason(world_size, hidden, x.dtype)
    return Support.all_of(
        (reason is None, reason or ""),
        (x.device.type == "cuda", f"x is on {x.device.type}; symm_mem's kernels run on CUDA GPUs"),
        (
            residual is None or residual.dtype == x.dtype,
            "the residual and x have different dtypes; symm_mem's kernels take one",
        ),
        (
            weight is None or weight.dtype in _WEIGHT_DTYPES,
            "the weight must be bfloat16, float16 or float32",
        ),
    )


def _layout(hidden: int, dtype: torch.dtype, world_size: int, tokens: int) -> Layout:
    return Layout(
        world_size=world_size,
        hidden=hidden,
        itemsize=dtype.itemsize,
        one_shot_tokens=min(ONE_SHOT_TOKENS, tokens),
        data_tokens=min(data_tokens(world_size), tokens),
        max_tokens=tokens,
        outputs=0,
    )


@functools.lru_cache(maxsize=256)
def max_tokens(hidden: int, dtype: torch.dtype, world_size: int) -> int:
    """Return the most tokens of a workspace of at most MAX_BYTES."""
    counts = range(1, MAX_BYTES // (hidden * dtype.itemsize) + 1)
    return bisect.bisect_right(counts, MAX_BYTES, key=lambda t: _layout(hidden, dtype, world_size, t).nbytes)


class HeldWorkspace(Workspace):
    """The kernels' workspace, as an entry of the registry."""

    def __init__(self, request: Request, made: SymmMemWorkspace) -> None:
        super().__init__(request.key, request.max_tokens, made.nbytes, request.device)
        self.made = made
        self.rank, self.world_size = made.rank, made.world_size
        self._group = request.group
        # By tested kind of call; "" if it passed.
        self._refusals: dict[tuple[str, self_test.QuantKind | None], str] = {}
        self._testing = threading.Lock()

    def run(
        self,
        call: PreparedCall,
        x: Tensor,
        residual: Tensor | None,
        norm: NormSpec,
        inner: NormSpec | None = None,
        *quantization: Quantization,
    ) -> tuple[Any, ...]:
        """Run one call, with native's results. A collective.

        Thread-safe on one rank: calls are launched one after another, on all streams. The caller
        must give all ranks the same order of calls.

        Raises:
            ArgumentError: the arguments do not fit each other or the workspace.
            WorkspaceError: the workspace is closed or too small.
            PeerTimeoutError: a peer did not take part in an earlier call.
        """
        if symm_mem.compiles_only():  # launches nothing, so other threads need not wait
            return call(x, residual, norm, inner, *quantization)
        with self.order.lock:
            self.check_call(x.numel() // self.key.hidden, x.device)
            self.enter(x.get_device())
            return call(x, residual, norm, inner, *quantization)

    def passes(self, kind: str, quant: self_test.QuantKind | None = None) -> bool:
        """Return whether calls of a derived op give right results.

        The first call of each kind is a collective: all ranks test and vote. Not possible while a
        CUDA graph is captured. Thread-safe.
        """
        key = kind, quant
        if key not in self._refusals:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                what = f"{self_test.name_of(*key)} calls were not tested before capture, so two kernels serve"
                log_line(f"{self.key}: {what}; run the model once before capture")
                return False
            with self._testing:
                if key not in self._refusals:  # another thread may have tested it meanwhile
                    self._refusals[key] = self._self_test(*key)
        return not self._refusals[key]

    def _self_test(self, kind: str, quant: self_test.QuantKind | None) -> str:
        """Test and vote; return why such calls cannot be made, or "" if they can. A collective."""
        name = self_test.name_of(kind, quant)
        channel = Channel(self._group, f"{self.key} {name}")
        for step, test in (("compile", self_test.compile_probes), ("execute", self_test.execute_probes)):
            share = functools.partial(test, self.run, self.made, kind, quant)
            reason = vote(channel, f"self-test {name}, {step}", share).reason
            if reason:
                log_line(f"{self.key}: no kernel of its own for {name} calls: {reason}")
                return reason
        return ""

    def fault(self) -> FusewireError | None:
        return self.made.fault()

    def lose(self, rank: int) -> None:
        self.made.lose(rank)

    def release(self) -> None:
        """Free the symmetric buffers."""
        self.made.close()


class SymmMemProvider(WorkspaceProvider):
    """The kernels as a provider with workspaces."""

    name = PROVIDER
    variants = (SYMM_ONE_SHOT, SYMM_TWO_SHOT)
    batch_invariant = False  # whether it launches the kernels' batch-invariant form

    def machine(self, group: dist.ProcessGroup, device: torch.device) -> Mapping[str, Any]:
        support = supported()
        if not support:
            raise WorkspaceError(support.reason)
        import triton

        probe = _layout(_PROBE_HIDDEN, torch.bfloat16, group.size(), _PROBE_TOKENS)
        return {
            **device_facts(device),
            "rank": dist.get_rank(),
            "multiprocessors": torch.cuda.get_device_properties(device).multi_processor_count,
            "kernel_timeout_s": kernel_timeout_s(group),
            "protocol": protocol(probe, triton.__version__),
        }

    def validate(self, facts: Sequence[Mapping[str, Any]]) -> Support:
        check_kernel_timeouts({fact["rank"]: fact["kernel_timeout_s"] for fact in facts})
        different = differences(facts)
        same = Support.all_of(
            (
                not different,
                f"the ranks would misread each other's buffers: {different}; install the same "
                "fusewire and Triton for every rank",
            )
        )
        return super().validate(facts) and same

    def limits(self, hidden: int, dtype: torch.dtype, world_size: int) -> Support:
        reason = unsupported_reason(world_size, hidden, dtype)
        return YES if reason is None else Support.no(reason)

    def token_limit(self, variant: str, hidden: int, dtype: torch.dtype, world_size: int, max_tokens: int) -> range:
        return range(min(ONE_SHOT_TOKENS, max_tokens) + 1 if variant == SYMM_ONE_SHOT else max_tokens + 1)

    def max_tokens(self, hidden: int, dtype: torch.dtype, world_size: int) -> int:
        return max_tokens(hidden, dtype, world_size) if 2 <= world_size <= MAX_WORLD_SIZE else 0

    def nbytes(self, hidden: int, dtype: torch.dtype, world_size: int, max_tokens: int) -> int:
        return _layout(hidden, dtype, world_size, max_tokens).nbytes

    def create(self, request: Request, channel: Channel) -> Workspace:
        key = request.key
        made = SymmMemWorkspace(
            key.group_name,
            key.hidden,
            key.dtype,
            request.max_tokens,
            one_shot_tokens=ONE_SHOT_TOKENS,
            data_tokens=data_tokens(request.group.size()),
            outputs=request.outputs,
            timeout_s=float(request.facts[0]["kernel_timeout_s"]),
            device=request.device,
            multiprocessors=least_multiprocessors(request.facts),
            barrier=channel.barrier,
        )
        return HeldWorkspace(request, made)

    def self_test(self, workspace: Workspace, stage: str) -> None:
        assert isinstance(workspace, HeldWorkspace)
        test = self_test.compile_probes if stage == "alone" else self_test.execute_probes
        test(workspace.run, workspace.made, self_test.PLAIN)

    def bind(
        self, workspace: Workspace, variant: str, output: int | None = None
    ) -> Callable[..., tuple[Tensor, Tensor]]:
        assert isinstance(workspace, HeldWorkspace)
        run, call = workspace.run, self._call(workspace, variant == SYMM_ONE_SHOT, False, output)

        def bound(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
            return run(call, x, residual, NormSpec(*rest[:4]))

        return bound

    def kernels_to_compile(self, workspace: Workspace) -> Sequence[Callable[[], object]]:
        assert isinstance(workspace, HeldWorkspace)
        return compilations(workspace.made, batch_invariant=env_flag(BATCH_INVARIANT_VARIABLE))

    def _call(self, workspace: HeldWorkspace, one_shot: bool, sharded: bool, output: int | None) -> PreparedCall:
        """Return calls of one kernel."""
        # Not one-shot for a sharded residual: every rank would need the whole of it.
        make: Callable[..., Launch] = symm_mem.two_shot_sharded_launch if sharded else symm_mem.two_shot_launch
        if one_shot and not sharded:
            make, output = symm_mem.one_shot_launch, None
        if self.batch_invariant:
            make = functools.partial(make, batch_invariant=True)
        return PreparedCall(workspace.made, make, output)

    def bind_derived(
        self, workspace: Workspace, variant: str, op_name: str, args: tuple[Any, ...], output: int | None = None
    ) -> Callable[..., tuple[Any, ...]] | None:
        if op_name not in (all_reduce_sandwich_norm.name, *_SHARDED, *_QUANTIZED):
            return None
        x, residual, weights = args[0], args[1], (args[2], args[6])
        if residual is not None and residual.dtype != x.dtype:
            return None
        if any(weight is not None and weight.dtype not in _WEIGHT_DTYPES for weight in weights):
            return None
        assert isinstance(workspace, HeldWorkspace)
        quant, sharded = None, op_name in _SHARDED
        if op_name in _QUANTIZED:
            scale, text, with_norm = args[10:13]
            if unsupported_quant(text) or x.dtype == torch.float32:
                return None
            quant = self_test.QuantKind(args[5], text, scale is not None, with_norm)
        if not workspace.passes(self_test.kind_of(bool(args[9]), sharded, self.batch_invariant), quant):
            return None
        call = self._call(workspace, variant == SYMM_ONE_SHOT, sharded, output)
        return _derived(workspace, call) if quant is None else _quantized(workspace, call)


def _derived(workspace: HeldWorkspace, call: PreparedCall) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return a call with the parameters of the operators derived from `all_reduce_rms_norm`."""
    run = workspace.run

    def bound(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
        return run(call, x, residual, NormSpec(*rest[:4]), _inner(rest))

    return bound


def _inner(rest: tuple[Any, ...]) -> NormSpec | None:
    """Return the inner norm of a derived op's arguments after the residual, or None."""
    return NormSpec(*rest[4:8]) if rest[7] else None


def _quantized(workspace: HeldWorkspace, call: PreparedCall) -> Callable[..., tuple[Tensor, ...]]:
    """Return a call with the parameters of the quantised operators."""
    run = workspace.run

    def bound(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
        scale, quant, with_norm = rest[8:11]
        quantization = Quantization(quant, scale, with_norm)
        norm, summed, quantized, scales = run(call, x, residual, NormSpec(*rest[:4]), _inner(rest), quantization)
        norm = x.new_empty((0,)) if norm is None else norm
        scales = x.new_empty((0,), dtype=torch.float32) if scales is None else scales
        return norm, summed, quantized, scales

    return bound


all_reduce_rms_norm.register_impl(
    PROVIDER, supported=supported, supports_args=supports_args, batch_invariant_form=f"{PROVIDER}_batch_invariant"
)(served_by(PROVIDER))
PROVIDERS[PROVIDER] = SymmMemProvider()
