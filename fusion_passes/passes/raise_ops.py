"""Raise: rewrite every spelling of an all-reduce and of the norm after it into a few operators.

    all_reduce, [view, scale, bias,] [add,] norm's arithmetic
 -> wait_tensor(all_reduce(x)) -> fusewire::rms_norm or fusewire::fused_add_rms_norm

Only norms that an all-reduce reaches are raised (all of them where a provider other than native computes norms), and a
second norm, after the residual add that follows the first (sandwich norms). The walk goes back from each norm to its
all-reduce, so it knows why a site fails, and says so. The reduce-scatter of sequence parallelism is one more kind of site.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, Node

from fusewire.custom_ops.ops.norms import fused_add_rms_norm, rms_norm
from fusewire.custom_ops.ops.registry import NATIVE, get_op, parse_policy
from fusewire.fusion_passes.analysis.graph import (
    aten,
    depends_on,
    dtype_of,
    erase_unused,
    getitem,
    is_row_major,
    is_vector,
    last_size,
    mutation_regions,
    new_call,
    plain_add,
    same_shape,
    sort_topologically,
    value_of,
)
from fusewire.fusion_passes.analysis.norm_reader import Norm, norm_roots, norms_at
from fusewire.fusion_passes.analysis.paths import ADDEND, SCALE, VIEW, Path, PathFinder
from fusewire.fusion_passes.config import PassConfig
from fusewire.fusion_passes.context import MATCH, RunContext
from fusewire.fusion_passes.passes.coalesced import drop_taken_tensors
from fusewire.fusion_passes.spmd.fingerprint import scale_text
from fusewire.patterns.collectives import (
    ALL_GATHER,
    ALL_REDUCE,
    REDUCE_SCATTER,
    WAIT,
    AllReduce,
    read_all_reduce,
)


def raise_ops(graph: Graph, context: RunContext) -> bool:
    """Raise the all-reduces and norms of a graph in place; says whether anything changed."""
    return _Raiser(graph, context).run()


def computes_norms_itself(config: PassConfig) -> bool:
    """Whether some provider other than native comes first for norms, so that every norm is worth raising."""
    return any(
        parse_policy(get_op(name), config.policy(name))[0] != NATIVE for name in ("rms_norm", "fused_add_rms_norm")
    )


class _Raiser:
    def __init__(self, graph: Graph, context: RunContext) -> None:
        self.graph = graph
        self.context = context
        self.config = context.config
        self.regions = mutation_regions(graph)
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        found = [read_all_reduce(node) for node in graph.nodes if node.op == "call_function"]
        self.all_reduces = [site for site in found if site is not None]
        usable = {
            site.value: site.node
            for site in self.all_reduces
            if (site.value is not site.node or not site.spelling.waits)
            and not site.spelling.in_place
            and (self.config.fuse_sequence_parallel or not site.spelling.scatters)
        }
        self.paths = PathFinder(usable, self.config)
        self.taken: set[str] = set()
        self.inner: set[Node] = set()  # raised norms that are followed by a residual add, perhaps

    def run(self) -> bool:
        changed = False
        every_norm = computes_norms_itself(self.config)
        if not self.all_reduces and not every_norm:
            return False
        for root in norm_roots(self.graph):
            # Raising a norm replaces nodes that the next norm was read from, so each is read when its turn comes.
            while any(self._raise(norm, every_norm) for norm in norms_at(root, self.config.allow_reassociation)):
                changed = True
        if changed:
            drop_taken_tensors(self.graph, self.context)
            sort_topologically(self.graph)
        return changed

    def _raise(self, norm: Norm, every_norm: bool) -> bool:
        if self.config.fuse_allreduce_rms and (self._raise_at_all_reduce(norm) or self._raise_second(norm)):
            return True
        return every_norm and not norm.problem and self._raise_alone(norm)

    # Norms after an all-reduce

    def _raise_at_all_reduce(self, norm: Norm) -> bool:
        site = self._site_of(norm)
        if site is None:
            return False
        path, residual = site
        name = self.context.origin.get(path.all_reduce.name, path.all_reduce.name)
        if name in self.context.excluded or name in self.taken:
            return False
        problem = norm.problem or path.problem(self.config.allow_reassociation) or self._obstacle(norm, path, residual)
        if problem:
            self.context.refuse(name, MATCH, problem)
            return False
        self.taken.add(name)
        self.context.spelling[name] = norm.spelling
        self.context.refused.pop(name, None)  # another norm may have been tried before, by a longer way
        scales = [scale_text(step.value) for step in path.of_kind(SCALE)]
        if scales:
            self.context.moved.setdefault(name, []).extend(scales)
        self.context.assumed.update(path.assumptions)
        summed = self._cleared(norm, path)
        self.context.origin[summed.all_input_nodes[0].name] = name
        self._place(norm, path, summed, residual)
        return True

    def _site_of(self, norm: Norm) -> tuple[Path, Any] | None:
        """The way to an all-reduce from what is normalised, and the residual that is added on it (or None)."""
        if norm.residual is not None:
            path = self.paths.find(norm.source)
            return None if path is None else (path, norm.residual)
        found: list[tuple[Path, Any]] = []
        operands = plain_add(norm.source)
        if operands is not None:
            for addend, residual in (operands, operands[::-1]):
                path = self.paths.find(addend)
                if path is not None and isinstance(residual, Node):
                    found.append((path, residual))
        if not any(same_shape(residual, norm.source) for _, residual in found):
            direct = self.paths.find(norm.source)  # what is added may be a bias
            if direct is not None or not found:
                return None if direct is None else (direct, None)
        # Of two all-reduces, the nearer one that only this sum reads is fused (the later one, so that they keep their
        # order); the other becomes the residual.
        return min(
            found,
            key=lambda item: (item[0].other_readers, len(item[0].steps), -self.order.get(item[0].all_reduce.node, 0)),
        )

    def _obstacle(self, norm: Norm, path: Path, residual: Any) -> str:
        """Why the nodes between cannot be rewritten, or ""."""
        if self.regions.get(norm.out) != self.regions.get(path.all_reduce.node) or self._spans_write(norm):
            return "an operation that writes in place stands between the all-reduce and the norm"
        # Without a residual the fused operator returns the value that is normalised, so its last node may be shared.
        # An all-reduce that stays where it is is left to the check of the fusion.
        inner = [path.all_reduce.value, *(step.node for step in path.steps)]
        if residual is None:
            inner.remove(path.end)
        if (not path.steps and self._stays(path)) or self._views_only(path, residual):
            inner = []
        if path.all_reduce.spelling.scatters and (problem := self._scattered_problem(norm, path, residual)):
            return problem
        shared = next((node for node in inner if len(node.users) > 1), None)
        if shared is not None:
            return (
                f"{shared.name}, between the all-reduce and the norm, is also read elsewhere, and the fused operator "
                "does not return it"
            )
        adds = residual is not None or bool(path.of_kind(ADDEND))
        for what in ("weight", "eps", "weight_bias") if adds else ():
            if depends_on(getattr(norm, what), path.all_reduce.node, self.order):
                return f"the norm's {what} is computed from the all-reduce's own result"
        added = () if self._stays(path) else (residual, *(step.value for step in path.of_kind(ADDEND)))
        if any(depends_on(value, path.all_reduce.node, self.order) for value in added):
            return "what is added to the all-reduce's result is computed from that result"
        if not (is_row_major(norm.out) and is_row_major(norm.source)):
            return "the value that is normalised is not contiguous, as the fused operator's results are"
        if residual is not None and not same_shape(path.end, norm.source):
            return "the all-reduce's result is broadcast when the residual is added"
        if path.of_kind(ADDEND) and residual is not None and not same_shape(residual, path.end):
            return "a bias stands before the add, and the residual has another shape"
        return ""

    def _views_only(self, path: Path, residual: Any) -> bool:
        """Whether all that stands between is views of the sum, which the fused operator returns."""
        only = all(step.kind == VIEW for step in path.steps) and not path.all_reduce.spelling.scatters
        return residual is None and bool(path.steps) and only

    def _scattered_problem(self, norm: Norm, path: Path, residual: Any) -> str:
        """Why a norm of this rank's rows cannot become one operator with the reduce-scatter before it, or ""."""
        if path.of_kind(VIEW, SCALE):
            return "a view or a scale stands between the reduce-scatter and the norm"
        if path.of_kind(ADDEND) and residual is None:
            return "a bias stands between the reduce-scatter and the norm, and no residual that could take it up"
        if not norm.out.users or any(user.target is not ALL_GATHER for user in norm.out.users):
            return "the norm of this rank's rows is read by something else than an all-gather"
        if len({user.args[1:] for user in norm.out.users}) > 1 or any(
            [reader.target for reader in user.users] != [WAIT] for user in norm.out.users
        ):
            return "the all-gathers after the norm differ, or are not waited for once each"
        return ""

    def _spans_write(self, norm: Norm) -> bool:
        """Whether something is written in place between two of the nodes that the norm consists of."""
        region, pending = self.regions.get(norm.out, 0), [norm.out]
        while pending and self.regions.get(norm.out, 0) > 0:
            node = pending.pop()
            if node.op == "call_function" and node not in (norm.source, norm.weight, norm.residual):
                if self.regions.get(node, region) != region:
                    return True
                pending.extend(node.all_input_nodes)
        return False

    def _stays(self, path: Path) -> bool:
        """Whether the all-reduce is in its one form already and nothing has to move before it."""
        return not path.of_kind(VIEW, SCALE) and path.all_reduce.node.target in (ALL_REDUCE, REDUCE_SCATTER)

    def _cleared(self, norm: Norm, path: Path) -> Node:
        """The all-reduce's value with views and scales moved before it; the all-reduce itself if there are none."""
        site = path.all_reduce
        if self._stays(path):
            return site.value
        with self.graph.inserting_before(site.node):
            x = site.x
            for step in path.of_kind(VIEW, SCALE):
                if step.kind == VIEW:
                    x = self._call(step.node.target, (x, *step.node.args[1:]), step.node.kwargs, step.node)
                else:
                    x = self._call(aten.mul.Tensor, (x, step.value), {}, step.node)
            reduced = self._call(ALL_REDUCE, (x, site.reduction, site.group), {}, site.node)
            return self._call(WAIT, (reduced,), {}, site.value)

    def _residual(self, path: Path, residual: Any, summed: Node) -> Any:
        """The residual with every addend on the way, in the order in which they were added."""
        for step in path.of_kind(ADDEND):
            addend = step.value
            if not is_vector(addend, last_size(summed)) or same_shape(addend, step.node):
                for view in path.views_after(step):
                    addend = self._call(view.target, (addend, *view.args[1:]), view.kwargs, view)
            if residual is not None:
                residual = self._call(aten.add.Tensor, (residual, addend), {}, step.node)
            elif same_shape(addend, summed):
                residual = addend
            else:
                # In the shape of what is reduced: to read the sum itself would be one more reader of it.
                like = summed.args[0].args[0]  # type: ignore[union-attr]
                residual = self._call(aten.expand_as.default, (addend, like), {}, step.node)
        return residual

    def _place(self, norm: Norm, path: Path, summed: Node, residual: Any) -> None:
        """Put the IR operator in the norm's place, and its sum in the place of the value that was normalised."""
        with self.graph.inserting_before(norm.out):
            residual = self._residual(path, residual, summed)
            options = (norm.weight, norm.eps, norm.weight_bias, norm.form)
            if residual is None:
                new = self._call(rms_norm.torch_op, (summed, *options), {}, norm.out)
                sum_out = summed
                self.inner.add(new)
            else:
                both = self._call(fused_add_rms_norm.torch_op, (summed, residual, *options), {}, norm.out)
                new, sum_out = getitem(self.graph, both, 0), getitem(self.graph, both, 1)
                self.order.update(dict.fromkeys((new, sum_out), self.order[both]))
        self._replace(norm.out, new)
        if path.all_reduce.spelling.scatters:
            self._gather_once(new)
        if norm.residual is None:
            self._replace(norm.source, sum_out)
        elif norm.sum_out is not None:
            self._replace(norm.sum_out, sum_out)
        if self._views_only(path, residual):
            self._view_back(path.all_reduce, summed)
        if residual is not None and not sum_out.users:
            self.graph.erase_node(sum_out)
        if summed is not path.all_reduce.value:
            self._drop(path.all_reduce)

    def _view_back(self, site: AllReduce, summed: Node) -> None:
        """Let what else reads an all-reduce that was moved behind a view read a view of the moved one."""
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
        """Let equal all-gathers of one norm (each projection's own) be one."""
        first, *others = norm.users
        (value,) = first.users
        for gather in others:
            (wait,) = gather.users
            wait.replace_all_uses_with(value)
            self.graph.erase_node(wait)
            self.graph.erase_node(gather)

    # The second norm of sandwich norms

    def _raise_second(self, norm: Norm) -> bool:
        """Raise the norm of `residual + norm of an all-reduce`; it may become an epilogue of the fused operator."""
        operands = plain_add(norm.source) if norm.residual is None else (norm.source, norm.residual)
        name = norm.out.name
        if not self.config.fuse_sandwich_norms or operands is None or name in self.context.plain:
            return False
        if name in self.context.seconds.values():
            return False  # raised already
        for inner, residual in (operands, operands[::-1]):
            if inner in self.inner and len(inner.users) == 1 and same_shape(inner, residual):
                if dtype_of(residual) != dtype_of(inner) or depends_on(residual, inner, self.order):
                    return False
                break
        else:
            return False
        if self._unfit_to_raise(norm) or self.regions.get(norm.out) != self.regions.get(inner):
            return False
        if any(depends_on(value, inner, self.order) for value in (norm.weight, norm.weight_bias)):
            return False
        with self.graph.inserting_before(norm.out):
            options = (norm.weight, norm.eps, norm.weight_bias, norm.form)
            both = self._call(fused_add_rms_norm.torch_op, (inner, residual, *options), {}, norm.out)
            new, sum_out = getitem(self.graph, both, 0), getitem(self.graph, both, 1)
            self.order.update(dict.fromkeys((new, sum_out), self.order[both]))
        self.context.seconds[both.name] = name
        self._replace(norm.out, new)
        summed = norm.source if norm.residual is None else norm.sum_out
        if summed is not None:
            self._replace(summed, sum_out)
        if not sum_out.users:
            self.graph.erase_node(sum_out)
        return True

    def _unfit_to_raise(self, norm: Norm) -> bool:
        """Whether a norm cannot become an IR operator that stands for exactly what it was."""
        value, source = value_of(norm.out), value_of(norm.source)
        return bool(
            norm.problem
            or value is None
            or source is None
            or value.dtype != source.dtype
            or not isinstance(norm.eps, float)
            or norm.eps < 0
            or not is_row_major(norm.out)
            or self._spans_write(norm)
        )

    # Norms on their own

    def _raise_alone(self, norm: Norm) -> bool:
        if norm.out.op != "call_function" or norm.spelling.startswith("fusewire::"):
            return False
        if norm.residual is not None or self._unfit_to_raise(norm):
            return False
        with self.graph.inserting_before(norm.out):
            new = self._call(
                rms_norm.torch_op,
                (norm.source, norm.weight, norm.eps, norm.weight_bias, norm.form),
                {},
                norm.out,
            )
        self._replace(norm.out, new)
        return True

    # Graph surgery

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
        """Erase an all-reduce that was moved; erase_unused leaves it alone, since waits have side effects."""
        for node in (site.value, site.node):
            if not node._erased and not node.users:
                inputs = list(node.all_input_nodes)
                self.graph.erase_node(node)
                for source in inputs:
                    if source.target is not ALL_REDUCE:
                        erase_unused(source)
