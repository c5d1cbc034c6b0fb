"""Time and check one call: timers, inputs, expected results and a progress bar."""

from __future__ import annotations

import abc
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusewire.custom_ops.coordination.log import log_line
from fusewire.custom_ops.coordination.timeouts import Limit, limit_s
from fusewire.custom_ops.ops.all_reduce_norm import sum_in_rank_order
from fusewire.custom_ops.ops.norms import SCALE_THEN_ROUND, NormSpec, add_residual, normalize
from fusewire.custom_ops.workspaces.capture import temporary_graph
from fusewire.errors import PeerTimeoutError, WorkspaceError

EPS = 1e-6
ROWS_AT_ONCE = 1024
# Bytes of a copy that measures a link; smaller copies do not reach its full speed.
_LEAST_COPY_BYTES, _MOST_COPY_BYTES = 4 << 20, 64 << 20

# --- Timers ---------------------------------------------------------------------------------------


class Timer(abc.ABC):
    """A timer for a call that every rank makes, on one kind of device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @abc.abstractmethod
    def sets(self, nbytes: int) -> int:
        """Return how many sets of inputs (nbytes per tensor) to rotate through; at least 2."""

    @abc.abstractmethod
    def calls(self, nbytes: int) -> int:
        """Return how many calls make one measurement; the same on every rank."""

    @abc.abstractmethod
    def wait(self) -> None:
        """Wait for all calls. Raises PeerTimeoutError if they do not end."""

    @abc.abstractmethod
    def time(self, call: Callable[[int], Any], calls: int) -> float:
        """Return microseconds per call: the median of several runs of `calls` calls."""


class CpuTimer(Timer):
    """A timer that uses the wall clock."""

    RUNS = 5

    def sets(self, nbytes: int) -> int:
        return 2

    def calls(self, nbytes: int) -> int:
        return 8 if nbytes <= 1 << 20 else 2

    def wait(self) -> None:
        """Return at once: CPU collectives block, with the timeout of their group."""

    def time(self, call: Callable[[int], Any], calls: int) -> float:
        found = []
        call(0)
        for _ in range(self.RUNS):
            start = time.perf_counter()
            for i in range(calls):
                call(i)
            found.append((time.perf_counter() - start) / calls * 1e6)
        return statistics.median(found)


class GpuTimer(Timer):
    """A timer that replays a CUDA graph of all calls; inputs rotate, so that none is cached."""

    WARM_UP, RUNS = 2, 9
    COLD_BYTES = 200 << 20  # well above the L2 cache of any GPU

    def sets(self, nbytes: int) -> int:
        return min(128, max(2, -(-self.COLD_BYTES // (2 * nbytes))))

    def calls(self, nbytes: int) -> int:
        return max(8, self.sets(nbytes))

    def wait(self) -> None:
        done = torch.cuda.Event()
        done.record()
        start, most_s = time.monotonic(), limit_s(Limit.TIMED_CALL)
        while not done.query():
            waited = time.monotonic() - start
            if waited > most_s:
                raise PeerTimeoutError(
                    f"a call that was being timed did not end within {most_s:.0f} s: a rank is "
                    "missing, or its GPU cannot reach the others; this process cannot go on"
                )
            if waited > 0.05:  # poll without sleeping before, to keep the ranks close together
                time.sleep(0.0005)

    def time(self, call: Callable[[int], Any], calls: int) -> float:
        for i in range(2):
            call(i)
        self.wait()
        graph = torch.cuda.CUDAGraph()
        with temporary_graph(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for i in range(calls):
                call(i)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(self.WARM_UP + self.RUNS + 1)]
        # Launched at once: host work between replays would let the ranks drift apart.
        events[0].record()
        for event in events[1:]:
            graph.replay()
            event.record()
        self.wait()
        found = [a.elapsed_time(b) * 1000 / calls for a, b in itertools.pairwise(events)]
        return float(statistics.median(found[self.WARM_UP :]))


def peer_copies(made: Any, device: torch.device) -> tuple[dict[str, Callable[[int], None]], int]:
    """Return functions by name that copy to all peers over all links at once, and bytes per call.

    Copy engines are faster with one peer; with several they reach two thirds of a kernel's rate.

    Args:
        made: a SymmMemWorkspace without a running kernel; the call overwrites its inbox.

    Raises:
        WorkspaceError: the workspace is too small to measure a link's rate.
    """
    from fusewire.custom_ops.providers.symm_mem.kernels.peer_copy import push_to_peers

    nbytes = min(made.layout.sizes.get("inbox", 0), _MOST_COPY_BYTES)
    if nbytes < _LEAST_COPY_BYTES:
        raise WorkspaceError(
            f"symm_mem's workspace is too small to measure the links' rate ({nbytes >> 10} KiB a peer)"
        )
    at = made.layout.offsets["inbox"]
    targets = [made._handle.get_buffer(r, (nbytes,), torch.uint8, at) for r in range(made.world_size) if r != made.rank]
    source = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    streams = [torch.cuda.Stream(device) for _ in targets]

    def engines(_: int) -> None:
        current = torch.cuda.current_stream(device)
        for stream, target in zip(streams, targets, strict=True):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                target.copy_(source)
        for stream in streams:
            current.wait_stream(stream)

    def kernel(_: int) -> None:
        push_to_peers(made, source, at)

    return {"copy engines": engines, "kernel": kernel}, nbytes * len(targets)


# --- Inputs and the check -------------------------------------------------------------------------


class Inputs(NamedTuple):
    """One set of inputs: this rank's x, and the residual and weight that all ranks share."""

    x: Tensor
    residual: Tensor
    weight: Tensor


class Wanted(NamedTuple):
    """The expected result of a set of inputs: residual, and the slack of sums in another order."""

    total: Tensor
    slack: Tensor


def draw(rank: int, tokens: int, hidden: int, dtype: torch.dtype, device: torch.device, count: int) -> list[Inputs]:
    """Return sets of inputs. The first two differ, so that stale results are detected."""
    own = torch.Generator(device).manual_seed(1000 + rank)
    shared = torch.Generator(device).manual_seed(1)

    def normal(generator: torch.Generator, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    weight = normal(shared, hidden)
    two = [Inputs(normal(own, tokens, hidden), normal(shared, tokens, hidden), weight) for _ in range(2)]
    return two + [Inputs(two[i % 2].x.clone(), two[i % 2].residual.clone(), weight) for i in range(count - 2)]


def reference(inputs: Inputs, world_size: int, group_name: str) -> Wanted:
    """Return the exact result, computed a few rows at a time. A collective.

    Rounding after each of R ranks, in any order, moves a sum by at most R roundings of the sum of
    magnitudes.
    """
    eps = torch.finfo(inputs.x.dtype).eps
    totals, slacks = [], []
    for x, residual in zip(inputs.x.split(ROWS_AT_ONCE), inputs.residual.split(ROWS_AT_ONCE), strict=True):
        total = add_residual(sum_in_rank_order(x, group_name), residual)
        magnitude = sum_in_rank_order(x.abs(), group_name).float() * world_size + total.float().abs()
        totals.append(total)
        slacks.append(magnitude * eps)
    return Wanted(torch.cat(totals), torch.cat(slacks))


def wrong(norm: Tensor, total: Tensor, inputs: Inputs, wanted: Wanted, in_rank_order: bool) -> str:
    """Return what is wrong with a result, or "".

    The sum must be exact if in_rank_order, else within `slack`. The norm must be within three units
    in the last place of RMSNorm in float64 of that sum (in fp32, where the mean rounds too, within
    2^-18).
    """
    for name, got in (("norm", norm), ("residual", total)):
        if (got.shape, got.dtype) != (inputs.x.shape, inputs.x.dtype):
            return f"the {name} is {got.dtype} {list(got.shape)}"
    off = (total.float() - wanted.total.float()).abs()
    bad = ~(off <= (0.0 if in_rank_order else wanted.slack))
    if bool(bad.any()):
        return f"the residual is off in {int(bad.sum())} of {bad.numel()} elements, by {float(off.max()):.3g} at most"
    limit = 2.0**-18 if norm.dtype == torch.float32 else 3 * torch.finfo(norm.dtype).eps
    for got, rows in zip(norm.split(ROWS_AT_ONCE), total.split(ROWS_AT_ONCE), strict=True):
        exact = normalize(rows.double(), NormSpec(inputs.weight.double(), EPS, 0.0, SCALE_THEN_ROUND))
        off = (got.double() - exact).abs()
        bad = ~(off <= limit * (exact.abs() + 1e-2))
        if bool(bad.any()):
            return f"the norm is off in {int(bad.sum())} of {bad.numel()} elements, by {float(off.max()):.3g} at most"
    return ""


def fingerprint(*tensors: Tensor) -> str:
    """Return a number for comparing results between ranks; different bits differ in it."""
    found = 0
    for tensor in tensors:
        bits = tensor.reshape(-1).view(torch.int16 if tensor.itemsize == 2 else torch.int32)
        for part in bits.split(1 << 22):
            factors = torch.arange(1, len(part) + 1, device=part.device) % 8191 + 1
            found = (found * 31 + int((part.long() * factors).sum())) % (1 << 61)
    return str(found)


# --- Progress -------------------------------------------------------------------------------------


class Progress:
    """A progress bar on stderr, or lines if it is no terminal; on the logging rank only."""

    WIDTH = 24

    def __init__(self, title: str, total: int, is_logging_rank: bool) -> None:
        self.title, self.total, self.is_logging_rank = title, total, is_logging_rank
        self.done = 0
        self.bar = sys.stderr.isatty()

    def step(self, text: str) -> None:
        self.done += 1
        if not self.is_logging_rank:
            return
        count = f"{self.done}/{self.total}"
        if not self.bar:
            log_line(f"tuning {self.title}: {count} {text}")
            return
        filled = self.WIDTH * self.done // self.total
        bar = "#" * filled + "." * (self.WIDTH - filled)
        print(f"\r\x1b[K[fusewire] {self.title} [{bar}] {count} {text}"[:160], end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self.is_logging_rank and self.bar:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
