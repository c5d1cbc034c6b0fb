"""Symmetric memory of the `symm_mem` provider: buffers that peers write to, and the control block of the
kernels.

One allocation per rank, mapped by all peers (peer-to-peer, no multicast), laid out by `Layout`; plus a
control block in local memory with the launch counters, the peers' addresses and the error word. Kernels count
their calls there, so a workspace works under CUDA graphs, and the ranks' calls must come in the same order,
one at a time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fusewire.custom_ops._torch_private import map_peers, symmetric_buffer
from fusewire.custom_ops.environment import scoped_variable
from fusewire.custom_ops.ops.all_reduce_norm import resolve_group
from fusewire.custom_ops.providers.symm_mem.launch_config import MAX_SLICES
from fusewire.errors import ArgumentError, CaptureError, PeerTimeoutError, WorkspaceError

# The control block, in 64-bit words.
CTL_ONE_SHOT, CTL_DATA, CTL_FLAGS = 0, 1, 2  # launch counters, one per protocol
CTL_ERROR = 3  # 0, or (what was waited for << 32) + rank + 1
CTL_HOST_ERROR = 4  # address of a pinned host word that gets the same, or 0
CTL_LIMIT_NS = 5
CTL_PEERS = 8  # base address of each rank's buffer, own included
CTL_ZEROS = 16  # 16 bytes that stay zero: where masked lanes poll
CTL_WORDS = 32

# Bytes of a cache line. Words that many threads poll lie in lines of their own; two words a slice fit.
LINE = 128

# What a kernel was waiting for.
WAIT_ONE_SHOT, WAIT_PARTIAL_DATA, WAIT_RESULT_DATA, WAIT_PARTIAL_FLAG, WAIT_RESULT_FLAG, WAIT_SLICE = range(1, 7)
_WAITS = {
    WAIT_ONE_SHOT: "one-shot all-reduce + norm: its rows",
    WAIT_PARTIAL_DATA: "two-shot all-reduce + norm (data as flag): its partial rows",
    WAIT_RESULT_DATA: "two-shot all-reduce + norm (data as flag): its finished rows",
    WAIT_PARTIAL_FLAG: "two-shot all-reduce + norm (flags): its partial rows",
    WAIT_RESULT_FLAG: "two-shot all-reduce + norm (flags): its finished rows",
    WAIT_SLICE: "all-reduce + norm: blocks of this GPU itself that share a row",
}

MAX_WORLD_SIZE = 8
MAX_HIDDEN = 16384
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_ALIGN = 256


def shard_rows(tokens: int, world_size: int) -> int:
    """Rows per rank, S = ceil(tokens / world_size): rank r owns rows r * S to min((r + 1) * S, tokens)."""
    return -(-tokens // world_size)


def owned_rows(tokens: int, world_size: int, rank: int) -> int:
    """How many rows a rank owns; 0 for the last ranks if there are few."""
    shard = shard_rows(tokens, world_size)
    return min(max(tokens - rank * shard, 0), shard)


@dataclass(frozen=True)
class Layout:
    """Byte offsets into a rank's symmetric buffer. Capacities are in tokens (rows of all ranks together).

    `ones` lists the areas that start as all ones (nothing has arrived); the rest starts as zeros.
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
            "one_shot_slots": 2 * world * self.one_shot_tokens * row,
            "data_slots": 2 * data * row,
            "data_results": data * row,
            # A line a row, two words a slice: an inner norm has squares of its own to exchange.
            "one_shot_slices": LINE * self.one_shot_tokens,
            "data_slices": LINE * self.data_shard,
            "data_squares": LINE * MAX_SLICES * data,
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
        """16-byte packets of a row."""
        return self.row_bytes // 16

    @property
    def data_shard(self) -> int:
        """Rows per rank that the data-as-flag two-shot has room for."""
        return shard_rows(self.data_tokens, self.world_size)

    @property
    def flags_shard(self) -> int:
        """Rows per rank that the two-shot with flags has room for."""
        return shard_rows(self.max_tokens, self.world_size)

    @property
    def nbytes(self) -> int:
        """Size of the buffer."""
        return max(self.offsets[name] + self.sizes[name] for name in self.offsets)

    @property
    def ones(self) -> tuple[str, ...]:
        """The areas where data is its own flag."""
        return ("one_shot_slots", "data_slots", "data_results")


def unsupported_reason(world_size: int, hidden: int, dtype: torch.dtype) -> str | None:
    """Why the provider cannot serve a group of this size and activations like these, or None. Same answer on
    all ranks.
    """
    if not 2 <= world_size <= MAX_WORLD_SIZE:
        return f"world size {world_size}: symm_mem serves groups of 2 to {MAX_WORLD_SIZE} GPUs of one host"
    if hidden % 8 or not 8 <= hidden <= MAX_HIDDEN:
        return f"hidden size {hidden}: symm_mem needs a multiple of 8, at most {MAX_HIDDEN}"
    if dtype not in DTYPES:
        return f"dtype {dtype}: symm_mem takes bfloat16, float16 and float32"
    return None


def _without_multicast() -> AbstractContextManager[None]:
    """Rendezvous without a multicast object: nothing here uses one, and a broken one can take a host's GPUs
    down. For the whole process; thread-safe.
    """
    return scoped_variable("TORCH_SYMM_MEM_DISABLE_MULTICAST", lambda before: "1")


class SymmMemWorkspace:
    """Buffers of one (process group, hidden size, dtype), on this rank. Creation is collective.

    Args:
        group_name: the process group's name; its ranks are GPUs of one host that can map each other's memory.
        hidden: hidden size, a multiple of 8, at most 16384.
        dtype: of the activations: bfloat16, float16 or float32.
        max_tokens: most tokens of a call.
        one_shot_tokens: most tokens of a one-shot call (2 * world size * that many rows of memory).
        data_tokens: most tokens of a data-as-flag two-shot (three times that many rows of memory).
        outputs: buffers of (max_tokens, hidden) in which a two-shot can leave its result in place.
        timeout_s: how long a kernel waits for a peer before it gives up, in seconds.
        device: this rank's GPU; the current one by default.
        multiprocessors: the least number of multiprocessors of the ranks' GPUs, by which all ranks plan their launches.
            By default the ranks tell each other theirs, by the group's own communication.
        barrier: returns once every rank of the group has called it; by default the group's own barrier.

    Raises:
        ArgumentError: a size, dtype or time that cannot be used.
        CaptureError: a CUDA graph is being captured; make the workspace before.
        ProcessGroupError: no such group.
        WorkspaceError: the memory could not be allocated or mapped by the peers.
    """

    def __init__(
        self,
        group_name: str,
        hidden: int,
        dtype: torch.dtype,
        max_tokens: int,
        *,
        one_shot_tokens: int = 128,
        data_tokens: int = 512,
        outputs: int = 0,
        timeout_s: float = 30.0,
        device: torch.device | None = None,
        multiprocessors: int | None = None,
        barrier: Callable[[], None] | None = None,
    ) -> None:
        group = resolve_group(group_name)
        reason = unsupported_reason(group.size(), hidden, dtype)
        if reason:
            raise ArgumentError(reason)
        if max_tokens < 1 or one_shot_tokens < 1 or data_tokens < 1 or outputs < 0 or not timeout_s > 0:
            raise ArgumentError(
                "max_tokens, one_shot_tokens, data_tokens and timeout_s must be positive, outputs not negative"
            )
        if torch.cuda.is_current_stream_capturing():
            raise CaptureError("a symmetric workspace cannot be made during CUDA graph capture; make it before")
        self.group_name = group_name
        self._group = group
        self.rank: int = group.rank()
        self.world_size: int = group.size()
        self.hidden = hidden
        self.dtype = dtype
        self.timeout_s = timeout_s
        index = torch.cuda.current_device() if device is None or device.index is None else device.index
        self.device = torch.device("cuda", index)
        self.layout = Layout(
            world_size=self.world_size,
            hidden=hidden,
            itemsize=dtype.itemsize,
            one_shot_tokens=min(one_shot_tokens, max_tokens),
            data_tokens=min(data_tokens, max_tokens),
            max_tokens=max_tokens,
            outputs=outputs,
        )
        self.multiprocessors = self._planned_multiprocessors(multiprocessors)
        self._buffer: Tensor | None = None
        self._handle: Any = None
        self.known: dict[Any, Any] = {}  # launches, for calls like them (symm_mem_again)
        peers = self._allocate()
        self._outputs = self._output_tensors()
        self._host_error = torch.zeros(1, dtype=torch.int64, pin_memory=True)
        self._error_word = ctypes.c_int64.from_address(self._host_error.data_ptr())
        self.ctl = self._control_block(peers)
        # No rank may push before every rank's buffer is ready.
        torch.cuda.synchronize(self.device)
        if barrier is None:
            dist.barrier(group=group)
        else:
            barrier()

    def _planned_multiprocessors(self, least: int | None) -> int:
        """The number to plan launches by, the same on every rank: how words are laid out follows from it."""
        own: int = torch.cuda.get_device_properties(self.device).multi_processor_count
        if least is None:
            counts = [own] * self.world_size
            dist.all_gather_object(counts, own, group=self._group)
            return min(counts)
        if not 1 <= least <= own:
            raise ArgumentError(f"multiprocessors is {least}; {self.device} has {own}, and all blocks must fit on it")
        return least

    def _allocate(self) -> list[int]:
        try:
            with torch.cuda.device(self.device), _without_multicast():
                buffer = symmetric_buffer(self.layout.nbytes, self.device)
                handle = map_peers(buffer, self._group)
        except RuntimeError as error:
            raise WorkspaceError(
                f"{self.layout.nbytes / 2**20:.0f} MiB of symmetric memory could not be set up on "
                f"{self.device} for group {self.group_name!r}: {error}. Every rank needs a GPU of its own on "
                "one host, with peer access to the others and that much free memory; or use another provider"
            ) from error
        peers = [int(address) for address in handle.buffer_ptrs]
        if peers[self.rank] != buffer.data_ptr():
            raise WorkspaceError(
                f"this version of torch ({torch.__version__}) maps symmetric memory in a way that symm_mem "
                "does not know; use another provider"
            )
        buffer.zero_()
        for name in self.layout.ones:
            at = self.layout.offsets[name]
            buffer[at : at + self.layout.sizes[name]].fill_(255)
        self._buffer, self._handle = buffer, handle
        return peers

    def _output_tensors(self) -> list[Tensor]:
        """The output buffers, each as a tensor with a storage of its own: a result in one is then no alias of an
        argument in another, which torch does not allow of custom operators.
        """
        assert self._buffer is not None
        found = []
        for slot in range(self.layout.outputs):
            at = self.layout.offsets[f"output{slot}"]
            found.append(from_dlpack(self._buffer[at : at + self.layout.sizes[f"output{slot}"]]))
        return found

    def _control_block(self, peers: list[int]) -> Tensor:
        words = torch.zeros(CTL_WORDS, dtype=torch.int64)
        words[CTL_HOST_ERROR] = self._host_error.data_ptr()
        words[CTL_LIMIT_NS] = int(self.timeout_s * 1e9)
        words[CTL_PEERS : CTL_PEERS + self.world_size] = torch.tensor(peers, dtype=torch.int64)
        return words.to(self.device)

    @property
    def nbytes(self) -> int:
        """Bytes of GPU memory held on this rank; 0 once closed."""
        return self.layout.nbytes + 8 * CTL_WORDS if self._buffer is not None else 0

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._buffer is None

    def output(self, slot: int, tokens: int) -> Tensor:
        """Output buffer `slot` as a (tokens, hidden) tensor.

        A two-shot called with `output=slot` leaves its result here. It stays valid until the next call with
        that slot; all reads of it must be on the stream before that call.
        """
        if self._buffer is None:
            raise WorkspaceError("the workspace is closed; make a new one")
        if not 0 <= slot < self.layout.outputs or not 0 <= tokens <= self.layout.max_tokens:
            raise ArgumentError(
                f"output({slot}, {tokens}): the workspace has {self.layout.outputs} outputs of "
                f"{self.layout.max_tokens} tokens"
            )
        flat = self._outputs[slot][: tokens * self.layout.row_bytes]
        return flat.view(self.dtype).view(tokens, self.hidden)

    def check(self, synchronize: bool = False) -> None:
        """Raise if a kernel gave up waiting for a peer; reads one word of host memory.

        Args:
            synchronize: first wait for the GPU, so that all calls made so far are judged.

        Raises:
            PeerTimeoutError: names the operation, the rank waited for and the time; the outputs of that call
                hold NaN where rows are missing, and the workspace cannot be used any more.
        """
        if synchronize:
            torch.cuda.synchronize(self.device)
        word = self._error_word.value
        if word:
            raise PeerTimeoutError(self._describe(word >> 32, (word & 0xFFFFFFFF) - 1))

    def _describe(self, wait: int, rank: int) -> str:
        what = _WAITS.get(wait, f"wait {wait}")
        return (
            f"rank {rank} of group {self.group_name!r} did not take part in time: rank {self.rank} waited "
            f"over {self.timeout_s:g} s for it in a {what}. Either that rank has stopped, or it is busy with "
            "other work, or the ranks do not make the same calls in the same order. This workspace cannot be "
            "used any more: find out why that rank lagged, close the workspace on all ranks and make a new "
            "one (or raise timeout_s)"
        )

    def close(self) -> None:
        """Wait for this rank's calls to end and free the memory. Harmless if closed already.

        Not collective: a rank whose calls have ended has received all that peers send it (every rank makes
        the same calls). CUDA graphs captured with this workspace must not be replayed afterwards.
        """
        if self._buffer is not None:
            torch.cuda.synchronize(self.device)
            self._buffer = None
            self._handle = None
            self.known = {}
            self._outputs.clear()
