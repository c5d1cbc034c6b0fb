"""Measure for peers.py: every size alike on every rank, with a vote after each step."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import peers_report
import torch
import torch.distributed as dist
from peers_candidates import NORM, Arena, Bench, Candidate, Family
from peers_ours import COPIES, chosen, families, most_bytes
from peers_report import CHOSEN, COPY, SHARDED, Row
from peers_timers import Calls, Recording, Replays

from fusewire.custom_ops.api import close
from fusewire.custom_ops.coordination.vote import Channel, VoteResult, describe, vote
from fusewire.custom_ops.ops.sharded_norm import gather_rows
from fusewire.custom_ops.providers.symm_mem import launcher as symm_mem
from fusewire.custom_ops.tuning.measure import coarse_first
from fusewire.custom_ops.tuning.timers import draw, fingerprint, reference, wrong
from fusewire.custom_ops.workspaces.registry import check_memory
from fusewire.errors import PeerTimeoutError

DTYPE = torch.bfloat16
# A candidate that is this many times slower than the fastest at the next smaller size is left out.
FAR = 6.0
UNWANTED = "left out by --without"


# --- A run --------------------------------------------------------------------------------------------------


class Run:
    """All sizes of one world size; every rank makes one and does the same.

    Args:
        without: parts of the names of candidates to leave out.
        save: given the rows so far after each size, on every rank.
        alive: called before everything that may take long.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        cpu_group: dist.ProcessGroup | None,
        device: torch.device,
        *,
        rounds: int,
        seconds: float,
        without: Sequence[str] = (),
        save: Callable[[Sequence[Row]], None] = lambda rows: None,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        self.group, self.cpu_group, self.device = group, cpu_group, device
        self.rounds, self.seconds, self._save, self._alive = rounds, seconds, save, alive
        self.without, self.start = tuple(without), time.monotonic()
        self.timer = (Replays if device.type == "cuda" else Calls)(device, group)
        self.channel = Channel(group, "peers")
        self.rows: list[Row] = []
        self.notes: list[str] = []

    def vote(self, topic: str, work: Callable[[], Mapping[str, Any] | None], **options: Any) -> VoteResult:
        """Vote without gradients, from any thread."""
        self._alive()
        return vote(self.channel, topic, torch.no_grad()(work), **options)

    def say(self, text: str) -> None:
        if self.group.rank() == 0:
            print(text, file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.say(text)

    def measure(self, hidden_sizes: Sequence[int], grid: Sequence[int]) -> list[Row]:
        """Return rows of all sizes, as far as the time allows."""
        with torch.no_grad():
            for done, hidden in enumerate(hidden_sizes):
                now = self._elapsed(f"before {hidden}")
                share = (self.seconds - now) / (len(hidden_sizes) - done)
                self._measure_hidden(hidden, grid, now + share)
        return self.rows

    def _elapsed(self, topic: str) -> float:
        """Return seconds by rank 0's clock, the same on every rank."""
        return float(self.vote(f"elapsed {topic}", lambda: {"s": time.monotonic() - self.start}).facts[0]["s"])

    def _measure_hidden(self, hidden: int, grid: Sequence[int], until: float) -> None:
        torch._dynamo.reset()
        weight = draw(0, 1, hidden, DTYPE, self.device, 2)[0].weight
        nbytes = most_bytes(self.timer, grid, hidden * DTYPE.itemsize)
        most = max(grid)
        bench = Bench(self.group, self.cpu_group, hidden, DTYPE, self.device, most, nbytes, weight)
        one = _Hidden(self, bench, grid)
        one.set_up()
        order = coarse_first(sorted(grid))
        last = self._elapsed(f"set up {hidden}")
        for done, tokens in enumerate(order):
            self.rows += one.measure(tokens)
            self._save(self.rows)
            now = self._elapsed(f"after {tokens} x {hidden}")
            if now + 2 * (now - last) > until and done + 1 < len(order):  # the next may take twice as long
                left = ", ".join(map(str, sorted(order[done + 1 :])))
                self.note(
                    f"hidden size {hidden}: no time was left for {left} tokens ({now:.0f} of {self.seconds:.0f} s)"
                )
                break
            last = now
        one.close()


class _Hidden:
    """The measurement of one hidden size."""

    def __init__(self, run: Run, bench: Bench, grid: Sequence[int]) -> None:
        self.run, self.bench, self.grid = run, bench, grid
        self.candidates: list[Candidate] = []
        self.absent: list[tuple[tuple[str, str, str], str]] = []
        self.rejected: dict[str, str] = {}
        self.us: dict[str, dict[int, float]] = {}

    # Setting up

    def set_up(self) -> None:
        for family in families(self.bench.device):
            unwanted = {label for label, _, _ in family.labels if self._is_unwanted(label)}
            # A family of which no candidate is asked for is not set up.
            whole = bool(family.labels) and len(unwanted) == len(family.labels)
            found, reason = ([], UNWANTED) if whole else self._set_up(family)
            found = [candidate for candidate in found if candidate.label not in unwanted]
            self.bench.missing.update(dict.fromkeys(unwanted, UNWANTED))
            self.candidates += found
            if reason and family.name == NORM:
                self.bench.norm, self.bench.missing[NORM] = None, f"{NORM}: {reason}"
            if reason:
                self.run.note(f"hidden size {self.bench.hidden}: {family.name} is left out: {reason}")
            there = {candidate.label for candidate in found}
            missing = [names for names in family.labels if names[0] not in there]
            self.absent += [
                (names, reason or self.bench.missing.get(names[0], "not there on every rank")) for names in missing
            ]
        self._compile_ahead()

    def _is_unwanted(self, label: str) -> bool:
        return any(part in label for part in self.run.without)

    def _set_up(self, family: Family) -> tuple[list[Candidate], str]:
        found: list[Candidate] = []
        topic, bench = f"{family.name} {self.bench.hidden}", self.bench
        if family.alone is not None:
            alone = family.alone
            verdict = self.run.vote(f"{topic} alone", lambda: alone(bench), work_s=family.alone_s)
            if not verdict.ok:
                return [], verdict.reason

        def together() -> dict[str, Any]:
            found.extend(family.together(bench))
            return {"labels": [candidate.label for candidate in found]}

        verdict = self.run.vote(topic, together, work_s=family.together_s)
        if not verdict.ok:
            return [], verdict.reason
        return [c for c in found if all(c.label in fact["labels"] for fact in verdict.facts)], ""

    def _compile_ahead(self) -> None:
        """Compile fusewire's kernels, each on one rank first: the others find it in the shared cache."""
        pairs = [(c, t) for c in self.candidates if c.compiles for t in self.grid if t in c.tokens]

        def work(share: Sequence[tuple[Candidate, int]]) -> None:
            with symm_mem.compiling_only():
                for candidate, tokens in share:
                    drawn = draw(self.bench.rank, tokens, self.bench.hidden, DTYPE, self.bench.device, 2)
                    candidate.bind(Arena(drawn, None))(0)

        ranks = self.bench.world_size
        for topic, share in (("one rank each", pairs[self.bench.rank :: ranks]), ("all", pairs)):
            verdict = self.run.vote(f"compile, {topic}", lambda share=share: work(share), work_s=600.0)
            if not verdict.ok:
                self._reject([c.label for c in self.candidates if c.compiles], f"does not compile: {verdict.reason}")

    # Measuring

    def measure(self, tokens: int) -> list[Row]:
        """Return rows of all candidates at one size."""
        notes = {c.label: self._why_not(c, tokens) for c in self.candidates}
        due = [c for c in self.candidates if not notes[c.label]]
        arenas: list[Arena] = []
        verdict = self.run.vote(f"inputs {tokens}", lambda: arenas.append(self._arena(tokens, len(due))))
        if verdict.ok:
            _Size(self, tokens, arenas[0]).measure(due, notes)
        else:
            notes.update({c.label: f"no room for the inputs: {verdict.reason}" for c in due})
        bench, names = self.bench, [(c.label, c.column, c.kind) for c in self.candidates]
        size = (bench.world_size, bench.hidden, tokens)
        sent = {c.label: c.sent for c in self.candidates}
        times = {label: found.get(tokens) for label, found in self.us.items()}
        rows = [Row(*size, *n, times.get(n[0]), sent[n[0]], notes[n[0]]) for n in names]
        rows += [Row(*size, *names, None, 0, reason) for names, reason in self.absent]
        timed = sorted((row.us, row.candidate) for row in rows if row.us is not None and row.kind != COPY)
        best = ", ".join(f"{label} {us:.1f}" for us, label in timed[:4])
        self.run.say(f"{tokens} x {bench.hidden} on {bench.world_size}: {best or 'nothing'}")
        return rows

    def _why_not(self, candidate: Candidate, tokens: int) -> str:
        """Return why a candidate is left out at a size, or an empty text."""
        if candidate.label in self.rejected:
            return self.rejected[candidate.label]
        if tokens not in candidate.tokens:
            return candidate.limit
        if candidate.kind == COPY:
            return "" if tokens >= peers_report.LARGER else f"timed from {peers_report.LARGER} tokens on"
        own = self.us.get(candidate.label, {})
        smaller = max((t for t in own if t < tokens), default=0)
        others = [found[smaller] for label, found in self.us.items() if smaller in found and label not in COPIES]
        if smaller and candidate.kind != CHOSEN and own[smaller] > FAR * min(others):
            return f"not tried: {own[smaller] / min(others):.1f} times as long as the fastest at {smaller} tokens"
        return ""

    def _arena(self, tokens: int, candidates: int) -> Arena:
        nbytes = tokens * self.bench.hidden * DTYPE.itemsize
        sets = self.run.timer.sets(nbytes)
        if self.bench.device.type == "cuda":
            torch.cuda.empty_cache()
        # Inputs and their copies; results of each candidate's graph; what the check needs.
        need = (8 * sets + candidates * (2 * sets + 4) + 4 * self.bench.world_size + 16) * nbytes
        check_memory(need, self.bench.device)
        drawn = draw(self.bench.rank, tokens, self.bench.hidden, DTYPE, self.bench.device, sets)
        return Arena(drawn, self.bench.symmetric)

    def _reject(self, labels: Sequence[str], reason: str) -> None:
        for label in labels:
            if label not in self.rejected:
                self.rejected[label] = reason
                self.run.note(f"hidden size {self.bench.hidden}: {label} is left out: {reason}")

    def close(self) -> None:
        self.candidates.clear()
        for closer in self.bench.closers:
            verdict = self.run.vote(f"close {self.bench.hidden}", closer)
            if not verdict.ok:
                self.run.note(f"hidden size {self.bench.hidden}: {verdict.reason}")
        self.bench.symmetric = None
        close(self.bench.group)
        if self.bench.device.type == "cuda":
            torch.cuda.empty_cache()


class _Size:
    """Measure one size: check, record, take turns, check what was recorded."""

    def __init__(self, one: _Hidden, tokens: int, arena: Arena) -> None:
        self.one, self.run, self.bench = one, one.run, one.bench
        self.tokens, self.arena = tokens, arena
        self.calls: dict[str, Callable[[int], Any]] = {}
        self.recordings: dict[str, Recording] = {}

    def measure(self, due: Sequence[Candidate], notes: dict[str, str]) -> None:
        """Add to the times of the hidden size, and to the notes."""
        steps = {
            "bind": self._bind,
            "check": self._check,
            "record": self._record,
            "time": self._time,
            "check again": self._again,
        }
        for topic, step in steps.items():
            fit = [c for c in due if not self.one.rejected.get(c.label)]
            verdict = self.run.vote(f"{topic} {self.tokens}", lambda step=step, fit=fit: step(fit))
            if not verdict.ok:  # the step failed, not a candidate
                raise RuntimeError(f"{topic} at {self.tokens} tokens: {verdict.reason}")
            self._judge(topic, fit, verdict)
            if topic == "record":
                self._before_replay([c for c in fit if c.label not in self.one.rejected])
        for label in [c.label for c in due]:
            if label in self.one.rejected:
                notes[label] = self.one.rejected[label]
                self.one.us.pop(label, None)
        for candidate in due:
            if candidate.kind == CHOSEN and candidate.label not in self.one.rejected:
                notes[candidate.label] = chosen(self.arena, self.bench.name)

    def _judge(self, topic: str, fit: Sequence[Candidate], verdict: VoteResult) -> None:
        """Collect the ranks' results: a candidate that failed on one rank is left out on all."""
        for rank, fact in zip(verdict.ranks, verdict.facts, strict=True):
            for label, reason in fact.get("failed", {}).items():
                self.one._reject([label], f"{topic}, {self.tokens} tokens, on rank {rank}: {reason}")
        for candidate in fit:
            prints = {str(fact.get("prints", {}).get(candidate.label)) for fact in verdict.facts}
            if candidate.exact and len(prints) > 1:
                self.one._reject([candidate.label], f"{topic}, {self.tokens} tokens: the ranks' results differ")
            if topic == "time" and candidate.label not in self.one.rejected:
                slowest = max(float(fact["us"][candidate.label]) for fact in verdict.facts)
                self.one.us.setdefault(candidate.label, {})[self.tokens] = round(slowest, 3)

    def _each(self, fit: Sequence[Candidate], work: Callable[[Candidate], Any]) -> tuple[dict, dict[str, str]]:
        """Return the result of the work for each candidate, or what it raised."""
        done, failed = {}, {}
        for candidate in fit:
            try:
                done[candidate.label] = work(candidate)
            except PeerTimeoutError:
                raise
            except Exception as error:
                failed[candidate.label] = describe(error)
        return done, failed

    def _bind(self, fit: Sequence[Candidate]) -> dict[str, Any]:
        """Bind before the first calls: if one rank cannot, no other may wait for it in a kernel."""
        self.calls, failed = self._each(fit, lambda candidate: candidate.bind(self.arena))
        return {"failed": failed}

    def _check(self, fit: Sequence[Candidate]) -> dict[str, Any]:
        self.wanted = [reference(self.arena.inputs[i], self.bench.world_size, self.bench.name) for i in (0, 1)]
        self.arena.restore()  # also what was bound since

        def work(candidate: Candidate) -> str:
            if candidate.in_place:
                self.arena.restore()
            results = [self.calls[candidate.label](i) for i in (0, 1)]
            self.run.timer.wait()
            return "" if candidate.kind == COPY else self._fingerprint(candidate, results, (0, 1))

        prints, failed = self._each(fit, work)
        return {"failed": failed, "prints": prints}

    def _fingerprint(self, candidate: Candidate, results: Sequence[Any], indices: Sequence[int]) -> str:
        """Return what must be equal on all ranks. Raises AssertionError if results are wrong."""
        prints, problems = [], []
        for (norm, total), i in zip(results, indices, strict=True):
            # Later sets are copies of the first two.
            inputs, wanted = self.arena.inputs[i], self.wanted[i % 2]
            if candidate.kind == SHARDED:
                total = gather_rows(total, inputs.x, self.bench.name)
            problems.append(wrong(norm, total, inputs, wanted, candidate.exact))
            prints.append(fingerprint(norm, total))
        if any(problems):  # after both sets, since all ranks gather alike
            raise AssertionError(next(filter(None, problems)))
        return " ".join(prints)

    def _record(self, fit: Sequence[Candidate]) -> dict[str, Any]:
        sets = len(self.arena.inputs)
        calls = self.run.timer.calls(self.tokens * self.bench.hidden * DTYPE.itemsize)

        def work(candidate: Candidate) -> Recording:
            if candidate.in_place:
                self.arena.restore()
            call = self.calls[candidate.label]
            return self.run.timer.record(lambda i: call(i % sets), calls, sets)

        self.recordings, failed = self._each(fit, work)
        return {"failed": failed}

    def _before_replay(self, fit: Sequence[Candidate]) -> None:
        for candidate in fit:
            before = candidate.before_replay
            if before is not None:
                topic = f"before replay {self.tokens} {candidate.label}"
                verdict = self.run.vote(topic, before)
                if not verdict.ok:
                    self.one._reject([candidate.label], f"{self.tokens} tokens: {verdict.reason}")

    def _time(self, fit: Sequence[Candidate]) -> dict[str, Any]:
        found: dict[str, list[float]] = {candidate.label: [] for candidate in fit}
        for turn in range(self.run.rounds):
            first = turn * 7 % max(1, len(fit))  # the order of the candidates changes
            for candidate in [*fit[first:], *fit[:first]]:
                if candidate.in_place:
                    self.arena.restore()
                found[candidate.label].append(self.run.timer.replay(self.recordings[candidate.label]))
        return {"us": {label: statistics.median(times) for label, times in found.items()}}

    def _again(self, fit: Sequence[Candidate]) -> dict[str, Any]:
        """Check what the recordings compute. In place a set is right once only, so two calls are recorded again."""

        def work(candidate: Candidate) -> str:
            if candidate.in_place:
                recording, indices = self.run.timer.record(self.calls[candidate.label], 2, 2), [0, 1]
                self.arena.restore()
                recording.run()
                self.run.timer.wait()
            else:
                recording = self.recordings[candidate.label]
                self.run.timer.replay(recording)
                last = min(2, len(recording.kept))
                indices = [i % len(self.arena.inputs) for i in range(recording.calls - last, recording.calls)]
            return self._fingerprint(candidate, list(recording.kept)[-len(indices) :], indices)

        due = [c for c in fit if c.kind != COPY and not (c.in_place and c.before_replay)]
        prints, failed = self._each(due, work)
        return {"failed": failed, "prints": prints}
