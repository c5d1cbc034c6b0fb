"""Shows the graphs that the passes rewrite to one observer, such as the pictures of `fusewire explain`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Protocol

from torch.fx import Graph

from fusewire.fusion_passes.report.model import GraphReport


class Observer(Protocol):
    """What watches the passes over one graph. An observer raises nothing."""

    def fused(self, graph: Graph) -> None:
        """Look at the graph after a pass that fuses, before operators are lowered."""

    def complete(self, report: GraphReport) -> GraphReport:
        """Return the graph's report with what was observed."""


_start: Callable[[Graph], Observer] | None = None


@contextlib.contextmanager
def observed(start: Callable[[Graph], Observer]) -> Iterator[None]:
    """Within the block, have `start(graph)` make an observer of each graph that arrives, in all threads.

    The graph is a copy that nobody changes.
    """
    global _start
    before, _start = _start, start
    try:
        yield
    finally:
        _start = before


def observer_of(copy: Callable[[], Graph]) -> Observer | None:
    """Return an observer of the graph that `copy` copies; None, and no copy, if nobody observes."""
    return None if _start is None else _start(copy())
