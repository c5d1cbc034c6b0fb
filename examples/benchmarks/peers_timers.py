"""Time calls for peers.py: they are recorded once and run in turns, so that all meet the same clocks."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from fusewire.custom_ops.tuning.timers import CpuTimer, GpuTimer


@dataclasses.dataclass
class Recording:
    """Recorded calls, and the results of the last run."""

    run: Callable[[], Any]
    calls: int
    kept: collections.deque[Any]


class Replays(GpuTimer):
    """A timer of CUDA graph replays. Results rotate too: as many stay alive as there are sets."""

    WARM_UP, REPLAYS = 1, 3

    def __init__(self, device: torch.device, group: dist.ProcessGroup) -> None:
        super().__init__(device)
        self._group, self._token = group, torch.zeros(1, device=device)

    def record(self, call: Callable[[int], Any], calls: int, sets: int) -> Recording:
        for i in range(2):
            call(i)
        self.wait()
        graph, kept = torch.cuda.CUDAGraph(), collections.deque(maxlen=sets)
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for i in range(calls):
                kept.append(call(i))
        return Recording(graph.replay, calls, kept)

    def replay(self, recording: Recording) -> float:
        """Return microseconds per call: the median of REPLAYS replays."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(self.WARM_UP + self.REPLAYS + 1)]
        # What ran before has ended on all ranks, and they start together.
        dist.all_reduce(self._token, group=self._group)
        events[0].record()
        for event in events[1:]:
            recording.run()
            event.record()
        self.wait()
        found = [a.elapsed_time(b) * 1000 / recording.calls for a, b in itertools.pairwise(events)]
        return float(statistics.median(found[self.WARM_UP :]))


class Calls(CpuTimer):
    """A timer by the wall clock, without CUDA graphs."""

    def __init__(self, device: torch.device, group: dist.ProcessGroup) -> None:
        super().__init__(device)
        self._group = group

    def record(self, call: Callable[[int], Any], calls: int, sets: int) -> Recording:
        kept = collections.deque(maxlen=sets)
        recording = Recording(lambda: [kept.append(call(i)) for i in range(calls)], calls, kept)
        recording.run()
        return recording

    def replay(self, recording: Recording) -> float:
        """Return microseconds per call."""
        dist.barrier(group=self._group)
        start = time.perf_counter()
        recording.run()
        return (time.perf_counter() - start) / recording.calls * 1e6
