"""Format reports as text for people."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from fusewire.custom_ops.dispatch.served import ServedCalls
from fusewire.fusion_passes.report.model import ALL_REDUCE, FUSED, REDUCE_SCATTER, Entry, GraphReport

_PLURALS = {ALL_REDUCE: "all-reduces", REDUCE_SCATTER: "reduce-scatters"}


def collectives_in(entries: Sequence[Entry]) -> str:
    """Return the kinds of these collectives: "all-reduces", "reduce-scatters" or both."""
    kinds = {entry.collective for entry in entries} or {ALL_REDUCE}
    return " and ".join(name for kind, name in _PLURALS.items() if kind in kinds)


def count_entries(graphs: Iterable[GraphReport], collective: str = "") -> tuple[int, int]:
    """Return how many collectives were fused, and how many there are, in the running model.

    Args:
        graphs: each counts for the places of the model that run it.
        collective: count this kind only, if given.
    """
    fused = found = 0
    for graph in graphs:
        entries = [entry for entry in graph.entries if collective in ("", entry.collective)]
        fused += graph.uses * sum(entry.status == FUSED for entry in entries)
        found += graph.uses * len(entries)
    return fused, found


def describe_counts(graphs: Sequence[GraphReport]) -> str:
    """Return how many were fused, such as "4 of 5 all-reduces and 2 of 2 reduce-scatters"."""
    counts = {name: count_entries(graphs, kind) for kind, name in _PLURALS.items()}
    parts = [f"{fused} of {found} {name}" for name, (fused, found) in counts.items() if found]
    return " and ".join(parts) or f"0 of 0 {_PLURALS[ALL_REDUCE]}"


def describe_graphs(graphs: Sequence[GraphReport]) -> str:
    """Return the counts of graphs as one line: fused, found, refused, and not read."""
    fused, found = count_entries(graphs)
    unread = _describe_unread(graphs)
    if unread and not found:
        call = "the graph calls" if len(graphs) == 1 else "the graphs call"
        return f"found no all-reduce that it can read, but {call} {unread}"
    text = f"{describe_counts(graphs)} fused in {len(graphs)} graph{'s' * (len(graphs) != 1)}"
    places = sum(graph.uses for graph in graphs)
    if places > len(graphs):
        text += f", which {places} places of the model run"
    if found > fused:
        text += f", {found - fused} refused"
    return text + (f"; besides, there are calls that it cannot read: {unread}" if unread else "")


def _describe_unread(graphs: Iterable[GraphReport]) -> str:
    """Return which operators that no pass reads are called how often, or ""."""
    counts = Counter[str]()
    for graph in graphs:
        for item in graph.unread:
            counts[item.op] += graph.uses * item.calls
    return ", ".join(f"{op} {count} time{'s' * (count != 1)}" for op, count in counts.items())


def describe_graph(graph: GraphReport) -> Iterator[str]:
    """Yield the lines on one graph: a heading, its fusions, its refusals and its notes."""
    fused = [entry for entry in graph.entries if entry.status == FUSED]
    kind = graph.kind + (", from the compile cache" if graph.cached else "")
    scattered = sum(entry.collective == REDUCE_SCATTER for entry in graph.entries)
    others = f" and {scattered} reduce-scatters" if scattered else ""
    places = f", run in {graph.uses} places of the model" if graph.uses > 1 else ""
    yield (
        f"graph {graph.number} ({kind}): {len(graph.entries) - scattered} all-reduces{others}, "
        f"{len(fused)} fused{places}"
    )
    alike = Counter((e.fusion, e.spelling, e.provider, e.reason) for e in fused)
    for (fusion, spelling, provider, reason), count in alike.items():
        how = f", norm spelled {spelling}" if spelling else ""
        served = f", provider {provider}" if provider else ""
        yield f"  {count:4d} x {fusion}{how}{served}" + (f" ({reason})" if reason else "")
    for entry in graph.entries:
        if entry.status != FUSED:
            yield from _describe_refused(entry)
    yield from _describe_unread_in(graph)
    for note in graph.notes:
        yield f"  note: {note}"


def _describe_unread_in(graph: GraphReport) -> Iterator[str]:
    for item in graph.unread:
        yield f"  not read: {item.calls} x {item.op}"
        yield f"       an operator of its own that fusewire does not rewrite: {item.reason}"


def _describe_refused(entry: Entry) -> Iterator[str]:
    where = " ".join(filter(None, (entry.module, entry.location))) or entry.node
    what = " reduce-scatter" if entry.collective == REDUCE_SCATTER else ""
    yield f"  refused: {where} [{entry.shape} {entry.dtype}]{what}"
    yield f"       {entry.gate}: {entry.reason}"


def describe_served(served: Iterable[ServedCalls]) -> Iterator[str]:
    """Yield a heading and one line for each operator, group, dtype and hidden size that was called.

    Neighbouring numbers of tokens that one provider served are shown as one range. Below stand the
    reasons why others have no workspace.
    """
    rows = sorted(served)
    if rows:
        yield "served since start (calls that a CUDA graph replays run no host code and are not counted):"
    for (op, group, hidden, dtype), same in itertools.groupby(rows, key=lambda row: row[:4]):
        calls = list(same)
        ranges = itertools.groupby(calls, key=lambda row: row.provider)
        listed = ", ".join(_describe_range(provider, list(found)) for provider, found in ranges)
        yield f"  {op}, hidden {hidden}, {dtype}, group {group}: {listed}"
        yield from (f"       {reason}" for reason in dict.fromkeys(row.reason for row in calls) if reason)


def _describe_range(provider: str, rows: Sequence[ServedCalls]) -> str:
    first, last = rows[0].tokens, rows[-1].tokens
    tokens = f"{first} token{'s' * (first != 1)}" if first == last else f"{first}-{last} tokens"
    calls, captured = sum(row.calls for row in rows), sum(row.captured for row in rows)
    parts = [f"{calls} call{'s' * (calls != 1)}"] if calls or not captured else []
    parts += [f"{captured} captured"] if captured else []
    return f"{provider} {tokens} ({', '.join(parts)})"
