"""Explain from the graph why an all-reduce reaches no RMSNorm."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

from fusewire.fusion_passes.analysis.graph import (
    CASTS,
    VIEWS,
    aten,
    depends_on,
    dtype_of,
    first_refusal,
    plain_add,
    plain_div,
    plain_mul,
    source_location,
    terms_of,
)
from fusewire.fusion_passes.analysis.paths import PathFinder
from fusewire.fusion_passes.analysis.replication import UNKNOWN
from fusewire.fusion_passes.analysis.scales import (
    constant_of,
    is_gate,
    is_one_element,
    is_scale,
    may_be_float,
    unviewed,
)
from fusewire.fusion_passes.config import PassConfig
from fusewire.fusion_passes.context import MATCH, Refused
from fusewire.patterns.collectives import OTHER_COLLECTIVES, WAIT, AllReduce, op_name

_LAYER_NORMS = {"aten::native_layer_norm", "aten::var_mean", "prims::var"}
_MATMULS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_scaled_mm", "aten::convolution"}
_PASSED = VIEWS | CASTS | {aten.div.Tensor, aten.div.Tensor_mode, aten.sub.Tensor, aten.add.Tensor, aten.neg.default}
_COLLECTIVES = "_c10d_functional::"
_STEPS, _FAR = 24, 64
_OWN = "computed from the all-reduce's own result, so it cannot move before it; no option helps"
_BEYOND = (
    "lies beyond a graph break or the end of a nested_compile_region, or outside the compiled "
    "part; compile with fullgraph=True to see what breaks the graph"
)


def explain_unfused(site: AllReduce, norms: set[Node], fused_sums: set[str], config: PassConfig) -> Refused:
    """Return why an all-reduce was not fused with a norm.

    Args:
        site: the all-reduce, in the graph as it arrived.
        norms: the inputs of that graph's norms.
        fused_sums: names of sums that were fused with another all-reduce.
        config: the options.
    """
    site = dataclasses.replace(site, value=_waited_again(site.value))
    return Refused(MATCH, first_refusal(_at_site(site)) or first_refusal(_after(site, norms, fused_sums, config)))


def _waited_again(value: Node) -> Node:
    """Return what the last of a chain of waits for a value returns, or the value."""
    users = list(value.users)
    again = len(users) == 1 and users[0].target is WAIT and value.target is WAIT
    return _waited_again(users[0]) if again else value


def _at_site(site: AllReduce) -> Iterator[tuple[bool, str]]:
    users = list(site.node.users)
    waits = [user for user in users if user.target is WAIT]
    unwaited = site.value is site.node and site.spelling.waits
    yield site.spelling.in_place, "the all-reduce overwrites its input in place, so it cannot be moved to the norm"
    yield (
        unwaited and not waits and any(user.op == "output" for user in users),
        f"its result leaves this graph before it is waited for: the wait {_BEYOND}",
    )
    yield unwaited and not waits, "its result is waited for nowhere in this graph"
    yield (
        unwaited,
        "its result is waited for in several places of this graph, or also read before it is "
        "waited for; wait for it once, and read what the wait returns",
    )
    yield not site.value.users, "nothing reads its result in this graph"
    yield (
        all(user.op == "output" for user in site.value.users),
        f"its result is an output of this graph: the norm {_BEYOND}",
    )


def _after(site: AllReduce, norms: set[Node], fused_sums: set[str], config: PassConfig) -> Iterator[tuple[bool, str]]:
    previous = _reach(site.value, norms)
    reached = list(previous)
    names = [op_name(node) for node in reached]
    other_sum = next((node for node in reached if node.name in fused_sums), None)
    norm = next((node for node in reached if node in norms), None)
    blocker, refusal = _blocker(site, norm or other_sum, previous, config)
    yield blocker is not None and (plain_mul(blocker) or plain_div(blocker)) is not None, refusal
    yield (
        other_sum is not None,
        f"it is added to another all-reduce ({other_sum}), and a sum can be fused with one of its "
        "two all-reduces only; the other becomes the residual",
    )
    yield (
        not _LAYER_NORMS.isdisjoint(names) or {"aten::mean", "aten::sub"} <= set(names),
        "a LayerNorm follows, which subtracts the mean; only RMSNorm has a fused kernel",
    )
    collective = next((OTHER_COLLECTIVES[name] for name in names if name in OTHER_COLLECTIVES), "")
    yield collective != "", f"{collective} follows, not a norm"
    if norm is None:
        previous = _reach(site.value, norms, past_anything=True)
    yield from _before_norm(site, norms, previous, config)
    yield not _MATMULS.isdisjoint(names[:4]), "a matrix product follows, not a norm"
    yield any(node.op == "output" for node in reached), "its result leaves the graph without an RMSNorm after it"
    yield True, f"no RMSNorm follows; {names[0] or reached[0].target} reads its result"


def _before_norm(
    site: AllReduce, norms: set[Node], previous: dict[Node, Node], config: PassConfig
) -> Iterator[tuple[bool, str]]:
    """Yield (condition, refusal) for the first norm among the nodes that the all-reduce reaches."""
    norm = next((node for node in previous if node in norms), None)
    blocker, refusal = _blocker(site, norm, previous, config)
    yield blocker is not None, refusal
    yield (
        norm is not None,
        f"the norm of {norm} was tried with another all-reduce that reaches it, or more than 12 operations stand between",
    )


def _reach(start: Node, norms: set[Node], past_anything: bool = False) -> dict[Node, Node]:
    """Return the nodes that read a value, each with the node that it was reached from.

    They stand behind at most 24 steps that add, scale, cast or view, nearest first; with
    `past_anything` behind at most 64 of any kind but matrix products and collectives.
    """
    found: dict[Node, Node] = {}
    pending = [(user, start) for user in start.users]
    while pending and len(found) < (_FAR if past_anything else _STEPS):
        node, source = pending.pop(0)
        if node in found:
            continue
        found[node] = source
        if node in norms:
            continue
        passed = node.target in _PASSED or plain_add(node) is not None or plain_mul(node) is not None
        if passed or (past_anything and op_name(node) not in _MATMULS and not op_name(node).startswith(_COLLECTIVES)):
            pending.extend((user, node) for user in node.users)
    return found


def _blocker(
    site: AllReduce, end: Node | None, previous: dict[Node, Node], config: PassConfig
) -> tuple[Node | None, str]:
    """Return the first node before `end` that the all-reduce cannot be moved over, and why."""
    finder = PathFinder({site.value: site.node}, config)
    steps = []
    while end is not None and end is not site.value:
        steps.append((previous[end], end))
        end = previous[end]
    for source, node in reversed(steps):
        found_steps = [taken for found, taken in finder.steps_back(node) if found is source]
        if not any(all(finder.fits_group(step, site) for step in taken) for taken in found_steps):
            return node, f"{_why_not_over(node, source, site, finder)}{_in_the_model(node)}"
    return None, ""


def _in_the_model(node: Node) -> str:
    """Return which of the model's calls a node stands for, and where, as an end of a sentence."""
    schema, place = getattr(node.meta.get("original_aten"), "_schema", None), source_location(node)
    whole = "" if schema is None or op_name(node) in (schema.name, *_MATMULS) else f"part of {schema.name}"
    return f" ({', '.join(filter(None, (whole, place)))})" if whole or place else ""


def _why_not_over(node: Node, source: Node, site: AllReduce, finder: PathFinder) -> str:
    """Return why an all-reduce cannot be moved over a node that reads its value `source`."""
    name = f"{op_name(node) or node.target} ({node})"
    if (factors := plain_mul(node)) is not None:
        return _why_not_moved(factors[factors[0] is source], source, site, finder, node)
    if (quotient := plain_div(node)) is not None:
        if quotient[0] is source:
            return _why_not_moved(quotient[1], source, site, finder, node)
        return f"{name} divides by it before the norm, which is no multiple of the sum; no option helps"
    terms = terms_of(node)
    alpha = node.kwargs.get("alpha", 1)
    if alpha != 1 and (terms is None or terms[0] is source):
        return (
            f"{name} multiplies what it adds by alpha={alpha}, so the all-reduce cannot be "
            "carried over it; write that product as an operation of its own"
        )
    if terms is None:
        return (
            f"{name} between the all-reduce and the norm cannot be carried over it: only views, "
            "scales and additions can, and no option helps"
        )
    return f"{name} adds {_why_not_added(terms[terms[0] is source], source, site, node)}"


def _why_not_added(addend: Any, source: Node, site: AllReduce, node: Node) -> str:
    """Return what an add or a subtraction adds to the all-reduce's value, and why that cannot be."""
    if _is_own(addend, site):
        return f"a tensor that is {_OWN}"
    if is_one_element(addend) and _is_wider(addend, source) and dtype_of(source) == dtype_of(node):
        remedy = "keep it as a Python float in the module" if may_be_float(addend, False) else "store it in that dtype"
        return f"one element in {dtype_of(addend)}, which {dtype_of(source)} would round before it is added; {remedy}"
    if isinstance(addend, Node) and dtype_of(addend) != dtype_of(source):
        return (
            f"a tensor in {dtype_of(addend)} to the all-reduce's result in {dtype_of(source)}, so it "
            "cannot be carried over it; add in one dtype"
        )
    if not isinstance(addend, Node):
        return f"{addend!r}, so it cannot be carried over it; add a number or a tensor"
    return (
        "a tensor of another shape than the all-reduce's result and its rows, so it cannot be "
        "carried over it; expand that tensor to the result's shape"
    )


def _is_wider(operand: Node, source: Node) -> bool:
    """Return whether an operand has a dtype that the all-reduce's value would round."""
    a, b = dtype_of(operand), dtype_of(source)
    return a is not None and b is not None and torch.promote_types(a, b) != b


def _is_own(operand: Any, site: AllReduce) -> bool:
    """Return whether an operand is computed from the all-reduce's result."""
    return depends_on(operand, site.node, {node: index for index, node in enumerate(site.node.graph.nodes)})


def _why_not_moved(factor: Any, source: Node, site: AllReduce, finder: PathFinder, node: Node) -> str:
    """Return why the factor or divisor of `node` cannot move before the all-reduce."""
    number, product = constant_of(factor), plain_mul(node) is not None
    done, many, verb = ("multiplied", "product", "multiply") if product else ("divided", "quotient", "divide")
    what = f"it is {done} by {'a tensor' if number is None else f'{number:g}'} ({node}) before the norm; "
    if not isinstance(factor, Node) or number is not None:
        far = "only divisors from 1e-30 to 1e30, of either sign, can move before the all-reduce"
        return what + ("its dtype or shape is another after that" if product else far)
    if _is_own(factor, site):
        return f"{what}that tensor is {_OWN}"
    equal = f"{what}the {many} of a sum is the sum of {many}s only if that tensor is the same on every rank"
    options = {
        "assume_replicated_scales": is_scale(unviewed(factor)),
        "assume_replicated_gates": is_gate(factor, source),
    }
    verdict = finder.replication.judge(factor, site.group)
    option = next((name for name, holds in options.items() if holds and not getattr(finder.config, name)), "")
    if verdict.kind == UNKNOWN:
        return f"{equal}, and it {verdict.reason}; no option helps"
    if option:
        return f"{equal}, which the graph does not prove; {option}=True assumes it"
    return (
        f"{equal}, which the graph does not prove and no option assumes; {verb} before the "
        "all-reduce instead (a vector of the hidden size: in the projection's weight)"
    )
