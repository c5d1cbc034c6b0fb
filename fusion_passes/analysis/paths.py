"""Find the path from an all-reduce to a norm, and whether the steps on it can move out of the way.

Views move before the all-reduce, which works elementwise. A bias, or any other addend, joins the
residual. A scale moves before the all-reduce, since a sum of multiples is the multiple of the sum.
Addends and scales then round elsewhere than in the source, so they move only with
PassConfig.allow_reassociation. In float16 a scale above 1 and a whole tensor do not move: a rank's
part, or the residual, could become too large for the dtype although the sum is not.

A scale may move only if it is equal on every rank. A number in the program is. For a tensor the
graph does not show it:

- a one-element parameter, buffer or input (Gemma's embedding scale, a layer scale) is assumed to
  be, unless PassConfig.assume_replicated_scales is off;
- a gate (one computed number a token: the sigmoid gate of a shared expert) is assumed to be only
  with PassConfig.assume_replicated_gates, and only if it is computed from results of collectives,
  inputs and parameters alone (fusion_passes/analysis/replication.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fusewire.fusion_passes.analysis.graph import (
    VIEWS,
    aten,
    cast_source,
    dtype_of,
    first_refusal,
    is_number,
    is_vector,
    last_size,
    plain_add,
    plain_div,
    plain_mul,
    same_shape,
    same_size,
    value_of,
)
from fusewire.fusion_passes.analysis.replication import UNKNOWN, Replication
from fusewire.fusion_passes.config import PassConfig
from fusewire.patterns.collectives import AllReduce, read_all_reduce

VIEW, CAST, SCALE, ADDEND = "view", "cast", "scale", "addend"
_LIMIT = 12


@dataclass(frozen=True)
class Step:
    """One node of a path.

    Attributes:
        kind: VIEW, CAST, SCALE or ADDEND.
        value: the factor of a scale, or what an add adds.
        assumption: the option that assumes a scale equal on every rank; "" if none is needed.
    """

    kind: str
    node: Node
    value: Any = None
    assumption: str = ""


@dataclass(frozen=True)
class Path:
    """The steps from an all-reduce's value to `end`, which is normalised or added to a residual."""

    all_reduce: AllReduce
    steps: tuple[Step, ...]
    end: Node

    def of_kind(self, *kinds: str) -> tuple[Step, ...]:
        """Return the steps of these kinds, from the all-reduce on."""
        return tuple(step for step in self.steps if step.kind in kinds)

    def views_after(self, step: Step) -> tuple[Node, ...]:
        """Return the views between a step and the end."""
        later = self.steps[self.steps.index(step) + 1 :]
        return tuple(other.node for other in later if other.kind == VIEW)

    def moved_input(self, call: Callable[..., Node]) -> Node:
        """Return the all-reduce's input with the path's views and scales, as new nodes."""
        x: Node = self.all_reduce.x
        for step in self.of_kind(VIEW, SCALE):
            if step.kind == VIEW:
                x = call(step.node.target, (x, *step.node.args[1:]), step.node.kwargs, step.node)
            else:
                x = call(aten.mul.Tensor, (x, step.value), {}, step.node)
        return x

    @property
    def other_readers(self) -> int:
        """Return how often nodes off the path read the all-reduce's value or a step's."""
        return _other_readers(self.all_reduce.value, self.steps)

    @property
    def assumptions(self) -> tuple[str, ...]:
        """Return for each scale that is assumed to be equal on every rank the option for it."""
        return tuple(step.assumption for step in self.of_kind(SCALE) if step.assumption)

    def refusal(self, allow_reassociation: bool) -> str:
        """Return why the steps cannot move out of the way, or ""."""
        moves = first_refusal(case for index in range(len(self.steps)) for case in self._step_refusals(index))
        if moves or allow_reassociation or not self.of_kind(SCALE, ADDEND):
            return moves
        return (
            "a scale or a bias stands between the all-reduce and the norm; moving it rounds elsewhere, which "
            "allow_reassociation=False forbids"
        )

    def _step_refusals(self, index: int) -> Iterator[tuple[bool, str]]:
        step = self.steps[index]
        source, value = step.node.args[0], value_of(step.value)
        before, after = dtype_of(source), dtype_of(step.node)
        half = after == torch.float16
        if step.kind == VIEW:
            changed = not same_size(last_size(step.node), last_size(source))
            yield changed, "a view between the all-reduce and the norm changes the last dimension"
        elif step.kind == CAST:
            yield (
                before != after,
                f"a cast from {before} to {after} stands between the all-reduce and the norm; reduce in the dtype that "
                "the norm takes",
            )
        elif step.kind == ADDEND:
            yield (
                half and (value is None or value.dim() != 1),
                "a tensor is added between the all-reduce and the norm; added to the residual first, they could make "
                "more than float16 holds",
            )
        else:
            number, before = step.value if is_number(step.value) else None, dtype_of(self.all_reduce.value)
            late = any(earlier.kind == ADDEND for earlier in self.steps[:index])
            yield late, "a scale after a bias stands between the all-reduce and the norm"
            yield (
                before != after or after is None or not after.is_floating_point,
                f"a scale between the all-reduce and the norm makes {after} of {before}; scale after the norm's cast",
            )
            yield (
                half and (number is None or abs(number) > 1),
                f"a scale ({'of unknown size' if number is None else f'{number:g}'}) stands between the all-reduce and "
                "the norm; before the all-reduce it could make of each rank's part more than float16 holds",
            )


class PathFinder:
    """Finds paths from all-reduces.

    Args:
        by_value: the all-reduces' nodes, by the nodes that are their finished values. Read at each
            call of `find`.
        config: the options.
    """

    def __init__(self, by_value: dict[Node, Node], config: PassConfig) -> None:
        self.by_value = by_value
        self.config = config
        self.replication = Replication()

    def find(self, node: Any) -> Path | None:
        """Return a path of at most 12 steps from an all-reduce to this node, or None."""
        found = self._walk(node, set(), _LIMIT)
        if found is None:
            return None
        start, steps = found
        site = read_all_reduce(self.by_value[start])
        if site is None or any(not self._fits_group(step.value, site) for step in steps if step.kind == SCALE):
            return None
        return Path(site, tuple(steps), node)

    def _walk(self, node: Any, seen: set[Node], limit: int) -> tuple[Node, list[Step]] | None:
        """Return an all-reduce's value and the steps from there to the node, or None."""
        if not isinstance(node, Node) or node in seen:
            return None
        if node in self.by_value:
            return node, []
        if limit == 0:
            return None
        seen.add(node)
        found = []
        for source, step in self._back(node):
            path = self._walk(source, seen, limit - 1)
            if path is not None:
                found.append((path[0], [*path[1], step]))
        # Of several all-reduces the last with the fewest other readers, so that their order stays.
        return max(found, key=lambda path: (-_other_readers(path[0], path[1]), path[0]), default=None)

    def _back(self, node: Node) -> Iterator[tuple[Any, Step]]:
        """Yield the sources of a node that can be on a path, each with the step from there."""
        if node.target in VIEWS:
            yield node.args[0], Step(VIEW, node)
        elif (source := cast_source(node)) is not None:
            yield source, Step(CAST, node)
        elif (factors := plain_mul(node)) is not None:
            for value, factor in (factors, factors[::-1]):
                if isinstance(value, Node) and (assumption := self._may_scale(factor, value)) is not None:
                    yield value, Step(SCALE, node, factor, assumption)
        elif (quotient := plain_div(node)) is not None:
            value, divisor = quotient
            if is_number(divisor) and 1e-30 < abs(divisor) < 1e30:
                yield value, Step(SCALE, node, 1.0 / divisor)
        elif node.target is aten.neg.default:
            yield node.args[0], Step(SCALE, node, -1.0)
        elif (operands := plain_add(node)) is not None:
            for value, addend in (operands, operands[::-1]):
                if _is_addend(addend, value, node):
                    yield value, Step(ADDEND, node, addend)

    def _may_scale(self, factor: Any, value: Node) -> str | None:
        """Return the option that lets a factor move: "" if none is needed, None if it may not."""
        if is_number(factor):
            return ""
        if self.config.assume_replicated_scales and _is_scale(factor, value):
            return "assume_replicated_scales"
        if self.config.assume_replicated_gates and _is_gate(factor, value):
            origin = self.replication.origin(factor)
            return None if origin.unknown else "assume_replicated_gates" if origin.assumed else ""
        return None

    def _fits_group(self, factor: Any, site: AllReduce) -> bool:
        """Return whether a factor is equal on the ranks of an all-reduce's group."""
        if not isinstance(factor, Node) or factor.op != "call_function":
            return True
        return self.replication.judge(factor, site.group).kind != UNKNOWN


def _other_readers(value: Node, steps: Sequence[Step]) -> int:
    return sum(len(node.users) - 1 for node in (value, *(step.node for step in steps)))


def _is_scale(factor: Any, value: Node) -> bool:
    """Return whether a factor is a one-element parameter, buffer or input that keeps the dtype."""
    tensor, scaled = value_of(factor), value_of(value)
    return (
        tensor is not None
        and scaled is not None
        and factor.op in ("placeholder", "get_attr")
        and tuple(tensor.shape) in ((), (1,))
        and scaled.dim() > 0
        and torch.result_type(scaled, tensor) == scaled.dtype
    )


def _is_gate(factor: Any, value: Node) -> bool:
    """Return whether a factor is one computed number a token, in the value's dtype."""
    gate, scaled = value_of(factor), value_of(value)
    if gate is None or scaled is None or gate.dim() == 0 or factor.op != "call_function":
        return False
    one = isinstance(gate.shape[-1], int) and gate.shape[-1] == 1
    rows = gate.dim() == scaled.dim() and all(map(same_size, gate.shape[:-1], scaled.shape[:-1]))
    return bool(one and rows and gate.dtype == scaled.dtype)


def _is_addend(addend: Any, value: Any, node: Node) -> bool:
    """Return whether an add adds a vector of the last size or a tensor of the value's shape."""
    if dtype_of(addend) is None or not dtype_of(addend) == dtype_of(value) == dtype_of(node):
        return False
    return same_shape(value, node) and (same_shape(addend, node) or is_vector(addend, last_size(node)))
