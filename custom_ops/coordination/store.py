"""Access the key-value store of a process group, and poll it with a time limit."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from fusewire.custom_ops._torch_private import store_of
from fusewire.custom_ops.coordination.log import log_line
from fusewire.custom_ops.coordination.timeouts import Limit, limit_s
from fusewire.errors import PeerTimeoutError, ProcessGroupError

T = TypeVar("T")
_PREFIX = "fusewire/"
_NO_VALUE = "no value"  # never written
_UNSEEN = object()
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.0005, 0.05


class GroupStore:
    """The store of a process group, with a prefix for fusewire's keys.

    Thread-safe if torch's store is. No method waits for another rank.

    Raises:
        ProcessGroupError: torch.distributed did not make the group and knows no store of it.
        PeerTimeoutError: of every method: the process that serves the store has ended.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        try:
            self._store = store_of(group)
        except KeyError:
            raise ProcessGroupError(
                f"the ranks of group {group.group_name!r} have no store in which they could "
                "compare what they run; make the group with torch.distributed "
                "(init_process_group, new_group, split_group)"
            ) from None
        self._group_name = group.group_name

    def set(self, key: str, value: str) -> None:
        """Write a value, replacing any earlier one."""
        self._call(self._store.set, _PREFIX + key, value)

    def get(self, key: str) -> str | None:
        """Return the value of a key; None if there is none."""
        # The store's own get would wait for a missing key, even if it is removed just before.
        value = self._compare_set(key, _NO_VALUE, _NO_VALUE)
        return None if value == _NO_VALUE else value

    def set_once(self, key: str, value: str) -> str:
        """Write a value if there is none, atomically; return the value in the store afterwards."""
        return self._compare_set(key, "", value)

    def replace(self, key: str, old: str, new: str) -> bool:
        """Replace the value `old` by `new`, atomically; return whether the key had `old`."""
        return self._compare_set(key, old, new) == new

    def delete(self, key: str) -> None:
        """Remove a key if it exists."""
        self._call(self._store.delete_key, _PREFIX + key)

    def _compare_set(self, key: str, old: str, new: str) -> str:
        return self._call(self._store.compare_set, _PREFIX + key, old, new).decode()

    def _call(self, method: Callable[..., T], *args: str) -> T:
        try:
            return method(*args)
        except dist.DistError as error:
            raise PeerTimeoutError(
                f"the store of group {self._group_name!r}, in which its ranks compare what they "
                f"run, does not answer ({error}). The process that serves it (the first rank, or "
                "torchrun's agent on its host) has ended, or its host cannot be reached; restart "
                "all ranks"
            ) from error


def default_store() -> GroupStore | None:
    """Return the default group's store; None if there is none."""
    if not dist.is_available() or not dist.is_initialized() or dist.group.WORLD is None:
        return None
    try:
        return GroupStore(dist.group.WORLD)
    except ProcessGroupError:
        return None


def poll(
    look: Callable[[], T | None],
    timeout_s: float,
    *,
    waiting_for: Callable[[], str] | None = None,
    progress: Callable[[], object] | None = None,
    spin_s: float = 0.0,
) -> T | None:
    """Call `look` until it returns a value other than None.

    Args:
        look: returns None to continue. Its exceptions, and those of `progress`, end the wait.
        timeout_s: the time limit in seconds.
        waiting_for: returns a text that is logged once if the wait is long.
        progress: the time limit restarts when its return value changes.
        spin_s: poll without pauses for this many seconds, if a look takes less than a microsecond.

    Returns:
        What `look` returned, or None if the limit has passed.
    """
    start = changed = next_progress = time.monotonic()
    last: object = _UNSEEN
    pause, announced = _SHORTEST_PAUSE_S, waiting_for is None
    while (found := look()) is None:
        now = time.monotonic()
        if progress is not None and now >= next_progress:
            next_progress = now + min(2.0, timeout_s / 4)
            if (seen := progress()) != last:
                last, changed = seen, now if last is not _UNSEEN else changed
        if now - changed > timeout_s:
            return look()
        if now - start < spin_s:
            os.sched_yield()
            continue
        if not announced and now - start > limit_s(Limit.ANNOUNCEMENT):
            announced = True
            log_line(f"waiting for {waiting_for()}, at most {timeout_s:.0f} s")  # type: ignore[misc]
        time.sleep(pause)
        pause = min(pause * 1.5, _LONGEST_PAUSE_S)
    return found
