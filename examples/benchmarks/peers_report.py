"""Report the rows that peers.py measured: limits, tables, CSV, JSON and pictures. Imports no torch."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

PEER = "peer"
# A peer whose input already lies in its own buffer, as if the layer before wrote it there.
SPARED = "peer, copy spared"
FUSEWIRE, SHARDED, CHOSEN, COPY = "fusewire", "fusewire, sharded residual", "fusewire's own choice", "plain copy"
FULL = (FUSEWIRE, CHOSEN)
KINDS = (PEER, SPARED, FUSEWIRE, SHARDED, CHOSEN, COPY)
LARGE, LARGER = 512, 2048  # tokens
MOST_FILES = 8
_OTHER_FILES = 3  # peers.csv, peers.json, peers.md


@dataclasses.dataclass(frozen=True)
class Row:
    """One candidate at one size.

    Attributes:
        column: of the table; candidates that differ in detail share one, which shows the fastest.
        us: microseconds per call on the slowest rank (median of the rounds' medians), or None if it was not timed.
        sent: of a plain copy, the bytes that each GPU sends in that time.
        note: why there is no time; or what the dispatcher chose.
    """

    world_size: int
    hidden: int
    tokens: int
    candidate: str
    column: str
    kind: str
    us: float | None
    sent: int = 0
    note: str = ""


class Best(NamedTuple):
    """The fastest candidate of some kinds at a size."""

    us: float
    candidate: str


@dataclasses.dataclass(frozen=True)
class Size:
    """All rows of one world size, hidden size and number of tokens; bf16."""

    world_size: int
    hidden: int
    tokens: int
    rows: tuple[Row, ...]

    def best(self, *kinds: str) -> Best | None:
        """Return the fastest of these kinds, if any was timed."""
        found = [Best(row.us, row.candidate) for row in self.rows if row.us is not None and row.kind in kinds]
        return min(found) if found else None

    def ratio(self, *kinds: str, peers: tuple[str, ...] = (PEER,)) -> float | None:
        """Return the time of the fastest of these kinds over the best peer's; below 1 is faster."""
        ours, theirs = self.best(*kinds), self.best(*peers)
        return ours.us / theirs.us if ours and theirs else None

    def link_rate(self) -> float | None:
        """Return the bytes per second that each GPU sends in a plain copy to all peers at once."""
        rates = [row.sent / row.us * 1e6 for row in self.rows if row.kind == COPY and row.us]
        return max(rates) if rates else None

    def rate_share(self, *kinds: str) -> float | None:
        """Return the rate at which the fastest of these kinds sends, over the plain copy's."""
        ours, copy = self.best(*kinds), self.link_rate()
        return None if ours is None or copy is None else self.sent / (ours.us * 1e-6) / copy

    @property
    def sent(self) -> float:
        """Return the bytes that a two-shot all-reduce of bf16 numbers sends from each GPU."""
        return 2 * (self.world_size - 1) / self.world_size * self.tokens * self.hidden * 2


def sizes(rows: Iterable[Row]) -> list[Size]:
    """Return the rows by size, in order."""
    found: dict[tuple[int, int, int], list[Row]] = {}
    for row in rows:
        found.setdefault((row.world_size, row.hidden, row.tokens), []).append(row)
    return [Size(*key, tuple(found[key])) for key in sorted(found)]


# --- The bars -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Bar:
    """A limit on a number of every size that it applies to."""

    name: str
    limit: float
    value: Callable[[Size], float | None]
    applies: Callable[[Size], bool]
    least: bool = False  # the limit is a lower one
    strict: bool = False

    def holds(self, value: float) -> bool:
        if self.least:
            return value >= self.limit
        return value < self.limit if self.strict else value <= self.limit

    @property
    def words(self) -> str:
        return f"{'at least' if self.least else 'below' if self.strict else 'at most'} {self.limit:.2f}"


def _from(tokens: int, *world_sizes: int) -> Callable[[Size], bool]:
    return lambda size: size.tokens >= tokens and (not world_sizes or size.world_size in world_sizes)


BARS = (
    Bar("best of fusewire / best peer, every size", 1.03, lambda s: s.ratio(*FULL), _from(1)),
    Bar("fusewire's own choice / best peer, every size", 1.03, lambda s: s.ratio(CHOSEN), _from(1)),
    Bar("sharded residual / best peer, from 512 tokens", 0.75, lambda s: s.ratio(SHARDED), _from(LARGE)),
    Bar("full residual / best peer, from 512 tokens", 1.0, lambda s: s.ratio(*FULL), _from(LARGE), strict=True),
    Bar("full residual / best peer, from 512 tokens, 4 and 8 GPUs", 0.9, lambda s: s.ratio(*FULL), _from(LARGE, 4, 8)),
    Bar(
        "share of a plain copy's rate, sharded residual, from 2048 tokens",
        0.9,
        lambda s: s.rate_share(SHARDED),
        _from(LARGER),
        least=True,
    ),
    Bar(
        "share of a plain copy's rate, full residual, from 2048 tokens",
        0.9,
        lambda s: s.rate_share(*FULL),
        _from(LARGER),
        least=True,
    ),
)


class Judged(NamedTuple):
    """A bar and the measured sizes. `met` is None where no size that it applies to was measured."""

    bar: str
    limit: str
    met: bool | None
    worst: float | None
    at: str
    sizes: int
    unmeasured: tuple[str, ...]


def judge(found: Sequence[Size], bars: Sequence[Bar] = BARS) -> list[Judged]:
    """Compare every size with every bar."""
    judged = []
    for bar in bars:
        meant = [size for size in found if bar.applies(size)]
        values = [(value, size) for size in meant if (value := bar.value(size)) is not None]
        without = tuple(_at(size) for size in meant if bar.value(size) is None)
        if not values:
            judged.append(Judged(bar.name, bar.words, None, None, "", 0, without))
            continue
        worst, size = (min if bar.least else max)(values, key=lambda pair: pair[0])
        met = all(bar.holds(value) for value, _ in values)
        judged.append(Judged(bar.name, bar.words, met, worst, _at(size), len(values), without))
    return judged


def _at(size: Size) -> str:
    return f"{size.tokens} x {size.hidden} on {size.world_size}"


def bars_table(judged: Sequence[Judged]) -> str:
    """Return the bars as a markdown table."""
    lines = ["| bar | limit | verdict | worst | at (tokens x hidden on ranks) |", "|---|---|---|---|---|"]
    for one in judged:
        verdict = {None: "not measured", True: "met", False: "MISSED"}[one.met]
        verdict += f" ({one.sizes} sizes)" if one.sizes else ""
        verdict += f", {len(one.unmeasured)} without a number" if one.unmeasured and one.sizes else ""
        worst = "" if one.worst is None else f"{one.worst:.3f}"
        lines.append(f"| {one.bar} | {one.limit} | {verdict} | {worst} | {one.at} |")
    return "\n".join(lines)


# --- Tables -------------------------------------------------------------------------------------------------


def table(found: Sequence[Size]) -> str:
    """Return the sizes of one world size and hidden size as a markdown table."""
    columns = [c for c in dict.fromkeys(r.column for s in found for r in s.rows if r.kind != COPY) if c]
    shown = [c for c in columns if any(r.us is not None for s in found for r in s.rows if r.column == c)]
    ratios = [("full / best peer", FULL), ("sharded / best peer", (SHARDED,))]
    header = [
        "tokens",
        *shown,
        "best peer",
        *(name for name, _ in ratios),
        "copy spared: full / best",
        "share of a copy's rate",
    ]
    lines = ["| " + " | ".join(header) + " |", "|--:" * len(header) + "|"]
    for size in found:
        cells = [str(size.tokens)]
        for column in shown:
            times = [row.us for row in size.rows if row.column == column and row.us is not None]
            cells.append(f"{min(times):.1f}" if times else "")
        best = size.best(PEER)
        cells.append(best.candidate if best else "")
        spared = size.ratio(*FULL, peers=(PEER, SPARED)) if size.best(SPARED) else None
        numbers = [*(size.ratio(*kinds) for _, kinds in ratios), spared, size.rate_share(*FULL, SHARDED)]
        cells += ["" if number is None else f"{number:.2f}" for number in numbers]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def left_out(found: Sequence[Size]) -> list[str]:
    """Return what has no time and why, one line for each candidate and reason."""
    reasons: dict[tuple[str, str], list[int]] = {}
    for size in found:
        for row in size.rows:
            if row.us is None:
                reasons.setdefault((row.candidate, row.note or "no reason given"), []).append(size.tokens)
    every = {size.tokens for size in found}
    lines = []
    for (candidate, reason), tokens in reasons.items():
        where = "" if set(tokens) == every else f" at {', '.join(map(str, sorted(tokens)))} tokens"
        lines.append(f"- {candidate}{where}: {reason}")
    return lines


def report(rows: Sequence[Row], facts: dict[str, Any]) -> str:
    """Return the report in markdown: conditions, a table for each hidden size, what was left out, bars."""
    found = sizes(rows)
    versions = ", ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items())
    parts = [f"{facts.get('gpu', 'unknown device')}, driver {facts.get('driver', 'unknown')}; {versions}; bf16, with "]
    parts[0] += f"residual and weight; {facts.get('date', 'no date')}. Microseconds per call, slowest rank."
    for world_size, hidden in dict.fromkeys((size.world_size, size.hidden) for size in found):
        some = [size for size in found if (size.world_size, size.hidden) == (world_size, hidden)]
        parts += [f"### {world_size} ranks, hidden size {hidden}", table(some)]
        rates = [rate for size in some if (rate := size.link_rate())]
        if rates:
            low, high = min(rates) / 1e9, max(rates) / 1e9
            parts.append(f"A plain copy to all peers at once: {low:.0f} to {high:.0f} GB/s from each GPU.")
        out = left_out(some)
        if out:
            parts.append("Left out:\n\n" + "\n".join(out))
    parts += ["\n".join(f"- {note}" for note in facts.get("notes", ()))] if facts.get("notes") else []
    parts += ["### Bars", bars_table(judge(found))]
    return "\n\n".join(parts) + "\n"


# The candidates whose times a cost table holds, by the names in fusewire's cost_tables.py.
COSTS = {
    "NATIVE": "NCCL + Inductor",
    "ONE_SHOT": "flashinfer one-shot, as a provider",
    "TWO_SHOT": "flashinfer two-shot, as a provider",
    "SYMM_ONE_SHOT": "symm_mem one-shot",
    "SYMM_TWO_SHOT": "symm_mem two-shot",
}


def cost_tables(rows: Sequence[Row], facts: dict[str, Any]) -> str:
    """Return the entries of custom_ops/dispatch/cost_tables.py for these measurements, as source."""
    entries, gpu, date = [], facts.get("gpu", "unknown GPU"), str(facts.get("date", "no date"))[:10]
    found = sizes(rows)
    for world_size, hidden in dict.fromkeys((size.world_size, size.hidden) for size in found):
        some = [row for size in found if (size.world_size, size.hidden) == (world_size, hidden) for row in size.rows]
        lines = [f"({gpu!r},),", f"{world_size},", f"{hidden},", "torch.bfloat16,"]
        lines += [f'"measured on {world_size} x {gpu}, {date}",', "{"]
        for name, candidate in COSTS.items():
            times = [f"({row.tokens}, {row.us:.1f})" for row in some if row.candidate == candidate and row.us]
            if times:
                lines.append(f"    {name}: ({', '.join(times)},),")
        entries += ["    ShippedTable(", *(f"        {line}" for line in (*lines, "},")), "    ),"]
    return "\n".join(entries)


# --- Files --------------------------------------------------------------------------------------------------

_FIELDS = tuple(field.name for field in dataclasses.fields(Row))


def write_csv(rows: Sequence[Row], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(_FIELDS)
        for row in rows:
            values = dataclasses.asdict(row)
            values["us"] = "" if row.us is None else f"{row.us:.3f}"
            writer.writerow(values[name] for name in _FIELDS)


def read_csv(path: Path) -> list[Row]:
    """Raises ValueError if it is not such a file."""
    with path.open(newline="") as file:
        lines = list(csv.reader(file))
    if not lines or tuple(lines[0]) != _FIELDS:
        raise ValueError(f"{path} is no peers.csv: its first line must be {','.join(_FIELDS)}")
    rows = []
    for number, line in enumerate(lines[1:], 2):
        try:
            values: dict[str, Any] = dict(zip(_FIELDS, line, strict=True))
            for name in ("world_size", "hidden", "tokens", "sent"):
                values[name] = int(values[name])
            values["us"] = float(values["us"]) if values["us"] else None
            if values["kind"] not in KINDS:
                raise ValueError(f"unknown kind {values['kind']!r}")
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        rows.append(Row(**values))
    return rows


def check_files(world_sizes: int, hidden_sizes: int) -> None:
    """Raises ValueError if a run would leave more files than MOST_FILES."""
    if world_sizes * hidden_sizes + _OTHER_FILES > MOST_FILES:
        most = MOST_FILES - _OTHER_FILES
        raise ValueError(f"{world_sizes * hidden_sizes} pictures are too many, {most} are the most: a run leaves at most "
                         f"{MOST_FILES} files; ask for fewer hidden sizes")  # fmt: skip


def save(rows: Sequence[Row], facts: dict[str, Any], out: Path, pictures: bool) -> list[str]:
    """Write peers.csv, peers.json, peers.md and, if asked, a picture for each world size and hidden size.

    Returns:
        What could not be written, and why.
    """
    out.mkdir(parents=True, exist_ok=True)
    found = sizes(rows)
    write_csv(rows, out / "peers.csv")
    judged = [one._asdict() for one in judge(found)]
    data = {**facts, "bars": judged, "rows": [dataclasses.asdict(row) for row in rows]}
    (out / "peers.json").write_text(json.dumps(data, indent=1) + "\n")
    (out / "peers.md").write_text(report(rows, facts))
    if not pictures:
        return []
    if importlib.util.find_spec("matplotlib") is None:
        return ["no pictures: matplotlib is not installed; `peers.py --from peers.csv --out DIR` draws them elsewhere"]
    for world_size, hidden in dict.fromkeys((size.world_size, size.hidden) for size in found):
        some = [size for size in found if (size.world_size, size.hidden) == (world_size, hidden)]
        draw(some, out / f"peers_{world_size}x{hidden}.png", str(facts.get("gpu", "")))
    return []


_STYLE = {PEER: ("-", 1.3), SPARED: (":", 1.0), FUSEWIRE: ("-", 2.2), SHARDED: ("--", 2.2), CHOSEN: ("-", 3.2)}


def _timed(size: Size, column: str) -> bool:
    return any(row.us and row.column == column for row in size.rows)


def draw(found: Sequence[Size], path: Path, device: str) -> None:
    """Draw time against tokens, a line for each column, and below it the ratio to the best peer."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 11), dpi=100, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    rows = [row for size in found for row in size.rows if row.us and row.kind != COPY]
    columns = sorted(dict.fromkeys((row.kind, row.column) for row in rows), key=lambda pair: KINDS.index(pair[0]))
    ours, theirs = colormaps["autumn"], colormaps["tab20b"]
    for number, (kind, column) in enumerate(columns):
        times = [(s, min(r.us for r in s.rows if r.column == column and r.us)) for s in found if _timed(s, column)]
        line, width = _STYLE[kind]
        colour = theirs(number % 12) if kind in (PEER, SPARED) else ours((number * 0.23) % 0.9)
        style = {"linestyle": line, "linewidth": width, "marker": "os^vDPX*"[number % 8], "markersize": 4}
        style["color"] = "black" if kind == CHOSEN else colour
        above.plot([s.tokens for s, _ in times], [us for _, us in times], label=column.replace("`", ""), **style)
        ratios = [(s.tokens, us / best.us) for s, us in times if (best := s.best(PEER))]
        below.plot([t for t, _ in ratios], [ratio for _, ratio in ratios], **style)
    rates = [rate for size in found if (rate := size.link_rate())]
    if rates:
        copied = [(s, s.sent / max(rates) * 1e6) for s in found]
        floor = {"linestyle": (0, (1, 1)), "linewidth": 1.6, "color": "#444444"}
        above.plot([s.tokens for s, _ in copied], [us for _, us in copied], label="a plain copy of the bytes", **floor)
        shares = [(s.tokens, us / best.us) for s, us in copied if (best := s.best(PEER))]
        below.plot([t for t, _ in shares], [share for _, share in shares], **floor)
        above.set_ylim(bottom=min(row.us for row in rows) * 0.7)
    for limit in (1.03, 0.9, 0.75):
        below.axhline(limit, color="#999999", linewidth=0.8, linestyle=(0, (2, 3)))
    tokens = sorted({size.tokens for size in found})
    above.set_yscale("log")
    below.set_xscale("log", base=2)
    below.set_xticks(tokens, [str(t) for t in tokens], rotation=45)
    below.minorticks_off()
    below.set_ylim(0, 2.5)
    below.set_xlabel("tokens")
    above.set_ylabel("microseconds per call (slowest rank)")
    below.set_ylabel("time / best peer's time")
    where = f"{found[0].world_size} ranks, {device}".rstrip(", ")
    above.set_title(f"all-reduce + add + RMSNorm, bf16, hidden size {found[0].hidden}, {where}", loc="left")
    for panel in (above, below):
        panel.grid(True, color="#e3e3e3", linewidth=0.7)
    above.legend(fontsize=8, ncols=2, frameon=False, loc="upper left")
    figure.savefig(path)
