"""A sum of two all-reduces over one group is the all-reduce of the sum: one collective fewer.

Mixture-of-experts layers add the all-reduced output of the routed experts to that of the shared expert. Added first
and reduced once, the sum can then be fused with the norm after it. It rounds elsewhere than the source did.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, Node

from fusewire.fusion_passes.carriers import CAST, VIEW, Path, PathFinder
from fusewire.fusion_passes.context import MERGED, RunContext
from fusewire.fusion_passes.graph_tools import (
    ADDS,
    aten,
    erase_unused,
    mutation_regions,
    new_call,
    plain_add,
    same_shape,
)
from fusewire.fusion_passes.matcher import sort_topologically
from fusewire.patterns.all_reduce import ALL_REDUCE, SUM, WAIT, read_all_reduce


def merge_all_reduces(graph: Graph, context: RunContext) -> bool:
    """Merge every sum of two all-reduces that allows it; says whether anything changed."""
    config = context.config
    if not config.merge_allreduces or not config.allow_reassociation:
        return False
    changed = False
    regions = mutation_regions(graph)
    for node in list(graph.nodes):
        if node.target not in ADDS or node._erased:
            continue
        pair = _mergeable(node, context)
        # What the one all-reduce reads would be read after a write that stood behind the other.
        if pair is not None and len({regions.get(n, 0) for n in (node, *(p.all_reduce.node for p in pair))}) == 1:
            regions[_merge(graph, node, pair, context)] = regions[node]
            changed = True
    if changed:
        sort_topologically(graph)
    return changed


def _mergeable(node: Node, context: RunContext) -> tuple[Path, Path] | None:
    """The ways from two all-reduces to the operands of an add, if these can be merged."""
    operands = plain_add(node)
    if operands is None or not all(isinstance(operand, Node) for operand in operands):
        return None
    paths = []
    for operand in operands:
        start = _start(operand)
        site = None if start is None else read_all_reduce(start)
        if site is None or site.node.target is not ALL_REDUCE or site.value is site.node:
            return None
        path = PathFinder({site.value: site.node}, context.config).find(operand)
        if path is None or path.of_kind(CAST) or len(path.of_kind(VIEW)) != len(path.steps) or path.other_readers:
            return None
        paths.append(path)
    first, second = paths
    a, b = first.all_reduce, second.all_reduce
    if a.node is b.node or not _same_reduction(a, b) or not same_shape(*operands):
        return None
    if {a.name, b.name} & set(context.excluded):
        return None
    return first, second


def _same_reduction(a: Any, b: Any) -> bool:
    return bool(
        isinstance(a.group, str)
        and a.group == b.group
        and isinstance(a.reduction, str)
        and a.reduction.lower() == SUM
        and b.reduction == a.reduction
        and a.x.meta["val"].dtype == b.x.meta["val"].dtype
    )


def _start(node: Any, limit: int = 6) -> Node | None:
    """The all-reduce behind a chain of views, or None."""
    while isinstance(node, Node) and limit:
        if node.target is WAIT:
            reduce = node.args[0]
            return reduce if isinstance(reduce, Node) and reduce.target is ALL_REDUCE else None
        node, limit = (node.args[0] if node.args else None), limit - 1
    return None


def _merge(graph: Graph, node: Node, pair: tuple[Path, Path], context: RunContext) -> Node:
    """Put one all-reduce in the place of an add of two; returns it."""
    kept, gone = pair[0].all_reduce, pair[1].all_reduce
    with graph.inserting_before(max(kept.node, gone.node)):
        inputs = []
        for path in pair:
            x = path.all_reduce.x
            for step in path.steps:
                x = new_call(graph, step.node.target, (x, *step.node.args[1:]), step.node.kwargs, step.node)
            inputs.append(x)
        total = new_call(graph, aten.add.Tensor, tuple(inputs), {}, node)
        reduced = new_call(graph, ALL_REDUCE, (total, kept.reduction, kept.group), {}, kept.node)
        waited = new_call(graph, WAIT, (reduced,), {}, kept.value)
    node.replace_all_uses_with(waited)
    erase_unused(node)
    for path in pair:
        for dead in (path.all_reduce.value, path.all_reduce.node):
            if not dead.users:
                graph.erase_node(dead)
    context.origin[reduced.name] = context.origin.pop(kept.name, kept.name)
    name = context.origin.pop(gone.name, gone.name)
    context.merged[name] = f"{MERGED} {context.origin[reduced.name]}"
    return reduced
