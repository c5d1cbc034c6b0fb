"""Find every RMSNorm of a graph, however it is spelled, without changing anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from fusewire.custom_ops.norms import SCALE_THEN_ROUND
from fusewire.fusion_passes.graph_tools import (
    aten,
    cast_source,
    dtype_of,
    getitem_users,
    is_number,
    is_vector,
    last_size,
    plain_add,
    plain_mul,
    value_of,
)
from fusewire.patterns.all_reduce import op_name, positional
from fusewire.patterns.norms import NORM_OPS, ROUND, NormOp, tail_form, tail_name

_WIDE = (torch.float32, torch.float64)
_NORM_OPS = {entry.op: entry for entry in NORM_OPS}


@dataclass(frozen=True)
class Norm:
    """An RMSNorm in a graph.

    Attributes:
        source: the node that is normalised (for an operator that adds a residual itself: the addend).
        residual: what that operator adds, or None.
        out: the node whose value is the norm; its users are the norm's users.
        sum_out: the node that is the sum, where the operator returns one.
        weight: a node of shape (hidden,), or None.
        eps: a number, or a node where the graph does not know the number.
        spelling: the name for the report.
        problem: why this norm cannot become the IR operator, or "".
    """

    source: Node
    residual: Node | None
    out: Node
    sum_out: Node | None
    weight: Node | None
    eps: Any
    weight_bias: Any
    form: str
    spelling: str
    problem: str = ""


def norm_roots(graph: Graph) -> list[Node]:
    """The nodes on which norms are built, in the graph's order: reciprocal square roots and operators that are norms."""
    return [
        node
        for node in graph.nodes
        if node.op == "call_function" and (_is_reciprocal_root(node) or op_name(node) in _NORM_OPS)
    ]


def norms_at(root: Node) -> list[Norm]:
    """The norms built on a root, read from the graph as it now is."""
    if root._erased:
        return []
    if _is_reciprocal_root(root):
        return list(_norms_of_root(root, root.args[0]))
    return list(_norms_of_op(root))


def find_norms(graph: Graph) -> list[Norm]:
    """All norms of a graph, in the order of their roots."""
    return [norm for root in norm_roots(graph) for norm in norms_at(root)]


def _is_reciprocal_root(node: Node) -> bool:
    if node.target is aten.pow.Tensor_Scalar:
        return bool(node.args[1] == -0.5)
    return node.target is aten.rsqrt.default


def _norms_of_root(root: Node, shifted: Any) -> Iterator[Norm]:
    """The norms built on `root = rsqrt(mean(x^2) + eps)`; `shifted` is its argument."""
    if not isinstance(shifted, Node):
        return
    operands = plain_add(shifted)
    if operands is None:
        return
    mean, eps = operands if _is_mean(operands[0]) else operands[::-1]
    if not _is_mean(mean):
        return
    wide = _squared(mean.args[0])
    if wide is None or not _over_last_dimension(mean, wide):
        return
    source = cast_source(wide)
    if source is None or dtype_of(wide) != _computed_in(source):
        source = wide
    problem = ""
    if dtype_of(wide) != _computed_in(source):
        problem = (
            f"the norm is computed in {dtype_of(wide)}, where the fused operator computes in torch.float32; convert its "
            "input to float32 first, as torch.nn.RMSNorm does"
        )
    for scaled in list(root.users):
        factors = plain_mul(scaled)
        if factors is not None and wide in factors and root in factors:
            for norm in _tails(source, scaled, eps):
                yield dataclasses.replace(norm, problem=problem or norm.problem)


def _computed_in(node: Any) -> torch.dtype | None:
    """The dtype that the IR operators compute the norm of this node in."""
    dtype = dtype_of(node)
    return None if dtype is None or not dtype.is_floating_point else torch.promote_types(dtype, torch.float32)


def _is_mean(node: Any) -> bool:
    return isinstance(node, Node) and node.target is aten.mean.dim


def _over_last_dimension(mean: Node, wide: Node) -> bool:
    value = value_of(wide)
    dims = mean.args[1] if len(mean.args) > 1 else None
    keepdim = mean.args[2] if len(mean.args) > 2 else mean.kwargs.get("keepdim", False)
    if value is None or not isinstance(dims, (list, tuple)):
        return False
    if mean.kwargs.get("dtype") not in (None, value.dtype):
        return False
    return bool(keepdim) and len(dims) == 1 and dims[0] in (-1, value.dim() - 1)


def _squared(node: Any) -> Node | None:
    """x, if the node is x squared."""
    if not isinstance(node, Node):
        return None
    if node.target is aten.pow.Tensor_Scalar and node.args[1] == 2:
        return node.args[0] if isinstance(node.args[0], Node) else None
    factors = plain_mul(node)
    if factors is not None and factors[0] is factors[1] and isinstance(factors[0], Node):
        return factors[0]
    return None


def _tails(source: Node, scaled: Node, eps: Any) -> Iterator[Norm]:
    """Every way the normalised value `scaled` goes on."""
    dtype = dtype_of(source)
    if dtype_of(scaled) == dtype:
        yield from _weighted_or_not(source, scaled, eps, (), dtype)
        return
    for user in list(scaled.users):
        if cast_source(user) is scaled and dtype_of(user) == dtype:
            yield from _weighted_or_not(source, user, eps, (ROUND,), dtype)
            continue
        weighted = _weight_of(user, scaled, last_size(source))
        if weighted is not None:
            yield from _rounded_after(source, user, weighted, eps, dtype)


def _weighted_or_not(
    source: Node, value: Node, eps: Any, steps: tuple[str, ...], dtype: torch.dtype | None
) -> Iterator[Norm]:
    """Norms from `value`, the normalised x in x's dtype: times a weight, or weightless."""
    weighted = [(user, _weight_of(user, value, last_size(source))) for user in list(value.users)]
    if weighted and all(found is not None for _, found in weighted):
        for user, found in weighted:
            assert found is not None
            weight, bias, step = found
            out, problem = user, ""
            if dtype_of(user) != dtype:
                problem = (
                    f"the norm multiplies by a weight of dtype {dtype_of(weight)}, so its result is {dtype_of(user)} "
                    f"and not the input's {dtype}; store the weight in {dtype}"
                )
            yield _norm(source, out, weight, eps, bias, (*steps, step), problem)
        return
    yield _norm(source, value, None, eps, 0.0, steps, "")


def _rounded_after(
    source: Node, product: Node, weighted: tuple[Node, Any, str], eps: Any, dtype: torch.dtype | None
) -> Iterator[Norm]:
    """The norm whose product with the weight, in fp32, is rounded to x's dtype afterwards."""
    weight, bias, step = weighted
    for user in list(product.users):
        if cast_source(user) is product and dtype_of(user) == dtype:
            yield _norm(source, user, weight, eps, bias, (step, ROUND), "")
            return
    yield _norm(
        source,
        product,
        weight,
        eps,
        bias,
        (step,),
        f"the norm's result stays in {dtype_of(product)} and is never rounded to the input's {dtype}",
    )


def _norm(
    source: Node, out: Node, weight: Node | None, eps: Any, bias: Any, steps: tuple[str, ...], problem: str
) -> Norm:
    return Norm(source, None, out, None, weight, eps, bias, tail_form(steps), tail_name(steps), problem)


def _weight_of(user: Node, value: Node, hidden: Any) -> tuple[Node, Any, str] | None:
    """(raw weight, number added to it, step) if `user` multiplies `value` by a vector of hidden size."""
    factors = plain_mul(user)
    if factors is None or value not in factors or factors[0] is factors[1]:
        return None
    left = factors[1] is value
    vector = factors[0] if left else factors[1]
    if not is_vector(vector, hidden):
        return None
    inner, bias = vector, 0.0
    operands = plain_add(vector)
    if operands is not None:
        a, b = operands
        if is_number(b) and is_vector(a, hidden):
            inner, bias = a, b
        elif is_number(a) and is_vector(b, hidden):
            inner, bias = b, a
    if bias and dtype_of(inner) != dtype_of(value):
        inner, bias = vector, 0.0  # the sum was rounded, which the IR operators do not do: it is itself the weight
    raw = cast_source(inner)
    widened = raw is not None and is_vector(raw, hidden) and dtype_of(inner) == dtype_of(value) in _WIDE
    if not widened:
        raw = inner
    text = "wide(w)" if widened else "w"
    if bias:
        text += "+b"
    factor = f"({text})" if bias else text
    assert raw is not None
    return raw, bias, f"{factor}*n" if left else f"n*{factor}"


def _norms_of_op(node: Node) -> Iterator[Norm]:
    """The norm that an operator of its own (fusewire's, another engine's) computes."""
    entry = _NORM_OPS.get(op_name(node))
    if entry is None:
        return
    arguments = positional(node)
    problem = ""
    for position in entry.must_be_none:
        if position < len(arguments) and arguments[position] is not None:
            problem = f"{entry.op} was called with an option that a plain RMSNorm does not have"
    yield _norm_of_op(node, entry, arguments, problem)


def _norm_of_op(node: Node, entry: NormOp, arguments: list[Any], problem: str) -> Norm:
    x, residual, weight, eps = entry.operands
    ours = entry.op.startswith("fusewire::")
    bias = arguments[eps + 1] if ours else 0.0
    form = arguments[eps + 2] if ours else SCALE_THEN_ROUND
    out, sum_out = node, None
    if residual is not None:
        items = dict(getitem_users(node))
        out, sum_out = items.get(0, node), items.get(1)
    return Norm(
        arguments[x],
        None if residual is None else arguments[residual],
        out,
        sum_out,
        arguments[weight],
        arguments[eps],
        bias,
        form,
        entry.op,
        problem,
    )
