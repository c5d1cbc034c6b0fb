"""Estimate the time of a call by variant and number of tokens, from tables and a formula.

The tuned table serves first, then the shipped table for rows of this size. Between measured numbers
of tokens the formula (`cost_formula`) gives the curve and the table the level. Where no table was
measured, the formula serves alone.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from fusewire.custom_ops.dispatch.cost_formula import CostFormula
from fusewire.custom_ops.dispatch.cost_tables import ONE_SHOT, SYMM_ONE_SHOT, SYMM_TWO_SHOT, TABLES

Times = Mapping[str, Sequence[tuple[int, float]]]


@dataclass(frozen=True)
class CostModel:
    """Costs of the variants on one kind of GPU, for one world size, hidden size and dtype.

    Attributes:
        source: the origin of the costs, for people.
        times: (tokens, microseconds per call) of each measured variant, by growing tokens.
        formula: the curve between and beyond the measured numbers of tokens; None on GPUs that it
            was not fitted to.
        only_measured: whether variants without times have no cost, since a tuner left them out.
        limits: the most bytes of x that each unmeasured variant serves.
    """

    source: str
    times: Times = field(default_factory=dict)
    formula: CostFormula | None = None
    only_measured: bool = False
    limits: Mapping[str, int] = field(default_factory=dict)

    def cost(self, variant: str, tokens: int) -> float | None:
        """Return microseconds per call; None for a variant without a known cost.

        Between measured numbers of tokens, the ratio of measurement to formula lies on a line;
        beyond them it is that of the nearest. Without a formula, the times lie on a line, and
        beyond the largest number of tokens they grow with it.
        """
        points = self.times.get(variant)
        if not points:
            return None if self.only_measured or self.formula is None else self.formula.cost(variant, tokens)
        after = bisect.bisect_left(points, (tokens, 0.0))
        (low, below), (high, above) = points[max(after - 1, 0)], points[min(after, len(points) - 1)]
        if high == tokens:
            return above
        share = (tokens - low) / (high - low) if high > low else 0.0
        estimates = [self._estimate(variant, size) for size in (low, tokens, high)]
        below, above = below / estimates[0], above / estimates[2]
        return estimates[1] * (below + (above - below) * share)

    def _estimate(self, variant: str, tokens: int) -> float:
        found = None if self.formula is None else self.formula.cost(variant, tokens)
        return max(1.0, tokens / self.times[variant][-1][0]) if found is None else found


# Limits for unmeasured GPUs and world sizes: only sizes where latency dominates.
_CAUTIOUS_LIMITS = {2: 1 << 20, 3: 512 << 10, 4: 512 << 10, **dict.fromkeys((5, 6, 7, 8), 256 << 10), 16: 128 << 10}


def find_cost_model(
    gpu: str, world_size: int, hidden: int, dtype: torch.dtype, tuned: CostModel | None = None
) -> CostModel:
    """Return the costs on a GPU: tuned, or measured for rows of this size, or by the formula.

    On GPUs without measurements there are only limits.

    Args:
        gpu: CUDA's name of the GPU.
        tuned: the tuned costs that all ranks agreed on (`table_vote`), preferred to all others.
    """
    if tuned is not None:
        return tuned
    tables = [table for table in TABLES if gpu in table.gpus]
    formula = find_formula(gpu, world_size, hidden, dtype)
    if formula is None:
        return _cautious(gpu, world_size)
    note = "" if gpu == tables[0].gpus[0] else f", taken for {gpu}"
    same = [t for t in tables if (t.world_size, t.row_bytes) == (world_size, formula.row_bytes)]
    if not same:
        sizes = ", ".join(map(str, sorted({table.world_size for table in tables})))
        source = f"by a formula fitted to measurements of {sizes} x {tables[0].gpus[0]}"
        return CostModel(source + note, formula=formula)
    if same[0].dtype != dtype:
        note += f", at as many bytes of {str(same[0].dtype).removeprefix('torch.')}"
    return CostModel(same[0].source + note, same[0].times, formula)


def find_formula(gpu: str, world_size: int, hidden: int, dtype: torch.dtype) -> CostFormula | None:
    """Return the formula for a GPU that it was fitted to, or None."""
    world_sizes = [table.world_size for table in TABLES if gpu in table.gpus]
    if not world_sizes or not min(world_sizes) <= world_size <= max(world_sizes):
        return None
    return CostFormula(hidden * dtype.itemsize, world_size)


def _cautious(gpu: str, world_size: int) -> CostModel:
    limit = _CAUTIOUS_LIMITS.get(world_size, 0)
    return CostModel(
        f"nothing was measured on {world_size} x {gpu}: one kernel up to {limit >> 10} KiB",
        limits={SYMM_ONE_SHOT: limit // 8, SYMM_TWO_SHOT: limit, ONE_SHOT: limit},
    )
