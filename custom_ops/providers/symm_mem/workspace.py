"""Allocate, map and free the symmetric memory of the `symm_mem` kernels on one rank.

Each rank has one allocation that all peers map (peer-to-peer, no multicast) and a control block in
its GPU's own memory; see `layout`. The kernels count their calls in the control block, not on the
host, so CUDA graphs can replay. Ranks must make the same calls in the same order, one at a time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fusewire.custom_ops._torch_private import map_peers, symmetric_buffer
from fusewire.custom_ops.coordination.timeouts import TIMEOUT_VARIABLE, Limit, check_kernel_timeouts, limit_s
from fusewire.custom_ops.environment import scoped_variable
from fusewire.custom_ops.ops.all_reduce_norm import resolve_group
from fusewire.custom_ops.providers.symm_mem.layout import (
    CTL_HOST_ERROR,
    CTL_LIMIT_NS,
    CTL_PEERS,
    CTL_WORDS,
    OTHER_CALL,
    WAIT_ONE_SHOT,
    WAIT_PARTIAL_DATA,
    WAIT_PARTIAL_FLAG,
    WAIT_RESULT_DATA,
    WAIT_RESULT_FLAG,
    WAIT_SLICE,
    Failure,
    Layout,
    unsupported_reason,
)
from fusewire.errors import ArgumentError, CaptureError, PeerTimeoutError, RankMismatchError, WorkspaceError

_WAITS = {
    WAIT_ONE_SHOT: "one-shot all-reduce + norm: its rows",
    WAIT_PARTIAL_DATA: "two-shot all-reduce + norm (data as flag): its partial rows",
    WAIT_RESULT_DATA: "two-shot all-reduce + norm (data as flag): its finished rows",
    WAIT_PARTIAL_FLAG: "two-shot all-reduce + norm (flags): its partial rows",
    WAIT_RESULT_FLAG: "two-shot all-reduce + norm (flags): its finished rows",
    WAIT_SLICE: "all-reduce + norm: blocks of this GPU itself that share a row",
}


_AFTERWARDS = (
    "Later calls on this workspace have NaN as their results. Find the cause, close the "
    "workspace on all ranks and make a new one"
)


def _without_multicast() -> AbstractContextManager[None]:
    """Make torch create no multicast object inside: unused, and a broken one can disable GPUs.

    Applies to the whole process; thread-safe.
    """
    return scoped_variable("TORCH_SYMM_MEM_DISABLE_MULTICAST", lambda before: "1")


class SymmMemWorkspace:
    """One rank's buffers for a group, hidden size and dtype. Making one is a collective.

    Args:
        group_name: a process group whose ranks are GPUs of one host with peer access to each other.
        hidden: hidden size, a multiple of 8, at most 16384.
        dtype: of the activations: bfloat16, float16 or float32.
        max_tokens: the most tokens of a call.
        one_shot_tokens: the most tokens of a one-shot; needs 2 * world size rows of memory per
            token.
        data_tokens: the most tokens of a data-as-flag two-shot; needs three rows of memory per
            token.
        outputs: number of buffers of (max_tokens, hidden) in which a two-shot can leave its result.
        timeout_s: seconds that a kernel waits for a peer before it gives up; equal on all ranks.
        device: this rank's GPU; the current one by default.
        multiprocessors: the least number of multiprocessors of the ranks' GPUs, from which launch
            configurations are computed. By default the ranks exchange theirs over the group, and
            compare `timeout_s`.
        barrier: returns once every rank of the group has called it; by default the group's barrier.

    Raises:
        ArgumentError: a size, dtype or time cannot be used.
        ConfigError: the ranks have exchanged their `timeout_s`, and they differ.
        CaptureError: a CUDA graph is being captured; make the workspace before.
        ProcessGroupError: there is no such group.
        WorkspaceError: the memory could not be allocated or mapped by the peers.
    """

    _lost: frozenset[int] = frozenset()  # ranks whose processes have ended

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
        self.multiprocessors = self._common_multiprocessors(multiprocessors)
        self._buffer: Tensor | None = None
        self._handle: Any = None
        peers = self._allocate()
        self._outputs = self._output_tensors()
        self._host_error = torch.zeros(1, dtype=torch.int64, pin_memory=True)
        self._error_word = ctypes.c_int64.from_address(self._host_error.data_ptr())
        self.ctl = self._control_block(peers)
        # Not a stream that the program's kernels may be on: torch hands out normal ones in turns.
        self._limit_stream = torch.cuda.Stream(self.device, priority=-1)
        self._limit_ns = torch.zeros(1, dtype=torch.int64, pin_memory=True)
        # No rank may push before every rank's buffer is ready.
        torch.cuda.synchronize(self.device)
        if barrier is None:
            dist.barrier(group=group)
        else:
            barrier()

    def _common_multiprocessors(self, least: int | None) -> int:
        """Return the multiprocessors to compute with, equal on all ranks as addresses need."""
        own: int = torch.cuda.get_device_properties(self.device).multi_processor_count
        if least is None:
            found = [(own, self.timeout_s)] * self.world_size
            dist.all_gather_object(found, found[0], group=self._group)
            check_kernel_timeouts({rank: timeout_s for rank, (_, timeout_s) in enumerate(found)})
            return min(count for count, _ in found)
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
                f"{self.device} for group {self.group_name!r}: {error}. Every rank needs a GPU of "
                "its own on one host, with peer access to the others and that much free memory; "
                "or use another provider"
            ) from error
        peers = [int(address) for address in handle.buffer_ptrs]
        if peers[self.rank] != buffer.data_ptr():
            raise WorkspaceError(
                f"this version of torch ({torch.__version__}) maps symmetric memory in a way that "
                "symm_mem does not know; use another provider"
            )
        buffer.zero_()
        for name in self.layout.ones:
            at = self.layout.offsets[name]
            buffer[at : at + self.layout.sizes[name]].fill_(255)
        self._buffer, self._handle = buffer, handle
        return peers

    def _output_tensors(self) -> list[Tensor]:
        """Return the output buffers, each as a tensor (bytes,) with separate storage.

        Otherwise a result could alias an argument in another buffer, which torch forbids.
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
        """Bytes of GPU memory on this rank; 0 once closed."""
        return self.layout.nbytes + 8 * CTL_WORDS if self._buffer is not None else 0

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._buffer is None

    def output(self, slot: int, tokens: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return output buffer `slot` as a (tokens, hidden) tensor, of the workspace's dtype.

        Args:
            dtype: another, smaller dtype: of quantised rows.

        A two-shot with `output=slot` leaves its result here. It stays valid until the next call
        with that slot; all reads of it must be on the stream before that call.

        Raises:
            WorkspaceError: the workspace is closed.
            ArgumentError: there is no such buffer, or it is too small.
        """
        if self._buffer is None:
            raise WorkspaceError("the workspace is closed; make a new one")
        if not 0 <= slot < self.layout.outputs or not 0 <= tokens <= self.layout.max_tokens:
            raise ArgumentError(
                f"output({slot}, {tokens}): the workspace has {self.layout.outputs} outputs of "
                f"{self.layout.max_tokens} tokens"
            )
        dtype = dtype or self.dtype
        flat = self._outputs[slot][: tokens * self.hidden * dtype.itemsize]
        return flat.view(dtype).view(tokens, self.hidden)

    def check(self, synchronize: bool = False) -> None:
        """Raise if a kernel gave up waiting for a peer. Reads one word of host memory.

        Args:
            synchronize: wait for the GPU first, so that all earlier calls are covered.

        Raises:
            PeerTimeoutError: has the operation, the call's number, the rank waited for and the
                time. Missing rows of that call's results are NaN, and so are all rows of later
                calls: the workspace cannot be used any more.
            RankMismatchError: likewise, at once: a flag showed that a peer makes another call.
        """
        if synchronize:
            torch.cuda.synchronize(self.device)
        error = self.fault()
        if error is not None:
            raise error

    def lose(self, rank: int) -> None:
        """Let kernels wait for `Limit.ENDED_PEER` at most, since a rank's process has ended.

        A kernel that waits now reads the new limit too. Does not wait for the GPU. Thread-safe.
        """
        self._lost |= {rank}
        self.timeout_s = min(self.timeout_s, limit_s(Limit.ENDED_PEER))
        self._set_limit()

    def _set_limit(self) -> None:
        self._limit_ns.fill_(int(self.timeout_s * 1e9))
        with torch.cuda.stream(self._limit_stream):
            self.ctl[CTL_LIMIT_NS : CTL_LIMIT_NS + 1].copy_(self._limit_ns, non_blocking=True)

    def fault(self) -> PeerTimeoutError | RankMismatchError | None:
        """Return the error of a kernel that gave up, else None. Does not wait."""
        failure = Failure.of(self._error_word.value)
        if failure is None:
            return None
        where = f"call {failure.call} of the workspace of group {self.group_name!r}, {self.dtype}, hidden {self.hidden}"
        if failure.kind == OTHER_CALL:
            return RankMismatchError(
                f"rank {failure.rank} makes another call than rank {self.rank}, with other tokens "
                f"or options, where rank {self.rank} makes {where} (two-shot all-reduce + norm, "
                f"flags). {_AFTERWARDS}"
            )
        what = _WAITS.get(failure.kind, f"wait {failure.kind}")
        if self._lost:
            return PeerTimeoutError(
                f"the process of rank {', '.join(map(str, sorted(self._lost)))} of group "
                f"{self.group_name!r} has ended, and rank {self.rank} waited in vain for rank "
                f"{failure.rank} in a {what}, {where}. {_AFTERWARDS}"
            )
        return PeerTimeoutError(
            f"rank {failure.rank} of group {self.group_name!r} did not take part in time: rank "
            f"{self.rank} waited over {self.timeout_s:g} s for it in a {what}, {where}. Either "
            "that rank has stopped, or it is busy with other work, or the ranks do not make the "
            f"same calls in the same order. {_AFTERWARDS}, or let kernels wait longer "
            f"({TIMEOUT_VARIABLE})"
        )

    def close(self) -> None:
        """Wait for this rank's calls to end and free the memory. Idempotent.

        Not a collective: ended calls have all their data. Invalidates captured CUDA graphs.
        """
        if self._buffer is not None:
            torch.cuda.synchronize(self.device)
            self._buffer = None
            self._handle = None
            self._outputs.clear()
