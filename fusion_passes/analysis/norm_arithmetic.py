"""The number by which an RMSNorm scales a row, `rsqrt(mean(x^2) + eps)`, in whatever way a program computes it.

Every such number is read as `factor * (scale * S + eps) ** power`, S being the sum of the row's squares: a sum divided by
the hidden size, a vector's length divided by the size's root and a reciprocal of a root are then the same formula with
other numbers, and a clamp or an epsilon outside the root shows as what it is.
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
    plain_add,
    plain_div,
    plain_mul,
    same_shape,
    same_size,
    value_of,
)
from fusewire.patterns.norms import RECIPROCAL, SCALED, SQUARED_ROOT, SUMMED

_POWERS: dict[Any, float] = {aten.rsqrt.default: -0.5, aten.sqrt.default: 0.5, aten.reciprocal.default: -1}
_CLAMPS = frozenset(
    {
        aten.clamp.default,
        aten.clamp.Tensor,
        aten.clamp_min.default,
        aten.clamp_min.Tensor,
        aten.maximum.default,
    }
)
_EXPAND = aten.expand.default
_LIMIT = 12


@dataclass(frozen=True)
class Row:
    """One number a row of `wide`: `factor * (scale * size**sizes * S + eps) ** power`, S the sum of the row's squares.

    Attributes:
        wide: the node whose rows are squared and summed; `size` is its last.
        eps: a number, a node where the graph does not know the number, or None as long as nothing was added.
        detours: how it is spelled (see `fusewire.patterns.norms.DETOURS`).
        problem: why it cannot be an RMSNorm's, or "".
    """

    wide: Node
    scale: float = 1.0
    sizes: int = 0
    eps: Any = None
    power: float = 1.0
    factor: float = 1.0
    detours: frozenset[str] = frozenset()
    problem: str = ""

    def by(self, *detours: str) -> Row:
        return dataclasses.replace(self, detours=self.detours.union(detours))

    def times(self, number: float, sizes: int = 0) -> Row | None:
        """This, times `number * size**sizes`."""
        if (number, sizes) == (1, 0):
            return self
        row = self if SUMMED in self.detours and self.power == 1 else self.by(SCALED)
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
        """This, with a number or a node added."""
        if self.power != 1:
            outside = "the norm adds its epsilon outside the square root, where RMSNorm adds it to the mean square"
            return dataclasses.replace(self, problem=outside) if is_number(eps) else None
        return dataclasses.replace(self, eps=eps) if self.eps is None else None

    def to_the(self, power: float) -> Row | None:
        """A power of this; None where that is not known to be one number more of the same kind."""
        if not (1e-30 < self.factor < 1e30 and abs(power) <= 4):
            return None
        if self.power != 1 and not (self.eps is None or (is_number(self.eps) and self.eps >= 0)):
            return None  # a root of a root's square is the square's own only where it is not negative
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
        """What multiplies where this divides."""
        return dataclasses.replace(self, power=-self.power, factor=1 / self.factor if self.factor else 0.0)

    @property
    def divisor(self) -> float | None:
        """What the sum of squares is divided by, the epsilon and this number written as RMSNorm's; None if unknown."""
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
        """Whether this is `rsqrt(S / size + eps)` for some eps."""
        size = last_size(self.wide)
        if self.divisor is None or self.power != -0.5:
            return False
        if isinstance(size, int):
            return math.isclose(self.divisor, size, rel_tol=1e-9)
        return self.sizes == -1 and math.isclose(self.divisor, 1, rel_tol=1e-9)

    @property
    def epsilon(self) -> Any:
        """The eps of RMSNorm."""
        if self.eps is None:
            return 0.0
        scaled = self.factor != 1 and self.is_mean and is_number(self.eps)
        return self.eps / self.factor**2 if scaled else self.eps

    @property
    def trouble(self) -> str:
        """Why this cannot scale a row as RMSNorm does, or ""."""
        if self.problem or self.is_mean:
            return self.problem
        size = last_size(self.wide)
        by = f"{self.divisor:g}" if isinstance(size, int) and self.divisor is not None else "something else"
        return f"the norm divides the sum of squares by {by}, where RMSNorm's mean square divides by the hidden size {size}"


def is_root(node: Node) -> bool:
    """Whether a node is a square root, or the reciprocal of one."""
    if node.target is aten.pow.Tensor_Scalar:
        return bool(node.args[1] in (0.5, -0.5))
    return node.target is aten.rsqrt.default or node.target is aten.sqrt.default


def rows_from(root: Node) -> Iterator[tuple[Node, Row]]:
    """What a root and the steps after it, up to the next root, say of a tensor's rows."""
    pending, seen = [root], {root}
    while pending:
        node = pending.pop(0)
        row = read_row(node)
        if row is None:
            continue
        yield node, row
        # What has x's own shape is x times the number already, unless it is the number expanded.
        later = [
            user
            for user in node.users
            if user not in seen and not is_root(user) and (not same_shape(user, row.wide) or user.target is _EXPAND)
        ]
        seen.update(later)
        pending.extend(later)


def read_row(node: Any, limit: int = _LIMIT) -> Row | None:
    """What a node says of a tensor's rows, or None if it is no function of their sums of squares."""
    if not isinstance(node, Node) or node.op != "call_function" or limit == 0:
        return None
    row = _sum_of_squares(node)
    for read in (_power, _product, _quotient, _shifted, _clamped, _kept):
        if row is None:
            row = read(node, lambda source: read_row(source, limit - 1))
    if row is None or not _is_per_row(node, row.wide):
        return None
    if dtype_of(node) != dtype_of(row.wide) and not row.problem:
        row = dataclasses.replace(row, problem=rounded_between("the root", dtype_of(node), dtype_of(row.wide)))
    return row


_Read = Callable[[Any], "Row | None"]


def rounded_between(what: str, dtype: torch.dtype | None, wide: torch.dtype | None) -> str:
    """That a norm keeps a value in between in another dtype than it is computed in."""
    return f"the norm rounds {what} to {dtype} on the way, which neither form of the fused operator does; keep it in {wide}"


def reaches_every_row(node: Any, wide: Node) -> bool:
    """Whether, multiplied with `wide`, a node that says something of its rows meets the rows it is of."""
    value, rows = value_of(node), value_of(wide)
    return value is not None and rows is not None and (value.dim() == rows.dim() or rows.dim() == 1)


def same_input(node: Any, wide: Node) -> bool:
    """Whether a factor is a norm's input, of which `wide` is squared: itself, cast again, or widened by the product."""
    source = cast_source(wide)
    if node is wide or source is None:
        return node is wide
    return node is source or (cast_source(node) is source and dtype_of(node) == dtype_of(wide))


def scaled_by(row: Row, value: Node, product: Node) -> Row | None:
    """The row's number where `product` is `value` times a number or divided by one, else None."""
    factors, quotient, size = plain_mul(product), plain_div(product), last_size(row.wide)
    if factors is not None and value in factors:
        number = _number(factors[factors[0] is value], size)
        return None if number is None else row.times(*number)
    if quotient is not None and quotient[0] is value:
        number = _number(quotient[1], size)
        return None if number is None or not number[0] else row.times(1 / number[0], -number[1])
    return None


# The steps


def _sum_of_squares(node: Node) -> Row | None:
    mean = _is_mean(node)
    if not mean and node.target is not aten.sum.dim_IntList:
        return None
    wide = _squared(node.args[0])
    if wide is None or not _over_last_dimension(node, wide):
        return None
    return Row(wide, sizes=-1) if mean else Row(wide, detours=frozenset({SUMMED}))


def _is_mean(node: Any) -> bool:
    return isinstance(node, Node) and node.target is aten.mean.dim


def _over_last_dimension(mean: Node, wide: Node) -> bool:
    value = value_of(wide)
    dims = mean.args[1] if len(mean.args) > 1 else None
    if value is None or not isinstance(dims, (list, tuple)):
        return False
    if mean.kwargs.get("dtype") not in (None, value.dtype):
        return False
    return len(dims) == 1 and dims[0] in (-1, value.dim() - 1)


def _squared(node: Any) -> Node | None:
    """x, if the node is x squared."""
    if not isinstance(node, Node):
        return None
    if node.target is aten.pow.Tensor_Scalar and node.args[1] == 2:
        return node.args[0] if isinstance(node.args[0], Node) else None
    a, b = plain_mul(node) or (None, None)
    if not isinstance(a, Node) or not isinstance(b, Node):
        return None
    twice = cast_source(a) is not None and cast_source(a) is cast_source(b) and dtype_of(a) == dtype_of(b)
    return a if a is b or twice else None


def _power(node: Node, read: _Read) -> Row | None:
    power: Any = node.args[1] if node.target is aten.pow.Tensor_Scalar else _POWERS.get(node.target)
    if not is_number(power):
        return None
    row = read(node.args[0])
    return None if row is None else row.to_the(power)


def _product(node: Node, read: _Read) -> Row | None:
    factors = plain_mul(node)
    for value, number in (factors, factors[::-1]) if factors is not None else ():
        if value_of(number) is None and (row := read(value)) is not None:
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
            return row.plus(eps)
    return None


def _clamped(node: Node, read: _Read) -> Row | None:
    for value in node.args[:2] if node.target in _CLAMPS else ():
        if (row := read(value)) is not None:
            says = "the norm clamps what it divides by, where RMSNorm adds an epsilon to the mean square"
            return dataclasses.replace(row, problem=f"{says}; {node.name} does")
    return None


def _kept(node: Node, read: _Read) -> Row | None:
    """A view, an expansion or a cast, which change no number (a cast that rounds shows in the dtype)."""
    kept = node.target in VIEWS or node.target is _EXPAND or cast_source(node) is not None
    row = read(node.args[0]) if kept else None
    if row is not None and node.target is _EXPAND and not reaches_every_row(node.args[0], row.wide):
        return None  # the numbers would be repeated for every row, not along it
    return row


def _is_per_row(node: Node, wide: Node) -> bool:
    """Whether a value that is made of one number a row still has one a row, in the rows' order.

    Views keep the order of elements, so the shape says it: the rows', with or without a last dimension of 1, or `wide`'s.
    """
    value, rows = value_of(node), value_of(wide)
    if value is None or rows is None:
        return False
    leading = tuple(rows.shape[:-1])
    for shape in (leading, (*leading, 1), tuple(rows.shape)):
        if value.dim() == len(shape) and all(map(same_size, value.shape, shape)):
            return True
    return False


def _number(value: Any, size: Any) -> tuple[float, int] | None:
    """(number, exponent of the hidden size) of a factor that is known, or None."""
    if isinstance(value, Node):
        if value.target is operator.truediv and value.args[0] == 1:
            below = _number(value.args[1], size)
            return (1 / below[0], -below[1]) if below is not None and below[0] else None
        value = value.meta.get("val")
        return (1.0, 1) if isinstance(value, torch.SymInt) and same_size(value, size) else None
    if not is_number(value):
        return None
    return (1.0, 1) if isinstance(size, int) and value == size else (float(value), 0)
