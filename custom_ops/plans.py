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
            {variant: tuple((tokens * row, cost) for tokens, cost in found) for variant, found in self.tokens.items()},
        )


# Hopper boards with NVSwitch: 18 NVLink 4 links, 450 GB/s per direction, 132 SMs.
_H200 = ("NVIDIA H200", "NVIDIA H100 80GB HBM3")
_TABLES = (
    _Measured(
        _H200,
        2,
        8192,
        torch.bfloat16,
        "measured on 2 H200s, 2026-11-20",
        {
            NATIVE: (
                *((1, 11.3), (4, 12.7), (16, 14.9), (32, 16.5), (64, 20.6), (128, 33.4), (256, 40.8)),
                *((512, 60.8), (1024, 104.9), (2048, 187.7), (8192, 769.9)),
            ),
            ONE_SHOT: (
                *((1, 5.8), (4, 6.3), (16, 7.5), (32, 8.2), (64, 9.2), (128, 13.4), (256, 19.5)),
                *((512, 38.8), (1024, 79.0), (2048, 153.4)),
            ),
            TWO_SHOT: (
                *((4, 39.8), (16, 18.5), (32, 18.0), (64, 19.4), (128, 20.4), (256, 26.2), (512, 50.5)),
                *((1024, 86.2), (2048, 163.7), (8192, 617.1)),
            ),
            SYMM_ONE_SHOT: (*((1, 2.8), (2, 3.4), (4, 4.1), (8, 4.8), (16, 6.2), (32, 6.8), (64, 8.7), (128, 10.9)),),
            SYMM_TWO_SHOT: (
                *((1, 4.3), (2, 4.3), (4, 4.8), (8, 5.8), (16, 6.2), (32, 7.4), (64, 9.1), (128, 14.4)),
                *((256, 18.0), (512, 30.2), (1024, 62.0), (2048, 118.9), (4096, 230.2), (8192, 469.3)),
            ),
        },
    ),
    _Measured(
        _H200,
        4,
        8192,
        torch.bfloat16,
        "measured on 4 H200s, 2026-11-20",
        {
            NATIVE: (
                *((1, 15.1), (4, 17.0), (16, 17.5), (32, 20.5), (64, 24.2), (128, 33.3), (256, 48.4)),
                *((512, 73.8), (1024, 124.7), (2048, 225.4), (4096, 424.6), (8192, 811.7)),
            ),
            ONE_SHOT: (
                *((1, 6.6), (4, 7.1), (16, 8.9), (32, 11.1), (64, 15.9), (128, 25.9), (256, 49.0)),
                *((512, 95.5), (1024, 189.6), (2048, 374.9)),
            ),
            TWO_SHOT: (
                *((16, 32.2), (32, 25.8), (64, 27.0), (128, 32.6), (256, 42.6), (512, 68.1)),
                *((1024, 119.5), (2048, 225.3), (4096, 435.9), (8192, 858.1)),
            ),
            SYMM_ONE_SHOT: (*((1, 3.3), (2, 4.0), (4, 5.1), (8, 5.8), (16, 7.8), (32, 10.3), (64, 15.1), (128, 23.9)),),
            SYMM_TWO_SHOT: (
                *((1, 4.5), (2, 4.6), (4, 4.8), (8, 5.8), (16, 6.6), (32, 7.6), (64, 10.8), (128, 15.7)),
                *((256, 25.4), (512, 45.6), (1024, 87.6), (2048, 163.1), (4096, 312.4), (8192, 601.7)),
            ),
        },
    ),
    _Measured(
        _H200,
        8,
        8192,
        torch.bfloat16,
        "measured on 8 H200s, 2026-11-20",
        {
            NATIVE: (
                *((1, 20.9), (4, 24.8), (16, 27.6), (32, 27.6), (64, 33.2), (128, 42.1), (256, 57.6)),
                *((512, 89.4), (1024, 144.6), (2048, 265.4), (4096, 474.4), (8192, 903.8)),
            ),
            ONE_SHOT: (
                *((1, 8.6), (4, 11.6), (16, 16.2), (32, 23.1), (64, 34.7), (128, 72.2), (256, 123.9)),
                *((512, 215.3), (1024, 418.7), (2048, 838.6)),
            ),
            TWO_SHOT: (
                *((16, 64.9), (32, 49.4), (64, 44.8), (128, 49.6), (256, 65.7), (512, 100.6)),
                *((1024, 170.9), (2048, 318.1), (4096, 609.5)),
            ),
            SYMM_ONE_SHOT: (
                *((1, 4.0), (2, 4.9), (4, 6.0), (8, 7.6), (16, 11.5), (32, 17.0), (64, 30.1), (128, 51.9)),
            ),
            SYMM_TWO_SHOT: (
                *((1, 5.1), (2, 5.2), (4, 5.9), (8, 6.0), (16, 8.3), (32, 9.1), (64, 12.9), (128, 19.0)),
                *((256, 29.7), (512, 53.8), (1024, 111.5), (2048, 206.7), (4096, 393.7), (8192, 752.2)),
            ),
        },
    ),
)
# Unmeasured GPUs and world sizes: where latency dominates everywhere, nothing else.
_CAUTIOUS_LIMITS = {2: 1 << 20, 3: 512 << 10, 4: 512 << 10, **dict.fromkeys((5, 6, 7, 8), 256 << 10), 16: 128 << 10}


def find_plan(gpu: str, world_size: int, hidden: int, dtype: torch.dtype, tuned: Plan | None = None) -> Plan:
    """The plan for a GPU, by CUDA's name for it: the nearest measured hidden size, or a cautious default.

    A tuned plan, one that all ranks of the group hold (fusewire.custom_ops.plan_vote), goes before all of these.
    """
    if tuned is not None:
        return tuned
    tables = [table for table in _TABLES if gpu in table.gpus and table.world_size == world_size]
    if not tables:
        limit = _CAUTIOUS_LIMITS.get(world_size, 0)
        where = f"{world_size} x {gpu}"
        return Plan(
            f"nothing was measured on {where}: one kernel up to {limit >> 10} KiB",
            limits={SYMM_ONE_SHOT: limit // 8, SYMM_TWO_SHOT: limit, ONE_SHOT: limit},
        )
    nearest = min(
        tables,
        key=lambda table: (max(table.hidden, hidden) / min(table.hidden, hidden), table.dtype != dtype),
    )
    note = "" if gpu == nearest.gpus[0] else f", taken for {gpu}"
    if (nearest.hidden, nearest.dtype) != (hidden, dtype):
        note += f", at hidden size {nearest.hidden} in {str(nearest.dtype).removeprefix('torch.')}, by bytes"
    return nearest.plan(note)
