"""Fuse the second norm of sandwich norms into the fused operator before it."""

from __future__ import annotations

from torch.fx import Graph

from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm
from fusewire.custom_ops.ops.norms import fused_add_rms_norm
from fusewire.custom_ops.ops.registry import Support
from fusewire.fusion_passes.analysis.graph import getitem_users
from fusewire.fusion_passes.context import RunContext
from fusewire.fusion_passes.passes.fuser import NORM_CLAUSES, Fuser, Match, check_residual
from fusewire.patterns.fusions import EPILOGUES


def fuse_epilogues(graph: Graph, context: RunContext) -> bool:
    """Fuse every epilogue that the checks let through; return whether the graph changed."""
    changed = EpilogueFuser.run(graph, context)
    left = {node.name for node in graph.find_nodes(op="call_function", target=fused_add_rms_norm.torch_op)}
    context.unfused_second_norms |= {name for node, name in context.second_norms.items() if node in left}
    return changed


class EpilogueFuser(Fuser):
    """Fuses fused operators with second norms. If it refuses, the first norm stays fused."""

    fusions = EPILOGUES
    collective = all_reduce_rms_norm.torch_op
    clauses = (*NORM_CLAUSES, check_residual)

    def name_of(self, match: Match) -> str:
        """Return the name of the all-reduce that was fused; "" for a call that the program has."""
        name: str = match.node_of(self.collective).meta.get("fusewire_all_reduce", "")
        return name

    def record_refusal(self, name: str, refusal: str) -> None:
        """Record nothing: the all-reduce is fused."""

    def check_graph(self, match: Match) -> Support:
        """Check that nothing reads the sum, and the order of the group's collectives."""
        if any(index == 1 for index, _ in getitem_users(match.node_of(self.collective))):
            return Support.no("the sum is also read elsewhere, and the fused operator does not return it")
        return self.check_order(match, self.last_input(match))

    def rewrite(self, match: Match) -> None:
        """Replace the fused call and its epilogue by one call."""
        inner = match.node_of(self.collective)
        match.root.replace_all_uses_with(self.call_after_inputs(match))
        for node in (match.root, *(item for _, item in getitem_users(inner)), inner):
            self.graph.erase_node(node)
