"""Store the dispatcher's decisions until something that they depend on changes."""

from __future__ import annotations

import threading
import weakref
from typing import Any, NamedTuple

import torch.distributed as dist

from fusewire.custom_ops.dispatch.served import ServedCounter
from fusewire.custom_ops.ops.registry import Provider
from fusewire.custom_ops.workspaces.provider import Workspace


class Decision(NamedTuple):
    """The provider of a call.

    Attributes:
        bound: name, workspace, variant and output buffer, if it uses a workspace.
        derived: what `derived_ops` built from it, by operator: a provider and its calls' counter.
        served: the counter of the calls that it serves.
    """

    provider: Provider
    snapshot: tuple[tuple[str, Provider], ...]
    group: weakref.ref[dist.ProcessGroup] | None
    bound: tuple[str, Workspace, str, int | None] | None
    derived: dict[Any, tuple[Provider, ServedCounter]]
    served: ServedCounter


class Decisions:
    """Decisions by key, all made at one version of the workspace registry. Thread-safe.

    The version and its decisions are replaced together, as one tuple, so that no thread uses a
    decision of another version.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._state: tuple[int, dict[Any, Decision]] = (0, {})

    def get(self, key: Any, version: int) -> Decision | None:
        """Return the decision stored under a key if it was made at that version, else None."""
        made_at, found = self._state
        return found.get(key) if made_at == version else None

    def keep(self, key: Any, decision: Decision, version: int) -> None:
        """Store a decision made at that version, unless a later version's are stored."""
        with self._lock:
            made_at, found = self._state
            if made_at > version:
                return
            if made_at < version or len(found) >= self._capacity:
                found = {}
                self._state = (version, found)
            found[key] = decision
