"""Define the records of all-reduces (fused, or refused and why) and of graphs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fusewire.fusion_passes.spmd.fingerprint import GroupFingerprint

FUSED, REFUSED = "fused", "refused"
ALL_REDUCE, REDUCE_SCATTER = "all_reduce", "reduce_scatter"


@dataclass(frozen=True)
class Entry:
    """One all-reduce, or one reduce-scatter of sequence parallelism.

    Attributes:
        graph: number of the compiled graph, in order of compilation.
        node: the collective's node.
        status: "fused" or "refused".
        gate: which gate refused it: "match" (structure), "supported" (dtypes, shapes, group),
            "provider", or "".
        reason: why, and what to change; of a fused one, why faster providers were passed over.
        location: "file:line" in the model's source, or "".
        module: the module's path in the model, or "".
        spelling: how the norm was written (see fusewire.patterns.norms).
        fusion: the name of the fusion, or the all-reduce that this one was merged into.
        provider: the provider that computes it, if it is known at compile time.
        group: the process group's name.
        shape, dtype: of the collective's input.
        picture: which of the graph's pictures shows it; -1 if none does.
        collective: "all_reduce" or "reduce_scatter".
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
class Unread:
    """Calls in one graph of an all-reduce that is an operator of its own, which no pass reads.

    Attributes:
        op: the operator, as "_C.shm_allreduce".
        calls: the number of calls in the graph.
        reason: why the passes leave it, and what to change.
    """

    op: str
    calls: int
    reason: str


@dataclass(frozen=True)
class GraphReport:
    """What the passes did to one graph.

    Attributes:
        kind: "inference", or "training" for graphs that stay as they are.
        pass_seconds: wall time of fusewire's passes on this graph, in seconds, without waiting for
            other ranks.
        pass_processor_seconds: their processor time.
        waited_seconds: wall time of waiting for other ranks to compile the graph.
        notes: anything else to know (a pass that failed, a graph from the compile cache).
        cached: the passes did not run, since the compile cache held the finished graph; this is the
            report of the compilation that made it.
        pictures: the different subgraphs around the all-reduces (fusewire.rendering.pictures), if
            they were recorded.
        fingerprints: what each process group's ranks must have equal to run the graph.
        unfused: the groups whose collectives were left as written because the ranks' graphs differ.
        uses: how many places of the model run this one compiled graph (`add_use`). Counts of
            all-reduces count the graph so many times.
        unread: all-reduces that are operators of their own; they are not among the entries.
    """

    number: int
    kind: str
    entries: tuple[Entry, ...] = ()
    pass_seconds: float = 0.0
    nodes_before: int = 0
    nodes_after: int = 0
    notes: tuple[str, ...] = ()
    cached: bool = False
    pictures: tuple[Any, ...] = ()
    fingerprints: tuple[GroupFingerprint, ...] = ()
    unfused: tuple[str, ...] = ()
    pass_processor_seconds: float = 0.0
    waited_seconds: float = 0.0
    uses: int = 1
    unread: tuple[Unread, ...] = ()


def graph_reports_to_json(reports: Iterable[GraphReport]) -> str:
    """Return reports as JSON text, without their pictures."""
    return json.dumps([dataclasses.asdict(dataclasses.replace(report, pictures=())) for report in reports])


def graph_reports_from_json(text: str) -> list[GraphReport]:
    """Return the reports that `graph_reports_to_json` wrote."""
    return [
        GraphReport(
            **{
                **data,
                "entries": tuple(Entry(**{**entry, "picture": -1}) for entry in data["entries"]),
                "notes": tuple(data["notes"]),
                "pictures": (),
                "fingerprints": tuple(GroupFingerprint(**item) for item in data["fingerprints"]),
                "unfused": tuple(data["unfused"]),
                "unread": tuple(Unread(**item) for item in data["unread"]),
            }
        )
        for data in json.loads(text)
    ]
