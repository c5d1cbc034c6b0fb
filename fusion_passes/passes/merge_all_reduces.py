"""Merge a sum of two all-reduces over one group into one all-reduce of the sum.

Mixture-of-experts layers add the all-reduced output of the routed experts to that of the shared
expert. Layers whose attention and feed-forward stand side by side add both to the residual. The
merged all-reduce can then be fused with the norm after it. It rounds elsewhere than the source did.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from fusewire.fusion_passes.analysis.graph import (
    ADDS,
    CASTS,
    DIVS,
    VIEWS,
    addends_of,
    aten,
    cast_source,
    dtype_of,
    erase_unused,
    mutation_regions,
    new_call,
    plain_add,
    plain_mul,
    same_shape,
    sort_topologically,
)
from fusewire.fusion_passes.analysis.paths import ADDEND, CAST, Path, PathFinder, addend_step
from fusewire.fusion_passes.context import MERGED, RunContext
from fusewire.fusion_passes.passes.coalesced import drop_taken_tensors
from fusewire.fusion_passes.spmd.fingerprint import moved_texts
from fusewire.patterns.collectives import ALL_REDUCE, COALESCED_PART, SUM, WAIT, AllReduce, all_reduces_in

_SUMS = ADDS | CASTS | {aten.addmm.default}


@dataclass(frozen=True)
class _Pair:
    """Two all-reduces that are added, one of them perhaps to a sum of the other and `residual`.

    That may be a number.
    """

    first: Path
    second: Path
    residual: Any = None

    @property
    def paths(self) -> tuple[Path, Path]:
        return self.first, self.second


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
            if len({regions.get(n, 0) for n in (node, *(path.all_reduce.node for path in pair.paths))}) == 1:
                regions[self._merge(node, pair)] = regions[node]
                changed = True
        if changed:
            drop_taken_tensors(self.graph, self.context)
            sort_topologically(self.graph)
        return changed

    def _pair_at(self, node: Node) -> _Pair | None:
        """Return the all-reduces behind the operands of an add, if they can be merged."""
        if node.target is aten.addmm.default:
            operands = [(node.args[0], self._path_to(node.args[0])), (None, self._path_to_product(node))]
        else:
            operands = [(operand, self._path_to(operand)) for operand in _addends_at(node)]
        match [path for _, path in operands if path is not None]:
            case [first, second]:
                return self._pair(first, second, None)
            case [path]:
                other = next(operand for operand, found in operands if found is None)
                return self._pair_behind(path, other, node)
        return None

    def _pair_behind(self, path: Path, other: Any, node: Node) -> _Pair | None:
        """Return the pair where `other`, the other operand, is a sum with a residual or a bias."""
        inner = plain_add(other) if isinstance(other, Node) and len(other.users) == 1 else None
        for summed, residual in (inner, inner[::-1]) if inner is not None else ():
            second = self._path_to(summed)
            fits = same_shape(other, node) and dtype_of(other) == dtype_of(node)
            if second is not None and fits and addend_step(other, summed, residual) is not None:
                return self._pair(second, path, residual)
        return None

    def _path_to(self, operand: Any) -> Path | None:
        """Return a path of views and products that nothing else reads, or None.

        So neither a gate nor the input of another all-reduce depends on this one's result.
        """
        if not self._may_lead(operand):
            return None
        path = self.paths.find(operand)
        if path is None or path.other_readers or path.of_kind(CAST, ADDEND):
            return None
        return None if path.refusal(True) else path

    def _path_to_product(self, node: Node) -> Path | None:
        """Return the path to the product of an addmm, or None."""
        summed, matrix = node.args[1:]
        path = None if node.kwargs else self._path_to(summed)
        step = self.paths.matrix(node, matrix)
        return None if path is None or step is None else Path(path.all_reduce, (*path.steps, step), node)

    def _may_lead(self, node: Any, limit: int = 6) -> bool:
        """Return whether an all-reduce stands behind at most 6 views and products."""
        if not isinstance(node, Node) or limit == 0:
            return False
        if node in self.values:
            return True
        first_only = node.target in VIEWS | DIVS or node.target is aten.mm.default
        behind = plain_mul(node) or (node.args[:1] if first_only else ())
        return any(self._may_lead(source, limit - 1) for source in behind)

    def _pair(self, first: Path, second: Path, residual: Any) -> _Pair | None:
        a, b = first.all_reduce, second.all_reduce
        if a.node is b.node or not _same_reduction(a, b) or not same_shape(first.end, second.end):
            return None
        names = {self.context.origin.get(site.name, site.name) for site in (a, b)}
        if names & (set(self.context.excluded) | self.context.unmergeable):
            return None
        return _Pair(first, second, residual)

    def _merge(self, node: Node, pair: _Pair) -> Node:
        """Replace an add of two all-reduces by one all-reduce; return its node."""
        graph, kept, gone = self.graph, pair.first.all_reduce, pair.second.all_reduce
        with graph.inserting_before(max(kept.node, gone.node)):
            inputs = tuple(path.moved_input(functools.partial(new_call, graph)) for path in pair.paths)
            total = new_call(graph, aten.add.Tensor, inputs, {}, node)
            reduced = new_call(graph, ALL_REDUCE, (total, kept.reduction, kept.group), {}, kept.node)
            total = waited = new_call(graph, WAIT, (reduced,), {}, kept.value)
        if pair.residual is not None:
            with graph.inserting_before(node):
                total = new_call(graph, aten.add.Tensor, (pair.residual, waited), {}, node)
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
        first, second = (context.origin.pop(path.all_reduce.name, path.all_reduce.name) for path in pair.paths)
        context.origin[reduced.name] = first
        context.merged[second] = f"{MERGED} {first}"
        texts = [" ".join(["one sum", *moved_texts(path)]) for path in pair.paths]
        moved = [*context.moved.pop(second, []), f"merged: {texts[0]} + {texts[1]}"]
        context.moved.setdefault(first, []).extend(moved)
        context.assumed.update(option for path in pair.paths for option in path.assumptions)


def _addends_at(node: Node) -> tuple[Any, ...]:
    """Return what a sum adds, also one in fp32 that is rounded at once; () if it is none.

    Nothing else reads the sum in fp32 and its casts, so they go away with it.
    """
    total = cast_source(node)
    inner = () if total is None else (total, *total.all_input_nodes)
    return () if any(len(step.users) > 1 for step in inner) else addends_of(node) or ()


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
