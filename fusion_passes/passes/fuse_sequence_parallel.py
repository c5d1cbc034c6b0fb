"""Fuse sequence parallelism: reduce-scatter, [add,] norm of this rank's rows, all-gather become one operator.

The residual is each rank's own rows here, in the source and in the operator, so it need not be the same on every rank. The
norm's weight must be, for kernels: lower_ops sees to that (see REPLICATED_ARGUMENTS in fusion_passes/spmd/replication.py).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

from torch.fx import Graph, Node

from fusewire.custom_ops.ops.all_reduce_norm import resolve_group
from fusewire.custom_ops.ops.norms import fused_add_rms_norm, rms_norm
from fusewire.custom_ops.ops.registry import YES, Support
from fusewire.custom_ops.ops.sharded_norm import NO_INNER
from fusewire.fusion_passes.analysis.graph import (
    aten,
    copy_origin,
    depends_on,
    dtype_of,
    getitem_users,
    new_call,
    same_shape,
    sort_topologically,
    value_of,
)
from fusewire.fusion_passes.compiler.inductor import FusionMatcher, fresh_fake
from fusewire.fusion_passes.context import SUPPORTED, Fused, RunContext
from fusewire.fusion_passes.passes.fuse_all_reduce import (
    Captures,
    check_epsilon,
    check_group,
    check_input,
    check_reduction,
    check_weight,
    check_weight_bias,
    node_of,
    refuse_undecided,
)
from fusewire.patterns.collectives import ALL_GATHER, REDUCE_SCATTER, WAIT
from fusewire.patterns.fusions import SEQUENCE_FUSIONS, Fusion


def fuse_sequence_parallel(graph: Graph, context: RunContext) -> bool:
    """Fuse every raised reduce-scatter that the checks let through; says whether anything changed."""
    if not context.config.fuse_allreduce_rms or not context.config.fuse_sequence_parallel:
        return False
    run = _Fuser(graph, context)
    matcher = FusionMatcher("fusewire_sequence_parallel")
    for fusion in SEQUENCE_FUSIONS:
        matcher.add(fusion, functools.partial(run.check, fusion), functools.partial(run.rewrite, fusion))
    count = matcher.apply(graph)
    if count:
        sort_topologically(graph)
    refuse_undecided(graph, context, REDUCE_SCATTER)
    return count > 0


def check_gather(captures: Captures) -> Support:
    """The norm is gathered over the group that was reduced over, and the sizes in the graph are that group's."""
    group, gathered = captures["group"], captures["gathered_group"]
    size = resolve_group(group).size()
    return Support.all_of(
        (
            gathered == group,
            f"the rows are reduced over group {group!r} and gathered over group {gathered!r}; they must be one group",
        ),
        (
            captures["size"] == size == captures["gathered_size"],
            f"the reduce-scatter is for {captures['size']} ranks and the all-gather for {captures['gathered_size']}, "
            f"but the group has {size}",
        ),
    )


def check_rows(captures: Captures) -> Support:
    """The reduce-scatter divides the rows, not the hidden dimension."""
    x = value_of(captures["x"])
    return Support.all_of(
        (x is not None and x.dim() > 1, "the reduce-scatter divides the hidden dimension among the ranks, not the rows")
    )


CLAUSES = (
    check_reduction,
    check_group,
    check_gather,
    check_epsilon,
    check_weight_bias,
    check_input,
    check_rows,
    check_weight,
)


class _Fuser:
    def __init__(self, graph: Graph, context: RunContext) -> None:
        self.graph = graph
        self.context = context
        self.order = {node: i for i, node in enumerate(graph.nodes)}

    def check(self, fusion: Fusion, captures: Captures, root: Node, nodes: Sequence[Node]) -> Support:
        """The extra check; a refusal is recorded with its reason and leaves the graph alone."""
        scatter = node_of(nodes, REDUCE_SCATTER)
        name = self.context.origin.get(scatter.name, scatter.name)
        if name in self.context.excluded:
            return Support.no(self.context.excluded[name].reason)
        support = YES
        for clause in CLAUSES:
            support = support and clause(captures)
        support = support and self._check_residual(captures, nodes) and self._check_readers(fusion, nodes)
        support = support and self._check_order(captures, nodes)
        if not support:
            self.context.refuse(name, SUPPORTED, support.reason)
        return support

    def _check_residual(self, captures: Captures, nodes: Sequence[Node]) -> Support:
        residual, shard = captures.get("residual"), self._wait(nodes)
        if residual is None:
            return YES
        return Support.all_of(
            (same_shape(residual, shard), "the residual has another shape than this rank's rows of the sum"),
            (
                dtype_of(residual) == dtype_of(shard),
                f"the residual is {dtype_of(residual)} and the reduce-scatter {dtype_of(shard)}; keep the residual "
                f"stream in {dtype_of(shard)}",
            ),
        )

    def _check_readers(self, fusion: Fusion, nodes: Sequence[Node]) -> Support:
        scatter, wait, norm = node_of(nodes, REDUCE_SCATTER), self._wait(nodes), self._norm(nodes)
        others = [user.name for user in wait.users if user is not norm]
        return Support.all_of(
            (len(scatter.users) == 1, "the reduce-scatter is read before it is waited for, elsewhere in the graph"),
            (
                not (fusion.returns_sum and others),
                f"the rows of the sum, before the residual is added, are also read elsewhere ({', '.join(others)}), and "
                "the fused operator does not return them",
            ),
        )

    def _check_order(self, captures: Captures, nodes: Sequence[Node]) -> Support:
        scatter, gather = node_of(nodes, REDUCE_SCATTER), node_of(nodes, ALL_GATHER)
        for name in ("weight", "residual"):
            if depends_on(captures.get(name), scatter, self.order):
                return Support.no(f"the norm's {name} is computed from the reduce-scatter's own result")
        node, group = scatter.next, captures["group"]
        while node is not gather:
            if node.op == "call_function" and group in (*node.args, *node.kwargs.values()):
                return Support.no(
                    f"another collective of the same group ({node.name}) stands between the reduce-scatter and the "
                    "all-gather, and would change places with one of them"
                )
            node = node.next
        return YES

    def _wait(self, nodes: Sequence[Node]) -> Node:
        scatter = node_of(nodes, REDUCE_SCATTER)
        return next(node for node in nodes if node.target is WAIT and node.args[0] is scatter)

    def _norm(self, nodes: Sequence[Node]) -> Node:
        return next(n for n in nodes if n.target in (rms_norm.torch_op, fused_add_rms_norm.torch_op))

    def rewrite(self, fusion: Fusion, captures: Captures, root: Node, nodes: Sequence[Node]) -> None:
        """Put the fused call in the all-gather's place."""
        scatter, wait, norm = node_of(nodes, REDUCE_SCATTER), self._wait(nodes), self._norm(nodes)
        gather = node_of(nodes, ALL_GATHER)
        name = self.context.origin.get(scatter.name, scatter.name)
        shard = wait.meta["val"]
        with self.graph.inserting_before(gather):
            residual = captures.get("residual")
            if residual is not None:
                flat = [-1, self._size(captures["x"], shard.dim() - 1, wait)]
                residual = new_call(self.graph, aten.view.default, (residual, flat), {}, wait)
            taken = {**captures, "residual": residual}
            arguments = [None if key is None else taken[key] for key in fusion.arguments]
            group = arguments.pop()
            fused = self.graph.call_function(fusion.replacement, (*arguments, None, 0.0, 0.0, NO_INNER, group))
            copy_origin(scatter, fused)
            fused.meta["fusewire_all_reduce"] = name
            x = captures["x"].meta["val"]
            rows = (shard.numel() // shard.shape[-1], shard.shape[-1])
            fused.meta["val"] = (fresh_fake(x, contiguous=True), fresh_fake(shard.view(rows), contiguous=True))
            full, part = (self.graph.call_function(operator.getitem, (fused, i)) for i in (0, 1))
            full.meta["val"], part.meta["val"] = fused.meta["val"]
            sizes = [-1, *(self._size(captures["x"], dim, wait) for dim in range(1, shard.dim()))]
            part = new_call(self.graph, aten.view.default, (part, sizes), {}, wait)
        self._hand_over(fusion, root, norm, wait, full, part)
        for node in (root, gather, *(item for _, item in getitem_users(norm)), norm, wait, scatter):
            if not node.users:
                self.graph.erase_node(node)
        spelling = self.context.spelling.get(name, "")
        self.context.fused[name] = Fused(fusion.name, spelling)

    def _size(self, x: Node, dim: int, origin: Node) -> Any:
        """A size of x, all but the first of which this rank's rows have too; a node where it is symbolic."""
        size = x.meta["val"].shape[dim]
        return size if isinstance(size, int) else new_call(self.graph, aten.sym_size.int, (x, dim), {}, origin)

    def _hand_over(self, fusion: Fusion, root: Node, norm: Node, wait: Node, full: Node, part: Node) -> None:
        root.replace_all_uses_with(full)
        if fusion.returns_sum:
            for index, item in getitem_users(norm):
                if index == 1:
                    item.replace_all_uses_with(part)
        else:
            wait.replace_all_uses_with(part, delete_user_cb=lambda user: user is not norm)
        if not part.users:
            source = part.args[0]
            self.graph.erase_node(part)
            assert isinstance(source, Node)
            self.graph.erase_node(source)
