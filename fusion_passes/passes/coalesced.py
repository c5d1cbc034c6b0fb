"""Shrink the coalesced all-reduces that a pass has taken tensors out of."""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Graph, Node

from fusewire.fusion_passes.analysis.graph import copy_origin, getitem, getitem_users
from fusewire.fusion_passes.context import RunContext
from fusewire.patterns.collectives import ALL_REDUCE, COALESCED, WAIT, WAIT_ALL, positional


def drop_taken_tensors(graph: Graph, context: RunContext) -> None:
    """Drop from each coalesced all-reduce the tensors whose sums nothing reads any more."""
    if WAIT_ALL is not None:
        for node in graph.find_nodes(op="call_function", target=WAIT_ALL):
            _wait_for_less(graph, node)
    for node in graph.find_nodes(op="call_function", target=COALESCED):
        tensors, reduction, group = positional(node)
        kept = sorted(getitem_users(node))
        if not kept and len(node.users) == 0:
            graph.erase_node(node)
        elif len({index for index, _ in kept}) < len(tensors) and len(kept) == len(node.users):
            _replace(graph, context, node, [(tensors[i], item) for i, item in kept], (reduction, group))


def _wait_for_less(graph: Graph, wait: Node) -> None:
    """Wait only for those tensors of a list that are still read."""
    tensors: Any = wait.args[0]
    kept = sorted(getitem_users(wait))
    indices = sorted({index for index, _ in kept})
    if len(kept) != len(wait.users) or len(indices) == len(tensors):
        return
    with graph.inserting_before(wait):
        items = dict(zip(indices, _waits(graph, wait, [tensors[i] for i in indices]), strict=True))
    for index, old in kept:
        copy_origin(old, items[index])
        old.replace_all_uses_with(items[index])
        graph.erase_node(old)
    graph.erase_node(wait)
    for tensor in tensors:
        if not tensor.users and tensor.target is operator.getitem:
            graph.erase_node(tensor)


def _waits(graph: Graph, wait: Node, tensors: list[Node]) -> list[Node]:
    """Return the finished values of these tensors, from a new wait in the place of `wait`."""
    values = [tensor.meta["val"] for tensor in tensors]
    if len(tensors) > 1:
        call = graph.call_function(WAIT_ALL, (tensors,))  # type: ignore[arg-type]
        call.meta["val"] = values
        copy_origin(wait, call)
        return [getitem(graph, call, i) for i in range(len(tensors))]
    items = [graph.call_function(WAIT, (tensor,)) for tensor in tensors]
    for item, value in zip(items, values, strict=True):
        item.meta["val"] = value
    return items


def _replace(
    graph: Graph, context: RunContext, node: Node, kept: list[tuple[Node, Node]], options: tuple[Any, Any]
) -> None:
    """Reduce only the tensors in `kept`, given as (tensor, its sum)."""
    with graph.inserting_before(node):
        if len(kept) == 1:
            call = graph.call_function(ALL_REDUCE, (kept[0][0], *options))
            call.meta["val"] = kept[0][1].meta["val"]
            items = [call]
        else:
            call = graph.call_function(COALESCED, ([tensor for tensor, _ in kept], *options))
            call.meta["val"] = [item.meta["val"] for _, item in kept]
            items = [getitem(graph, call, i) for i in range(len(kept))]
        copy_origin(node, call)
    for (_, old), new in zip(kept, items, strict=True):
        assert old.target is operator.getitem
        copy_origin(old, new)
        old.replace_all_uses_with(new)
        context.origin[new.name] = context.origin.pop(old.name, old.name)
        graph.erase_node(old)
    graph.erase_node(node)
