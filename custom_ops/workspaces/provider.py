"""What a provider with workspaces is, and what a workspace is.

A provider of a fused operator that needs symmetric buffers subclasses `WorkspaceProvider` and is added to `PROVIDERS`;
fusewire.custom_ops.dispatch.dispatcher does the rest.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from fusewire.custom_ops.coordination.rendezvous import host
from fusewire.custom_ops.coordination.timeouts import MACHINE_CHECK_S
from fusewire.custom_ops.coordination.vote import Channel
from fusewire.custom_ops.ops.registry import Support
from fusewire.custom_ops.workspaces.stream_order import StreamOrder
from fusewire.errors import WorkspaceError


class WorkspaceKey(NamedTuple):
    """What a workspace is for; there is one at most for each."""

    provider: str
    group_name: str
    dtype: torch.dtype
    hidden: int

    def __str__(self) -> str:
        return f"{self.provider} group {self.group_name} {self.dtype} hidden {self.hidden}"


class Workspace(abc.ABC):
    """Buffers of one provider for one key, on one device. Subclasses hold them and free them in `release`."""

    def __init__(self, key: WorkspaceKey, max_tokens: int, nbytes: int, device: torch.device) -> None:
        self.key = key
        self.max_tokens = max_tokens
        self.nbytes = nbytes
        self.device = device
        self.order = StreamOrder.of(device)
        self.closed = False

    def check_call(self, tokens: int, device: torch.device) -> None:
        """Raise WorkspaceError if a call does not fit. What ranks could see differently ends here, loudly.

        Call it with `order.lock` held until the call is launched, so that no other thread closes the workspace meanwhile.
        """
        if self.closed:
            raise WorkspaceError(f"the workspace ({self.key}) is closed; call fusewire.prepare(...) to make a new one")
        if tokens > self.max_tokens:
            raise WorkspaceError(
                f"{tokens} tokens do not fit the workspace ({self.key}), made for {self.max_tokens}; close it with "
                f"fusewire.close() and call fusewire.prepare(..., max_tokens={tokens})"
            )
        if device != self.device:
            raise WorkspaceError(
                f"the input is on {device} but the workspace ({self.key}) is on {self.device}; call "
                "torch.cuda.set_device before the first call or fusewire.prepare"
            )

    def close(self) -> None:
        """Wait for the device and free the buffers. Idempotent. CUDA graphs captured with it are invalid.

        Thread-safe: a call of another thread is launched before, and waited for, or finds the workspace closed.
        """
        with self.order.lock:
            if self.closed:
                return
            self.closed = True
        if self.device.type == "cuda" and torch.cuda.is_initialized():
            torch.cuda.synchronize(self.device)
        self.release()

    @abc.abstractmethod
    def release(self) -> None: ...


@dataclass(frozen=True)
class Request:
    """What a workspace is to be made for. `max_tokens` is already the same on every rank."""

    key: WorkspaceKey
    group: dist.ProcessGroup
    device: torch.device
    max_tokens: int
    facts: tuple[Mapping[str, Any], ...] = ()
    # Buffers of (max_tokens, hidden) in which results can stay without a copy, where the provider knows that.
    outputs: int = 0


class WorkspaceProvider(abc.ABC):
    """What a provider with workspaces tells the dispatcher. Only `create` and `prove` communicate."""

    name: str
    # Ways to compute one call, as fusewire.custom_ops.dispatch.cost_model names their costs ("flashinfer/oneshot", ...).
    variants: tuple[str, ...]
    # How long `machine` may take, in seconds, where it has to compile.
    machine_s: float = MACHINE_CHECK_S

    @abc.abstractmethod
    def machine(self, group: dist.ProcessGroup, device: torch.device) -> Mapping[str, Any]:
        """Facts about this rank's machine for the others, or raise with the reason why it cannot serve."""

    def judge(self, facts: Sequence[Mapping[str, Any]]) -> Support:
        """Whether these facts of all ranks fit together. Pure: every rank computes the same."""
        hosts, gpus = {fact.get("host") for fact in facts}, [fact.get("uuid") for fact in facts]
        return Support.all_of(
            (len(hosts) == 1, f"the group's ranks are on {len(hosts)} hosts; peer-to-peer kernels need one"),
            (
                None in gpus or len(set(gpus)) == len(gpus),
                "two ranks of the group share one GPU; give each rank its own (torch.cuda.set_device)",
            ),
        )

    @abc.abstractmethod
    def limits(self, hidden: int, dtype: torch.dtype, world_size: int) -> Support:
        """Whether such calls can be served for some number of tokens."""

    @abc.abstractmethod
    def token_limit(self, variant: str, hidden: int, dtype: torch.dtype, world_size: int, max_tokens: int) -> range:
        """The numbers of tokens that a variant takes on a workspace for max_tokens."""

    def left_out(self, variant: str) -> str:
        """Why a variant serves no call on this machine, or nothing."""
        return ""

    @abc.abstractmethod
    def max_tokens(self, hidden: int, dtype: torch.dtype, world_size: int) -> int:
        """The largest workspace there can be, in tokens."""

    @abc.abstractmethod
    def nbytes(self, hidden: int, dtype: torch.dtype, world_size: int, max_tokens: int) -> int:
        """The GPU memory such a workspace takes on each rank, in bytes."""

    @abc.abstractmethod
    def create(self, request: Request, channel: Channel) -> Workspace:
        """Make the workspace with all ranks, over the channel alone: a rank that fails frees the others."""

    @abc.abstractmethod
    def prove(self, workspace: Workspace, stage: str) -> None:
        """Raise unless calls are right. Stage "alone": without other ranks; "together": a true collective."""

    @abc.abstractmethod
    def bind(self, workspace: Workspace, variant: str, output: int | None = None) -> Callable[..., Any]:
        """A function with native's parameters that computes a call in this way.

        Args:
            output: the workspace's output buffer in which the sum may be left; it stays valid until the next such
                call with that buffer. A provider that knows no such buffers returns memory of its own.
        """

    def ahead(self, workspace: Workspace) -> Sequence[Callable[[], object]]:
        """What compiles the kernels that calls will need, one piece each and alike on every rank; none launches."""
        return ()

    def bind_extended(
        self, workspace: Workspace, variant: str, op_name: str, args: tuple[Any, ...], output: int | None = None
    ) -> Callable[..., Any] | None:
        """A function with the parameters of an operator that extends native's (`dispatch/derived_ops.py`), which
        computes such calls whole; None if there is none. It follows from nothing but shapes and dtypes.

        Args:
            output: as in `bind`; of the sharded operator the norm may be left there.
        """
        return None


PROVIDERS: dict[str, WorkspaceProvider] = {}
# Output buffers of a workspace, where a graph asks for any: two, so that one can be read while the other is written.
OUTPUTS = 2


def device_facts(device: torch.device) -> dict[str, Any]:
    """Facts about a device that `WorkspaceProvider.judge` and the plan need from every rank."""
    facts: dict[str, Any] = {"host": host(), "gpu": device.type, "capability": None, "uuid": None}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts.update(gpu=properties.name, capability=[properties.major, properties.minor], uuid=str(properties.uuid))
    return facts
