"""The spellings of an all-reduce, and of a reduce-scatter, in a post-grad graph, as data."""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

WAIT = torch.ops._c10d_functional.wait_tensor.default
# Waits for a list of tensors; coalesced collectives use it from torch 2.15 on.
WAIT_ALL = getattr(getattr(torch.ops._c10d_functional, "wait_tensors", None), "default", None)
ALL_REDUCE = torch.ops._c10d_functional.all_reduce.default
COALESCED = torch.ops._c10d_functional.all_reduce_coalesced.default
REDUCE_SCATTER = torch.ops._c10d_functional.reduce_scatter_tensor.default
ALL_GATHER = torch.ops._c10d_functional.all_gather_into_tensor.default
SUM = "sum"


@dataclass(frozen=True)
class Spelling:
    """An operator that all-reduces.

    Attributes:
        op: the operator's qualified name; an operator of that name need not be registered.
        operands: positions of (input, reduction, group); no reduction means a sum.
        waits: whether its result is ready only after `wait_tensor`.
        who: the programs that write it so.
        in_place: whether it overwrites its input. It is then never fused, only explained.
        scatters: whether each rank gets only its own rows of the sum.
    """

    op: str
    operands: tuple[int, int | None, int]
    waits: bool
    who: str
    in_place: bool = False
    scatters: bool = False


SPELLINGS = (
    Spelling("_c10d_functional::all_reduce", (0, 1, 2), True, "functional collectives, DTensor, dist.all_reduce"),
    Spelling("_c10d_functional::all_reduce_", (0, 1, 2), True, "collectives after re-inplacing", in_place=True),
    Spelling("fusewire::all_reduce", (0, None, 1), False, "fusewire's own operator"),
    Spelling("vllm::all_reduce", (0, None, 1), False, "vLLM's opaque operator"),
)
# One tensor of an `all_reduce_coalesced`, which reduces a list. Its node is the `getitem`.
COALESCED_PART = Spelling("_c10d_functional::all_reduce_coalesced", (0, 1, 2), True, "funcol.all_reduce_coalesced")
SCATTERED = Spelling("_c10d_functional::reduce_scatter_tensor", (0, 1, 3), True, "sequence parallelism", scatters=True)
# Collectives that may follow an all-reduce, for the report.
OTHER_COLLECTIVES = {
    "_c10d_functional::reduce_scatter_tensor": "a reduce-scatter (sequence parallelism)",
    "_c10d_functional::all_gather_into_tensor": "an all-gather",
}
_BY_OP = {spelling.op: spelling for spelling in (*SPELLINGS, SCATTERED)}
_BY_HAND = "call funcol.all_reduce, or dist.all_reduce on a plain tensor, to have it fused"
_IN_PLACE = f"it overwrites its input, which the passes do not move; {_BY_HAND}"
_SYMMETRIC = f"it sums over symmetric memory that the program manages itself; {_BY_HAND}"
_VLLM = "vLLM's platform calls it in place of vllm.all_reduce, which fusewire reads (use_custom_op_collectives)"
# All-reduces that are operators of their own, by qualified name: why the passes leave them, and
# what to do. They are counted and explained, never rewritten.
UNREAD = {
    "_C::shm_allreduce": f"vLLM's all-reduce in place over shared memory of CPUs; {_VLLM}",
    "_C_custom_ar::all_reduce": f"vLLM's custom all-reduce, given the addresses of its buffers; {_VLLM}",
    "_C_custom_ar::qr_all_reduce": f"vLLM's quantised all-reduce, which rounds each part; {_VLLM}",
    "vllm::all_reduce_symmetric_with_copy": f"vLLM's all-reduce through NCCL's symmetric memory; {_VLLM}",
    "vllm::inplace_all_reduce": f"an earlier vLLM's all-reduce; {_IN_PLACE}",
    "sglang::inplace_all_reduce": f"SGLang's all-reduce; {_IN_PLACE}",
    "symm_mem::one_shot_all_reduce": _SYMMETRIC,
    "symm_mem::one_shot_all_reduce_copy": _SYMMETRIC,
    "symm_mem::one_shot_all_reduce_copy_out": _SYMMETRIC,
    "symm_mem::one_shot_all_reduce_out": _SYMMETRIC,
    "symm_mem::two_shot_all_reduce_": _SYMMETRIC,
    "symm_mem::two_shot_all_reduce_out": _SYMMETRIC,
    "symm_mem::multimem_all_reduce_": _SYMMETRIC,
    "symm_mem::multimem_one_shot_all_reduce": _SYMMETRIC,
    "symm_mem::multimem_one_shot_all_reduce_out": _SYMMETRIC,
    "c10d::allreduce_": _IN_PLACE,
    "c10d::allreduce_coalesced_": _IN_PLACE,
    "_c10d_functional::all_reduce_coalesced_": _IN_PLACE,
}
_UNKNOWN = f"an all-reduce by its name, of an extension that fusewire does not know; {_BY_HAND}"
_FUSED_ALREADY = "by its name an all-reduce that something else has fused with a norm already"
_READ = {*_BY_OP, COALESCED_PART.op}
_REDUCES = re.compile(r"(?<![a-z])all_?reduce", re.IGNORECASE)
_NORMS = re.compile(r"norm", re.IGNORECASE)


@dataclass(frozen=True)
class AllReduce:
    """An all-reduce in a graph, or a reduce-scatter (`spelling.scatters`).

    Attributes:
        node: the call.
        x, reduction, group: its arguments.
        value: the node whose value is the finished sum (of a reduce-scatter: this rank's rows of
            it). It is `node` itself where nothing has to be waited for, or where more than one wait
            reads `node`.
    """

    node: Node
    x: Any
    reduction: Any
    group: Any
    value: Node
    spelling: Spelling

    @property
    def name(self) -> str:
        """Return the node's name, which is unique in the graph."""
        return self.node.name


def op_name(node: Node) -> str:
    """Return the qualified name of the operator that a node calls, or "" if it calls none."""
    target = node.target
    return target._schema.name if isinstance(target, torch._ops.OpOverload) else ""


def read_all_reduce(node: Node) -> AllReduce | None:
    """Return the all-reduce (or reduce-scatter) that a node calls, or None."""
    if node.target is operator.getitem:
        return _read_part(node)
    spelling = _BY_OP.get(op_name(node))
    if spelling is None:
        return None
    arguments = positional(node)
    x, reduction, group = spelling.operands
    return AllReduce(
        node,
        arguments[x],
        SUM if reduction is None else arguments[reduction],
        arguments[group],
        _waited(node) if spelling.waits else node,
        spelling,
    )


def all_reduces_in(graph: Graph) -> list[AllReduce]:
    """Return the all-reduces and reduce-scatters of a graph, in its order."""
    found = (read_all_reduce(node) for node in graph.nodes if node.op == "call_function")
    return [site for site in found if site is not None]


def _read_part(node: Node) -> AllReduce | None:
    """Return the all-reduce of one tensor of a coalesced one, or None."""
    call, index = node.args
    if not isinstance(call, Node) or call.target is not COALESCED or not isinstance(index, int):
        return None
    tensors, reduction, group = positional(call)
    return AllReduce(node, tensors[index], reduction, group, _waited(node), COALESCED_PART)


def _waited(node: Node) -> Node:
    """Return a collective's wait if nothing else reads the collective, else itself."""
    users = list(node.users)
    if len(users) != 1:
        return node
    if users[0].target is WAIT:
        return users[0]
    if WAIT_ALL is not None and users[0].target is WAIT_ALL:
        tensors = users[0].args[0]
        places = [i for i, tensor in enumerate(tensors) if tensor is node]  # type: ignore[arg-type, union-attr]
        items = [item for item in users[0].users if item.target is operator.getitem and item.args[1] in places]
        if len(places) == len(items) == 1:
            return items[0]
    return node


def unread_all_reduces(node: Node) -> Iterator[tuple[str, str]]:
    """Yield each all-reduce that a node calls as an operator that `read_all_reduce` does not read.

    That is an operator of `UNREAD`, or one that takes a tensor and has "all_reduce" or "allreduce"
    in its name. The node may call it through a higher-order operator (auto_functionalized).

    Yields:
        The operator's qualified name, and why the passes leave it.
    """
    called = (node.target, *node.args) if isinstance(node.target, torch._ops.HigherOrderOperator) else (node.target,)
    for target in called:
        if isinstance(target, torch._ops.OpOverload) and (why := _why_unread(target)):
            yield str(target._schema.name), why


@functools.cache
def _why_unread(target: torch._ops.OpOverload) -> str:
    """Return why the passes leave an operator that all-reduces; "" for every other operator."""
    name = str(target._schema.name)
    namespace, _, own = name.rpartition("::")
    if name in UNREAD:
        return UNREAD[name]
    takes_tensor = any("Tensor" in str(argument.type) for argument in target._schema.arguments)
    if namespace == "fusewire" or name in _READ or not _REDUCES.search(own) or not takes_tensor:
        return ""
    return _FUSED_ALREADY if _NORMS.search(own) else _UNKNOWN


def positional(node: Node) -> list[Any]:
    """Return a node's arguments in the schema's order, with keywords and defaults filled in."""
    parameters = node.target._schema.arguments  # type: ignore[union-attr]
    given = list(node.args)
    for parameter in parameters[len(given) :]:
        given.append(node.kwargs.get(parameter.name, parameter.default_value))
    return given
