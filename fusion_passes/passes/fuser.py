"""Define the base class of the fusing passes, and the checks of a pattern's captures.

A fusing pass finds its patterns (fusewire.patterns.fusions) by Inductor's matcher. Each match is
checked. If a check refuses, the graph stays as it is and the refusal is recorded; else one call of
the fused operator replaces the match.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

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
from fusewire.fusion_passes.analysis.scales import may_be_float
from fusewire.fusion_passes.compiler.inductor import FusionMatcher, fresh_fake
from fusewire.fusion_passes.context import MATCH, SUPPORTED, Fused, RunContext
from fusewire.patterns.collectives import SUM
from fusewire.patterns.fusions import Fusion

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
Captures = dict[str, Any]


@dataclass(frozen=True)
class Match:
    """One match of a pattern: the captures by name, the pattern's root and all nodes in it."""

    fusion: Fusion
    captures: Captures
    root: Node
    nodes: Sequence[Node]

    def node_of(self, *targets: Any) -> Node:
        """Return the first node that calls one of these."""
        return next(node for node in self.nodes if node.target in targets)


class Fuser:
    """The base class of the fusing passes. An instance serves one run over one graph.

    Attributes:
        fusions: the patterns.
        collective: the operator that every match calls once; its node stands for the match.
        what: the collective's name in refusals.
        clauses: the checks of the captures, in order.
        order: the position of each node that was there when the pass began.
        unsorted: whether a rewrite may have put a node before what it uses.
    """

    fusions: ClassVar[tuple[Fusion, ...]]
    collective: ClassVar[Any]
    what: ClassVar[str] = "all-reduce"
    clauses: ClassVar[tuple[Callable[[Captures], Support], ...]]

    def __init__(self, graph: Graph, context: RunContext) -> None:
        self.graph = graph
        self.context = context
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.unsorted = False

    def check_graph(self, match: Match) -> Support:
        """Check the graph around a match whose captures are right."""
        raise NotImplementedError

    def rewrite(self, match: Match) -> None:
        """Replace a match by one call of its fused operator."""
        raise NotImplementedError

    @classmethod
    def run(cls, graph: Graph, context: RunContext) -> bool:
        """Fuse every match that the checks let through; return whether there was one."""
        if not graph.find_nodes(op="call_function", target=cls.collective, sort=False):
            return False
        fuser = cls(graph, context)
        matcher = FusionMatcher(f"fusewire_{cls.__name__}")
        for fusion in cls.fusions:
            matcher.add(fusion, functools.partial(fuser._check, fusion), functools.partial(fuser._rewrite, fusion))
        count = matcher.apply(graph)
        if fuser.unsorted:
            sort_topologically(graph)
        fuser._refuse_undecided()
        return count > 0

    def _check(self, fusion: Fusion, captures: Captures, root: Node, nodes: Sequence[Node]) -> Support:
        match = Match(fusion, captures, root, nodes)
        name = self.name_of(match)
        if name in self.context.excluded:
            return Support.no(self.context.excluded[name].reason)
        support = YES
        for clause in self.clauses:
            support = support and clause(captures)
        support = support and self.check_graph(match)
        if not support:
            self.record_refusal(name, support.reason)
        return support

    def _rewrite(self, fusion: Fusion, captures: Captures, root: Node, nodes: Sequence[Node]) -> None:
        self.rewrite(Match(fusion, captures, root, nodes))

    def name_of(self, match: Match) -> str:
        """Return the name of a match's collective in the graph as it arrived."""
        node = match.node_of(self.collective)
        return self.context.origin.get(node.name, node.name)

    def _refuse_undecided(self) -> None:
        """Record a refusal for matches that the matcher discarded before any check."""
        for node in self.graph.find_nodes(op="call_function", target=self.collective):
            name = self.context.origin.get(node.name, "")
            if name in self.context.spelling and name not in self.context.refused:
                why = "the matcher discards it: the nodes stand on different streams or beyond an in-place write"
                self.context.refuse(name, MATCH, why)

    def record_refusal(self, name: str, refusal: str) -> None:
        """Record for the report why a match is not fused."""
        self.context.refuse(name, SUPPORTED, refusal)

    # The graph around a match

    def check_readers(self, match: Match, wait: Node, reader: Node) -> Support:
        """Check that only `reader` reads the finished sum, unless the fused operator returns it."""
        others = [user.name for user in wait.users if user is not reader]
        return Support.all_of(
            (
                len(match.node_of(self.collective).users) == 1,
                f"the {self.what} is read before it is waited for, elsewhere in the graph",
            ),
            (
                not (match.fusion.returns_sum and others),
                f"the {self.what}'s result, before the residual is added, is also read elsewhere "
                f"({', '.join(others)}), and the fused operator does not return it",
            ),
        )

    def check_order(self, match: Match, last: Node) -> Support:
        """Check that the collective can move to `last` without passing another of its group."""
        node = match.node_of(self.collective)
        for name in ("weight", "residual"):
            if depends_on(match.captures.get(name), node, self.order):
                return Support.no(f"the norm's {name} is computed from the {self.what}'s own result")
        group, following = match.captures["group"], node
        while following is not last:
            following = following.next
            in_group = following.op == "call_function" and group in (*following.args, *following.kwargs.values())
            if in_group and following is not last:
                return Support.no(
                    f"another collective of the same group ({following.name}) stands between the "
                    f"{self.what} and the place of the fused operator, and the two would change "
                    "places"
                )
        return YES

    def last_input(self, match: Match) -> Node:
        """Return the node after which the fused call can stand."""
        given = (match.node_of(self.collective), match.captures["weight"], match.captures.get("residual"))
        return max(node for node in given if isinstance(node, Node))

    def call(self, match: Match, arguments: tuple[Any, ...], values: tuple[Any, ...]) -> Node:
        """Return a new call of the fused operator with these fake results, and record it."""
        fused, name = self.graph.call_function(match.fusion.replacement, arguments), self.name_of(match)
        copy_origin(match.node_of(self.collective), fused)
        fused.meta["fusewire_all_reduce"] = name
        fused.meta["val"] = values
        if name:
            self.context.fused[name] = Fused(match.fusion.name, self.context.spelling.get(name, ""))
        return fused

    def call_after_inputs(self, match: Match) -> Node:
        """Return a new call after its last input, so that collectives keep their order."""
        last, values = self.last_input(match), match.root.meta["val"]
        if not match.fusion.returns_sum:
            values = values, fresh_fake(match.captures["x"].meta["val"], contiguous=True)
        arguments = tuple(None if key is None else match.captures[key] for key in match.fusion.arguments)
        with self.graph.inserting_before(last.next):
            return self.call(match, arguments, tuple(values))


# The clauses: checks of the captures. A false `Support` has the refusal.


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
    refusal = "the process group is a value of the graph and not a name known at compile time"
    # From torch 2.15 on the setting is the compiler's. Before, torch.distributed.config had it, which
    # is imported where the setting took effect.
    owner = "compiler" if hasattr(torch.compiler.config, "compile_on_one_rank") else "distributed"
    config = getattr(getattr(torch, owner), "config", None)
    if not getattr(config, "compile_on_one_rank", False):
        return refusal
    return (
        f"{refusal}, because torch.{owner}.config.compile_on_one_rank is on; to fuse, switch "
        "it off (set it to False, and leave TORCH_DISTRIBUTED_COMPILE_ON_ONE_RANK unset), so that "
        "every rank compiles for itself"
    )


def check_epsilon(captures: Captures) -> Support:
    eps = captures["eps"]
    if is_number(eps):
        return Support.all_of((eps >= 0, f"epsilon is {eps}; the operators take zero or a positive number"))
    remedy = "the operators take a number, so keep it as a Python float in the module"
    if not may_be_float(eps, dtype_of(captures["x"]) == torch.float64):
        what = "as a parameter or buffer is" if eps.op in ("placeholder", "get_attr") else "which the graph computes"
        return Support.no(f"epsilon is not a number but a tensor ({eps}), {what}; {remedy}")
    return Support.no(
        f"epsilon is not a number but a value of the graph ({eps}): a float that dynamic=True made "
        f"an input, or a float64 buffer; {remedy}, and compile with backend='fusewire' or "
        "torch._dynamo.config.specialize_float=True, which keep it a number"
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
            f"the norm's weight is {dtype_of(weight)} and its input {dtype_of(x)}; fused kernels "
            f"read the weight in the input's dtype, so {'compute' if weight.op == 'call_function' else 'store'} "
            f"the weight in {dtype_of(x)}",
        ),
    )


def check_residual(captures: Captures) -> Support:
    return residual_fits(captures.get("residual"), captures["x"], "all-reduce")


def residual_fits(residual: Node | None, summed: Node, what: str) -> Support:
    """Check that a residual, if there is one, has the shape and dtype of the sum."""
    if residual is None:
        return YES
    return Support.all_of(
        (
            same_shape(residual, summed),
            f"the residual has shape {_shape(residual)} and the {what} {_shape(summed)}; they must be equal",
        ),
        (
            dtype_of(residual) == dtype_of(summed),
            f"the residual is {dtype_of(residual)} and the {what} {dtype_of(summed)}; keep the "
            f"residual stream in {dtype_of(summed)}",
        ),
    )


def _shape(node: Any) -> str:
    value = value_of(node)
    return "unknown" if value is None else str(list(value.shape))


# The checks run in this order.
SUM_CLAUSES = (check_reduction, check_group)
NORM_CLAUSES = (check_epsilon, check_weight_bias, check_input, check_weight)
