"""Find in a graph how a norm is quantised to FP8, by the arithmetic of the FP8 values.

The reader starts at a cast to float8_e4m3fn and walks back: clamp, division by a scale, the norm;
and from the scale to the norm's largest absolute values, if it is computed from them. Operators
that quantise by themselves are read in analysis/quantizing_ops.py. What it reads is a QuantSpec,
whose result has the same bits; anything else is refused with a reason.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from fusewire.custom_ops.ops.quantization import (
    CAST_SATURATES,
    DIVIDE,
    FP8,
    FP8_MAX,
    GROUP,
    GROUP_SIZE,
    MULTIPLY,
    RECIPROCAL,
    TENSOR,
    TOKEN,
    QuantSpec,
)
from fusewire.fusion_passes.analysis.graph import (
    CASTS,
    VIEWS,
    aten,
    depends_on,
    dtype_of,
    is_number,
    last_size,
    plain_div,
    plain_mul,
    same_shape,
    same_size,
    value_of,
)
from fusewire.fusion_passes.analysis.quantizing_ops import (
    Quantization,
    QuantizationRefusal,
    is_norm,
    quantizing_op,
    read_quantizing_op,
)
from fusewire.patterns.collectives import positional

_AMAXES = frozenset({aten.amax.default, aten.max.dim})
# Exact in fp32.
_WIDENED = (torch.bfloat16, torch.float16)
_OTHER_FP8 = frozenset({torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz})


def quantizations_from(norm: Node) -> list[Node]:
    """Return the casts to FP8 and calls that quantise a norm, in no order of the graph.

    The search ends at operations that no quantisation has, as matrix products.
    """
    found: list[Node] = []
    seen, pending = {norm}, [norm]
    while pending:
        for user in pending.pop().users:
            if user in seen:
                continue
            seen.add(user)
            if quantizing_op(user) or (user.target in CASTS and dtype_of(user) in (FP8, *_OTHER_FP8)):
                found.append(user)
            elif user.target in _SEARCHED:
                pending.append(user)
    return found


def read_quantization(node: Node, norm: Node, order: dict[Node, int]) -> Quantization | str:
    """Return the quantisation of a norm that is one of `quantizations_from`, or why it is not read.

    Args:
        order: the nodes' positions in the graph.
    """
    try:
        return read_quantizing_op(node, norm, order) if quantizing_op(node) else _Reader(norm, order).read(node)
    except QuantizationRefusal as refusal:
        return str(refusal)


_CLAMPS = frozenset({aten.clamp_min.default, aten.clamp_max.default, aten.clamp.default})
_POWER = (aten.exp2.default, aten.ceil.default, aten.log2.default)
# The operations on the way from a norm to its FP8 values and its scales.
_SEARCHED = (
    VIEWS
    | CASTS
    | _CLAMPS
    | _AMAXES
    | frozenset(_POWER)
    | {
        aten.mul.Tensor,
        aten.div.Tensor,
        aten.abs.default,
        aten.reciprocal.default,
        aten.minimum.default,
        aten.expand.default,
        operator.getitem,
    }
)


@dataclass
class _Scale:
    """What the walk from a dynamic scale to the largest values has found so far."""

    divided: bool = False
    narrowed: bool = False
    bound: Node | None = None
    values: dict[str, Any] = field(default_factory=dict)


class _Reader:
    def __init__(self, norm: Node, order: dict[Node, int]) -> None:
        self.norm = norm
        self.order = order
        self.dtype = dtype_of(norm)

    def read(self, cast: Node) -> Quantization:
        if dtype_of(cast) is not FP8:
            raise QuantizationRefusal(f"it is to {dtype_of(cast)}; the operators quantise to {FP8}")
        product, clamp = self._unclamped(cast)
        given, factor, apply = self._factors(product)
        narrow = self._is_narrow(product, factor)
        inverse = _inverted(factor) if apply == MULTIPLY else None
        if inverse is not None:
            apply = RECIPROCAL
        core = _unviewed(factor if inverse is None else inverse)
        if dtype_of(core) != dtype_of(product) and (inverse is not None or dtype_of(core) not in _WIDENED):
            raise QuantizationRefusal(f"its scale is {dtype_of(core)}; keep it in float32")
        if not depends_on(core, self.norm, self.order):
            size = value_of(core)
            if size is None or size.numel() != 1:
                raise QuantizationRefusal("its scales are given, and more than one")
            return Quantization(QuantSpec(TENSOR, apply, narrow=narrow, clamp=clamp), core, (cast,), ())
        if apply == MULTIPLY:
            raise QuantizationRefusal(
                "it multiplies by 448 / the largest value, which rounds otherwise than a division"
            )
        found = _Scale()
        source = self._walk(core, found)
        if source is None:
            raise QuantizationRefusal("its scale is computed from the norm in a way that is not known")
        spec = QuantSpec(self._kind(source, given, factor), apply, narrow=narrow, **found.values)
        return Quantization(spec, found.bound, (cast,), (_before_widening(core),))

    def _unclamped(self, cast: Node) -> tuple[Node, bool]:
        """Return the product that a cast to FP8 rounds, and whether it is clamped before."""
        node, bounds, dtypes = cast.args[0], [], set()
        while isinstance(node, Node) and (node.target in _CLAMPS or node.target in VIEWS or node.target in CASTS):
            dtypes.add(dtype_of(node))
            bounds += _bounds(node)
            node = node.args[0]
        if not isinstance(node, Node) or dtypes - {dtype_of(node), torch.float32}:
            raise QuantizationRefusal("it rounds the quotient once more before the cast")
        if sorted(bounds) not in ([], [("max", FP8_MAX), ("min", -FP8_MAX)]):
            raise QuantizationRefusal(
                f"it clamps to {', '.join(f'{kind} {value:g}' for kind, value in bounds)}, not to +-448"
            )
        return node, bool(bounds) or CAST_SATURATES

    def _factors(self, product: Node) -> tuple[Node, Node, str]:
        """Return the norm's factor of a product or quotient, the other one, and how it applies."""
        divided, multiplied = plain_div(product), plain_mul(product)
        pairs = [(divided, DIVIDE)] if divided else []
        if multiplied:
            pairs = [(multiplied, MULTIPLY), (multiplied[::-1], MULTIPLY)]
        for (given, scale), apply in pairs:
            if isinstance(given, Node) and is_norm(given, self.norm):
                if is_number(scale):
                    raise QuantizationRefusal(
                        f"its scale is the number {scale:g}, by which PyTorch divides otherwise on "
                        "GPUs than on CPUs; keep it in a float32 tensor"
                    )
                if isinstance(scale, Node) and value_of(scale) is not None:
                    return given, scale, apply
        raise QuantizationRefusal("no norm divided or multiplied by a scale is what is cast")

    def _is_narrow(self, product: Node, scale: Node) -> bool:
        """Return whether the quotient is rounded to the norm's dtype."""
        if dtype_of(product) is torch.float32:
            return False
        if dtype_of(product) != self.dtype:
            raise QuantizationRefusal(f"it divides in {dtype_of(product)}")
        if dtype_of(scale) != self.dtype:
            raise QuantizationRefusal(
                f"it divides a norm in {self.dtype} by a scale in {dtype_of(scale)} without "
                f"dimensions, which PyTorch rounds to {self.dtype} on GPUs and not on CPUs; divide "
                "norm.float()"
            )
        return True

    def _walk(self, node: Node, found: _Scale) -> Node | None:
        """Return the absolute values whose largest a scale is computed from, or None."""
        at: Any = node
        while isinstance(at, Node):
            if at.target in VIEWS:
                at = at.args[0]
            elif at.target in CASTS:
                found.narrowed |= dtype_of(at) is not torch.float32 and dtype_of(at.args[0]) is torch.float32
                at = at.args[0]
            elif _reduced(at) is not None:
                return self._absolute(_reduced(at), found)
            else:
                if at.target in _AMAXES or at.target is aten.max.default:
                    raise QuantizationRefusal(
                        "its one scale is of the whole tensor, for which every rank needs every "
                        "row; quantise with a static scale, or one for each token"
                    )
                at = self._step(at, found)
        return None

    def _step(self, node: Node, found: _Scale) -> Any:
        """Return what one operation of a scale is computed from, or None."""
        if node.target in _CLAMPS:
            return self._floor(node, found)
        if node.target is aten.minimum.default and found.divided:
            return self._bounded(node, found)
        if node.target is _POWER[0]:
            inner = _unviewed(node.args[0])
            if "scale_floor" in found.values or inner.target is not _POWER[1]:
                return None
            found.values["power_of_two"] = True
            inner = _unviewed(inner.args[0])
            return inner.args[0] if inner.target is _POWER[2] else None
        amax_by = _divided_by_448(node)
        if amax_by is None or found.divided:
            return None
        found.divided = True
        if amax_by == MULTIPLY:
            found.values["amax_by"] = MULTIPLY
        if found.narrowed or dtype_of(node) is not torch.float32:
            found.values["narrow_scale"] = True
        found.narrowed = False
        return node.args[0]

    def _floor(self, node: Node, found: _Scale) -> Any:
        """Record the least value that a scale or a largest value has; return what is clamped."""
        name = "amax_floor" if found.divided else "scale_floor"
        bounds = dict(_bounds(node))
        if list(bounds) != ["min"] or name in found.values or bounds["min"] < 0:
            raise QuantizationRefusal("it clamps the scale in a way that is not known")
        floor = bounds["min"]
        if found.narrowed or dtype_of(node) is not torch.float32:
            assert self.dtype is not None
            floor = float(torch.tensor(floor, dtype=self.dtype))
        if floor:
            found.values[name] = floor
        return node.args[0]

    def _bounded(self, node: Node, found: _Scale) -> Any:
        """Record the upper bound of the largest values, which holds also for their least one."""
        if found.bound is not None or "amax_floor" in found.values:
            return None
        for amax, bound in (node.args, node.args[::-1]):
            value = value_of(bound)
            one = value is not None and value.numel() == 1 and value.dtype is torch.float32
            if one and not depends_on(bound, self.norm, self.order):
                found.bound = bound  # type: ignore[assignment]
                return amax
        return None

    def _absolute(self, source: Any, found: _Scale) -> Node | None:
        """Return the view of the norm whose largest absolute values are taken."""
        inner = _unviewed(source)
        while inner.target in CASTS:
            inner = _unviewed(inner.args[0])
        if inner.target is not aten.abs.default or not is_norm(inner.args[0], self.norm):  # type: ignore[arg-type]
            return None
        if not found.divided:
            raise QuantizationRefusal("its scale is not the largest value divided by 448")
        return source  # type: ignore[no-any-return]

    def _kind(self, source: Node, given: Node, scale: Node) -> str:
        """Return whether scales belong to tokens or to groups."""
        size, shape, wanted = last_size(source), value_of(scale), value_of(given)
        assert shape is not None
        assert wanted is not None
        fits = shape.dim() == wanted.dim() and shape.shape[-1] == 1
        fits = fits and all(map(same_size, shape.shape[:-1], wanted.shape[:-1]))
        if not fits or not same_shape(source, given):
            raise QuantizationRefusal(
                f"scales of shape {list(shape.shape)} for values of shape {list(wanted.shape)} are not known"
            )
        if same_size(size, last_size(self.norm)):
            return TOKEN
        if size == GROUP_SIZE:
            return GROUP
        raise QuantizationRefusal(f"its groups have {size} values; the operators know {GROUP_SIZE} and whole tokens")


def _unviewed(node: Any) -> Any:
    """Return what views and expansions show."""
    while isinstance(node, Node) and (node.target in VIEWS or node.target is aten.expand.default):
        node = node.args[0]
    return node


def _before_widening(node: Node) -> Node:
    """Return the node of a value before views and casts to fp32, which keep it."""
    while node.target in VIEWS or (node.target in CASTS and dtype_of(node) is torch.float32):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _inverted(node: Node) -> Node | None:
    """Return s if a node is 1 / s, else None."""
    node = _unviewed(node)
    factors = plain_mul(node)
    if factors is not None and factors[1] == 1.0:
        node = _unviewed(factors[0])
    return node.args[0] if node.target is aten.reciprocal.default else None  # type: ignore[return-value]


def _bounds(node: Node) -> list[tuple[str, float]]:
    """Return the numbers that a clamp keeps its input between, each as ("min" or "max", number)."""
    if node.target not in _CLAMPS:
        return []
    if node.target is aten.clamp.default:
        _, low, high = positional(node)
        named: dict[str, Any] = {kind: value for kind, value in (("min", low), ("max", high)) if value is not None}
    else:
        named = {"min" if node.target is aten.clamp_min.default else "max": node.args[1]}
    if not all(map(is_number, named.values())):
        raise QuantizationRefusal("it clamps to a value of the graph")
    return [(kind, float(value)) for kind, value in named.items()]


def _reduced(node: Node) -> Any:
    """Return the input of a node that takes the largest values of the last dimension, or None."""
    if node.target is operator.getitem and node.args[1] == 0 and isinstance(node.args[0], Node):
        node = node.args[0]
    if node.target not in _AMAXES or len(node.args) < 2:
        return None
    dims = node.args[1] if isinstance(node.args[1], (list, tuple)) else [node.args[1]]
    value = value_of(node.args[0])
    if value is None or list(dims) not in ([-1], [value.dim() - 1]):
        return None
    return node.args[0]


def _divided_by_448(node: Node) -> str | None:
    """Return how a node divides by 448 (QuantSpec.amax_by), or None."""
    quotient, product = plain_div(node), plain_mul(node)
    value = value_of(node)
    if quotient is not None and value is not None:
        if quotient[1] == FP8_MAX:
            return DIVIDE if value.device.type == "cpu" else MULTIPLY
        filled = _unviewed(quotient[1])
        full = isinstance(filled, Node) and filled.target is aten.full.default and filled.args[1] == FP8_MAX
        return DIVIDE if full else None
    if product is not None and is_number(product[1]):
        inverse = torch.tensor(1.0 / FP8_MAX, dtype=torch.float32)
        return MULTIPLY if torch.equal(torch.tensor(product[1], dtype=torch.float32), inverse) else None
    return None
