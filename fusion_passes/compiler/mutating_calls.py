"""Read calls of operators that write into their arguments, functional or not."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from fusewire.fusion_passes.compiler.inductor import fresh_fake

_FUNCTIONAL = torch.ops.higher_order.auto_functionalized
_FUNCTIONAL_V2 = torch.ops.higher_order.auto_functionalized_v2


@dataclass(frozen=True)
class MutatingCall:
    """A call of an operator that writes into arguments and returns nothing.

    Attributes:
        node: the call; of a functional form, its results are other nodes.
        op: the operator's qualified name, as "_C::static_scaled_fp8_quant".
        arguments: by name, with defaults; the written ones are the buffers given.
        written: by name, the nodes that have an argument's value after the call. For a call that
            is not functional these are the buffers themselves. An argument that is None has none.
    """

    node: Node
    op: str
    arguments: dict[str, Any]
    written: dict[str, tuple[Node, ...]]

    @property
    def functional(self) -> bool:
        """Whether the buffers given keep their values."""
        return self.node.target in (_FUNCTIONAL, _FUNCTIONAL_V2)


def called_op(node: Node) -> torch._ops.OpOverload | None:
    """Return the operator that a node calls, also through a higher-order operator, or None."""
    target = node.target
    if target in (_FUNCTIONAL, _FUNCTIONAL_V2):
        target = node.args[0]  # type: ignore[assignment]
    return target if isinstance(target, torch._ops.OpOverload) else None


def op_of_name(name: str) -> torch._ops.OpOverload | None:
    """Return the operator of a qualified name, or None if this process has none."""
    namespace, _, own = name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), own, None)
    return None if packet is None else packet.default


def insert_call(graph: Graph, call: MutatingCall, changed: dict[str, Any]) -> None:
    """Insert the call that `call` describes, in place of its node: what the node wrote, it writes.

    Args:
        call: of any operator; arguments that this version of it does not have are left out.
        changed: arguments that are different, by name.
    """
    op = op_of_name(call.op)
    assert op is not None
    arguments = {**call.arguments, **changed}
    given: dict[str, Any] = {p.name: arguments.get(p.name, p.default_value) for p in op._schema.arguments}
    if not call.functional:
        graph.call_function(op, tuple(given.values()))
        return
    writes = [name for name in given if name in call.written]
    node = graph.call_function(_FUNCTIONAL, (op,), given)
    node.meta["val"] = (None, *(fresh_fake(given[name].meta["val"]) for name in writes))
    for index, name in enumerate(writes, 1):
        for old in call.written[name]:
            item = graph.call_function(operator.getitem, (node, index))
            item.meta["val"] = node.meta["val"][index]
            old.replace_all_uses_with(item)


def read_mutating_call(node: Node) -> MutatingCall | None:
    """Return a call of an operator that writes into arguments and returns nothing, or None."""
    op = called_op(node)
    if op is None or op._schema.returns or not op._schema.is_mutable:
        return None
    parameters = op._schema.arguments
    writes = [p.name for p in parameters if p.alias_info is not None and p.alias_info.is_write]
    given: dict[str, Any] = (
        dict(zip((p.name for p in parameters), node.args, strict=False)) if node.target is op else {}
    )
    given.update(node.kwargs)
    written = _written(node, given, writes)
    if written is None:
        return None
    arguments = {p.name: given.get(p.name, p.default_value) for p in parameters}
    return MutatingCall(node, str(op._schema.name), arguments, written)


def _written(node: Node, given: dict[str, Any], writes: list[str]) -> dict[str, tuple[Node, ...]] | None:
    """Return by argument the nodes that have its value after a call; None if one is no buffer."""
    if node.target not in (_FUNCTIONAL, _FUNCTIONAL_V2):
        return {name: (given[name],) for name in writes if given.get(name) is not None}
    places = _bases(given, writes) if node.target is _FUNCTIONAL_V2 else {name: i for i, name in enumerate(writes)}
    if places is None:
        return None
    return {name: _items(node, 1 + place) for name, place in places.items() if given[name] is not None}


def _items(node: Node, index: int) -> tuple[Node, ...]:
    """Return the nodes of one result of a functional call, which returns (None, then buffers)."""
    return tuple(user for user in node.users if user.target is operator.getitem and user.args[1] == index)


def _bases(given: dict[str, Any], writes: list[str]) -> dict[str, int] | None:
    """Put the written buffers of a call of the second version among its arguments.

    Returns:
        Which result each is, or None if one is a view of a buffer, or missing.
    """
    bases, places = given.pop("_all_bases"), {}
    for name in writes:
        described = [key for key in given if key.startswith(f"_{name}_")]
        if described != [f"_{name}_base_index"]:
            return None
        place = given.pop(described[0])
        given[name] = None if place is None else bases[place]
        if place is not None:
            places[name] = place
    return places
