"""Define as data which operators of canonicalized graphs fuse: patterns and their replacements.

A pattern is a tree of calls from the norm, or the all-gather after it, down to the collective.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm
from fusewire.custom_ops.ops.norms import fused_add_rms_norm, rms_norm
from fusewire.custom_ops.ops.sandwich_norm import all_reduce_sandwich_norm
from fusewire.custom_ops.ops.sharded_norm import all_reduce_rms_norm_sharded
from fusewire.patterns.collectives import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, WAIT


@dataclass(frozen=True)
class Capture:
    """Matches anything (a node, a number, a string or None) and keeps it under this name."""

    name: str


@dataclass(frozen=True)
class Call:
    """Matches a call with exactly these arguments; `shared`: other nodes may read it too."""

    target: Callable[..., Any]
    args: tuple[Any, ...]
    shared: bool = False


@dataclass(frozen=True)
class Fusion:
    """A pattern and its replacement.

    Attributes:
        name: its name in reports.
        tree: the pattern; its root is the norm, or the wait for the all-gather after it.
        replacement: the fused operator.
        arguments: the arguments of the replacement, in order: captures, or None.
        returns_sum: whether the norm returns (norm, sum); else the collective's result is the sum.
    """

    name: str
    tree: Call
    replacement: Callable[..., Any]
    arguments: tuple[str | None, ...]
    returns_sum: bool


_SUMMED = Call(
    WAIT, (Call(ALL_REDUCE, (Capture("x"), Capture("reduction"), Capture("group")), shared=True),), shared=True
)
_NORM = (Capture("weight"), Capture("eps"), Capture("weight_bias"), Capture("form"))
_TAKEN = ("weight", "eps", "weight_bias", "form", "group")

FUSIONS = (
    Fusion(
        "all_reduce + rms_norm",
        Call(rms_norm.torch_op, (_SUMMED, *_NORM), shared=True),
        all_reduce_rms_norm.torch_op,
        ("x", None, *_TAKEN),
        returns_sum=False,
    ),
    Fusion(
        "all_reduce + fused_add_rms_norm",
        Call(fused_add_rms_norm.torch_op, (_SUMMED, Capture("residual"), *_NORM), shared=True),
        all_reduce_rms_norm.torch_op,
        ("x", "residual", *_TAKEN),
        returns_sum=True,
    ),
)


def _first(call: Call) -> Call:
    """Return a pattern of the first result of a call that returns two."""
    return Call(operator.getitem, (call, 0))


# Sandwich norms: the residual add and the second norm after the fused operator.
_INNER = ("inner_weight", "inner_eps", "inner_weight_bias", "inner_form")
_FUSED_NORM = _first(
    Call(
        all_reduce_rms_norm.torch_op,
        (Capture("x"), None, *(Capture(name) for name in _INNER), Capture("group")),
        shared=True,
    )
)
EPILOGUES = (
    Fusion(
        "all_reduce + rms_norm + fused_add_rms_norm",
        Call(fused_add_rms_norm.torch_op, (_FUSED_NORM, Capture("residual"), *_NORM), shared=True),
        all_reduce_sandwich_norm.torch_op,
        ("x", "residual", "weight", "eps", "weight_bias", "form", *_INNER, "group"),
        returns_sum=True,
    ),
)

# Sequence parallelism: each rank normalises its own rows, then all gather the rows.
_SCATTERED = Call(
    WAIT,
    (Call(REDUCE_SCATTER, (Capture("x"), Capture("reduction"), Capture("size"), Capture("group")), shared=True),),
    shared=True,
)


def _gathered(norm: Call) -> Call:
    """Return a pattern of the finished all-gather of a norm."""
    return Call(WAIT, (Call(ALL_GATHER, (norm, Capture("gathered_size"), Capture("gathered_group"))),), shared=True)


SEQUENCE_FUSIONS = (
    Fusion(
        "reduce_scatter + rms_norm + all_gather",
        _gathered(Call(rms_norm.torch_op, (_SCATTERED, *_NORM))),
        all_reduce_rms_norm_sharded.torch_op,
        ("x", None, *_TAKEN),
        returns_sum=False,
    ),
    Fusion(
        "reduce_scatter + fused_add_rms_norm + all_gather",
        _gathered(_first(Call(fused_add_rms_norm.torch_op, (_SCATTERED, Capture("residual"), *_NORM), shared=True))),
        all_reduce_rms_norm_sharded.torch_op,
        ("x", "residual", *_TAKEN),
        returns_sum=True,
    ),
)
