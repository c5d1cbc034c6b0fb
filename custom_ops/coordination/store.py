"""The key-value store of a process group, and the one loop that waits for something in it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from fusewire.custom_ops._torch_private import store_of
from fusewire.custom_ops.coordination.log import log_line
from fusewire.custom_ops.coordination.timeouts import ANNOUNCE_AFTER_S
from fusewire.errors import ProcessGroupError

T = TypeVar("T")
_PREFIX = "fusewire/"
_NO_VALUE = "no value"  # never written
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.0005, 0.05


class GroupStore:
    """The store that a process group was made with, under keys of fusewire's own.

    Thread-safe as far as torch's stores are. Nothing in here waits.

    Raises:
        ProcessGroupError: torch.distributed has not made the group itself and knows no store of it.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        try:
            self._store = store_of(group)
        except KeyError:
            raise ProcessGroupError(
                f"the ranks of group {group.group_name!r} have no store in which they could compare what they run; "
                "make the group with torch.distributed (init_process_group, new_group, split_group)"
            ) from None

    def set(self, key: str, value: str) -> None:
        """Write a value over whatever is there."""
        self._store.set(_PREFIX + key, value)

    def get(self, key: str) -> str | None:
        """Return the value of a key; None if there is none."""
        # A store's own get waits for a key, also for one that is removed between a check and the
        # get.
        value = self._store.compare_set(_PREFIX + key, _NO_VALUE, _NO_VALUE).decode()
        return None if value == _NO_VALUE else value

    def set_once(self, key: str, value: str) -> str:
        """Write a value unless there is one, atomically; the value that is there afterwards."""
        return self._store.compare_set(_PREFIX + key, "", value).decode()

    def replace(self, key: str, old: str, new: str) -> bool:
        """Write `new` over a key that holds `old`, atomically; return whether it did."""
        return self._store.compare_set(_PREFIX + key, old, new).decode() == new

    def delete(self, key: str) -> None:
        """Remove a key. Harmless if it is not there."""
        self._store.delete_key(_PREFIX + key)


def poll(
    look: Callable[[], T | None],
    limit_s: float,
    *,
    waiting_for: Callable[[], str] | None = None,
    progress: Callable[[], object] | None = None,
    spin_s: float = 0.0,
) -> T | None:
    """Call `look` until it returns something.

    Args:
        look: returns None as long as the wait goes on. What it raises ends the wait.
        limit_s: how long to wait, in seconds.
        waiting_for: says in words what is waited for; logged once if it takes long.
        progress: the limit begins anew whenever this returns something else than before.
        spin_s: look without a pause for so long, in seconds, where a look costs less than a
            microsecond.

    Returns:
        What `look` returned, or None if the limit has passed.
    """
    start = changed = next_progress = time.monotonic()
    last = progress() if progress is not None else None
    pause, announced = _SHORTEST_PAUSE_S, waiting_for is None
    while (found := look()) is None:
        now = time.monotonic()
        if progress is not None and now >= next_progress:
            next_progress = now + min(2.0, limit_s / 4)
            if (seen := progress()) != last:
                last, changed = seen, now
        if now - changed > limit_s:
            return look()
        if not announced and now - start > ANNOUNCE_AFTER_S:
            announced = True
            log_line(f"waiting for {waiting_for()}, at most {limit_s:.0f} s")  # type: ignore[misc]
        if now - start < spin_s:
            os.sched_yield()
            continue
        time.sleep(pause)
        pause = min(pause * 1.5, _LONGEST_PAUSE_S)
    return found
