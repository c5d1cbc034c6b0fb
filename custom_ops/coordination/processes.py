"""Find out whether the process of another rank has ended, so that nobody waits for it in vain.

A rank announces its process in the default group's store. Ranks on the same host look for it among
the host's processes. That a process has ended is a fact, not a matter of time: it publishes and
sends nothing more. Processes of other hosts, of other users, or that were not announced count as
running.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch.distributed as dist

from fusewire.custom_ops.coordination.store import GroupStore, default_store


class Process(NamedTuple):
    """A process of this host. A later process with the same id has another `start`."""

    pid: int
    start: str

    @property
    def ended(self) -> bool:
        """Whether it has ended, also if its parent has not asked for its exit status yet."""
        found = _state_and_start(str(self.pid))
        return found is None or found[1] != self.start or found[0] in "ZX"


def host() -> str:
    """Return an identifier of the processes that can share memory with this one.

    It is the machine's boot id and the number space of process ids. Containers of one machine
    differ: peers open each other's memory by process ids, which mean another process there.
    """
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return socket.gethostname()


def announce(store: GroupStore) -> None:
    """Announce this rank's process in the default group's store, once. Thread-safe.

    Raises:
        PeerTimeoutError: the store is gone.
    """
    known = _Known.of_default_group()
    if known is None or known.announced:
        return
    own = _state_and_start("self")
    if own is not None:
        store.set(_key(dist.get_rank()), f"{os.getpid()} {own[1]} {_sight()}")
    known.announced = True


def processes(ranks: Sequence[int]) -> dict[int, Process]:
    """Return the announced processes of ranks on this host, by the ranks' global numbers.

    Thread-safe. Reads each announcement once.

    Raises:
        PeerTimeoutError: the store is gone.
    """
    known, store = _Known.of_default_group(), default_store()
    if known is None or store is None:
        return {}
    for rank in ranks:
        text = None if rank in known.found else store.get(_key(rank))
        if text is not None:
            pid, start, sight = text.split(" ", 2)
            known.found[rank] = Process(int(pid), start) if sight == _sight() else None
    return {rank: found for rank in ranks if (found := known.found.get(rank)) is not None}


def ended(ranks: Sequence[int]) -> list[int]:
    """Return those of some ranks whose processes have ended. Thread-safe.

    Raises:
        PeerTimeoutError: the store is gone.
    """
    return [rank for rank, process in processes(ranks).items() if process.ended]


def how_long(ranks: Sequence[int], waited_s: float) -> str:
    """Return for an error message how long ranks were waited for, or which of them have ended."""
    gone: list[int] = []
    with contextlib.suppress(Exception):  # the store is gone: not what the message is about
        gone = ended(ranks)
    if not gone:
        return f"within {waited_s:.0f} s"
    listed = ", ".join(map(str, gone))
    return f"(rank{'s' * (len(gone) > 1)} {listed}: the process has ended)"


class _Known:
    """What this rank has announced and read of the processes of one default group."""

    last: _Known | None = None
    lock = threading.Lock()

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.pid = weakref.ref(group), os.getpid()
        self.announced = False
        self.found: dict[int, Process | None] = {}  # None: on another host

    @classmethod
    def of_default_group(cls) -> _Known | None:
        group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
        if group is None:
            return None
        with cls.lock:
            if cls.last is None or cls.last.group() is not group or cls.last.pid != os.getpid():
                cls.last = cls(group)
            return cls.last


def _sight() -> str:
    """Return an identifier of the processes that this one can look up."""
    return f"{os.getuid()} {host()}"


def _state_and_start(name: str) -> tuple[str, str] | None:
    """Return a process's state and its start in ticks since the boot; None if there is none."""
    try:
        with open(f"/proc/{name}/stat") as file:
            fields = file.read().rpartition(")")[2].split()  # the name before may contain anything
    except OSError:
        return None
    return fields[0], fields[19]


def _key(rank: int) -> str:
    return f"process/{rank}"
