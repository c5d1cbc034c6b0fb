"""Compute the time of a call from its size, by a formula fitted to the shipped tables.

The time of a variant is that of its bytes on the links, at the rate of a plain copy, and a few
terms with a coefficient each (`cost_parameters`): latency (`LATENCY`), and what the protocol adds
for each row or byte (`THROUGHPUT`). Only additions, products, quotients and square roots, which
round alike on every machine, so that all ranks compute the same bits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from fusewire.custom_ops.dispatch.cost_parameters import PARAMETERS, Parameters
from fusewire.custom_ops.dispatch.cost_tables import LINK_RATES, ONE_SHOT, SYMM_ONE_SHOT


class Size(NamedTuple):
    """The size of a call. `row_bytes` is the hidden size times the element size."""

    tokens: int
    row_bytes: int
    world_size: int

    @property
    def nbytes(self) -> int:
        """The size of x, in bytes."""
        return self.tokens * self.row_bytes


_KIB, _MIB = 1 << 10, 1 << 20
Terms = Mapping[str, Callable[[Size], float]]
LATENCY: Terms = {
    "call": lambda size: 1.0,  # launches and hops
    "row_to_peers": lambda size: (size.world_size - 1) * size.row_bytes / _KIB,  # the first row
    # Blocks wait for the slowest of more and more; NCCL uses more channels.
    "root": lambda size: math.sqrt(size.nbytes / _MIB),
    "fourth_root": lambda size: math.sqrt(math.sqrt(size.nbytes / _MIB)),
}
THROUGHPUT: Terms = {
    "rows": lambda size: size.tokens / 1000,
    "own_rows": lambda size: size.tokens / size.world_size / 1000,  # those that a rank sums
    "x": lambda size: size.nbytes / _MIB,  # in local memory
    "all_x": lambda size: size.world_size * size.nbytes / _MIB,  # in local memory, from every rank
}
# Each call sends its data while it waits for the first: the root of the sum of the squares of
# latency and throughput. The others' hops and blocks wait for each other: their sum.
OVERLAPPING = (ONE_SHOT,)


def data_tokens(world_size: int) -> int:
    """Return the most tokens of `symm_mem`'s data-as-flag two-shot; beyond, flags serve."""
    return 1024 if world_size > 4 else 512


def link_us(variant: str, size: Size) -> float:
    """Return microseconds for a variant's bytes out of one GPU, at the rate of a plain copy."""
    peers, ranks = size.world_size - 1, size.world_size
    sent = size.nbytes * peers if variant in (ONE_SHOT, SYMM_ONE_SHOT) else 2 * size.nbytes * peers / ranks
    return sent / _link_rate(ranks) * 1e6


def _link_rate(world_size: int) -> float:
    """Return bytes per second out of one GPU; between measured world sizes, on a line."""
    if world_size in LINK_RATES:
        return LINK_RATES[world_size]
    low, high = next(pair for pair in itertools.pairwise(LINK_RATES) if pair[0] < world_size < pair[1])
    return LINK_RATES[low] + (LINK_RATES[high] - LINK_RATES[low]) * (world_size - low) / (high - low)


@dataclass(frozen=True)
class CostFormula:
    """The times of calls with one row size and world size, from 2 to 8 ranks."""

    row_bytes: int
    world_size: int
    parameters: Parameters = field(default_factory=lambda: PARAMETERS)

    def cost(self, variant: str, tokens: int) -> float | None:
        """Return microseconds per call; None for a variant without parameters."""
        protocols = self.parameters.get(variant)
        if protocols is None:
            return None
        size = Size(tokens, self.row_bytes, self.world_size)
        protocol = protocols[0 if tokens <= data_tokens(self.world_size) else -1]
        latency, throughput = parts(variant, size, protocol)
        return combine(variant, latency, throughput)


def parts(variant: str, size: Size, protocol: Mapping[str, float]) -> tuple[float, float]:
    """Return the microseconds of latency and of throughput."""
    latency, throughput = 0.0, link_us(variant, size)
    for term, coefficient in protocol.items():
        if term in LATENCY:
            latency += coefficient * LATENCY[term](size)
        else:
            throughput += coefficient * THROUGHPUT[term](size)
    return latency, throughput


def combine(variant: str, latency: float, throughput: float) -> float:
    """Return the time of a call with these parts."""
    if variant in OVERLAPPING:
        return math.sqrt(latency * latency + throughput * throughput)
    return latency + throughput
