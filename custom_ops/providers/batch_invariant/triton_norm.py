"""Batch-invariant RMSNorm and add + RMSNorm on GPUs: one Triton kernel for both.

The kernel spells out the sum of squares as a fixed tree of additions (`chunk_of`), because the
order of a compiler's reduction follows the data layout. A row's bits therefore depend on the row
alone: not on other rows, alignment, number of warps, residual dtype or Triton version. Fused
multiply-adds are off for the same reason. The tree is cheap: its first levels are within a thread,
the next within a warp, and the last go through shared memory once.

Triton is imported at the first use.
"""

from __future__ import annotations

import functools
import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusewire.custom_ops.ops.norms import (
    SCALE_THEN_ROUND,
    TRITON_NORM,
    NormSpec,
    check_norm_args,
    fused_add_rms_norm,
    keeps_wide_sum,
    rms_norm,
    rounds_first,
)
from fusewire.custom_ops.ops.registry import YES, Support
from fusewire.errors import NoProviderError, TrainingError

PROVIDER = TRITON_NORM
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MIN_CAPABILITY = (8, 0)
COMPILE_OPTIONS = {"enable_fp_fusion": False}
_MAX_CHUNK = 16384
_WARPS = {8192: 8, 16384: 8}  # by tile; 4 for smaller ones
_TILE_PER_PROGRAM = 1024  # a program takes several narrower rows and reduces each separately
_LOCK = threading.Lock()
tl: Any = None  # triton.language, once `kernel` was called


def chunk_of(hidden: int) -> int:
    """Return the number of values of a chunk, in which a row of `hidden` squares is summed.

    A row is cut into chunks, the last padded with zeros. In a chunk neighbours are added pair by
    pair until one value is left; chunks are added from left to right. The kernels of `symm_mem` add
    in this order too.
    """
    return min(1 << max(hidden - 1, 0).bit_length(), _MAX_CHUNK)


def _tree_sum(v: tl.tensor, ROWS: tl.constexpr, WIDTH: tl.constexpr, GATHER: tl.constexpr) -> tl.tensor:
    # Only sums of two elements: no data layout can change their order.
    if (WIDTH > 1) & (WIDTH <= GATHER):
        # The remaining values are in different warps or far apart in a thread. `split` needs both
        # operands in one thread, so all these levels together cost one trip through shared memory
        # instead of one each.
        left, right = tl.split(tl.reshape(v, (ROWS, WIDTH // 2, 2)))
        v = _tree_sum(left + right, ROWS, WIDTH // 2, GATHER)
    elif WIDTH > 1:
        pairs = tl.sum(tl.reshape(v, (ROWS, WIDTH // 2, 2)), axis=2)
        v = _tree_sum(pairs, ROWS, WIDTH // 2, GATHER)
    return v


def _load_summed(x_ptrs: tl.tensor, residual_ptrs: tl.tensor, mask: tl.tensor, WIDE_SUM: tl.constexpr) -> tl.tensor:
    value = tl.load(x_ptrs, mask=mask, other=0.0)
    if residual_ptrs is not None:
        residual = tl.load(residual_ptrs, mask=mask, other=0.0)
        total = value.to(tl.float32) + residual.to(tl.float32)
        value = total if WIDE_SUM else total.to(value.dtype)
    return value


def _scaled(
    value: tl.tensor,
    dtype: tl.constexpr,
    rstd: tl.tensor,
    weight_ptrs: tl.tensor,
    mask: tl.tensor,
    weight_bias: tl.tensor,
    ADD_BIAS: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
) -> tl.tensor:
    normed = value.to(tl.float32) * rstd
    if weight_ptrs is not None:
        weight = tl.load(weight_ptrs, mask=mask, other=0.0)
        scale = weight.to(tl.float32)
        if ADD_BIAS:
            scale = scale + weight_bias
        if ROUND_FIRST:
            normed = normed.to(dtype).to(tl.float32)
            scale = scale.to(weight.dtype).to(tl.float32)
        normed = normed * scale
    return normed.to(dtype)


def _rms_norm_rows(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    summed_ptr: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    n_rows: tl.tensor,
    eps: tl.tensor,
    weight_bias: tl.tensor,
    HIDDEN: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    ADD_BIAS: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    WIDE_SUM: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, TILE)[None, :]
    x_ptr += row * (x_stride * STRIDE_UNIT)
    norm_ptr += row * HIDDEN
    if residual_ptr is not None:
        residual_ptr += row * (residual_stride * STRIDE_UNIT)
        summed_ptr += row * HIDDEN
    # One value per 512 bytes, which is what a warp reads with 16-byte accesses.
    GATHER: tl.constexpr = TILE * x_ptr.dtype.element_ty.primitive_bitwidth // 4096
    in_batch = row < n_rows
    total = tl.zeros((ROWS, 1), tl.float32)
    dtype = x_ptr.dtype.element_ty
    value = tl.zeros((ROWS, TILE), tl.float32 if WIDE_SUM else dtype)
    for start in range(0, HIDDEN, TILE):
        at = start + column
        mask = in_batch & (at < HIDDEN)
        residual_at = None if residual_ptr is None else residual_ptr + at
        value = _load_summed(x_ptr + at, residual_at, mask, WIDE_SUM)
        if summed_ptr is not None:
            tl.store(summed_ptr + at, value.to(dtype), mask=mask)
        wide = value.to(tl.float32)
        total = total + _tree_sum(wide * wide, ROWS, TILE, GATHER)
    # Correctly rounded, unlike rsqrt, so that the PyTorch provider gets the same bits.
    rstd = tl.div_rn(1.0, tl.sqrt_rn(total * (1.0 / HIDDEN) + eps))
    for start in range(0, HIDDEN, TILE):
        at = start + column
        mask = in_batch & (at < HIDDEN)
        if HIDDEN > TILE:
            residual_at = None if residual_ptr is None else residual_ptr + at
            value = _load_summed(x_ptr + at, residual_at, mask, WIDE_SUM)
        weight_at = None if weight_ptr is None else weight_ptr + at
        normed = _scaled(value, dtype, rstd, weight_at, at < HIDDEN, weight_bias, ADD_BIAS, ROUND_FIRST)
        tl.store(norm_ptr + at, normed, mask=mask)


@functools.cache
def kernel() -> Any:
    """Return the Triton kernel; raises what importing Triton raises if it is missing or broken."""
    import triton
    import triton.language

    # Decorated here because importing this module must not import Triton. They replace the module's
    # functions because Triton looks up the names that a kernel uses in its module.
    scope = globals()
    with _LOCK:
        if tl is None:
            for function in (_tree_sum, _load_summed, _scaled):
                scope[function.__name__] = triton.jit(function)
            unspecialized = ["x_stride", "residual_stride", "n_rows"]
            scope["_rms_norm_rows"] = triton.jit(_rms_norm_rows, do_not_specialize=unspecialized)
            scope["tl"] = triton.language
    return _rms_norm_rows


class _Plan(NamedTuple):
    tile: int
    rows: int
    warps: int


@functools.lru_cache(maxsize=256)
def _plan(hidden: int) -> _Plan:
    """Return the kernel's tiling, which depends only on the hidden size (not on the rows)."""
    tile = chunk_of(hidden)
    return _Plan(tile, max(1, _TILE_PER_PROGRAM // tile), _WARPS.get(tile, 4))


@functools.cache
def _interpreted() -> bool:
    """Return whether the kernel runs in Triton's interpreter (TRITON_INTERPRET), on the CPU."""
    import triton

    return not isinstance(kernel(), triton.JITFunction)


def availability() -> Support:
    """Return whether this machine can run the kernel."""
    try:
        interpreted = _interpreted()
    except Exception as error:  # a broken installation raises more than ImportError
        return Support.no(f"triton cannot be used: {type(error).__name__}: {error}")
    if interpreted:
        return YES
    if torch.version.hip is not None:
        return Support.no("this torch is built for ROCm; the kernel has been checked on NVIDIA GPUs only")
    if not torch.cuda.is_available():
        return Support.no("torch sees no CUDA GPU")
    found = torch.cuda.get_device_capability()
    text = "the GPU has compute capability {}.{}; {}.{} or newer is needed".format(*found, *_MIN_CAPABILITY)
    return Support.all_of((found >= _MIN_CAPABILITY, text))


def _supports(x: Tensor, residual: Tensor | None, weight: Tensor | None) -> Support:
    on_device = x.device.type == "cuda" or (x.device.type == "cpu" and _interpreted())
    if not on_device:
        return Support.no(f"x is on {x.device}; the Triton kernel runs on CUDA GPUs")
    for name, tensor in (("x", x), ("residual", residual), ("weight", weight)):
        if tensor is not None and tensor.dtype not in _DTYPES:
            return Support.no(f"the {name} is {tensor.dtype}; the kernel takes bfloat16, float16 and float32")
    return YES


def _rows(tensor: Tensor, hidden: int) -> Tensor:
    """Return the tensor as (rows, hidden) with contiguous rows; copy only if strides require it."""
    rows = tensor if tensor.dim() == 2 else tensor.reshape(-1, hidden)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _launch(x: Tensor, residual: Tensor | None, norm: NormSpec) -> tuple[Tensor, Tensor | None]:
    weight, eps, weight_bias, form = norm
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    summed = None if residual is None else torch.empty_like(out)
    if out.numel() == 0:
        return out, summed
    hidden = x.shape[-1]
    x = _rows(x, hidden)
    x_stride, residual_stride, n_rows = x.stride(0), 0, x.shape[0]
    if residual is not None:
        residual = _rows(residual, hidden)
        residual_stride = residual.stride(0)
    if weight is not None:
        weight = weight.contiguous()
    # Strides in units of 8 values let the compiler assume that 16-byte accesses are aligned.
    unit = 8 if x_stride % 8 == 0 and residual_stride % 8 == 0 else 1
    plan = _plan(hidden)
    arguments = (x, residual, weight, out, summed, x_stride // unit, residual_stride // unit, n_rows)
    options = (
        *(hidden, plan.tile, plan.rows, unit),
        *(weight is not None and weight_bias != 0, weight is not None and rounds_first(form)),
        residual is not None and keeps_wide_sum(form, x.dtype),
    )
    launcher = kernel()[(-(-n_rows // plan.rows),)]
    # Triton launches on the current device, which may differ from the tensors' device.
    with torch.cuda.device_of(x):
        launcher(*arguments, float(eps), float(weight_bias), *options, num_warps=plan.warps, **COMPILE_OPTIONS)
    return out, summed


def rms_norm_batch_invariant(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    weight_bias: float = 0.0,
    residual: Tensor | None = None,
    form: str = SCALE_THEN_ROUND,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the RMSNorm of x, or of x + residual, on a GPU, batch-invariant, for inference.

    A row's bits depend only on the row, the weight and the scalar arguments, and with a residual
    equal those of the addition (unrounded in the forms of a wide sum) followed by the norm. The
    first call with new dtypes, hidden size or options compiles: make it before capturing a CUDA
    graph. Later calls only allocate and launch.

    Args:
        x: (..., hidden), bfloat16, float16 or float32, any number of rows including 0. Rows may be
            strided; a last dimension that is not contiguous is copied.
        weight: (hidden,), any of these dtypes, or None for no multiplication.
        eps, weight_bias, form: as in `fusewire.rms_norm`.
        residual: of x's shape, any of these dtypes; added in fp32 and rounded once to x's dtype.

    Returns:
        The norm, contiguous, of x's shape and dtype; with a residual (norm, x + residual).

    Raises:
        ArgumentError: shapes, dtypes or devices do not fit together.
        NoProviderError: the kernel cannot run on this machine or on these tensors.
        TrainingError: a gradient is needed; `fusewire.rms_norm` supports that.
    """
    spec = NormSpec(weight, eps, weight_bias, form)
    check_norm_args(x, spec, residual)
    support = availability() and _supports(x, residual, weight)
    if not support:
        raise NoProviderError(
            f"rms_norm_batch_invariant cannot run: {support.reason}. fusewire.rms_norm and "
            "fusewire.fused_add_rms_norm with policy='torch_batch_invariant' run anywhere, with "
            "the same bits"
        )
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, residual)):
        raise TrainingError(
            "rms_norm_batch_invariant is for inference; call it under torch.no_grad(), or call "
            f"fusewire.rms_norm or fusewire.fused_add_rms_norm with policy={PROVIDER!r}: they have "
            "a backward"
        )
    norm, summed = _launch(x, residual, spec)
    return norm if summed is None else (norm, summed)


@rms_norm.register_impl(
    PROVIDER,
    supported=availability,
    supports_args=lambda x, weight, *_: _supports(x, None, weight),
    batch_invariant=True,
)
def _rms_norm(x: Tensor, *norm: Any) -> Tensor:
    return _launch(x, None, NormSpec(*norm))[0]


@fused_add_rms_norm.register_impl(
    PROVIDER,
    supported=availability,
    supports_args=lambda x, residual, weight, *_: _supports(x, residual, weight),
    batch_invariant=True,
)
def _fused_add_rms_norm(x: Tensor, residual: Tensor, *norm: Any) -> tuple[Tensor, Tensor]:
    out, summed = _launch(x, residual, NormSpec(*norm))
    assert summed is not None
    return out, summed
