"""Read the factors that multiply an all-reduced value: constants, scales of one element, gates."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from fusewire.fusion_passes.analysis.graph import CASTS, VIEWS, aten, cast_source, is_number, same_size, value_of

_KEEPS_VALUES = VIEWS | CASTS | {aten.expand.default}
_LIMIT = 8


def constant_of(value: Any) -> int | float | None:
    """Return the number that a value is, or that every element of a constant tensor is, or None.

    The number is rounded to the tensor's dtype.
    """
    if is_number(value):
        return value  # type: ignore[no-any-return]
    tensor = value_of(value)
    if tensor is None or tensor.is_complex():
        return None
    number = None
    if value.target is aten.full.default:
        number = value.args[1] if is_number(value.args[1]) else None
    elif value.target in _KEEPS_VALUES:
        number = constant_of(value.args[0])
    return None if number is None else torch.tensor(number, dtype=tensor.dtype).item()


def is_one_element(value: Any) -> bool:
    """Return whether a node is a tensor of one element, whatever its dimensions."""
    tensor = value_of(value)
    return tensor is not None and all(isinstance(size, int) and size == 1 for size in tensor.shape)


def unviewed(factor: Node) -> Node:
    """Return the tensor of one element that a factor is a view or an expansion of, or itself."""
    source = factor.args[0] if factor.target in VIEWS or factor.target is aten.expand.default else None
    return unviewed(source) if isinstance(source, Node) and is_one_element(source) else factor


def is_scale(factor: Any, limit: int = _LIMIT) -> bool:
    """Return whether a factor is one element, computed from inputs and parameters of one element.

    It may be such an input, parameter or buffer itself.
    """
    if not is_one_element(factor) or limit == 0:
        return False
    if factor.op in ("placeholder", "get_attr"):
        return True
    sources = factor.all_input_nodes
    return bool(sources) and all(is_scale(source, limit - 1) for source in sources)


def is_gate(factor: Any, value: Node) -> bool:
    """Return whether a factor is one computed number a token, in the value's dtype."""
    gate, scaled = value_of(factor), value_of(value)
    if gate is None or scaled is None or gate.dim() == 0 or factor.op != "call_function":
        return False
    one = isinstance(gate.shape[-1], int) and gate.shape[-1] == 1
    rows = gate.dim() == scaled.dim() and all(map(same_size, gate.shape[:-1], scaled.shape[:-1]))
    return bool(one and rows and gate.dtype == scaled.dtype)


def may_be_float(value: Node, in_double: bool) -> bool:
    """Return whether dynamic=True may have made this node of a Python float.

    Dynamo passes those as symbols or as float64 tensors without dimensions. It casts them to the
    dtype that the graph computes in.

    Args:
        in_double: whether that dtype is float64.
    """
    source = value
    while (inner := cast_source(source)) is not None:
        source = inner
    tensor = value_of(source)
    is_input = source.op == "placeholder" and tensor is not None and tensor.dim() == 0 and tensor.dtype == torch.float64
    return tensor is None or (is_input and (in_double or source is not value))
