"""A fake FlashInfer for machines without a GPU.

It takes the place of `flashinfer` in sys.modules, computes over gloo what the kernels compute, insists on what they
insist on, and records its calls.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
import types
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist

from fusewire.custom_ops import api
from fusewire.custom_ops.dispatch import dispatcher as dispatch
from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm
from fusewire.custom_ops.ops.registry import Support, machine_support
from fusewire.custom_ops.providers.flashinfer import library as flashinfer_library
from fusewire.custom_ops.providers.flashinfer import provider


class Call(NamedTuple):
    tokens: int
    one_shot: bool
    weight_bias: float
    residual: torch.Tensor
    pdl: bool


class FakeFlashInfer:
    """What fusewire uses of FlashInfer. `fault` breaks one thing on this rank."""

    def __init__(self, version="0.6.18", fault=""):
        self.fault = fault
        self.calls = []
        self.created = []
        self.destroyed = 0
        self.freed = []
        self.loads = 0
        package = types.ModuleType("flashinfer")
        package.__version__ = version
        comm = types.ModuleType("flashinfer.comm")
        comm.create_allreduce_fusion_workspace = self.create
        comm.allreduce_fusion = self.allreduce_fusion
        trtllm = types.ModuleType("flashinfer.comm.trtllm_ar")
        trtllm.get_trtllm_comm_module = self.load
        trtllm._symm_workspace_refs = {}
        trtllm.cudart = types.SimpleNamespace(cudaFree=lambda pointer: self.freed.append(pointer.value))
        self.trtllm = trtllm
        package.comm, comm.trtllm_ar = comm, trtllm
        self.modules = {"flashinfer": package, "flashinfer.comm": comm, "flashinfer.comm.trtllm_ar": trtllm}

    def load(self):
        self.loads += 1
        if self.fault == "no compiler":
            raise RuntimeError("Ninja build failed")
        if self.fault == "compiles for long":
            time.sleep(4)

    def create(
        self, backend, world_size, rank, max_token_num, hidden_dim, dtype, gpus_per_node=None,
        comm_backend=None, force_oneshot_support=False, group=None,
    ):  # fmt: skip
        self.created.append({"backend": backend, "world_size": world_size, "rank": rank, "tokens": max_token_num})
        if self.fault == "out of memory":
            raise RuntimeError("CUDA_ERROR_OUT_OF_MEMORY")
        if self.fault == "never exchanges":
            time.sleep(60)
        handles = comm_backend.allgather(f"handle of {rank}")
        comm_backend.barrier()
        assert comm_backend.bcast(rank, root=1) == 1
        made = types.SimpleNamespace(
            handles=handles,
            ipc_handles=[[1, 2]],
            metadata={"control_flag_ptr": 4096},
            group=group,
            max_tokens=max_token_num,
            _internal_workspace=object(),
            destroy=self._destroy,
        )
        self.trtllm._symm_workspace_refs[id(made.ipc_handles)] = ["memory"]
        return made

    def _destroy(self):
        self.destroyed += 1

    def allreduce_fusion(
        self, input, workspace, pattern, launch_with_pdl=False, trigger_completion_at_end=True, output=None,
        residual_out=None, norm_out=None, quant_out=None, scale_out=None, residual_in=None, rms_gamma=None,
        rms_eps=1e-6, scale_factor=None, layout_code=None, use_oneshot=None, fp32_acc=False, weight_bias=0.0,
    ):  # fmt: skip
        if self.fault == "abi":
            raise TypeError("Mismatched number of arguments when calling: `trtllm_allreduce_fusion(...)`")
        tokens, hidden = input.shape
        if hidden * input.element_size() % 16:
            raise RuntimeError("params.hidden_dim % VEC_SIZE != 0")
        ranks = workspace.group.size()
        for tensor in (input, residual_in, rms_gamma, residual_out, norm_out, output):
            assert tensor.is_contiguous()
            assert tensor.data_ptr() % 16 == 0
            assert tensor.dtype == input.dtype
        assert 0 < tokens <= workspace.max_tokens
        assert isinstance(use_oneshot, bool)
        assert use_oneshot or tokens > ranks
        assert pattern == 1
        assert fp32_acc
        assert trigger_completion_at_end
        self.calls.append(Call(tokens, use_oneshot, weight_bias, residual_in, launch_with_pdl))
        parts = [torch.empty_like(input) for _ in range(ranks)]
        dist.all_gather(parts, input, group=workspace.group)
        total = sum((part.float() for part in parts[1:]), parts[0].float()).to(input.dtype)
        residual_out.copy_(total.float() + residual_in.float())
        wide = residual_out.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + rms_eps)
        norm_out.copy_(normed * (weight_bias + rms_gamma.float()))
        if self.fault == "wrong norm":
            norm_out.mul_(1.5)
        if self.fault == "wrong sum":
            residual_out[0, 0] += 1


@contextlib.contextmanager
def _in_sys_modules(modules):
    """Replace modules, and unlike mock.patch.dict leave what else is imported meanwhile.

    torch cannot import some of its own modules twice.
    """
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


@contextlib.contextmanager
def fake_flashinfer(version="0.6.18", fault="", kernels="prebuilt", **seams):
    """A machine on which the fake FlashInfer runs, on CPU tensors."""
    fake = FakeFlashInfer(version, fault)
    registered = all_reduce_rms_norm.providers["flashinfer"]
    able = dataclasses.replace(
        registered,
        supported=lambda: Support(not flashinfer_library.library().reason, flashinfer_library.library().reason),
    )
    state = flashinfer_library.Kernels(kernels, Path("/nowhere/trtllm_comm/trtllm_comm.so"))
    with contextlib.ExitStack() as stack:
        stack.enter_context(_in_sys_modules(fake.modules))
        stack.enter_context(mock.patch.dict(all_reduce_rms_norm.providers, {"flashinfer": able}))
        for module, name, value in (
            (provider, "_on_gpu", lambda x: True),
            (dispatch, "on_gpu", lambda x: True),
            (flashinfer_library, "kernels", kernels if callable(kernels) else lambda: state),
        ):
            stack.enter_context(mock.patch.object(module, name, seams.get(name, value)))
        flashinfer_library.library.cache_clear()
        machine_support.cache_clear()
        try:
            yield fake
        finally:
            api.close()
            flashinfer_library.library.cache_clear()
            machine_support.cache_clear()


def args_of(x, residual=None, weight=None, group="0"):
    return (x, residual, weight, 1e-6, 0.0, "scale_then_round", group)
