"""Check what was fused against the option `expect_fused`.

A graph is checked when it is compiled, or found in the compile cache. That a program has any fused
all-reduce can be checked only where it is known to be whole: at the end of a block of
`fusewire.enable`, after a torch.compile without graph breaks, by an engine that compiles a model in
parts.
"""

from __future__ import annotations

from collections.abc import Sequence

from fusewire.errors import ExpectationError
from fusewire.fusion_passes.report.model import GraphReport
from fusewire.fusion_passes.report.store import Report
from fusewire.fusion_passes.report.text import count_entries, describe_counts, describe_graphs

Expected = int | str | None
ALL = "all"


def check_graph(graph: GraphReport, expected: Expected) -> None:
    """Check one graph; one without any all-reduce passes.

    Raises:
        ExpectationError: with "all", an all-reduce is not fused, or is an operator that no pass
            reads; with a number, another number is fused.
    """
    if graph.entries or graph.unread:
        _check([graph], expected)


def check_model(graphs: Sequence[GraphReport], expected: Expected) -> None:
    """Check the graphs that together are one model, each counted for the places that run it.

    Raises:
        ExpectationError: as `check_graph`; also if there is no all-reduce in any of them.
    """
    _check(graphs, expected)
    check_program(graphs, expected)


def check_program(graphs: Sequence[GraphReport], expected: Expected) -> None:
    """Check that a program has a fused all-reduce, unless none is expected.

    Raises:
        ExpectationError: there is none.
    """
    if expected and not count_entries(graphs)[0]:
        what = describe_graphs(graphs) if graphs else "nothing was compiled"
        raise ExpectationError(
            f"expect_fused={expected!r} is not met: no all-reduce of the program was fused; "
            f"{what}. Either the model is not split over ranks, or its all-reduces are issued "
            "outside the compiled part, or it was compiled before; give expect_fused only where "
            f"all-reduces are.\n{Report(tuple(graphs))}"
        )


def _check(graphs: Sequence[GraphReport], expected: Expected) -> None:
    if expected is None:
        return
    fused, found = count_entries(graphs)
    unread = any(graph.unread for graph in graphs)
    met = (fused == found and not unread) if expected == ALL else fused == expected
    if not met:
        counts = f", but {describe_counts(graphs)} were fused"
        what = f" is not met: {describe_graphs(graphs)}" if unread or not found else counts
        raise ExpectationError(f"expect_fused={expected!r}{what}.\n{Report(tuple(graphs))}")
