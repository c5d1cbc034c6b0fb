"""Make pictures of each all-reduce: the subgraph around it, before fusewire's passes and after.

Pictures hold no sizes and no names of layers. So the same site in every layer gives the same
picture, which a graph's report holds once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import operator
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager

from torch.fx import Graph, Node

from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm
from fusewire.custom_ops.ops.sandwich_norm import all_reduce_sandwich_norm
from fusewire.custom_ops.ops.sharded_norm import all_reduce_rms_norm_sharded
from fusewire.fusion_passes.analysis.graph import dtype_of, getitem_users, plain_add
from fusewire.fusion_passes.analysis.norm_reader import Norm, find_norms
from fusewire.fusion_passes.context import MERGED
from fusewire.fusion_passes.observer import observed
from fusewire.fusion_passes.report.model import Entry, GraphReport
from fusewire.patterns.collectives import WAIT, AllReduce, positional, read_all_reduce
from fusewire.rendering.drawing import Box, Drawing, Picture
from fusewire.rendering.node_names import is_epsilon, label_of_input, name_of, names_of_readers, passes

log = logging.getLogger("fusewire")
# The roles of boxes, which the page gives colours.
COLLECTIVE, NORM, FUSED, STEP, OBSTACLE = "collective", "norm", "fused", "step", "obstacle"
INPUT, READER = "input", "reader"
OTHER = "another all-reduce"
# The labels of the fused operators' boxes.
_PLAIN, _SANDWICH = all_reduce_rms_norm.torch_op, all_reduce_sandwich_norm.torch_op
_FUSED_OPS = {
    _PLAIN: "all-reduce{add} + RMSNorm",
    _SANDWICH: "all-reduce + RMSNorm{add} + RMSNorm",
    all_reduce_rms_norm_sharded.torch_op: "reduce-scatter{add} + RMSNorm + all-gather",
}
_FAR, _FEW = 24, 5


def pictures_recorded() -> AbstractContextManager[None]:
    """Have the reports of graphs hold pictures, within the block."""
    return observed(PictureRecorder)


class PictureRecorder:
    """Makes the pictures of one graph. If one cannot be made, the report has a note instead.

    Args:
        original: the graph as it arrived.
    """

    def __init__(self, original: Graph) -> None:
        self.problem = ""
        self.seen: dict[str, _Before] = {}
        self.second: set[str] = set()  # all-reduces that are fused with a second norm too
        self.apart: set[str] = set()  # all-reduces that are fused
        self.after: dict[str, Drawing] = {}
        self.numbers: dict[Picture, int] = {}
        self.nodes = {node.name: node for node in original.nodes}
        self.order = {node: i for i, node in enumerate(original.nodes)}
        self.norms: dict[Node, Norm] = {}
        with self._harmless():
            for norm in find_norms(original):
                self.norms.setdefault(norm.input, norm)

    @contextlib.contextmanager
    def _harmless(self) -> Iterator[None]:
        """Turn an error within the block into a note of the report."""
        try:
            yield
        except Exception as error:
            log.warning("fusewire could not draw a picture for its report", exc_info=True)
            self.problem = f"pictures for the HTML report are missing: {type(error).__name__}: {error}"

    def fused(self, graph: Graph) -> None:
        """Draw the fused sites of the rewritten graph, before its operators are lowered."""
        with self._harmless():
            found = [node for op in _FUSED_OPS for node in graph.find_nodes(op="call_function", target=op)]
            sites = {node.meta.get("fusewire_all_reduce"): node for node in found}
            self.apart = set(sites)
            for name, node in sites.items():
                if node.target is _SANDWICH and name not in self.second:
                    self.second.add(name)
                    self.seen.pop(name, None)
                if name in self.nodes:
                    self.after[name] = _After(self._before(name), node, self.nodes).drawing

    def complete(self, report: GraphReport) -> GraphReport:
        """Return the report with the pictures, and each entry with its picture's number or -1."""
        entries = tuple(dataclasses.replace(entry, picture=self._number(entry)) for entry in report.entries)
        notes = (*report.notes, self.problem) if self.problem else report.notes
        return dataclasses.replace(report, entries=entries, notes=notes, pictures=tuple(self.numbers))

    def _number(self, entry: Entry) -> int:
        # An all-reduce that was merged into another is shown with that one.
        merged = entry.fusion.startswith(MERGED)
        name = entry.fusion.removeprefix(f"{MERGED} ") if merged else entry.node
        with self._harmless():
            before = self._before(name, entry.reason if entry.gate else "")
            return self.numbers.setdefault(Picture(before.drawing, self.after.get(name)), len(self.numbers))
        return -1

    def _before(self, name: str, reason: str = "") -> _Before:
        """Draw an all-reduce's site as it arrived; nodes that the refusal names are marked."""
        if not reason and name in self.seen:
            return self.seen[name]
        site = read_all_reduce(self.nodes[name])
        assert site is not None
        # Another all-reduce that is fused by itself is a residual like any other here.
        apart = set() if reason else self.apart
        found = _Before(site, self.norms, self.order, set(re.findall(r"\w+", reason)), apart, name in self.second)
        if not reason:
            self.seen[name] = found
        return found


class _Canvas:
    """A drawing under construction."""

    def __init__(self) -> None:
        self.boxes: list[Box] = []
        self.edges: dict[tuple[int, int, str], None] = {}
        self.ids: dict[Node, int] = {}  # the boxes of nodes

    def box(self, label: str, role: str, detail: str = "") -> int:
        self.boxes.append(Box(label, role, detail))
        return len(self.boxes) - 1

    def edge(self, start: int, end: int, text: str = "") -> None:
        if start != end:
            self.edges[start, end, text] = None

    @property
    def drawing(self) -> Drawing:
        return Drawing(tuple(self.boxes), tuple(self.edges))


class _Before(_Canvas):
    """The chain from an all-reduce to its norm, or to what stands in the norm's place.

    Args:
        norms: norms by the nodes that they normalise.
        order: the positions of all nodes.
        marked: names of nodes that the reason of a refusal names.
        apart: names of all-reduces that are drawn as residuals, since they are fused by themselves.
        second: whether a second norm, after the residual add, is fused too.

    Attributes:
        labels: the labels of nodes outside the chain, by node name.
        joined: names of other all-reduces that are added to the chain, and of the steps between.
        norm_readers, sum_readers: the labels of the readers of the norm, and of the value it takes.
    """

    def __init__(
        self,
        site: AllReduce,
        norms: dict[Node, Norm],
        order: dict[Node, int],
        marked: set[str],
        apart: set[str],
        second: bool,
    ) -> None:
        self.site, self.norms, self.order, self.marked, self.apart = site, norms, order, marked, apart
        super().__init__()
        self.labels: dict[str, str] = {}
        self.norm: Norm | None = None
        self.weights: list[Node | None] = []
        self.inside: set[Node] = set()
        chain, end = self._chain()
        inner = {site.node, site.value, *chain}
        if end is not None:
            end = self._find_norms(end, second)
            inner |= {end, *self.inside}
        joining = self._joining(inner)
        self.joined = {node.name for node in joining}
        inner |= joining
        self.inner = sorted(inner, key=lambda node: order[node])
        for node in self.inner:
            self._add(node)
        for node in self.inner:
            if node not in joining:
                self._add_readers(node, inner)
        self.norm_readers = self._readers(self.norm.out, inner) if self.norm is not None else ""
        self.sum_readers = self._readers(end, inner) if end is not None else ""

    def _chain(self) -> tuple[list[Node], Node | None]:
        """Return the chain to the nearest norm's input, and that input; else the chain and None."""
        start = self.site.value
        came: dict[Node, Node] = {}
        pending, seen, stopped, few = [start], [start], False, 0
        while pending and len(seen) < _FAR:
            node = pending.pop(0)
            if node in self.norms:
                chain = [node]
                while chain[-1] in came:
                    chain.append(came[chain[-1]])
                return chain, node
            few += not stopped
            for user in node.users:
                if not passes(user):
                    stopped = True
                elif user not in seen:
                    seen.append(user)
                    came[user] = node
                    pending.append(user)
        return seen[: min(few, _FEW)], None

    def _find_norms(self, end: Node, second: bool) -> Node:
        """Find a value's norm and the second norm after it; return the last one's input."""
        self._take(self.norms[end])
        assert self.norm is not None
        if second:
            end = next((user for user in self.norm.out.users if plain_add(user) and user in self.norms), end)
            if self.norms[end] is not self.norm:
                self._take(self.norms[end])
        return end

    def _take(self, norm: Norm) -> None:
        self.norm = norm
        self.weights.append(norm.weight)
        self.inside |= self._inside(norm)

    def _inside(self, norm: Norm) -> set[Node]:
        """Return the nodes that compute a norm from its input."""
        inside: set[Node] = set()
        pending = [norm.out]
        while pending and len(inside) < _FAR:
            node = pending.pop()
            if node in inside or node in (norm.input, norm.weight, norm.residual) or node.op != "call_function":
                continue
            inside.add(node)
            pending.extend(node.all_input_nodes)
        return inside

    def _joining(self, inner: set[Node]) -> set[Node]:
        """Return other all-reduces that are added to the chain, with the steps between."""
        found: set[Node] = set()
        for node in inner:
            for source in node.all_input_nodes:
                if source not in inner and node not in (self.site.node, self.site.value):
                    found |= set(self._back_to_all_reduce(source, 4))
        return found - inner

    def _back_to_all_reduce(self, node: Node, steps: int) -> list[Node]:
        if node.op == "call_function" and read_all_reduce(node) is not None:
            return [] if node.name in self.apart else [node]
        if steps and (node.target is WAIT or (passes(node) and plain_add(node) is None)):
            for source in node.all_input_nodes:
                rest = self._back_to_all_reduce(source, steps - 1)
                if rest:
                    return [node, *rest]
        return []

    def _add(self, node: Node) -> None:
        if node.target is WAIT or node.target is operator.getitem:
            source = node.args[0]
            if isinstance(source, Node) and source in self.ids:  # shown as one with its source
                self.ids[node] = self.ids[source]
                return
        role, label, detail = NORM if node in self.inside else STEP, name_of(node), ""
        if read_all_reduce(node) is not None:
            role, detail = COLLECTIVE, str(dtype_of(node)).removeprefix("torch.")
            label = label if node is self.site.node else f"another {label}"
        elif node.name in self.marked:
            role = OBSTACLE
        elif role == NORM and is_epsilon(node):
            label = "+ epsilon"
        sources = [self._source(node, source) for source in node.all_input_nodes]
        self.ids[node] = self.box(label, role, detail)
        for source in sources:
            self.edge(source, self.ids[node])

    def _source(self, node: Node, source: Node) -> int:
        """Return the box of a node's input; a new one if the input lies outside the chain."""
        if source not in self.ids:
            self.labels[source.name] = self._label_of_input(node, source)
            self.ids[source] = self.box(self.labels[source.name], INPUT)
        return self.ids[source]

    def _label_of_input(self, node: Node, source: Node) -> str:
        if source in self.weights:
            return "weight"
        if self.norm is not None and source is self.norm.residual:
            return "residual"
        last = plain_add(node) is not None and (self.norm is None or node is self.norm.input)
        return label_of_input(source, "residual" if last else "")

    def _add_readers(self, node: Node, inner: set[Node]) -> None:
        """Add boxes for other readers of a value, marked if a norm should stand there."""
        outside = [user for user in node.users if user not in inner]
        stops = [user for user in outside if self.norm is None and not passes(user)]
        if node.name in self.marked:
            stops = outside
        for users, role in (([u for u in outside if u not in stops], READER), (stops, OBSTACLE)):
            if users:
                self.edge(self.ids[node], self.box(names_of_readers(users), role))

    def _readers(self, node: Node, inner: set[Node]) -> str:
        return names_of_readers([user for user in node.users if user not in inner])


class _After(_Canvas):
    """The fused operator with the steps that were moved before it."""

    def __init__(self, before: _Before, node: Node, known: Mapping[str, Node]) -> None:
        self.before, self.known = before, known
        super().__init__()
        x, residual, weight, *_ = values = positional(node)
        inner = values[6] if node.target is not _PLAIN else None  # the first norm's weight
        roles = ((x, ""), (residual, "residual"), (inner, "weight"), (weight, "weight"))
        inputs = [self._visit(value, role) for value, role in roles if isinstance(value, Node)]
        middle = "" if residual is None else " + add"
        fused = self.box(_FUSED_OPS[node.target].format(add=middle), FUSED, "one operator")
        for source in inputs:
            self.edge(source, fused)
        readers_of = [before.norm_readers, before.sum_readers]
        if node.target is not _PLAIN:  # more than the first norm was fused: others read the results
            items = list(getitem_users(node))
            readers_of = [
                names_of_readers([user for i, item in items if i == index for user in item.users]) for index in (0, 1)
            ]
        for text, readers in zip(("norm", "sum"), readers_of, strict=True):
            if readers:
                self.edge(fused, self.box(readers, READER), text)

    def _visit(self, node: Node, role: str) -> int:
        if node in self.ids:
            return self.ids[node]
        if node.target is WAIT and isinstance(node.args[0], Node) and node.args[0].name in self.before.joined:
            self.ids[node] = self._visit(node.args[0], role)
            return self.ids[node]
        new = node.op == "call_function" and node.name not in self.known
        if node.name in self.before.joined or (new and node.target not in (operator.getitem, WAIT)):
            other = read_all_reduce(node) is not None
            # If a sum replaces the residual, its first operand is the residual.
            sources = [self._visit(s, role if s is node.args[0] else "") for s in node.all_input_nodes]
            label, kind = (OTHER, COLLECTIVE) if other else (name_of(node), STEP)
            self.ids[node] = self.box(label, kind)
            for source in sources:
                self.edge(source, self.ids[node])
        else:
            label = self.before.labels.get(node.name) or label_of_input(node, role)
            self.ids[node] = self.box(label, INPUT)
        return self.ids[node]
