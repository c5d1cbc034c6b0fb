"""The interface of providers that need workspaces, and of workspaces.

A provider of a fused operator that needs symmetric buffers subclasses `WorkspaceProvider` and is
added to `PROVIDERS`; the dispatcher then uses it.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from fusewire.custom_ops.coordination.processes import host
from fusewire.custom_ops.coordination.timeouts import Limit
from fusewire.custom_ops.coordination.vote import Channel
from fusewire.custom_ops.coordination.watchdog import WATCHDOG
from fusewire.custom_ops.ops.registry import Support
from fusewire.custom_ops.workspaces.capture import graph_is_temporary
from fusewire.custom_ops.workspaces.stream_order import StreamOrder
from fusewire.errors import FusewireError, WorkspaceError


class WorkspaceKey(NamedTuple):
    """The purpose of a workspace; there is at most one workspace per key."""

    provider: str
    group_name: str
    dtype: torch.dtype
    hidden: int

    def __str__(self) -> str:
        return f"{self.provider} group {self.group_name} {self.dtype} hidden {self.hidden}"


class Workspace(abc.ABC):
    """Buffers of one provider for one key, on one device. Subclasses free them in `release`.

    Attributes:
        closed: whether calls are refused.
        released: whether the buffers are freed.
        captured: whether a CUDA graph of the program has captured a call, and so needs the buffers.
    """

    def __init__(self, key: WorkspaceKey, max_tokens: int, nbytes: int, device: torch.device) -> None:
        self.key = key
        self.max_tokens = max_tokens
        self.nbytes = nbytes
        self.device = device
        self.order = StreamOrder.of(device)
        self.closed = self.captured = self.released = False

    def check_call(self, tokens: int, device: torch.device) -> None:
        """Raise WorkspaceError if a call does not fit.

        Call it with `order.lock` held until the launch, so that no other thread closes the
        workspace in between.
        """
        if self.closed:
            raise WorkspaceError(f"the workspace ({self.key}) is closed; call fusewire.prepare(...) to make a new one")
        if tokens > self.max_tokens:
            raise WorkspaceError(
                f"{tokens} tokens do not fit the workspace ({self.key}), made for "
                f"{self.max_tokens}; close it with fusewire.close() and call fusewire.prepare(..., "
                f"max_tokens={tokens})"
            )
        if device != self.device:
            raise WorkspaceError(
                f"the input is on {device} but the workspace ({self.key}) is on {self.device}; "
                "call torch.cuda.set_device before the first call or fusewire.prepare"
            )

    def fault(self) -> FusewireError | None:
        """Return the error of an earlier call, else None. Does not wait; thread-safe."""
        return None

    def lose(self, rank: int) -> None:  # noqa: B027
        """Learn that the process of a rank of the group has ended. Does not wait; thread-safe.

        A process may end because its program is done, so this is no fault.
        """

    def enter(self, device_index: int) -> None:
        """Order the next launch after earlier calls; `order.lock` must be held until the launch."""
        if self.order.enter(device_index) and not graph_is_temporary():
            self.captured = True

    def retire(self) -> None:
        """Refuse calls from now on and keep the buffers, for the CUDA graphs that need them."""
        with self.order.lock:
            self.closed = True

    def close(self) -> None:
        """Wait for the device and free the buffers. Idempotent. Invalidates captured CUDA graphs.

        Thread-safe: a concurrent call is either launched before and waited for, or finds the
        workspace closed.
        """
        with self.order.lock:
            if self.released:
                return
            self.closed = self.released = True
        try:
            if self.device.type == "cuda" and torch.cuda.is_initialized():
                torch.cuda.synchronize(self.device)
        finally:
            WATCHDOG.unwatch(self)
        self.release()

    @abc.abstractmethod
    def release(self) -> None: ...


@dataclass(frozen=True)
class Request:
    """The properties of a workspace to make. `max_tokens` is already the same on every rank."""

    key: WorkspaceKey
    group: dist.ProcessGroup
    device: torch.device
    max_tokens: int
    facts: tuple[Mapping[str, Any], ...] = ()
    # Buffers of (max_tokens, hidden) for results without a copy, if the provider supports them.
    outputs: int = 0


class WorkspaceProvider(abc.ABC):
    """A provider that needs workspaces. Only `create` and `self_test` communicate."""

    name: str
    # The kernels that it chooses among, named as in cost models ("flashinfer/oneshot", ...).
    variants: tuple[str, ...]
    # The limit of `load`, including compilation.
    load_limit = Limit.MACHINE_CHECK

    @abc.abstractmethod
    def machine(self, group: dist.ProcessGroup, device: torch.device) -> Mapping[str, Any]:
        """Return facts about this rank's machine (JSON types), or raise if it cannot serve.

        Compiles nothing: the machines may not fit together.
        """

    def validate(self, facts: Sequence[Mapping[str, Any]]) -> Support:
        """Return whether all ranks' facts fit together. Pure, so that every rank agrees."""
        hosts, gpus = {fact.get("host") for fact in facts}, [fact.get("uuid") for fact in facts]
        return Support.all_of(
            (
                len(hosts) == 1,
                f"the group's ranks are on {len(hosts)} hosts, or in as many containers; peer-to-peer kernels need one",
            ),
            (
                None in gpus or len(set(gpus)) == len(gpus),
                "two ranks of the group share one GPU; give each rank its own (torch.cuda.set_device)",
            ),
        )

    def load(self, group: dist.ProcessGroup) -> None:  # noqa: B027 - most have nothing to load
        """Load or compile what every call needs, once the ranks' machines fit together."""

    @abc.abstractmethod
    def limits(self, hidden: int, dtype: torch.dtype, world_size: int) -> Support:
        """Return whether such calls can be served for some number of tokens."""

    @abc.abstractmethod
    def token_limit(self, variant: str, hidden: int, dtype: torch.dtype, world_size: int, max_tokens: int) -> range:
        """Return the token counts that a variant takes on a workspace for max_tokens."""

    @property
    def workspace_name(self) -> str:
        """The name in the keys of its workspaces, which providers with one name share."""
        return self.name

    def refusal(self, workspace: Workspace) -> str:
        """Return why no call can be made on a workspace, or "". Its first call is a collective."""
        return ""

    def left_out(self, variant: str) -> str:
        """Return why a variant serves no call on this machine, or ""."""
        return ""

    @abc.abstractmethod
    def max_tokens(self, hidden: int, dtype: torch.dtype, world_size: int) -> int:
        """Return the largest possible workspace, in tokens."""

    @abc.abstractmethod
    def nbytes(self, hidden: int, dtype: torch.dtype, world_size: int, max_tokens: int) -> int:
        """Return the bytes of GPU memory of such a workspace on each rank."""

    @abc.abstractmethod
    def create(self, request: Request, channel: Channel) -> Workspace:
        """Make the workspace. A collective that communicates only over the channel."""

    @abc.abstractmethod
    def self_test(self, workspace: Workspace, stage: str) -> None:
        """Raise if calls are wrong. Stage "alone": on one rank; stage "together": a collective."""

    @abc.abstractmethod
    def bind(self, workspace: Workspace, variant: str, output: int | None = None) -> Callable[..., Any]:
        """Return a function with native's parameters that computes a call with this variant.

        Args:
            output: the workspace's output buffer that may receive the sum; it stays valid until the
                next such call with that buffer. Providers without such buffers return new memory.
        """

    def kernels_to_compile(self, workspace: Workspace) -> Sequence[Callable[[], object]]:
        """Return functions that each compile a kernel for later calls, the same on every rank."""
        return ()

    def bind_derived(
        self, workspace: Workspace, variant: str, op_name: str, args: tuple[Any, ...], output: int | None = None
    ) -> Callable[..., Any] | None:
        """Return a function that computes a derived op in one kernel, or None if there is none.

        It has the derived op's parameters. The result depends only on shapes and dtypes.

        Args:
            output: as in `bind`; the sharded operator may leave its norm there.
        """
        return None


PROVIDERS: dict[str, WorkspaceProvider] = {}
# Output buffers of a workspace if a graph needs any: one can be read while the other is written.
OUTPUTS = 2


def device_facts(device: torch.device) -> dict[str, Any]:
    """Return the facts about a rank's device for validation and tuned tables."""
    facts: dict[str, Any] = {"host": host(), "gpu": device.type, "capability": None, "uuid": None}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts.update(gpu=properties.name, capability=[properties.major, properties.minor], uuid=str(properties.uuid))
    return facts
