"""Check, then time each candidate of the tuner at each number of tokens.

All ranks take the same steps and vote after each, so that they get the same numbers or the same
error. The slowest rank's time counts. A candidate that is wrong on any rank or size is left out.
"""

from __future__ import annotations

import contextlib
import functools
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fusewire.custom_ops.coordination.log import log_line
from fusewire.custom_ops.coordination.vote import Channel, VoteResult, describe, vote
from fusewire.custom_ops.ops.norms import SCALE_THEN_ROUND
from fusewire.custom_ops.tuning.timers import (
    EPS,
    ROWS_AT_ONCE,
    CpuTimer,
    GpuTimer,
    Inputs,
    Progress,
    Timer,
    Wanted,
    draw,
    fingerprint,
    peer_copies,
    reference,
    wrong,
)
from fusewire.custom_ops.workspaces.provider import WorkspaceKey
from fusewire.custom_ops.workspaces.registry import REGISTRY, check_memory
from fusewire.errors import PeerTimeoutError, WorkspaceError

# A candidate that is this many times slower than the best is skipped at the next size.
_FAR = 4.0
_OWN_KERNELS = "symm_mem"


class TimedCall(NamedTuple):
    """A provider's variant, as a call with native's parameters; `in_rank_order`: sums are exact."""

    label: str
    call: Callable[..., tuple[Tensor, Tensor]]
    tokens: range
    in_rank_order: bool
    provider: str


def coarse_first(grid: Sequence[int]) -> list[int]:
    """Return the order of measurement: every second size up to the largest, then the others."""
    return [*sorted(grid[-1::-2]), *sorted(grid[-2::-2])]


@dataclass
class Measurement:
    """The results of measuring one group, hidden size and dtype, the same on every rank.

    Attributes:
        times: microseconds by number of tokens, for each candidate.
        rejected: candidates that were left out, with reasons.
        link_rate: bytes per second that a GPU sends over all its links at once, or None.
        notes: further remarks for a reader.
    """

    group: dist.ProcessGroup
    hidden: int
    dtype: torch.dtype
    device: torch.device
    grid: tuple[int, ...]
    budget_s: float
    times: dict[str, dict[int, float]] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    link_rate: float | None = None
    candidates: list[TimedCall] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.start = self.compiled = time.monotonic()
        self.busy = False  # calls may be running, so their buffers must not be freed
        name = str(self.dtype).removeprefix("torch.")
        self.title = f"hidden size {self.hidden}, {name}, {self.group.size()} ranks"
        self.channel = Channel(self.group, f"tuning group {self.group.group_name}")
        self.timer: Timer = GpuTimer(self.device) if self.device.type == "cuda" else CpuTimer(self.device)
        self.is_logging_rank = self.group.rank() == 0

    def vote(self, topic: str, work: Callable[[], Mapping[str, Any] | None]) -> VoteResult:
        return vote(self.channel, topic, work)

    def measure(self) -> None:
        """Check and time all candidates and fill the attributes. A collective."""
        self.busy = True
        try:
            with torch.no_grad():
                self._compile_ahead()
                self.compiled = time.monotonic()
                self._measure_sizes(coarse_first(self.grid))
                self._measure_links()
        finally:
            self.busy = False
        for note in self.notes if self.is_logging_rank else ():
            log_line(f"tuning {self.title}: {note}")

    def _measure_sizes(self, order: Sequence[int]) -> None:
        progress = Progress(self.title, len(order), self.is_logging_rank)
        last = self._elapsed("start")
        for done, tokens in enumerate(order):
            running = [c for c in self.candidates if self._is_due(c, tokens)]
            if running and not self._measure_size(tokens, running):
                self.candidates = [c._replace(tokens=range(c.tokens.start, tokens)) for c in self.candidates]
            progress.step(self._summary(tokens))
            now = self._elapsed(f"after {tokens} tokens")
            # The next size may take twice as long.
            if now + 2 * (now - last) > self.budget_s and done + 1 < len(order):
                left = ", ".join(map(str, sorted(order[done + 1 :])))
                self.notes.append(f"after {now:.1f} of {self.budget_s:g} s, these token counts were left out: {left}")
                break
            last = now
        progress.end()

    def _elapsed(self, topic: str) -> float:
        """Return seconds since compilation ended, by rank 0's clock. A collective."""
        result = self.vote(f"elapsed, {topic}", lambda: {"s": time.monotonic() - self.compiled})
        return float(result.facts[0]["s"])

    def _is_due(self, candidate: TimedCall, tokens: int) -> bool:
        """Return whether to time a candidate: it was not far slower at the size before."""
        if tokens not in candidate.tokens or candidate.label in self.rejected:
            return False
        smaller = [t for found in self.times.values() for t in found if t < tokens]
        if not smaller:
            return True
        before = max(smaller)
        own = self.times.get(candidate.label, {}).get(before)
        best = min(found[before] for found in self.times.values() if before in found)
        return own is None or own <= _FAR * best

    def _compile_ahead(self) -> None:
        """Compile the candidates' kernels, each on one rank first: the ranks share a cache."""
        pairs = [(c, t) for c in self.candidates if c.provider == _OWN_KERNELS for t in self.grid if t in c.tokens]
        if not pairs:
            return
        from fusewire.custom_ops.providers.symm_mem import launcher as symm_mem

        def work(share: Sequence[tuple[TimedCall, int]]) -> dict[str, Any]:
            failed = {}
            with symm_mem.compiling_only():
                for candidate, tokens in share:
                    x = torch.empty(tokens, self.hidden, dtype=self.dtype, device=self.device)
                    try:
                        self._call(candidate, x, x, x[0])
                    except Exception as error:
                        failed[candidate.label] = f"{tokens} tokens: {describe(error)}"
            return {"failed": failed}

        self.vote("compile, one rank each", lambda: work(pairs[self.group.rank() :: self.group.size()]))
        self._reject(self.vote("compile", lambda: work(pairs)), "failed")

    def _call(self, candidate: TimedCall, x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return candidate.call(x, residual, weight, EPS, 0.0, SCALE_THEN_ROUND, self.group.group_name)

    def _measure_size(self, tokens: int, running: Sequence[TimedCall]) -> bool:
        """Check and time the candidates at one size; return False if a rank lacks memory for it."""
        inputs: list[Inputs] = []
        nbytes = tokens * self.hidden * self.dtype.itemsize

        def make() -> None:
            sets = self.timer.sets(nbytes)
            part = min(nbytes, ROWS_AT_ONCE * self.hidden * self.dtype.itemsize)
            self._check_memory((2 * sets + 12) * nbytes + (2 * self.group.size() + 16) * part)
            inputs.extend(draw(self.group.rank(), tokens, self.hidden, self.dtype, self.device, sets))

        result = self.vote(f"inputs for {tokens} tokens", make)
        if not result.ok:
            self.notes.append(f"{tokens} tokens and more were not measured: {result.reason}")
            return False
        self._check(tokens, running, inputs)
        fit = [candidate for candidate in running if candidate.label not in self.rejected]
        result = self.vote(f"time at {tokens} tokens", lambda: self._clock(tokens, fit, inputs))
        if not result.ok:
            raise WorkspaceError(f"tuning, times at {tokens} tokens: {result.reason}")
        self._reject(result, "failed")
        for candidate in fit:
            if candidate.label not in self.rejected:
                slowest = max(float(fact["us"][candidate.label]) for fact in result.facts)
                self.times.setdefault(candidate.label, {})[tokens] = round(slowest, 3)
        return True

    def _check(self, tokens: int, running: Sequence[TimedCall], inputs: Sequence[Inputs]) -> None:
        """Leave out candidates that are wrong on a rank, or whose results differ between ranks."""

        def work() -> dict[str, Any]:
            wanted = [reference(inputs[i], self.group.size(), self.group.group_name) for i in (0, 1)]
            found = {c.label: [self._check_result(c, inputs[i], wanted[i]) for i in (0, 1)] for c in running}
            reasons = {label: next((problem for problem, _ in two if problem), "") for label, two in found.items()}
            return {
                "wrong": {label: f"{tokens} tokens: {problem}" for label, problem in reasons.items() if problem},
                "prints": {label: [bits for _, bits in two] for label, two in found.items()},
            }

        result = self.vote(f"check at {tokens} tokens", work)
        if not result.ok:
            raise WorkspaceError(f"tuning, check at {tokens} tokens: {result.reason}")
        self._reject(result, "wrong")
        for candidate in running:
            prints = {str(fact["prints"][candidate.label]) for fact in result.facts}
            if candidate.in_rank_order and len(prints) > 1:
                self._leave_out(candidate.label, f"{tokens} tokens: the ranks' results differ")

    def _check_result(self, candidate: TimedCall, inputs: Inputs, wanted: Wanted) -> tuple[str, str]:
        """Return what is wrong with a candidate's result, and the result's fingerprint."""
        try:
            norm, total = self._call(candidate, *inputs)
            self.timer.wait()
            return wrong(norm, total, inputs, wanted, candidate.in_rank_order), fingerprint(norm, total)
        except PeerTimeoutError:
            raise
        except Exception as error:
            return describe(error), ""

    def _clock(self, tokens: int, fit: Sequence[TimedCall], inputs: Sequence[Inputs]) -> dict[str, Any]:
        us, failed = {}, {}
        calls = self.timer.calls(tokens * self.hidden * self.dtype.itemsize)
        for candidate in fit:
            call = functools.partial(self._call_on, candidate, inputs)
            try:
                us[candidate.label] = self.timer.time(call, calls)
            except PeerTimeoutError:
                raise
            except Exception as error:
                failed[candidate.label] = f"{tokens} tokens: {describe(error)}"
        return {"us": us, "failed": failed}

    def _call_on(self, candidate: TimedCall, inputs: Sequence[Inputs], i: int) -> None:
        self._call(candidate, *inputs[i % len(inputs)])

    def _check_memory(self, nbytes: int) -> None:
        if self.device.type == "cuda":
            check_memory(nbytes, self.device)
            return
        with contextlib.suppress(OSError):
            found = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
            share = int(found.group(1)) * 1024 // self.group.size() if found else nbytes
            if nbytes > share:
                raise WorkspaceError(f"the tensors take {nbytes >> 20} MiB and each rank's share is {share >> 20} MiB")

    def _measure_links(self) -> None:
        """Set `link_rate`: the slowest GPU's rate over all its links at once. A collective."""
        if self.device.type != "cuda":
            return
        key = WorkspaceKey(_OWN_KERNELS, self.group.group_name, self.dtype, self.hidden)
        entry = REGISTRY.entries.get(key)

        def work() -> dict[str, float]:
            if entry is None or entry.workspace is None:
                raise WorkspaceError("no workspace of symm_mem, whose buffers the copies go to")
            copies, nbytes = peer_copies(getattr(entry.workspace, "made", None), self.device)
            us = [self.timer.time(call, 8) for call in copies.values()]
            return {"rate": nbytes / (min(us) * 1e-6)}

        result = self.vote("links", work)
        if result.ok:
            self.link_rate = min(float(fact["rate"]) for fact in result.facts)
        else:
            self.notes.append(f"the links' rate was not measured: {result.reason}")

    def _reject(self, result: VoteResult, what: str) -> None:
        for rank, fact in zip(result.ranks, result.facts, strict=True):
            for label, reason in fact.get(what, {}).items():
                self._leave_out(label, f"on rank {rank}, {reason}")

    def _leave_out(self, label: str, reason: str) -> None:
        if label in self.rejected:
            return
        self.rejected[label] = reason
        self.times.pop(label, None)
        if self.is_logging_rank:
            log_line(f"tuning {self.title}: {label} IS LEFT OUT: {reason}")

    def _summary(self, tokens: int) -> str:
        found = sorted((us[tokens], label) for label, us in self.times.items() if tokens in us)
        return f"{tokens} tokens: " + (", ".join(f"{label} {us:.1f} us" for us, label in found[:3]) or "nothing")
