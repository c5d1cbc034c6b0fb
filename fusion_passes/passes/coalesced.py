"""Coalesced all-reduces of which a pass has taken tensors out."""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Graph, Node

from fusewire.fusion_passes.analysis.graph import copy_origin, getitem, getitem_users
from fusewire.fusion_passes.context import RunContext
from fusewire.patterns.collectives import ALL_REDUCE, COALESCED, WAIT, WAIT_ALL, positional


def drop_taken_tensors(graph: Graph, context: RunContext) -> None:
    """Reduce only those tensors of each coalesced all-reduce whose sums are still read."""
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
    assert WAIT_ALL is not None
    tensors: Any = wait.args[0]
    kept = sorted(getitem_users(wait))
    if len(kept) != len(wait.users) or len({index for index, _ in kept}) == len(tensors):
        return
    indices = sorted({index for index, _ in kept})
    with graph.inserting_before(wait):
        if len(indices) > 1:
            fewer = graph.call_function(WAIT_ALL, ([tensors[i] for i in indices],))
            fewer.meta["val"] = [tensors[i].meta["val"] for i in indices]
            copy_origin(wait, fewer)
            items = {i: getitem(graph, fewer, place) for place, i in enumerate(indices)}
        else:
            items = {i: graph.call_function(WAIT, (tensors[i],)) for i in indices}
            for i, item in items.items():
                item.meta["val"] = tensors[i].meta["val"]
    for index, old in kept:
        copy_origin(old, items[index])
        old.replace_all_uses_with(items[index])
        graph.erase_node(old)
    graph.erase_node(wait)
    for tensor in tensors:
        if not tensor.users and tensor.target is operator.getitem:
            graph.erase_node(tensor)


def _replace(
    graph: Graph, context: RunContext, node: Node, kept: list[tuple[Node, Node]], options: tuple[Any, Any]
) -> None:
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
