"""Workspaces: symmetric buffers that the ranks of a group make, prove and use together.

Kernels that read and write peers' memory need buffers that every rank has made alike, and a kernel that waits
for a rank which took another path waits for ever. So nothing here is decided by one rank: each step of making
a workspace (may this machine, is there room, allocate, prove with a call of known answer) ends in a vote of
the group's ranks, and one "no" makes all of them do without, with the same reason. The ranks talk over the
store that their process group was made with, never over the GPUs, and every wait ends.

A provider of a fused operator that needs such buffers subclasses `WorkspaceProvider` and is added to
`PROVIDERS`; fusewire.custom_ops.dispatch.dispatcher does the rest.
"""

from __future__ import annotations

import abc
import atexit
import contextlib
import functools
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from fusewire.custom_ops.coordination.rendezvous import host
from fusewire.custom_ops.coordination.store import log_line
from fusewire.custom_ops.coordination.timeouts import MACHINE_CHECK_S
from fusewire.custom_ops.coordination.vote import Channel, vote
from fusewire.custom_ops.ops.all_reduce_norm import resolve_group
from fusewire.custom_ops.ops.registry import Support
from fusewire.custom_ops.workspaces.stream_order import StreamOrder
from fusewire.errors import CaptureError, ConfigError, PeerTimeoutError, WorkspaceError

# --- Workspaces ---------------------------------------------------------------------------------------------


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


@dataclass
class Entry:
    """An outcome that all ranks share: a workspace, or the reason why there is none."""

    key: WorkspaceKey
    group: weakref.ref[dist.ProcessGroup]
    workspace: Workspace | None = None
    reason: str = ""
    facts: tuple[Mapping[str, Any], ...] = ()

    def serves(self, group: dist.ProcessGroup) -> bool:
        """Whether this outcome is about that very group (names come back after destroy_process_group)."""
        return self.group() is group


@dataclass
class WorkspaceRegistry:
    """All workspaces of this process, and the failures that the ranks agreed on."""

    entries: dict[WorkspaceKey, Entry] = field(default_factory=dict)
    machines: dict[tuple[str, str], Entry] = field(default_factory=dict)
    # dispatch.table_vote.Agreed by (group's name, hidden size, dtype): which tuned table the ranks go by.
    plans: dict[tuple[str, int, torch.dtype], Any] = field(default_factory=dict)
    version: int = 0  # grows when an entry goes: decisions cached elsewhere are void then
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def changed(self) -> None:
        """Make decisions void that follow from what the registry held before. Thread-safe."""
        with self._lock:
            self.version += 1

    def machine(self, provider: WorkspaceProvider, group: dist.ProcessGroup, device: torch.device) -> Entry:
        """The vote on whether the ranks' machines can serve at all: once per provider and group.

        Raises:
            CaptureError: there was no vote yet, and a CUDA graph is being captured.
            PeerTimeoutError: a rank did not vote.
        """
        name = group.group_name
        found = self.machines.get((provider.name, name))
        if found is not None and found.serves(group):
            return found
        refuse_capture(provider.name, f"group {name}")
        with self._lock:
            found = self.machines.get((provider.name, name))
            if found is not None and found.serves(group):  # voted on by another thread meanwhile
                return found
            channel = Channel(group, f"{provider.name} group {name}")
            verdict = vote(channel, "machine", lambda: provider.machine(group, device), work_s=provider.machine_s)
            judged = provider.judge(verdict.facts) if verdict.ok else Support(True)
            key = WorkspaceKey(provider.name, name, torch.uint8, 0)
            entry = Entry(key, weakref.ref(group), None, verdict.reason or judged.reason, verdict.facts)
            self.machines[provider.name, name] = entry
            return entry

    def open(
        self,
        provider: WorkspaceProvider,
        group: dist.ProcessGroup,
        dtype: torch.dtype,
        hidden: int,
        device: torch.device,
        tokens: Callable[[Entry], int],
        outputs: int = 0,
    ) -> Entry:
        """The workspace for a key, made by all ranks together at the first call, or why there is none.

        Args:
            tokens: says from the machines' entry for how many tokens to make it; the smallest of the ranks'
                counts.
            outputs: how many output buffers to make with it; the smallest of the ranks' numbers.

        Raises:
            CaptureError, PeerTimeoutError: as `machine`.
        """
        key = WorkspaceKey(provider.name, group.group_name, dtype, hidden)
        found = self.entries.get(key)
        if found is not None and found.serves(group):
            return found
        refuse_capture(provider.name, str(key))
        with self._lock:
            found = self.entries.get(key)
            if found is not None and found.serves(group):  # made by another thread meanwhile
                return found
            self._drop(key)
            machine = self.machine(provider, group, device)
            entry = Entry(key, weakref.ref(group), None, machine.reason, machine.facts)
            if not entry.reason:
                self._make(entry, provider, group, device, tokens(machine), outputs)
            self.entries[key] = entry
            return entry

    def _make(
        self,
        entry: Entry,
        provider: WorkspaceProvider,
        group: dist.ProcessGroup,
        device: torch.device,
        asked: int,
        outputs: int,
    ) -> None:
        key, channel = entry.key, Channel(group, str(entry.key))
        cap = provider.max_tokens(key.hidden, key.dtype, group.size())
        made: list[Workspace] = []

        def room() -> dict[str, int]:
            tokens = min(asked, cap)
            extra = outputs * tokens * key.hidden * key.dtype.itemsize
            check_memory(provider.nbytes(key.hidden, key.dtype, group.size(), tokens) + extra, device)
            return {"tokens": tokens, "outputs": outputs}

        def create() -> None:
            made.append(provider.create(Request(key, group, device, agreed, entry.facts, buffers), channel))

        verdict = vote(channel, "room", room)
        if verdict.ok:
            agreed = min(facts["tokens"] for facts in verdict.facts)
            buffers = min(facts["outputs"] for facts in verdict.facts)
            verdict = vote(channel, "create", create, work_s=channel.wait_s, release_peers=True)
        try:
            for stage in ("alone", "together"):
                if verdict.ok:
                    verdict = vote(channel, f"prove {stage}", functools.partial(provider.prove, made[0], stage))
        except PeerTimeoutError:
            _ABANDONED.extend(made)
            raise
        if verdict.ok:
            entry.workspace = made[0]
            return
        entry.reason = verdict.reason
        for workspace in made:
            with contextlib.suppress(Exception):
                workspace.close()

    def forget(self, key: WorkspaceKey) -> None:
        """Let the ranks vote again on a provider that failed: on the machines, and on this workspace. Thread-safe."""
        with self._lock:
            self._drop(key)
            self.machines.pop((key.provider, key.group_name), None)

    def _drop(self, key: WorkspaceKey) -> None:
        entry = self.entries.pop(key, None)
        if entry is not None:
            self.changed()
            if entry.workspace is not None:
                entry.workspace.close()

    def close(self, group_name: str | None = None) -> None:
        """Free the workspaces (of one group); failures are forgotten too. Idempotent."""
        with self._lock:
            for key in [k for k in self.entries if group_name in (None, k.group_name)]:
                self._drop(key)
            for pair in [p for p in self.machines if group_name in (None, p[1])]:
                del self.machines[pair]
            for voted in [v for v in self.plans if group_name in (None, v[0])]:
                del self.plans[voted]
            self.changed()


REGISTRY = WorkspaceRegistry()
# Workspaces with a kernel in them that never ends: freeing them would wait for it.
_ABANDONED: list[Workspace] = []


_PREPARE = "call fusewire.prepare(..., max_tokens=...) on every rank, or run the model once, before capture"


def refuse_capture(who: str, what: str, lacks: str = "has no workspace yet", remedy: str = _PREPARE) -> None:
    """Raise CaptureError if a CUDA graph is being captured on the current stream: ranks cannot vote meanwhile."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise CaptureError(f"{who} {lacks} ({what}), and ranks cannot vote while a CUDA graph is captured; {remedy}")


def check_memory(nbytes: int, device: torch.device, spare: int = 64 << 20) -> None:
    """Raise WorkspaceError unless so many bytes, and some to spare, are free on the device."""
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    if free < nbytes + spare:
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
    if free < nbytes + spare:
        raise WorkspaceError(
            f"{device} has {free >> 20} MiB of {total >> 20} free and the workspace needs {(nbytes >> 20) + 1}; leave it "
            "more memory (gpu_memory_utilization and the like), or ask fusewire.prepare for fewer tokens"
        )


@contextlib.contextmanager
def announced(
    text: str, *, after_s: float = 0.0, every_s: float = 30.0, detail: Callable[[], str] = str
) -> Iterator[None]:
    """Say on stderr that something long goes on, every so often, and how long it took.

    What ends within after_s seconds is not worth a word.
    """
    start, since, done, said = time.monotonic(), time.strftime("%H:%M:%S"), threading.Event(), after_s <= 0
    if said:
        log_line(f"{text}, since {since}{detail()}")

    def tick() -> None:
        nonlocal said
        while not done.wait(every_s if said else after_s):
            what = text.partition(":")[0] if said else text
            said = True
            log_line(f"{what}, since {since}, for {time.monotonic() - start:.0f} s{detail()}")

    ticker = threading.Thread(target=tick, name="fusewire progress", daemon=True)
    ticker.start()
    try:
        yield
    finally:
        done.set()
        ticker.join()
        if said:
            log_line(f"{text.partition(':')[0]}: ended after {time.monotonic() - start:.0f} s")


# --- For users ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WorkspaceInfo:
    """One workspace, or why there is none. `nbytes` is GPU memory on this rank.

    `plan` says whether a tuned table decides what it is used for, and which; empty: the shipped one.
    """

    provider: str
    group_name: str
    dtype: torch.dtype
    hidden: int
    max_tokens: int
    nbytes: int
    reason: str = ""
    plan: str = ""


def _info(entry: Entry) -> WorkspaceInfo:
    made, key = entry.workspace, entry.key
    agreed = REGISTRY.plans.get((key.group_name, key.hidden, key.dtype))
    size = (made.max_tokens, made.nbytes) if made else (0, 0)
    return WorkspaceInfo(*key, *size, entry.reason, agreed.text if agreed else "")


def workspaces() -> list[WorkspaceInfo]:
    """The workspaces of this process, and the failures to make one, with their sizes and reasons."""
    return [_info(entry) for entry in REGISTRY.entries.values()]


def prepare(
    group: dist.ProcessGroup | str | None,
    hidden: int,
    dtype: torch.dtype,
    *,
    max_tokens: int,
    tune: bool = False,
    output_in_place: bool = False,
) -> list[WorkspaceInfo]:
    """Make the workspaces for one hidden size ahead of the first call, and compile what calls will need. A collective:
    every rank calls it alike.

    Needed before capturing a CUDA graph by hand, and to choose the size: a workspace made at the first call
    is sized by the plan for this GPU. What failed before is tried again.

    Args:
        group: the process group or its name; None means the default group.
        hidden: the hidden size, in elements.
        dtype: of the activations.
        max_tokens: the largest number of tokens (rows) of a call to serve; at most what the provider can
            hold.
        tune: if there is no tuned table for this machine, measure one now (under a minute) and keep it on disk;
            FUSEWIRE_TUNE=1 asks for the same. All ranks must ask, else nobody measures.
        output_in_place: make the output buffers that PassConfig.output_in_place needs, too: two more of max_tokens rows.

    Returns:
        For each provider that keeps workspaces, its size on this rank, or the reason why there is none.

    Raises:
        WorkspaceError: there is a smaller one already; growing it would break CUDA graphs captured with it.
        ProcessGroupError: there is no such group.
        PeerTimeoutError: a rank did not take part in time.
    """
    counts = all(isinstance(number, int) and not isinstance(number, bool) for number in (hidden, max_tokens))
    if not counts or not isinstance(dtype, torch.dtype):
        raise ConfigError(
            f"prepare(hidden={hidden!r}, dtype={dtype!r}, max_tokens={max_tokens!r}): hidden and max_tokens are whole "
            "numbers, dtype a torch.dtype"
        )
    if max_tokens < 1 or hidden < 1:
        raise ConfigError(f"prepare(hidden={hidden}, max_tokens={max_tokens}): both must be at least 1")
    from fusewire.custom_ops.api import load_providers

    load_providers()
    found = dist.group.WORLD if group is None and dist.is_initialized() else group
    pg = found if isinstance(found, dist.ProcessGroup) else resolve_group(found or "the default group")
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    outputs = OUTPUTS if output_in_place else 0
    if any(provider.limits(hidden, dtype, pg.size()) for provider in PROVIDERS.values()):
        from fusewire.custom_ops.dispatch.table_vote import tuned_plan

        # Before the workspaces are made: the tuner makes larger ones for itself.
        tuned_plan(pg, hidden, dtype, device, tune=tune, fresh=True, max_tokens=max_tokens)
    return [_prepare_one(provider, pg, hidden, dtype, device, max_tokens, outputs) for provider in PROVIDERS.values()]


def _prepare_one(
    provider: WorkspaceProvider,
    group: dist.ProcessGroup,
    hidden: int,
    dtype: torch.dtype,
    device: torch.device,
    max_tokens: int,
    outputs: int,
) -> WorkspaceInfo:
    key = WorkspaceKey(provider.name, group.group_name, dtype, hidden)
    static = provider.limits(hidden, dtype, group.size())
    if not static:
        return WorkspaceInfo(*key, 0, 0, static.reason)
    wanted = min(max_tokens, provider.max_tokens(hidden, dtype, group.size()))
    existing = REGISTRY.entries.get(key)
    if existing is not None and existing.serves(group):
        if existing.workspace is None:
            REGISTRY.forget(key)
        elif existing.workspace.max_tokens < wanted:
            raise WorkspaceError(
                f"the workspace ({key}) holds {existing.workspace.max_tokens} tokens, {wanted} are asked for; "
                "fusewire.close() it first on every rank (CUDA graphs captured with it become invalid)"
            )
    from fusewire.custom_ops.workspaces.precompile import compile_ahead

    entry = REGISTRY.open(provider, group, dtype, hidden, device, lambda machine: wanted, outputs)
    compile_ahead(provider, entry, group)
    REGISTRY.changed()  # calls that went elsewhere for want of a workspace are decided again
    return _info(entry)


def close(group: dist.ProcessGroup | str | None = None) -> None:
    """Free all workspaces, or those of one group. Idempotent; runs at exit by itself. Every rank calls it alike.

    CUDA graphs captured with a workspace must not be replayed afterwards. The next call makes a new workspace.
    """
    REGISTRY.close(group.group_name if isinstance(group, dist.ProcessGroup) else group)


@atexit.register
def _close_at_exit() -> None:
    with contextlib.suppress(Exception):  # a device that failed cannot be waited for, and says so elsewhere
        REGISTRY.close()
