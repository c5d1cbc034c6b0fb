"""Merge a sum or difference of two all-reduces over one group into one all-reduce of it.

Mixture-of-experts layers add the all-reduced output of the routed experts to that of the shared
expert. Layers whose attention and feed-forward stand side by side add both to the residual. The
merged all-reduce can then be fused with the norm after it. It rounds elsewhere than the source did.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.fx import Graph, Node

from fusewire.fusion_passes.analysis.graph import (
    CASTS,
    DIVS,
    SUMS,
    VIEWS,
    aten,
    cast_source,
    dtype_of,
    erase_unused,
    mutation_regions,
    new_call,
    plain_mul,
    same_shape,
    sort_topologically,
    terms_of,
    wide_terms,
)
from fusewire.fusion_passes.analysis.paths import ADDEND, CAST, MATRIX, SCALE, Path, PathFinder, Step
from fusewire.fusion_passes.context import MERGED, RunContext
from fusewire.fusion_passes.passes.coalesced import drop_taken_tensors
from fusewire.fusion_passes.spmd.fingerprint import moved_texts
from fusewire.patterns.collectives import ALL_REDUCE, COALESCED_PART, SUM, WAIT, AllReduce, all_reduces_in

_SUMS = SUMS | CASTS | {aten.addmm.default}
_Pair = tuple[Path, Path]


def merge_all_reduces(graph: Graph, context: RunContext) -> bool:
    """Merge every sum of two all-reduces that allows it; return whether the graph changed."""
    return _Merger(graph, context).run()


class _Merger:
    """One run of the pass. `values`: all-reduces that can be merged, by their finished values."""

    def __init__(self, graph: Graph, context: RunContext) -> None:
        self.graph = graph
        self.context = context
        self.values = {
            site.value: site.node
            for site in all_reduces_in(graph)
            if site.value is not site.node and (site.node.target is ALL_REDUCE or site.spelling is COALESCED_PART)
        }
        self.paths = PathFinder(self.values, context.config, matrices=True)

    def run(self) -> bool:
        changed = False
        if len(self.values) < 2:
            return False
        regions = mutation_regions(self.graph)
        for node in list(self.graph.nodes):
            pair = self._pair_at(node) if node.target in _SUMS and not node._erased else None
            if pair is None:
                continue
            # Both all-reduces must read their inputs between the same two in-place writes.
            if len({regions.get(n, 0) for n in (node, *(path.all_reduce.node for path in pair))}) == 1:
                regions[self._merge(node, pair)] = regions[node]
                changed = True
        if changed:
            drop_taken_tensors(self.graph, self.context)
            sort_topologically(self.graph)
        return changed

    def _pair_at(self, node: Node) -> _Pair | None:
        """Return the paths from two all-reduces to the operands of an add, if they can be merged."""
        if node.target is aten.addmm.default:
            return self._pair(self._path_to(node.args[0]), self._path_to_product(node))
        left, right, alpha = _terms_at(node) or (None, None, 1)
        first, second = self._path_to(left), self._path_to(right)
        if second is not None and alpha != 1:
            second = Path(second.all_reduce, (*second.steps, Step(SCALE, node, alpha)), second.end)
        return self._pair(first, second)

    def _path_to(self, operand: Any) -> Path | None:
        """Return a path of views, products and addends that nothing else reads, or None.

        So neither a gate nor the input of another all-reduce depends on this one's result.
        """
        if not self._may_lead(operand):
            return None
        path = self.paths.find(operand)
        if path is None or path.other_readers or path.of_kind(CAST):
            return None
        return None if path.refusal(True) else path

    def _path_to_product(self, node: Node) -> Path | None:
        """Return the path to the product of an addmm, or None."""
        summed, matrix = node.args[1:]
        path = None if node.kwargs else self._path_to(summed)
        step = self.paths.matrix(node, matrix)
        return None if path is None or step is None else Path(path.all_reduce, (*path.steps, step), node)

    def _may_lead(self, node: Any, limit: int = 6) -> bool:
        """Return whether an all-reduce stands behind at most 6 views, products and addends."""
        if not isinstance(node, Node) or limit == 0:
            return False
        if node in self.values:
            return True
        first_only = node.target in VIEWS | DIVS | {aten.mm.default, aten.neg.default, aten.sum.dim_IntList}
        behind = plain_mul(node) or (terms_of(node) or ())[:2] or (node.args[:1] if first_only else ())
        return any(self._may_lead(source, limit - 1) for source in behind)

    def _pair(self, first: Path | None, second: Path | None) -> _Pair | None:
        if first is None or second is None or any(_adds_before_a_matrix(path) for path in (first, second)):
            return None
        a, b = first.all_reduce, second.all_reduce
        if a.node is b.node or not _same_reduction(a, b) or not same_shape(first.end, second.end):
            return None
        names = {self.context.origin.get(site.name, site.name) for site in (a, b)}
        if names & (set(self.context.excluded) | self.context.unmergeable):
            return None
        return first, second

    def _merge(self, node: Node, pair: _Pair) -> Node:
        """Replace an add of two all-reduces by one all-reduce; return its node."""
        graph, (kept, gone) = self.graph, (path.all_reduce for path in pair)
        call = functools.partial(new_call, graph)
        with graph.inserting_before(max(kept.node, gone.node)):
            total = call(aten.add.Tensor, tuple(path.moved_input(call) for path in pair), {}, node)
            reduced = call(ALL_REDUCE, (total, kept.reduction, kept.group), {}, kept.node)
            total = waited = call(WAIT, (reduced,), {}, kept.value)
        with graph.inserting_before(node):
            for path in pair:
                for step in path.of_kind(ADDEND):
                    total = call(aten.add.Tensor, (total, path.moved_addend(step, call)), {}, step.node)
        node.replace_all_uses_with(total)
        erase_unused(node)
        for site in (kept, gone):
            del self.values[site.value]
            for dead in (site.value, site.node):
                if not dead.users:
                    graph.erase_node(dead)
        self.values[waited] = reduced
        self._record(pair, reduced)
        return reduced

    def _record(self, pair: _Pair, reduced: Node) -> None:
        """Record that `reduced` stands for a pair's first all-reduce, with the second merged in."""
        context = self.context
        first, second = (context.origin.pop(path.all_reduce.name, path.all_reduce.name) for path in pair)
        context.origin[reduced.name] = first
        context.merged[second] = f"{MERGED} {first}"
        texts = [" ".join(["one sum", *moved_texts(path)]) for path in pair]
        moved = [*context.moved.pop(second, []), f"merged: {texts[0]} + {texts[1]}"]
        context.moved.setdefault(first, []).extend(moved)
        context.assumed.update(option for path in pair for option in path.assumptions)


def _terms_at(node: Node) -> tuple[Any, Any, int | float] | None:
    """Return `terms_of` a sum, also of one in fp32 that is rounded at once; None if it is none.

    Nothing else reads the sum in fp32 and its casts, so they go away with it.
    """
    total = cast_source(node)
    if total is None:
        return terms_of(node)
    terms = None if any(len(step.users) > 1 for step in (total, *total.all_input_nodes)) else wide_terms(total)
    return terms if terms is not None and dtype_of(terms[0]) == dtype_of(node) else None


def _adds_before_a_matrix(path: Path) -> bool:
    """Return whether a path has an addend that a matrix multiplies later."""
    kinds = [step.kind for step in path.steps]
    return ADDEND in kinds and MATRIX in kinds[kinds.index(ADDEND) :]


def _same_reduction(a: AllReduce, b: AllReduce) -> bool:
    """Return whether two all-reduces sum over one group in one dtype, which is not float16."""
    return bool(
        isinstance(a.group, str)
        and a.group == b.group
        and isinstance(a.reduction, str)
        and a.reduction.lower() == SUM
        and b.reduction == a.reduction
        and a.x.meta["val"].dtype == b.x.meta["val"].dtype
        # A rank's two parts together may be more than float16 holds where the two sums are not.
        and a.x.meta["val"].dtype != torch.float16
    )
