"""Define vLLM's custom all-reduce, as FlashInfer ships it (flashinfer.comm.vllm_*), for peers.py."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from peers_candidates import Arena, Bench, Call, Candidate, Family, both_norms, with_norms
from peers_report import PEER
from torch import Tensor

from fusewire.custom_ops.coordination.vote import describe
from fusewire.custom_ops.providers.flashinfer import library as flashinfer_library
from fusewire.errors import WorkspaceError

VLLM = both_norms("vLLM custom all-reduce", "vLLM custom all-reduce", PEER)


class _Memory:
    """Memory that was not allocated by torch, in the form that torch.as_tensor takes."""

    def __init__(self, pointer: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (pointer, False),
            "version": 3,
        }


class Vllm:
    """The buffers of vLLM's all-reduce, shared through IPC handles. Inputs are registered, as under CUDA graphs."""

    BLOCKS = 36  # the most it takes, and what vLLM launches

    def __init__(self, comm: Any, bench: Bench) -> None:
        self._comm, self._bench = comm, bench
        group, nbytes = bench.cpu_group, bench.most_bytes
        self._signals = comm.create_shared_buffer(comm.vllm_meta_size() + nbytes, group)
        self._pointers = comm.create_shared_buffer(nbytes, group)
        # The counters must start equal on all ranks, and new memory has any content.
        self._view(self._signals, comm.vllm_meta_size()).zero_()
        self._data = self._view(self._pointers, nbytes).view(bench.dtype)
        self._table = torch.empty(16 << 20, dtype=torch.uint8, device=bench.device)
        torch.cuda.synchronize()
        dist.barrier(group=group)
        self._handle = comm.vllm_init_custom_ar(self._signals, self._table, bench.rank, True)
        self._unregistered = False

    def _view(self, pointers: Sequence[int], nbytes: int) -> Tensor:
        return torch.as_tensor(_Memory(pointers[self._bench.rank], nbytes), device=self._bench.device)

    def reduce(self, arena: Arena) -> Call:
        """Return a function that sums set i."""
        x = arena.inputs[0].x
        stacked = self._data[: len(arena.inputs) * x.numel()].view(len(arena.inputs), *x.shape)
        if not any(known.data_ptr() == stacked.data_ptr() for known in arena.also):
            arena.also.append(stacked)
            for i in range(len(stacked)):
                at = i * x.numel() * x.itemsize
                self._comm.vllm_register_buffer(self._handle, [pointer + at for pointer in self._pointers])

        def call(i: int) -> Tensor:
            out = torch.empty_like(stacked[i])
            self._unregistered |= torch.cuda.is_current_stream_capturing()
            self._comm.vllm_all_reduce(self._handle, stacked[i], out, 0, 0, self.BLOCKS)
            return out

        return call

    def before_replay(self) -> None:
        """Register the addresses of the peers' inputs of the captured calls. A collective."""
        if not self._unregistered:
            return
        own, problem = [], ""
        try:
            own = [list(part) for part in self._comm.vllm_get_graph_buffer_ipc_meta(self._handle)]
        except Exception as error:  # the peers wait for this rank's answer
            problem = describe(error)
        ranks: list[Any] = [None] * self._bench.world_size
        dist.all_gather_object(ranks, (own, problem), group=self._bench.cpu_group)
        problems = [f"rank {rank}: {said}" for rank, (_, said) in enumerate(ranks) if said]
        if problems:
            raise WorkspaceError("; ".join(problems))
        if len({len(parts[1]) for parts, _ in ranks}) > 1:
            raise WorkspaceError("the ranks captured different numbers of calls")
        handles, offsets = ([list(parts[n]) for parts, _ in ranks] for n in (0, 1))
        self._comm.vllm_register_graph_buffers(self._handle, handles, offsets)
        self._unregistered = False

    def close(self) -> None:
        torch.cuda.synchronize()
        self._comm.vllm_dispose(self._handle)
        for pointers in (self._signals, self._pointers):
            self._comm.free_shared_buffer(pointers, self._bench.cpu_group)


def vllm_family() -> Family:
    """Return vLLM's custom all-reduce, in one or two steps by its own choice, then the norm."""

    def alone(bench: Bench) -> None:
        found = flashinfer_library.library()
        if found.reason:
            raise WorkspaceError(found.reason)
        if bench.world_size not in (2, 4, 6, 8):
            raise WorkspaceError(f"it is built for 2, 4, 6 or 8 ranks, not {bench.world_size}")
        with flashinfer_library.toolkit() if flashinfer_library.find_nvcc() else contextlib.nullcontext():
            found.comm.vllm_meta_size()  # loads the module, and compiles it if needed

    def together(bench: Bench) -> list[Candidate]:
        made = Vllm(flashinfer_library.library().comm, bench)
        bench.closers.append(made.close)
        return with_norms(bench, VLLM, made.reduce, before_replay=made.before_replay)

    return Family("vLLM's custom all-reduce", VLLM, together, alone, alone_s=400.0)
