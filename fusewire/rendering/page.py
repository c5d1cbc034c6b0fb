"""Render the report as one self-contained HTML page, which works without a network.

page.html is its frame; page.css and page.js are put into it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from string import Template

from fusewire.fusion_passes.context import MERGED
from fusewire.fusion_passes.report.model import FUSED, Entry, GraphReport
from fusewire.fusion_passes.report.store import Report
from fusewire.fusion_passes.report.text import collectives_in, describe_served
from fusewire.patterns.norms import TAILS
from fusewire.rendering.drawing import Drawing, Picture, draw

_WHO = {tail.name: f"{tail.who} ({tail.name})" for tail in TAILS}
# The roles of boxes in pictures.
_LEGEND = {
    "collective": "communication",
    "norm": "RMSNorm, step by step",
    "fused": "fused operator",
    "step": "step between",
    "input": "what comes in",
    "reader": "what reads the result",
    "obstacle": "what prevents the fusion",
}
_COLUMNS = ("picture", "status", "module", "source line", "gate", "reason", "spelling", "provider", "input")
_OPTIONAL = {"gate", "reason", "spelling", "provider"}  # left out of tables if empty

Kind = tuple["Picture | None", str, str]


def page(
    report: Report,
    title: str,
    facts: Sequence[tuple[str, str]] = (),
    notices: Sequence[str] = (),
    graph_breaks: Mapping[str, int] | None = None,
) -> str:
    """Return the HTML page of a report.

    Args:
        report: the report to show.
        title: what was run.
        facts: further lines for the head of the page, as (name, value).
        notices: errors and advice, shown first.
        graph_breaks: how often each reason broke a graph.
    """
    kinds = _kinds(report)
    letters = {key: _letter(i) for i, key in enumerate(kinds)}
    parts = [
        _head(report, title, facts),
        *(f'<p class="notice">{escape(text)}</p>' for text in (*notices, *report.notes)),
        _filters(report),
        _cards(kinds, letters),
        '<h2>Every all-reduce</h2><p class="empty" hidden>No all-reduce is left to show.</p>',
        *(_graph(graph, letters) for graph in report.graphs if graph.entries),
        _without(report),
        _served(report),
        _breaks(graph_breaks or {}),
    ]
    # "<" is escaped, so that no text can end the script element.
    data = json.dumps(report.to_dict()).replace("<", "\\u003c")
    html, style, script = (
        resources.files(__package__).joinpath(f"page.{kind}").read_text("utf-8") for kind in ("html", "css", "js")
    )
    body = "".join(filter(None, parts))
    return Template(html).substitute(title=escape(title), style=style, body=body, data=data, script=script)


def _kinds(report: Report) -> dict[Kind, list[tuple[Entry, Picture | None]]]:
    """Group the all-reduces by outcome: the refused first, then the largest groups."""
    found: dict[Kind, list[tuple[Entry, Picture | None]]] = {}
    for graph in report.graphs:
        for entry in graph.entries:
            found.setdefault(_kind(graph, entry), []).append((entry, _picture(graph, entry)))
    return dict(sorted(found.items(), key=lambda item: (item[0][1] == FUSED, -len(item[1]))))


def _kind(graph: GraphReport, entry: Entry) -> Kind:
    """Return the key of an all-reduce's card: for a refused one the reason, else the picture."""
    if entry.status != FUSED:
        return None, entry.status, _without_numbers(entry.reason)
    picture = _picture(graph, entry)
    return picture, entry.status, entry.fusion if picture is None else ""


def _without_numbers(reason: str) -> str:
    """Return a reason without the numbers at the end of nodes' names."""
    return re.sub(r"\b([a-z]\w*?)_\d+\b", r"\1", reason)


def _picture(graph: GraphReport, entry: Entry) -> Picture | None:
    return graph.pictures[entry.picture] if entry.picture >= 0 else None


def _letter(index: int) -> str:
    return chr(ord("A") + index) if index < 26 else str(index + 1)


# --- The parts of the page ------------------------------------------------------------------------


def _head(report: Report, title: str, facts: Sequence[tuple[str, str]]) -> str:
    share = 100 * report.fused / report.found if report.found else 0
    graphs = len(report.graphs)
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts)
    return (
        f'<header><p class="brand">fusewire explain</p><h1>{escape(title)}</h1>'
        f'<p class="count"><b>{report.fused}</b> of <b>{report.found}</b> {collectives_in(report.entries)} fused</p>'
        f'<div class="bar" role="img" aria-label="{share:.0f}% fused"><i style="width:{share:.1f}%"></i></div>'
        f'<p class="summary">in {graphs} graph{"s" * (graphs != 1)}; the passes took {report.pass_seconds:.2f} s</p>'
        f"<dl>{rows}</dl></header>"
    )


def _filters(report: Report) -> str:
    if not report.found:
        return ""
    rows, fused = len(report.entries), sum(entry.status == FUSED for entry in report.entries)
    counts = (("all", rows), ("fused", fused), ("refused", rows - fused))
    buttons = "".join(
        f'<button type="button" data-filter="{name}" aria-pressed="{str(name == "all").lower()}">'
        f"{name.capitalize()} <span>{count}</span></button>"
        for name, count in counts
    )
    return (
        f'<nav aria-label="Filter">{buttons}<input type="search" id="search" '
        'placeholder="module, source line, reason …" aria-label="Search"></nav>'
    )


def _cards(kinds: Mapping[Kind, list[tuple[Entry, Picture | None]]], letters: Mapping[Kind, str]) -> str:
    if not kinds:
        return ""
    legend = "".join(f'<li><i class="{role}"></i>{text}</li>' for role, text in _LEGEND.items())
    cards = "".join(_card(letters[key], key[1], found) for key, found in kinds.items())
    return f'<h2>What happened</h2><ul class="legend">{legend}</ul><div class="cards">{cards}</div>'


def _card(letter: str, status: str, found: list[tuple[Entry, Picture | None]]) -> str:
    entries = [entry for entry, _ in found]
    title, text = _explain(entries) if status == FUSED else ("not fused", _without_numbers(entries[0].reason))
    picture = Counter(picture for _, picture in found).most_common(1)[0][0]
    drawings, details = "", ""
    passed = _distinct(e.reason for e in entries if e.status == FUSED)
    if passed:
        details = f"<details><summary>providers passed over</summary>{escape(passed)}</details>"
    if picture is not None:
        after = picture.after
        drawings = _figure("left as it is" if status != FUSED else "before", picture.before)
        drawings += _figure("after", after) if after else ""
    return (
        f'<section class="card" id="kind-{letter}" data-status="{status}"><h3><a class="letter {status}" '
        f'href="#kind-{letter}">{letter}</a> {len(entries)} &times; {escape(title)}</h3>'
        f"<p>{escape(text)}</p>{details}"
        f'<div class="pair">{drawings}</div></section>'
    )


def _explain(entries: list[Entry]) -> tuple[str, str]:
    """Return the title and the explanation of fused all-reduces."""
    own = [entry for entry in entries if not entry.fusion.startswith(MERGED)]
    texts = [f"Norm spelled as in {_WHO.get(s, s)}." for s in dict.fromkeys(e.spelling for e in own) if s]
    if len(own) < len(entries):
        texts.append(f"{len(entries) - len(own)} merged into another all-reduce: one collective fewer each.")
    for provider in dict.fromkeys(entry.provider for entry in own):
        if provider == "native":
            texts.append("Served by native, plain PyTorch, which Inductor compiles with the rest of the graph.")
        elif provider:
            texts.append(f"Served by {provider}.")
    return _distinct(entry.fusion for entry in own or entries), " ".join(texts)


def _distinct(texts: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(filter(None, texts)))


def _figure(caption: str, drawing: Drawing) -> str:
    return f"<figure><figcaption>{caption}</figcaption>{draw(drawing, caption)}</figure>"


def _graph(graph: GraphReport, letters: Mapping[Kind, str]) -> str:
    fused = sum(entry.status == FUSED for entry in graph.entries)
    origin = ", from the compile cache" if graph.cached else f", passes {1000 * graph.pass_seconds:.0f} ms"
    nodes = "" if graph.cached else f", {graph.nodes_before} nodes before and {graph.nodes_after} after"
    places = f", run in {graph.uses} places of the model" if graph.uses > 1 else ""
    notes = "".join(f'<p class="notice">{escape(note)}</p>' for note in (*graph.notes, *_unread(graph)))
    rows = [_cells(entry, letters[_kind(graph, entry)]) for entry in graph.entries]
    names = [name for name in _COLUMNS if name not in _OPTIONAL or any(cells[name] for cells in rows)]
    head = "".join(f"<th scope=col>{name}</th>" for name in names)
    body = "".join(
        f'<tr data-status="{entry.status}">'
        + "".join(f'<td class="of-{name.split()[0]}">{cells[name]}</td>' for name in names)
        + "</tr>"
        for entry, cells in zip(graph.entries, rows, strict=True)
    )
    return (
        f'<section class="graph" id="graph-{graph.number}"><h3>Graph {graph.number} <small>{graph.kind}: '
        f"{len(graph.entries)} {collectives_in(graph.entries)}, {fused} fused{places}{nodes}{origin}</small></h3>{notes}"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></section>'
    )


def _cells(entry: Entry, letter: str) -> dict[str, str]:
    provider = escape(entry.provider or ("" if not entry.fusion.startswith(MERGED) else entry.fusion))
    if entry.status == FUSED and entry.reason:
        provider += f"<details><summary>why no faster one</summary>{escape(entry.reason)}</details>"
    return {
        "picture": f'<a class="letter {entry.status}" href="#kind-{letter}" title="picture {letter}">{letter}</a>',
        "status": f'<span class="status {entry.status}">{entry.status}</span>',
        "module": f"<code>{_breakable(entry.module or entry.node, './')}</code>",
        "source line": f"<code>{_breakable(entry.location, '/')}</code>",
        "gate": escape(entry.gate),
        "reason": escape(entry.reason if entry.status != FUSED else ""),
        "spelling": escape(entry.spelling),
        "provider": provider,
        "input": f"<code>{escape(f'{entry.shape} {entry.dtype}')}</code>",
    }


def _breakable(text: str, separators: str) -> str:
    """Escape a text; a line may break after these characters."""
    return re.sub(f"([{re.escape(separators)}])", r"\1<wbr>", escape(text))


def _without(report: Report) -> str:
    graphs = [graph for graph in report.graphs if not graph.entries]
    if not graphs:
        return ""
    lines = (": ".join([f"graph {g.number} ({g.kind}, {g.nodes_before} nodes)", *g.notes, *_unread(g)]) for g in graphs)
    items = "".join(f"<li>{escape(text)}</li>" for text in lines)
    return f"<h2>Graphs without an all-reduce that the passes read</h2><ul>{items}</ul>"


def _unread(graph: GraphReport) -> list[str]:
    return [
        f"calls {item.op} {item.calls} times, an operator of its own that fusewire does not rewrite: {item.reason}"
        for item in graph.unread
    ]


def _served(report: Report) -> str:
    heading, *lines = [text.strip() for text in describe_served(report.served)] or [""]
    items = "".join(f"<li>{escape(text)}</li>" for text in lines)
    return f"<h2>Who served</h2><p>{escape(heading)}</p><ul>{items}</ul>" if lines else ""


def _breaks(graph_breaks: Mapping[str, int]) -> str:
    if not graph_breaks:
        return ""
    items = "".join(f"<li>{count} &times; {escape(reason)}</li>" for reason, count in graph_breaks.items())
    return f"<h2>Graph breaks</h2><p>Nothing fuses across these.</p><ul>{items}</ul>"
