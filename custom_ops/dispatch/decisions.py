"""Keep the dispatcher's decisions until what they depend on changes."""

from __future__ import annotations

import threading
import weakref
from typing import Any, NamedTuple

import torch.distributed as dist

from fusewire.custom_ops.ops.registry import Provider
from fusewire.custom_ops.workspaces.provider import Workspace


class Decision(NamedTuple):
    """The provider of a call.

    Attributes:
        bound: name, workspace, variant and output buffer, where it works in a workspace.
        derived: what fusewire.custom_ops.dispatch.derived_ops made of it, by operator.
    """

    provider: Provider
    snapshot: tuple[tuple[str, Provider], ...]
    group: weakref.ref[dist.ProcessGroup] | None
    bound: tuple[str, Workspace, str, int | None] | None
    derived: dict[Any, Provider]


class Decisions:
    """Decisions by what they depend on, all made at one version of the workspaces' registry.
    Thread-safe.

    The version and its decisions are replaced together, as one tuple. So nobody finds a decision of
    another version, and what a slow thread decided by an old one is not taken for one of now.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._state: tuple[int, dict[Any, Decision]] = (0, {})

    def get(self, key: Any, version: int) -> Decision | None:
        """Return the decision kept under a key, if it was made at that version."""
        made_at, found = self._state
        return found.get(key) if made_at == version else None

    def keep(self, key: Any, decision: Decision, version: int) -> None:
        """Keep a decision made at that version, unless there are some of a later one."""
        with self._lock:
            made_at, found = self._state
            if made_at > version:
                return
            if made_at < version or len(found) >= self._capacity:
                found = {}
                self._state = (version, found)
            found[key] = decision
