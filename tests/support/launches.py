"""Launches of the `symm_mem` kernels without a GPU: caught before they reach Triton, and compiled for sm_90."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fusewire.custom_ops.providers.symm_mem import launcher as symm_mem
from fusewire.custom_ops.providers.symm_mem import workspace as spaces
from fusewire.custom_ops.providers.symm_mem.layout import CTL_WORDS, Layout

POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int64: "*i64"}
POINTERS |= {torch.float8_e4m3fn: "*fp8e4nv"}


class CpuWorkspace(spaces.SymmMemWorkspace):
    """A workspace in CPU memory; `peers` are the buffers of all ranks."""

    def __init__(self, rank, world, hidden, dtype, tokens=(256, 1024, 8192), outputs=1, multiprocessors=132):
        self.rank, self.world_size, self.hidden, self.dtype = rank, world, hidden, dtype
        self.group_name, self.timeout_s, self.device = "simulated", 5.0, torch.device("cpu")
        self.multiprocessors = multiprocessors
        self.layout = Layout(world, hidden, dtype.itemsize, *tokens, outputs)
        self.ctl = torch.zeros(CTL_WORDS, dtype=torch.int64)
        self.use(torch.empty(0, dtype=torch.uint8))

    def use(self, buffer):
        self._buffer = buffer
        self._outputs = self._output_tensors() if buffer is not None and len(buffer) else []

    def check(self, synchronize=False):
        pass


def caught_launch(call):
    """The launch that the host would run."""
    seen = []
    original, symm_mem.run = symm_mem.run, lambda ws, launch: seen.append(launch)
    try:
        call()
    finally:
        symm_mem.run = original
    assert len(seen) == 1
    return seen[0]


def compiled(launch):
    """The launch's kernel, compiled for sm_90."""
    return compiled_with(symm_mem.kernel(launch.kernel), (*launch.tensors, *launch.arguments), launch.options)


def compiled_with(fn, arguments, options):
    """A kernel compiled for sm_90 with these arguments."""
    signature, constants, attributes = {}, {}, {}
    for i, (param, value) in enumerate(zip(fn.params, arguments, strict=True)):
        if param.is_constexpr or value is None:
            signature[param.name], constants[param.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[param.name] = POINTERS[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            # Only numbers that may be missing have no type of their own.
            signature[param.name] = param.annotation_type or ("fp32" if type(value) is float else "i32")
            assert param.annotation_type in ("i32", "i64", "fp32") or type(value) in (int, float)
    source = ASTSource(fn=fn, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
