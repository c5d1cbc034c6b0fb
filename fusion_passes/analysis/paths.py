"""Find the path from an all-reduce to a norm, and whether the steps on it can be moved off it.

Views move before the all-reduce, which works elementwise. A bias, or any other addend, joins the
residual, multiplied by the scales that follow it. A number that the dtype holds is such a bias, and
so is a tensor of one element. A scale, a factor or a divisor, moves before the all-reduce, since a
sum of multiples is the multiple of the sum. So does a sum over rows (the outputs of the experts,
one under the other). A subtraction adds the negated operand.

Addends and scales then round elsewhere than in the source, so they move only with
PassConfig.allow_reassociation. (A sign does not, but without that option an all-reduce carries the
program's own values.) An addend that becomes the residual by itself moves nowhere. In float16 a
scale above 1 does not move, nor does a whole tensor to a residual: a rank's part, or the residual,
could become too large for the dtype although the sum is not.

A scale may move only if it is equal on every rank. A number or a constant tensor in the program is.
For another tensor the graph does not show it:

- a one-element parameter, buffer or input (Gemma's embedding scale, a layer scale), or a value that
  is computed from such ones alone, is assumed to be, unless PassConfig.assume_replicated_scales is
  off;
- a gate (one computed number a token: the sigmoid gate of a shared expert) is assumed to be only
  with PassConfig.assume_replicated_gates, and only if it is computed from results of collectives,
  inputs and parameters alone (fusion_passes/analysis/replication.py).

A product with a matrix of parameters (LoRA) is on a path only where all-reduces are merged. That
the matrix is equal on every rank is assumed with PassConfig.assume_replicated_residuals, since it
makes what is added to the other all-reduce.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fusewire.fusion_passes.analysis.graph import (
    VIEWS,
    aten,
    cast_source,
    constant_vector,
    dtype_of,
    first_refusal,
    is_number,
    is_row,
    is_vector,
    last_size,
    plain_div,
    plain_mul,
    same_shape,
    same_size,
    sums_rows,
    terms_of,
    value_of,
)
from fusewire.fusion_passes.analysis.replication import UNKNOWN, Replication
from fusewire.fusion_passes.analysis.scales import constant_of, is_gate, is_one_element, is_scale, unviewed
from fusewire.fusion_passes.config import PassConfig
from fusewire.fusion_passes.context import MATRICES
from fusewire.patterns.collectives import AllReduce, op_name, read_all_reduce

VIEW, CAST, SCALE, ADDEND, MATRIX, SUM_OF_ROWS = "view", "cast", "scale", "addend", "matrix", "sum"
_LIMIT = 12


@dataclass(frozen=True)
class Step:
    """One node of a path, or the one half of a subtraction from the path's value.

    Attributes:
        kind: VIEW, CAST, SCALE, ADDEND, MATRIX or SUM_OF_ROWS.
        value: the factor or divisor of a scale, what an add adds, or the right factor of a matrix
            product.
        assumption: what is assumed to be equal on every rank, as a key of RunContext.assumed; "" if
            nothing is.
        negated: whether the value is subtracted.
        divides: whether the value of a scale is a divisor.
    """

    kind: str
    node: Node
    value: Any = None
    assumption: str = ""
    negated: bool = False
    divides: bool = False

    @property
    def factor(self) -> float | None:
        """Return the number that a scale multiplies by, or None if the graph does not know it."""
        number: float | None = self.value if is_number(self.value) else None
        return number if number is None or not self.divides else 1.0 / number

    @property
    def adds_one_row(self) -> bool:
        """Return whether every row is added the same: a vector, a number or one element."""
        value = value_of(self.value)
        return value is None or value.dim() == 1 or not same_shape(self.value, self.node)

    def scaled(self, value: Any, call: Callable[..., Node]) -> Node:
        """Return a new node: `value` times or over the value of this scale."""
        target = aten.div.Tensor if self.divides else aten.mul.Tensor
        return call(target, (value, self.value), {}, self.node)

    @property
    def is_sign(self) -> bool:
        """Return whether this is a scale by 1 or -1, which rounds nothing."""
        return self.kind == SCALE and is_number(self.value) and abs(self.value) == 1


@dataclass(frozen=True)
class Path:
    """The steps from an all-reduce's value to `end`, which is normalised or added to a residual."""

    all_reduce: AllReduce
    steps: tuple[Step, ...]
    end: Node

    def of_kind(self, *kinds: str) -> tuple[Step, ...]:
        """Return the steps of these kinds, from the all-reduce on."""
        return tuple(step for step in self.steps if step.kind in kinds)

    def moved_input(self, call: Callable[..., Node]) -> Node:
        """Return the all-reduce's input with the path's views, sums and products, as new nodes."""
        x: Node = self.all_reduce.x
        for step in self.of_kind(VIEW, SUM_OF_ROWS, SCALE, MATRIX):
            if step.kind in (VIEW, SUM_OF_ROWS):
                x = call(step.node.target, (x, *step.node.args[1:]), step.node.kwargs, step.node)
            elif step.kind == SCALE:
                x = step.scaled(x, call)
            else:
                x = call(aten.mm.default, (x, step.value), {}, step.node)
        return x

    def moved_addend(self, step: Step, call: Callable[..., Node]) -> Any:
        """Return what an add of the path adds at the end, with the later views and scales.

        Its shape is the end's, or (hidden,).
        """
        addend = self._added(step, call)
        for later in self.steps[self.steps.index(step) + 1 :]:
            vector = is_vector(addend, last_size(later.node))
            if later.kind == SCALE:
                addend = later.scaled(addend, call)
                if vector and is_one_element(later.value):  # it may have several dimensions
                    addend = call(aten.view.default, (addend, [-1]), {}, later.node)
            elif later.kind == VIEW and (not vector or same_shape(addend, later.node.args[0])):
                addend = call(later.node.target, (addend, *later.node.args[1:]), later.node.kwargs, later.node)
        return addend

    def _added(self, step: Step, call: Callable[..., Node]) -> Node:
        """Return what an add of the path adds: a tensor of its shape, or a vector (hidden,)."""
        added, size = step.value, last_size(step.node)
        if (is_number(added) or is_one_element(added)) and not isinstance(size, int):
            x = self.all_reduce.x
            size = call(aten.sym_size.int, (x, x.meta["val"].dim() - 1), {}, step.node)
        if is_number(added):
            added = constant_vector(size, added, step.node)
        elif step.adds_one_row:
            if added.meta["val"].dim() != 1:
                added = call(aten.view.default, (added, [-1]), {}, step.node)
            if is_one_element(added):
                added = call(aten.expand.default, (added, [size]), {}, step.node)
        return call(aten.neg.default, (added,), {}, step.node) if step.negated else added

    @property
    def other_readers(self) -> int:
        """Return how often nodes off the path read the all-reduce's value or a step's."""
        return _other_readers(self.all_reduce.value, self.steps)

    @property
    def assumptions(self) -> tuple[str, ...]:
        """Return what is assumed to be equal on every rank, once for each factor that needs it."""
        return tuple(step.assumption for step in self.steps if step.assumption)

    def refusal(self, allow_reassociation: bool, residual: Any = None) -> str:
        """Return why the steps cannot be moved off the path, or "".

        Args:
            residual: what is added to the path's end, or None.
        """
        addends = self.of_kind(ADDEND)
        is_residual = residual is None and len(addends) == 1  # the addend becomes the residual
        moves = first_refusal(case for step in self.steps for case in self._step_refusals(step, is_residual))
        scales = self.of_kind(SCALE, SUM_OF_ROWS)
        if moves or allow_reassociation or not (scales or (addends and not is_residual)):
            return moves
        if all(step.is_sign for step in scales) and (is_residual or not addends):
            return (
                "a sign stands between the all-reduce and the norm; with "
                "allow_reassociation=False an all-reduce carries the program's own values, not "
                "their negatives"
            )
        return (
            "a scale, a bias or a sum of rows stands between the all-reduce and the norm; moving it "
            "rounds elsewhere, which allow_reassociation=False forbids"
        )

    def _step_refusals(self, step: Step, is_residual: bool) -> Iterator[tuple[bool, str]]:
        source = step.node.args[0]
        before, after = dtype_of(source), dtype_of(step.node)
        half = after == torch.float16
        if step.kind == VIEW:
            changed = not same_size(last_size(step.node), last_size(source))
            yield changed, "a view between the all-reduce and the norm changes the last dimension"
        elif step.kind == CAST:
            yield (
                before != after,
                f"a cast from {before} to {after} stands between the all-reduce and the norm; "
                "reduce in the dtype that the norm takes",
            )
        elif step.kind == SUM_OF_ROWS:
            added = any(earlier.kind == ADDEND for earlier in self.steps[: self.steps.index(step)])
            what = f"rows are added up ({step.node}) between the all-reduce and the norm, "
            yield added, f"{what}and something is added to each row before; add it afterwards"
            yield half, f"{what}which before the all-reduce could make more than float16 holds"
        elif step.kind == ADDEND:
            yield _not_held(step, after)
            yield (
                half and not is_residual and not step.adds_one_row,
                "a tensor is added between the all-reduce and the norm; added to the residual "
                "first, they could make more than float16 holds",
            )
        elif step.kind == SCALE:
            number, before = step.factor, dtype_of(self.all_reduce.value)
            yield (
                before != after or after is None or not after.is_floating_point,
                f"a scale between the all-reduce and the norm makes {after} of {before}; keep the scale in {before}",
            )
            yield (
                half and (number is None or abs(number) > 1),
                f"a scale ({'of unknown size' if number is None else f'{number:g}'}) stands "
                "between the all-reduce and the norm; before the all-reduce it could make of each "
                "rank's part more than float16 holds",
            )


class PathFinder:
    """Finds paths from all-reduces.

    Args:
        by_value: the all-reduces' nodes, by the nodes that are their finished values. Read at each
            call of `find`.
        config: the options.
        matrices: whether products with matrices may be on a path.
    """

    def __init__(self, by_value: dict[Node, Node], config: PassConfig, matrices: bool = False) -> None:
        self.by_value = by_value
        self.config = config
        self.matrices = matrices
        self.replication = Replication()

    def find(self, node: Any) -> Path | None:
        """Return a path of at most 12 steps from an all-reduce to this node, or None."""
        found = self._walk(node, set(), _LIMIT)
        if found is None:
            return None
        start, steps = found
        site = read_all_reduce(self.by_value[start])
        if site is None or any(not self.fits_group(step, site) for step in steps):
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
        for source, steps in self.steps_back(node):
            path = self._walk(source, seen, limit - 1)
            if path is not None:
                found.append((path[0], [*path[1], *steps]))
        # Of several all-reduces the last with the fewest other readers, so that their order stays.
        return max(found, key=lambda path: (-_other_readers(path[0], path[1]), path[0]), default=None)

    def steps_back(self, node: Node) -> Iterator[tuple[Any, tuple[Step, ...]]]:
        """Yield the sources of a node that can be on a path, each with the steps from there."""
        if node.target in VIEWS:
            yield node.args[0], (Step(VIEW, node),)
        elif (source := cast_source(node)) is not None:
            yield source, (Step(CAST, node),)
        elif sums_rows(node):
            yield node.args[0], (Step(SUM_OF_ROWS, node),)
        elif node.target is aten.mm.default and (step := self.matrix(node, node.args[1])) is not None:
            yield node.args[0], (step,)
        else:
            yield from self._scales_back(node)
            yield from _addends_back(node)

    def _scales_back(self, node: Node) -> Iterator[tuple[Any, tuple[Step, ...]]]:
        factors, quotient = plain_mul(node), plain_div(node)
        for value, factor in (factors, factors[::-1]) if factors is not None else ():
            if isinstance(value, Node) and (step := self._scale(node, value, factor)) is not None:
                yield value, (step,)
        if quotient is not None and isinstance(quotient[0], Node):
            divided = self._scale(node, *quotient)
            if divided is not None and not (is_number(divided.value) and not 1e-30 < abs(divided.value) < 1e30):
                yield quotient[0], (dataclasses.replace(divided, divides=True),)
        if node.target is aten.neg.default:
            yield node.args[0], (Step(SCALE, node, -1.0),)

    def matrix(self, product: Node, matrix: Any) -> Step | None:
        """Return the step of a product with a matrix that parameters or inputs make, or None."""
        if not self.matrices or not isinstance(matrix, Node):
            return None
        origin = self.replication.origin(matrix)
        if origin.unknown or origin.groups or (origin.assumed and not self.config.assume_replicated_residuals):
            return None
        return Step(MATRIX, product, matrix, MATRICES if origin.assumed else "")

    def _scale(self, node: Node, value: Node, factor: Any) -> Step | None:
        """Return the step of a product with, or a quotient by, a value that may move, or None."""
        if not same_shape(value, node) or not value_of(value).dim():  # type: ignore[union-attr]
            return None
        number = constant_of(factor)
        if number is not None:
            return Step(SCALE, node, number)
        if not isinstance(factor, Node):
            return None
        small, config = unviewed(factor), self.config
        if is_scale(small):
            option, may_assume = "assume_replicated_scales", config.assume_replicated_scales
        elif is_gate(factor, value):
            small, option, may_assume = factor, "assume_replicated_gates", config.assume_replicated_gates
        else:
            return None
        origin = self.replication.origin(small)
        if origin.unknown or (origin.assumed and not may_assume):
            return None
        return Step(SCALE, node, small, option if origin.assumed else "")

    def fits_group(self, step: Step, site: AllReduce) -> bool:
        """Return whether a step's factor, if any, is equal on the ranks of the all-reduce."""
        factor = step.value
        if step.kind != SCALE or not isinstance(factor, Node) or factor.op != "call_function":
            return True
        return self.replication.judge(factor, site.group).kind != UNKNOWN


def _other_readers(value: Node, steps: Sequence[Step]) -> int:
    return sum(len(node.users) - 1 for node in {value, *(step.node for step in steps)})


def _addends_back(node: Node) -> Iterator[tuple[Any, tuple[Step, ...]]]:
    a, b, alpha = terms_of(node) or (None, None, 0)
    if abs(alpha) == 1 and (step := addend_step(node, a, b)) is not None:
        yield a, (dataclasses.replace(step, negated=alpha == -1),)
    if (step := addend_step(node, b, a)) is not None:
        yield b, (step,) if alpha == 1 else (Step(SCALE, node, alpha), step)


def addend_step(node: Node, value: Any, addend: Any) -> Step | None:
    """Return the step of an add to `value`, or None.

    It adds a number, one element, one row of the last size or a tensor of the value's shape.
    """
    value_dtype = dtype_of(value)
    if value_dtype is None or value_dtype != dtype_of(node) or not same_shape(value, node):
        return None
    if dtype_of(addend) == value_dtype:
        fits = same_shape(addend, node) or is_row(addend, last_size(node)) or is_one_element(addend)
        return Step(ADDEND, node, addend) if fits else None
    number = constant_of(addend)
    return None if number is None else Step(ADDEND, node, number)


def _not_held(step: Step, dtype: torch.dtype | None) -> tuple[bool, str]:
    """Return (condition, refusal) for an add of a number that a residual of this dtype cannot be.

    PyTorch adds a number in fp32 at least.
    """
    if dtype is None or not is_number(step.value):
        return False, ""
    computed, held = (
        torch.tensor(float(step.value), dtype=kind).item()
        for kind in (torch.promote_types(dtype, torch.float32), dtype)
    )
    return held != computed, (
        f"{op_name(step.node)} ({step.node}) adds {step.value!r} between the all-reduce and the "
        f"norm, which {dtype} would round to {held!r}; add a number that {dtype} holds"
    )
