"""Hold the report of this process: all graphs compiled so far."""

from __future__ import annotations

import dataclasses
import json
import threading
from dataclasses import dataclass
from typing import Any

from fusewire.fusion_passes.report.model import FUSED, Entry, GraphReport
from fusewire.fusion_passes.report.text import describe_counts, describe_graph


@dataclass(frozen=True)
class Report:
    """All-reduces, and reduce-scatters of sequence parallelism, of compiled graphs.

    `str(report)` is a table for people.
    """

    graphs: tuple[GraphReport, ...] = ()

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Return every all-reduce and reduce-scatter, graph by graph."""
        return tuple(entry for graph in self.graphs for entry in graph.entries)

    @property
    def found(self) -> int:
        """Return the number of entries."""
        return len(self.entries)

    @property
    def fused(self) -> int:
        """Return the number of entries that were fused."""
        return sum(entry.status == FUSED for entry in self.entries)

    @property
    def refused(self) -> int:
        """Return the number of entries that were not fused."""
        return self.found - self.fused

    @property
    def pass_seconds(self) -> float:
        """Return the wall time of fusewire's passes over all graphs, in seconds."""
        return sum(graph.pass_seconds for graph in self.graphs)

    @property
    def summary(self) -> str:
        """Return the counts and the passes' time as one line."""
        graphs = len(self.graphs)
        text = f"fusewire: {describe_counts(self.entries)} fused in {graphs} graph{'s' * (graphs != 1)}"
        if self.refused:
            text += f", {self.refused} refused"
        return f"{text}; passes took {self.pass_seconds:.2f} s"

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data: counts, and per graph its fields and entries."""
        return {
            "found": self.found,
            "fused": self.fused,
            "refused": self.refused,
            "pass_seconds": self.pass_seconds,
            "graphs": [dataclasses.asdict(graph) for graph in self.graphs],
        }

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        return "\n".join([self.summary, *(line for graph in self.graphs for line in describe_graph(graph))])


_graphs: list[GraphReport] = []
_lock = threading.Lock()


def report() -> Report:
    """Return the report of all graphs compiled since the last `clear_report()`. Thread-safe."""
    with _lock:
        return Report(tuple(_graphs))


def clear_report() -> None:
    """Forget the graphs compiled so far. Thread-safe."""
    with _lock:
        _graphs.clear()


def add_graph_report(graph: GraphReport) -> GraphReport:
    """Add the report of one graph, and return it with the graph's number. Thread-safe."""
    with _lock:
        number = len(_graphs)
        entries = tuple(dataclasses.replace(entry, graph=number) for entry in graph.entries)
        _graphs.append(dataclasses.replace(graph, number=number, entries=entries))
        return _graphs[-1]
