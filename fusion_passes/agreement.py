"""The ranks of a group compare what the passes made of a graph, before it runs.

Each rank compiles for itself and sees its own graph only. Where graphs differ (one rank reads a value that the others do
not, or has fewer rows of an unevenly divided sequence), a rank may fuse or merge collectives that another keeps as they
were. The program's own collectives fit together all the same; the rewritten ones would not: wrong numbers, or ranks that
wait for each other. So every rank posts a digest of its rewritten collectives, in the store that the process group was
made with. A rank that rewrote something waits for its peers' digests, and if one differs it compiles the graph once more
with its collectives left alone; as every rank that rewrote something does, they fit together again. With collectives over
several groups in a graph, what one group's ranks leave alone concerns the others', so they tell each other.

Ranks need not compile at the same time: one may compile anew what the others have, for other shapes. A rank that does not
even start is taken at its last word on the same place in the program.
"""

from __future__ import annotations

import contextvars
import dataclasses
import hashlib
import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import Any

import torch.distributed as dist
from torch.fx import Graph, GraphModule, Node

from fusewire.custom_ops.votes import say, timeout_s
from fusewire.errors import ProcessGroupError
from fusewire.fusion_passes.config import PassConfig
from fusewire.fusion_passes.report import FUSED, Entry, forget_accounts, report

# Seconds to wait for a rank that has not begun to compile a graph: its last word on the place was the same as this
# rank's, another, or it has never compiled it.
SAME_BEFORE_S, OTHER_BEFORE_S, NEVER_BEFORE_S = 2.0, 20.0, 120.0
_SAY_AFTER_S = 15.0
_PLAIN = "plain"
_END = "end"

# Why collectives are left alone in the compilation that is going on, or "".
LEFT_ALONE: contextvars.ContextVar[str] = contextvars.ContextVar("fusewire_left_alone", default="")
_attempts: dict[tuple[str, str], int] = {}


def compiled_alike(
    model: GraphModule, config: PassConfig, compile_with: Callable[[GraphModule, PassConfig], Any]
) -> Any:
    """compile_with(model, config), and once more without fusions if the ranks' graphs turn out to differ."""
    groups = _groups()
    if not groups:
        return compile_with(model, config)
    spare = _copied(model)
    place = _place(model)
    meetings = {group.group_name: _Meeting(group, place) for group in groups}
    before = len(report().graphs)
    try:
        result = compile_with(model, config)
    except BaseException:
        for meeting in meetings.values():
            meeting.post(_PLAIN, "could not compile it")
        raise
    accounts = report().graphs[before:]
    reason = _reason(list(meetings.values()), [entry for account in accounts for entry in account.entries])
    if not reason:
        return result
    forget_accounts(accounts)
    token = LEFT_ALONE.set(reason)
    try:
        return compile_with(spare, _plain(config))
    finally:
        LEFT_ALONE.reset(token)


def _plain(config: PassConfig) -> PassConfig:
    return dataclasses.replace(
        config, fuse_allreduce_rms=False, merge_allreduces=False, shard_residual=False, output_in_place=False
    )


def _groups() -> list[dist.ProcessGroup]:
    """The groups of this rank whose ranks are processes of their own."""
    if not dist.is_available() or not dist.is_initialized():
        return []
    known = list(dist.distributed_c10d._world.pg_map)
    return [group for group in known if group.size() > 1 and dist.get_backend(group) != "fake"]


def _reason(meetings: Sequence[_Meeting], entries: Sequence[Entry]) -> str:
    """Why this rank leaves its collectives alone, or ""."""
    fused = {entry.group for entry in entries if entry.status == FUSED}
    for meeting in meetings:
        _post(meeting, [entry for entry in entries if entry.group == meeting.name], len(fused))
    # What nobody rewrote here does not matter, unless this rank has rewritten something over another group.
    concerned = [meeting for meeting in meetings if fused and (meeting.name in fused or meeting.collectives)]
    reason = "; ".join(filter(None, [_compare(meeting) for meeting in concerned]))
    return _spread(concerned, reason)


def _post(meeting: _Meeting, entries: Sequence[Entry], groups: int) -> None:
    """Post this rank's digest for a group."""
    fused = [entry for entry in entries if entry.status == FUSED]
    digest = _PLAIN
    if fused:
        parts = [(entry.collective, entry.status, entry.fusion, entry.dtype) for entry in entries]
        digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    meeting.collectives = len(entries)
    meeting.post(digest, f"would fuse {len(fused)} of {len(entries)}", groups)


def _compare(meeting: _Meeting) -> str:
    """Wait for the others' digests and say how they differ."""
    # Where this rank rewrote nothing, a rank that never compiles the graph is no other than one that did the same.
    fitting = (meeting.digest, None) if meeting.digest == _PLAIN else (meeting.digest,)
    others = {rank: said for rank, said in meeting.collect().items() if said["digest"] not in fitting}
    if not others:
        return ""
    listed = ", ".join(f"rank {rank} {said['summary']}" for rank, said in sorted(others.items()))
    return (
        f"the ranks' graphs differ, and ranks must run the same collectives: of the collectives over group "
        f"{meeting.name!r} rank {meeting.rank} {meeting.summary}, {listed}; make every rank run the same program on equal "
        "shapes"
    )


def _spread(meetings: Sequence[_Meeting], reason: str) -> str:
    """Why this rank leaves its collectives alone, or "" if no rank does with which it has to do, by however many others.

    With collectives over one group alone each rank knows by now. On a mesh with d axes, of which one group has fallen out,
    any rank is at most 2 d - 1 groups away from any other.

    Raises:
        ProcessGroupError: it did not reach every rank in so many steps.
    """
    groups = max((meeting.groups for meeting in meetings), default=0)
    for step in range(1, 2 * groups if groups > 1 else 1):
        for meeting in meetings:
            meeting.tell(str(step), reason)
        for meeting in meetings:
            reason = reason or meeting.hear(str(step))
    for meeting in meetings:
        meeting.tell(_END, reason)
        if reason:
            meeting.settle(_PLAIN)
    late = "" if reason or groups < 2 else next(filter(None, (meeting.hear(_END) for meeting in meetings)), "")
    if late:
        raise ProcessGroupError(
            f"this rank would run fused collectives and others that it shares groups with would not: {late}. Set "
            "FUSEWIRE_DISABLE=1, or make every rank run the same program on equal shapes"
        )
    return reason


class _Meeting:
    """One compilation of the graph at one place, as the ranks of one group speak of it."""

    def __init__(self, group: dist.ProcessGroup, place: str) -> None:
        self.name = group.group_name
        self.ranks = dist.get_process_group_ranks(group)
        self.rank = dist.get_rank()
        self.store = dist.distributed_c10d._get_process_group_store(group)
        number = _attempts[self.name, place] = _attempts.get((self.name, place), 0) + 1
        self.place = place
        self.prefix = f"fusewire/graphs/{place}"
        self.number = number
        self.digest, self.summary = _PLAIN, ""
        self.collectives = 0  # of this rank's graph, over this group
        self.groups = 0  # over so many groups somebody here has fused collectives
        self.alike: list[int] = []  # the ranks that have compiled the same now
        self._set(f"{number}/begun by {self.rank}", "yes")

    def post(self, digest: str, summary: str, groups: int = 0) -> None:
        """Tell the others what this rank made of the graph, and over how many groups it has fused collectives."""
        self.digest, self.summary, self.groups = digest, summary, groups
        said = {"digest": digest, "summary": summary, "groups": groups}
        self._set(f"{self.number}/{self.rank}", json.dumps(said))
        self.settle(digest)

    def tell(self, step: str, reason: str) -> None:
        """Tell the others whether this rank leaves its collectives alone, as far as it has heard."""
        self._set(f"{self.number}/{step} of {self.rank}", reason)

    def hear(self, step: str) -> str:
        """Why another rank that compiled the same leaves its collectives alone, or "". Waits for them all."""
        for rank in self.alike:
            start, pause, said = time.monotonic(), 0.001, None
            while said is None:
                late = time.monotonic() - start > timeout_s()
                said = self._get(f"{self.number}/{step} of {rank}")
                said = self._get(f"{self.number}/{_END} of {rank}") if said is None else said
                said = f"it said nothing for {timeout_s():g} s" if said is None and late else said
                time.sleep(pause if said is None else 0)
                pause = min(pause * 1.5, 0.05)
            if said:
                return f"rank {rank} of group {self.name!r} leaves its collectives alone: {said}"
        return ""

    def settle(self, digest: str) -> None:
        """Tell those who compile this place later what this rank runs now."""
        self._set(f"last word of {self.rank}", digest)

    def collect(self) -> dict[int, dict[str, Any]]:
        """What the others made of it; of a rank that does not come, its last word, or that it is not known."""
        found: dict[int, dict[str, Any]] = {}
        start = time.monotonic()
        said, pause = False, 0.001
        missing = [rank for rank in self.ranks if rank != self.rank]
        while missing:
            waited = time.monotonic() - start
            for rank in list(missing):
                answer = self._get(f"{self.number}/{rank}")
                if answer is not None:
                    found[rank] = json.loads(answer)
                    self.groups = max(self.groups, found[rank]["groups"])
                    if found[rank]["digest"] == self.digest != _PLAIN:
                        self.alike.append(rank)
                elif waited > self._patience(rank, self.digest):
                    last = self._get(f"last word of {rank}")
                    found[rank] = {"digest": last, "summary": "has not compiled it, as far as is known"}
                if rank in found:
                    missing.remove(rank)
            if missing and not said and waited > _SAY_AFTER_S and self.rank == self.ranks[0]:
                said = True
                say(f"compiled {self.place}; waiting for rank(s) {', '.join(map(str, missing))} to compile it")
            time.sleep(pause if missing else 0)
            pause = min(pause * 1.5, 0.05)
        return found

    def _patience(self, rank: int, digest: str) -> float:
        if self._get(f"{self.number}/begun by {rank}") is not None:
            return timeout_s()
        last = self._get(f"last word of {rank}")
        if last is None:
            return OTHER_BEFORE_S if digest == _PLAIN else NEVER_BEFORE_S
        return SAME_BEFORE_S if last == digest else OTHER_BEFORE_S

    def _set(self, key: str, value: str) -> None:
        self.store.set(f"{self.prefix}/{key}", value)

    def _get(self, key: str) -> str | None:
        name = f"{self.prefix}/{key}"
        return self.store.get(name).decode() if self.store.check([name]) else None


def _place(model: GraphModule) -> str:
    """Where in the program a graph begins: the same on every rank, unless they run different programs."""
    for node in model.graph.nodes:
        lines = re.findall(r'File "([^"]+)", line (\d+)', node.stack_trace or "") if node.op != "placeholder" else []
        if lines:
            return f"{PurePath(lines[-1][0]).name}:{lines[-1][1]}"
    return "a graph without a place"


def _copied(model: GraphModule) -> GraphModule:
    """The same graph anew, over the same modules and tensors: a compilation may change the one it is given."""
    graph, values = Graph(), dict[Node, Node]()
    result = graph.graph_copy(model.graph, values)
    (old,) = (node for node in model.graph.nodes if node.op == "output")
    new = graph.output(result)
    graph.set_codegen(model.graph._codegen)
    for source, copied in [*values.items(), (old, new)]:
        copied.meta = dict(source.meta)
    copied_model = GraphModule(model, graph)
    copied_model.meta = dict(model.meta)
    return copied_model
