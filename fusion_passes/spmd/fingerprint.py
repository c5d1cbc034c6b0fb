"""Say in a few words what of a graph's collectives every rank must have alike."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.fx import Graph, Node

from fusewire.custom_ops.coordination.rendezvous import AS_WRITTEN, RENDEZVOUS
from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm, resolve_group
from fusewire.custom_ops.ops.sandwich_norm import all_reduce_sandwich_norm
from fusewire.custom_ops.ops.sharded_norm import shard_rows
from fusewire.errors import ProcessGroupError
from fusewire.fusion_passes.analysis.graph import aten, new_call, value_of
from fusewire.patterns.collectives import ALL_REDUCE, SUM, op_name, positional, read_all_reduce

_GROUP_ARGUMENTS = ("group_name", "group")
_TEXTS_IN_LABEL = 4
# These name a group and send nothing.
_LOCAL = (shard_rows.torch_op, RENDEZVOUS)
# Of these, what the group sums is what the all-reduce that they stand for sums.
_PLAIN_SUMS = (all_reduce_rms_norm.torch_op, all_reduce_sandwich_norm.torch_op)


@dataclass(frozen=True)
class GroupFingerprint:
    """What a graph does over one process group. Plain data: it is kept beside the compile cache.

    Attributes:
        group: the group's name.
        program: digest of the collectives as they arrived; ranks that compile the same program have it alike.
        rewritten: digest of all that the passes made of them; "" if they are the program's own, as written.
        label: the same for people: where the graph begins, and what it does.
        strict: what the collectives carry is not what the program's would.
    """

    group: str
    program: str
    rewritten: str
    label: str
    strict: bool


Collectives = Mapping[str, Sequence[Node]]


def collectives_of(graph: Graph) -> dict[str, list[Node]]:
    """The collectives of a graph by their group's name, in the graph's order.

    Only groups with peers in other processes: a group of one rank, or of simulated ranks ("fake"), has nobody to differ.
    """
    found: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if node.op == "call_function" and node.target not in _LOCAL:
            group = _group_of(node)
            if group:
                found.setdefault(group, []).append(node)
    return {group: nodes for group, nodes in found.items() if has_peers(group)}


def has_peers(group_name: str) -> bool:
    """Whether a group of this process has ranks in other processes."""
    try:
        group = resolve_group(group_name)
    except ProcessGroupError:
        return False
    try:
        return group.size() > 1 and dist.get_backend(group) != "fake"
    except ValueError:  # a group that torch.distributed has not made itself
        return True


def _group_of(node: Node) -> str:
    """The name of the group over which a node communicates, or "" if it does not, or the name is no constant."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return ""
    names = [parameter.name for parameter in node.target._schema.arguments]
    at = next((names.index(name) for name in _GROUP_ARGUMENTS if name in names), None)
    value = None if at is None else positional(node)[at]
    return value if isinstance(value, str) else ""


def arrived(graph: Graph) -> dict[str, tuple[str, list[str]]]:
    """Of each group, the digest of its collectives with their shapes, and their texts without."""
    return {
        group: (_digest([_text(node, rows=True) for node in nodes]), [_text(node) for node in nodes])
        for group, nodes in collectives_of(graph).items()
    }


def fingerprints(
    before: Mapping[str, tuple[str, list[str]]], graph: Graph, moved: Mapping[str, Sequence[str]], place: str
) -> list[GroupFingerprint]:
    """The fingerprints of a rewritten graph.

    Args:
        before: what `arrived` said of the graph before the passes.
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
    """Put the comparison of what the ranks run before each group's first collective.

    Where every call compares, also before others that need no collective's result: the compiler may put these first.
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
    """The first of these collectives, and those that need no collective's result."""
    collectives = {node for found in collectives_of(graph).values() for node in found}
    needing: set[Node] = set()
    for node in graph.nodes:
        if any(source in collectives or source in needing for source in node.all_input_nodes):
            needing.add(node)
    return [nodes[0], *(node for node in nodes[1:] if node not in needing)]


def _first_tensor(node: Node) -> Node | None:
    """What a collective sends."""
    sent = node.args[0] if node.args else None
    sent = sent[0] if isinstance(sent, (list, tuple)) and sent else sent
    return sent if isinstance(sent, Node) and value_of(sent) is not None else None


def _written_freely(graph: Graph, tensor: Node) -> Node:
    """The tensor, or a copy of it where an input that is declared as written would cost the graph its CUDA graph."""
    value = value_of(tensor)
    if tensor.op == "call_function" or value is None or value.device.type != "cuda":
        return tensor
    return new_call(graph, aten.clone.default, (tensor,), {}, tensor)


def scale_text(factor: Any) -> str:
    """How a factor that moves across a collective stands in a fingerprint: a constant with its value."""
    if not isinstance(factor, Node):
        return f"times {factor!r}"
    value, owner = value_of(factor), factor.graph.owning_module
    constant = getattr(owner, str(factor.target), None) if factor.op == "get_attr" else None
    if isinstance(constant, torch.Tensor) and type(constant) is torch.Tensor and constant.device.type != "meta":
        return f"times {constant.detach().cpu().tolist()!r}"
    kind = "an input" if factor.op in ("placeholder", "get_attr") else "a gate"
    return f"times {kind} ({_tensor_text(value, rows=False)})"


def _as_written(node: Node, text: str) -> str:
    """The text of the collective that a fused operator stands for."""
    if node.target not in _PLAIN_SUMS:
        return text
    return f"{ALL_REDUCE._schema.name}({_tensor_text(value_of(node.args[0]), rows=False)}, {SUM!r})"


def _text(node: Node, rows: bool = False) -> str:
    """A collective in one line: operator, dtypes, hidden size, numbers and texts.

    Args:
        rows: also all other sizes, of collectives that have them alike on every rank. Of a sequence that is divided
            unevenly each rank has its own number of rows.
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
    """Dtype and hidden size; the number of rows is the call's, and may be symbolic on one rank only."""
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
