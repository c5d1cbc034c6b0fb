"""Return results in the symmetric buffers where they arrive, instead of copying them out.

A workspace has a few output buffers ("slots"). A result may stay in one only if everything that
reads it has run when the next call with that slot writes it again. The order of a graph's nodes
does not show it: Inductor schedules anew, and computes cheap values again where they are used. Data
dependence holds in every schedule. So a result gets a slot only where each reader

- writes what it computes to memory of its own (a matrix product, an attention, a fused operator).
  Anything else (a view, a pointwise operation) may be computed again later, so its readers count
  instead; and
- is something that the next call with that slot is computed from, along operations that need their
  inputs' values.

The output must not be a reader. Inductor's memory planning does not reuse these buffers.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm
from fusewire.custom_ops.ops.quantized_norm import (
    all_reduce_rms_norm_quantized,
    all_reduce_rms_norm_quantized_sharded,
)
from fusewire.custom_ops.ops.registry import op_of_target
from fusewire.custom_ops.ops.sandwich_norm import all_reduce_sandwich_norm
from fusewire.custom_ops.ops.sharded_norm import all_reduce_rms_norm_sharded
from fusewire.custom_ops.workspaces.provider import OUTPUTS
from fusewire.fusion_passes.analysis.graph import (
    CASTS,
    VIEWS,
    aten,
    getitem_users,
    value_of,
    writes_in_place,
)
from fusewire.fusion_passes.compiler.inductor import never_reuse_outputs
from fusewire.fusion_passes.context import RunContext
from fusewire.patterns.collectives import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, WAIT, positional

# The result of each operator that may stay in a slot: the sum; of sharded operators the norm, or
# the quantised norm if there is no other.
_PLACED = {
    all_reduce_rms_norm.torch_op: 1,
    all_reduce_sandwich_norm.torch_op: 1,
    all_reduce_rms_norm_sharded.torch_op: 0,
    all_reduce_rms_norm_quantized.torch_op: 1,
    all_reduce_rms_norm_quantized_sharded.torch_op: 0,
}
_WITHOUT_NORM = 2
_SLOT, _NONE = "output=", -1
# These write their results to memory when they run, and do not read their inputs later.
_MATERIALIZE = frozenset(
    {
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten.baddbmm.default,
        aten._scaled_mm.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
    }
)
# These need all values of their inputs, as do the operators that torch tags as pointwise.
_NEED_INPUTS = (
    _MATERIALIZE
    | VIEWS
    | CASTS
    | {
        operator.getitem,
        WAIT,
        aten.permute.default,
        aten.transpose.int,
        aten.clone.default,
        aten.expand.default,
        aten.cat.default,
        aten.mean.dim,
        aten.sum.dim_IntList,
        aten.amax.default,
        aten._softmax.default,
        ALL_REDUCE,
        ALL_GATHER,
        REDUCE_SCATTER,
    }
)


def place_outputs(graph: Graph, context: RunContext) -> bool:
    """Give slots to results where the graph proves it safe; return whether there are any."""
    calls = [node for node in graph.nodes if node.op == "call_function" and node.target in _PLACED]
    if not calls:
        return False
    needs = _Needs(graph)
    latest: dict[tuple[Any, ...], list[Node | None]] = {}
    chosen: dict[Node, int] = {}
    kept = 0
    for call in calls:
        readers = _readers(call)
        slots = latest.setdefault(_workspace(call), [None] * OUTPUTS)
        free = (i for i, before in enumerate(slots) if readers and needs.all_read(before, call))
        slot = chosen[call] = next(free, _NONE)
        if slot != _NONE:
            slots[slot] = call
        elif readers != []:
            kept += 1
    placed = sum(slot != _NONE for slot in chosen.values())
    if placed:
        for call, slot in chosen.items():
            _mark(call, slot)
    if kept:
        context.notes.append(
            f"output_in_place: {kept} of {placed + kept} results are copied, since something may "
            "read them after their buffer is written again"
        )
    return placed > 0


def _workspace(call: Node) -> tuple[Any, ...]:
    """Return the key of a call's workspace: its group, dtype and hidden size."""
    value = value_of(call.args[0])
    assert value is not None
    return positional(call)[-2], value.dtype, str(value.shape[-1])


def _mark(call: Node, slot: int) -> None:
    """Append the slot to a call's policy."""
    arguments = positional(call)
    arguments[-1] = f"{arguments[-1]};{_SLOT}{slot}"
    call.args, call.kwargs = tuple(arguments), {}
    assert isinstance(call.target, torch._ops.OpOverload)
    never_reuse_outputs(call.target, _is_marked)


def _is_marked(args: Sequence[Any]) -> bool:
    """Return whether a call's policy names a slot."""
    policy = args[-1]
    return isinstance(policy, str) and _SLOT in policy and f"{_SLOT}{_NONE}" not in policy


def _readers(call: Node) -> list[Node] | None:
    """Return the readers, direct or through cheap values, of the result that could stay in a slot.

    None if the output or an in-place write is among them.
    """
    wanted = _PLACED[call.target]
    if call.target is all_reduce_rms_norm_quantized_sharded.torch_op and not positional(call)[12]:
        wanted = _WITHOUT_NORM
    pending = [item for index, item in getitem_users(call) if index == wanted]
    found: list[Node] = []
    seen = set(pending)
    while pending:
        node = pending.pop()
        for user in node.users:
            if user.op != "call_function" or writes_in_place(user):
                return None
            if _materializes(user):
                found.append(user)
            elif user not in seen:
                seen.add(user)
                pending.append(user)
    return found


def _materializes(node: Node) -> bool:
    return node.target in _MATERIALIZE or op_of_target(node.target) is not None


class _Needs:
    """The nodes that each node is computed from, as a bit set."""

    def __init__(self, graph: Graph) -> None:
        self.bit: dict[Node, int] = {}
        self.needed: dict[Node, int] = {}
        for i, node in enumerate(graph.nodes):
            self.bit[node] = 1 << i
            self.needed[node] = 0
            for source in _sources(node):
                self.needed[node] |= self.needed[source] | self.bit[source]

    def all_read(self, before: Node | None, call: Node) -> bool:
        """Return whether all readers of an earlier call's result have run when `call` runs."""
        if before is None:
            return True
        readers = _readers(before)
        return readers is not None and all(self.needed[call] & self.bit[reader] for reader in readers)


def _sources(node: Node) -> Iterator[Node]:
    """Yield the inputs whose values a node certainly needs."""
    if node.op != "call_function":
        return
    if op_of_target(node.target) is not None or node.target in _NEED_INPUTS or _is_pointwise(node):
        given: Sequence[Node] = node.all_input_nodes
    elif node.target in (aten.index_put.default, aten.slice_scatter.default, aten.select_scatter.default):
        source = node.args[2 if node.target is aten.index_put.default else 1]
        given = [source] if isinstance(source, Node) else []
    else:
        given = []
    for source in given:
        value = value_of(source)
        # What has no elements is not computed.
        if value is None or all(not isinstance(size, int) or size > 0 for size in value.shape):
            yield source


def _is_pointwise(node: Node) -> bool:
    if node.target is aten.pow.Tensor_Scalar and node.args[1] == 0:
        return False  # one, whatever the input is
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
