"""Find whether a graph proves that a node has the same value on every rank of a group.

Some rewrites are right only for such values. A scale that moves before an all-reduce must be equal
on every rank. So must the residual and the norm's weight if the rank that owns a row adds and
multiplies its own for all ranks, as kernels may do and a sharded residual does.

Every rank runs the same graph, so a deterministic operation gives equal results on every rank if
its inputs are equal. A verdict is one of three:

- PROVED: computed from results of all-reduces and all-gathers over the group, and from numbers;
- ASSUMED: inputs of the graph, parameters or buffers take part, and the graph does not say where
  they come from;
- UNKNOWN, with the refusal: random numbers, an unknown operator, a rank's own rows, a tensor that
  is written in place, or a result of another group's collective takes part.

Equal means equal bits, on ranks with the same kind of GPU and the same libraries.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm
from fusewire.custom_ops.ops.norms import fused_add_rms_norm, rms_norm
from fusewire.custom_ops.ops.quantized_norm import (
    all_reduce_rms_norm_quantized,
    all_reduce_rms_norm_quantized_sharded,
)
from fusewire.custom_ops.ops.sandwich_norm import all_reduce_sandwich_norm
from fusewire.custom_ops.ops.sharded_norm import all_reduce_rms_norm_sharded, gather_rows, shard_rows
from fusewire.fusion_passes.analysis.graph import aten, writes_in_place
from fusewire.patterns.collectives import ALL_GATHER, REDUCE_SCATTER, WAIT, op_name, positional, read_all_reduce

PROVED, ASSUMED, UNKNOWN = "proved", "assumed", "unknown"
# Key in a fused operator's metadata: RunContext.assumed counts its assumption already.
ASSUMPTION_COUNTED = "fusewire_assumption_counted"
# The arguments of each fused operator that must be equal on every rank, for any provider.
#
# The sharded operator takes each rank's own rows of the residual, so its residual need not be. Its
# weight must be: native multiplies a row by its owner's weight, as the source does, but a kernel
# may send rows before they are normalised, and then each reader multiplies by its own.
REPLICATED_ARGUMENTS = {
    all_reduce_rms_norm.torch_op: ("residual", "weight"),
    all_reduce_sandwich_norm.torch_op: ("residual", "weight", "inner_weight"),
    all_reduce_rms_norm_sharded.torch_op: ("weight",),
    all_reduce_rms_norm_quantized.torch_op: ("residual", "weight", "inner_weight", "scale"),
    all_reduce_rms_norm_quantized_sharded.torch_op: ("weight", "scale"),
}
_SHARDED = (all_reduce_rms_norm_sharded.torch_op, all_reduce_rms_norm_quantized_sharded.torch_op)
# Operators of fusewire that compute each row by itself and send nothing.
_LOCAL_NORMS = (rms_norm.torch_op, fused_add_rms_norm.torch_op)
# These read the values of their first input and only the shape of the second.
_SHAPED_LIKE = (aten.expand_as.default,)


@dataclass(frozen=True)
class Verdict:
    """How sure it is that a value is equal on a group's ranks: PROVED, ASSUMED or UNKNOWN.

    The reason of ASSUMED and UNKNOWN follows the value's name: "comes from ...".
    """

    kind: str
    reason: str = ""


@dataclass(frozen=True)
class Origin:
    """The sources that a value is computed from.

    Attributes:
        groups: the groups whose collectives' results are among the sources.
        assumed: whether inputs of the graph, parameters or buffers are among them.
        unknown: the source that makes a verdict UNKNOWN, or "".
    """

    groups: frozenset[Any] = frozenset()
    assumed: bool = False
    unknown: str = ""


class Replication:
    """The verdicts on the nodes of one graph.

    Each node is read once, so all verdicts together take time linear in the graph. They stay right
    while passes rewrite the graph, since a replacement has the value of what it replaces.
    """

    def __init__(self) -> None:
        self._origins: dict[Node, Origin] = {}
        self._writers: dict[Node, Node | None] = {}

    def judge(self, node: Node, group: Any) -> Verdict:
        """Return whether a node has the same value on every rank of the group."""
        origin = self.origin(node)
        if origin.unknown:
            return Verdict(UNKNOWN, f"comes from {origin.unknown}")
        others = sorted(str(other) for other in origin.groups - {group})
        if others:
            return Verdict(UNKNOWN, f"comes from a collective over another group ({others[0]})")
        if origin.assumed:
            return Verdict(ASSUMED, "comes from inputs or parameters of the graph")
        return Verdict(PROVED)

    def judge_call(self, call: Node) -> Verdict:
        """Return the worst verdict on the REPLICATED_ARGUMENTS of a fused operator.

        Its reason begins with the argument's name.

        Args:
            call: a call of an operator in REPLICATED_ARGUMENTS.
        """
        given = _arguments(call)
        worst = Verdict(PROVED)
        for name in REPLICATED_ARGUMENTS[call.target]:
            if not isinstance(given[name], Node):
                continue
            verdict = self.judge(given[name], given["group_name"])
            if worst.kind == PROVED or (worst.kind == ASSUMED and verdict.kind == UNKNOWN):
                worst = Verdict(verdict.kind, verdict.reason and f"the {name.replace('_', ' ')} {verdict.reason}")
        return worst

    def origin(self, node: Node) -> Origin:
        """Return the sources that a node is computed from."""
        pending = [node]
        while pending:
            current = pending[-1]
            if current in self._origins:
                pending.pop()
                continue
            own, sources = self._own_origin(current)
            missing = [source for source in sources if source not in self._origins]
            if missing:
                pending.extend(missing)
                continue
            self._origins[current] = _joined(own, (self._origins[source] for source in sources))
            pending.pop()
        return self._origins[node]

    def _own_origin(self, node: Node) -> tuple[Origin, Sequence[Node]]:
        """Return a node's own part of its origin, and the inputs whose origins belong to it too."""
        writer = self._writer(node)
        if writer is not None:
            return Origin(unknown=f"{node.name}, which {writer.name} writes in place"), ()
        if node.op in ("placeholder", "get_attr"):
            return Origin(assumed=True), ()
        group = _result_for_all(node)
        if group is not None:
            return Origin(frozenset({group})), ()
        call = node.args[0] if node.target is operator.getitem else None
        if isinstance(call, Node) and call.target in REPLICATED_ARGUMENTS:
            return _result_of_fused(node, call)
        unknown = _why_unknown(node)
        if unknown:
            return Origin(unknown=unknown), ()
        return Origin(), node.all_input_nodes[:1] if node.target in _SHAPED_LIKE else node.all_input_nodes

    def _writer(self, node: Node) -> Node | None:
        """Return a node that writes into another's memory, directly or through views, or None."""
        if node not in self._writers:
            self._writers[node] = None
            for user in node.users:
                found = user if _writes(user, node) else self._writer(user) if _is_view(user) else None
                if found is not None:
                    self._writers[node] = found
                    break
        return self._writers[node]


def _joined(own: Origin, sources: Iterable[Origin]) -> Origin:
    groups, assumed = own.groups, own.assumed
    for source in sources:
        if own.unknown or source.unknown:
            return own if own.unknown else source
        groups, assumed = groups | source.groups, assumed or source.assumed
    return Origin(groups, assumed, own.unknown)


def _arguments(call: Node) -> dict[str, Any]:
    """Return a call's arguments by name."""
    parameters = call.target._schema.arguments  # type: ignore[union-attr]
    return {parameter.name: value for parameter, value in zip(parameters, positional(call), strict=True)}


def _result_for_all(node: Node) -> Any:
    """Return the group whose ranks all have this result of a collective, or None."""
    if node.target is gather_rows.torch_op:
        return _arguments(node)["group_name"]
    source = node.args[0] if node.target is WAIT else node
    if not isinstance(source, Node):
        return None
    if source.target is ALL_GATHER:
        return positional(source)[2] if source is not node else None
    site = read_all_reduce(source)
    if site is None or site.spelling.scatters or site.value is not node:
        return None
    return site.group


def _result_of_fused(item: Node, call: Node) -> tuple[Origin, Sequence[Node]]:
    """Return the origin of one result of a fused operator, and the nodes that are part of it.

    The sum is equal on every rank, but each rank may have used its own residual and weight.
    """
    if call.target in _SHARDED and item.args[1] == 1:
        return Origin(unknown=f"rows that each rank has for itself ({item.name})"), ()
    given = _arguments(call)
    sources = [given[name] for name in REPLICATED_ARGUMENTS[call.target]]
    return Origin(frozenset({given["group_name"]})), [source for source in sources if isinstance(source, Node)]


def _why_unknown(node: Node) -> str:
    """Return what may make a node's values differ between ranks whose inputs are equal, or "".

    Only PyTorch's own operators without random numbers are known to be deterministic.
    """
    target = node.target
    if target is operator.getitem or target in _LOCAL_NORMS:
        return ""
    source = node.args[0] if target is WAIT else node
    if isinstance(source, Node) and source.target in (REDUCE_SCATTER, shard_rows.torch_op):
        return f"rows that each rank has for itself ({source.name})"
    if not isinstance(target, torch._ops.OpOverload) or target.namespace not in ("aten", "prims"):
        called = next((name for n in (source, node) if isinstance(n, Node) and (name := op_name(n))), target)
        return f"{called} ({node.name}), of which nothing is known"
    if torch.Tag.nondeterministic_seeded in target.tags:
        return f"random numbers ({node.name})"
    return ""


def _writes(user: Node, node: Node) -> bool:
    """Return whether a user of a node writes into its memory.

    A copy into an input does not count: functionalisation puts it at the graph's end.
    """
    if not writes_in_place(user) or (user.target is aten.copy_.default and node.op == "placeholder"):
        return False
    if not isinstance(user.target, torch._ops.OpOverload):
        return True
    written = zip(user.target._schema.arguments, positional(user), strict=True)
    return any(
        parameter.alias_info is not None and parameter.alias_info.is_write and _holds(value, node)
        for parameter, value in written
    )


def _holds(value: Any, node: Node) -> bool:
    return value is node or (isinstance(value, (list, tuple)) and any(item is node for item in value))


def _is_view(node: Node) -> bool:
    target = node.target
    return target is operator.getitem or (isinstance(target, torch._ops.OpOverload) and target.is_view)
