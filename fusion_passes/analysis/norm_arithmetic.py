"""Read the number that scales a row in an RMSNorm, however a program computes it.

The number is `rsqrt(mean(x^2) + eps)`. Programs spell it differently: a sum divided by the hidden
size, a vector's length divided by the size's root, the reciprocal of a root. Each of them is the
same formula with other numbers,

    factor * (scale * S + eps) ** power        S: the sum of the row's squares

so `read_row` reads a graph node as such a formula (`Row`), step by step from the squares on: S
itself is `factor = scale = power = 1`, a mean has scale 1 / size, rsqrt sets power -1/2, and so on.
The formula then shows whether the number is RMSNorm's (`Row.is_mean`) and, if not, why (a clamp, an
epsilon outside the root, a wrong divisor).
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fusewire.fusion_passes.analysis.graph import (
    VIEWS,
    aten,
    cast_source,
    dtype_of,
    is_number,
    last_size,
    other_factor,
    plain_add,
    plain_div,
    plain_mul,
    same_shape,
    same_size,
    value_of,
    viewed_by_both,
)
from fusewire.fusion_passes.analysis.scales import constant_of
from fusewire.patterns.norms import RECIPROCAL, SCALED, SQUARED_ROOT, SUMMED, Variant

_POWERS: dict[Any, float] = {aten.rsqrt.default: -0.5, aten.sqrt.default: 0.5, aten.reciprocal.default: -1}
_CLAMPS = (aten.clamp, aten.clamp_min, aten.maximum)
_EXPAND = aten.expand.default
_LIMIT = 12


@dataclass(frozen=True)
class Row:
    """One number for each row of `wide`: `factor * (scale * size**sizes * S + eps) ** power`.

    S is the sum of the row's squares and `size` the hidden size, which may be symbolic.

    Attributes:
        wide: the node whose rows are squared, of shape (..., size).
        eps: a number, a node that holds an unknown number, or None if nothing was added.
        variants: how its spelling differs from RMSNorm's own.
        refusal: the step that no RMSNorm has, as a sentence, or "".
    """

    wide: Node
    scale: float = 1.0
    sizes: int = 0
    eps: Any = None
    power: float = 1.0
    factor: float = 1.0
    variants: frozenset[Variant] = frozenset()
    refusal: str = ""

    def by(self, *variants: Variant) -> Row:
        """Return this row with these variants added."""
        return dataclasses.replace(self, variants=self.variants.union(variants))

    def times(self, number: float, sizes: int = 0) -> Row | None:
        """Return this row times `number * size**sizes`; None if the product is no such formula."""
        if (number, sizes) == (1, 0):
            return self
        row = self if SUMMED in self.variants and self.power == 1 else self.by(SCALED)
        if self.power == 1:
            if self.eps is not None and (sizes or not is_number(self.eps)):
                return None
            eps = None if self.eps is None else self.eps * number
            return dataclasses.replace(row, scale=self.scale * number, sizes=self.sizes + sizes, eps=eps)
        size = last_size(self.wide)
        if sizes and not isinstance(size, int):
            return None
        return dataclasses.replace(row, factor=self.factor * number * float(size) ** sizes)

    def plus(self, eps: Any) -> Row | None:
        """Return this row with a number or a node added; None if the sum is no such formula."""
        if self.power != 1:
            outside = "the norm adds its epsilon outside the square root, where RMSNorm adds it to the mean square"
            return dataclasses.replace(self, refusal=outside) if is_number(eps) else None
        return dataclasses.replace(self, eps=eps) if self.eps is None else None

    def to_the(self, power: float) -> Row | None:
        """Return a power of this row; None if that is not known to be such a formula."""
        if not (1e-30 < self.factor < 1e30 and abs(power) <= 4):
            return None
        if self.power != 1 and not (self.eps is None or (is_number(self.eps) and self.eps >= 0)):
            return None  # (b ** p) ** q is b ** (p * q) only if b is not negative
        row = self
        if power == -1:
            row = self.by(RECIPROCAL)
        elif abs(self.power) != 1:
            row = self.by(SQUARED_ROOT)
        row = dataclasses.replace(row, power=self.power * power, factor=self.factor**power)
        if row.power != 1 or row.factor == 1:
            return row
        eps = None if row.eps is None else row.eps * row.factor
        return dataclasses.replace(row, factor=1.0, scale=row.scale * row.factor, eps=eps)

    def inverse(self) -> Row:
        """Return the reciprocal of this row."""
        return dataclasses.replace(self, power=-self.power, factor=1 / self.factor if self.factor else 0.0)

    @property
    def divisor(self) -> float | None:
        """Return the divisor if this is `(S / divisor + eps) ** power`, else None."""
        size = last_size(self.wide)
        sizes = self.sizes
        if not isinstance(size, int):
            if sizes not in (0, -1):
                return None
            size, sizes = 1, 0
        weight = self.scale * float(size) ** sizes
        return self.factor * self.factor / weight if weight > 0 < self.factor else None

    @property
    def is_mean(self) -> bool:
        """Return whether this is `rsqrt(S / size + eps)` for some eps."""
        size = last_size(self.wide)
        if self.divisor is None or self.power != -0.5:
            return False
        if isinstance(size, int):
            return math.isclose(self.divisor, size, rel_tol=1e-9)
        return self.sizes == -1 and math.isclose(self.divisor, 1, rel_tol=1e-9)

    @property
    def is_length(self) -> bool:
        """Return whether this is `rsqrt(S + eps)`, an L2 norm's, with a known eps and size."""
        known = isinstance(last_size(self.wide), int) and (self.eps is None or is_number(self.eps))
        if not known or self.divisor is None or self.power != -0.5 or self.is_mean:
            return False
        return math.isclose(self.divisor, 1, rel_tol=1e-9)

    @property
    def weight_scale(self) -> float:
        """Return the factor of the weight that makes this an RMSNorm: 1, or an L2 norm's."""
        return float(last_size(self.wide)) ** -0.5 if self.is_length else 1.0

    @property
    def epsilon(self) -> Any:
        """Return the eps of the RMSNorm that this row scales."""
        if self.eps is None:
            return 0.0
        if self.is_length:
            return self.eps / self.factor**2 / last_size(self.wide)
        scaled = self.factor != 1 and self.is_mean and is_number(self.eps)
        return self.eps / self.factor**2 if scaled else self.eps

    @property
    def norm_refusal(self) -> str:
        """Return why this cannot scale a row as RMSNorm does, or ""."""
        if self.refusal or self.is_mean or self.is_length:
            return self.refusal
        return self.divisor_refusal

    @property
    def divisor_refusal(self) -> str:
        """Return the refusal of a norm that divides by something else than the hidden size."""
        size = last_size(self.wide)
        by = f"{self.divisor:g}" if isinstance(size, int) and self.divisor is not None else "something else"
        return f"the norm divides the sum of squares by {by}, where RMSNorm's mean square divides by the hidden size {size}"


def is_root(node: Node) -> bool:
    """Return whether a node is a square root, or the reciprocal of one."""
    if node.target is aten.pow.Tensor_Scalar:
        return bool(node.args[1] in (0.5, -0.5))
    return node.target is aten.rsqrt.default or node.target is aten.sqrt.default


def rows_from(root: Node) -> Iterator[tuple[Node, Row]]:
    """Yield (node, row) for each node with one number a row, from a root up to the next."""
    pending, seen = [root], {root}
    while pending:
        node = pending.pop(0)
        row = read_row(node)
        if row is None:
            continue
        yield node, row
        # A node of x's shape is x times the number already, unless it is the number expanded.
        later = [
            user
            for user in node.users
            if user not in seen and not is_root(user) and (not same_shape(user, row.wide) or user.target is _EXPAND)
        ]
        seen.update(later)
        pending.extend(later)


def read_row(node: Any, limit: int = _LIMIT) -> Row | None:
    """Return the formula that a node computes of a tensor's rows, or None (at most 12 steps)."""
    if not isinstance(node, Node) or node.op != "call_function" or limit == 0:
        return None
    row = _sum_of_squares(node)
    for read in (_power, _product, _quotient, _shifted, _clamped, _kept):
        if row is None:
            row = read(node, lambda source: read_row(source, limit - 1))
    if row is None or not _is_per_row(node, row.wide):
        return None
    if dtype_of(node) != dtype_of(row.wide) and not row.refusal:
        row = dataclasses.replace(row, refusal=rounding_refusal("the root", dtype_of(node), dtype_of(row.wide)))
    return row


_Read = Callable[[Any], "Row | None"]


def rounding_refusal(what: str, dtype: torch.dtype | None, wide: torch.dtype | None) -> str:
    """Return the refusal of a norm that rounds a value before its end, or widens it."""
    if dtype == torch.float64:
        return f"the norm computes {what} in {dtype}, where the fused operator computes in {wide}; keep it in {wide}"
    return f"the norm rounds {what} to {dtype} early, which neither form of the fused operator does; keep it in {wide}"


def reaches_every_row(node: Any, wide: Node) -> bool:
    """Return whether `wide` times a node with one number a row multiplies row by row."""
    value, rows = value_of(node), value_of(wide)
    if value is None or rows is None:
        return False
    # A row alone may have a number without dimensions.
    shape = (*rows.shape[:-1], 1) if value.dim() else rows.shape[:-1]
    return (value.dim() == len(shape) and all(map(same_size, value.shape, shape))) or same_shape(node, wide)


def same_input(node: Any, wide: Node) -> bool:
    """Return whether a factor is the norm's input; `wide` is the node that the norm squares.

    The input is `wide`, another cast to its dtype, or the cast's source (which the product widens).
    """
    source = cast_source(wide)
    if node is wide or source is None:
        return node is wide
    return node is source or (cast_source(node) is source and dtype_of(node) == dtype_of(wide))


def scaled_by(row: Row, value: Node, product: Node) -> Row | None:
    """Return the row of a product or quotient of `value` (with this row) and a number."""
    factor, quotient, size = other_factor(product, value), plain_div(product), last_size(row.wide)
    if factor is not None:
        number = _number(factor, size)
        return None if number is None else row.times(*number)
    if quotient is not None and quotient[0] is value:
        number = _number(quotient[1], size)
        return None if number is None or not number[0] else row.times(1 / number[0], -number[1])
    return None


# The steps. Each function reads one kind of node; `read` reads the node before it.


def _sum_of_squares(node: Node) -> Row | None:
    mean = _is_mean(node)
    if node.target is aten.bmm.default:
        wide = _row_products(*node.args)
    else:
        summed = mean or node.target is aten.sum.dim_IntList
        wide = _squared(node.args[0]) if summed and _over_last_dimension(node) else None
    if wide is None:
        return None
    return Row(wide, sizes=-1) if mean else Row(wide, variants=frozenset({SUMMED}))


def _is_mean(node: Any) -> bool:
    return isinstance(node, Node) and node.target is aten.mean.dim


def _over_last_dimension(mean: Node) -> bool:
    value = value_of(mean.args[0])
    dims = mean.args[1] if len(mean.args) > 1 else None
    if value is None or not isinstance(dims, (list, tuple)):
        return False
    if mean.kwargs.get("dtype") not in (None, value.dtype):
        return False
    return len(dims) == 1 and dims[0] in (-1, value.dim() - 1)


def _squared(node: Any) -> Node | None:
    """Return x if the node is x squared, else None."""
    if not isinstance(node, Node):
        return None
    if node.target is aten.pow.Tensor_Scalar and node.args[1] == 2:
        return node.args[0] if isinstance(node.args[0], Node) else None
    a, b = plain_mul(node) or (None, None)
    if not isinstance(a, Node) or not isinstance(b, Node):
        return None
    twice = cast_source(a) is not None and cast_source(a) is cast_source(b) and dtype_of(a) == dtype_of(b)
    if a is b or twice:
        return a
    return viewed_by_both(a, b) if same_shape(a, b) else None


def _row_products(left: Any, right: Any) -> Node | None:
    """Return x if a product of matrices multiplies each row of x, (1, size), by itself, (size, 1).

    Two views have as many elements, so one of their dimensions of 1 says that both are.
    """
    return viewed_by_both(left, right) if same_size(value_of(left).shape[1], 1) else None  # type: ignore[union-attr]


def _power(node: Node, read: _Read) -> Row | None:
    power: Any = node.args[1] if node.target is aten.pow.Tensor_Scalar else _POWERS.get(node.target)
    if not is_number(power):
        return None
    row = read(node.args[0])
    return None if row is None else row.to_the(power)


def _product(node: Node, read: _Read) -> Row | None:
    factors = plain_mul(node)
    for value, number in (factors, factors[::-1]) if factors is not None else ():
        known = value_of(number) is None or constant_of(number) is not None
        if known and (row := read(value)) is not None:
            return scaled_by(row, value, node)
    return None


def _quotient(node: Node, read: _Read) -> Row | None:
    operands = plain_div(node)
    if operands is None:
        return None
    if (row := read(operands[0])) is not None:
        return scaled_by(row, operands[0], node)
    if (row := read(operands[1])) is None or (row := row.to_the(-1)) is None:
        return None
    number = _number(operands[0], last_size(row.wide))
    return None if number is None else row.times(*number)


def _shifted(node: Node, read: _Read) -> Row | None:
    operands = plain_add(node)
    for value, eps in (operands, operands[::-1]) if operands is not None else ():
        if (row := read(value)) is not None:
            number = constant_of(eps)
            return row.plus(eps if number is None else number)
    return None


def _clamped(node: Node, read: _Read) -> Row | None:
    clamps = getattr(node.target, "overloadpacket", None) in _CLAMPS
    for value in node.args[:2] if clamps else ():
        if (row := read(value)) is not None:
            says = "the norm clamps what it divides by, where RMSNorm adds an epsilon to the mean square"
            return dataclasses.replace(row, refusal=f"{says}; {node.name} does")
    return None


def _kept(node: Node, read: _Read) -> Row | None:
    """Read a view, an expansion or a cast. (`read_row` refuses a cast that rounds.)"""
    kept = node.target in VIEWS or node.target is _EXPAND or cast_source(node) is not None
    row = read(node.args[0]) if kept else None
    if row is not None and node.target is _EXPAND and not reaches_every_row(node.args[0], row.wide):
        return None  # the numbers are repeated for every row, not along it
    return row


def _is_per_row(node: Node, wide: Node) -> bool:
    """Return whether a node that is computed from one number a row still holds one a row.

    Views keep the order of elements, so their number decides (also whether the rows that were
    squared have `wide`'s size), or `wide`'s shape.
    """
    value, rows = value_of(node), value_of(wide)
    if value is None or rows is None:
        return False
    return same_size(value.numel() * rows.shape[-1], rows.numel()) or same_shape(node, wide)


def _number(value: Any, size: Any) -> tuple[float, int] | None:
    """Return a known factor as (number, exponent of the hidden size), or None."""
    if isinstance(value, Node):
        if value.target is operator.truediv and value.args[0] == 1:
            below = _number(value.args[1], size)
            return (1 / below[0], -below[1]) if below is not None and below[0] else None
        if (number := constant_of(value)) is not None:
            return _number(number, size)
        value = value.meta.get("val")
        return (1.0, 1) if isinstance(value, torch.SymInt) and same_size(value, size) else None
    if not is_number(value):
        return None
    return (1.0, 1) if isinstance(size, int) and value == size else (float(value), 0)
