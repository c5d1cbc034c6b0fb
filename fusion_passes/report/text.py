"""Format reports as text for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from fusewire.fusion_passes.report.model import ALL_REDUCE, FUSED, REDUCE_SCATTER, Entry, GraphReport

_PLURALS = {ALL_REDUCE: "all-reduces", REDUCE_SCATTER: "reduce-scatters"}


def collectives_in(entries: Sequence[Entry]) -> str:
    """Return the kinds of these collectives: "all-reduces", "reduce-scatters" or both."""
    kinds = {entry.collective for entry in entries} or {ALL_REDUCE}
    return " and ".join(name for kind, name in _PLURALS.items() if kind in kinds)


def describe_counts(entries: Sequence[Entry]) -> str:
    """Return how many were fused, such as "4 of 5 all-reduces and 2 of 2 reduce-scatters"."""
    parts = []
    for kind, name in _PLURALS.items():
        found = [entry for entry in entries if entry.collective == kind]
        if found or (kind == ALL_REDUCE and not entries):
            parts.append(f"{sum(entry.status == FUSED for entry in found)} of {len(found)} {name}")
    return " and ".join(parts)


def describe_graph(graph: GraphReport) -> Iterator[str]:
    """Yield the lines on one graph: a heading, its fusions, its refusals and its notes."""
    fused = [entry for entry in graph.entries if entry.status == FUSED]
    kind = graph.kind + (", from the compile cache" if graph.cached else "")
    scattered = sum(entry.collective == REDUCE_SCATTER for entry in graph.entries)
    others = f" and {scattered} reduce-scatters" if scattered else ""
    yield f"graph {graph.number} ({kind}): {len(graph.entries) - scattered} all-reduces{others}, {len(fused)} fused"
    alike = Counter((e.fusion, e.spelling, e.provider, e.reason) for e in fused)
    for (fusion, spelling, provider, reason), count in alike.items():
        how = f", norm spelled {spelling}" if spelling else ""
        served = f", provider {provider}" if provider else ""
        yield f"  {count:4d} x {fusion}{how}{served}" + (f" ({reason})" if reason else "")
    for entry in graph.entries:
        if entry.status != FUSED:
            yield from _describe_refused(entry)
    for note in graph.notes:
        yield f"  note: {note}"


def _describe_refused(entry: Entry) -> Iterator[str]:
    where = " ".join(filter(None, (entry.module, entry.location))) or entry.node
    what = " reduce-scatter" if entry.collective == REDUCE_SCATTER else ""
    yield f"  refused: {where} [{entry.shape} {entry.dtype}]{what}"
    yield f"       {entry.gate}: {entry.reason}"
