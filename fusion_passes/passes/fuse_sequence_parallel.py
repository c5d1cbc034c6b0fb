"""Fuse sequence parallelism: reduce-scatter, [add,] norm and all-gather become one operator.

The residual holds each rank's own rows, before and after, so it need not be equal on every rank.
Kernels need the norm's weight to be equal, which lower_ops checks (REPLICATED_ARGUMENTS in
fusion_passes/analysis/replication.py).
"""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, Node

from fusewire.custom_ops.ops.all_reduce_norm import resolve_group
from fusewire.custom_ops.ops.norms import fused_add_rms_norm, rms_norm
from fusewire.custom_ops.ops.registry import Support
from fusewire.custom_ops.ops.sharded_norm import NO_INNER
from fusewire.fusion_passes.analysis.graph import aten, getitem, getitem_users, new_call, value_of
from fusewire.fusion_passes.compiler.inductor import fresh_fake
from fusewire.fusion_passes.context import RunContext
from fusewire.fusion_passes.passes.fuser import NORM_CLAUSES, SUM_CLAUSES, Captures, Fuser, Match, residual_fits
from fusewire.patterns.collectives import ALL_GATHER, REDUCE_SCATTER, WAIT
from fusewire.patterns.fusions import SEQUENCE_FUSIONS

_NORMS = (rms_norm.torch_op, fused_add_rms_norm.torch_op)


def fuse_sequence_parallel(graph: Graph, context: RunContext) -> bool:
    """Fuse every reduce-scatter that the checks let through; return whether the graph changed."""
    return SequenceFuser.run(graph, context)


def check_gather(captures: Captures) -> Support:
    """Check that the gather and the reduce-scatter are over one group, for its size."""
    group, gathered = captures["group"], captures["gathered_group"]
    size = resolve_group(group).size()
    return Support.all_of(
        (
            gathered == group,
            f"the rows are reduced over group {group!r} and gathered over group {gathered!r}; they must be one group",
        ),
        (
            captures["size"] == size == captures["gathered_size"],
            f"the reduce-scatter is for {captures['size']} ranks and the all-gather for "
            f"{captures['gathered_size']}, but the group has {size}",
        ),
    )


def check_rows(captures: Captures) -> Support:
    """Check that the reduce-scatter divides the rows, not the hidden dimension."""
    x = value_of(captures["x"])
    return Support.all_of(
        (x is not None and x.dim() > 1, "the reduce-scatter divides the hidden dimension among the ranks, not the rows")
    )


class SequenceFuser(Fuser):
    """Fuses reduce-scatters with norms and all-gathers."""

    fusions = SEQUENCE_FUSIONS
    collective = REDUCE_SCATTER
    what = "reduce-scatter"
    clauses = (*SUM_CLAUSES, check_gather, check_rows, *NORM_CLAUSES)

    def check_graph(self, match: Match) -> Support:
        """Check the residual, the rows' readers and the order of the group's collectives."""
        return (
            self.check_residual(match)
            and self.check_readers(match, _wait_of(match), match.node_of(*_NORMS))
            and self.check_order(match, match.node_of(ALL_GATHER))
        )

    def check_residual(self, match: Match) -> Support:
        """Check that the residual, if there is one, has the shape and dtype of this rank's rows."""
        return residual_fits(match.captures.get("residual"), _wait_of(match), self.what)

    def rewrite(self, match: Match) -> None:
        """Replace the gathered norm and this rank's rows by the fused call's results."""
        scatter, wait, norm = match.node_of(REDUCE_SCATTER), _wait_of(match), match.node_of(*_NORMS)
        gather, x = match.node_of(ALL_GATHER), match.captures["x"]
        shard = wait.meta["val"]
        with self.graph.inserting_before(gather):
            residual = match.captures.get("residual")
            if residual is not None:
                flat = [-1, self._size(x, shard.dim() - 1, wait)]
                residual = new_call(self.graph, aten.view.default, (residual, flat), {}, wait)
            given = {**match.captures, "residual": residual}
            arguments = [None if key is None else given[key] for key in match.fusion.arguments]
            group = arguments.pop()
            rows = shard.view(shard.numel() // shard.shape[-1], shard.shape[-1])
            values = fresh_fake(x.meta["val"], contiguous=True), fresh_fake(rows, contiguous=True)
            fused = self.call(match, (*arguments, None, 0.0, 0.0, NO_INNER, group), values)
            full, part = getitem(self.graph, fused, 0), getitem(self.graph, fused, 1)
            sizes = [-1, *(self._size(x, dim, wait) for dim in range(1, shard.dim()))]
            summed = new_call(self.graph, aten.view.default, (part, sizes), {}, wait)
        self.unsorted = True  # the rows' readers may stand before the all-gather
        match.root.replace_all_uses_with(full)
        if match.fusion.returns_sum:
            for index, item in getitem_users(norm):
                if index == 1:
                    item.replace_all_uses_with(summed)
        else:
            wait.replace_all_uses_with(summed, delete_user_cb=lambda user: user is not norm)
        items = (item for _, item in getitem_users(norm))
        for node in (summed, part, match.root, gather, *items, norm, wait, scatter):
            if not node.users:
                self.graph.erase_node(node)

    def _size(self, x: Node, dim: int, origin: Node) -> Any:
        """Return a size of x other than the first; a node if it is symbolic."""
        size = x.meta["val"].shape[dim]
        return size if isinstance(size, int) else new_call(self.graph, aten.sym_size.int, (x, dim), {}, origin)


def _wait_of(match: Match) -> Node:
    """Return the wait for the reduce-scatter (the match has the all-gather's, too)."""
    scatter = match.node_of(REDUCE_SCATTER)
    return next(node for node in match.nodes if node.target is WAIT and node.args[0] is scatter)
