"""Find every RMSNorm of a graph, however it is spelled, without changing anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from fusewire.custom_ops.ops.norms import SCALE_THEN_ROUND
from fusewire.fusion_passes.analysis.graph import (
    cast_source,
    dtype_of,
    getitem_users,
    is_number,
    is_vector,
    last_size,
    plain_add,
    plain_div,
    plain_mul,
)
from fusewire.fusion_passes.analysis.norm_arithmetic import (
    Row,
    is_root,
    reaches_every_row,
    rounded_between,
    rows_from,
    same_input,
    scaled_by,
)
from fusewire.patterns.collectives import op_name, positional
from fusewire.patterns.norms import (
    DIVIDED,
    NORM_OPS,
    ROUND,
    WEIGHTED_INPUT,
    WEIGHTED_ROOT,
    NormOp,
    detour_moves,
    detour_names,
    tail_form,
    tail_name,
)

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
        moves: what it does otherwise than the IR operator, which therefore rounds elsewhere, or "".
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
    moves: str = ""


def norm_roots(graph: Graph) -> list[Node]:
    """The nodes on which norms are built, in the graph's order: square roots and operators that are norms."""
    return [
        node for node in graph.nodes if node.op == "call_function" and (is_root(node) or op_name(node) in _NORM_OPS)
    ]


def norms_at(root: Node, allow_reassociation: bool = True) -> list[Norm]:
    """The norms built on a root, read from the graph as it now is.

    Args:
        allow_reassociation: whether a norm that rounds elsewhere than the IR operators may become one; without it such
            norms have a problem.
    """
    if root._erased:
        return []
    norms = list(_norms_of_root(root)) if is_root(root) else list(_norms_of_op(root))
    return norms if allow_reassociation else [_where_it_rounds(norm) for norm in norms]


def find_norms(graph: Graph) -> list[Norm]:
    """All norms of a graph, in the order of their roots."""
    return [norm for root in norm_roots(graph) for norm in norms_at(root)]


def _where_it_rounds(norm: Norm) -> Norm:
    if norm.problem or not norm.moves:
        return norm
    return dataclasses.replace(
        norm,
        problem=f"the norm {norm.moves}; the fused operator rounds elsewhere, which allow_reassociation=False forbids",
    )


def _norms_of_root(root: Node) -> Iterator[Norm]:
    """The norms built on a square root: x times, or divided by, what is computed from it."""
    for node, row in rows_from(root):
        if not reaches_every_row(node, row.wide):
            continue
        for user in list(node.users):
            factors, quotient = plain_mul(user), plain_div(user)
            if factors is not None and node in factors and factors[0] is not factors[1] and row.power == -0.5:
                yield from _norms_of_use(node, row, user, factors[factors[0] is node])
            elif quotient is not None and quotient[1] is node and row.power == 0.5 and row.factor > 0:
                yield from _norms_of_use(node, row.inverse().by(DIVIDED), user, quotient[0])


def _norms_of_use(node: Node, row: Row, user: Node, other: Any) -> Iterator[Norm]:
    """The norms of `user`, which is `other` times the row's number: x, x * weight, or a weight that x is multiplied by."""
    source = _source_of(row.wide)
    if same_input(other, row.wide):
        value, row = _whole(user, row)
        yield from _described(row, source, value, _tails(source, value, row.epsilon), (user, value))
        return
    for products, weighted, detour in _weighted_first(node, row, user, other):
        value, whole = _whole(products[-1], row.by(detour))
        norms = _weighted(source, value, weighted, whole.epsilon)
        yield from _described(whole, source, value, norms, (*products, value))


def _source_of(wide: Node) -> Node:
    """What is normalised, where `wide` is squared: what it is a copy of in the dtype that the IR operators compute in."""
    source = cast_source(wide)
    return wide if source is None or dtype_of(wide) != _computed_in(source) else source


def _described(
    row: Row, source: Node, value: Node, norms: Iterable[Norm], products: tuple[Node, ...]
) -> Iterator[Norm]:
    """These norms with what their arithmetic is called, and why it may not serve; `products` are those on the way."""
    wide, problem = dtype_of(row.wide), row.trouble
    rounded = next((node for node in products if dtype_of(node) != wide), None)
    if wide != _computed_in(source):
        problem = (
            f"the norm is computed in {wide}, where the fused operator computes in torch.float32; convert its "
            "input to float32 first, as torch.nn.RMSNorm does"
        )
    elif rounded is not None and not problem:
        problem = rounded_between(f"a product ({rounded.name})", dtype_of(rounded), wide)
    found = list(norms)
    if problem and not found:
        found = [_norm(source, value, None, row.epsilon, 0.0, (), "")]
    for norm in found:
        yield dataclasses.replace(
            norm,
            problem=problem or norm.problem,
            spelling=norm.spelling + detour_names(row.detours),
            moves=detour_moves(row.detours),
        )


def _whole(value: Node, row: Row) -> tuple[Node, Row]:
    """The normalised value; its product with a number (the root of the hidden size), if it still lacks one."""
    found = [] if row.is_mean else [(user, scaled_by(row, value, user)) for user in value.users]
    scaled = [(user, whole) for user, whole in found if whole is not None]
    return next((item for item in scaled if item[1].is_mean), scaled[0] if scaled else (value, row))


def _weighted_first(
    node: Node, row: Row, user: Node, other: Any
) -> Iterator[tuple[tuple[Node, ...], tuple[Node, Any, str], str]]:
    """The norms in which x and the row's number do not meet first, before the weight.

    Yields:
        (the products, the last of which is the norm's; the weight as _weight_of reads it; how that is spelled).
    """
    hidden, wide = last_size(row.wide), dtype_of(row.wide)
    divided = plain_div(user) is not None
    weighted = _read_weight(other, wide, True, hidden) if divided else _weight_of(user, node, hidden)
    if weighted is not None:
        for product in (user, *(reader for reader in user.users if cast_source(reader) is user)):
            for reader in list(product.users):
                factors = plain_mul(reader)
                if factors is not None and product in factors and same_input(factors[factors[0] is product], row.wide):
                    yield (user, product, reader), weighted, WEIGHTED_ROOT
    first = other if plain_mul(other) is not None else cast_source(other)
    factors = plain_mul(first)
    for left, (x, vector) in enumerate((factors, factors[::-1]) if factors is not None else ()):
        weighted = _read_weight(vector, wide, bool(left), hidden) if same_input(x, row.wide) else None
        if weighted is not None and first is not None:
            yield (first, other, user), weighted, WEIGHTED_INPUT


def _weighted(source: Node, value: Node, weighted: tuple[Node, Any, str], eps: Any) -> Iterator[Norm]:
    """The norm whose product with the weight is `value`."""
    if dtype_of(value) != dtype_of(source):
        yield from _rounded_after(source, value, weighted, eps, dtype_of(source))
        return
    weight, bias, step = weighted
    yield _norm(source, value, weight, eps, bias, (step,), "")


def _computed_in(node: Any) -> torch.dtype | None:
    """The dtype that the IR operators compute the norm of this node in."""
    dtype = dtype_of(node)
    return None if dtype is None or not dtype.is_floating_point else torch.promote_types(dtype, torch.float32)


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
    return _read_weight(factors[not left], dtype_of(value), left, hidden)


def _read_weight(vector: Any, dtype: torch.dtype | None, left: bool, hidden: Any) -> tuple[Node, Any, str] | None:
    """(raw weight, number added to it, step) of a vector of hidden size, which stands to the left of a value or not."""
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
    if bias and dtype_of(inner) != dtype:
        inner, bias = vector, 0.0  # the sum was rounded, which the IR operators do not do: it is itself the weight
    raw = cast_source(inner)
    widened = raw is not None and is_vector(raw, hidden) and dtype_of(inner) == dtype in _WIDE
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
