"""A kernel that copies to all peers at once, to measure the bandwidth of a GPU's links."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from fusewire.custom_ops._triton_private import compute_cache_keys
from fusewire.custom_ops.providers.symm_mem.kernels.memory import CTL_PEERS, load16, store16
from fusewire.custom_ops.providers.symm_mem.kernels.packets import peer_at

if TYPE_CHECKING:
    from fusewire.custom_ops.providers.symm_mem.workspace import SymmMemWorkspace

_BLOCK, _WARPS = 1024, 8


@triton.jit(do_not_specialize=("packets", "rank", "offset"))
def push_to_peers_kernel(
    ctl: tl.tensor,
    source: tl.tensor,
    packets: tl.int32,
    rank: tl.int32,
    offset: tl.int64,
    WORLD: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Store packets of 16 bytes at byte `offset` of each peer's buffer, to all peers at once."""
    programs = tl.num_programs(0)
    for tile in range(tl.program_id(0), (packets + BLOCK - 1) // BLOCK, programs):
        packet = tile * BLOCK + tl.arange(0, BLOCK)
        mask = packet < packets
        byte = packet.to(tl.int64) * 16
        words = load16(source.to(tl.int64) + byte, mask, False)
        for j in tl.static_range(1, WORLD):
            peer = tl.load(ctl + CTL_PEERS + peer_at(rank, tl.program_id(0), j, WORLD))
            store16(peer + offset + byte, words, mask, False)


def push_to_peers(ws: SymmMemWorkspace, source: Tensor, offset: int) -> None:
    """Copy `source` (uint8, a multiple of 16 bytes) to byte `offset` of every peer's buffer.

    Has no flags and no waits: use it only to measure, while nothing uses that part of the buffers.
    """
    grid = (2 * ws.multiprocessors,)
    packets = source.numel() // 16
    push_to_peers_kernel[grid](
        ws.ctl, source, packets, ws.rank, offset, ws.world_size, _BLOCK, num_warps=_WARPS, enable_fp_fusion=False
    )


compute_cache_keys(globals())
