"""Messages in the store that a rank is busy, for example compiling, and not dead.

A rank that waits for others restarts its time limit with each message of a rank that it waits for.
So the limits of votes and agreements count silence, and a rank that compiles for long is no error.
A rank sends no message while it waits itself, and none after `Limit.COMPILATION`: ranks that wait
for each other all reach their limits. The messages lie in the default group's store.
"""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch.distributed as dist

from fusewire.custom_ops.coordination.processes import announce, ended
from fusewire.custom_ops.coordination.store import GroupStore, default_store, poll
from fusewire.custom_ops.coordination.timeouts import Limit, limit_s

T = TypeVar("T")
_lock = threading.Lock()
_blocks = _waits = 0  # `busy` blocks of all threads, and those whose thread waits
_own = threading.local()  # blocks: of this thread
_stop = threading.Event()
_thread: threading.Thread | None = None


@contextlib.contextmanager
def busy() -> Iterator[None]:
    """Say regularly, until the block ends, that this rank is busy. Thread-safe; blocks may nest."""
    _enter()
    _own.blocks = getattr(_own, "blocks", 0) + 1
    try:
        yield
    finally:
        _own.blocks -= 1
        _leave()


def poll_ranks(
    ranks: Callable[[], Sequence[int]],
    look: Callable[[], T | None],
    timeout_s: float,
    *,
    needed: Callable[[], Sequence[int]] | None = None,
    waiting_for: Callable[[], str] | None = None,
    spin_s: float = 0.0,
) -> T | None:
    """Poll with a time limit that messages of busy ranks restart.

    The wait ends early if a rank that it needs has ended: what such a rank has not published by
    then, it never will.

    Args:
        ranks: returns the global ranks whose messages restart the limit.
        needed: returns the global ranks without which the wait is in vain; by default `ranks`.

    The others and the result are those of `fusewire.custom_ops.coordination.store.poll`.
    """
    global _waits
    blocks, asked = getattr(_own, "blocks", 0), False

    def progress() -> list[str | None]:
        nonlocal asked
        store = default_store()
        if store is None:
            return []
        announce(store)
        if asked and ended((needed or ranks)()):  # not at once: most waits are short
            raise _EndedError
        asked = True
        return [store.get(_key(rank)) for rank in ranks()]

    with _lock:
        _waits += blocks
    try:
        return poll(look, timeout_s, waiting_for=waiting_for, progress=progress, spin_s=spin_s)
    except _EndedError:
        return look()
    finally:
        with _lock:
            _waits -= blocks


class _EndedError(Exception):
    """A needed rank's process has ended."""


def _enter() -> None:
    global _blocks, _stop, _thread
    with _lock:
        _blocks += 1
        store = default_store() if _thread is None else None
        if store is not None:
            _stop = threading.Event()
            arguments = (store, _key(dist.get_rank()), _stop)
            _thread = threading.Thread(target=_send, args=arguments, name="fusewire busy", daemon=True)
            _thread.start()


def _leave() -> None:
    global _blocks, _thread
    with _lock:
        _blocks -= 1
        ended = None if _blocks else _thread
        if ended is not None:
            _stop.set()
            _thread = None
    if ended is not None:
        ended.join()


def _send(store: GroupStore, key: str, stop: threading.Event) -> None:
    interval_s, end, sent = limit_s(Limit.BUSY_INTERVAL), time.monotonic() + limit_s(Limit.COMPILATION), False
    with contextlib.suppress(Exception):  # the store is gone, and with it whoever would read
        announce(store)
        while not stop.wait(interval_s) and time.monotonic() < end:
            if _waits < _blocks:
                store.set(key, uuid.uuid4().hex)
                sent = True
        if sent:
            store.delete(key)


def _key(rank: int) -> str:
    return f"busy/{rank}"
