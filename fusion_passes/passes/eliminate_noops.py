"""Drop views, casts and waits that change nothing."""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, Node

from fusewire.fusion_passes.analysis.graph import CASTS, VIEWS, aten, same_shape, value_of, writes_in_place
from fusewire.fusion_passes.context import RunContext
from fusewire.patterns.collectives import ALL_REDUCE, WAIT

_RESHAPES = VIEWS | {aten.expand.default, aten.permute.default}


def eliminate_noops(graph: Graph, context: RunContext) -> bool:
    """Replace nodes that change nothing by their input; return whether there were any."""
    changed = False
    # Where the graph writes in place, such a cast may be the copy that keeps the old value.
    removable = {WAIT} | (_RESHAPES if any(map(writes_in_place, graph.nodes)) else _RESHAPES | CASTS)
    waits: dict[Any, Node] = {}
    for node in graph.nodes:
        if node.op == "call_function" and node.target in removable and _changes_nothing(node):
            source = node.args[0]
            node.replace_all_uses_with(source)
            graph.erase_node(node)
            changed = True
        elif node.target is WAIT:
            waits[node.args[0]] = node
        elif node.target is aten.sym_size.int and (same := _other_of_size(node.args[0], waits)) is not None:
            node.update_arg(0, same)
            changed = True
    return changed


def _other_of_size(node: Any, waits: dict[Any, Node]) -> Any:
    """Return the node to read a size from, so that it is no reader of a collective; or None."""
    call = node.args[0] if isinstance(node, Node) and node.target is WAIT else node
    if isinstance(call, Node) and call.target is ALL_REDUCE:
        return call.args[0]
    return waits.get(node)


def _changes_nothing(node: Node) -> bool:
    source = node.args[0] if node.args else None
    if node.target is WAIT:
        return isinstance(source, Node) and source.target is WAIT
    if not isinstance(source, Node) or not _same_layout(node, source):
        return False
    if any(user.op == "output" for user in node.users):
        return False  # an output must not become an input or another output
    return node.target not in CASTS or set(node.kwargs) <= {"dtype"}


def _same_layout(node: Node, source: Node) -> bool:
    a, b = value_of(node), value_of(source)
    return (
        a is not None
        and b is not None
        and same_shape(node, source)
        and a.dtype == b.dtype
        and a.device == b.device
        and all(str(x) == str(y) for x, y in zip(a.stride(), b.stride(), strict=True))
    )
