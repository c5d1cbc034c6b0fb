"""Watch the error words of all workspaces in a thread, so that faults are found without calls.

A kernel that gives up writes an error word in host memory. A call on its workspace reads the word
and raises, but replays of CUDA graphs run no code on the host. The thread reads the words
regularly. It decides nothing by the clock: it only reads what kernels wrote. A fault is reported
once: on stderr, to the handlers of `fusewire.on_fault`, and, if FUSEWIRE_ON_FAULT=abort, by the
end of the process.

The thread also looks whether the peers' processes still run. If one has ended, the workspace's
kernels need not wait for it until their limit.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from typing import Protocol

from fusewire.custom_ops.coordination.log import log_line
from fusewire.custom_ops.coordination.processes import Process
from fusewire.custom_ops.coordination.timeouts import Limit, limit_s
from fusewire.custom_ops.environment import env_choice
from fusewire.errors import FusewireError

ACTION_VARIABLE = "FUSEWIRE_ON_FAULT"
RAISE, ABORT = "raise", "abort"
Handler = Callable[[FusewireError], object]


def action() -> str:
    """Return what a fault does besides its report. ConfigError for other values."""
    return env_choice(ACTION_VARIABLE, (RAISE, ABORT))


class Watched(Protocol):
    """What can be watched."""

    def fault(self) -> FusewireError | None:
        """Return the error of a kernel that gave up, else None. Does not wait; thread-safe."""

    def lose(self, rank: int) -> None:
        """Learn that the process of a rank of the group has ended. Does not wait; thread-safe."""


class Watchdog:
    """The watched workspaces, the handlers, and the thread while there is something to watch.

    All methods are thread-safe.
    """

    def __init__(self) -> None:
        self._handlers: list[Handler] = []
        self.forget()

    def forget(self) -> None:
        """Watch nothing, without a thread: the state in a forked child, which has only its own."""
        self._lock = threading.Lock()
        self._watched: dict[Watched, dict[int, Process]] = {}  # with the peers that still run
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    def watch(self, workspace: Watched, peers: Mapping[int, Process] | None = None) -> None:
        """Look at a workspace, and at its peers' processes, until it is reported or closed."""
        with self._lock:
            self._watched[workspace] = dict(peers or {})
            if self._thread is None:
                self._stop = threading.Event()
                self._thread = threading.Thread(
                    target=self._run, args=(self._stop, limit_s(Limit.WATCHDOG_INTERVAL)), name="fusewire watchdog"
                )
                self._thread.daemon = True
                self._thread.start()

    def unwatch(self, workspace: Watched) -> None:
        """Look at a workspace for the last time; end the thread after the last workspace."""
        self._look(workspace)
        with self._lock:
            self._watched.pop(workspace, None)
            ended = None if self._watched else self._thread
            if ended is not None:
                self._thread = None
                self._stop.set()
        if ended is not None and ended is not threading.current_thread():
            ended.join()

    def on_fault(self, handler: Handler) -> Callable[[], None]:
        """Call a handler for each fault from now on; return a function that removes it."""
        with self._lock:
            self._handlers.append(handler)

        def remove() -> None:
            with self._lock:
                if handler in self._handlers:
                    self._handlers.remove(handler)

        return remove

    def _run(self, stop: threading.Event, interval_s: float) -> None:
        while not stop.wait(interval_s):
            for workspace, peers in list(self._watched.items()):
                self._look(workspace)
                self._look_for_ended(workspace, peers)

    @staticmethod
    def _look_for_ended(workspace: Watched, peers: dict[int, Process]) -> None:
        for rank in [rank for rank, process in peers.items() if process.ended]:
            del peers[rank]
            try:
                workspace.lose(rank)
            except Exception as problem:  # the device has failed
                log_line(f"rank {rank} has ended, and kernels wait for it until their limit: {problem}")

    def _look(self, workspace: Watched) -> None:
        """Report a workspace's fault, unless another thread has reported it."""
        error = workspace.fault()
        if error is None:
            return
        with self._lock:
            if workspace not in self._watched:
                return
            del self._watched[workspace]
            handlers = list(self._handlers)
        log_line(f"a fused call failed: {type(error).__name__}: {error}")
        for handler in handlers:
            try:
                handler(error)
            except Exception as problem:
                log_line(f"a handler of fusewire.on_fault raised {type(problem).__name__}: {problem}")
        if action() == ABORT:
            log_line(f"{ACTION_VARIABLE}={ABORT}: this process ends")
            os.abort()


WATCHDOG = Watchdog()
os.register_at_fork(after_in_child=WATCHDOG.forget)
