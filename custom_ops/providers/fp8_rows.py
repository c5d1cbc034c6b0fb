"""Quantise rows to FP8 on NVIDIA GPUs in one kernel, with native's bits.

It follows a norm where no kernel computes both, in place of the eight kernels or so of plain
PyTorch. Since its bits are native's, each rank may use it or not.
"""

from __future__ import annotations

import importlib.util
import threading
from typing import Any

import torch
from torch import Tensor

from fusewire.custom_ops._torch_private import is_capturing
from fusewire.custom_ops._triton_private import shared_cache
from fusewire.custom_ops.coordination.log import log_line
from fusewire.custom_ops.ops.quantization import FP8, KERNELS, quantize
from fusewire.custom_ops.providers.symm_mem.arguments import KINDS, new_scales, unsupported_quant

MAX_HIDDEN = 16384
_LEAST_CAPABILITY = (8, 9)  # that converts to FP8
_Results = tuple[Tensor, Tensor]

_passed: dict[tuple[Any, ...], bool] = {}  # by what a kernel is compiled for, and the GPU
_testing = threading.Lock()


def quantize_rows(norm: Tensor, scale: Tensor | None, quant: str) -> _Results | None:
    """Return `quantize(norm, scale, quant)` from one kernel, or None if it cannot run.

    The first call of a kind compares with native on this GPU. Not possible while a CUDA graph is
    captured: native then serves. Thread-safe.
    """
    if not _fits(norm, quant):
        return None
    key = norm.device.index, norm.dtype, norm.shape[-1], quant, scale is not None
    if key not in _passed:
        if is_capturing():
            return None
        with _testing:
            if key not in _passed:  # another thread may have tested it meanwhile
                _passed[key] = _equals_native(norm, scale, quant)
    return _launch(norm, scale, quant) if _passed[key] else None


def _fits(norm: Tensor, quant: str) -> bool:
    if norm.device.type != "cuda" or torch.version.hip is not None or norm.dtype not in KINDS or not norm.numel():
        return False
    hidden = norm.shape[-1]
    aligned = norm.is_contiguous() and not norm.data_ptr() % 16 and hidden % 8 == 0 and hidden <= MAX_HIDDEN
    able = torch.cuda.get_device_capability(norm.device) >= _LEAST_CAPABILITY
    return aligned and able and unsupported_quant(quant) is None and importlib.util.find_spec("triton") is not None


def launch_of(
    norm: Tensor, scale: Tensor | None, quant: str
) -> tuple[tuple[Any, ...], int, int, Tensor, Tensor | None]:
    """Return the kernel's arguments, its blocks and warps, and the results."""
    hidden = norm.shape[-1]
    packets = hidden * norm.itemsize // 16
    block = max(32, 1 << (packets - 1).bit_length())
    quantized, scales = torch.empty(norm.shape, dtype=FP8, device=norm.device), new_scales(norm, quant)
    rows = norm.numel() // hidden
    arguments = (norm, scale, quantized, scales, rows, hidden, KINDS[norm.dtype], quant, block)
    return arguments, rows, min(8, block // 32), quantized, scales


def kernel() -> Any:
    """Return the kernel. Imports Triton."""
    from fusewire.custom_ops.providers.symm_mem.kernels.quantize_rows import quantize_rows_kernel

    return quantize_rows_kernel


def _launch(norm: Tensor, scale: Tensor | None, quant: str) -> _Results:
    arguments, rows, warps, quantized, scales = launch_of(norm, scale, quant)
    # Triton launches on the current device, which may differ from the tensors' device.
    with torch.cuda.device_of(norm), shared_cache():
        kernel()[(rows,)](*arguments, num_warps=warps, enable_fp_fusion=False)
    return quantized, norm.new_empty((0,), dtype=torch.float32) if scales is None else scales


def _equals_native(norm: Tensor, scale: Tensor | None, quant: str) -> bool:
    """Return whether a kernel gives native's bits, on rows of all kinds; log why not."""
    rows = torch.arange(8 * norm.shape[-1], device=norm.device).view(8, -1).mul(7919).remainder(2001).sub(1000)
    drawn = rows * torch.logspace(-9, 3, 8, device=norm.device)[:, None]
    drawn[0], drawn[1, 0], drawn[2, -1] = 0, torch.inf, torch.nan
    drawn = drawn.to(norm.dtype)
    try:
        pairs = zip(_launch(drawn, scale, quant), quantize(drawn, scale, quant), strict=True)
        wrong = any(not torch.equal(_bits(a), _bits(b)) for a, b in pairs)
        problem = "its results are not native's; please report it" if wrong else ""
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    if problem:
        log_line(f"no kernel quantises ({quant}) on {norm.device}, so plain PyTorch does: {problem}")
    return not problem


def _bits(tensor: Tensor) -> Tensor:
    """Return the bits; all NaNs have the same."""
    wide = tensor.float()
    return torch.where(wide.isnan(), torch.nan, wide).view(torch.int32)


KERNELS.append(quantize_rows)
