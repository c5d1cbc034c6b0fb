"""Read what a norm is multiplied by: a weight, perhaps cast, perhaps plus a number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fusewire.fusion_passes.analysis.graph import cast_source, dtype_of, is_vector, other_factor, plain_add
from fusewire.fusion_passes.analysis.scales import constant_of

_WIDE = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Weight:
    """The factor of a normalised value: a weight, the number added to it, and a step of Tail."""

    node: Node
    bias: Any
    step: str


def weight_of(user: Node, value: Node, hidden: Any) -> Weight | None:
    """Return the weight if `user` multiplies `value` by a vector of hidden size, else None."""
    vector = other_factor(user, value)
    return None if vector is None else read_weight(vector, dtype_of(value), user.args[1] is value, hidden)


def read_weight(vector: Any, dtype: torch.dtype | None, left: bool, hidden: Any) -> Weight | None:
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
    return Weight(inner, bias, f"{factor}*n" if left else f"n*{factor}")


def _split_bias(vector: Node, hidden: Any) -> tuple[Node, Any]:
    """Return (vector, number) if a vector is their sum in one dtype, else itself and 0.0."""
    operands = plain_add(vector)
    for inner, added in (operands, operands[::-1]) if operands is not None else ():
        number = constant_of(added)
        if number is not None and is_vector(inner, hidden) and dtype_of(inner) == dtype_of(vector):
            return inner, number
    return vector, 0.0
