"""Fuse: all-reduce + norm and all-reduce + add + norm become `fusewire::all_reduce_rms_norm`."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from fusewire.custom_ops.ops.all_reduce_norm import resolve_group
from fusewire.custom_ops.ops.registry import YES, Support
from fusewire.errors import ProcessGroupError
from fusewire.fusion_passes.analysis.graph import (
    copy_origin,
    depends_on,
    dtype_of,
    is_number,
    is_vector,
    last_size,
    same_shape,
    sort_topologically,
    value_of,
)
from fusewire.fusion_passes.compiler.inductor import FusionMatcher, fresh_fake
from fusewire.fusion_passes.context import MATCH, SUPPORTED, Fused, RunContext
from fusewire.patterns.collectives import ALL_REDUCE, SUM, WAIT
from fusewire.patterns.fusions import FUSIONS, Fusion

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
Captures = dict[str, Any]


def fuse_all_reduce(graph: Graph, context: RunContext) -> bool:
    """Fuse every raised site that the checks let through; says whether anything changed."""
    if not context.config.fuse_allreduce_rms:
        return False
    run = _Fuser(graph, context)
    matcher = FusionMatcher("fusewire_all_reduce_rms_norm")
    for fusion in FUSIONS:
        matcher.add(fusion, functools.partial(run.check, fusion), functools.partial(run.rewrite, fusion))
    count = matcher.apply(graph)
    if count:
        sort_topologically(graph)
    refuse_undecided(graph, context, ALL_REDUCE)
    return count > 0


# The clauses of the extra check, in the order in which they are asked. Each gets the captures and says no with a reason.


def check_reduction(captures: Captures) -> Support:
    reduction = captures["reduction"]
    return Support.all_of(
        (
            isinstance(reduction, str) and reduction.lower() == SUM,
            f"the all-reduce computes {reduction!r}; the fused operator computes the sum only",
        )
    )


def check_group(captures: Captures) -> Support:
    group = captures["group"]
    if not isinstance(group, str):
        return Support.no(_unnamed_group())
    try:
        world_size = resolve_group(group).size()
    except ProcessGroupError as error:
        return Support.no(str(error))
    return Support.all_of(
        (world_size > 1, "the process group has one rank (world size 1), so there is nothing to communicate")
    )


def _unnamed_group() -> str:
    problem = "the process group is a value of the graph and not a name known at compile time"
    # torch 2.13 has the module, and has imported it where the setting took effect.
    if not getattr(getattr(torch.distributed, "config", None), "compile_on_one_rank", False):
        return problem
    return (
        f"{problem}, because torch.distributed.config.compile_on_one_rank is on; to fuse, switch it off (set it to False, "
        "and leave TORCH_DISTRIBUTED_COMPILE_ON_ONE_RANK unset), so that every rank compiles for itself"
    )


def check_epsilon(captures: Captures) -> Support:
    eps = captures["eps"]
    if is_number(eps):
        return Support.all_of((eps >= 0, f"epsilon is {eps}; the operators take zero or a positive number"))
    return Support.no(
        f"epsilon is not a number but a value of the graph ({eps}), because dynamic=True made it an input; compile with "
        "backend='fusewire' or torch._dynamo.config.specialize_float=True, which keep it a number"
    )


def check_weight_bias(captures: Captures) -> Support:
    return Support.all_of(
        (is_number(captures["weight_bias"]), "the number added to the weight is a value of the graph, not a number")
    )


def check_input(captures: Captures) -> Support:
    value = value_of(captures["x"])
    if value is None or value.dim() == 0:
        return Support.no("the all-reduce's input is not a tensor of shape (..., hidden)")
    return Support.all_of(
        (value.dtype in _DTYPES, f"the all-reduce is in {value.dtype}; the norm needs a floating-point input"),
    )


def check_weight(captures: Captures) -> Support:
    weight, x = captures["weight"], captures["x"]
    if weight is None:
        return YES
    return Support.all_of(
        (
            is_vector(weight, last_size(x)),
            f"the norm's weight has shape {_shape(weight)}; it must be [{last_size(x)}], the hidden size",
        ),
        (
            dtype_of(weight) == dtype_of(x),
            f"the norm's weight is {dtype_of(weight)} and its input {dtype_of(x)}; fused kernels read the weight in the "
            f"input's dtype, so store the weight in {dtype_of(x)}",
        ),
    )


def check_residual(captures: Captures) -> Support:
    residual, x = captures.get("residual"), captures["x"]
    if residual is None:
        return YES
    return Support.all_of(
        (
            same_shape(residual, x),
            f"the residual has shape {_shape(residual)} and the all-reduce {_shape(x)}; they must be equal",
        ),
        (
            dtype_of(residual) == dtype_of(x),
            f"the residual is {dtype_of(residual)} and the all-reduce {dtype_of(x)}; keep the residual stream in "
            f"{dtype_of(x)}",
        ),
    )


CLAUSES = (
    check_reduction,
    check_group,
    check_epsilon,
    check_weight_bias,
    check_input,
    check_weight,
    check_residual,
)


def _shape(node: Any) -> str:
    value = value_of(node)
    return "unknown" if value is None else str(list(value.shape))


class _Fuser:
    def __init__(self, graph: Graph, context: RunContext) -> None:
        self.graph = graph
        self.context = context
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.collectives: dict[str, list[Node]] = {}  # of each group, in the graph's order

    def check(self, fusion: Fusion, captures: Captures, root: Node, nodes: Sequence[Node]) -> Support:
        """The extra check; a refusal is recorded with its reason and leaves the graph alone."""
        reduce = node_of(nodes, ALL_REDUCE)
        name = self.context.origin.get(reduce.name, reduce.name)
        if name in self.context.excluded:
            return Support.no(self.context.excluded[name].reason)
        support = YES
        for clause in CLAUSES:
            support = support and clause(captures)
        support = (
            support
            and self._check_readers(fusion, reduce, node_of(nodes, WAIT), root)
            and self._check_order(captures, reduce)
        )
        if not support:
            self.context.refuse(name, SUPPORTED, support.reason)
        return support

    def _check_readers(self, fusion: Fusion, reduce: Node, wait: Node, root: Node) -> Support:
        others = [user.name for user in wait.users if user is not root]
        return Support.all_of(
            (
                len(reduce.users) == 1,
                "the all-reduce is read before it is waited for, elsewhere in the graph",
            ),
            (
                not (fusion.returns_sum and others),
                "the all-reduce's result, before the residual is added, is also read elsewhere "
                f"({', '.join(others)}), and the fused operator does not return it",
            ),
        )

    def _check_order(self, captures: Captures, reduce: Node) -> Support:
        for name in ("weight", "residual"):
            if depends_on(captures.get(name), reduce, self.order):
                return Support.no(f"the norm's {name} is computed from the all-reduce's own result")
        collectives = self._collectives(captures["group"])
        following = collectives[collectives.index(reduce) + 1 :][:1]
        if following and following[0] < self._last_input(captures, reduce):
            return Support.no(
                f"another collective of the same group ({following[0].name}) comes before what the norm needs, and the "
                "two would change places"
            )
        return YES

    def _collectives(self, group: str) -> list[Node]:
        if group not in self.collectives:
            calls = (node for node in self.graph.nodes if node.op == "call_function")
            self.collectives[group] = [node for node in calls if group in (*node.args, *node.kwargs.values())]
        return self.collectives[group]

    def _last_input(self, captures: Captures, reduce: Node) -> Node:
        """Where the fused call can stand at the earliest, so that collectives keep their order."""
        return max(node for node in (reduce, captures["weight"], captures.get("residual")) if isinstance(node, Node))

    def rewrite(self, fusion: Fusion, captures: Captures, root: Node, nodes: Sequence[Node]) -> None:
        """Put the fused call in the root's place, as early as its inputs allow."""
        reduce, wait = node_of(nodes, ALL_REDUCE), node_of(nodes, WAIT)
        name = self.context.origin.get(reduce.name, reduce.name)
        arguments = tuple(None if key is None else captures[key] for key in fusion.arguments)
        with self.graph.inserting_before(self._last_input(captures, reduce).next):
            fused = self.graph.call_function(fusion.replacement, arguments)
            copy_origin(reduce, fused)
            fused.meta["fusewire_all_reduce"] = name
            collectives = self._collectives(captures["group"])
            collectives[collectives.index(reduce)] = fused
            x = captures["x"].meta["val"]
            fused.meta["val"] = fresh_fake(x, contiguous=True), fresh_fake(x, contiguous=True)
            if fusion.returns_sum:
                root.replace_all_uses_with(fused)
            else:
                norm, summed = (self.graph.call_function(operator.getitem, (fused, i)) for i in (0, 1))
                norm.meta["val"], summed.meta["val"] = fused.meta["val"]
                root.replace_all_uses_with(norm)
                wait.replace_all_uses_with(summed, delete_user_cb=lambda user: user is not root)
        for node in (root, *(() if fusion.returns_sum else (summed,)), wait, reduce):
            if not node.users:
                self.graph.erase_node(node)
        spelling = self.context.spelling.get(name, "")
        self.context.fused[name] = Fused(fusion.name, spelling)


def node_of(nodes: Sequence[Node], target: Any) -> Node:
    """The node of a match that calls this."""
    return next(node for node in nodes if node.target is target)


def refuse_undecided(graph: Graph, context: RunContext, target: Any) -> None:
    """Record the sites that were raised and never reached the check: the matcher itself discards such matches."""
    for node in graph.find_nodes(op="call_function", target=target):
        name = context.origin.get(node.name)
        if name in context.spelling and name not in context.refused:
            assert name is not None
            context.refuse(
                name,
                MATCH,
                "the matcher discards it: the nodes stand on different streams or beyond an in-place write",
            )
