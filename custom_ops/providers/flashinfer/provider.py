"""FlashInfer's fused all-reduce + residual + RMSNorm kernels, a provider of `all_reduce_rms_norm`.

The workspace is FlashInfer's `trtllm` one: peer-to-peer memory without NVLink multicast ("auto" and
"mnnvl" may use multicast and are never requested). One-shot: every rank pushes its rows to every
other rank and sums all rows (lowest latency). Two-shot: every rank sums a share of the rows and
pushes the sums to the others (least traffic).

Numerics: the sum over ranks is in rank order, in fp32, and rounded once; so are the sum with the
residual and the norm. `form="round_then_scale"` therefore rounds once less than native. The forms
of a wide sum would round once more, so calls with a residual are refused there. One-shot turns -0.0
into +0.0. The kernels use fast math: magnitudes below 2**-126 become zero, bf16 subnormals
included. Not batch-invariant: how a row's squares are summed depends on the number of tokens.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusewire.custom_ops.coordination.timeouts import Limit, limit_s
from fusewire.custom_ops.coordination.vote import Channel, describe
from fusewire.custom_ops.dispatch.cost_tables import ONE_SHOT, TWO_SHOT
from fusewire.custom_ops.environment import env_flag
from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm, resolve_group
from fusewire.custom_ops.ops.norms import keeps_wide_sum
from fusewire.custom_ops.ops.registry import Support, machine_support
from fusewire.custom_ops.providers.flashinfer import library as flashinfer_library
from fusewire.custom_ops.providers.flashinfer.library import CAPABILITIES
from fusewire.custom_ops.workspaces.known_answer import eighths
from fusewire.custom_ops.workspaces.provider import PROVIDERS, Request, Workspace, WorkspaceProvider, device_facts
from fusewire.errors import PeerTimeoutError, ProcessGroupError, WorkspaceError

PROVIDER = "flashinfer"
WORLD_SIZES = (2, 4, 8, 16)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# The kernels compute the third Lamport buffer's offset in int32. At this size it overflows: a hang.
_COMM_BYTES_LIMIT = 1 << 30
# Kernels use up to 126 registers per thread, so larger blocks may fail to launch.
_MAX_BLOCK = 512
_BATCH_INVARIANT = "FUSEWIRE_BATCH_INVARIANT"
_PATTERN = 1  # AllReduceFusionPattern.kARResidualRMSNorm


# --- Is it there? -------------------------------------------------------------------------------------------


def supported() -> Support:
    """Return whether this machine can run the kernels; compiled or not does not matter."""
    if env_flag(_BATCH_INVARIANT):
        return Support.no(
            f"{_BATCH_INVARIANT} is set, and how FlashInfer's kernels sum a row's squares changes "
            "with the number of tokens"
        )
    if not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no CUDA GPU"
        return Support.no(f"{why}; FlashInfer's kernels run on NVIDIA GPUs")
    major, minor = torch.cuda.get_device_capability()
    if major not in CAPABILITIES:
        return Support.no(
            f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}; FlashInfer's "
            "all-reduce kernels are "
            "built for 9.x, 10.x and 12.x"
        )
    found = flashinfer_library.library()
    return Support.no(found.reason) if found.reason else Support(True)


# --- What it can compute ------------------------------------------------------------------------------------


def limits(hidden: int, dtype: torch.dtype, world_size: int) -> Support:
    """Return whether the kernels support this hidden size, dtype and world size."""
    if dtype not in _DTYPES:
        return Support.no(f"x is {_name(dtype)}; FlashInfer's kernels take bfloat16, float16 and float32")
    vector = 16 // dtype.itemsize
    return Support.all_of(
        (
            world_size in WORLD_SIZES,
            f"the group has {world_size} ranks; FlashInfer's kernels are built for 2, 4, 8 or 16",
        ),
        (
            hidden > 0 and hidden % vector == 0,
            f"hidden size {hidden} is not a multiple of {vector}, the {_name(dtype)} elements of one 16-byte access",
        ),
        (
            block_threads(hidden, dtype) <= _MAX_BLOCK,
            f"hidden size {hidden} needs {block_threads(hidden, dtype)} threads in a block, "
            f"{_MAX_BLOCK} are safe; a hidden size that is a multiple of {8 * vector} is split "
            "over up to 8 blocks",
        ),
        (
            max_tokens(hidden, dtype, world_size) > 0,
            f"one token of hidden size {hidden} on {world_size} ranks passes the kernels' limit of 1 GiB",
        ),
    )


def block_threads(hidden: int, dtype: torch.dtype) -> int:
    """Return the threads per block: the kernels split a token over a cluster of up to 8 blocks."""
    per_token = max(1, hidden * dtype.itemsize // 16)
    cluster = 8
    while per_token % cluster and cluster > 1:
        cluster //= 2
    threads = per_token // cluster
    while threads < 128 and cluster >= 2:
        threads, cluster = threads * 2, cluster // 2
    return threads


def max_tokens(hidden: int, dtype: torch.dtype, world_size: int) -> int:
    """Return the largest workspace in tokens; world size * tokens * row bytes must be < 1 GiB."""
    return (_COMM_BYTES_LIMIT - 1) // (world_size * max(hidden, 1) * dtype.itemsize)


def workspace_bytes(hidden: int, dtype: torch.dtype, world_size: int, tokens: int) -> int:
    """Return a workspace's bytes per rank: Lamport and exchange buffers, flags, defaults."""
    elements = world_size * tokens * hidden
    # An upper bound before FlashInfer 0.7.2, whose exchange buffer always has 2-byte elements.
    exact = (3 * elements * dtype.itemsize, elements * dtype.itemsize, world_size * 1024)
    granularity = 2 << 20
    symmetric = sum(-(-(size + 2048) // granularity) * granularity for size in exact)
    return symmetric + (tokens + 1) * hidden * dtype.itemsize


def token_limit(variant: str, hidden: int, dtype: torch.dtype, world_size: int, tokens: int) -> range:
    """Return the token counts that a variant takes on a workspace for `tokens` tokens."""
    if variant == ONE_SHOT:
        return range(tokens + 1)
    if block_threads(hidden, dtype) < world_size:
        return range(0)
    # Two-shot needs more tokens than ranks; a buffer of 2-byte elements must hold input and sums.
    return range(world_size + 1, min(tokens, world_size * tokens // dtype.itemsize) + 1)


def supports_args(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    weight_bias: float,
    form: str,
    group_name: str,
) -> Support:
    """Return whether FlashInfer supports such a call. Every rank gets the same answer."""
    try:
        world_size = resolve_group(group_name).size()
    except ProcessGroupError as error:
        return Support.no(str(error))
    hidden = x.shape[-1]
    if not isinstance(hidden, int):
        return Support.no("the hidden size is symbolic; compile with it static (torch._dynamo.mark_static)")
    fixed = limits(hidden, x.dtype, world_size)
    return fixed and Support.all_of(
        (_on_gpu(x), f"x is on {x.device.type}; FlashInfer's kernels run on CUDA GPUs"),
        (
            weight is None or weight.dtype == x.dtype,
            f"the weight is {_name(weight)} and x is {_name(x)}: FlashInfer's kernels would read "
            "the weight's bytes as x's dtype; store the norm's weight in the activations' dtype",
        ),
        (
            residual is None or residual.dtype == x.dtype,
            f"the residual is {_name(residual)} and x is {_name(x)}; FlashInfer's kernels take one dtype",
        ),
        (
            residual is None or not keeps_wide_sum(form, x.dtype),
            "the norm reads the sum with the residual before it is rounded; FlashInfer's kernels round it first",
        ),
    )


def _on_gpu(x: Tensor) -> bool:
    return x.device.type == "cuda"


def _name(value: Tensor | torch.dtype | None) -> str:
    dtype = value.dtype if isinstance(value, Tensor) else value
    return str(dtype).removeprefix("torch.")


# --- Workspace and call -------------------------------------------------------------------------------------


class FlashInferWorkspace(Workspace):
    """FlashInfer's workspace, with a residual and a weight for calls that have none."""

    def __init__(self, request: Request, handle: Any, comm: Any) -> None:
        hidden, dtype = request.key.hidden, request.key.dtype
        nbytes = workspace_bytes(hidden, dtype, request.group.size(), request.max_tokens)
        super().__init__(request.key, request.max_tokens, nbytes, request.device)
        self.handle = handle
        self._fused = comm.allreduce_fusion
        self.world_size, self.rank = request.group.size(), request.group.rank()
        # The kernels always add a residual. Adding -0.0 changes no value, not even -0.0.
        self._no_residual = torch.full((request.max_tokens, hidden), -0.0, dtype=dtype, device=request.device)
        self._no_weight = torch.zeros(hidden, dtype=dtype, device=request.device)

    def run(
        self,
        one_shot: bool,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        eps: float,
        weight_bias: float,
    ) -> tuple[Tensor, Tensor]:
        """Run one call, with native's results. A collective.

        Thread-safe on one rank; the caller must give all ranks the same order of calls.

        Raises:
            WorkspaceError: the workspace is closed or too small.
        """
        shape, hidden = x.shape, self.key.hidden
        flat = dense(x).view(-1, hidden)
        tokens = flat.shape[0]
        with self.order.lock:
            self.check_call(tokens, x.device)
            norm, residual_out = torch.empty_like(flat), torch.empty_like(flat)
            if tokens:  # a launch without blocks is an error
                if weight is None:
                    weight, weight_bias = self._no_weight, 1.0
                before = self._no_residual[:tokens] if residual is None else dense(residual).view(-1, hidden)
                if self.device.type == "cuda":
                    self.enter(x.get_device())
                self._fused(
                    input=flat,
                    workspace=self.handle,
                    pattern=_PATTERN,
                    launch_with_pdl=False,  # PDL may read weight and residual too early
                    trigger_completion_at_end=True,
                    output=norm,  # unused by this pattern, but allocated on every call if not given
                    residual_in=before,
                    rms_gamma=dense(weight),
                    rms_eps=eps,
                    residual_out=residual_out,
                    norm_out=norm,
                    use_oneshot=one_shot,
                    fp32_acc=True,
                    weight_bias=weight_bias,
                )
        return norm.view(shape), residual_out.view(shape)

    def release(self) -> None:
        """Free FlashInfer's buffers, including those that its own destroy() does not free."""
        handle, self.handle = self.handle, None
        del self._no_residual, self._no_weight
        pointers = getattr(handle, "ipc_handles", None)
        flag = (getattr(handle, "metadata", None) or {}).get("control_flag_ptr")
        module = sys.modules.get("flashinfer.comm.trtllm_ar")
        getattr(module, "_symm_workspace_refs", {}).pop(id(pointers), None)
        handle.destroy()
        handle.__dict__.pop("_internal_workspace", None)
        if flag and module is not None:
            module.cudart.cudaFree(ctypes.c_void_p(flag))


def dense(tensor: Tensor) -> Tensor:
    """Return the tensor contiguous and 16-byte aligned, as a copy if needed."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


class FlashInferProvider(WorkspaceProvider):
    """FlashInfer as a provider with workspaces."""

    name = PROVIDER
    variants = (ONE_SHOT, TWO_SHOT)
    load_limit = Limit.COMPILATION

    def machine(self, group: dist.ProcessGroup, device: torch.device) -> Mapping[str, Any]:
        support = machine_support(all_reduce_rms_norm.providers[PROVIDER])
        if not support:
            raise WorkspaceError(support.reason)
        return {**device_facts(device), "flashinfer": flashinfer_library.library().version}

    def load(self, group: dist.ProcessGroup) -> None:
        flashinfer_library.load_kernels(is_logging_rank=group.rank() == 0)

    def validate(self, facts: Sequence[Mapping[str, Any]]) -> Support:
        versions = sorted({str(fact.get("flashinfer")) for fact in facts})
        same = Support.all_of(
            (len(versions) == 1, f"the ranks have different versions of FlashInfer: {', '.join(versions)}")
        )
        return super().validate(facts) and same

    def limits(self, hidden: int, dtype: torch.dtype, world_size: int) -> Support:
        return limits(hidden, dtype, world_size)

    def token_limit(self, variant: str, hidden: int, dtype: torch.dtype, world_size: int, max_tokens: int) -> range:
        if self.left_out(variant):
            return range(0)
        return token_limit(variant, hidden, dtype, world_size, max_tokens)

    def left_out(self, variant: str) -> str:
        # Without a GPU, the plan is for another machine, whose FlashInfer version is unknown.
        return flashinfer_library.two_shot().reason if variant == TWO_SHOT and torch.cuda.is_available() else ""

    def max_tokens(self, hidden: int, dtype: torch.dtype, world_size: int) -> int:
        return max_tokens(hidden, dtype, world_size)

    def nbytes(self, hidden: int, dtype: torch.dtype, world_size: int, max_tokens: int) -> int:
        return workspace_bytes(hidden, dtype, world_size, max_tokens)

    def create(self, request: Request, channel: Channel) -> Workspace:
        _check_peers(request)
        comm = flashinfer_library.library().comm
        with torch.cuda.device(request.device) if request.device.type == "cuda" else contextlib.nullcontext():
            handle = comm.create_allreduce_fusion_workspace(
                backend="trtllm",
                world_size=request.group.size(),
                rank=request.group.rank(),
                max_token_num=request.max_tokens,
                hidden_dim=request.key.hidden,
                dtype=request.key.dtype,
                comm_backend=channel,
                group=request.group,
            )
            made = FlashInferWorkspace(request, handle, comm)
            if request.device.type == "cuda":  # buffers were filled on this thread's stream
                torch.cuda.synchronize()
            return made

    def self_test(self, workspace: Workspace, stage: str) -> None:
        assert isinstance(workspace, FlashInferWorkspace)
        if stage == "alone":
            _prove_arguments(workspace)
        else:
            _prove_results(workspace)

    def bind(
        self, workspace: Workspace, variant: str, output: int | None = None
    ) -> Callable[..., tuple[Tensor, Tensor]]:
        assert isinstance(workspace, FlashInferWorkspace)
        run, one_shot = workspace.run, variant == ONE_SHOT

        def call(
            x: Tensor,
            residual: Tensor | None,
            weight: Tensor | None,
            eps: float,
            weight_bias: float,
            form: str,
            group_name: str,
        ) -> tuple[Tensor, Tensor]:
            return run(one_shot, x, residual, weight, eps, weight_bias)

        return call


def _check_peers(request: Request) -> None:
    """Raise WorkspaceError if the memory of a visible peer GPU cannot be accessed."""
    if request.device.type != "cuda":
        return
    visible = {str(torch.cuda.get_device_properties(i).uuid): i for i in range(torch.cuda.device_count())}
    for fact in request.facts:
        peer = visible.get(str(fact.get("uuid")))
        if peer not in (None, request.device.index) and not torch.cuda.can_device_access_peer(request.device, peer):
            raise WorkspaceError(
                f"{request.device} cannot access the memory of cuda:{peer} (`python -m fusewire "
                "doctor` prints the links); FlashInfer's kernels need peer-to-peer access between "
                "all ranks' GPUs"
            )


def _prove_arguments(workspace: FlashInferWorkspace) -> None:
    """Raise WorkspaceError if the Python package and the compiled kernels disagree on arguments.

    Launches nothing: the kernels parse the arguments (a mismatch raises TypeError), then reject
    hidden size 3. No collective: a rank that failed in one would leave its peers waiting in a
    kernel for ever.
    """
    odd = torch.zeros(1, 3, dtype=workspace.key.dtype, device=workspace.device)
    try:
        workspace._fused(
            input=odd,
            workspace=workspace.handle,
            pattern=_PATTERN,
            output=odd,
            residual_in=odd,
            rms_gamma=odd[0],
            rms_eps=1e-6,
            residual_out=odd,
            norm_out=odd,
            use_oneshot=True,
            fp32_acc=True,
            weight_bias=0.0,
        )
    except TypeError as error:
        raise WorkspaceError(
            "FlashInfer's Python package and its compiled kernels do not fit together (reinstall "
            "both in one version, or delete the cache that `python -m fusewire doctor` names): "
            f"{describe(error)}"
        ) from error
    except Exception:  # hidden size 3 was rejected, as expected
        return


def _prove_results(workspace: FlashInferWorkspace) -> None:
    """Raise WorkspaceError if a result is wrong, PeerTimeoutError if a call does not end."""
    hidden, dtype, ranks = workspace.key.hidden, workspace.key.dtype, workspace.world_size
    wrong: list[tuple[str, Tensor]] = []
    for variant, tokens, weight_bias in ((ONE_SHOT, 1, 1.0), (TWO_SHOT, ranks + 1, 0.0)):
        if tokens not in PROVIDERS[PROVIDER].token_limit(variant, hidden, dtype, ranks, workspace.max_tokens):
            continue
        of = torch.float64, workspace.device
        parts = [eighths(tokens, hidden, 3 * rank + 1, *of) for rank in range(ranks)]
        residual, weight = eighths(tokens, hidden, 50, *of), eighths(1, hidden, 51, *of)[0]
        x = parts[workspace.rank].to(dtype)
        norm, total = workspace.run(variant == ONE_SHOT, x, residual.to(dtype), weight.to(dtype), 0.25, weight_bias)
        exact = sum(parts, residual)
        scaled = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + 0.25) * (weight_bias + weight)
        close = (norm.double() - scaled).abs() <= scaled.abs() * 4 * torch.finfo(dtype).eps + 1e-30
        wrong.append((f"{variant} sum", (total.double() != exact).any()))
        wrong.append((f"{variant} norm", ~close.all()))
    if workspace.device.type == "cuda":
        _wait(limit_s(Limit.FIRST_CALL))
    failed = [what for what, tensor in wrong if bool(tensor)]
    if failed:
        raise WorkspaceError(
            f"a call with a known answer came out wrong ({', '.join(failed)}); these FlashInfer "
            "kernels do not fit this GPU or this package: reinstall FlashInfer, or leave it out "
            "of the priority list"
        )


def _wait(most_s: float) -> None:
    """Wait for the current stream; raise PeerTimeoutError after most_s seconds."""
    event = torch.cuda.Event()
    event.record()
    start = time.monotonic()
    while not event.query():
        if time.monotonic() - start > most_s:
            raise PeerTimeoutError(
                f"FlashInfer's first call did not return within {most_s:.0f} s, so a rank is missing or "
                "the GPUs cannot "
                "reach each other; this process cannot go on. Leave FlashInfer out: "
                "ir_op_priority={'all_reduce_rms_norm': ('native',)}"
            )
        time.sleep(0.0005)


@all_reduce_rms_norm.register_impl(PROVIDER, supported=supported, supports_args=supports_args)
def all_reduce_rms_norm_flashinfer(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    weight_bias: float,
    form: str,
    group_name: str,
) -> tuple[Tensor, Tensor]:
    """Run one call with the policy "flashinfer", without the dispatcher's table. A collective."""
    from fusewire.custom_ops.dispatch import dispatcher as dispatch

    args = (x, residual, weight, eps, weight_bias, form, group_name)
    result: tuple[Tensor, Tensor] = dispatch.select(all_reduce_rms_norm, args, PROVIDER).fn(*args)
    return result


PROVIDERS[PROVIDER] = FlashInferProvider()
