"""Describe in texts and digests what every rank must have equal in a graph's collectives."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.fx import Graph, Node

from fusewire.custom_ops.coordination.rendezvous import AS_WRITTEN, RENDEZVOUS
from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm, resolve_group
from fusewire.custom_ops.ops.quantized_norm import all_reduce_rms_norm_quantized
from fusewire.custom_ops.ops.sandwich_norm import all_reduce_sandwich_norm
from fusewire.custom_ops.ops.sharded_norm import shard_rows
from fusewire.errors import ProcessGroupError
from fusewire.fusion_passes.analysis.graph import aten, new_call, value_of
from fusewire.fusion_passes.analysis.paths import MATRIX, SCALE, SUM_OF_ROWS, Path
from fusewire.fusion_passes.analysis.scales import is_scale
from fusewire.patterns.collectives import ALL_REDUCE, SUM, op_name, positional, read_all_reduce

_GROUP_ARGUMENTS = ("group_name", "group")
_TEXTS_IN_LABEL = 4
# These take a group's name and send nothing.
_LOCAL = (shard_rows.torch_op, RENDEZVOUS)
# These sum over the group exactly what the all-reduce that they replace sums.
_PLAIN_SUMS = (
    all_reduce_rms_norm.torch_op,
    all_reduce_sandwich_norm.torch_op,
    all_reduce_rms_norm_quantized.torch_op,
)


@dataclass(frozen=True)
class GroupFingerprint:
    """What a graph does over one process group. Plain data: it is kept beside the compile cache.

    Attributes:
        group: the group's name.
        program: digest of the collectives before the passes; equal for ranks with the same program.
        rewritten: digest of the collectives after the passes; "" if the passes changed none.
        label: a description for messages: where the graph begins, and what it does.
        strict: whether the collectives carry other values than the program's own would.
    """

    group: str
    program: str
    rewritten: str
    label: str
    strict: bool


def collectives_of(graph: Graph) -> dict[str, list[Node]]:
    """Return the collectives of a graph by their group's name, in the graph's order.

    Groups of one rank and of simulated ranks (backend "fake") are left out.
    """
    found: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if node.op == "call_function" and node.target not in _LOCAL:
            group = _group_of(node)
            if group:
                found.setdefault(group, []).append(node)
    return {group: nodes for group, nodes in found.items() if has_peers(group)}


def has_peers(group_name: str) -> bool:
    """Return whether a group of this process has ranks in other processes."""
    try:
        group = resolve_group(group_name)
    except ProcessGroupError:
        return False
    try:
        return group.size() > 1 and dist.get_backend(group) != "fake"
    except ValueError:  # a group that torch.distributed has not made itself
        return True


def _group_of(node: Node) -> str:
    """Return the name of the group that a node takes as a constant, or ""."""
    at = _group_position(node.target)
    value = None if at is None else positional(node)[at]
    return value if isinstance(value, str) else ""


@functools.cache
def _group_position(target: Any) -> int | None:
    """Return which argument of an operator is the name of a process group, or None."""
    if not isinstance(target, torch._ops.OpOverload):
        return None
    names = [parameter.name for parameter in target._schema.arguments]
    return next((names.index(name) for name in _GROUP_ARGUMENTS if name in names), None)


def programs_of(graph: Graph) -> dict[str, tuple[str, list[str]]]:
    """Return by group the digest of its collectives with shapes, and their texts without."""
    return {
        group: (_digest([_text(node, rows=True) for node in nodes]), [_text(node) for node in nodes])
        for group, nodes in collectives_of(graph).items()
    }


def fingerprint_groups(
    before: Mapping[str, tuple[str, list[str]]], graph: Graph, moved: Mapping[str, Sequence[str]], place: str
) -> list[GroupFingerprint]:
    """Return the fingerprints of a rewritten graph, one for each group.

    Args:
        before: `programs_of` the graph before the passes.
        graph: the graph after them.
        moved: per group, what the passes moved across its collectives, in the order of the program.
        place: where in the program the graph begins.
    """
    after = collectives_of(graph)
    found = []
    for group in sorted({*before, *after}):
        program, written = before.get(group, (_digest([]), []))
        nodes = after.get(group, [])
        texts, changes = [_text(node) for node in nodes], list(moved.get(group, ()))
        if texts == written and not changes:
            label = f"{place}: {len(texts)} collectives as written"
            found.append(GroupFingerprint(group, program, AS_WRITTEN, label, False))
            continue
        strict = bool(changes) or [_as_written(node, text) for node, text in zip(nodes, texts, strict=True)] != written
        label = f"{place}: {_listed([*changes, *(text for text in texts if text not in written)] or texts)}"
        found.append(GroupFingerprint(group, program, _digest([*texts, *changes]), label, strict))
    return found


def insert_rendezvous(graph: Graph, prints: Sequence[GroupFingerprint]) -> None:
    """Insert `fusewire::rendezvous`, which compares ranks, before each group's first collective.

    For a strict fingerprint, insert it also before every collective that needs no other's result:
    the compiler may schedule one of these first.
    """
    after = collectives_of(graph)
    for item in prints:
        nodes = after.get(item.group)
        if not nodes:
            continue
        old = [node for node in graph.find_nodes(op="call_function", target=RENDEZVOUS) if node.args[1] == item.group]
        if old and item.rewritten == AS_WRITTEN:
            continue  # an earlier run of the passes made this graph
        fingerprint = _digest([*(str(node.args[2]) for node in old), item.rewritten]) if old else item.rewritten
        for node in old:
            graph.erase_node(node)
        for node in _roots(graph, nodes) if item.strict else nodes[:1]:
            sent = _first_tensor(node)
            if sent is not None:
                with graph.inserting_before(node):
                    sent = _written_freely(graph, sent)
                    call = graph.call_function(RENDEZVOUS, (sent, item.group, fingerprint, item.label, item.strict))
                    call.meta["val"] = None


def _roots(graph: Graph, nodes: Sequence[Node]) -> list[Node]:
    """Return the first of these collectives, and those that need no collective's result."""
    collectives = {node for found in collectives_of(graph).values() for node in found}
    needing: set[Node] = set()
    for node in graph.nodes:
        if any(source in collectives or source in needing for source in node.all_input_nodes):
            needing.add(node)
    return [nodes[0], *(node for node in nodes[1:] if node not in needing)]


def _first_tensor(node: Node) -> Node | None:
    """Return the tensor that a collective sends (the first of a list), or None."""
    sent = node.args[0] if node.args else None
    sent = sent[0] if isinstance(sent, (list, tuple)) and sent else sent
    return sent if isinstance(sent, Node) and value_of(sent) is not None else None


def _written_freely(graph: Graph, tensor: Node) -> Node:
    """Return the tensor, or a clone of a CUDA input, as a written input prevents a CUDA graph."""
    value = value_of(tensor)
    if tensor.op == "call_function" or value is None or value.device.type != "cuda":
        return tensor
    return new_call(graph, aten.clone.default, (tensor,), {}, tensor)


def moved_texts(path: Path) -> list[str]:
    """Return as texts the factors and sums that move across a path's collective, with numbers."""
    texts = {
        SCALE: lambda step: f"{'over' if step.divides else 'times'} {_factor_text(step.value)}",
        MATRIX: lambda step: f"times a matrix ({_tensor_text(value_of(step.value), rows=True)})",
        SUM_OF_ROWS: lambda step: f"summed over dimensions {step.node.args[1]}",
    }
    return [texts[step.kind](step) for step in path.of_kind(*texts)]


def _factor_text(factor: Any) -> str:
    if not isinstance(factor, Node):
        return repr(factor)
    value, owner = value_of(factor), factor.graph.owning_module
    constant = getattr(owner, str(factor.target), None) if factor.op == "get_attr" else None
    if isinstance(constant, torch.Tensor) and type(constant) is torch.Tensor and constant.device.type != "meta":
        return repr(constant.detach().cpu().tolist())
    text = _tensor_text(value, rows=False)
    if factor.op == "call_function" and is_scale(factor):  # with the constants in it
        arguments = ", ".join(_factor_text(argument) for argument in (*factor.args, *factor.kwargs.values()))
        return f"{op_name(factor)}({arguments}) ({text})"
    return f"{'an input' if factor.op in ('placeholder', 'get_attr') else 'a gate'} ({text})"


def _as_written(node: Node, text: str) -> str:
    """Return the text of the collective that a fused operator replaces."""
    if node.target not in _PLAIN_SUMS:
        return text
    return f"{ALL_REDUCE._schema.name}({_tensor_text(value_of(node.args[0]), rows=False)}, {SUM!r})"


def _text(node: Node, rows: bool = False) -> str:
    """Return a collective in one line: operator, dtypes, hidden size, numbers and strings.

    Args:
        rows: include the other sizes of all-reduces and reduce-scatters too. Other collectives may
            have another number of rows on each rank, as of a sequence that is divided unevenly.
    """
    assert isinstance(node.target, torch._ops.OpOverload)
    rows = rows and read_all_reduce(node) is not None
    parts = []
    for parameter, value in zip(node.target._schema.arguments, positional(node), strict=True):
        if parameter.name not in _GROUP_ARGUMENTS:
            parts.append(_argument_text(value, rows))
    return f"{op_name(node)}({', '.join(parts)})"


def _argument_text(value: Any, rows: bool) -> str:
    if isinstance(value, (list, tuple)) and not any(value_of(item) is not None for item in value):
        return "sizes"  # of rows, for each rank
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_argument_text(item, rows) for item in value)}]"
    if isinstance(value, Node):
        return _tensor_text(value_of(value), rows)
    return repr(value)


def _tensor_text(value: torch.Tensor | None, rows: bool) -> str:
    """Return dtype and hidden size, or all sizes. One may be symbolic on one rank only."""
    if value is None:
        return "number"
    shape = value.shape if rows else value.shape[-1:]
    sizes = ", ".join(str(size) if isinstance(size, int) else "s" for size in shape)
    return f"{str(value.dtype).removeprefix('torch.')}[{sizes}]"


def _listed(texts: Sequence[str]) -> str:
    shown = "; ".join(texts[:_TEXTS_IN_LABEL])
    return shown + (f"; and {len(texts) - _TEXTS_IN_LABEL} more" if len(texts) > _TEXTS_IN_LABEL else "")


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
