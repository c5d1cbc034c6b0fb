"""Show the graphs that the passes rewrite to an observer, as for `fusewire explain`'s pictures."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Protocol

from torch.fx import Graph

from fusewire.fusion_passes.report.model import GraphReport


class Observer(Protocol):
    """Watches the passes over one graph. Its methods raise nothing."""

    def fused(self, graph: Graph) -> None:
        """Look at the graph after a pass that fuses, before operators are lowered."""

    def complete(self, report: GraphReport) -> GraphReport:
        """Return the graph's report with what was observed."""


_start: Callable[[Graph], Observer] | None = None


@contextlib.contextmanager
def observed(start: Callable[[Graph], Observer]) -> Iterator[None]:
    """Within the block, call `start(graph)` for an observer of each graph, in all threads.

    `graph` is a copy that nobody changes.
    """
    global _start
    before, _start = _start, start
    try:
        yield
    finally:
        _start = before


def observer_of(copy: Callable[[], Graph]) -> Observer | None:
    """Return an observer of the graph that `copy` returns; None, without a copy, if none is set."""
    return None if _start is None else _start(copy())
