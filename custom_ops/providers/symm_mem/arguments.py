"""Check the arguments of `symm_mem` calls and convert tensors to what the kernels read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fusewire.custom_ops.ops.norms import NormSpec, check_norm_args
from fusewire.custom_ops.ops.quantization import (
    ALIGNED_ROWS,
    COLUMNS,
    FP8,
    ROWS,
    check_quant_args,
    parse_quant,
    scales_shape,
)
from fusewire.custom_ops.providers.alignment import aligned
from fusewire.custom_ops.providers.symm_mem.workspace import SymmMemWorkspace
from fusewire.errors import ArgumentError, WorkspaceError

# The kernels' numbers for dtypes (kernels.rows.BF16, FP16, FP32).
KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


class Norms(NamedTuple):
    """A call's norm, its inner norm or None, and whether both are batch-invariant.

    The inner norm is of the sum, before the residual add (Gemma 2 and 3, GLM-4).
    """

    norm: NormSpec
    inner: NormSpec | None
    batch_invariant: bool


@dataclass(frozen=True)
class Quantization:
    """How a call quantises the norm to FP8.

    Attributes:
        quant: the text of a `fusewire.custom_ops.ops.quantization.QuantSpec`.
        scale: its given scale or bound, one fp32 number, or None.
        with_norm: whether the norm is a result too.
    """

    quant: str
    scale: Tensor | None
    with_norm: bool


class QuantTensors(NamedTuple):
    """The arguments of the kernels that belong to a quantisation."""

    quant: str
    scale: Tensor | None
    quantized_out: Tensor
    scales_out: Tensor | None


def unsupported_quant(quant: str) -> str | None:
    """Return why the kernels cannot quantise so, or None."""
    spec = parse_quant(quant)
    if spec.power_of_two:
        return "a scale that is a power of two: symm_mem's kernels do not compute log2 as PyTorch does"
    if not spec.clamp:
        return "a cast to FP8 without a clamp: symm_mem's kernels clamp, and versions of PyTorch differ"
    return None


def quant_tensors(
    quantization: Quantization | None, x: Tensor, quantized_out: Tensor | None = None
) -> QuantTensors | None:
    """Check the arguments of a quantisation and return its tensors.

    Args:
        quantized_out: memory for the quantised norm, of x's shape; new if None.

    Raises:
        ArgumentError: they do not fit x, or the kernels cannot quantise so.
    """
    if quantization is None:
        return None
    check_quant_args(x, quantization.scale, quantization.quant)
    reason = unsupported_quant(quantization.quant)
    if reason is None and x.dtype == torch.float32:
        # Compilers join products and sums otherwise than in the kernel without FP8.
        reason = "x is float32: its norm could have other last bits than the plain kernel's"
    if reason:
        raise ArgumentError(f"{reason}; quantise the norm in a call of its own")
    if quantized_out is None:
        quantized_out = torch.empty(x.shape, dtype=FP8, device=x.device)
    return QuantTensors(quantization.quant, quantization.scale, quantized_out, new_scales(x, quantization.quant))


def new_scales(x: Tensor, quant: str) -> Tensor | None:
    """Return memory for the scales of a quantised norm of x, or None if its scale is given."""
    spec, shape = parse_quant(quant), scales_shape(x, quant)
    if spec.static:
        return None
    if spec.layout == ROWS:
        return x.new_empty(shape, dtype=torch.float32)
    tokens, groups = shape
    height = tokens if spec.layout == COLUMNS else -(-tokens // ALIGNED_ROWS) * ALIGNED_ROWS
    return x.new_empty((groups, height), dtype=torch.float32)[:, :tokens].t()


def check_call(ws: SymmMemWorkspace, x: Tensor, norm: NormSpec, capacity: int, kind: str) -> tuple[Tensor, int]:
    """Check the arguments that all kinds of calls share.

    Args:
        capacity: the most tokens of such a call.
        kind: the kind of call, for error messages.

    Returns:
        x, contiguous and aligned, and its number of tokens.

    Raises:
        ArgumentError: the arguments do not fit each other or the workspace.
        PeerTimeoutError: a peer did not take part in an earlier call.
        WorkspaceError: the workspace is closed.
    """
    if ws.closed:
        raise WorkspaceError("the workspace is closed; make a new one")
    ws.check()
    check_norm_args(x, norm)
    if x.dtype != ws.dtype or x.shape[-1] != ws.hidden or x.device != ws.device:
        raise ArgumentError(
            f"x is {x.dtype} (..., {x.shape[-1]}) on {x.device}, but the workspace is for "
            f"{ws.dtype} (..., {ws.hidden}) on {ws.device}; make one for x"
        )
    tokens = x.numel() // ws.hidden
    if tokens > capacity:
        raise ArgumentError(
            f"x has {tokens} tokens, but this workspace takes at most {capacity} in a {kind} call; make a larger one"
        )
    return aligned(x), tokens


def check_inner(inner: NormSpec | None, residual: Tensor | None, x: Tensor) -> None:
    """Raise ArgumentError if an inner norm does not fit x, or if there is no residual."""
    if inner is None:
        return
    if residual is None:
        raise ArgumentError(
            "an inner norm needs a residual, to which the normalised sum is added; without one leave inner None"
        )
    try:
        check_norm_args(x, inner)
    except ArgumentError as error:
        raise ArgumentError(f"inner norm: {error}") from error


def residual_like(t: Tensor | None, x: Tensor) -> Tensor | None:
    """Return the complete residual, contiguous and aligned."""
    if t is None:
        return None
    if t.shape != x.shape or t.dtype != x.dtype or t.device != x.device:
        raise ArgumentError(
            f"the residual is {t.dtype} {list(t.shape)} on {t.device}; it must be like x: "
            f"{x.dtype} {list(x.shape)} on {x.device}"
        )
    return aligned(t)


def residual_shard(t: Tensor | None, x: Tensor, shard: int, owned: int, ws: SymmMemWorkspace) -> Tensor | None:
    """Return this rank's rows of the residual, contiguous and aligned."""
    if t is None:
        return None
    fits = t.dim() == 2 and owned <= t.shape[0] <= shard and t.shape[1] == ws.hidden
    if not fits or t.dtype != x.dtype or t.device != x.device:
        raise ArgumentError(
            f"the residual is {t.dtype} {list(t.shape)} on {t.device}; rank {ws.rank}'s shard for "
            f"x {list(x.shape)} must be {x.dtype} [{shard}, {ws.hidden}] on {x.device} (its rows "
            f"{ws.rank * shard} to {ws.rank * shard + owned})"
        )
    return aligned(t)


def output_like(t: Tensor | None, like: Tensor, x: Tensor, name: str) -> Tensor:
    """Return t as a result tensor of like's shape, or a new tensor if t is None."""
    if t is None:
        return torch.empty_like(like, memory_format=torch.contiguous_format)
    if t.shape != like.shape or t.dtype != x.dtype or t.device != x.device:
        raise ArgumentError(f"{name} must be {x.dtype} {list(like.shape)} on {x.device}, not {t.dtype} {list(t.shape)}")
    if t.numel() and (not t.is_contiguous() or t.data_ptr() % 16 or t.data_ptr() == x.data_ptr()):
        raise ArgumentError(f"{name} must be contiguous, on a 16-byte boundary, and not x itself")
    return t


def weight_for(weight: Tensor | None) -> Tensor | None:
    """Return the weight, contiguous, aligned and of a dtype that the kernels read."""
    if weight is None:
        return None
    return aligned(weight if weight.dtype in KINDS else weight.float())
