"""FlashInfer's workspace: one call on it, its self-test, and how it is freed."""

from __future__ import annotations

import ctypes
import sys
import time
from typing import Any

import torch
from torch import Tensor

from fusewire.custom_ops.coordination.timeouts import Limit, limit_s
from fusewire.custom_ops.coordination.vote import describe
from fusewire.custom_ops.dispatch.cost_tables import ONE_SHOT, TWO_SHOT
from fusewire.custom_ops.ops.norms import SCALE_THEN_ROUND, NormSpec
from fusewire.custom_ops.providers.alignment import aligned
from fusewire.custom_ops.providers.flashinfer.library import with_pdl
from fusewire.custom_ops.providers.flashinfer.limits import workspace_bytes
from fusewire.custom_ops.workspaces.known_answer import eighths
from fusewire.custom_ops.workspaces.provider import PROVIDERS, Request, Workspace
from fusewire.errors import PeerTimeoutError, WorkspaceError

_PATTERN = 1  # AllReduceFusionPattern.kARResidualRMSNorm


class FlashInferWorkspace(Workspace):
    """FlashInfer's workspace, with a residual and a weight for calls that have none."""

    def __init__(self, request: Request, handle: Any, comm: Any) -> None:
        hidden, dtype = request.key.hidden, request.key.dtype
        nbytes = workspace_bytes(hidden, dtype, request.group.size(), request.max_tokens)
        super().__init__(request.key, request.max_tokens, nbytes, request.device)
        self.handle = handle
        self._fused = comm.allreduce_fusion
        self._with_pdl = with_pdl()
        self.world_size, self.rank = request.group.size(), request.group.rank()
        # The kernels always add a residual. Adding -0.0 changes no value, not even -0.0.
        self._no_residual = torch.full((request.max_tokens, hidden), -0.0, dtype=dtype, device=request.device)
        self._no_weight = torch.zeros(hidden, dtype=dtype, device=request.device)

    def run(
        self,
        one_shot: bool,
        x: Tensor,
        residual: Tensor | None,
        norm: NormSpec,
    ) -> tuple[Tensor, Tensor]:
        """Run one call, with native's results. A collective.

        Thread-safe on one rank; the caller must give all ranks the same order of calls.

        Raises:
            WorkspaceError: the workspace is closed or too small.
        """
        shape, hidden = x.shape, self.key.hidden
        flat = aligned(x).view(-1, hidden)
        tokens = flat.shape[0]
        with self.order.lock:
            self.check_call(tokens, x.device)
            norm_out, residual_out = torch.empty_like(flat), torch.empty_like(flat)
            if tokens:  # a launch without blocks is an error
                weight, weight_bias = norm.weight, norm.weight_bias
                if weight is None:
                    weight, weight_bias = self._no_weight, 1.0
                before = self._no_residual[:tokens] if residual is None else aligned(residual).view(-1, hidden)
                if self.device.type == "cuda":
                    self.enter(x.get_device())
                self._fused(
                    input=flat,
                    workspace=self.handle,
                    pattern=_PATTERN,
                    launch_with_pdl=self._with_pdl,
                    trigger_completion_at_end=True,  # otherwise results were NaN (vllm#45448)
                    output=norm_out,  # unused by this pattern, but allocated on every call if not given
                    residual_in=before,
                    rms_gamma=aligned(weight),
                    rms_eps=norm.eps,
                    residual_out=residual_out,
                    norm_out=norm_out,
                    use_oneshot=one_shot,
                    fp32_acc=True,
                    weight_bias=weight_bias,
                )
        return norm_out.view(shape), residual_out.view(shape)

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


def check_arguments(workspace: FlashInferWorkspace) -> None:
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


def check_results(workspace: FlashInferWorkspace) -> None:
    """Raise WorkspaceError if a result is wrong, PeerTimeoutError if a call does not end."""
    hidden, dtype, ranks = workspace.key.hidden, workspace.key.dtype, workspace.world_size
    wrong: list[tuple[str, Tensor]] = []
    for variant, tokens, weight_bias in ((ONE_SHOT, 1, 1.0), (TWO_SHOT, ranks + 1, 0.0)):
        if tokens not in PROVIDERS[workspace.key.provider].token_limit(
            variant, hidden, dtype, ranks, workspace.max_tokens
        ):
            continue
        of = torch.float64, workspace.device
        parts = [eighths(tokens, hidden, 3 * rank + 1, *of) for rank in range(ranks)]
        residual, weight = eighths(tokens, hidden, 50, *of), eighths(1, hidden, 51, *of)[0]
        x = parts[workspace.rank].to(dtype)
        spec = NormSpec(weight.to(dtype), 0.25, weight_bias, SCALE_THEN_ROUND)
        norm, total = workspace.run(variant == ONE_SHOT, x, residual.to(dtype), spec)
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
                f"FlashInfer's first call did not return within {most_s:.0f} s, so a rank is missing "
                "or the GPUs cannot reach each other; this process cannot go on. Leave FlashInfer out: "
                "ir_op_priority={'all_reduce_rms_norm': ('native',)}"
            )
        time.sleep(0.0005)
