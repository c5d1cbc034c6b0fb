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
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from fusewire.custom_ops.ops.norms import ROUND_THEN_SCALE, SCALE_THEN_ROUND, keeps_wide_sum, with_wide_sum
from fusewire.fusion_passes.analysis.graph import (
    addends_of,
    cast_source,
    dtype_of,
    getitem_users,
    last_size,
    other_factor,
    plain_div,
    plain_mul,
    wide_addends,
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
from fusewire.fusion_passes.analysis.norm_weights import Weight, read_weight, weight_of
from fusewire.patterns.collectives import op_name, positional
from fusewire.patterns.norms import (
    DIVIDED,
    LENGTH,
    NORM_OPS,
    ROUND,
    SUMMED,
    WEIGHTED_INPUT,
    WEIGHTED_ROOT,
    WIDE_SUM,
    Variant,
    describe_variants,
    tail_form,
    tail_name,
    variant_names,
)

# Key in the metadata of an operator that a pass made: the operator that the program called.
SPELLING = "fusewire_spelling"
_NORM_OPS = {entry.op: entry for entry in NORM_OPS}
_LIMIT = 24  # nodes from a sum to its norm


@dataclass(frozen=True)
class Norm:
    """An RMSNorm in a graph.

    Attributes:
        source: the node that is normalised; one addend, where the norm adds a residual itself.
        residual: what it adds: an operator, or a norm that reads a sum in fp32 (`total`); or None.
        out: the node whose value is the norm; its users are the norm's users.
        sums: the nodes that are the rounded sum of source and residual.
        weight: a node of shape (hidden,), or None.
        eps: a number, or a node where the graph does not know the number.
        weight_bias: the number added to the weight (0.0 where none is).
        form: where it rounds (`form` of the IR operators).
        spelling: the name of its spelling in the report.
        refusal: why this norm cannot become an IR operator, or "".
        variants: why it rounds elsewhere than the IR operator, or "".
        total: the sum in fp32 that is normalised before it is rounded, or None.
        weight_scale: a factor of the weight that stands in no node of the graph (L2 norms).
    """

    source: Node
    residual: Node | None
    out: Node
    sums: tuple[Node, ...]
    weight: Node | None
    eps: Any
    weight_bias: Any
    form: str
    spelling: str
    refusal: str = ""
    variants: str = ""
    total: Node | None = None
    weight_scale: float = 1.0

    @property
    def input(self) -> Node:
        """Return the node that the norm reads: the sum in fp32, or the source."""
        return self.total or self.source

    @property
    def addends(self) -> tuple[Any, Any] | None:
        """Return the operands of the sum that is normalised, or None if it is no sum."""
        return addends_of(self.source) if self.residual is None else (self.source, self.residual)


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
    for source in _sources_of(row.wide):
        if same_input(other, row.wide):
            value, whole = _whole(user, row)
            yield from _described(whole, source, value, _tails(source, value, whole.epsilon), (user, value))
            continue
        for products, weight, variant in _weighted_first(node, row, user, other):
            value, whole = _whole(products[-1], row.by(variant))
            norm = _weighted(source, value, weight, whole.epsilon)
            yield from _described(whole, source, value, [norm], (*products, value))


def _sources_of(wide: Node) -> list[Node]:
    """Return the nodes that a norm of `wide` may be read as a norm of, the first of them first.

    An addend stands for a sum in fp32; if the norm cannot be read so, it is the norm of that sum.
    """
    addends = wide_addends(wide)
    return [_source_of(wide)] if addends is None else [addends[0], wide]


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
    addends = wide_addends(row.wide) if source is not row.wide else None
    rounded = next((node for node in products if dtype_of(node) != wide), None)
    if wide != _computed_in(source):
        refusal = (
            f"the norm is computed in {wide}, where the fused operator computes in torch.float32; "
            "convert its input to float32 first, as torch.nn.RMSNorm does"
        )
    elif rounded is not None and not refusal:
        refusal = rounding_refusal(f"a product ({rounded.name})", dtype_of(rounded), wide)
    found = list(norms)
    if refusal and not found:
        found = [_norm(source, value, None, row.epsilon, ())]
    variants = row.variants - {SUMMED} | {LENGTH} if row.is_length else row.variants
    for norm in found:
        described = dataclasses.replace(
            norm,
            refusal=refusal or norm.refusal or (_length_refusal(row, norm) if row.is_length else ""),
            spelling=norm.spelling + variant_names(variants),
            variants=describe_variants(variants),
            weight_scale=row.weight_scale,
        )
        yield described if addends is None else _of_sum(described, row.wide, addends[1])


def _length_refusal(row: Row, norm: Norm) -> str:
    """Return why an L2 norm's weight cannot be divided by the root of the hidden size, or ""."""
    if norm.weight_bias:
        return row.divisor_refusal
    if norm.weight is None or dtype_of(norm.weight) != torch.float16:
        return ""
    return f"{row.divisor_refusal}; float16 is too small for the weight divided by the root of {last_size(row.wide)}"


def _of_sum(norm: Norm, total: Node, residual: Node) -> Norm:
    """Return a norm of its source as the norm of `total`, the sum in fp32 with the residual."""
    sums = tuple(user for user in total.users if cast_source(user) and dtype_of(user) == dtype_of(norm.source))
    reader = _read_elsewhere(total, norm.out, sums)
    refusal = norm.refusal
    if reader is not None and not refusal:
        refusal = (
            f"the sum that is normalised is also read in {dtype_of(total)} ({reader}), and the "
            f"fused operator returns it in {dtype_of(norm.source)}"
        )
    return dataclasses.replace(
        norm,
        residual=residual,
        sums=sums,
        form=with_wide_sum(norm.form),
        spelling=norm.spelling + WIDE_SUM,
        refusal=refusal,
        total=total,
    )


def _read_elsewhere(total: Node, out: Node, sums: Collection[Node]) -> Node | None:
    """Return a node that is computed from `total` other than for `out` and `sums`, or None."""
    inside, pending = {out, *sums}, [total]
    while pending:
        node = pending.pop()
        if not node.users or node.op == "output" or len(inside) > _LIMIT:
            return node
        for user in node.users:
            if user not in inside:
                inside.add(user)
                pending.append(user)
    return None


def _whole(value: Node, row: Row) -> tuple[Node, Row]:
    """Return the normalised value and its row, after a product with a number if one is left."""
    found = [] if row.is_mean else [(user, scaled_by(row, value, user)) for user in value.users]
    scaled = [(user, whole) for user, whole in found if whole is not None]
    return next((item for item in scaled if item[1].is_mean), scaled[0] if scaled else (value, row))


def _weighted_first(node: Node, row: Row, user: Node, other: Any) -> Iterator[tuple[tuple[Node, ...], Weight, Variant]]:
    """Yield (products, weight, variant) where x and the row's number do not meet first.

    The last product is the norm. `user` is `node` (the row's number) times `other`.
    """
    hidden, wide = last_size(row.wide), dtype_of(row.wide)
    divided = plain_div(user) is not None
    weight = read_weight(other, wide, True, hidden) if divided else weight_of(user, node, hidden)
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
        weight = read_weight(vector, wide, bool(left), hidden) if same_input(x, row.wide) else None
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
        elif (weight := weight_of(user, value, last_size(source))) is not None:
            yield _weighted(source, user, weight, eps)


def _weighted_or_not(source: Node, value: Node, eps: Any, steps: tuple[str, ...]) -> Iterator[Norm]:
    """Yield the norms of `value`, the normalised x in x's dtype: times a weight, or weightless."""
    weighted = [(user, weight_of(user, value, last_size(source))) for user in list(value.users)]
    if not weighted or any(weight is None for _, weight in weighted):
        yield _norm(source, value, None, eps, steps)
        return
    dtype = dtype_of(source)
    for out, weight in weighted:
        assert weight is not None
        refusal = ""
        if dtype_of(out) != dtype:
            refusal = (
                f"the norm multiplies by a weight of dtype {dtype_of(weight.node)}, so its result "
                f"is {dtype_of(out)} and not the input's {dtype}; store the weight in {dtype}"
            )
        yield _norm(source, out, weight, eps, (*steps, weight.step), refusal)


def _weighted(source: Node, product: Node, weight: Weight, eps: Any) -> Norm:
    """Return the norm of a product with the weight, which may be cast to x's dtype afterwards."""
    dtype = dtype_of(source)
    if dtype_of(product) == dtype:
        return _norm(source, product, weight, eps, (weight.step,))
    for user in product.users:
        if cast_source(user) is product and dtype_of(user) == dtype:
            return _norm(source, user, weight, eps, (weight.step, ROUND))
    refusal = f"the norm's result stays in {dtype_of(product)} and is never rounded to the input's {dtype}"
    return _norm(source, product, weight, eps, (weight.step,), refusal)


def _norm(source: Node, out: Node, weight: Weight | None, eps: Any, steps: tuple[str, ...], refusal: str = "") -> Norm:
    node, bias = (None, 0.0) if weight is None else (weight.node, weight.bias)
    return Norm(source, None, out, (), node, eps, bias, tail_form(steps), tail_name(steps), refusal)


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
    out, added, items = node, None, []
    if residual is not None:
        items = list(getitem_users(node))
        out, added = dict(items).get(0, node), arguments[residual]
    sums = tuple(item for index, item in items if index == 1)
    spelling = node.meta.get(SPELLING, entry.op)
    if entry.op.startswith("fusewire::"):
        scale, bias, form, misfit = arguments[weight], arguments[eps + 1], arguments[eps + 2], ""
    else:
        scale, bias, form, misfit = _vllm_options(arguments[x], added, arguments[weight])
    yield Norm(arguments[x], added, out, sums, scale, arguments[eps], bias, form, spelling, refusal or misfit)


def _vllm_options(x: Any, residual: Any, weight: Any) -> tuple[Any, Any, str, str]:
    """Return (weight, weight_bias, form, refusal) of a call of vLLM's norm."""
    dtype, scale, bias, form, refusal = dtype_of(x), weight, 0.0, SCALE_THEN_ROUND, ""
    if torch.float64 in (dtype, dtype_of(residual)):
        refusal = "vLLM's norm of float64 is computed in float32, and the fused operator's in float64"
    elif weight is not None:
        if (read := read_weight(weight, dtype_of(weight), True, last_size(x))) is not None:
            scale, bias = read.node, read.bias
        if dtype_of(weight) == dtype:
            form = ROUND_THEN_SCALE
        elif dtype_of(weight) != torch.float32:
            refusal = (
                f"vLLM's norm rounds to the weight's dtype, {dtype_of(weight)}, and its input is "
                f"{dtype}; store the weight in {dtype}"
            )
    if residual is not None and dtype is not None and keeps_wide_sum(with_wide_sum(form), dtype):
        form = with_wide_sum(form)
    return scale, bias, form, refusal
