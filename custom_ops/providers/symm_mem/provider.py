"""Provider `symm_mem` for the dispatcher: our Triton kernels over torch's symmetric memory.

fusewire.custom_ops.providers.symm_mem.launcher has the calls; here is what fusewire.custom_ops.workspaces.registry and
fusewire.custom_ops.dispatch.dispatcher need to know of them.
"""

from __future__ import annotations

import functools
import importlib.util
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusewire.custom_ops.coordination.log import log_line
from fusewire.custom_ops.coordination.timeouts import KERNEL_WAIT_S
from fusewire.custom_ops.coordination.vote import Channel, vote
from fusewire.custom_ops.dispatch.cost_tables import SYMM_ONE_SHOT, SYMM_TWO_SHOT
from fusewire.custom_ops.dispatch.pick import last
from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm, resolve_group
from fusewire.custom_ops.ops.registry import YES, Support
from fusewire.custom_ops.ops.sharded_norm import all_reduce_rms_norm_sharded
from fusewire.custom_ops.providers.symm_mem import launcher as symm_mem
from fusewire.custom_ops.providers.symm_mem import self_test as proofs
from fusewire.custom_ops.providers.symm_mem.arguments import InnerNorm
from fusewire.custom_ops.providers.symm_mem.precompile import compilations
from fusewire.custom_ops.providers.symm_mem.protocol import differences, least_multiprocessors, protocol
from fusewire.custom_ops.providers.symm_mem.workspace import (
    MAX_WORLD_SIZE,
    Layout,
    SymmMemWorkspace,
    unsupported_reason,
)
from fusewire.custom_ops.workspaces.provider import PROVIDERS, Request, Workspace, WorkspaceProvider, device_facts
from fusewire.errors import ProcessGroupError, WorkspaceError

PROVIDER = "symm_mem"
_WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# The largest workspace that is made: all of it is mapped by every peer.
MAX_BYTES = 1 << 30
# Above so many tokens the one-shot and the data-as-flag protocol lose; their buffers are not made larger.
ONE_SHOT_TOKENS = 128
# Sizes of the layout by which ranks compare how they would lay out any. They are multiples of no large power of two, so
# that its alignment shows; and no limit between protocols lies above.
_PROBE_HIDDEN, _PROBE_TOKENS = 2888, 8001


def supported() -> Support:
    """Whether this machine can run the kernels at all."""
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
    eps: float,
    weight_bias: float,
    form: str,
    group_name: str,
) -> Support:
    """Whether the kernels can serve such a call. Everything in here is the same on every rank."""
    try:
        world_size = resolve_group(group_name).size()
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


def data_tokens(world_size: int) -> int:
    """The most tokens for the data-as-flag protocol: the more ranks, the longer it wins."""
    return 1024 if world_size > 4 else 512


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
    """The largest workspace under MAX_BYTES, in tokens."""
    end = MAX_BYTES // (hidden * dtype.itemsize)
    return last(lambda tokens: _layout(hidden, dtype, world_size, tokens).nbytes <= MAX_BYTES, end)


class HeldWorkspace(Workspace):
    """The kernels' workspace in the registry's terms."""

    def __init__(self, request: Request, made: SymmMemWorkspace) -> None:
        super().__init__(request.key, request.max_tokens, made.nbytes, request.device)
        self.made = made
        self.rank, self.world_size = made.rank, made.world_size
        self._group = request.group
        self._proofs: dict[str, str] = {}  # per kind of call, why not, or ""
        self._proving = threading.Lock()

    def run(
        self,
        call: Callable[..., tuple[Tensor, Tensor | None]],
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        eps: float,
        weight_bias: float,
        form: str,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        """One call, with native's results (those of the sharded operator for `symm_mem.two_shot_sharded`): a collective.

        Thread-safe: one call is launched after the other, on the streams too. But the ranks' calls must come in one
        order, and which of two threads is first is not decided here: the caller makes it the same on every rank.

        Raises:
            WorkspaceError: the workspace is closed or too small.
            PeerTimeoutError: an earlier call waited for a peer in vain.
        """
        if symm_mem.compiles_only():  # nothing is launched, and other threads' calls need not wait for the compiler
            norm, summed = call(self.made, x, residual, weight, eps, weight_bias, form, **options)
        else:
            with self.order.lock:
                self.check_call(x.numel() // self.key.hidden, x.device)
                self.order.enter(x.get_device())
                norm, summed = call(self.made, x, residual, weight, eps, weight_bias, form, **options)
        assert summed is not None
        return norm, summed

    def output(self, asked: int | None, tokens: int) -> dict[str, int]:
        """The option for a call whose result may stay in an output buffer: only the protocol with flags can do so."""
        layout = self.made.layout
        return {"output": asked} if asked is not None and layout.outputs > asked and tokens > layout.data_tokens else {}

    def proven(self, kind: str) -> bool:
        """Whether such calls of an operator that extends the plain one come out right: tried and voted on once, by all
        ranks together, at the first of them. During the capture of a CUDA graph nothing can be tried. Thread-safe.
        """
        if kind not in self._proofs:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                what = f"{kind} calls were not tried before capture, so two kernels serve"
                log_line(f"{self.key}: {what}; run the model once before capture")
                return False
            with self._proving:
                if kind not in self._proofs:  # another thread may have tried them meanwhile
                    self._proofs[kind] = self._prove(kind)
        return not self._proofs[kind]

    def _prove(self, kind: str) -> str:
        """Make the calls with a known answer and vote: why such calls cannot be made, or nothing."""
        channel = Channel(self._group, f"{self.key} {kind}")
        result = None
        for stage in ("alone", "together"):
            if result is None or result.ok:
                share = functools.partial(proofs.prove, self.run, self.made, kind, stage)
                result = vote(channel, f"self-test {kind} {stage}", share)
        assert result is not None
        if result.reason:
            log_line(f"{self.key}: no kernel of its own for {kind} calls: {result.reason}")
        return result.reason

    def check_errors(self) -> None:
        if not self.closed:
            self.made.check()

    def release(self) -> None:
        """Free the symmetric buffers."""
        self.made.close()


class SymmMemProvider(WorkspaceProvider):
    """Our kernels for the dispatcher."""

    name = PROVIDER
    variants = (SYMM_ONE_SHOT, SYMM_TWO_SHOT)

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
            "protocol": protocol(probe, triton.__version__),
        }

    def validate(self, facts: Sequence[Mapping[str, Any]]) -> Support:
        different = differences(facts)
        same = Support.all_of(
            (
                not different,
                f"the ranks would misread each other's buffers: {different}; install the same fusewire and Triton for "
                "every rank",
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
            timeout_s=KERNEL_WAIT_S,
            device=request.device,
            multiprocessors=least_multiprocessors(request.facts),
            barrier=channel.barrier,
        )
        return HeldWorkspace(request, made)

    def self_test(self, workspace: Workspace, stage: str) -> None:
        assert isinstance(workspace, HeldWorkspace)
        proofs.prove(workspace.run, workspace.made, proofs.PLAIN, stage)

    def bind(
        self, workspace: Workspace, variant: str, output: int | None = None
    ) -> Callable[..., tuple[Tensor, Tensor]]:
        assert isinstance(workspace, HeldWorkspace)
        run, hidden = workspace.run, workspace.key.hidden
        one_shot = variant == SYMM_ONE_SHOT
        call = symm_mem.one_shot if one_shot else symm_mem.two_shot

        def bound(
            x: Tensor,
            residual: Tensor | None,
            weight: Tensor | None,
            eps: float,
            weight_bias: float,
            form: str,
            group_name: str,
        ) -> tuple[Tensor, Tensor]:
            return run(call, x, residual, weight, eps, weight_bias, form)

        def in_place(
            x: Tensor,
            residual: Tensor | None,
            weight: Tensor | None,
            eps: float,
            weight_bias: float,
            form: str,
            group_name: str,
        ) -> tuple[Tensor, Tensor]:
            options = workspace.output(output, x.numel() // hidden)
            return run(call, x, residual, weight, eps, weight_bias, form, **options)

        return bound if output is None or one_shot else in_place

    def kernels_to_compile(self, workspace: Workspace) -> Sequence[Callable[[], object]]:
        assert isinstance(workspace, HeldWorkspace)
        return compilations(workspace.made)

    def bind_derived(
        self, workspace: Workspace, variant: str, op_name: str, args: tuple[Any, ...], output: int | None = None
    ) -> Callable[..., tuple[Tensor, Tensor]] | None:
        x, residual, weights = args[0], args[1], (args[2], args[6])
        if residual is not None and residual.dtype != x.dtype:
            return None
        if any(weight is not None and weight.dtype not in _WEIGHT_DTYPES for weight in weights):
            return None
        assert isinstance(workspace, HeldWorkspace)
        sharded = op_name == all_reduce_rms_norm_sharded.name
        kind = (proofs.SHARDED_SANDWICH if args[9] else proofs.SHARDED) if sharded else proofs.SANDWICH
        if not workspace.proven(kind):
            return None
        if sharded:
            # Also for few tokens: in one shot every rank needs the whole residual.
            return _extended(workspace, symm_mem.two_shot_sharded, output)
        if variant == SYMM_ONE_SHOT:
            return _extended(workspace, symm_mem.one_shot, None)
        return _extended(workspace, symm_mem.two_shot, output)


def _extended(
    workspace: HeldWorkspace, call: Callable[..., Any], output: int | None
) -> Callable[..., tuple[Tensor, Tensor]]:
    """A call of a kernel with the parameters of the operators that extend `all_reduce_rms_norm`."""
    run, hidden = workspace.run, workspace.key.hidden

    def bound(
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        eps: float,
        weight_bias: float,
        form: str,
        inner_weight: Tensor | None,
        inner_eps: float,
        inner_weight_bias: float,
        inner_form: str,
        group_name: str,
    ) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = {} if output is None else workspace.output(output, x.numel() // hidden)
        if inner_form:
            options["inner"] = InnerNorm(inner_weight, inner_eps, inner_weight_bias, inner_form)
        return run(call, x, residual, weight, eps, weight_bias, form, **options)

    return bound


@all_reduce_rms_norm.register_impl(PROVIDER, supported=supported, supports_args=supports_args)
def all_reduce_rms_norm_symm_mem(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    weight_bias: float,
    form: str,
    group_name: str,
) -> tuple[Tensor, Tensor]:
    """One call without the dispatcher's table: as `all_reduce_rms_norm` with the policy "symm_mem"."""
    from fusewire.custom_ops.dispatch import dispatcher as dispatch

    args = (x, residual, weight, eps, weight_bias, form, group_name)
    result: tuple[Tensor, Tensor] = dispatch.select(all_reduce_rms_norm, args, PROVIDER).fn(*args)
    return result


PROVIDERS[PROVIDER] = SymmMemProvider()
