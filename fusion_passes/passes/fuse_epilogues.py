"""Fuse what follows the fused operator: the residual add and the second norm of sandwich norms."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from torch.fx import Graph, Node

from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm
from fusewire.custom_ops.ops.norms import fused_add_rms_norm
from fusewire.custom_ops.ops.registry import YES, Support
from fusewire.fusion_passes.analysis.graph import copy_origin, depends_on, getitem_users, sort_topologically
from fusewire.fusion_passes.compiler.inductor import FusionMatcher, fresh_fake
from fusewire.fusion_passes.context import RunContext
from fusewire.fusion_passes.passes.fuse_all_reduce import (
    Captures,
    check_epsilon,
    check_residual,
    check_weight,
    check_weight_bias,
    node_of,
)
from fusewire.patterns.fusions import EPILOGUES, Fusion

CLAUSES = (check_epsilon, check_weight_bias, check_weight, check_residual)


def fuse_epilogues(graph: Graph, context: RunContext) -> bool:
    """Fuse every epilogue that the checks let through; says whether anything changed."""
    if not context.config.fuse_sandwich_norms:
        return False
    run = _Fuser(graph, context)
    matcher = FusionMatcher("fusewire_epilogues")
    for fusion in EPILOGUES:
        matcher.add(fusion, run.check, functools.partial(run.rewrite, fusion))
    count = matcher.apply(graph)
    if count:
        sort_topologically(graph)
    left = {node.name for node in graph.find_nodes(op="call_function", target=fused_add_rms_norm.torch_op)}
    context.plain |= {name for raised, name in context.seconds.items() if raised in left}
    return count > 0


class _Fuser:
    def __init__(self, graph: Graph, context: RunContext) -> None:
        self.graph = graph
        self.context = context
        self.order = {node: i for i, node in enumerate(graph.nodes)}

    def check(self, captures: Captures, root: Node, nodes: Sequence[Node]) -> Support:
        """The extra check. A refusal leaves the all-reduce fused with its first norm."""
        inner = node_of(nodes, all_reduce_rms_norm.torch_op)
        support = YES
        for clause in CLAUSES:
            support = support and clause(captures)
        if not support:
            return support
        if any(index == 1 for index, _ in getitem_users(inner)):
            return Support.no("the sum is also read elsewhere, and the fused operator does not return it")
        if self._follows(captures, inner):
            return Support.no("another collective of the same group comes before what the second norm needs")
        return Support.all_of(
            (
                not any(depends_on(captures[name], inner, self.order) for name in ("residual", "weight")),
                "what the second norm needs is computed from the all-reduce's own result",
            )
        )

    def _follows(self, captures: Captures, inner: Node) -> bool:
        """Whether a collective of the group stands between the fused call and what its epilogue needs."""
        last, group = self._last_input(captures, inner), captures["group"]
        node = inner.next
        while inner is not last and node is not last:
            if node.op == "call_function" and group in (*node.args, *node.kwargs.values()):
                return True
            node = node.next
        return False

    def _last_input(self, captures: Captures, inner: Node) -> Node:
        return max(n for n in (inner, captures["residual"], captures["weight"]) if isinstance(n, Node))

    def rewrite(self, fusion: Fusion, captures: Captures, root: Node, nodes: Sequence[Node]) -> None:
        """Put one call in the place of the fused call and its epilogue."""
        inner = node_of(nodes, all_reduce_rms_norm.torch_op)
        name: str = inner.meta["fusewire_all_reduce"]
        arguments = tuple(None if key is None else captures[key] for key in fusion.arguments)
        with self.graph.inserting_before(self._last_input(captures, inner).next):
            fused = self.graph.call_function(fusion.replacement, arguments)
        copy_origin(inner, fused)
        fused.meta["fusewire_all_reduce"] = name
        x = captures["x"].meta["val"]
        fused.meta["val"] = fresh_fake(x, contiguous=True), fresh_fake(x, contiguous=True)
        self.order[fused] = self.order[inner]
        root.replace_all_uses_with(fused)
        self.graph.erase_node(root)
        for _, item in getitem_users(inner):
            self.graph.erase_node(item)
        self.graph.erase_node(inner)
        self.context.fused[name] = dataclasses.replace(self.context.fused[name], fusion=fusion.name)
