"""What may stand between an all-reduce and its norm, and how it moves out of the way.

Views move before the all-reduce (it works elementwise). A bias, or any other addend, joins the residual; a scale moves
before the all-reduce (a sum of multiples is the multiple of the sum): both round elsewhere than the source did, so they
are carried only with PassConfig.allow_reassociation. In float16 a scale above 1 and a whole tensor stay where they are:
what they make of a rank's part, or of the residual, may be too large for the dtype where the sum is not.

A scale may move only if it is the same on every rank. A number in the program is; of a tensor the graph does not say.
A one-element parameter, buffer or input (Gemma's embedding scale, a layer scale) is taken to be replicated, as all of
a tensor-parallel model's unsharded parameters are, unless PassConfig.assume_replicated_scales is off. A gate (one number
a token, computed: the sigmoid gate of a shared expert) may move only with PassConfig.assume_replicated_gates, and only if
all that it is computed from are results of collectives, inputs and parameters (fusion_passes/spmd/replication.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fusewire.fusion_passes.analysis.graph import (
    VIEWS,
    aten,
    cast_source,
    dtype_of,
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
    """One node on the way; `value` is the factor of a scale, or what an add adds.

    `assumption` is the option (a field of PassConfig) by which the factor is taken to be the same on every rank, or "".
    """

    kind: str
    node: Node
    value: Any = None
    assumption: str = ""


@dataclass(frozen=True)
class Path:
    """The way from an all-reduce's value to `end`, the value that is normalised or that a residual is added to."""

    all_reduce: AllReduce
    steps: tuple[Step, ...]
    end: Node

    def of_kind(self, *kinds: str) -> tuple[Step, ...]:
        """The steps of these kinds, from the all-reduce on."""
        return tuple(step for step in self.steps if step.kind in kinds)

    def views_after(self, step: Step) -> tuple[Node, ...]:
        """The views between a step and the end of the way."""
        later = self.steps[self.steps.index(step) + 1 :]
        return tuple(other.node for other in later if other.kind == VIEW)

    @property
    def other_readers(self) -> int:
        """How often values on the way, the all-reduce's among them, are read by something else."""
        return _other_readers(self.all_reduce.value, self.steps)

    @property
    def assumptions(self) -> tuple[str, ...]:
        """For each scale that is taken to be the same on every rank, the option that allows it."""
        return tuple(step.assumption for step in self.of_kind(SCALE) if step.assumption)

    def problem(self, allow_reassociation: bool) -> str:
        """Why this way cannot be cleared, or ""."""
        for index, step in enumerate(self.steps):
            source = step.node.args[0]
            if step.kind == VIEW and not same_size(last_size(step.node), last_size(source)):
                return "a view between the all-reduce and the norm changes the last dimension"
            if step.kind == CAST and dtype_of(source) != dtype_of(step.node):
                return (
                    f"a cast from {dtype_of(source)} to {dtype_of(step.node)} stands between the all-reduce and the "
                    "norm; reduce in the dtype that the norm takes"
                )
            if step.kind == ADDEND and dtype_of(step.node) == torch.float16 and not _is_bias(step.value):
                return (
                    "a tensor is added between the all-reduce and the norm; added to the residual first, they could make "
                    "more than float16 holds"
                )
            if step.kind != SCALE:
                continue
            if any(earlier.kind == ADDEND for earlier in self.steps[:index]):
                return "a scale after a bias stands between the all-reduce and the norm"
            before, after = (dtype_of(n) for n in (self.all_reduce.value, step.node))
            if before != after or after is None or not after.is_floating_point:
                return f"a scale between the all-reduce and the norm makes {after} of {before}; scale after the norm's cast"
            if after == torch.float16 and not (is_number(step.value) and abs(step.value) <= 1):
                what = f"{step.value:g}" if is_number(step.value) else "of unknown size"
                return (
                    f"a scale ({what}) stands between the all-reduce and the norm; before the all-reduce it could make of "
                    "each rank's part more than float16 holds"
                )
        if self.of_kind(SCALE, ADDEND) and not allow_reassociation:
            return (
                "a scale or a bias stands between the all-reduce and the norm; moving it rounds elsewhere, which "
                "allow_reassociation=False forbids"
            )
        return ""


class PathFinder:
    """Finds the way back from a node to the all-reduce that it comes from.

    Args:
        by_value: the all-reduces by the nodes that are their finished values.
        config: the options.
    """

    def __init__(self, by_value: dict[Node, Node], config: PassConfig) -> None:
        self.by_value = by_value
        self.config = config
        self.replication = Replication()

    def find(self, node: Any) -> Path | None:
        """A way from an all-reduce to this node through steps that can be carried, or None."""
        if not isinstance(node, Node):
            return None
        way = self._walk(node, set(), _LIMIT)
        if way is None:
            return None
        start, steps = way
        found = read_all_reduce(self.by_value[start])
        if found is None or any(not self._fits_group(step.value, found) for step in steps if step.kind == SCALE):
            return None
        return Path(found, tuple(steps), node)

    def _walk(self, node: Any, seen: set[Node], limit: int) -> tuple[Node, list[Step]] | None:
        if not isinstance(node, Node) or node in seen:
            return None
        if node in self.by_value:
            return node, []
        if limit == 0:
            return None
        seen.add(node)
        ways = []
        for source, step in self._back(node):
            way = self._walk(source, seen, limit - 1)
            if way is not None:
                ways.append((way[0], [*way[1], step]))
        # Of several all-reduces, one that nothing else reads, and the last of these, so that they keep their order.
        return max(ways, key=lambda way: (-_other_readers(way[0], way[1]), way[0]), default=None)

    def _back(self, node: Node) -> Iterator[tuple[Any, Step]]:
        """The nodes one step before this one, with the step."""
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
        """The option by which a factor is taken to be the same on every rank, "" if none is needed; None if it may not
        move."""
        if is_number(factor):
            return ""
        if self._is_replicated_scale(factor, value):
            return "assume_replicated_scales"
        if self.config.assume_replicated_gates and self._is_replicated_gate(factor, value):
            return "assume_replicated_gates" if self.replication.origin(factor).assumed else ""
        return None

    def _is_replicated_gate(self, factor: Any, value: Node) -> bool:
        """Whether a factor is one number a token, computed from what is the same on every rank."""
        gate, scaled = value_of(factor), value_of(value)
        if gate is None or scaled is None or gate.dim() == 0 or factor.op != "call_function":
            return False
        one = isinstance(gate.shape[-1], int) and gate.shape[-1] == 1
        rows = gate.dim() == scaled.dim() and all(map(same_size, gate.shape[:-1], scaled.shape[:-1]))
        return bool(one and rows and gate.dtype == scaled.dtype) and not self.replication.origin(factor).problem

    def _fits_group(self, factor: Any, site: AllReduce) -> bool:
        """Whether a factor is the same on the ranks of an all-reduce's group."""
        if not isinstance(factor, Node) or factor.op != "call_function":
            return True
        return self.replication.judge(factor, site.group).kind != UNKNOWN

    def _is_replicated_scale(self, factor: Any, value: Node) -> bool:
        tensor, scaled = value_of(factor), value_of(value)
        return (
            self.config.assume_replicated_scales
            and tensor is not None
            and scaled is not None
            and factor.op in ("placeholder", "get_attr")
            and tuple(tensor.shape) in ((), (1,))
            and scaled.dim() > 0
            and torch.result_type(scaled, tensor) == scaled.dtype
        )


def _other_readers(value: Node, steps: Sequence[Step]) -> int:
    return sum(len(node.users) - 1 for node in (value, *(step.node for step in steps)))


def _is_bias(value: Any) -> bool:
    """Whether an addend is a bias, one number for each place in the last dimension."""
    tensor = value_of(value)
    return tensor is not None and tensor.dim() == 1


def _is_addend(addend: Any, value: Any, node: Node) -> bool:
    """Whether an add adds a vector over the last dimension, or a tensor of the value's own shape, in its dtype."""
    if dtype_of(addend) is None or not dtype_of(addend) == dtype_of(value) == dtype_of(node):
        return False
    return same_shape(value, node) and (same_shape(addend, node) or is_vector(addend, last_size(node)))
