"""The layout of the `symm_mem` buffers, from which host and kernels compute addresses.

A rank's symmetric buffer is one allocation, divided into areas (`Layout`). The control block is 256
bytes of the GPU's own memory: launch counters, the peers' addresses and the error word.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from fusewire.custom_ops.ops.quantization import GROUP_SIZE
from fusewire.custom_ops.ops.sharded_norm import rows_per_rank
from fusewire.custom_ops.providers.symm_mem.launch_config import MAX_SLICES

# The control block, by 64-bit words.
CTL_ONE_SHOT, CTL_DATA, CTL_FLAGS = 0, 1, 2  # launch counters, one for each protocol
CTL_ERROR = 3  # 0, or what `Failure.of` reads
CTL_HOST_ERROR = 4  # address of a pinned host word with a copy of the error, or 0
CTL_LIMIT_NS = 5  # time limit of a wait, in nanoseconds
CTL_PEERS = 8  # base address of each rank's buffer, this rank's included
CTL_ZEROS = 16  # 16 bytes that stay zero, polled by masked lanes
CTL_WORDS = 32

# Words that many threads poll have separate cache lines; a line holds two words for each slice.
CACHE_LINE_BYTES = 128

# Kinds of waits, as written to the error word.
WAIT_ONE_SHOT, WAIT_PARTIAL_DATA, WAIT_RESULT_DATA, WAIT_PARTIAL_FLAG, WAIT_RESULT_FLAG, WAIT_SLICE = range(1, 7)
OTHER_CALL = 7  # no time-out: a flag says that its writer makes another call

# A flag has the number of its protocol's call in its low bits, then what both sides must have
# alike.
FLAG_CALL_BITS, FLAG_OPTION_BITS = 40, 5

MAX_WORLD_SIZE = 8
MAX_HIDDEN = 16384
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_ALIGN = 256


def owned_rows(tokens: int, world_size: int, rank: int) -> int:
    """Return the number of rows that a rank owns; the last ranks may own none.

    Rank r owns rows r * S to min((r + 1) * S, tokens), S = `rows_per_rank(tokens, world_size)`.
    """
    shard = rows_per_rank(tokens, world_size)
    return min(max(tokens - rank * shard, 0), shard)


class Failure(NamedTuple):
    """Why a kernel gave up: the kind of wait, the awaited rank, and the call's number.

    The first call on a workspace has number 1; all protocols count together, self-tests too. As all
    ranks make the same calls, a call has the same number on every rank.
    """

    kind: int
    rank: int
    call: int

    @staticmethod
    def of(word: int) -> Failure | None:
        """Return what an error word says; None if no kernel gave up."""
        word &= 0xFFFFFFFFFFFFFFFF
        return Failure(word >> 8 & 0xFF, (word & 0xFF) - 1, word >> 16) if word else None


@dataclass(frozen=True)
class Layout:
    """Byte offsets and sizes of the areas of a rank's symmetric buffer.

    Attributes:
        world_size: ranks of the group.
        hidden: hidden size, in elements.
        itemsize: bytes of an element.
        one_shot_tokens, data_tokens, max_tokens: the most tokens (rows of all ranks together) of a
            one-shot, of a data-as-flag two-shot, and of any call.
        outputs: number of output buffers of (max_tokens, hidden).
        offsets, sizes: bytes, by the area's name.
    """

    world_size: int
    hidden: int
    itemsize: int
    one_shot_tokens: int
    data_tokens: int
    max_tokens: int
    outputs: int
    offsets: dict[str, int] = field(default_factory=dict, compare=False)
    sizes: dict[str, int] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        world, row = self.world_size, self.row_bytes
        data, flags = self.data_shard * world, self.flags_shard * world
        sizes = {
            "one_shot_slots": 2 * world * self.one_shot_source,
            "data_slots": 2 * world * self.data_source,
            "data_results": data * row,
            # Two words per slice: the second is for the inner norm's squares.
            "one_shot_slices": CACHE_LINE_BYTES * self.one_shot_tokens,
            "data_slices": CACHE_LINE_BYTES * self.data_shard,
            "data_squares": CACHE_LINE_BYTES * MAX_SLICES * data,
            # The slices' largest values, and the scales, of quantised norms.
            "one_shot_largest": CACHE_LINE_BYTES * self.one_shot_tokens,
            "flags_scales": 4 * flags * max(1, self.hidden // GROUP_SIZE),
            "flags_rstds": 8 * flags,
            "partial_flags": 8 * flags,
            "result_flags": 8 * flags,
            "inbox": flags * row,
            "results": flags * row,
            **{f"output{i}": flags * row for i in range(self.outputs)},
        }
        at = 0
        for name, size in sizes.items():
            self.offsets[name] = at
            self.sizes[name] = size
            at += -(-size // _ALIGN) * _ALIGN

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of activations."""
        return self.hidden * self.itemsize

    @property
    def packets(self) -> int:
        """Packets of 16 bytes in a row."""
        return self.row_bytes // 16

    @property
    def data_shard(self) -> int:
        """The most rows per rank of a data-as-flag two-shot."""
        return rows_per_rank(self.data_tokens, self.world_size)

    @property
    def one_shot_source(self) -> int:
        """Bytes of one rank's part of a one-shot's slot: its rows, behind `shift_of` all tokens."""
        return self.one_shot_tokens * self.row_bytes + shift_of(self.one_shot_tokens)

    @property
    def data_source(self) -> int:
        """Bytes of one rank's part of a data-as-flag two-shot's slot, likewise."""
        return self.data_shard * self.row_bytes + shift_of(self.data_tokens)

    @property
    def flags_shard(self) -> int:
        """The most rows per rank of a two-shot with flags."""
        return rows_per_rank(self.max_tokens, self.world_size)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer."""
        return max(self.offsets[name] + self.sizes[name] for name in self.offsets)

    @property
    def ones(self) -> tuple[str, ...]:
        """The areas where data is its own flag, initially all ones; other areas start as zeros."""
        return ("one_shot_slots", "data_slots", "data_results")


def shift_of(tokens: int, sharded: bool = True, inner: bool = True) -> int:
    """Return where in its part of a slot the rows of a call begin, in bytes.

    Where data is its own flag, nothing else shows that a peer makes a call with other tokens, or of
    another operator. Rows that begin elsewhere do: either their first packet is missing, or their
    last. So the ranks wait past the time limit, and none takes the others' rows for its own.

    Args:
        sharded: whether the residual is sharded.
        inner: whether there is an inner norm.
    """
    return CACHE_LINE_BYTES * (4 * tokens + 2 * sharded + inner)


def unsupported_reason(world_size: int, hidden: int, dtype: torch.dtype) -> str | None:
    """Return why the kernels cannot serve the arguments, or None. The same on all ranks."""
    if not 2 <= world_size <= MAX_WORLD_SIZE:
        return f"world size {world_size}: symm_mem serves groups of 2 to {MAX_WORLD_SIZE} GPUs of one host"
    if hidden % 8 or not 8 <= hidden <= MAX_HIDDEN:
        return f"hidden size {hidden}: symm_mem needs a multiple of 8, at most {MAX_HIDDEN}"
    if dtype not in DTYPES:
        return f"dtype {dtype}: symm_mem takes bfloat16, float16 and float32"
    return None
