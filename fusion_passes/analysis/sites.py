"""Find why a norm and the all-reduce before it cannot be rewritten into one operator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from fusewire.fusion_passes.analysis.graph import cast_source, depends_on, is_row_major, same_shape, wide_addends
from fusewire.fusion_passes.analysis.norm_reader import Norm
from fusewire.fusion_passes.analysis.paths import ADDEND, SCALE, SUM_OF_ROWS, VIEW, Path
from fusewire.patterns.collectives import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, WAIT


@dataclass(frozen=True)
class Site:
    """A norm, the path from an all-reduce to it, and the residual added between (or None)."""

    norm: Norm
    path: Path
    residual: Any

    @property
    def scatters(self) -> bool:
        """Return whether the collective is a reduce-scatter."""
        return self.path.all_reduce.spelling.scatters

    @property
    def stays(self) -> bool:
        """Return whether the all-reduce is in canonical form and nothing has to move before it."""
        return not self.path.of_kind(VIEW, SCALE, SUM_OF_ROWS) and self.path.all_reduce.node.target in (
            ALL_REDUCE,
            REDUCE_SCATTER,
        )

    @property
    def inner(self) -> list[Node]:
        """Return the nodes in between that nothing else may read: the fused operator lacks them."""
        if (not self.path.steps and self.stays) or self.is_viewed:
            return self.widened  # the fusion's check sees the readers of an all-reduce that stays
        nodes = [self.path.all_reduce.value, *(step.node for step in self.path.steps), *self.widened]
        return nodes if self.residual is not None else [node for node in nodes if node is not self.path.end]

    @property
    def widened(self) -> list[Node]:
        """Return the nodes of a sum in fp32 between the path's end and the norm or the rounding."""
        total = self.norm.total or cast_source(self.norm.source)
        if self.residual is None or total is None or wide_addends(total) is None:
            return []
        casts = [operand for operand in total.all_input_nodes if cast_source(operand) is self.path.end]
        return casts if total is self.norm.total else [*casts, total]

    @property
    def is_viewed(self) -> bool:
        """Return whether only views stand between the all-reduce and the norm."""
        only = all(step.kind == VIEW for step in self.path.steps) and not self.scatters
        return self.residual is None and bool(self.path.steps) and only


def site_refusals(site: Site, regions: dict[Node, int], order: dict[Node, int]) -> Iterator[tuple[Any, str]]:
    """Yield (condition, refusal): where a condition holds, the site cannot be rewritten.

    Args:
        site: the site.
        regions: the number of in-place writes up to each node (see mutation_regions).
        order: each node's position in the graph.
    """
    norm, path, residual, reduce = site.norm, site.path, site.residual, site.path.all_reduce.node
    yield (
        regions.get(norm.out) != regions.get(reduce) or spans_write(norm, regions),
        "an operation that writes in place stands between the all-reduce and the norm",
    )
    if site.scatters:
        yield from _scatter_refusals(site)
    addends = [step.value for step in path.of_kind(ADDEND)]
    yield (
        any(depends_on(value, reduce, order) for value in (residual, *addends)),
        "what is added to the all-reduce's result is computed from that result, which has to be "
        "there first; no option helps",
    )
    shared = next((node for node in site.inner if len(node.users) > 1), None)
    yield (
        shared,
        f"{shared}, between the all-reduce and the norm, is also read elsewhere, and the fused "
        "operator does not return it",
    )
    for what in ("weight", "eps", "weight_bias") if residual is not None or addends else ():
        of_sum = depends_on(getattr(norm, what), reduce, order)
        yield of_sum, f"the norm's {what} is computed from the all-reduce's own result"
    yield (
        not (is_row_major(norm.out) and is_row_major(norm.source)),
        "the value that is normalised is not contiguous, as the fused operator's results are",
    )
    if residual is not None:
        broadcast = not same_shape(path.end, norm.source)
        yield broadcast, "the all-reduce's result is broadcast when the residual is added"
        other = addends and not same_shape(residual, path.end)
        yield other, "a bias stands before the add, and the residual has another shape"


def _scatter_refusals(site: Site) -> Iterator[tuple[bool, str]]:
    """Yield (condition, refusal) for a norm of the rows that a reduce-scatter leaves this rank."""
    path, gathers = site.path, site.norm.out.users
    yield (
        bool(path.of_kind(VIEW, SCALE, SUM_OF_ROWS)),
        "a view, a scale or a sum stands between the reduce-scatter and the norm",
    )
    yield (
        bool(path.of_kind(ADDEND)) and site.residual is None,
        "a bias stands between the reduce-scatter and the norm, and no residual that could take it up",
    )
    yield (
        not gathers or any(user.target is not ALL_GATHER for user in gathers),
        "the norm of this rank's rows is read by something else than an all-gather",
    )
    yield (
        len({user.args[1:] for user in gathers}) > 1
        or any([reader.target for reader in user.users] != [WAIT] for user in gathers),
        "the all-gathers after the norm differ, or are not waited for once each",
    )


def spans_write(norm: Norm, regions: dict[Node, int]) -> bool:
    """Return whether something is written in place between two nodes of the norm."""
    region, pending = regions.get(norm.out, 0), [norm.out]
    while pending and region > 0:
        node = pending.pop()
        if node.op == "call_function" and node not in (norm.source, norm.weight, norm.residual):
            if regions.get(node, region) != region:
                return True
            pending.extend(node.all_input_nodes)
    return False
