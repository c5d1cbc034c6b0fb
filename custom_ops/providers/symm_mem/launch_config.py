"""How to launch the `symm_mem` kernels: grids, warps and tiles for a token count. Pure arithmetic, the same
on all ranks.

Every number is a default that a caller may replace (`dataclasses.replace`) to tune; results do not depend on
them but for the order in which a row's squares are added.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

MAX_SLICES = 8  # blocks that may share a row
MAX_PROGRAMS = 1 << 16
_REGISTERS = 65536


@dataclass(frozen=True)
class Plan:
    """A launch.

    Attributes:
        programs: blocks in the grid; all must fit on the GPU at once.
        warps: per block, a power of two. So many blocks go to a multiprocessor that it has 16 warps.
        block: packets of 16 bytes that a block takes of a row, a power of two, at least 32 * warps.
        slices: blocks that share a row (one-shot and data-as-flag two-shot).
        unroll: packets per thread and tile of the flat copies (data-as-flag two-shot).
        ahead: strides by which partial rows run ahead of results (two-shot with flags), at least 1.
        lag: strides by which a rank's reading of the peers' results lags behind its own (two-shot with
            flags).
        pdl: programmatic dependent launch.
    """

    programs: int
    warps: int
    block: int
    slices: int = 1
    unroll: int = 1
    ahead: int = 1
    lag: int = 0
    pdl: bool = False

    @property
    def threads(self) -> int:
        """Threads per block."""
        return 32 * self.warps

    @property
    def registers(self) -> int:
        """The cap on registers per thread: 128 keeps two blocks of 256 threads, or one of 512, on a
        multiprocessor.
        """
        return min(128, _REGISTERS // self.threads)

    @property
    def options(self) -> dict[str, Any]:
        """What Triton compiles by."""
        return {
            "num_warps": self.warps,
            "maxnreg": self.registers,
            "launch_pdl": self.pdl,
            "enable_fp_fusion": True,  # the default up to Triton 3.9, which announces another
        }


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def check_plan(plan: Plan, packets: int, multiprocessors: int) -> str | None:
    """Why a plan cannot be launched for rows of `packets` packets, or None."""
    per_multiprocessor = max(1, 16 // plan.warps)  # at the cap on registers
    if plan.warps not in (1, 2, 4, 8, 16, 32):
        return f"warps is {plan.warps}; it must be a power of two, at most 32"
    if plan.block != _power_of_two(plan.block) or plan.block < plan.threads:
        return f"block is {plan.block}; it must be a power of two, at least {plan.threads}, the threads"
    if not 1 <= plan.slices <= MAX_SLICES or plan.block * plan.slices < packets:
        return f"{plan.slices} slices (1 to {MAX_SLICES}) of {plan.block} do not cover {packets} packets"
    if not plan.slices <= plan.programs <= min(MAX_PROGRAMS, multiprocessors * per_multiprocessor):
        return (
            f"{plan.programs} programs of {plan.warps} warps do not all fit on {multiprocessors} "
            f"multiprocessors at once (or are fewer than the {plan.slices} slices)"
        )
    if plan.unroll not in (1, 2, 4, 8) or plan.ahead < 1 or plan.lag < 0:
        return f"unroll {plan.unroll} (1, 2, 4, 8), ahead {plan.ahead} (>= 1) or lag {plan.lag} (>= 0) is out of range"
    return None


def _slices(rows: int, packets: int, multiprocessors: int) -> int:
    """As many blocks a row as there are idle multiprocessors, while each has 96 packets or more to do."""
    slices = MAX_SLICES
    while slices > 1 and (rows * slices > multiprocessors or packets < 96 * slices):
        slices //= 2
    return slices


@functools.lru_cache(maxsize=16384)
def plan_one_shot(tokens: int, packets: int, multiprocessors: int) -> Plan:
    """One packet a thread if the row allows, several blocks a row while multiprocessors are idle."""
    slices = _slices(tokens, packets, multiprocessors)
    block = max(32, _power_of_two(_ceil_div(packets, slices)))
    groups = max(1, min(tokens, multiprocessors // slices))
    return Plan(programs=groups * slices, warps=min(16, block // 32), block=block, slices=slices)


@functools.lru_cache(maxsize=16384)
def plan_two_shot_data(shard: int, packets: int, world_size: int, multiprocessors: int) -> Plan:
    """Flat copies over all multiprocessors; rows as in one-shot."""
    slices = _slices(shard, packets, multiprocessors)
    block = max(32, _power_of_two(_ceil_div(packets, slices)))
    warps = min(16, block // 32)
    copies = _ceil_div(shard * packets, 32 * warps) * (world_size - 1)
    unroll = 1
    while unroll < 8 and copies > unroll * multiprocessors:
        unroll *= 2
    rows = min(shard, multiprocessors // slices) * slices
    programs = max(slices, rows, min(multiprocessors, _ceil_div(copies, unroll)))
    return Plan(programs=programs, warps=warps, block=block, slices=slices, unroll=unroll)


@functools.lru_cache(maxsize=16384)
def plan_two_shot_flags(shard: int, packets: int, world_size: int, multiprocessors: int, full: bool) -> Plan:
    """A row at a time; as few blocks as make equally many strides, so that none idles.

    Many rows: as many blocks a multiprocessor as leave 4 packets to a thread, so that one transfers while others wait
    for a fence or a flag. Fewer rows: fewer blocks, so that there are several strides, which overlap. With the full
    residual, where every rank also normalises its peers' rows, it helps to take those at once; and above 4 ranks one
    block a multiprocessor is the faster.
    """
    block = max(32, _power_of_two(packets))
    most = min(16 if packets <= 2048 else 32, max(1, block // 32))
    warps = most if full and world_size > 4 else min(most, max(1, block // 128))
    while warps < most and shard <= 16 // warps * multiprocessors:
        warps *= 2
    strides = _ceil_div(shard, max(1, 16 // warps) * multiprocessors)
    return Plan(programs=_ceil_div(shard, strides), warps=warps, block=block, lag=0 if full else min(1, strides - 1))
