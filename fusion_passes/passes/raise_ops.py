"""Canonicalize: rewrite the spellings of an all-reduce and its norm into a few operators.

    all_reduce, [view, scale, bias,] [add,] norm's arithmetic
 -> wait_tensor(all_reduce(x)) -> fusewire::rms_norm or fusewire::fused_add_rms_norm

Three kinds of norms are canonicalized, each where it stands:

- a norm that an all-reduce (or the reduce-scatter of sequence parallelism) reaches;
- a second norm, after the residual add that follows such a norm (sandwich norms);
- any other norm, where a provider other than native computes norms.

The search goes back from each norm to its all-reduce, so a refusal can name what stands between.
Operators that are a norm and its quantisation are split first (split_norm_quant).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch.fx import Graph, Node

from fusewire.custom_ops.ops.norms import fused_add_rms_norm, rms_norm
from fusewire.custom_ops.ops.registry import NATIVE, get_op, parse_policy
from fusewire.fusion_passes.analysis.graph import (
    aten,
    constant_vector,
    depends_on,
    dtype_of,
    erase_unused,
    first_refusal,
    getitem,
    is_row_major,
    last_size,
    mutation_regions,
    new_call,
    same_shape,
    sort_topologically,
)
from fusewire.fusion_passes.analysis.norm_reader import Norm, norm_roots, norms_at
from fusewire.fusion_passes.analysis.paths import ADDEND, PathFinder
from fusewire.fusion_passes.analysis.scales import is_one_element
from fusewire.fusion_passes.analysis.sites import Site, site_refusals, spans_write
from fusewire.fusion_passes.config import PassConfig
from fusewire.fusion_passes.context import MATCH, RunContext
from fusewire.fusion_passes.passes.coalesced import drop_taken_tensors
from fusewire.fusion_passes.passes.split_norm_quant import split_norm_quants
from fusewire.fusion_passes.spmd.fingerprint import moved_texts
from fusewire.patterns.collectives import ALL_REDUCE, WAIT, AllReduce, all_reduces_in


def raise_ops(graph: Graph, context: RunContext) -> bool:
    """Canonicalize the all-reduces and norms of a graph in place; return whether it changed.

    The pass is named `raise_ops` in PassConfig.disabled_passes.
    """
    return _Canonicalizer(graph, context).run()


def computes_norms_itself(config: PassConfig) -> bool:
    """Return whether a provider other than native comes first for norms."""
    return any(
        parse_policy(get_op(name), config.policy(name))[0] != NATIVE for name in ("rms_norm", "fused_add_rms_norm")
    )


class _Canonicalizer:
    """One run of the pass.

    Attributes:
        regions: the number of in-place writes up to each node (see mutation_regions).
        order: each node's position in the graph; a new node has that of the node it replaces.
        all_reduces: those of the graph, in order.
        taken: names of the all-reduces that are canonicalized with a norm.
        first_norms: the new rms_norm nodes, which a second norm may follow.
    """

    def __init__(self, graph: Graph, context: RunContext) -> None:
        self.graph = graph
        self.context = context
        self.config = context.config
        self.regions = mutation_regions(graph)
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.all_reduces = all_reduces_in(graph)
        usable = {
            site.value: site.node
            for site in self.all_reduces
            if (site.value is not site.node or not site.spelling.waits)
            and not site.spelling.in_place
            and (self.config.fuse_sequence_parallel or not site.spelling.scatters)
        }
        self.paths = PathFinder(usable, self.config)
        self.taken: set[str] = set()
        self.first_norms: set[Node] = set()

    def run(self) -> bool:
        changed = False
        every_norm = computes_norms_itself(self.config)
        if not self.all_reduces and not every_norm:
            return False
        if self.config.fuse_allreduce_rms:
            changed = split_norm_quants(self.graph, self.context, self.order, self._site_of)
        if changed:
            self.regions = mutation_regions(self.graph)
            self.order = {node: i for i, node in enumerate(self.graph.nodes)}
        for root in norm_roots(self.graph):
            # Read one by one: canonicalizing a norm replaces nodes that the next norm may use.
            while any(self._canonicalize(norm, every_norm) for norm in norms_at(root, self.config.allow_reassociation)):
                changed = True
        if changed:
            drop_taken_tensors(self.graph, self.context)
            sort_topologically(self.graph)
        return changed

    def _canonicalize(self, norm: Norm, every_norm: bool) -> bool:
        if self.config.fuse_allreduce_rms and (self._at_all_reduce(norm) or self._second(norm)):
            return True
        return every_norm and self._alone(norm)

    # Norms after an all-reduce

    def _at_all_reduce(self, norm: Norm) -> bool:
        site = self._site_of(norm)
        if site is None:
            return False
        path = site.path
        name = self.context.origin.get(path.all_reduce.name, path.all_reduce.name)
        if name in self.context.excluded or name in self.taken:
            return False
        refusal = norm.refusal or path.refusal(self.config.allow_reassociation, site.residual)
        refusal = refusal or first_refusal(site_refusals(site, self.regions, self.order))
        if refusal:
            self.context.refuse(name, MATCH, refusal)
            return False
        self.taken.add(name)
        self.context.spelling[name] = norm.spelling
        self.context.refused.pop(name, None)  # a norm on a longer path may have been refused before
        moved = moved_texts(path)
        if moved:
            self.context.moved.setdefault(name, []).extend(moved)
        self.context.assumed.update(path.assumptions)
        summed = self._moved_all_reduce(site)
        self.context.origin[summed.all_input_nodes[0].name] = name
        self._replace_site(site, summed)
        return True

    def _site_of(self, norm: Norm) -> Site | None:
        """Return the site of a norm and the all-reduce that it can be fused with, or None."""
        found: list[Site] = []
        operands = norm.addends
        if operands is not None:
            for addend, residual in (operands, operands[::-1]):
                path = self.paths.find(addend)
                whole = same_shape(residual, norm.source) or not is_one_element(residual)
                if path is not None and isinstance(residual, Node) and whole:
                    found.append(Site(norm, path, residual))
        if norm.residual is None and not any(same_shape(site.residual, norm.source) for site in found):
            direct = self.paths.find(norm.source)  # the addend may be a bias
            if direct is not None or not found:
                return None if direct is None else Site(norm, direct, None)
        if not found:
            return None
        # Of two all-reduces, one that only this sum reads is fused, then the nearer one, then the
        # later one (so that they keep their order). The other becomes the residual.
        return min(
            found,
            key=lambda site: (
                site.path.other_readers,
                len(site.path.steps),
                -self.order.get(site.path.all_reduce.node, 0),
            ),
        )

    # Rewriting

    def _moved_all_reduce(self, site: Site) -> Node:
        """Return the finished sum with views and scales moved before the all-reduce."""
        old = site.path.all_reduce
        if site.stays:
            return old.value
        with self.graph.inserting_before(old.node):
            x = site.path.moved_input(self._call)
            reduced = self._call(ALL_REDUCE, (x, old.reduction, old.group), {}, old.node)
            return self._call(WAIT, (reduced,), {}, old.value)

    def _residual(self, site: Site, summed: Node) -> Any:
        """Return the residual with the path's addends in the order of the source, or None."""
        path, residual = site.path, site.residual
        for step in path.of_kind(ADDEND):
            addend = path.moved_addend(step, self._call)
            if residual is not None:
                residual = self._call(aten.add.Tensor, (residual, addend), {}, step.node)
            elif same_shape(addend, summed):
                residual = addend
            else:
                # Expanded like the all-reduce's input, since the sum must have no other reader.
                like = summed.args[0].args[0]  # type: ignore[union-attr]
                residual = self._call(aten.expand_as.default, (addend, like), {}, step.node)
        return residual

    def _replace_site(self, site: Site, summed: Node) -> None:
        """Replace the norm, and the value that was normalised, by the IR operator's results."""
        old = site.path.all_reduce
        norm = self._with_scaled_weight(site.norm, summed)
        with self.graph.inserting_before(norm.out):
            residual = self._residual(site, summed)
            if residual is None:
                new, sum_out = self._call(rms_norm.torch_op, (summed, *_options(norm)), {}, norm.out), summed
                self.first_norms.add(new)
            else:
                _, new, sum_out = self._fused_add(summed, residual, norm)
        self._replace(norm.out, new)
        if site.scatters:
            self._gather_once(new)
        self._replace_sum(norm, sum_out)
        if site.is_viewed:
            self._view_back(old, summed)
        if residual is not None and not sum_out.users:
            self.graph.erase_node(sum_out)
        if summed is not old.value:
            self._drop(old)

    def _with_scaled_weight(self, norm: Norm, summed: Node) -> Norm:
        """Return a norm whose weight has its weight_scale in it, for `summed`."""
        if norm.weight_scale == 1:
            return norm
        given = norm.weight
        early = given is None or given.op != "call_function"  # then the collective need not move
        with self.graph.inserting_before(summed.all_input_nodes[0] if early else norm.out):
            if given is not None:
                weight = self._call(aten.mul.Tensor, (given, norm.weight_scale), {}, norm.out)
            else:
                weight = constant_vector(last_size(summed), norm.weight_scale, summed)
        return dataclasses.replace(norm, weight=weight, weight_scale=1.0)

    def _fused_add(self, summed: Node, residual: Any, norm: Norm) -> tuple[Node, Node, Node]:
        """Return a new fused_add_rms_norm call and its two results: the norm and the sum."""
        call = self._call(fused_add_rms_norm.torch_op, (summed, residual, *_options(norm)), {}, norm.out)
        items = getitem(self.graph, call, 0), getitem(self.graph, call, 1)
        self.order.update(dict.fromkeys(items, self.order[call]))
        return call, *items

    def _replace_norm(self, norm: Norm, new: Node, sum_out: Node) -> None:
        """Replace a norm and the sum that it normalises by the results of one operator."""
        self._replace(norm.out, new)
        self._replace_sum(norm, sum_out)
        if not sum_out.users:
            self.graph.erase_node(sum_out)

    def _replace_sum(self, norm: Norm, sum_out: Node) -> None:
        for summed in (norm.source,) if norm.residual is None else norm.sums:
            self._replace(summed, sum_out)

    def _view_back(self, site: AllReduce, summed: Node) -> None:
        """Give the other readers of an all-reduce the old shape, if a view moved before it."""
        if not site.value.users:
            return
        with self.graph.inserting_before(summed.next):
            sizes = [
                size if isinstance(size, int) else self._call(aten.sym_size.int, (site.x, dim), {}, site.value)
                for dim, size in enumerate(site.x.meta["val"].shape)
            ]
            viewed = self._call(aten.view.default, (summed, sizes), {}, site.value)
        site.value.replace_all_uses_with(viewed)

    def _gather_once(self, norm: Node) -> None:
        """Merge equal all-gathers of one norm (one for each projection) into one."""
        first, *others = norm.users
        (value,) = first.users
        for gather in others:
            (wait,) = gather.users
            wait.replace_all_uses_with(value)
            self.graph.erase_node(wait)
            self.graph.erase_node(gather)

    # The second norm of sandwich norms

    def _second(self, norm: Norm) -> bool:
        """Canonicalize a norm of `residual + first norm`, which may become an epilogue."""
        name = norm.out.name
        known = name in self.context.unfused_second_norms or name in self.context.second_norms.values()
        if known or not self.config.fuse_sandwich_norms:
            return False
        operands = self._second_operands(norm)
        if operands is None or not self._is_plain(norm):
            return False
        first, residual = operands
        if self.regions.get(norm.out) != self.regions.get(first):
            return False
        if any(depends_on(value, first, self.order) for value in (residual, norm.weight, norm.weight_bias)):
            return False
        with self.graph.inserting_before(norm.out):
            call, new, sum_out = self._fused_add(first, residual, norm)
        self.context.second_norms[call.name] = name
        self._replace_norm(norm, new, sum_out)
        return True

    def _second_operands(self, norm: Norm) -> tuple[Node, Any] | None:
        """Return the first norm and the residual whose sum is normalised, or None."""
        operands = norm.addends
        for first, residual in (operands, operands[::-1]) if operands is not None else ():
            if first in self.first_norms and len(first.users) == 1 and same_shape(first, residual):
                return (first, residual) if dtype_of(residual) == dtype_of(first) else None
        return None

    def _is_plain(self, norm: Norm) -> bool:
        """Return whether an IR operator computes exactly what a norm does."""
        dtype = dtype_of(norm.out)
        return (
            not norm.refusal
            and norm.weight_scale == 1
            and dtype is not None
            and dtype == dtype_of(norm.source)
            and isinstance(norm.eps, float)
            and norm.eps >= 0
            and is_row_major(norm.out)
            and not spans_write(norm, self.regions)
        )

    # Norms without an all-reduce

    def _alone(self, norm: Norm) -> bool:
        if norm.out.op != "call_function" or norm.spelling.startswith("fusewire::"):
            return False
        if not self._is_plain(norm) or (norm.residual is not None and not same_shape(norm.residual, norm.source)):
            return False
        with self.graph.inserting_before(norm.out):
            if norm.residual is None:
                new = self._call(rms_norm.torch_op, (norm.source, *_options(norm)), {}, norm.out)
                self._replace(norm.out, new)
            else:
                _, new, sum_out = self._fused_add(norm.source, norm.residual, norm)
                self._replace_norm(norm, new, sum_out)
        return True

    # The graph

    def _call(self, target: Any, args: tuple[Any, ...], kwargs: Any, origin: Node) -> Node:
        node = new_call(self.graph, target, args, kwargs, origin)
        self.regions[node] = self.regions.get(origin, 0)
        self.order[node] = self.order.get(origin, 0)
        return node

    def _replace(self, old: Node, new: Node) -> None:
        if old is new:
            return
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        erase_unused(old)

    def _drop(self, site: AllReduce) -> None:
        """Erase an all-reduce that was moved, which erase_unused keeps since waits are impure."""
        for node in (site.value, site.node):
            if not node._erased and not node.users:
                inputs = list(node.all_input_nodes)
                self.graph.erase_node(node)
                for source in inputs:
                    if source.target is not ALL_REDUCE:
                        erase_unused(source)


def _options(norm: Norm) -> tuple[Any, ...]:
    return norm.weight, norm.eps, norm.weight_bias, norm.form
