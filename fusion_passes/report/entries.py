"""Make the report's records of a graph's all-reduces, with their places in the source."""

from __future__ import annotations

import re
from collections import Counter

from torch.fx import Graph, Node

from fusewire.fusion_passes.analysis.graph import source_location, value_of
from fusewire.fusion_passes.report.model import ALL_REDUCE, REDUCE_SCATTER, REFUSED, Entry, Unread
from fusewire.patterns.collectives import AllReduce, unread_all_reduces


def entry_of(site: AllReduce) -> Entry:
    """Return the entry of an all-reduce: refused, without a reason so far."""
    x = value_of(site.x)
    return Entry(
        graph=-1,
        node=site.name,
        status=REFUSED,
        location=source_location(site.node),
        module=module_path(site.node),
        group=site.group if isinstance(site.group, str) else "",
        shape="" if x is None else str(list(x.shape)).replace(" ", ""),
        dtype="" if x is None else str(x.dtype).removeprefix("torch."),
        collective=REDUCE_SCATTER if site.spelling.scatters else ALL_REDUCE,
    )


def unread_in(graph: Graph) -> tuple[Unread, ...]:
    """Return the all-reduces of a graph that are operators of their own, by operator."""
    found = Counter(call for node in graph.nodes if node.op == "call_function" for call in unread_all_reduces(node))
    return tuple(Unread(name.replace("::", "."), calls, why) for (name, why), calls in found.items())


def module_path(node: Node) -> str:
    """Return the path of the innermost module that a node comes from, or ""."""
    stack = node.meta.get("nn_module_stack") or {}
    for path, _ in reversed(list(stack.values())):
        path = re.sub(r"^L\['self'\]|^L__self___?|^[LG](?=\[)", "", str(path))
        return re.sub(r"\._modules\['([^']+)'\]|\[['\"]?([^'\"\]]+)['\"]?\]", r".\1\2", path).lstrip(".")
    return ""
