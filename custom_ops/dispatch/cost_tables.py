"""The shipped tables: microseconds per call by provider and number of tokens, on measured GPUs.

Measured with CUDA-graph replay, on the slowest rank, with NCCL without NVLink multicast. "native"
is NCCL's all-reduce and Inductor's add + RMSNorm in one kernel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fusewire.custom_ops.ops.registry import NATIVE

# The variants' names in cost models and tables.
ONE_SHOT = "flashinfer/oneshot"
TWO_SHOT = "flashinfer/twoshot"
SYMM_ONE_SHOT = "symm_mem/oneshot"
SYMM_TWO_SHOT = "symm_mem/twoshot"


@dataclass(frozen=True)
class ShippedTable:
    """Microseconds per call by number of tokens, for each variant, on one kind of GPU."""

    gpus: tuple[str, ...]
    world_size: int
    hidden: int
    dtype: torch.dtype
    source: str
    times: Mapping[str, Sequence[tuple[int, float]]]

    @property
    def row_bytes(self) -> int:
        """The size of a row of x, in bytes."""
        return self.hidden * self.dtype.itemsize


def _doubling(*costs: float) -> tuple[tuple[int, float], ...]:
    """Return microseconds at 1, 2, 4, ... tokens."""
    return tuple((1 << power, cost) for power, cost in enumerate(costs))


# Hopper boards with NVSwitch: 18 NVLink 4 links, 450 GB/s per direction, 132 SMs.
_H200 = ("NVIDIA H200", "NVIDIA H100 80GB HBM3")
# Bytes per second out of each of so many GPUs, of a plain copy to all peers at once
# (docs/benchmarks.md).
LINK_RATES = {2: 383e9, 4: 355e9, 8: 344e9}
TABLES = (
    ShippedTable(
        _H200,
        2,
        4096,
        torch.bfloat16,
        "measured on 2 H200s, 2026-11-20",
        {
            NATIVE: _doubling(8.9, 9.3, 9.8, 10.1, 11.1, 12.7, 14.5, 19.3, 32.3, 38.8, 57.7, 93.7, 171.4, 314.2),
            ONE_SHOT: _doubling(4.9, 5.0, 5.3, 5.5, 6.3, 6.6, 7.4, 8.4, 12.4, 21.5, 43.4, 86.7, 167.4, 332.2),
            SYMM_ONE_SHOT: _doubling(2.8, 2.9, 3.4, 3.9, 4.4, 5.2, 6.0, 6.5),
            SYMM_TWO_SHOT: _doubling(4.0, 4.1, 4.2, 4.8, 5.7, 5.9, 6.9, 8.0, 11.8, 16.5, 34.3, 59.7, 113.1, 220.2),
        },
    ),
    ShippedTable(
        _H200,
        2,
        8192,
        torch.bfloat16,
        "measured on 2 H200s, 2026-11-20",
        {
            NATIVE: _doubling(10.4, 10.6, 11.1, 11.7, 13.8, 15.6, 20.3, 33.1, 39.5, 57.1, 92.8, 170.8, 314.2, 602.4),
            ONE_SHOT: _doubling(5.6, 5.9, 6.0, 6.7, 7.1, 7.7, 9.7, 12.5, 20.2, 39.2, 79.5, 154.5, 304.2, 602.4),
            TWO_SHOT: (
                *((4, 39.8), (16, 18.5), (32, 18.0), (64, 19.4), (128, 20.4), (256, 26.2), (512, 50.5)),
                *((1024, 86.2), (2048, 163.7), (8192, 617.1)),
            ),
            SYMM_ONE_SHOT: _doubling(3.1, 3.6, 4.3, 5.0, 6.0, 6.8, 8.7, 10.8),
            SYMM_TWO_SHOT: _doubling(4.4, 4.4, 4.9, 6.0, 6.3, 7.8, 9.6, 14.1, 17.6, 30.0, 58.4, 104.2, 198.1, 387.3),
        },
    ),
    ShippedTable(
        _H200,
        4,
        4096,
        torch.bfloat16,
        "measured on 4 H200s, 2026-11-20",
        {
            NATIVE: _doubling(11.9, 12.8, 13.3, 13.9, 14.9, 15.5, 19.1, 23.6, 34.7, 47.1, 70.2, 115.6, 207.2, 387.6),
            ONE_SHOT: _doubling(5.6, 5.7, 6.0, 6.4, 7.4, 8.6, 10.8, 15.1, 25.5, 50.2, 102.2, 202.4, 401.7, 800.6),
            SYMM_ONE_SHOT: ((1, 3.2), (2, 3.3), (4, 3.5), (16, 4.6), (64, 8.2), (128, 12.9)),
            SYMM_TWO_SHOT: (
                *((1, 3.8), (2, 3.9), (4, 4.0), (16, 4.7), (64, 5.8), (256, 14.3)),
                *((1024, 46.2), (2048, 82.6), (4096, 156.3), (8192, 301.0)),
            ),
        },
    ),
    # In the next two, symm_mem's costs up to 256 tokens are of an earlier kernel, scaled by the
    # ratio of the present to the earlier kernel's time at as many bytes of hidden size 4096.
    ShippedTable(
        _H200,
        4,
        7168,
        torch.bfloat16,
        "measured on 4 H200s, 2026-11-20",
        {
            NATIVE: _doubling(15.2, 17.0, 17.4, 15.6, 16.6, 20.2, 24.7, 33.1, 45.7, 65.0, 105.8, 184.1, 344.3, 659.7),
            ONE_SHOT: _doubling(6.0, 6.2, 6.5, 7.5, 8.6, 10.7, 14.9, 23.7, 42.5, 84.4, 168.9, 335.4, 670.0, 1335.4),
            SYMM_ONE_SHOT: _doubling(3.4, 3.6, 4.1, 4.9, 6.6, 8.5, 12.2, 19.0),
            SYMM_TWO_SHOT: _doubling(4.1, 4.1, 4.1, 4.9, 5.9, 6.6, 8.8, 14.5, 22.6, 41.2, 75.9, 136.8, 263.3, 517.7),
        },
    ),
    ShippedTable(
        _H200,
        4,
        8192,
        torch.bfloat16,
        "measured on 4 H200s, 2026-11-20",
        {
            NATIVE: _doubling(13.9, 14.4, 15.0, 15.8, 16.6, 20.3, 25.0, 35.9, 48.4, 70.4, 115.0, 206.5, 389.4, 749.6),
            ONE_SHOT: _doubling(6.3, 6.5, 6.9, 8.0, 9.1, 11.4, 16.4, 27.0, 49.1, 95.7, 189.5, 376.9, 749.9, 1497.6),
            TWO_SHOT: (
                *((16, 32.2), (32, 25.8), (64, 27.0), (128, 32.6), (256, 42.6), (512, 68.1)),
                *((1024, 119.5), (2048, 225.3), (4096, 435.9), (8192, 858.1)),
            ),
            SYMM_ONE_SHOT: _doubling(3.3, 3.7, 4.4, 5.1, 6.7, 8.9, 13.1, 21.2),
            SYMM_TWO_SHOT: _doubling(3.9, 4.1, 4.1, 5.1, 6.2, 6.7, 9.2, 15.5, 24.9, 45.8, 86.0, 156.8, 298.2, 588.1),
        },
    ),
    ShippedTable(
        _H200,
        8,
        8192,
        torch.bfloat16,
        "measured on 8 H200s, 2026-11-20",
        {
            NATIVE: _doubling(20.0, 21.6, 22.9, 23.8, 25.0, 25.7, 33.5, 43.3, 55.6, 85.4, 132.8, 246.7, 430.2, 830.6),
            ONE_SHOT: _doubling(7.6, 8.1, 8.7, 10.7, 13.9, 20.1, 32.7, 69.7, 121.6, 213.9, 415.7, 829.6, 1660.4),
            TWO_SHOT: (
                *((16, 64.9), (32, 49.4), (64, 44.8), (128, 49.6), (256, 65.7), (512, 100.6)),
                *((1024, 170.9), (2048, 318.1), (4096, 609.5)),
            ),
            SYMM_ONE_SHOT: _doubling(4.0, 4.6, 5.9, 7.7, 11.3, 17.1, 28.8, 51.8),
            SYMM_TWO_SHOT: _doubling(5.0, 5.1, 5.3, 5.9, 8.4, 9.0, 12.3, 18.8, 29.9, 53.8, 103.6, 194.6, 372.0, 714.0),
        },
    ),
)
