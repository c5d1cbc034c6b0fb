"""Add values in pairs of neighbours until one is left, the order of batch-invariant sums."""

from __future__ import annotations

import triton
import triton.language as tl

from fusewire.custom_ops._triton_private import compute_cache_keys


@triton.constexpr_function
def join_registers(values: list[str], at: int, count: int, join: str) -> list[str]:
    """Return PTX that joins `count` values in the first, once value `at` is in its register.

    By `join`: "sum" adds from left to right, "pairs" neighbours until one is left, and "largest"
    takes the largest of the unsigned numbers.
    """
    if join == "pairs":
        spans = (1, 2, 4) if at == count - 1 else ()
        steps = [(i, i + far) for far in spans for i in range(0, count - far, 2 * far)]
    else:
        steps = [(0, at)] if at else []
    operation = "max.u32" if join == "largest" else "add.rn.f32"
    return [f"{operation} {values[a]}, {values[a]}, {values[b]};" for a, b in steps]


@triton.constexpr_function
def _add_lanes_asm(lanes: int) -> str:
    """Return PTX that adds the values of 2, 4, ... `lanes` neighbouring lanes, on each of them."""
    adds = [f"shfl.sync.bfly.b32 t, $0, {1 << k}, 31, -1; add.rn.f32 $0, $0, t;" for k in range(lanes.bit_length() - 1)]
    return f"{{ .reg .b32 t; mov.b32 $0, $1; {' '.join(adds)} }}"


@triton.jit
def add_pairs(values: tl.tensor, WIDTH: tl.constexpr) -> tl.tensor:
    """Add the first WIDTH of a block's fp32 values, neighbours until one is left.

    WIDTH is a power of two. Returns a tensor of values' shape that holds the sum everywhere, if
    equal values stand WIDTH apart. Element i must belong to thread i modulo the number of threads:
    32 neighbours are added within a warp, and their sums, of which any of the 32 holds a copy, go
    once through shared memory.
    """
    LANES: tl.constexpr = min(WIDTH, 32)
    values = tl.inline_asm_elementwise(
        _add_lanes_asm(LANES),
        "=&r,r",
        (values.to(tl.int32, bitcast=True),),
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    ).to(tl.float32, bitcast=True)
    if WIDTH > 32:
        group = tl.arange(0, values.shape[0]) % (WIDTH // 32)
        # Copies in different banks of the shared memory.
        values = add_pairs(tl.gather(values, group * 32 + group % 32, 0), WIDTH // 32)
    return values


compute_cache_keys(globals())
