"""Fuse all-reduce, residual add and norm into `fusewire::all_reduce_rms_norm`."""

from __future__ import annotations

from torch.fx import Graph

from fusewire.custom_ops.ops.registry import Support
from fusewire.fusion_passes.analysis.graph import getitem
from fusewire.fusion_passes.context import RunContext
from fusewire.fusion_passes.passes.fuser import NORM_CLAUSES, SUM_CLAUSES, Fuser, Match, check_residual
from fusewire.patterns.collectives import ALL_REDUCE, WAIT
from fusewire.patterns.fusions import FUSIONS


def fuse_all_reduce(graph: Graph, context: RunContext) -> bool:
    """Fuse every all-reduce that the checks let through; return whether the graph changed."""
    return AllReduceFuser.run(graph, context)


class AllReduceFuser(Fuser):
    """Fuses all-reduces with norms."""

    fusions = FUSIONS
    collective = ALL_REDUCE
    clauses = (*SUM_CLAUSES, *NORM_CLAUSES, check_residual)

    def check_graph(self, match: Match) -> Support:
        """Check the sum's readers and the order of the group's collectives."""
        readers = self.check_readers(match, match.node_of(WAIT), match.root)
        return readers and self.check_order(match, self.last_input(match))

    def rewrite(self, match: Match) -> None:
        """Replace the norm and the sum by the fused call's results."""
        reduce, wait = match.node_of(ALL_REDUCE), match.node_of(WAIT)
        fused = self.call_after_inputs(match)
        dead = [match.root, wait, reduce]
        if match.fusion.returns_sum:
            match.root.replace_all_uses_with(fused)
        else:
            with self.graph.inserting_before(fused.next):
                norm, summed = getitem(self.graph, fused, 0), getitem(self.graph, fused, 1)
            match.root.replace_all_uses_with(norm)
            wait.replace_all_uses_with(summed, delete_user_cb=lambda user: user is not match.root)
            dead.insert(1, summed)
            self.unsorted = True  # the sum's readers may stand before the norm's inputs
        for node in dead:
            if not node.users:
                self.graph.erase_node(node)
