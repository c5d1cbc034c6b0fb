"""A sum of two all-reduces over one group is the all-reduce of the sum: one collective fewer.

Mixture-of-experts layers add the all-reduced output of the routed experts to that of the shared expert; layers whose
attention and feed-forward stand side by side add both to the residual. Added first and reduced once, the sum can then
be fused with the norm after it. It rounds elsewhere than the source did.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from fusewire.fusion_passes.analysis.graph import (
    ADDS,
    VIEWS,
    aten,
    dtype_of,
    erase_unused,
    mutation_regions,
    new_call,
    plain_add,
    plain_mul,
    same_shape,
    sort_topologically,
)
from fusewire.fusion_passes.analysis.paths import SCALE, VIEW, Path, PathFinder
from fusewire.fusion_passes.context import MERGED, RunContext
from fusewire.fusion_passes.passes.coalesced import drop_taken_tensors
from fusewire.fusion_passes.spmd.fingerprint import scale_text
from fusewire.patterns.collectives import ALL_REDUCE, COALESCED_PART, SUM, WAIT, AllReduce, read_all_reduce


@dataclass(frozen=True)
class _Pair:
    """Two all-reduces whose results an add adds up: directly, or one of them to a sum of the other and `residual`."""

    first: Path
    second: Path
    residual: Node | None = None

    @property
    def both(self) -> tuple[Path, Path]:
        return self.first, self.second


def merge_all_reduces(graph: Graph, context: RunContext) -> bool:
    """Merge every sum of two all-reduces that allows it; says whether anything changed."""
    config = context.config
    if not config.merge_allreduces or not config.allow_reassociation:
        return False
    changed = False
    regions = mutation_regions(graph)
    values = _mergeable_values(graph)
    for node in list(graph.nodes) if len(values) > 1 else ():
        if node.target not in ADDS or node._erased:
            continue
        pair = _mergeable(node, context, values)
        # What the one all-reduce reads would be read after a write that stood behind the other.
        if pair is not None and len({regions.get(n, 0) for n in (node, *(p.all_reduce.node for p in pair.both))}) == 1:
            regions[_merge(graph, node, pair, context)] = regions[node]
            values = _mergeable_values(graph)
            changed = True
    if changed:
        drop_taken_tensors(graph, context)
        sort_topologically(graph)
    return changed


def _mergeable(node: Node, context: RunContext, values: dict[Node, Node]) -> _Pair | None:
    """The all-reduces behind the operands of an add, if these can be merged."""
    operands = plain_add(node)
    if operands is None or not all(isinstance(operand, Node) for operand in operands):
        return None
    ways = [_way(operand, context, values) for operand in operands]
    if ways[0] is not None and ways[1] is not None:
        return _pair(ways[0], ways[1], None, context)
    for way, other in ((ways[0], operands[1]), (ways[1], operands[0])):
        inner = plain_add(other) if way is not None and len(other.users) == 1 else None
        for summed, residual in (inner, inner[::-1]) if inner is not None else ():
            second = _way(summed, context, values)
            plain = same_shape(residual, node) and same_shape(other, node)
            if second is not None and plain and dtype_of(residual) == dtype_of(other) == dtype_of(node):
                assert way is not None
                return _pair(second, way, residual, context)
    return None


def _way(operand: Any, context: RunContext, values: dict[Node, Node]) -> Path | None:
    """The way from an all-reduce to this node through views and scales that nothing else reads, or None.

    So nothing that another all-reduce sums, and no gate, can be computed from this one's result.
    """
    if not _may_lead(operand, values):
        return None
    path = PathFinder(values, context.config).find(operand)
    if path is None or len(path.of_kind(VIEW, SCALE)) != len(path.steps) or path.other_readers or path.problem(True):
        return None
    return path


def _pair(first: Path, second: Path, residual: Node | None, context: RunContext) -> _Pair | None:
    a, b = first.all_reduce, second.all_reduce
    if a.node is b.node or not _same_reduction(a, b) or not same_shape(first.end, second.end):
        return None
    if {context.origin.get(site.name, site.name) for site in (a, b)} & (set(context.excluded) | context.apart):
        return None
    return _Pair(first, second, residual)


def _same_reduction(a: AllReduce, b: AllReduce) -> bool:
    return bool(
        isinstance(a.group, str)
        and a.group == b.group
        and isinstance(a.reduction, str)
        and a.reduction.lower() == SUM
        and b.reduction == a.reduction
        and a.x.meta["val"].dtype == b.x.meta["val"].dtype
        # A rank's two parts together may be more than float16 holds where the two sums are not.
        and a.x.meta["val"].dtype != torch.float16
    )


def _may_lead(node: Any, values: dict[Node, Node], limit: int = 6) -> bool:
    """Whether an all-reduce stands behind a chain of views and products."""
    if not isinstance(node, Node) or limit == 0:
        return False
    if node in values:
        return True
    factors = plain_mul(node)
    behind = factors if factors is not None else node.args[:1] if node.target in VIEWS else ()
    return any(_may_lead(source, values, limit - 1) for source in behind)


def _mergeable_values(graph: Graph) -> dict[Node, Node]:
    """The finished values of all-reduces that can be merged, with the all-reduces' nodes."""
    found = (read_all_reduce(node) for node in graph.nodes if node.op == "call_function")
    return {
        site.value: site.node
        for site in found
        if site is not None
        and site.value is not site.node
        and (site.node.target is ALL_REDUCE or site.spelling is COALESCED_PART)
    }


def _merge(graph: Graph, node: Node, pair: _Pair, context: RunContext) -> Node:
    """Put one all-reduce in the place of an add of two; returns it."""
    kept, gone = pair.first.all_reduce, pair.second.all_reduce
    texts = [
        " ".join(["one sum", *map(scale_text, (step.value for step in path.of_kind(SCALE)))]) for path in pair.both
    ]
    with graph.inserting_before(max(kept.node, gone.node)):
        inputs = []
        for path in pair.both:
            x = path.all_reduce.x
            for step in path.steps:
                if step.kind == VIEW:
                    x = new_call(graph, step.node.target, (x, *step.node.args[1:]), step.node.kwargs, step.node)
                else:
                    x = new_call(graph, aten.mul.Tensor, (x, step.value), {}, step.node)
            inputs.append(x)
        total = new_call(graph, aten.add.Tensor, tuple(inputs), {}, node)
        reduced = new_call(graph, ALL_REDUCE, (total, kept.reduction, kept.group), {}, kept.node)
        waited = new_call(graph, WAIT, (reduced,), {}, kept.value)
    total = waited
    if pair.residual is not None:
        with graph.inserting_before(node):
            total = new_call(graph, aten.add.Tensor, (pair.residual, waited), {}, node)
    node.replace_all_uses_with(total)
    erase_unused(node)
    for path in pair.both:
        for dead in (path.all_reduce.value, path.all_reduce.node):
            if not dead.users:
                graph.erase_node(dead)
    context.origin[reduced.name] = context.origin.pop(kept.name, kept.name)
    name = context.origin.pop(gone.name, gone.name)
    context.merged[name] = f"{MERGED} {context.origin[reduced.name]}"
    moved = [*context.moved.pop(name, []), f"merged: {texts[0]} + {texts[1]}"]
    context.moved.setdefault(context.origin[reduced.name], []).extend(moved)
    context.assumed.update(option for path in pair.both for option in path.assumptions)
    return reduced
