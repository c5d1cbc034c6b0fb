"""Compute launch configurations of the `symm_mem` kernels: grid, warps and tiles.

Configurations are pure arithmetic and the same on all ranks. The protocols need equal `slices` and
`block` on every rank. A configuration changes results only through the order in which a row's
squares are added.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAX_SLICES = 8  # the most blocks that share a row
MAX_PROGRAMS = 1 << 16
_REGISTERS = 65536


@dataclass(frozen=True)
class LaunchConfig:
    """The grid, warps and tiles of a kernel launch.

    Attributes:
        programs: blocks in the grid; an idle GPU must have room for all at once. Which of them must
            be resident together is in the docstring of `kernels`, under Progress.
        warps: warps per block, a power of two. A multiprocessor holds 16 warps in all.
        block: packets of 16 bytes per block and row, a power of two, at least 32 * warps.
        slices: blocks that share a row (one-shot and data-as-flag two-shot).
        unroll: packets per thread and tile of the flat copies (data-as-flag two-shot).
        lookahead: strides between partial rows and their results, at least 1 (two-shot with flags).
        result_lag: strides between own results and the peers' results (two-shot with flags).
    """

    programs: int
    warps: int
    block: int
    slices: int = 1
    unroll: int = 1
    lookahead: int = 1
    result_lag: int = 0

    @property
    def threads(self) -> int:
        """Threads per block."""
        return 32 * self.warps

    @property
    def registers(self) -> int:
        """The most registers per thread: 128 allow 512 threads per multiprocessor."""
        return min(128, _REGISTERS // self.threads)

    @property
    def options(self) -> dict[str, Any]:
        """The options that Triton compiles the kernel with."""
        return {
            "num_warps": self.warps,
            "maxnreg": self.registers,
        }


class KernelTensors(NamedTuple):
    """The first arguments of every kernel, on the workspace's GPU.

    Contiguous and 16-byte aligned, but for the scale, one number, and the layout of scales_out.
    """

    ctl: Tensor
    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    inner_weight: Tensor | None
    norm_out: Tensor | None
    residual_out: Tensor | None
    scale: Tensor | None = None
    quantized_out: Tensor | None = None
    scales_out: Tensor | None = None


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        kernel: the kernel's name.
        config: grid, warps and tiles; `programs` is 0 for a call without tokens.
        tensors: the kernel's first arguments.
        arguments: the other arguments: numbers, then compile-time constants.
        outputs: the output buffers of the results; None for other memory.
        batch_invariant: whether a row's bits depend on that row alone.
    """

    kernel: str
    config: LaunchConfig
    tensors: KernelTensors
    arguments: tuple[Any, ...]
    outputs: tuple[int | None, ...] = (None, None)
    batch_invariant: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """The options that Triton compiles the kernel with.

        In fp16, LLVM would fuse a product that is rounded to fp16 (an inner norm's) with the
        residual add after it, and so drop the rounding. Batch-invariant kernels must round alike.
        """
        fuses = self.tensors.x.dtype != torch.float16 and not self.batch_invariant
        return {**self.config.options, "enable_fp_fusion": fuses}

    @property
    def results(self) -> tuple[Tensor | None, ...]:
        """The norm and the residual; if quantised, also the quantised norm and its scales.

        None for what is not written.
        """
        made = self.tensors
        plain = (made.norm_out, made.residual_out)
        return plain if made.quantized_out is None else (*plain, made.quantized_out, made.scales_out)


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


ONE_SHOT_KERNEL = "one_shot_kernel"


def check_launch_config(config: LaunchConfig, packets: int, multiprocessors: int, kernel: str) -> str | None:
    """Return why a kernel cannot be launched so for rows of `packets` packets, or None."""
    per_multiprocessor = max(1, 16 // config.warps)  # with the most registers per thread
    if config.warps not in (1, 2, 4, 8, 16, 32):
        return f"warps is {config.warps}; it must be a power of two, at most 32"
    if config.block != _power_of_two(config.block) or config.block < config.threads:
        return f"block is {config.block}; it must be a power of two, at least {config.threads}, the threads"
    if not 1 <= config.slices <= MAX_SLICES or config.block * config.slices < packets:
        return f"{config.slices} slices (1 to {MAX_SLICES}) of {config.block} do not cover {packets} packets"
    if not config.slices <= config.programs <= min(MAX_PROGRAMS, multiprocessors * per_multiprocessor):
        return (
            f"{config.programs} programs of {config.warps} warps do not all fit on "
            f"{multiprocessors} multiprocessors at once (or are fewer than the {config.slices} "
            "slices)"
        )
    if kernel == ONE_SHOT_KERNEL and config.programs % config.slices:
        return (
            f"{config.programs} programs are no multiple of the {config.slices} slices of a row; "
            "the last would wait for slices that no program sends"
        )
    if config.unroll not in (1, 2, 4, 8) or config.lookahead < 1 or config.result_lag < 0:
        return (
            f"unroll {config.unroll} (1, 2, 4, 8), lookahead {config.lookahead} (>= 1) or "
            f"result_lag {config.result_lag} (>= 0) is out of range"
        )
    return None


def _slices(rows: int, packets: int, multiprocessors: int) -> int:
    """Return the blocks per row: as idle multiprocessors allow, with at least 96 packets each."""
    slices = MAX_SLICES
    while slices > 1 and (rows * slices > multiprocessors or packets < 96 * slices):
        slices //= 2
    return slices


@functools.lru_cache(maxsize=16384)
def launch_config_one_shot(tokens: int, packets: int, multiprocessors: int) -> LaunchConfig:
    """Return one-shot's: a packet per thread if possible; idle multiprocessors share rows."""
    slices = _slices(tokens, packets, multiprocessors)
    block = max(32, _power_of_two(_ceil_div(packets, slices)))
    groups = max(1, min(tokens, multiprocessors // slices))
    return LaunchConfig(programs=groups * slices, warps=min(16, block // 32), block=block, slices=slices)


@functools.lru_cache(maxsize=16384)
def launch_config_two_shot_data(shard: int, packets: int, world_size: int, multiprocessors: int) -> LaunchConfig:
    """Return the data-as-flag two-shot's for `shard` rows per rank; copies use the whole GPU."""
    slices = _slices(shard, packets, multiprocessors)
    block = max(32, _power_of_two(_ceil_div(packets, slices)))
    warps = min(16, block // 32)
    copies = _ceil_div(shard * packets, 32 * warps) * (world_size - 1)
    unroll = 1
    while unroll < 8 and copies > unroll * multiprocessors:
        unroll *= 2
    rows = min(shard, multiprocessors // slices) * slices
    programs = max(slices, rows, min(multiprocessors, _ceil_div(copies, unroll)))
    return LaunchConfig(programs=programs, warps=warps, block=block, slices=slices, unroll=unroll)


@functools.lru_cache(maxsize=16384)
def launch_config_two_shot_flags(
    shard: int, packets: int, world_size: int, multiprocessors: int, replicate_residual: bool
) -> LaunchConfig:
    """Return the two-shot with flags' configuration for `shard` rows per rank.

    The grid is the smallest with its number of strides, so that no block idles. With many rows a
    thread takes 4 packets: several blocks share a multiprocessor, and one transfers while others
    wait. With fewer rows blocks are larger, so that several strides overlap. replicate_residual is
    faster without result_lag and, above 4 ranks, with the largest blocks.
    """
    block = max(32, _power_of_two(packets))
    most = min(16 if packets <= 2048 else 32, max(1, block // 32))
    warps = most if replicate_residual and world_size > 4 else min(most, max(1, block // 128))
    while warps < most and shard <= 16 // warps * multiprocessors:
        warps *= 2
    strides = _ceil_div(shard, max(1, 16 // warps) * multiprocessors)
    result_lag = 0 if replicate_residual else min(1, strides - 1)
    return LaunchConfig(programs=_ceil_div(shard, strides), warps=warps, block=block, result_lag=result_lag)
