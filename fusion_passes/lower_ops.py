"""Lower: give each IR operator that is left in the graph the provider that serves it.

Native is the operator's meaning in plain PyTorch: it is traced and written into the graph, where Inductor fuses it with
its neighbours. Any other provider stays a call of the operator, with the providers that this graph may use as its
`policy`, so that the choice by number of tokens is made at run time.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node, map_arg

from fusewire.custom_ops.ir import NATIVE, Choice, IrOp, op_of_target
from fusewire.errors import NoProviderError
from fusewire.fusion_passes.context import RunContext
from fusewire.fusion_passes.graph_tools import copy_origin, value_of
from fusewire.fusion_passes.matcher import fresh_fake, trace
from fusewire.patterns.all_reduce import positional


def lower_ops(graph: Graph, context: RunContext) -> bool:
    """Lower every IR operator of the graph; says whether anything changed."""
    return _Lowerer(graph, context).run()


class _Lowerer:
    def __init__(self, graph: Graph, context: RunContext) -> None:
        self.graph = graph
        self.context = context
        self.traced: dict[Any, GraphModule] = {}

    def run(self) -> bool:
        changed = False
        for node in list(self.graph.nodes):
            op = op_of_target(node.target) if node.op == "call_function" else None
            if op is not None:
                changed = self._lower(node, op) or changed
        return changed

    def _lower(self, node: Node, op: IrOp) -> bool:
        arguments = positional(node)
        policy = arguments.pop() or self.context.config.policy(op.name)
        values = [value_of(a) if isinstance(a, Node) else a for a in arguments]
        if any(isinstance(a, Node) and v is None for a, v in zip(arguments, values, strict=True)):
            return False  # a number of the graph's own: the operator decides at run time
        try:
            # Of an operator whose ranks vote at run time, no rank may decide alone here, by what its machine has.
            judge, judged = (op, tuple(values)) if op.base is None else (op.base, op.base_args(tuple(values)))
            choice = judge.choose(*judged, policy=policy, static=True, machine=op.selector is None)
        except NoProviderError as error:
            choice = None
            self._account(node, "", str(error))
        if choice is not None:
            self._account(node, choice.provider.name, self._why(judge, choice))
        if choice is not None and choice.provider.name == NATIVE and self.context.config.inline_native and op.inlines:
            self._inline(node, op, arguments, values)
            return True
        node.args = (*arguments, policy)
        node.kwargs = {}
        node.meta.pop("eager_input_vals", None)  # of fewer arguments; Inductor pairs the two
        return True

    def _why(self, op: IrOp, choice: Choice) -> str:
        """Why providers of higher priority do not serve, and what is left to run time."""
        parts = [str(refusal) for refusal in choice.refusals]
        if self.context.config.batch_invariant:
            parts += [
                f"{name}: not batch-invariant, its order of summation changes with the number of tokens"
                for name in op.priority
                if name != NATIVE and not op.providers[name].batch_invariant
            ]
        if op.selector is not None and choice.provider.name != NATIVE and not choice.provider.batch_invariant:
            parts.append("or another by number of tokens, once the ranks have voted at the first call")
        return "; ".join(parts)

    def _account(self, node: Node, provider: str, detail: str) -> None:
        """Complete the report's entry of a fused all-reduce."""
        name: str = node.meta.get("fusewire_all_reduce", "")
        fused = self.context.fused.get(name)
        if fused is not None:
            self.context.fused[name] = dataclasses.replace(fused, provider=provider, detail=detail)

    def _inline(self, node: Node, op: IrOp, arguments: list[Any], values: list[Any]) -> None:
        tensors = [i for i, value in enumerate(values) if isinstance(value, torch.Tensor)]
        key = _signature(op, values)
        if key not in self.traced:

            def native(*given: torch.Tensor) -> Any:
                called = list(values)
                for i, tensor in zip(tensors, given, strict=True):
                    called[i] = tensor
                return op.native(*called)

            self.traced[key] = trace(native, [values[i] for i in tensors])
        self._copy_in(node, self.traced[key].graph, [arguments[i] for i in tensors])

    def _copy_in(self, node: Node, traced: Graph, inputs: list[Node]) -> None:
        """Put a traced graph in a node's place."""
        mapping: dict[Node, Any] = {}
        given = iter(inputs)
        with self.graph.inserting_before(node):
            for source in traced.nodes:
                if source.op == "placeholder":
                    mapping[source] = next(given)
                elif source.op == "output":
                    self._hand_over(node, map_arg(source.args[0], lambda n: mapping[n]))
                else:
                    new = self.graph.node_copy(source, lambda n: mapping[n])
                    # The trace marks where eager rounds, for emulate_precision_casts: keep that.
                    new.meta = {**source.meta, "val": _fresh(source.meta["val"])}
                    copy_origin(node, new)
                    mapping[source] = new

    def _hand_over(self, node: Node, results: Any) -> None:
        if isinstance(results, Node):
            node.replace_all_uses_with(results)
        else:
            for item in list(node.users):
                item.replace_all_uses_with(results[item.args[1]])
                self.graph.erase_node(item)
        self.graph.erase_node(node)


def _signature(op: IrOp, values: list[Any]) -> Any:
    """Equal for calls whose native traces are the same graph."""
    parts: list[Any] = [op.name]
    for value in values:
        if isinstance(value, torch.Tensor):
            parts.append((value.dtype, value.device, tuple(map(str, value.shape)), tuple(map(str, value.stride()))))
        else:
            parts.append(value)
    return tuple(parts)


def _fresh(value: Any) -> Any:
    """A fake value with a storage of its own: Inductor takes a shared storage for an alias."""
    return value if getattr(value, "fake_mode", None) is None else fresh_fake(value)
