"""Run test functions on several processes joined by a real process group, and never hang.

`RankPool` keeps its processes between calls, because importing torch and transformers and starting
a process cost more than most tests do. Each call gets a process group of its own, so that group
names, collective counters and half-finished collectives never leak from one test into the next;
after any failure the processes are killed and the next call starts fresh ones.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import importlib.util
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import pickle
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._inductor import config as inductor_config

from support.compiles import leave_out_measurements
from support.hosts import Host

DEFAULT_TIMEOUT_S = 180.0
# What every job needs anyway. The fork server imports it once and each rank is then forked in
# milliseconds.
_PRELOAD = (
    "torch",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.distributed.tensor",
    "transformers.modeling_utils",
    "fusewire",
    "support.preloaded",
)
_STACKS_GRACE_S = 1.0
_EXIT_GRACE_S = 5.0
_DEATH_GRACE_S = 0.3
# A graph that Dynamo captured keeps its process group alive (torch 2.13), and with it gloo's
# threads, which wake a hundred times a second each. After this many calls the processes are
# replaced.
_CALLS_PER_PROCESS = 16
_FIRST_PORT = 29500  # of the stores of ranks on several hosts, whose ports nobody else takes


class RankFailure(RuntimeError):
    """A rank failed: `rank` says which, `details` holds its own traceback as text.

    It is the `__cause__` of the exception that `RankPool.run` raises, or that exception itself
    where the rank's own could not travel between processes.
    """

    def __init__(self, rank: int, details: str) -> None:
        super().__init__(f"rank {rank} failed:\n{details}")
        self.rank = rank
        self.details = details

    def __reduce__(self) -> tuple[type[RankFailure], tuple[int, str]]:
        return type(self), (self.rank, self.details)


class RankTimeout(RuntimeError):
    """The ranks did not finish in time; the message holds the stack of each rank that was still
    running.
    """


@dataclass(frozen=True)
class _Job:
    """One call as a worker receives it; `call` stays pickled until `sys_path` is in force."""

    sys_path: list[str]
    call: bytes
    store: str
    backend: str
    timeout_s: float
    cache_dir: str | None


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    backend: str = "gloo",
    cache_dir: str | Path | None = None,
) -> list[Any]:
    """Call `fn(*args)` on `world_size` fresh processes and return what each rank returned, in rank
    order.

    `fn` must be importable by name in another process (a function at module level). It runs inside
    an initialised process group of `backend` over the loopback interface. `cache_dir` is Inductor's
    cache directory for the call (None leaves the environment's). Raises the first failing rank's
    exception, with a `RankFailure` that holds its traceback as the cause, or `RankTimeout` after
    `timeout_s` seconds; either way no process is left behind.
    """
    with RankPool(world_size, backend=backend) as pool:
        return pool.run(fn, *args, timeout_s=timeout_s, cache_dir=cache_dir)


class RankPool:
    """`world_size` processes kept between calls of `run`; see `run_ranks` for what a call does.

    Processes start at the first call, and anew after `_CALLS_PER_PROCESS` calls. Between calls a
    process drops its process group, Dynamo's state and Inductor's in-memory caches; modules that a
    test changed stay changed.

    With `hosts`, each has as many ranks, the first ranks on the first, and the ranks find each
    other by a TCPStore there.
    """

    def __init__(self, world_size: int, *, backend: str = "gloo", hosts: Sequence[Host] = ()) -> None:
        if world_size < 1:
            raise ValueError(f"world_size must be at least 1, got {world_size}")
        self.world_size = world_size
        self.backend = backend
        self.hosts = hosts
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        self._jobs = 0
        self._failed = False

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def run(
        self,
        fn: Callable[..., Any],
        *args: Any,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        cache_dir: str | Path | None = None,
        may_die: Sequence[int] = (),
    ) -> list[Any]:
        """Call `fn(*args)` on every rank; return the results in rank order.

        Ranks in `may_die` may end their process; their result is then None.
        """
        call = pickle.dumps((fn, args))
        cache = None if cache_dir is None else os.fspath(cache_dir)
        try:
            if self._jobs >= _CALLS_PER_PROCESS:
                self.close()
            if not self._processes:
                self._start()
            self._jobs += 1
            port = _FIRST_PORT + self._jobs
            store = f"{self.hosts[0].address}:{port}" if self.hosts else self._path(f"store{self._jobs}")
            self._send(_Job(list(sys.path), call, store, self.backend, timeout_s, cache))
            results = self._collect(timeout_s, may_die)
            self._send(None)
            if may_die:
                self._failed = True
                self.close()
            return results
        except BaseException:
            # Ranks that wait in a collective for the one that failed cannot be asked to stop.
            self._failed = True
            self.close()
            raise

    def close(self) -> None:
        """End the processes and whatever they started. Safe to call twice; `run` starts new ones."""
        if self._failed:
            for process in self._processes:
                _kill(process)
        # The end of its connection tells a worker that waits for a job to end by itself.
        for connection in self._connections:
            connection.close()
        deadline = time.monotonic() + _EXIT_GRACE_S
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            _kill(process)
            process.close()
        if self._directory is not None:
            self._directory.cleanup()
        self._processes, self._connections, self._directory, self._failed, self._jobs = [], [], None, False, 0

    def _start(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="fusewire-ranks-")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([name for name in _PRELOAD if _importable(name)])
        # The fork server does not take over sys.path (Python before 3.12).
        path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
        with mock.patch.dict(os.environ, PYTHONPATH=path):
            multiprocessing.forkserver.ensure_running()
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            host = self.hosts[rank * len(self.hosts) // self.world_size] if self.hosts else None
            args = (rank, self.world_size, theirs, self._path(f"stacks{rank}"), "nccl" in self.backend, host)
            process = context.Process(target=_worker, args=args, daemon=True, name=f"rank{rank}")
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def _path(self, name: str) -> str:
        assert self._directory is not None
        return os.path.join(self._directory.name, name)

    def _send(self, message: _Job | None) -> None:
        """Send a job, or None: every rank has answered, so the process group may go."""
        for connection in self._connections:
            # A rank that died is reported by `_collect`, with its exit code.
            with contextlib.suppress(BrokenPipeError):
                connection.send(message)

    def _collect(self, timeout_s: float, may_die: Sequence[int]) -> list[Any]:
        deadline = time.monotonic() + timeout_s
        results: dict[int, Any] = {}
        while len(results) < self.world_size:
            waiting = [self._connections[r] for r in range(self.world_size) if r not in results]
            ready = multiprocessing.connection.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RankTimeout(self._describe_timeout(timeout_s, results))
            for connection in ready:
                rank = self._connections.index(connection)  # type: ignore[arg-type]
                results[rank] = self._receive(rank, rank in may_die)
        return [results[rank] for rank in range(self.world_size)]

    def _receive(self, rank: int, may_die: bool) -> Any:
        try:
            message = self._connections[rank].recv_bytes()
        except (EOFError, OSError):
            if may_die:
                return None
            raise self._death(rank) from None
        kind, payload, details = pickle.loads(message)
        if kind == "result":
            return pickle.loads(payload)
        # A rank that dies makes its peers fail: name the one that died.
        sentinels = {process.sentinel: number for number, process in enumerate(self._processes)}
        dead = multiprocessing.connection.wait(list(sentinels), timeout=_DEATH_GRACE_S)
        if dead:
            raise self._death(sentinels[dead[0]])  # type: ignore[index]
        cause = RankFailure(rank, details)
        if payload is None:
            raise cause
        raise pickle.loads(payload) from cause

    def _death(self, rank: int) -> RankFailure:
        self._processes[rank].join(_STACKS_GRACE_S)
        return RankFailure(rank, f"the process died with exit code {self._processes[rank].exitcode}")

    def _describe_timeout(self, timeout_s: float, results: dict[int, Any]) -> str:
        stuck = [rank for rank in range(self.world_size) if rank not in results]
        for rank in stuck:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._processes[rank].pid, signal.SIGUSR1)
        time.sleep(_STACKS_GRACE_S)
        parts = [f"rank(s) {stuck} of {self.world_size} did not finish within {timeout_s:g} s"]
        for rank in stuck:
            path = Path(self._path(f"stacks{rank}"))
            text = path.read_text() if path.exists() else ""
            parts.append(f"--- rank {rank}:\n{text or 'no stack could be read'}")
        return "\n".join(parts)


def _kill(process: Any) -> None:
    """Kill a rank and the compilers it started: each rank leads a process group of its own."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name.partition(".")[0]) is not None
    except ImportError:
        return False


def _worker(rank: int, world_size: int, connection: Connection, stacks: str, gpu: bool, host: Host | None) -> None:
    os.setpgid(0, 0)
    if host is not None:
        host.enter()  # while there is one thread
    _die_with_parent()
    with open(stacks, "w") as stacks_file:
        faulthandler.register(signal.SIGUSR1, file=stacks_file, all_threads=False)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
        os.environ["GLOO_SOCKET_IFNAME"] = _loopback() if host is None else host.interface
        if not gpu:
            # transformers puts a model on whatever accelerator it sees.
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        torch.set_num_threads(1)
        inductor_config.compile_threads = 1
        leave_out_measurements()
        with contextlib.suppress(EOFError):
            while True:
                _run_job(connection.recv(), connection, rank, world_size)


def _die_with_parent() -> None:
    """End this process when the test process goes away, also while it waits inside a collective."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def watch() -> None:
        multiprocessing.connection.wait([sentinel])
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def _loopback() -> str:
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in names if name in ("lo", "lo0")), names[0])


def _run_job(job: _Job, connection: Connection, rank: int, world_size: int) -> None:
    sys.path[:] = job.sys_path
    try:
        with _inductor_cache(job.cache_dir), _process_group(job, rank, world_size):
            connection.send_bytes(_answer(job))
            # The group's end would fail ranks that are still in a collective, and their errors
            # would hide the first one: stay until every rank has answered, or until this process is
            # killed.
            connection.recv()
    except EOFError:
        raise
    except BaseException as error:
        try:
            connection.send_bytes(_failure(error))
        except BrokenPipeError:
            raise EOFError from None


def _answer(job: _Job) -> bytes:
    try:
        fn, args = pickle.loads(job.call)
        return pickle.dumps(("result", pickle.dumps(fn(*args)), ""))
    except BaseException as error:
        return _failure(error)


def _failure(error: BaseException) -> bytes:
    """The exception and its traceback for the test process; the exception is left out if it cannot
    travel.
    """
    details = traceback.format_exc()
    try:
        payload = pickle.dumps(error)
        pickle.loads(payload)
    except Exception:
        return pickle.dumps(("error", None, details))
    return pickle.dumps(("error", payload, details))


@contextlib.contextmanager
def _inductor_cache(cache_dir: str | None) -> Iterator[None]:
    from torch._inductor.utils import clear_caches

    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    torch._dynamo.reset()
    clear_caches()
    if cache_dir is not None:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache_dir
    try:
        yield
    finally:
        torch._dynamo.reset()
        if before is None:
            os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
        else:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = before


@contextlib.contextmanager
def _process_group(job: _Job, rank: int, world_size: int) -> Iterator[None]:
    if "nccl" in job.backend:
        torch.cuda.set_device(rank)
    address, _, port = job.store.partition(":")
    if port:
        store = dist.TCPStore(address, int(port), world_size, is_master=rank == 0)
    else:
        store = dist.FileStore(job.store, world_size)  # type: ignore[attr-defined]
    dist.init_process_group(
        job.backend,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=job.timeout_s),
    )
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@contextlib.contextmanager
def fake_group(world_size: int, rank: int = 0) -> Iterator[dist.ProcessGroup]:
    """A process group that communicates with nobody, in this one process: for tests that look at
    graphs only.

    Its collectives return right shapes and wrong values. It is gone when the block ends. Raises
    RuntimeError where a process group exists already.
    """
    if dist.is_initialized():
        raise RuntimeError("a process group exists already: leave it before fake_group(...)")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        group = dist.group.WORLD
        assert group is not None
        yield group
    finally:
        torch._dynamo.reset()
        dist.destroy_process_group()


_SHARED: dict[tuple[int, str], RankPool] = {}


def shared_pool(world_size: int, backend: str = "gloo") -> RankPool:
    """The one pool of this size for the whole test process; it ends with the process."""
    if (world_size, backend) not in _SHARED:
        pool = _SHARED[world_size, backend] = RankPool(world_size, backend=backend)
        atexit.register(pool.close)
    return _SHARED[world_size, backend]


__all__: Sequence[str] = ("RankFailure", "RankPool", "RankTimeout", "fake_group", "run_ranks", "shared_pool")
