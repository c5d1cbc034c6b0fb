"""Lower each IR operator in the graph to the provider that serves it.

Native is the operator in plain PyTorch. It is traced and written into the graph, where Inductor
fuses it with its neighbours. Any other provider stays a call of the operator, whose `policy` lists
the providers that may serve; the choice by number of tokens is made at run time.

A kernel may add one rank's residual, and multiply by one rank's weight, for all ranks. Where the
graph does not prove that these are equal on every rank, PassConfig.assume_replicated_residuals
decides: they are assumed to be, or only providers that add each rank's own may serve.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node, map_arg

from fusewire.custom_ops.ops.registry import NATIVE, Choice, IrOp, op_of_target, parse_policy
from fusewire.custom_ops.workspaces.provider import PROVIDERS
from fusewire.errors import NoProviderError
from fusewire.fusion_passes.analysis.graph import copy_origin, value_of
from fusewire.fusion_passes.analysis.replication import (
    ASSUMPTION_COUNTED,
    PROVED,
    REPLICATED_ARGUMENTS,
    Replication,
    Verdict,
)
from fusewire.fusion_passes.compiler.inductor import fresh_fake, trace
from fusewire.fusion_passes.context import RunContext
from fusewire.patterns.collectives import positional

# These only sum x over the ranks, so residuals and weights may differ between ranks as in the
# source. All others, a user's too, are assumed to be kernels that need them equal.
_ONLY_SUM = (NATIVE, "rank_ordered", "rank_ordered_batch_invariant")


def lower_ops(graph: Graph, context: RunContext) -> bool:
    """Lower every IR operator of the graph; return whether it changed."""
    return _Lowerer(graph, context).run()


class _Lowerer:
    def __init__(self, graph: Graph, context: RunContext) -> None:
        self.graph = graph
        self.context = context
        self.traced: dict[Any, GraphModule] = {}
        self.unproved: dict[Node, Verdict] = {}

    def run(self) -> bool:
        changed = False
        # Before any is replaced: native's arithmetic shows less about ranks than the operator.
        replication = Replication()
        for node in self.graph.nodes:
            if node.op == "call_function" and node.target in REPLICATED_ARGUMENTS:
                verdict = replication.judge_call(node)
                if verdict.kind != PROVED:
                    self.unproved[node] = verdict
        for node in list(self.graph.nodes):
            op = op_of_target(node.target) if node.op == "call_function" else None
            if op is not None:
                changed = self._lower(node, op) or changed
        return changed

    def _lower(self, node: Node, op: IrOp) -> bool:
        arguments = positional(node)
        policy, left_out = self._policy(node, op, arguments.pop() or self.context.config.policy(op.name))
        values = [value_of(a) if isinstance(a, Node) else a for a in arguments]
        if any(isinstance(a, Node) and v is None for a, v in zip(arguments, values, strict=True)):
            # The graph computes an argument: the operator decides at run time.
            if left_out:
                self._keep(node, arguments, policy)
            return bool(left_out)
        try:
            # Where ranks vote at run time, no rank may decide here by its own machine.
            judge, judged = (
                (op, tuple(values)) if op.derives_from is None else (op.derives_from, op.base_args(tuple(values)))
            )
            choice = judge.choose(*judged, policy=policy, static=True, machine=op.selector is None)
        except NoProviderError as error:
            choice = None
            self._record(node, "", str(error))
        if choice is not None:
            self._record(node, choice.provider.name, "; ".join(filter(None, (left_out, self._why(judge, choice)))))
            self._count_assumption(node, choice)
        if choice is not None and choice.provider.name == NATIVE and self.context.config.inline_native and op.inlines:
            self._inline(node, op, arguments, values)
            return True
        self._keep(node, arguments, policy)
        return True

    def _policy(self, node: Node, op: IrOp, policy: str) -> tuple[str, str]:
        """Return the policy of the providers that may serve a call, and why others may not."""
        if node not in self.unproved or self.context.config.assume_replicated_residuals:
            return policy, ""
        names = parse_policy(op.derives_from or op, policy)
        if NATIVE in names:
            names = names[: names.index(NATIVE) + 1]  # later ones are never reached
        kept = [name for name in names if name in _ONLY_SUM]
        if len(kept) == len(names):
            return policy, ""
        left_out = ", ".join(name for name in names if name not in kept)
        return ",".join(kept or [NATIVE]), (
            f"{left_out}: {self.unproved[node].reason} and may differ between ranks (assume_replicated_residuals=False)"
        )

    def _count_assumption(self, node: Node, choice: Choice) -> None:
        """Count a call whose provider needs what the graph does not prove."""
        needed = node in self.unproved and choice.provider.name not in _ONLY_SUM
        if needed and ASSUMPTION_COUNTED not in node.meta:
            self.context.assumed["assume_replicated_residuals"] += 1

    def _keep(self, node: Node, arguments: list[Any], policy: str) -> None:
        """Keep a call, with its policy."""
        node.args = (*arguments, policy)
        node.kwargs = {}
        node.meta.pop("eager_input_vals", None)  # it has fewer arguments; Inductor pairs the two

    def _why(self, op: IrOp, choice: Choice) -> str:
        """Return why providers of higher priority do not serve, and what is decided at run time."""
        parts = [str(refusal) for refusal in choice.refusals]
        if self.context.config.batch_invariant:
            parts += [
                f"{name}: not batch-invariant, its order of summation changes with the number of tokens"
                for name in op.priority
                if name != NATIVE
                and not (op.providers[name].batch_invariant or op.providers[name].batch_invariant_form)
            ]
        name = choice.provider.name
        if op.selector is not None and (name in PROVIDERS or (name != NATIVE and not choice.provider.batch_invariant)):
            parts.append("or another by number of tokens, once the ranks have voted at the first call")
        return "; ".join(parts)

    def _record(self, node: Node, provider: str, detail: str) -> None:
        """Record for the report the provider of a fused all-reduce."""
        name: str = node.meta.get("fusewire_all_reduce", "")
        fused = self.context.fused.get(name)
        if fused is not None:
            self.context.fused[name] = dataclasses.replace(fused, provider=provider, detail=detail)

    def _inline(self, node: Node, op: IrOp, arguments: list[Any], values: list[Any]) -> None:
        """Replace a call by the trace of its native function, one for each signature."""
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
        """Replace a node by a copy of a traced graph."""
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
    """Return a key that is equal for calls whose native traces are the same graph."""
    parts: list[Any] = [op.name]
    for value in values:
        if isinstance(value, torch.Tensor):
            parts.append((value.dtype, value.device, tuple(map(str, value.shape)), tuple(map(str, value.stride()))))
        else:
            parts.append(value)
    return tuple(parts)


def _fresh(value: Any) -> Any:
    """Return a fake value with its own storage: Inductor takes a shared one for an alias."""
    return value if getattr(value, "fake_mode", None) is None else fresh_fake(value)
