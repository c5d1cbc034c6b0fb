"""The workspaces of this process: symmetric buffers that the ranks of a group make, test and use together.

Kernels that read and write peers' memory need buffers that every rank has made alike, and a kernel that waits for a
rank which took another path waits for ever. So nothing here is decided by one rank: each step of making a workspace
(may this machine, is there room, allocate, test with a call of known answer) ends in a vote of the group's ranks, and
one "no" makes all of them do without, with the same reason. The ranks talk over the store that their process group was
made with, never over the GPUs, and every wait ends.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from fusewire.custom_ops.coordination.store import log_line
from fusewire.custom_ops.coordination.vote import Channel, vote
from fusewire.custom_ops.ops.registry import Support
from fusewire.custom_ops.workspaces.provider import Request, Workspace, WorkspaceKey, WorkspaceProvider
from fusewire.errors import CaptureError, PeerTimeoutError, WorkspaceError


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
            ABANDONED.extend(made)
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
ABANDONED: list[Workspace] = []


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


@atexit.register
def _close_at_exit() -> None:
    with contextlib.suppress(Exception):  # a device that failed cannot be waited for, and says so elsewhere
        REGISTRY.close()
