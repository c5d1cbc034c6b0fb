"""The workspaces of this process: symmetric buffers that the ranks of a group share.

Kernels that access peers' memory need the same buffers on every rank, and a kernel that waits for a
rank on another path waits for ever. So no rank decides alone: each step of making a workspace
(check the machine, check the memory, allocate, test with a known answer) ends in a vote of the
ranks. One "no" makes all ranks do without, for the same reason. The ranks communicate over the
store of their process group, never over the GPUs, and every wait is bounded.
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

from fusewire.custom_ops.coordination.processes import processes
from fusewire.custom_ops.coordination.timeouts import Limit, limit_s
from fusewire.custom_ops.coordination.vote import Channel, vote
from fusewire.custom_ops.coordination.watchdog import WATCHDOG, action
from fusewire.custom_ops.workspaces.capture import refuse_capture
from fusewire.custom_ops.workspaces.provider import Request, Workspace, WorkspaceKey, WorkspaceProvider
from fusewire.errors import PeerTimeoutError, WorkspaceError


@dataclass
class WorkspaceEntry:
    """An outcome that all ranks share: a workspace, or the reason why there is none."""

    key: WorkspaceKey
    group: weakref.ref[dist.ProcessGroup]
    workspace: Workspace | None = None
    refusal: str = ""
    facts: tuple[Mapping[str, Any], ...] = ()

    def serves(self, group: dist.ProcessGroup) -> bool:
        """Return whether the entry is for this very group; a later group may have its name."""
        return self.group() is group


@dataclass
class WorkspaceRegistry:
    """All workspaces of this process, and the failures that the ranks agreed on."""

    entries: dict[WorkspaceKey, WorkspaceEntry] = field(default_factory=dict)
    machines: dict[tuple[str, str], WorkspaceEntry] = field(default_factory=dict)
    # The agreed table (dispatch.table_vote.AgreedTable) by group name, hidden size and dtype.
    tables: dict[tuple[str, int, torch.dtype], Any] = field(default_factory=dict)
    # Workspaces without an entry, whose buffers captured CUDA graphs need.
    retired: list[Workspace] = field(default_factory=list)
    version: int = 0  # grows with every change that invalidates decisions stored elsewhere
    lock: threading.RLock = field(default_factory=threading.RLock)

    def changed(self) -> None:
        """Invalidate decisions that depend on the registry's earlier state. Thread-safe."""
        with self.lock:
            self.version += 1

    def machine(self, provider: WorkspaceProvider, group: dist.ProcessGroup, device: torch.device) -> WorkspaceEntry:
        """Return the votes on the ranks' machines, held once per provider and group. A collective.

        Raises:
            CaptureError: the ranks must still vote, and a CUDA graph is being captured.
            PeerTimeoutError: a rank did not vote.
        """
        name = group.group_name
        found = self.machines.get((provider.workspace_name, name))
        if found is not None and found.serves(group):
            return found
        refuse_capture(provider.workspace_name, f"group {name}")
        action(), limit_s(Limit.WATCHDOG_INTERVAL)  # raise before the ranks share anything
        with self.lock:
            found = self.machines.get((provider.workspace_name, name))
            if found is not None and found.serves(group):  # voted on by another thread meanwhile
                return found
            channel = Channel(group, f"{provider.workspace_name} group {name}")
            machine = functools.partial(provider.machine, group, device)
            result = vote(channel, "machine", machine, work_s=limit_s(Limit.MACHINE_CHECK))
            refusal, facts = result.reason, result.facts
            if not refusal:
                refusal = provider.validate(facts).reason
            if not refusal:
                load = functools.partial(provider.load, group)
                refusal = vote(channel, "load", load, work_s=limit_s(provider.load_limit)).reason
            key = WorkspaceKey(provider.workspace_name, name, torch.uint8, 0)
            entry = WorkspaceEntry(key, weakref.ref(group), None, refusal, facts)
            self.machines[provider.workspace_name, name] = entry
            return entry

    def open(
        self,
        provider: WorkspaceProvider,
        group: dist.ProcessGroup,
        dtype: torch.dtype,
        hidden: int,
        device: torch.device,
        tokens: Callable[[WorkspaceEntry], int],
        outputs: int = 0,
    ) -> WorkspaceEntry:
        """Return the workspace for a key, or why there is none. The first call is a collective.

        Args:
            tokens: returns the wanted number of tokens from the machines' entry; the ranks' minimum
                counts.
            outputs: the number of output buffers; the ranks' minimum counts.

        Raises:
            CaptureError, PeerTimeoutError: as `machine`.
        """
        key = WorkspaceKey(provider.workspace_name, group.group_name, dtype, hidden)
        found = self.entries.get(key)
        if found is not None and found.serves(group):
            return found
        refuse_capture(provider.workspace_name, str(key))
        with self.lock:
            found = self.entries.get(key)
            if found is not None and found.serves(group):  # made by another thread meanwhile
                return found
            self.drop(key)
            machine = self.machine(provider, group, device)
            entry = WorkspaceEntry(key, weakref.ref(group), None, machine.refusal, machine.facts)
            if not entry.refusal:
                self._make(entry, provider, group, device, tokens(machine), outputs)
            self.entries[key] = entry
            return entry

    def _make(
        self,
        entry: WorkspaceEntry,
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
            ranks = dist.get_process_group_ranks(group)
            peers = {ranks.index(rank): process for rank, process in processes(ranks).items()}
            WATCHDOG.watch(made[0], peers)
            return
        entry.refusal = result.reason
        for workspace in made:
            with contextlib.suppress(Exception):
                workspace.close()

    def forget(self, key: WorkspaceKey) -> None:
        """Forget a failure so that the ranks vote again. Thread-safe."""
        with self.lock:
            self.drop(key)
            self.machines.pop((key.provider, key.group_name), None)

    def refuse(self, entry: WorkspaceEntry, refusal: str) -> None:
        """Replace an entry's workspace by a refusal and free it. All ranks must call it."""
        self.drop(entry.key)
        entry.workspace, entry.refusal = None, refusal
        self.entries[entry.key] = entry

    def drop(self, key: WorkspaceKey, *, captured: bool = False) -> None:
        """Forget an entry and free its workspace, if there is one.

        A workspace that CUDA graphs have captured is freed only if `captured`; else it is retired.
        """
        entry = self.entries.pop(key, None)
        if entry is not None:
            self.changed()
            if entry.workspace is not None and entry.workspace.captured and not captured:
                entry.workspace.retire()
                self.retired.append(entry.workspace)
            elif entry.workspace is not None:
                entry.workspace.close()

    def made(self) -> list[Workspace]:
        """Return every workspace that has its buffers, retired ones too."""
        return [*(entry.workspace for entry in list(self.entries.values()) if entry.workspace), *self.retired]

    def close(self, group_name: str | None = None, *, captured: bool = False) -> None:
        """Free the workspaces (of one group) and forget failures. Idempotent.

        Args:
            captured: free also those that CUDA graphs have captured.

        Raises:
            WorkspaceError: CUDA graphs have captured one, and `captured` is false. All stay.
        """
        with self.lock:
            if not captured:
                self._check_uncaptured(group_name)
            for workspace in [made for made in self.retired if group_name in (None, made.key.group_name)]:
                self.retired.remove(workspace)
                workspace.close()
            for key in [k for k in self.entries if group_name in (None, k.group_name)]:
                self.drop(key, captured=captured)
            for pair in [p for p in self.machines if group_name in (None, p[1])]:
                del self.machines[pair]
            for voted in [v for v in self.tables if group_name in (None, v[0])]:
                del self.tables[voted]
            self.changed()

    def _check_uncaptured(self, group_name: str | None) -> None:
        found = [made.key for made in self.made() if made.captured and group_name in (None, made.key.group_name)]
        if found:
            raise WorkspaceError(
                "CUDA graphs have captured calls on these workspaces and would use freed memory: "
                f"{'; '.join(map(str, found))}. Delete the graphs, then call "
                "fusewire.close(captured=True) on every rank"
            )


REGISTRY = WorkspaceRegistry()
# Workspaces whose kernel never ends: freeing them would wait for it.
ABANDONED: list[Workspace] = []
_SPARE_BYTES = 64 << 20


def check_memory(nbytes: int, device: torch.device) -> None:
    """Raise WorkspaceError unless nbytes, and 64 MiB more, are free on the device."""
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    if free < nbytes + _SPARE_BYTES:
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
    if free < nbytes + _SPARE_BYTES:
        raise WorkspaceError(
            f"{device} has {free >> 20} MiB of {total >> 20} free and the workspace needs "
            f"{(nbytes >> 20) + 1}; leave it more memory (gpu_memory_utilization and the like), or "
            "ask fusewire.prepare for fewer tokens"
        )


@atexit.register
def _close_at_exit() -> None:
    with contextlib.suppress(Exception):  # a failed device cannot be waited for
        REGISTRY.close(captured=True)
