"""The account of every all-reduce of every compiled graph: fused, or refused and why."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from fusewire.fusion_passes.analysis.graph import value_of
from fusewire.fusion_passes.spmd.fingerprint import GroupFingerprint
from fusewire.patterns.collectives import AllReduce

FUSED, REFUSED = "fused", "refused"
ALL_REDUCE, REDUCE_SCATTER = "all_reduce", "reduce_scatter"
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')
# Frames of the machinery that issues the collective; the user looks for the call in the model.
_MACHINERY = re.compile(
    r"[/\\](torch|accelerate)[/\\]|(integrations|distributed)[/\\](tensor_parallel|parallel_utils)"
    r"|<eval_with_key>|<string>"
)


@dataclass(frozen=True)
class Entry:
    """One all-reduce, or one reduce-scatter of sequence parallelism.

    Attributes:
        graph: number of the compiled graph, in order of compilation.
        node: the collective's node.
        collective: "all_reduce" or "reduce_scatter".
        status: "fused" or "refused".
        gate: which gate refused it: "match" (structure), "supported" (dtypes, shapes, group), "provider", or "".
        reason: why, in words that say what to change; for a fused one, why faster providers were passed over.
        location: "file:line" in the model's source, or "".
        module: the module's path in the model, or "".
        spelling: how the norm was written (see fusewire.patterns.norms).
        fusion: what fused with what.
        provider: who computes it, where that is known at compile time.
        group: the process group's name.
        shape, dtype: of the all-reduce's input.
        picture: which of the graph's pictures shows it; -1 if none does.
    """

    graph: int
    node: str
    status: str
    gate: str = ""
    reason: str = ""
    location: str = ""
    module: str = ""
    spelling: str = ""
    fusion: str = ""
    provider: str = ""
    group: str = ""
    shape: str = ""
    dtype: str = ""
    picture: int = -1
    collective: str = ALL_REDUCE


@dataclass(frozen=True)
class Box:
    """One box of a drawing: what it says, what it is (see fusewire.fusion_passes.html), and a second line."""

    label: str
    role: str
    detail: str = ""


@dataclass(frozen=True)
class Drawing:
    """Boxes, and edges as (from, to, what flows), which give positions in `boxes`."""

    boxes: tuple[Box, ...]
    edges: tuple[tuple[int, int, str], ...]


@dataclass(frozen=True)
class Picture:
    """The subgraph around an all-reduce as it arrived, and with the fused operator (None where nothing changed)."""

    before: Drawing
    after: Drawing | None = None


@dataclass(frozen=True)
class GraphAccount:
    """What the passes did to one graph.

    Attributes:
        kind: "inference", or "training" for graphs that are left alone.
        pass_seconds: wall time of fusewire's passes on this graph, in seconds.
        notes: anything else the user should know (a pass that failed, a graph taken from the compile cache).
        cached: the passes did not run, since the compile cache held the finished graph; the account is the one kept
            when it was made.
        fingerprints: what each process group's ranks must have alike to run the graph.
        unfused: the groups whose collectives were left as written because the ranks' graphs differ.
        pictures: the different subgraphs around the all-reduces, where somebody wants to see them (fusewire explain).
    """

    number: int
    kind: str
    entries: tuple[Entry, ...] = ()
    pass_seconds: float = 0.0
    nodes_before: int = 0
    nodes_after: int = 0
    notes: tuple[str, ...] = ()
    cached: bool = False
    pictures: tuple[Picture, ...] = ()
    fingerprints: tuple[GroupFingerprint, ...] = ()
    unfused: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """All-reduces, and reduce-scatters of sequence parallelism, of all graphs compiled so far in this process.

    `str(report)` is a table for people.
    """

    graphs: tuple[GraphAccount, ...] = field(default_factory=tuple)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Every all-reduce and reduce-scatter, graph by graph."""
        return tuple(entry for graph in self.graphs for entry in graph.entries)

    @property
    def found(self) -> int:
        """How many there are."""
        return len(self.entries)

    @property
    def fused(self) -> int:
        """How many of them were fused."""
        return sum(entry.status == FUSED for entry in self.entries)

    @property
    def refused(self) -> int:
        """How many were not."""
        return self.found - self.fused

    @property
    def pass_seconds(self) -> float:
        """Wall time of fusewire's passes over all graphs, in seconds."""
        return sum(graph.pass_seconds for graph in self.graphs)

    @property
    def summary(self) -> str:
        """One line."""
        graphs = len(self.graphs)
        text = f"fusewire: {describe_counts(self.entries)} fused in {graphs} graph{'s' * (graphs != 1)}"
        if self.refused:
            text += f", {self.refused} refused"
        return f"{text}; passes took {self.pass_seconds:.2f} s"

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data: counts, and per graph its fields and entries."""
        return {
            "found": self.found,
            "fused": self.fused,
            "refused": self.refused,
            "pass_seconds": self.pass_seconds,
            "graphs": [dataclasses.asdict(graph) for graph in self.graphs],
        }

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        lines = [self.summary]
        for graph in self.graphs:
            lines.extend(_describe_graph(graph))
        return "\n".join(lines)


def describe_counts(entries: Sequence[Entry]) -> str:
    """For example "4 of 5 all-reduces and 2 of 2 reduce-scatters"."""
    parts = []
    for collective, name in ((ALL_REDUCE, "all-reduces"), (REDUCE_SCATTER, "reduce-scatters")):
        found = [entry for entry in entries if entry.collective == collective]
        if found or (collective == ALL_REDUCE and not entries):
            parts.append(f"{sum(entry.status == FUSED for entry in found)} of {len(found)} {name}")
    return " and ".join(parts)


def _describe_graph(graph: GraphAccount) -> Iterable[str]:
    fused = [entry for entry in graph.entries if entry.status == FUSED]
    refused = [entry for entry in graph.entries if entry.status != FUSED]
    kind = graph.kind + (", from the compile cache" if graph.cached else "")
    scattered = sum(entry.collective == REDUCE_SCATTER for entry in graph.entries)
    others = f" and {scattered} reduce-scatters" if scattered else ""
    yield (f"graph {graph.number} ({kind}): {len(graph.entries) - scattered} all-reduces{others}, {len(fused)} fused")
    groups = Counter((e.fusion, e.spelling, e.provider, e.reason) for e in fused)
    for (fusion, spelling, provider, reason), count in groups.items():
        served = f", provider {provider}" if provider else ""
        why = f" ({reason})" if reason else ""
        how = f", norm spelled {spelling}" if spelling else ""
        yield f"  {count:4d} x {fusion}{how}{served}{why}"
    for entry in refused:
        where = " ".join(part for part in (entry.module, entry.location) if part) or entry.node
        what = " reduce-scatter" if entry.collective == REDUCE_SCATTER else ""
        yield f"  refused: {where} [{entry.shape} {entry.dtype}]{what}"
        yield f"       {entry.gate}: {entry.reason}"
    for note in graph.notes:
        yield f"  note: {note}"


class _Store:
    """The accounts of this process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.graphs: list[GraphAccount] = []
        self.next_number = 0

    def add(self, account: GraphAccount) -> GraphAccount:
        with self.lock:
            numbered = dataclasses.replace(
                account,
                number=self.next_number,
                entries=tuple(dataclasses.replace(e, graph=self.next_number) for e in account.entries),
            )
            self.next_number += 1
            self.graphs.append(numbered)
        return numbered


_STORE = _Store()


def report() -> Report:
    """The account of every graph compiled in this process so far (since the last `clear_report()`)."""
    with _STORE.lock:
        return Report(tuple(_STORE.graphs))


def clear_report() -> None:
    """Forget the accounts so far."""
    with _STORE.lock:
        _STORE.graphs.clear()
        _STORE.next_number = 0


def add_account(account: GraphAccount) -> GraphAccount:
    """Add the account of one graph, giving it the next number."""
    return _STORE.add(account)


def accounts_from_json(text: str) -> list[GraphAccount]:
    """Accounts kept beside the compile cache."""
    return [
        GraphAccount(
            **{
                **data,
                "entries": tuple(Entry(**e) for e in data["entries"]),
                "notes": tuple(data["notes"]),
                "fingerprints": tuple(GroupFingerprint(**f) for f in data["fingerprints"]),
                "unfused": tuple(data["unfused"]),
                "pictures": tuple(_picture_from(p) for p in data["pictures"]),
            }
        )
        for data in json.loads(text)
    ]


def _picture_from(data: Any) -> Picture:
    return Picture(*(_drawing_from(data[key]) for key in ("before", "after")))  # type: ignore[arg-type]


def _drawing_from(data: Any) -> Drawing | None:
    if data is None:
        return None
    return Drawing(tuple(Box(**box) for box in data["boxes"]), tuple((a, b, text) for a, b, text in data["edges"]))


def accounts_to_json(accounts: Iterable[GraphAccount]) -> str:
    """The inverse of `accounts_from_json`."""
    return json.dumps([dataclasses.asdict(account) for account in accounts])


def entry_of(site: AllReduce) -> Entry:
    """An entry for an all-reduce that has not been judged yet."""
    x = value_of(site.x)
    return Entry(
        graph=-1,
        node=site.name,
        status=REFUSED,
        location=source_location(site.node),
        module=module_path(site.node),
        group=site.group if isinstance(site.group, str) else "",
        shape="" if x is None else str(list(x.shape)).replace(" ", ""),
        dtype="" if x is None else str(x.dtype).removeprefix("torch."),
        collective=REDUCE_SCATTER if site.spelling.scatters else ALL_REDUCE,
    )


def source_location(node: Node) -> str:
    """Where in the user's source the node comes from, as "file:line", or ""."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    own = [frame for frame in frames if not _MACHINERY.search(frame[0])]
    for path, line, _ in reversed(own or frames):
        return f"{os.path.basename(os.path.dirname(path))}/{os.path.basename(path)}:{line}"
    return ""


def module_path(node: Node) -> str:
    """The path of the innermost module that the node comes from, or ""."""
    stack = node.meta.get("nn_module_stack") or {}
    for path, _ in reversed(list(stack.values())):
        path = re.sub(r"^L\['self'\]|^L__self___?|^[LG](?=\[)", "", str(path))
        return re.sub(r"\._modules\['([^']+)'\]|\[['\"]?([^'\"\]]+)['\"]?\]", r".\1\2", path).lstrip(".")
    return ""
