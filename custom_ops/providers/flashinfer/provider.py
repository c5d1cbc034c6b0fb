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
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusewire.custom_ops.coordination.timeouts import Limit
from fusewire.custom_ops.coordination.vote import Channel
from fusewire.custom_ops.dispatch.cost_tables import ONE_SHOT, TWO_SHOT
from fusewire.custom_ops.dispatch.dispatcher import served_by
from fusewire.custom_ops.environment import BATCH_INVARIANT_VARIABLE, env_flag
from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm, resolve_group
from fusewire.custom_ops.ops.norms import NormSpec, keeps_wide_sum
from fusewire.custom_ops.ops.registry import Support, machine_support
from fusewire.custom_ops.providers.flashinfer import library as flashinfer_library
from fusewire.custom_ops.providers.flashinfer.library import CAPABILITIES
from fusewire.custom_ops.providers.flashinfer.limits import (
    dtype_name,
    limits,
    max_tokens,
    token_limit,
    workspace_bytes,
)
from fusewire.custom_ops.providers.flashinfer.workspace import FlashInferWorkspace, check_arguments, check_results
from fusewire.custom_ops.workspaces.provider import PROVIDERS, Request, Workspace, WorkspaceProvider, device_facts
from fusewire.errors import ProcessGroupError, WorkspaceError

PROVIDER = "flashinfer"


def supported() -> Support:
    """Return whether this machine can run the kernels; compiled or not does not matter."""
    if env_flag(BATCH_INVARIANT_VARIABLE):
        return Support.no(
            f"{BATCH_INVARIANT_VARIABLE} is set, and how FlashInfer's kernels sum a row's squares "
            "changes with the number of tokens"
        )
    if not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no CUDA GPU"
        return Support.no(f"{why}; FlashInfer's kernels run on NVIDIA GPUs")
    major, minor = torch.cuda.get_device_capability()
    if major not in CAPABILITIES:
        return Support.no(
            f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}; FlashInfer's "
            "all-reduce kernels are built for 9.x, 10.x and 12.x"
        )
    found = flashinfer_library.library()
    return Support.all_of((not found.reason, found.reason))


def supports_args(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    *rest: Any,
) -> Support:
    """Return whether FlashInfer supports such a call. Every rank gets the same answer."""
    try:
        world_size = resolve_group(rest[-1]).size()
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
            f"the weight is {dtype_name(weight)} and x is {dtype_name(x)}: FlashInfer's kernels "
            "would read the weight's bytes as x's dtype; store the norm's weight in the "
            "activations' dtype",
        ),
        (
            residual is None or residual.dtype == x.dtype,
            f"the residual is {dtype_name(residual)} and x is {dtype_name(x)}; FlashInfer's kernels take one dtype",
        ),
        (
            residual is None or not keeps_wide_sum(rest[2], x.dtype),
            "the norm reads the sum with the residual before it is rounded; FlashInfer's kernels round it first",
        ),
    )


def _on_gpu(x: Tensor) -> bool:
    return x.device.type == "cuda"


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
        check = check_arguments if stage == "alone" else check_results
        check(workspace)

    def bind(
        self, workspace: Workspace, variant: str, output: int | None = None
    ) -> Callable[..., tuple[Tensor, Tensor]]:
        assert isinstance(workspace, FlashInferWorkspace)
        run, one_shot = workspace.run, variant == ONE_SHOT

        def call(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
            return run(one_shot, x, residual, NormSpec(*rest[:4]))

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


all_reduce_rms_norm.register_impl(PROVIDER, supported=supported, supports_args=supports_args)(served_by(PROVIDER))
PROVIDERS[PROVIDER] = FlashInferProvider()
