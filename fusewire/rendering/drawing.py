"""Draw subgraphs as inline SVG: boxes in layers, with edges that point down."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from itertools import pairwise

GAP_X, GAP_Y, MARGIN = 18, 23, 8
LINE, PADDING, CHARACTER = 15, 9, 7.3
_SWEEPS, _STRAIGHT = 12, 6.0


@dataclass(frozen=True)
class Box:
    """One box of a drawing: its text, its role (which sets its colour), and a second line."""

    label: str
    role: str
    detail: str = ""


@dataclass(frozen=True)
class Drawing:
    """Boxes, and edges (from, to, text), where from and to are positions in `boxes`."""

    boxes: tuple[Box, ...]
    edges: tuple[tuple[int, int, str], ...]


@dataclass(frozen=True)
class Picture:
    """The subgraph around an all-reduce before the passes, and after them (None if not fused)."""

    before: Drawing
    after: Drawing | None = None


@dataclass(eq=False)
class _Slot:
    """A place in a layer, for a box or for an edge that crosses the layer. x, y: its middle."""

    layer: int
    box: Box | None = None
    width: float = 6.0
    height: float = 0.0
    place: float = 0
    x: float = 0.0
    y: float = 0.0
    linked: list[_Slot] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.box is not None:
            self.width = CHARACTER * max(len(self.box.label), len(self.box.detail)) + 2 * PADDING
            self.height = 1.5 * PADDING + LINE * (2 if self.box.detail else 1)


def draw(drawing: Drawing, label: str) -> str:
    """Return a drawing as inline SVG, with boxes in layers from top to bottom."""
    slots, chains = _slots(drawing)
    layers = [[slot for slot in slots if slot.layer == n] for n in range(max(slot.layer for slot in slots) + 1)]
    _order(layers)
    _set_columns(layers)
    bottom = _set_rows(layers)
    left = min(slot.x - slot.width / 2 for slot in slots)
    for slot in slots:
        slot.x = slot.x - left + MARGIN
    width, height = max(slot.x + slot.width / 2 for slot in slots) + MARGIN, bottom + MARGIN
    edges = "".join(_edge(chain, text) for chain, text in chains)
    boxes = "".join(_box(slot) for slot in slots if slot.box is not None)
    return (
        f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}">{edges}{boxes}</svg>'
    )


def _slots(drawing: Drawing) -> tuple[list[_Slot], list[tuple[list[_Slot], str]]]:
    """Return all slots, those of the boxes first, and for each edge the slots that it crosses."""
    slots = [_Slot(layer, box) for layer, box in zip(_layers_of_boxes(drawing), drawing.boxes, strict=True)]
    chains = []
    for start, end, text in drawing.edges:
        between = [_Slot(layer) for layer in range(slots[start].layer + 1, slots[end].layer)]
        chains.append(([slots[start], *between, slots[end]], text))
    for chain, _ in chains:
        for a, b in pairwise(chain):
            a.linked.append(b)
            b.linked.append(a)
    return slots + [slot for chain, _ in chains for slot in chain[1:-1]], chains


def _layers_of_boxes(drawing: Drawing) -> list[int]:
    layers = [0] * len(drawing.boxes)
    for start, end, _ in sorted(drawing.edges, key=lambda edge: edge[1]):  # inputs come first
        layers[end] = max(layers[end], layers[start] + 1)
    for index in reversed(range(len(layers))):  # as far down as possible
        below = [layers[end] for start, end, _ in drawing.edges if start == index]
        layers[index] = min(below, default=layers[index] + 1) - 1
    return layers


def _order(layers: list[list[_Slot]]) -> None:
    """Sort each layer by the mean places of its slots' neighbours, to have few edges cross."""

    def wanted(slot: _Slot) -> float:
        places = [other.place for other in slot.linked if other.layer == side]
        return sum(places) / len(places) if places else slot.place

    for layer in layers:
        _number(layer)
    for sweep in range(_SWEEPS):
        step = -1 if sweep % 2 == 0 else 1
        for layer in layers[::-step]:
            side = layer[0].layer + step
            _number(sorted(layer, key=wanted))
    for layer in layers:
        layer.sort(key=lambda slot: slot.place)


def _number(layer: list[_Slot]) -> None:
    for place, slot in enumerate(layer):
        slot.place = place


def _set_rows(layers: list[list[_Slot]]) -> float:
    """Set y of each slot; return where the last layer ends."""
    bottom = float(MARGIN - GAP_Y)
    for layer in layers:
        top, height = bottom + GAP_Y, max(slot.height for slot in layer)
        for slot in layer:
            slot.y = top + height / 2
        bottom = top + height
    return bottom


def _set_columns(layers: list[list[_Slot]]) -> None:
    """Set x of each slot: as near to its neighbours' x as the others in its layer allow."""
    for _ in range(10 * _SWEEPS):
        for layer in layers:
            wanted = list(map(_mean_place, layer))
            for slot, x in zip(layer, _spread(wanted, [slot.width for slot in layer]), strict=True):
                slot.x = x


def _mean_place(slot: _Slot) -> float:
    """Return the mean x of a slot's neighbours; larger weights keep simple chains straight."""
    if not slot.linked:
        return slot.x
    weights = [_STRAIGHT if len(slot.linked) == len(other.linked) == 2 else 1.0 for other in slot.linked]
    return sum(w * other.x for w, other in zip(weights, slot.linked, strict=True)) / sum(weights)


def _spread(wanted: list[float], widths: list[float]) -> list[float]:
    """Return positions in this order, at their distances, nearest to `wanted` (least squares)."""
    offsets = [0.0]
    for a, b in pairwise(widths):
        offsets.append(offsets[-1] + (a + b) / 2 + GAP_X)
    # Without the distances, the positions must not decrease: merge neighbours that would.
    blocks: list[tuple[float, int]] = []
    for value in (w - o for w, o in zip(wanted, offsets, strict=True)):
        blocks.append((value, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, m), (b, n) = blocks[-2:]
            blocks[-2:] = [((a * m + b * n) / (m + n), m + n)]
    flat = [value for value, count in blocks for _ in range(count)]
    return [value + offset for value, offset in zip(flat, offsets, strict=True)]


def _edge(chain: list[_Slot], text: str) -> str:
    first, second, last = chain[0], chain[1], chain[-1]
    x, y = first.x, first.y + first.height / 2
    path = f"M{x:.1f} {y:.1f}"
    for slot in chain[1:]:
        end = slot.y - (slot.height / 2 + 5 if slot is last else 0)
        bend = (y + end) / 2
        path += f"C{x:.1f} {bend:.1f} {slot.x:.1f} {bend:.1f} {slot.x:.1f} {end:.1f}"
        x, y = slot.x, end
    tip = f'<path class="tip" d="M{x - 4:.1f} {y:.1f}h8l-4 6z"/>'
    note = ""
    if text:
        anchor, shift = ("end", -6) if second.x < first.x else ("start", 6)
        across, down = (first.x + second.x) / 2 + shift, first.y + first.height / 2 + GAP_Y / 2
        note = f'<text class="flow" text-anchor="{anchor}" x="{across:.1f}" y="{down:.1f}">{escape(text)}</text>'
    return f'<path class="wire" d="{path}"/>{tip}{note}'


def _box(slot: _Slot) -> str:
    box, x = slot.box, slot.x
    assert box is not None
    line = slot.y + 4.5 - (LINE / 2 if box.detail else 0)
    detail = f'<text class="detail" x="{x:.1f}" y="{line + LINE:.1f}">{escape(box.detail)}</text>' if box.detail else ""
    return (
        f'<g class="{box.role}"><rect x="{x - slot.width / 2:.1f}" y="{slot.y - slot.height / 2:.1f}" '
        f'width="{slot.width:.1f}" height="{slot.height:.1f}" rx="6"/>'
        f'<text x="{x:.1f}" y="{line:.1f}">{escape(box.label)}</text>{detail}</g>'
    )
