"""Estimate the time of a call by variant and size, from the tuned table or the shipped tables.

A cost is microseconds per call by bytes of x (tokens * hidden size * element size). The time
depends on the bytes moved, so the costs of one hidden size serve for similar ones.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from fusewire.custom_ops.dispatch.cost_tables import ONE_SHOT, SYMM_ONE_SHOT, SYMM_TWO_SHOT, TABLES, ShippedTable

Points = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class CostModel:
    """Costs of the variants on one kind of GPU, for one world size, hidden size and dtype.

    Attributes:
        source: the origin of the costs, for people.
        points: (bytes of x, microseconds per call) of each measured variant, by growing size.
        limits: the most bytes of x that each unmeasured variant serves.
    """

    source: str
    points: Mapping[str, Points] = field(default_factory=dict)
    limits: Mapping[str, int] = field(default_factory=dict)

    @staticmethod
    def of_times(
        source: str, times: Mapping[str, Sequence[tuple[int, float]]], hidden: int, dtype: torch.dtype
    ) -> CostModel:
        """Return a cost model from microseconds per call by number of tokens."""
        row = hidden * dtype.itemsize
        return CostModel(source, {v: tuple((tokens * row, us) for tokens, us in found) for v, found in times.items()})

    def cost(self, variant: str, nbytes: int) -> float | None:
        """Return microseconds per call, interpolated linearly; None for an unmeasured variant."""
        points = self.points.get(variant)
        if not points:
            return None
        after = bisect.bisect_left(points, (nbytes, 0.0))
        if after == 0:
            return points[0][1]
        low, cost = points[after - 1]
        if after == len(points):
            return cost * nbytes / low
        high, above = points[after]
        return cost + (above - cost) * (nbytes - low) / (high - low)


# Limits for unmeasured GPUs and world sizes: only sizes where latency dominates.
_CAUTIOUS_LIMITS = {2: 1 << 20, 3: 512 << 10, 4: 512 << 10, **dict.fromkeys((5, 6, 7, 8), 256 << 10), 16: 128 << 10}


def find_cost_model(
    gpu: str, world_size: int, hidden: int, dtype: torch.dtype, tuned: CostModel | None = None
) -> CostModel:
    """Return the costs on a GPU: tuned, or of the nearest measured hidden size, or a default.

    Args:
        gpu: CUDA's name of the GPU.
        tuned: the tuned costs that all ranks agreed on (`table_vote`), preferred to all others.
    """
    if tuned is not None:
        return tuned
    tables = [table for table in TABLES if gpu in table.gpus]
    if world_size in (table.world_size for table in tables):
        return _nearest([table for table in tables if table.world_size == world_size], gpu, hidden, dtype)
    below = max((table.world_size for table in tables if table.world_size < world_size), default=0)
    above = min((table.world_size for table in tables if table.world_size > world_size), default=0)
    if below and above:
        fewer, more = (find_cost_model(gpu, size, hidden, dtype) for size in (below, above))
        return _between(fewer, more, math.log(world_size / below) / math.log(above / below))
    limit = _CAUTIOUS_LIMITS.get(world_size, 0)
    where = f"{world_size} x {gpu}"
    return CostModel(
        f"nothing was measured on {where}: one kernel up to {limit >> 10} KiB",
        limits={SYMM_ONE_SHOT: limit // 8, SYMM_TWO_SHOT: limit, ONE_SHOT: limit},
    )


def _nearest(tables: Sequence[ShippedTable], gpu: str, hidden: int, dtype: torch.dtype) -> CostModel:
    """Return the costs of the table with the nearest hidden size."""
    nearest = min(
        tables, key=lambda table: (max(table.hidden, hidden) / min(table.hidden, hidden), table.dtype != dtype)
    )
    note = "" if gpu == nearest.gpus[0] else f", taken for {gpu}"
    if (nearest.hidden, nearest.dtype) != (hidden, dtype):
        note += f", at hidden size {nearest.hidden} in {str(nearest.dtype).removeprefix('torch.')}, by bytes"
    return CostModel.of_times(nearest.source + note, nearest.times, nearest.hidden, nearest.dtype)


def _between(below: CostModel, above: CostModel, share: float) -> CostModel:
    """Return costs interpolated between two world sizes, `share` of the way to `above`."""
    costs: dict[str, Points] = {}
    for label, points in below.points.items():
        pairs = ((size, cost, above.cost(label, size)) for size, cost in points)
        costs[label] = tuple((size, low ** (1 - share) * high**share) for size, low, high in pairs if high is not None)
    return CostModel(f"between what was {below.source} and {above.source}", costs)
