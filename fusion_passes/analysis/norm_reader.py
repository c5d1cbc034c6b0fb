"""Find every RMSNorm of a graph, however it is spelled, without changing the graph.

A norm is searched from its *root*: a node that computes a square root, or an operator that is a
norm by itself. A decomposed norm is read forwards from its root r:

    rows        the formulas that the root and the steps after it compute (norm_arithmetic.Row)
    use         x * r or x / r: the first product of the input with a row's number
    value       the normalised input, after one more product with a number if it is needed
    tail        the rounding to x's dtype and the product with the weight (patterns.norms.Tail)

The weight may be multiplied in before x and r meet (`_weighted_first`).
"""

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
    other_factor,
    plain_add,
    plain_div,
    plain_mul,
)
from fusewire.fusion_passes.analysis.norm_arithmetic import (
    Row,
    is_root,
    reaches_every_row,
    rounding_refusal,
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
    Variant,
    describe_variants,
    tail_form,
    tail_name,
    variant_names,
)

_WIDE = (torch.float32, torch.float64)
_NORM_OPS = {entry.op: entry for entry in NORM_OPS}


@dataclass(frozen=True)
class Norm:
    """An RMSNorm in a graph.

    Attributes:
        source: the node that is normalised; the addend, where an operator adds a residual itself.
        residual: what that operator adds, or None.
        out: the node whose value is the norm; its users are the norm's users.
        sum_out: the node that is the sum, where the operator returns one.
        weight: a node of shape (hidden,), or None.
        eps: a number, or a node where the graph does not know the number.
        weight_bias: the number added to the weight (0.0 where none is).
        form: where it rounds (`form` of the IR operators).
        spelling: the name of its spelling in the report.
        refusal: why this norm cannot become an IR operator, or "".
        variants: why it rounds elsewhere than the IR operator, or "".
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
    refusal: str = ""
    variants: str = ""


@dataclass(frozen=True)
class _Weight:
    """The factor of a normalised value: a weight, the number added to it, and a step of Tail."""

    node: Node
    bias: Any
    step: str


def norm_roots(graph: Graph) -> list[Node]:
    """Return the graph's square roots and operators that are norms, in order."""
    return [
        node for node in graph.nodes if node.op == "call_function" and (is_root(node) or op_name(node) in _NORM_OPS)
    ]


def norms_at(root: Node, allow_reassociation: bool = True) -> list[Norm]:
    """Return the norms built on a root, read from the graph as it now is.

    Args:
        root: one of `norm_roots`; if it has been erased since, it has no norms.
        allow_reassociation: whether norms may become IR operators that round elsewhere; if not,
            such norms are refused.
    """
    if root._erased:
        return []
    norms = list(_norms_of_root(root)) if is_root(root) else list(_norms_of_op(root))
    return norms if allow_reassociation else [_refuse_variants(norm) for norm in norms]


def find_norms(graph: Graph) -> list[Norm]:
    """Return all norms of a graph, in the order of their roots."""
    return [norm for root in norm_roots(graph) for norm in norms_at(root)]


def _refuse_variants(norm: Norm) -> Norm:
    if norm.refusal or not norm.variants:
        return norm
    refusal = f"the norm {norm.variants}; the fused operator rounds elsewhere, which allow_reassociation=False forbids"
    return dataclasses.replace(norm, refusal=refusal)


def _norms_of_root(root: Node) -> Iterator[Norm]:
    """Yield the norms built on a square root."""
    for node, row in rows_from(root):
        if not reaches_every_row(node, row.wide):
            continue
        for user in list(node.users):
            factor, quotient = other_factor(user, node), plain_div(user)
            if factor is not None and row.power == -0.5:
                yield from _norms_of_use(node, row, user, factor)
            elif quotient is not None and quotient[1] is node and row.power == 0.5 and row.factor > 0:
                yield from _norms_of_use(node, row.inverse().by(DIVIDED), user, quotient[0])


def _norms_of_use(node: Node, row: Row, user: Node, other: Any) -> Iterator[Norm]:
    """Yield the norms of `user`, which is `node` (the row's number) times `other`.

    `other` is x, x * weight, or a weight that x is multiplied by afterwards.
    """
    source = _source_of(row.wide)
    if same_input(other, row.wide):
        value, row = _whole(user, row)
        yield from _described(row, source, value, _tails(source, value, row.epsilon), (user, value))
        return
    for products, weight, variant in _weighted_first(node, row, user, other):
        value, whole = _whole(products[-1], row.by(variant))
        norm = _weighted(source, value, weight, whole.epsilon)
        yield from _described(whole, source, value, [norm], (*products, value))


def _source_of(wide: Node) -> Node:
    """Return the norm's input: the source of the cast `wide`, if operators cast it alike."""
    source = cast_source(wide)
    return wide if source is None or dtype_of(wide) != _computed_in(source) else source


def _described(
    row: Row, source: Node, value: Node, norms: Iterable[Norm], products: tuple[Node, ...]
) -> Iterator[Norm]:
    """Yield these norms with their variants and refusals.

    Args:
        products: the products from the row's number to `value`; none of them may round.
    """
    wide, refusal = dtype_of(row.wide), row.norm_refusal
    rounded = next((node for node in products if dtype_of(node) != wide), None)
    if wide != _computed_in(source):
        refusal = (
            f"the norm is computed in {wide}, where the fused operator computes in torch.float32; convert its "
            "input to float32 first, as torch.nn.RMSNorm does"
        )
    elif rounded is not None and not refusal:
        refusal = rounding_refusal(f"a product ({rounded.name})", dtype_of(rounded), wide)
    found = list(norms)
    if refusal and not found:
        found = [_norm(source, value, None, row.epsilon, ())]
    for norm in found:
        yield dataclasses.replace(
            norm,
            refusal=refusal or norm.refusal,
            spelling=norm.spelling + variant_names(row.variants),
            variants=describe_variants(row.variants),
        )


def _whole(value: Node, row: Row) -> tuple[Node, Row]:
    """Return the normalised value and its row, after a product with a number if one is left."""
    found = [] if row.is_mean else [(user, scaled_by(row, value, user)) for user in value.users]
    scaled = [(user, whole) for user, whole in found if whole is not None]
    return next((item for item in scaled if item[1].is_mean), scaled[0] if scaled else (value, row))


def _weighted_first(
    node: Node, row: Row, user: Node, other: Any
) -> Iterator[tuple[tuple[Node, ...], _Weight, Variant]]:
    """Yield (products, weight, variant) where x and the row's number do not meet first.

    The last product is the norm. `user` is `node` (the row's number) times `other`.
    """
    hidden, wide = last_size(row.wide), dtype_of(row.wide)
    divided = plain_div(user) is not None
    weight = _read_weight(other, wide, True, hidden) if divided else _weight_of(user, node, hidden)
    if weight is not None:
        for product in (user, *(reader for reader in user.users if cast_source(reader) is user)):
            for reader in list(product.users):
                if same_input(other_factor(reader, product), row.wide):
                    yield (user, product, reader), weight, WEIGHTED_ROOT
    first = other if plain_mul(other) is not None else cast_source(other)
    factors = plain_mul(first)
    if first is None or factors is None:
        return
    for left, (x, vector) in enumerate((factors, factors[::-1])):
        weight = _read_weight(vector, wide, bool(left), hidden) if same_input(x, row.wide) else None
        if weight is not None:
            yield (first, other, user), weight, WEIGHTED_INPUT


def _computed_in(node: Any) -> torch.dtype | None:
    """Return the dtype that the IR operators compute the norm of this node in, or None."""
    dtype = dtype_of(node)
    return None if dtype is None or not dtype.is_floating_point else torch.promote_types(dtype, torch.float32)


def _tails(source: Node, value: Node, eps: Any) -> Iterator[Norm]:
    """Yield the norms that the normalised value becomes by rounding and the weight."""
    dtype = dtype_of(source)
    if dtype_of(value) == dtype:
        yield from _weighted_or_not(source, value, eps, ())
        return
    for user in list(value.users):
        if cast_source(user) is value and dtype_of(user) == dtype:
            yield from _weighted_or_not(source, user, eps, (ROUND,))
        elif (weight := _weight_of(user, value, last_size(source))) is not None:
            yield _weighted(source, user, weight, eps)


def _weighted_or_not(source: Node, value: Node, eps: Any, steps: tuple[str, ...]) -> Iterator[Norm]:
    """Yield the norms of `value`, the normalised x in x's dtype: times a weight, or weightless."""
    weighted = [(user, _weight_of(user, value, last_size(source))) for user in list(value.users)]
    if not weighted or any(weight is None for _, weight in weighted):
        yield _norm(source, value, None, eps, steps)
        return
    dtype = dtype_of(source)
    for out, weight in weighted:
        assert weight is not None
        refusal = ""
        if dtype_of(out) != dtype:
            refusal = (
                f"the norm multiplies by a weight of dtype {dtype_of(weight.node)}, so its result is {dtype_of(out)} "
                f"and not the input's {dtype}; store the weight in {dtype}"
            )
        yield _norm(source, out, weight, eps, (*steps, weight.step), refusal)


def _weighted(source: Node, product: Node, weight: _Weight, eps: Any) -> Norm:
    """Return the norm of a product with the weight, which may be cast to x's dtype afterwards."""
    dtype = dtype_of(source)
    if dtype_of(product) == dtype:
        return _norm(source, product, weight, eps, (weight.step,))
    for user in product.users:
        if cast_source(user) is product and dtype_of(user) == dtype:
            return _norm(source, user, weight, eps, (weight.step, ROUND))
    refusal = f"the norm's result stays in {dtype_of(product)} and is never rounded to the input's {dtype}"
    return _norm(source, product, weight, eps, (weight.step,), refusal)


def _norm(source: Node, out: Node, weight: _Weight | None, eps: Any, steps: tuple[str, ...], refusal: str = "") -> Norm:
    node, bias = (None, 0.0) if weight is None else (weight.node, weight.bias)
    return Norm(source, None, out, None, node, eps, bias, tail_form(steps), tail_name(steps), refusal)


def _weight_of(user: Node, value: Node, hidden: Any) -> _Weight | None:
    """Return the weight if `user` multiplies `value` by a vector of hidden size, else None."""
    vector = other_factor(user, value)
    return None if vector is None else _read_weight(vector, dtype_of(value), user.args[1] is value, hidden)


def _read_weight(vector: Any, dtype: torch.dtype | None, left: bool, hidden: Any) -> _Weight | None:
    """Return the weight that a vector of hidden size stands for, or None if it is no weight.

    Args:
        dtype: the dtype of the value that it multiplies.
        left: whether it stands to the left of that value.
    """
    if not is_vector(vector, hidden):
        return None
    inner, bias = _split_bias(vector, hidden)
    if bias and dtype_of(inner) != dtype:
        inner, bias = vector, 0.0  # the sum was rounded: it is the weight
    raw = cast_source(inner)
    text = "w"
    if raw is not None and is_vector(raw, hidden) and dtype_of(inner) == dtype in _WIDE:
        inner, text = raw, "wide(w)"
    factor = f"({text}+b)" if bias else text
    return _Weight(inner, bias, f"{factor}*n" if left else f"n*{factor}")


def _split_bias(vector: Node, hidden: Any) -> tuple[Node, Any]:
    """Return (vector, number) if a vector is their sum, else itself and 0.0."""
    operands = plain_add(vector)
    for inner, number in (operands, operands[::-1]) if operands is not None else ():
        if is_number(number) and is_vector(inner, hidden):
            return inner, number
    return vector, 0.0


def _norms_of_op(node: Node) -> Iterator[Norm]:
    """Yield the norm that an operator of its own (fusewire's, another engine's) computes."""
    entry = _NORM_OPS.get(op_name(node))
    if entry is None:
        return
    arguments = positional(node)
    refusal = ""
    if any(position < len(arguments) and arguments[position] is not None for position in entry.must_be_none):
        refusal = f"{entry.op} was called with an option that a plain RMSNorm does not have"
    x, residual, weight, eps = entry.operands
    bias, form = arguments[eps + 1 : eps + 3] if entry.op.startswith("fusewire::") else (0.0, SCALE_THEN_ROUND)
    out, sum_out, added = node, None, None
    if residual is not None:
        items = dict(getitem_users(node))
        out, sum_out, added = items.get(0, node), items.get(1), arguments[residual]
    options = arguments[weight], arguments[eps], bias, form
    yield Norm(arguments[x], added, out, sum_out, *options, entry.op, refusal)
