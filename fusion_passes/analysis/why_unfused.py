"""Explain from the graph why an all-reduce reaches no RMSNorm."""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node

from fusewire.fusion_passes.analysis.graph import CASTS, VIEWS, aten, first_refusal, plain_add, plain_mul
from fusewire.fusion_passes.context import MATCH, Refused
from fusewire.patterns.collectives import OTHER_COLLECTIVES, AllReduce, op_name

_LAYER_NORMS = {"aten::native_layer_norm", "aten::var_mean", "prims::var"}
_MATMULS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_scaled_mm", "aten::convolution"}
_PASSED = VIEWS | CASTS | {aten.div.Tensor, aten.sub.Tensor, aten.add.Tensor, aten.neg.default}
_STEPS = 24


def explain_unfused(site: AllReduce, norms: set[Node], fused_sums: set[str]) -> Refused:
    """Return why an all-reduce was not fused with a norm.

    Args:
        site: the all-reduce, in the graph as it arrived.
        norms: the inputs of that graph's norms.
        fused_sums: names of sums that were fused with another all-reduce.
    """
    return Refused(MATCH, first_refusal(_at_site(site)) or first_refusal(_after(site, norms, fused_sums)))


def _at_site(site: AllReduce) -> Iterator[tuple[bool, str]]:
    yield site.spelling.in_place, "the all-reduce overwrites its input in place, so it cannot be moved to the norm"
    yield (
        site.value is site.node and site.spelling.waits,
        "its result is waited for in several places, or nowhere, in this graph",
    )
    yield not site.value.users, "nothing reads its result in this graph"
    yield (
        all(user.op == "output" for user in site.value.users),
        "its result is an output of this graph: the norm lies beyond a graph break or the end of a "
        "nested_compile_region, or outside the compiled part; compile with fullgraph=True to see what breaks the graph",
    )


def _after(site: AllReduce, norms: set[Node], fused_sums: set[str]) -> Iterator[tuple[bool, str]]:
    reached = _reach(site.value, norms)
    names = [op_name(node) for node in reached]
    gate = next((node for node in reached if node not in norms and plain_mul(node) is not None), None)
    other_sum = next((node for node in reached if node.name in fused_sums), None)
    collective = next((OTHER_COLLECTIVES[name] for name in names if name in OTHER_COLLECTIVES), "")
    reaches_norm = not norms.isdisjoint(reached)
    yield (
        gate is not None and (reaches_norm or other_sum is not None),
        f"it is multiplied by a tensor ({gate}) before the norm; the product of a sum is the sum of products only if "
        "that tensor is the same on every rank, which the graph does not prove",
    )
    yield (
        other_sum is not None,
        f"it is added to another all-reduce ({other_sum}), and a sum can be fused with one of its two all-reduces only; "
        "the other becomes the residual",
    )
    yield (
        not _LAYER_NORMS.isdisjoint(names) or {"aten::mean", "aten::sub"} <= set(names),
        "a LayerNorm follows, which subtracts the mean; only RMSNorm has a fused kernel",
    )
    yield collective != "", f"{collective} follows, not a norm"
    yield reaches_norm, "an operation between the all-reduce and the norm cannot be carried over it"
    yield not _MATMULS.isdisjoint(names[:4]), "a matrix product follows, not a norm"
    yield any(node.op == "output" for node in reached), "its result leaves the graph without an RMSNorm after it"
    yield True, f"no RMSNorm follows; {names[0] or reached[0].target} reads its result"


def _reach(start: Node, norms: set[Node]) -> list[Node]:
    """Return the nodes that read a value, through at most 24 elementwise steps, nearest first."""
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
