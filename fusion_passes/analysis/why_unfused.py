"""Why an all-reduce reaches no RMSNorm, read off the graph and said in words."""

from __future__ import annotations

from torch.fx import Node

from fusewire.fusion_passes.analysis.graph import CASTS, VIEWS, aten, plain_add, plain_mul
from fusewire.fusion_passes.context import MATCH, Refused
from fusewire.patterns.collectives import OTHER_COLLECTIVES, AllReduce, op_name

_LAYER_NORMS = {"aten::native_layer_norm", "aten::var_mean", "prims::var"}
_MATMULS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_scaled_mm", "aten::convolution"}
_PASSED = VIEWS | CASTS | {aten.div.Tensor, aten.sub.Tensor, aten.add.Tensor, aten.neg.default}
_STEPS = 24


def explain_unfused(site: AllReduce, norms: set[Node], fused_sums: set[str]) -> Refused:
    """The reason for an all-reduce that no norm claimed.

    Args:
        site: the all-reduce, in the graph as it arrived.
        norms: what the norms of that graph normalise.
        fused_sums: names of sums that were fused with another all-reduce.
    """
    if site.spelling.in_place:
        return Refused(MATCH, "the all-reduce overwrites its input in place, so it cannot be moved to the norm")
    if site.value is site.node and site.spelling.waits:
        return Refused(MATCH, "its result is waited for in several places, or nowhere, in this graph")
    users = list(site.value.users)
    if not users:
        return Refused(MATCH, "nothing reads its result in this graph")
    if all(user.op == "output" for user in users):
        return Refused(
            MATCH,
            "its result is an output of this graph: the norm lies beyond a graph break or the end of a "
            "nested_compile_region, or outside the compiled part; compile with fullgraph=True to see what breaks the graph",
        )
    reached = _reach(site.value, norms)
    return Refused(MATCH, _say(site, reached, norms, fused_sums))


def _reach(start: Node, norms: set[Node]) -> list[Node]:
    """The nodes that read a value, through elementwise steps, nearest first, as far as the first norm."""
    seen: list[Node] = []
    pending = list(start.users)
    while pending and len(seen) < _STEPS:
        node = pending.pop(0)
        if node in seen:
            continue
        seen.append(node)
        if node in norms:
            continue
        if node.target in _PASSED or plain_add(node) is not None or plain_mul(node) is not None:
            pending.extend(node.users)
    return seen


def _say(site: AllReduce, reached: list[Node], norms: set[Node], fused_sums: set[str]) -> str:
    names = [op_name(node) for node in reached]
    gate = next((node for node in reached if node not in norms and plain_mul(node) is not None), None)
    if gate is not None and any(node in norms or node.name in fused_sums for node in reached):
        return (
            f"it is multiplied by a tensor ({gate.name}) before the norm; the product of a sum is the sum of products "
            "only if that tensor is the same on every rank, which the graph does not prove"
        )
    for node in reached:
        if node.name in fused_sums:
            return (
                f"it is added to another all-reduce ({node.name}), and a sum can be fused with one of its two "
                "all-reduces only; the other becomes the residual"
            )
    if any(name in _LAYER_NORMS for name in names) or {"aten::mean", "aten::sub"} <= set(names):
        return "a LayerNorm follows, which subtracts the mean; only RMSNorm has a fused kernel"
    for node in reached:
        if op_name(node) in OTHER_COLLECTIVES and node is not site.node:
            return f"{OTHER_COLLECTIVES[op_name(node)]} follows, not a norm"
    if norms & set(reached):
        return "an operation between the all-reduce and the norm cannot be carried over it"
    first = names[0] or str(reached[0].target)
    if first in _MATMULS or any(name in _MATMULS for name in names[:4]):
        return "a matrix product follows, not a norm"
    if any(node.op == "output" for node in reached):
        return "its result leaves the graph without an RMSNorm after it"
    return f"no RMSNorm follows; {first} reads its result"
