"""The spellings of an all-reduce in a post-grad graph, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

WAIT = torch.ops._c10d_functional.wait_tensor.default
ALL_REDUCE = torch.ops._c10d_functional.all_reduce.default
SUM = "sum"


@dataclass(frozen=True)
class Spelling:
    """One operator that all-reduces.

    Attributes:
        op: the operator's qualified name, matched when it is registered.
        operands: positions of (input, reduction, group) among its arguments; a missing reduction means sum.
        waits: its result is ready only after `wait_tensor`.
        who: where it comes from.
        in_place: it overwrites its input, so that it cannot be moved; recognised to be explained.
    """

    op: str
    operands: tuple[int, int | None, int]
    waits: bool
    who: str
    in_place: bool = False


SPELLINGS = (
    Spelling("_c10d_functional::all_reduce", (0, 1, 2), True, "functional collectives, DTensor, dist.all_reduce"),
    Spelling("_c10d_functional::all_reduce_", (0, 1, 2), True, "collectives after re-inplacing", in_place=True),
    Spelling("fusewire::all_reduce", (0, None, 1), False, "fusewire's own operator"),
    Spelling("vllm::all_reduce", (0, None, 1), False, "vLLM's opaque operator"),
)
COALESCED = "_c10d_functional::all_reduce_coalesced"
# Collectives that are no all-reduce, named here so that the report can explain them.
OTHER_COLLECTIVES = {
    "_c10d_functional::reduce_scatter_tensor": "a reduce-scatter (sequence parallelism)",
    "_c10d_functional::all_gather_into_tensor": "an all-gather",
}
_BY_OP = {spelling.op: spelling for spelling in SPELLINGS}


@dataclass(frozen=True)
class AllReduce:
    """An all-reduce in a graph: its node, what it reduces, and the node whose value is the finished sum."""

    node: Node
    x: Any
    reduction: Any
    group: Any
    value: Node
    spelling: Spelling

    @property
    def name(self) -> str:
        """The node's name, which tells the all-reduces of one graph apart."""
        return self.node.name


def op_name(node: Node) -> str:
    """The qualified name of the operator a node calls, or "" if it calls none."""
    target = node.target
    return target._schema.name if isinstance(target, torch._ops.OpOverload) else ""


def read_all_reduce(node: Node) -> AllReduce | None:
    """The all-reduce that this node calls, or None."""
    spelling = _BY_OP.get(op_name(node))
    if spelling is None:
        return None
    arguments = positional(node)
    x, reduction, group = spelling.operands
    value = node
    if spelling.waits:
        waits = [user for user in node.users if user.target is WAIT]
        if len(waits) == 1 and len(node.users) == 1:
            value = waits[0]
    return AllReduce(
        node,
        arguments[x],
        SUM if reduction is None else arguments[reduction],
        arguments[group],
        value,
        spelling,
    )


def positional(node: Node) -> list[Any]:
    """The node's arguments in the schema's order, keywords and defaults filled in."""
    parameters = node.target._schema.arguments  # type: ignore[union-attr]
    given = list(node.args)
    for parameter in parameters[len(given) :]:
        given.append(node.kwargs.get(parameter.name, parameter.default_value))
    return given
