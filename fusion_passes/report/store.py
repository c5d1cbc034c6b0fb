"""Hold the report of this process: all graphs compiled so far."""

from __future__ import annotations

import dataclasses
import json
import threading
from dataclasses import dataclass
from typing import Any

from fusewire.custom_ops.dispatch.served import ServedCalls, forget_served, served_calls
from fusewire.fusion_passes.report.model import Entry, GraphReport
from fusewire.fusion_passes.report.text import count_entries, describe_graph, describe_graphs, describe_served


@dataclass(frozen=True)
class Report:
    """All-reduces, and reduce-scatters of sequence parallelism, of compiled graphs.

    `str(report)` is a table for people. The counts are of the running model: a graph that several
    places of it run counts so many times (`GraphReport.uses`).

    Attributes:
        served: the calls that each provider has served, by operator, group, dtype, hidden size and
            number of tokens. Arithmetic that is written into a graph (native) is no call.
        notes: anything else to know that is not of one graph.
    """

    graphs: tuple[GraphReport, ...] = ()
    served: tuple[ServedCalls, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Return every all-reduce and reduce-scatter, graph by graph."""
        return tuple(entry for graph in self.graphs for entry in graph.entries)

    @property
    def found(self) -> int:
        """Return the number of all-reduces and reduce-scatters in the running model."""
        return count_entries(self.graphs)[1]

    @property
    def fused(self) -> int:
        """Return how many of these were fused."""
        return count_entries(self.graphs)[0]

    @property
    def refused(self) -> int:
        """Return how many of these were not fused."""
        return self.found - self.fused

    @property
    def unread(self) -> int:
        """Return the number of all-reduces that are operators of their own, which no pass reads."""
        return sum(graph.uses * item.calls for graph in self.graphs for item in graph.unread)

    @property
    def pass_seconds(self) -> float:
        """Return the wall time of fusewire's passes over all graphs, in seconds."""
        return sum(graph.pass_seconds for graph in self.graphs)

    @property
    def summary(self) -> str:
        """Return the counts and the passes' time as one line."""
        return f"fusewire: {describe_graphs(self.graphs)}; passes took {self.pass_seconds:.2f} s"

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data: counts, and per graph its fields and entries."""
        return {
            "found": self.found,
            "fused": self.fused,
            "refused": self.refused,
            "unread": self.unread,
            "pass_seconds": self.pass_seconds,
            "graphs": [dataclasses.asdict(graph) for graph in self.graphs],
            "served": [calls._asdict() for calls in self.served],
            "notes": list(self.notes),
        }

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        lines = [self.summary, *(line for graph in self.graphs for line in describe_graph(graph))]
        return "\n".join([*lines, *describe_served(self.served), *(f"note: {note}" for note in self.notes)])


_graphs: list[GraphReport] = []
_notes: dict[str, None] = {}
_lock = threading.Lock()


def report() -> Report:
    """Return what was compiled, and which providers have served, since the last `clear_report()`.

    Thread-safe.
    """
    with _lock:
        return Report(tuple(_graphs), tuple(served_calls()), tuple(_notes))


def clear_report() -> None:
    """Forget the graphs compiled, and the calls served, so far. Thread-safe."""
    with _lock:
        _graphs.clear()
        _notes.clear()
        forget_served()


def add_graph_report(graph: GraphReport) -> GraphReport:
    """Add the report of one graph, and return it with the graph's number. Thread-safe."""
    with _lock:
        number = len(_graphs)
        entries = tuple(dataclasses.replace(entry, graph=number) for entry in graph.entries)
        _graphs.append(dataclasses.replace(graph, number=number, entries=entries))
        return _graphs[-1]


def add_use(graph: GraphReport) -> bool:
    """Count one more place of the model that runs a graph of this process's report. Thread-safe.

    Meant for engines that compile equal parts of a model once.

    Args:
        graph: as `run_passes` or `add_graph_report` returned it.

    Returns:
        Whether the graph is still in the report, which may have been cleared.
    """
    with _lock:
        known = _graphs[graph.number] if 0 <= graph.number < len(_graphs) else None
        if known is None or dataclasses.replace(known, uses=graph.uses) != graph:
            return False
        _graphs[graph.number] = dataclasses.replace(known, uses=known.uses + 1)
        return True


def add_note(text: str) -> None:
    """Add a note that is not of one graph to the report; a note stands there once. Thread-safe."""
    with _lock:
        _notes[text] = None
