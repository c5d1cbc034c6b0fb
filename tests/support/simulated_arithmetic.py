"""Values of Triton's interpreter as arrays, and what the interpreter computes otherwise than a GPU.

Only for a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import numpy as np
import torch
import triton.language as tl

from .simulated_calls import BF16, FP16, FP32


def array_of(value):
    return np.asarray(value.handle.data if isinstance(value, tl.tensor) else getattr(value, "value", value))


def make_tensor(flat, shape, dtype):
    from triton.runtime.interpreter import TensorHandle

    data = np.asarray(flat).reshape(shape or [1])
    return tl.tensor(TensorHandle(data, dtype), tl.block_type(dtype, shape) if shape else dtype)


def shape_of(*values):
    shapes = [list(v.handle.data.shape) for v in values if isinstance(v, tl.tensor) and v.type.is_block()]
    return max(shapes, default=[])


def _rounded(value, kind):
    return torch.from_numpy(np.array(array_of(value), np.float32)).to((BF16, FP16, FP32)[int(kind)])


def bits16(value, KIND):
    return make_tensor(
        _rounded(value, KIND).view(torch.int16).numpy().astype(np.int32) & 0xFFFF, shape_of(value), tl.int32
    )


def rounded(value, KIND):  # the interpreter truncates to bf16
    return make_tensor(_rounded(value, KIND).float().numpy(), shape_of(value), tl.float32)


def group_largest(bits, LANES):  # lanes of a warp exchange them, which run one by one here
    return make_tensor(np.repeat(array_of(bits).reshape(-1, LANES).max(axis=1), LANES), shape_of(bits), tl.int32)


def fused(a, b, c):  # the interpreter rounds twice
    exact = array_of(a).astype(np.float64) * array_of(b) + array_of(c)
    return make_tensor(exact.astype(np.float32), shape_of(a, b, c), tl.float32)
