"""The shipped tables: what one call costs, by provider and size, on GPUs that were measured.

A cost is microseconds per call by bytes of x (tokens x hidden x element size): the work is moving bytes, so
one hidden size stands for its neighbours. Measured with CUDA-graph replay, the slowest rank, NCCL without
NVLink multicast; "native" is NCCL's all-reduce and Inductor's add + RMSNorm in one kernel.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

ONE_SHOT = "flashinfer/oneshot"
TWO_SHOT = "flashinfer/twoshot"
SYMM_ONE_SHOT = "symm_mem/oneshot"
SYMM_TWO_SHOT = "symm_mem/twoshot"
NATIVE = "native"

Points = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Plan:
    """Costs of the variants on one kind of GPU, for one world size, hidden size and dtype.

    Where nothing was measured, `costs` is empty and `limits` says up to how many bytes of x a variant is
    worth it.
    """

    source: str
    costs: Mapping[str, Points] = field(default_factory=dict)
    limits: Mapping[str, int] = field(default_factory=dict)

    def cost(self, variant: str, nbytes: int) -> float | None:
        """Microseconds per call, by straight lines between measured points; None if not measured."""
        points = self.costs.get(variant)
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


@dataclass(frozen=True)
class _Measured:
    gpus: tuple[str, ...]
    world_size: int
    hidden: int
    dtype: torch.dtype
    source: str
    tokens: Mapping[str, Sequence[tuple[int, float]]]

    def plan(self, note: str) -> Plan:
        row = self.hidden * self.dtype.itemsize
        return Plan(
            self.source + note,
            {
                variant: tuple((tokens * row, cost) for tokens, cost in found)
                for variant, found in self.tokens.items()
            },
        )


# Hopper boards with NVSwitch: 18 NVLink 4 links, 450 GB/s per direction, 132 SMs.
_H200 = ("NVIDIA H200", "NVIDIA H100 80GB HBM3")
_TABLES = (
    _Measured(
        _H200,
        2,
        8192,
        torch.bfloat16,
        "measured on 2 H200s at 1024 and 8192 tokens",
        {
            NATIVE: ((1024, 124.8), (8192, 769.9)),
            ONE_SHOT: ((1024, 79.9),),
            TWO_SHOT: ((1024, 85.2), (8192, 617.1)),
        },
    ),
    _Measured(
        _H200,
        4,
        8192,
        torch.bfloat16,
        "measured on 4 H200s",
        {
            NATIVE: (
                (1, 20.0),
                (16, 23.9),
                (64, 30.3),
                (128, 41.1),
                (256, 55.7),
                (512, 88.9),
                (1024, 148.7),
                (2048, 260.7),
                (4096, 482.8),
                (8192, 921.0),
            ),
            ONE_SHOT: (
                (1, 6.9),
                (16, 9.9),
                (64, 16.9),
                (128, 26.8),
                (256, 48.8),
                (512, 98.4),
                (1024, 191.6),
            ),
            TWO_SHOT: (
                (16, 34.5),
                (64, 29.4),
                (128, 34.1),
                (256, 44.9),
                (512, 70.1),
                (1024, 121.9),
                (2048, 225.3),
                (4096, 435.9),
                (8192, 858.1),
            ),
        },
    ),
    # Below 1024 tokens nothing was measured on 8: one-shot's cost over its latency grows with the ranks it
    # sends to (7 against 3), the others' with what 8 GPUs took against 4 at 1024 tokens (1.11 and 1.42
    # times).
    _Measured(
        _H200,
        8,
        8192,
        torch.bfloat16,
        "measured on 8 H200s from 1024 tokens on, below that scaled from 4",
        {
            NATIVE: (
                (1, 22.1),
                (16, 26.5),
                (64, 33.5),
                (128, 45.5),
                (1024, 164.6),
                (4096, 528.0),
                (8192, 1005.3),
            ),
            ONE_SHOT: ((1, 6.9), (16, 13.9), (64, 30.2), (128, 53.3), (1024, 437.9)),
            TWO_SHOT: ((16, 48.9), (128, 48.4), (1024, 172.9), (4096, 609.5)),
        },
    ),
)
# Unmeasured GPUs: one-shot where latency dominates everywhere, nothing else.
_CAUTIOUS_LIMITS = {2: 1 << 20, 4: 512 << 10, 8: 256 << 10, 16: 128 << 10}


def find_plan(gpu: str, world_size: int, hidden: int, dtype: torch.dtype) -> Plan:
    """The plan for a GPU, by CUDA's name for it: the nearest measured hidden size, or a cautious default."""
    tables = [table for table in _TABLES if gpu in table.gpus and table.world_size == world_size]
    if not tables:
        limit = _CAUTIOUS_LIMITS.get(world_size, 0)
        where = f"{world_size} x {gpu}"
        return Plan(
            f"nothing was measured on {where}: one-shot up to {limit >> 10} KiB", limits={ONE_SHOT: limit}
        )
    nearest = min(
        tables,
        key=lambda table: (max(table.hidden, hidden) / min(table.hidden, hidden), table.dtype != dtype),
    )
    note = "" if gpu == nearest.gpus[0] else f", taken for {gpu}"
    if (nearest.hidden, nearest.dtype) != (hidden, dtype):
        note += f", at hidden size {nearest.hidden} in {str(nearest.dtype).removeprefix('torch.')}, by bytes"
    return nearest.plan(note)
