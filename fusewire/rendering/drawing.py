"""Drawings of subgraphs as inline SVG: boxes in layers, edges that point down."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from itertools import pairwise

GAP_X, GAP_Y, MARGIN = 18, 23, 8
LINE, PADDING, CHARACTER = 15, 9, 7.3
_SWEEPS, _STRAIGHT = 12, 6.0


@dataclass(frozen=True)
class Box:
    """One box of a drawing: its text, its role (which gives it a colour), and a second line."""

    label: str
    role: str
    detail: str = ""


@dataclass(frozen=True)
class Drawing:
    """Boxes, and edges as (from, to, what flows), which give positions in `boxes`."""

    boxes: tuple[Box, ...]
    edges: tuple[tuple[int, int, str], ...]


@dataclass(frozen=True)
class Picture:
    """The subgraph around an all-reduce as it arrived, and with the fused operator (None if it stayed)."""

    before: Drawing
    after: Drawing | None = None


def draw(drawing: Drawing, label: str) -> str:
    """A drawing as inline SVG, its boxes in layers from top to bottom, so that every edge points down."""
    slots, edges = _slots(drawing)
    tops, heights = _rows(slots)
    _order(slots, edges)
    xs = _columns(slots, edges)
    width = max(x + slot.width / 2 for slot, x in zip(slots, xs, strict=True)) + MARGIN
    height = tops[-1] + heights[-1] + MARGIN
    lines = "".join(_edge(slots, xs, tops, heights, chain, text) for chain, text in edges)
    boxes = "".join(
        _box(slot.box, x, tops[slot.layer] + heights[slot.layer] / 2)
        for slot, x in zip(slots, xs, strict=True)
        if slot.box is not None
    )
    return (
        f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}">{lines}{boxes}</svg>'
    )


class _Slot:
    """A place in a layer: of a box, or of an edge on its way past."""

    def __init__(self, layer: int, box: Box | None) -> None:
        self.layer, self.box = layer, box
        self.place = 0
        texts = (box.label, box.detail) if box else ()
        self.width = max((CHARACTER * len(text) + 2 * PADDING for text in texts), default=6.0)
        self.height = _height(box) if box else 0.0


def _height(box: Box) -> float:
    return PADDING + LINE * (2 if box.detail else 1) + PADDING / 2


def _slots(drawing: Drawing) -> tuple[list[_Slot], list[tuple[list[int], str]]]:
    """Slots, those of the boxes first, and each edge as the chain of slots that it runs through."""
    layers = [0] * len(drawing.boxes)
    for start, end, _ in sorted(drawing.edges, key=lambda edge: edge[1]):  # boxes come after their inputs
        layers[end] = max(layers[end], layers[start] + 1)
    for index in reversed(range(len(layers))):  # as late as possible: what joins later is drawn there
        below = [layers[end] for start, end, _ in drawing.edges if start == index]
        layers[index] = min(below, default=layers[index] + 1) - 1
    slots = [_Slot(layer, box) for layer, box in zip(layers, drawing.boxes, strict=True)]
    edges = []
    for start, end, text in drawing.edges:
        chain = [start]
        for layer in range(layers[start] + 1, layers[end]):
            slots.append(_Slot(layer, None))
            chain.append(len(slots) - 1)
        edges.append(([*chain, end], text))
    return slots, edges


def _rows(slots: list[_Slot]) -> tuple[list[float], list[float]]:
    """Top and height of each layer."""
    tops, heights, top = [], [], float(MARGIN)
    for layer in range(max(slot.layer for slot in slots) + 1):
        heights.append(max((slot.height for slot in slots if slot.layer == layer), default=0.0))
        tops.append(top)
        top += heights[-1] + GAP_Y
    return tops, heights


def _neighbours(slots: list[_Slot], edges: list[tuple[list[int], str]]) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in slots]
    for chain, _ in edges:
        for a, b in pairwise(chain):
            found[a].append(b)
            found[b].append(a)
    return found


def _layers(slots: list[_Slot]) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in range(max(slot.layer for slot in slots) + 1)]
    for index, slot in enumerate(slots):
        found[slot.layer].append(index)
    return [sorted(layer, key=lambda index: slots[index].place) for layer in found]


def _order(slots: list[_Slot], edges: list[tuple[list[int], str]]) -> None:
    """Give each slot its place in its layer: near the mean place of its neighbours, so that few edges cross."""
    neighbours = _neighbours(slots, edges)
    layers = _layers(slots)
    for layer in layers:
        for place, index in enumerate(layer):
            slots[index].place = place
    for sweep in range(_SWEEPS):
        for layer in layers if sweep % 2 == 0 else layers[::-1]:
            side = slots[layer[0]].layer + (-1 if sweep % 2 == 0 else 1)

            def wanted(index: int, side: int = side) -> float:
                places = [slots[n].place for n in neighbours[index] if slots[n].layer == side]
                return sum(places) / len(places) if places else slots[index].place

            for place, index in enumerate(sorted(layer, key=wanted)):
                slots[index].place = place


def _columns(slots: list[_Slot], edges: list[tuple[list[int], str]]) -> list[float]:
    """The middle of each slot: as near to its neighbours' as the others in its layer allow."""
    neighbours, layers = _neighbours(slots, edges), _layers(slots)
    xs = [0.0] * len(slots)
    for _ in range(10 * _SWEEPS):
        for layer in layers:
            wanted = [_mean_place(slots, xs, i, neighbours) for i in layer]
            for index, x in zip(layer, _spread(wanted, [slots[i].width for i in layer]), strict=True):
                xs[index] = x
    left = min(x - slot.width / 2 for x, slot in zip(xs, slots, strict=True))
    return [x - left + MARGIN for x in xs]


def _mean_place(slots: list[_Slot], xs: list[float], index: int, linked: list[list[int]]) -> float:
    """Where a slot would stand by its neighbours; plain chains and edges on their way past are kept straight."""
    own = linked[index]
    if not own:
        return xs[index]
    weights = [_STRAIGHT if len(own) == 2 and len(linked[n]) == 2 else 1.0 for n in own]
    return sum(w * xs[n] for w, n in zip(weights, own, strict=True)) / sum(weights)


def _spread(wanted: list[float], widths: list[float]) -> list[float]:
    """Positions in this order that keep their distances and are nearest to the wanted ones (least squares)."""
    offsets = [0.0]
    for a, b in pairwise(widths):
        offsets.append(offsets[-1] + (a + b) / 2 + GAP_X)
    # With the distances taken off, the positions must not decrease: merge neighbours that would.
    blocks: list[tuple[float, int]] = []
    for value in (w - o for w, o in zip(wanted, offsets, strict=True)):
        blocks.append((value, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, m), (b, n) = blocks[-2:]
            blocks[-2:] = [((a * m + b * n) / (m + n), m + n)]
    flat = [value for value, count in blocks for _ in range(count)]
    return [value + offset for value, offset in zip(flat, offsets, strict=True)]


def _edge(
    slots: list[_Slot], xs: list[float], tops: list[float], heights: list[float], chain: list[int], text: str
) -> str:
    def middle(index: int) -> float:
        return tops[slots[index].layer] + heights[slots[index].layer] / 2

    first, last = chain[0], chain[-1]
    x, y = xs[first], middle(first) + slots[first].height / 2
    path = f"M{x:.1f} {y:.1f}"
    for index in chain[1:]:
        end = middle(index) - (slots[index].height / 2 + 5 if index == last else 0)
        bend = (y + end) / 2
        path += f"C{x:.1f} {bend:.1f} {xs[index]:.1f} {bend:.1f} {xs[index]:.1f} {end:.1f}"
        x, y = xs[index], end
    tip = f'<path class="tip" d="M{x - 4:.1f} {y:.1f}h8l-4 6z"/>'
    note = ""
    if text:
        across = (xs[first] + xs[chain[1]]) / 2
        side = "end" if xs[chain[1]] < xs[first] else "start"
        shift = -6 if side == "end" else 6
        down = middle(first) + slots[first].height / 2 + GAP_Y / 2
        note = f'<text class="flow" text-anchor="{side}" x="{across + shift:.1f}" y="{down:.1f}">{escape(text)}</text>'
    return f'<path class="wire" d="{path}"/>{tip}{note}'


def _box(box: Box, x: float, y: float) -> str:
    width = max(CHARACTER * len(text) for text in (box.label, box.detail)) + 2 * PADDING
    height = _height(box)
    first = y + 4.5 - (LINE / 2 if box.detail else 0)
    second = (
        f'<text class="detail" x="{x:.1f}" y="{first + LINE:.1f}">{escape(box.detail)}</text>' if box.detail else ""
    )
    return (
        f'<g class="{box.role}"><rect x="{x - width / 2:.1f}" y="{y - height / 2:.1f}" width="{width:.1f}" '
        f'height="{height:.1f}" rx="6"/><text x="{x:.1f}" y="{first:.1f}">{escape(box.label)}</text>{second}</g>'
    )
