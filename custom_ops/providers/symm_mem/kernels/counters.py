"""Launch counters and the error word of the control block, as the kernels read and write them."""

from __future__ import annotations

import triton
import triton.language as tl

from fusewire.custom_ops._triton_private import compute_cache_keys
from fusewire.custom_ops.providers.symm_mem.kernels.memory import CTL_ERROR


@triton.jit
def read_counter(addr: tl.tensor) -> tl.tensor:
    """Load a launch counter, relaxed at GPU scope, bypassing L1."""
    return tl.inline_asm_elementwise(
        "ld.relaxed.gpu.global.b64 $0, [$1];", "=l,l", (addr,), dtype=tl.int64, is_pure=False, pack=1
    )


@triton.jit
def has_failed(ctl: tl.tensor) -> tl.tensor:
    """Return whether a kernel on this control block has given up (a scalar, int1)."""
    return read_counter(ctl + 8 * CTL_ERROR) != 0


@triton.jit
def add_counter(addr: tl.tensor, amount: tl.tensor, mask: tl.tensor) -> None:
    """Add to a launch counter where mask; returns nothing, so nothing waits for the addition."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p red.relaxed.gpu.global.add.u64 [$1], $2; mov.b32 $0, 0; }",
        "=r,l,l,r",
        (addr, amount, mask.to(tl.int32)),
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


compute_cache_keys(globals())
