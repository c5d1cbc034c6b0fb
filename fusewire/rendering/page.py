"""The report as one self-contained HTML page: nothing is loaded from anywhere, and it works without a network."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from fusewire.fusion_passes.context import MERGED
from fusewire.fusion_passes.report.model import (
    ALL_REDUCE,
    FUSED,
    REDUCE_SCATTER,
    Drawing,
    Entry,
    GraphAccount,
    Picture,
    Report,
)
from fusewire.patterns.norms import TAILS
from fusewire.rendering.drawing import draw

_WHO = {tail.name: f"{tail.who} ({tail.name})" for tail in TAILS}

Kind = tuple["Picture | None", str, str]


def page(
    report: Report,
    title: str,
    facts: Sequence[tuple[str, str]] = (),
    notices: Sequence[str] = (),
    graph_breaks: Mapping[str, int] | None = None,
) -> str:
    """The page.

    Args:
        report: the account of every all-reduce.
        title: what was run.
        facts: further lines for the head of the page, as (name, value).
        notices: what the reader should see first: errors, advice.
        graph_breaks: reasons for which Dynamo broke graphs, with how often.
    """
    kinds = _kinds(report)
    letters = {key: _letter(i) for i, key in enumerate(kinds)}
    parts = [
        _head(report, title, facts),
        *(f'<p class="notice">{escape(text)}</p>' for text in notices),
        _filters(report),
        _cards(kinds, letters),
        '<h2>Every all-reduce</h2><p class="empty" hidden>No all-reduce is left to show.</p>',
        *(_graph(graph, report, letters) for graph in report.graphs if graph.entries),
        _without(report),
        _breaks(graph_breaks or {}),
    ]
    # "<" is escaped, so that no text can end the script element.
    data = json.dumps(report.to_dict()).replace("<", "\\u003c")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # Without an icon of its own a page makes the browser ask the server for one.
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}: fusewire</title><style>{_STYLE}</style></head>\n"
        f'<body data-show="all"><main>{"".join(filter(None, parts))}</main>\n'
        f'<script type="application/json" id="report">{data}</script>\n<script>{_SCRIPT}</script></body></html>\n'
    )


def _kinds(report: Report) -> dict[Kind, list[tuple[Entry, Picture | None]]]:
    """The all-reduces by what happened to them: those refused first, then by number."""
    found: dict[Kind, list[tuple[Entry, Picture | None]]] = {}
    for graph in report.graphs:
        for entry in graph.entries:
            found.setdefault(_kind(graph, entry), []).append((entry, _picture(graph, entry)))
    return dict(sorted(found.items(), key=lambda item: (item[0][1] == FUSED, -len(item[1]))))


def _kind(graph: GraphAccount, entry: Entry) -> Kind:
    """Equal for all-reduces that one card explains: refused ones by the reason, fused ones by the picture."""
    if entry.status != FUSED:
        return None, entry.status, _without_numbers(entry.reason)
    picture = _picture(graph, entry)
    return picture, entry.status, entry.fusion if picture is None else ""


def _without_numbers(reason: str) -> str:
    """A reason in which nodes are named alike, whatever their numbers in the graph."""
    return re.sub(r"\b([a-z]\w*?)_\d+\b", r"\1", reason)


def _picture(graph: GraphAccount, entry: Entry) -> Picture | None:
    return graph.pictures[entry.picture] if entry.picture >= 0 else None


def _letter(index: int) -> str:
    return chr(ord("A") + index) if index < 26 else str(index + 1)


# --- The parts of the page ----------------------------------------------------------------------------------


def _head(report: Report, title: str, facts: Sequence[tuple[str, str]]) -> str:
    share = 100 * report.fused / report.found if report.found else 0
    graphs = len(report.graphs)
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts)
    return (
        f'<header><p class="brand">fusewire explain</p><h1>{escape(title)}</h1>'
        f'<p class="count"><b>{report.fused}</b> of <b>{report.found}</b> {_collectives(report.entries)} fused</p>'
        f'<div class="bar" role="img" aria-label="{share:.0f}% fused"><i style="width:{share:.1f}%"></i></div>'
        f'<p class="summary">in {graphs} graph{"s" * (graphs != 1)}; the passes took {report.pass_seconds:.2f} s</p>'
        f"<dl>{rows}</dl></header>"
    )


def _collectives(entries: Sequence[Entry]) -> str:
    """What these are, in a word or two."""
    kinds = {entry.collective for entry in entries} or {ALL_REDUCE}
    names = {ALL_REDUCE: "all-reduces", REDUCE_SCATTER: "reduce-scatters"}
    return " and ".join(name for kind, name in names.items() if kind in kinds)


def _filters(report: Report) -> str:
    if not report.found:
        return ""
    counts = (("all", report.found), ("fused", report.fused), ("refused", report.refused))
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
    legend = "".join(
        f'<li><i class="{role}"></i>{text}</li>'
        for role, text in (
            ("collective", "communication"),
            ("norm", "RMSNorm, step by step"),
            ("fused", "fused operator"),
            ("step", "step between"),
            ("input", "what comes in"),
            ("reader", "what reads the result"),
            ("obstacle", "what stands in the way"),
        )
    )
    cards = "".join(_card(letters[key], key[1], found) for key, found in kinds.items())
    return f'<h2>What happened</h2><ul class="legend">{legend}</ul><div class="cards">{cards}</div>'


def _card(letter: str, status: str, found: list[tuple[Entry, Picture | None]]) -> str:
    entries = [entry for entry, _ in found]
    title, words = _told(entries) if status == FUSED else ("not fused", _without_numbers(entries[0].reason))
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
        f"<p>{escape(words)}</p>{details}"
        f'<div class="pair">{drawings}</div></section>'
    )


def _told(entries: list[Entry]) -> tuple[str, str]:
    """Title and explanation of fused all-reduces."""
    own = [entry for entry in entries if not entry.fusion.startswith(MERGED)]
    words = [f"Norm spelled as in {_WHO.get(s, s)}." for s in dict.fromkeys(e.spelling for e in own) if s]
    if len(own) < len(entries):
        words.append(f"{len(entries) - len(own)} merged into another all-reduce: one collective fewer each.")
    for provider in dict.fromkeys(entry.provider for entry in own):
        if provider == "native":
            words.append("Served by native, plain PyTorch, which Inductor compiles with the rest of the graph.")
        elif provider:
            words.append(f"Served by {provider}.")
    return _distinct(entry.fusion for entry in own or entries), " ".join(words)


def _distinct(texts: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(filter(None, texts)))


def _figure(caption: str, drawing: Drawing) -> str:
    return f"<figure><figcaption>{caption}</figcaption>{draw(drawing, caption)}</figure>"


_COLUMNS = ("picture", "status", "module", "source line", "gate", "reason", "spelling", "provider", "input")
_OPTIONAL = {"gate", "reason", "spelling", "provider"}  # left out of a graph's table that has nothing for them


def _graph(graph: GraphAccount, report: Report, letters: Mapping[Kind, str]) -> str:
    fused = sum(entry.status == FUSED for entry in graph.entries)
    origin = ", from the compile cache" if graph.cached else f", passes {1000 * graph.pass_seconds:.0f} ms"
    nodes = "" if graph.cached else f", {graph.nodes_before} nodes before and {graph.nodes_after} after"
    notes = "".join(f'<p class="notice">{escape(note)}</p>' for note in graph.notes)
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
        f"{len(graph.entries)} {_collectives(graph.entries)}, {fused} fused{nodes}{origin}</small></h3>{notes}"
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
    """Text that may wrap after these characters."""
    return re.sub(f"([{re.escape(separators)}])", r"\1<wbr>", escape(text))


def _without(report: Report) -> str:
    graphs = [graph for graph in report.graphs if not graph.entries]
    if not graphs:
        return ""
    said = (": ".join([f"graph {g.number} ({g.kind}, {g.nodes_before} nodes)", *g.notes]) for g in graphs)
    items = "".join(f"<li>{escape(text)}</li>" for text in said)
    return f"<h2>Graphs without an all-reduce</h2><ul>{items}</ul>"


def _breaks(graph_breaks: Mapping[str, int]) -> str:
    if not graph_breaks:
        return ""
    items = "".join(f"<li>{count} &times; {escape(reason)}</li>" for reason, count in graph_breaks.items())
    return f"<h2>Graph breaks</h2><p>Nothing fuses across these.</p><ul>{items}</ul>"


_STYLE = """
:root{color-scheme:light dark;--ink:#1c2530;--soft:#5b6774;--line:#d7dde4;--page:#f6f8fa;--card:#fff;--wire:#8a96a3;
--good:#12784a;--goodbg:#d9f2e4;--bad:#b3261e;--badbg:#fbe1de;--com:#b45309;--combg:#fdebd0;--norm:#1d5fb0;--normbg:#dceafb}
@media (prefers-color-scheme:dark){:root{--ink:#e4e9ef;--soft:#9aa7b4;--line:#333d48;--page:#12171d;--card:#1a2129;
--wire:#74818e;--good:#58d096;--goodbg:#153b2a;--bad:#ff8a80;--badbg:#4a1f1c;--com:#f5b25c;--combg:#44300f;
--norm:#84b6f7;--normbg:#17314f}}
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1360px;margin:0 auto;padding:24px 20px 60px}
h1{margin:0;font-size:22px;overflow-wrap:anywhere}h2{margin:34px 0 10px;font-size:19px}h3{margin:0 0 6px;font-size:16px}
h3 small{font-weight:400;color:var(--soft)}.brand{margin:0;color:var(--soft);font-weight:600;letter-spacing:.04em}
.count{margin:14px 0 6px;font-size:26px}.count b{color:var(--good)}.summary{color:var(--soft);margin:8px 0}
.bar{height:10px;border-radius:5px;background:var(--badbg);overflow:hidden}.bar i{display:block;height:100%;background:var(--good)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 14px;margin:10px 0;color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
.notice{border-left:4px solid var(--com);background:var(--combg);padding:8px 12px;border-radius:0 6px 6px 0;white-space:pre-wrap}
nav{position:sticky;top:0;z-index:1;display:flex;flex-wrap:wrap;gap:8px;padding:12px 0;margin-top:12px;background:var(--page)}
button,input{font:inherit;color:inherit;background:var(--card);border:1px solid var(--line);border-radius:18px;padding:5px 14px}
button{cursor:pointer}button span{color:var(--soft)}input{flex:1;min-width:180px;max-width:380px}
button[aria-pressed=true]{background:var(--ink);color:var(--page);border-color:var(--ink)}
button[aria-pressed=true] span{color:inherit}:focus-visible{outline:2px solid var(--norm);outline-offset:2px}
body[data-show=fused] [data-status=refused],body[data-show=refused] [data-status=fused],[hidden]{display:none!important}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;list-style:none;margin:0 0 12px;padding:0;color:var(--soft);font-size:13px}
.legend i{display:inline-block;width:14px;height:14px;margin-right:6px;border-radius:4px;vertical-align:-2px;border:1.5px solid}
.cards{columns:2 560px;column-gap:16px}.card{break-inside:avoid;margin-bottom:16px}
.card,.graph{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px;min-width:0}
.card{scroll-margin-top:64px}.card:target{border-color:var(--norm);box-shadow:0 0 0 2px var(--normbg)}.card p{margin:0 0 8px;color:var(--soft)}
.card details{color:var(--soft);font-size:13px;margin-bottom:8px}.graph{margin-bottom:16px}.pair{display:flex;flex-wrap:wrap;gap:12px;justify-content:space-evenly}
figure{margin:0;min-width:0;max-width:100%;display:flex;flex-direction:column;align-items:center}
figcaption{font-size:12px;font-weight:600;letter-spacing:.08em;text-transform:uppercase;color:var(--soft);margin-bottom:4px}
svg{max-width:100%;height:auto}svg text{font:12px ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace;
text-anchor:middle;fill:var(--ink)}svg text.detail{fill:var(--soft);font-size:11px}svg text.flow{fill:var(--soft);font-size:11px;text-anchor:inherit;paint-order:stroke;stroke:var(--card);stroke-width:4px}
rect{fill:var(--card);stroke:var(--wire);stroke-width:1.2}.wire{fill:none;stroke:var(--wire);stroke-width:1.4}.tip{fill:var(--wire)}
.collective rect,i.collective{fill:var(--combg);stroke:var(--com);background:var(--combg);border-color:var(--com)}
.norm rect,i.norm{fill:var(--normbg);stroke:var(--norm);background:var(--normbg);border-color:var(--norm)}
.fused rect,i.fused{fill:var(--goodbg);stroke:var(--good);background:var(--goodbg);border-color:var(--good);stroke-width:2}
.obstacle rect,i.obstacle{fill:var(--badbg);stroke:var(--bad);background:var(--badbg);border-color:var(--bad);stroke-width:2}
.input rect{fill:none;stroke:none}.input text{fill:var(--soft)}i.input{border:none!important;background:var(--line)}
.reader rect{fill:none;stroke-dasharray:4 3}i.reader{border-style:dashed!important;border-color:var(--wire)}i.step{border-color:var(--wire)}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:14px}
th{text-align:left;color:var(--soft);font-weight:600;font-size:13px}th,td{padding:5px 10px 5px 0;border-top:1px solid var(--line);vertical-align:top}
thead th{border-top:none;white-space:nowrap}tbody tr:hover{background:var(--page)}
code{font:13px ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace}
td.of-source code,td.of-input code{white-space:nowrap}td.of-reason{min-width:16em}td details{color:var(--soft);font-size:13px;max-width:34em}td summary{white-space:nowrap}
.status,.letter{border-radius:10px;padding:1px 9px;font-weight:600;font-size:13px;text-decoration:none}
.status.fused,.letter.fused{background:var(--goodbg);color:var(--good)}.status.refused,.letter.refused{background:var(--badbg);color:var(--bad)}
"""  # noqa: E501

_SCRIPT = """
'use strict';
const buttons = [...document.querySelectorAll('[data-filter]')], search = document.getElementById('search');
const rows = [...document.querySelectorAll('tbody tr')], empty = document.querySelector('.empty');
function update() {
  const show = document.body.dataset.show, text = search ? search.value.trim().toLowerCase() : '';
  for (const button of buttons) button.setAttribute('aria-pressed', button.dataset.filter === show);
  for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(text);
  const shown = (row) => !row.hidden && (show === 'all' || row.dataset.status === show);
  for (const graph of document.querySelectorAll('.graph'))
    graph.hidden = ![...graph.querySelectorAll('tbody tr')].some(shown);
  if (empty) empty.hidden = !rows.length || rows.some(shown);
}
for (const button of buttons) button.addEventListener('click', () => {
  document.body.dataset.show = button.dataset.filter;
  history.replaceState(null, '', '#' + button.dataset.filter);
  update();
});
if (search) search.addEventListener('input', update);
const wanted = location.hash.slice(1);
if (buttons.some((button) => button.dataset.filter === wanted)) document.body.dataset.show = wanted;
update();
"""
