"""The workspaces of this process: symmetric buffers that the ranks of a group make, test and use
together.

Kernels that read and write peers' memory need buffers that every rank has made alike, and a kernel
that waits for a rank which took another path waits for ever. So nothing here is decided by one
rank: each step of making a workspace (may this machine, is there room, allocate, test with a call
of known answer) ends in a vote of the group's ranks, and one "no" makes all of them do without,
with the same reason. The ranks talk over the store that their process group was made with, never
over the GPUs, and every wait ends.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from fusewire.custom_ops.coordination.vote import Channel, vote
from fusewire.custom_ops.ops.registry import YES
from fusewire.custom_ops.workspaces.capture import refuse_capture
from fusewire.custom_ops.workspaces.provider import Request, Workspace, WorkspaceKey, WorkspaceProvider
from fusewire.errors import PeerTimeoutError, WorkspaceError


@dataclass
class Entry:
    """An outcome that all ranks share: a workspace, or the reason why there is none."""

    key: WorkspaceKey
    group: weakref.ref[dist.ProcessGroup]
    workspace: Workspace | None = None
    refusal: str = ""
    facts: tuple[Mapping[str, Any], ...] = ()

    def serves(self, group: dist.ProcessGroup) -> bool:
        """Return whether this is about that very group: names come back with new groups."""
        return self.group() is group


@dataclass
class WorkspaceRegistry:
    """All workspaces of this process, and the failures that the ranks agreed on."""

    entries: dict[WorkspaceKey, Entry] = field(default_factory=dict)
    machines: dict[tuple[str, str], Entry] = field(default_factory=dict)
    # dispatch.table_vote.AgreedTable by (group's name, hidden size, dtype): which tuned table the
    # ranks go by.
    tables: dict[tuple[str, int, torch.dtype], Any] = field(default_factory=dict)
    version: int = 0  # grows when an entry goes: decisions cached elsewhere are void then
    lock: threading.RLock = field(default_factory=threading.RLock)

    def changed(self) -> None:
        """Make decisions void that follow from what the registry held before. Thread-safe."""
        with self.lock:
            self.version += 1

    def machine(self, provider: WorkspaceProvider, group: dist.ProcessGroup, device: torch.device) -> Entry:
        """Return the outcome of the vote on whether the ranks' machines can serve: once per
        provider and group.

        Raises:
            CaptureError: there was no vote yet, and a CUDA graph is being captured.
            PeerTimeoutError: a rank did not vote.
        """
        name = group.group_name
        found = self.machines.get((provider.name, name))
        if found is not None and found.serves(group):
            return found
        refuse_capture(provider.name, f"group {name}")
        with self.lock:
            found = self.machines.get((provider.name, name))
            if found is not None and found.serves(group):  # voted on by another thread meanwhile
                return found
            channel = Channel(group, f"{provider.name} group {name}")
            result = vote(channel, "machine", lambda: provider.machine(group, device), work_s=provider.machine_s)
            support = provider.validate(result.facts) if result.ok else YES
            key = WorkspaceKey(provider.name, name, torch.uint8, 0)
            entry = Entry(key, weakref.ref(group), None, result.reason or support.reason, result.facts)
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
        """Return the workspace for a key, made by all ranks together at the first call, or why
        there is none.

        Args:
            tokens: says from the machines' entry for how many tokens to make it; the smallest of
                the ranks' counts.
            outputs: how many output buffers to make with it; the smallest of the ranks' numbers.

        Raises:
            CaptureError, PeerTimeoutError: as `machine`.
        """
        key = WorkspaceKey(provider.name, group.group_name, dtype, hidden)
        found = self.entries.get(key)
        if found is not None and found.serves(group):
            return found
        refuse_capture(provider.name, str(key))
        with self.lock:
            found = self.entries.get(key)
            if found is not None and found.serves(group):  # made by another thread meanwhile
                return found
            self.drop(key)
            machine = self.machine(provider, group, device)
            entry = Entry(key, weakref.ref(group), None, machine.refusal, machine.facts)
            if not entry.refusal:
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

        def capacity() -> dict[str, int]:
            tokens = min(asked, cap)
            extra = outputs * tokens * key.hidden * key.dtype.itemsize
            check_memory(provider.nbytes(key.hidden, key.dtype, group.size(), tokens) + extra, device)
            return {"tokens": tokens, "outputs": outputs}

        def create() -> None:
            made.append(provider.create(Request(key, group, device, agreed, entry.facts, buffers), channel))

        result = vote(channel, "capacity", capacity)
        if result.ok:
            agreed = min(facts["tokens"] for facts in result.facts)
            buffers = min(facts["outputs"] for facts in result.facts)
            result = vote(channel, "create", create, work_s=channel.wait_s, release_peers=True)
        try:
            for stage in ("alone", "together"):
                if result.ok:
                    result = vote(channel, f"self-test {stage}", functools.partial(provider.self_test, made[0], stage))
        except PeerTimeoutError:
            ABANDONED.extend(made)
            raise
        if result.ok:
            entry.workspace = made[0]
            return
        entry.refusal = result.reason
        for workspace in made:
            with contextlib.suppress(Exception):
                workspace.close()

    def forget(self, key: WorkspaceKey) -> None:
        """Let the ranks vote again on a provider that failed. Thread-safe."""
        with self.lock:
            self.drop(key)
            self.machines.pop((key.provider, key.group_name), None)

    def refuse(self, entry: Entry, refusal: str) -> None:
        """Free an entry's workspace and keep the refusal in its place. Every rank calls it alike."""
        self.drop(entry.key)
        entry.workspace, entry.refusal = None, refusal
        self.entries[entry.key] = entry

    def drop(self, key: WorkspaceKey) -> None:
        """Forget an entry and free its workspace, if there is one."""
        entry = self.entries.pop(key, None)
        if entry is not None:
            self.changed()
            if entry.workspace is not None:
                entry.workspace.close()

    def close(self, group_name: str | None = None) -> None:
        """Free the workspaces (of one group); failures are forgotten too. Idempotent."""
        with self.lock:
            for key in [k for k in self.entries if group_name in (None, k.group_name)]:
                self.drop(key)
            for pair in [p for p in self.machines if group_name in (None, p[1])]:
                del self.machines[pair]
            for voted in [v for v in self.tables if group_name in (None, v[0])]:
                del self.tables[voted]
            self.changed()


REGISTRY = WorkspaceRegistry()
# Workspaces with a kernel in them that never ends: freeing them would wait for it.
ABANDONED: list[Workspace] = []


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


@atexit.register
def _close_at_exit() -> None:
    with contextlib.suppress(Exception):  # a device that failed cannot be waited for, and says so elsewhere
        REGISTRY.close()
