"""Assemble the arguments of `symm_mem` kernels, in the order that all kernels share."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from fusewire.custom_ops.ops.norms import NormSpec, keeps_wide_sum, rounds_first
from fusewire.custom_ops.providers.symm_mem.arguments import KINDS, Norms, QuantTensors, weight_for
from fusewire.custom_ops.providers.symm_mem.launch_config import KernelTensors, Launch, LaunchConfig
from fusewire.custom_ops.providers.symm_mem.workspace import SymmMemWorkspace

NOTHING = LaunchConfig(programs=0, warps=1, block=32)  # a call without tokens
_NO_WEIGHT = -1


class Call(NamedTuple):
    """The checked arguments of a call.

    Attributes:
        tensors: x, the residual, and the memory for the norm and the residual.
        quant: how the norm is quantised, and the memory for that.
    """

    tensors: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
    norms: Norms
    quant: QuantTensors | None


def assemble(
    ws: SymmMemWorkspace,
    kernel: str,
    config: LaunchConfig,
    call: Call,
    numbers: tuple[int, ...],
    quant_at: int | None,
    tiles: tuple[Any, ...],
    outputs: tuple[int | None, int | None, int | None] = (None, None, None),
) -> Launch:
    """Return the launch of a kernel.

    Args:
        numbers: counts and byte offsets.
        quant_at: the byte offset of what a quantisation exchanges.
        tiles: the compile-time constants that belong to one kernel.
        outputs: the output buffers of the first three results.
    """
    (x, residual, norm_out, residual_out), (norm, inner, batch_invariant), quant = call
    weight, inner_weight = weight_for(norm.weight), weight_for(inner.weight if inner else None)
    # Floats, because Triton derives the types of these two from their values.
    inner_numbers = (None, None) if inner is None else (float(inner.eps), _bias(inner))
    constants = (
        *(ws.world_size, ws.hidden, KINDS[ws.dtype], _kind(weight)),
        *(residual is not None, residual_out is not None),
        *(inner is not None, _kind(inner_weight), inner is not None and rounds_first(inner.form)),
        *(rounds_first(norm.form), residual is not None and keeps_wide_sum(norm.form, ws.dtype)),
        batch_invariant,
        *(norm_out is not None, "" if quant is None else quant.quant),
    )
    results = 2 if quant is None else 4
    return Launch(
        kernel,
        config,
        KernelTensors(ws.ctl, x, residual, weight, inner_weight, norm_out, residual_out, *(quant or ("",))[1:]),
        (*numbers, norm.eps, _bias(norm), *inner_numbers, quant_at if quant else None, *constants, *tiles),
        (*outputs, None)[:results],
        batch_invariant,
    )


def _bias(norm: NormSpec) -> float:
    """Return what kernels add to the weight; adding -0.0 keeps a weight of -0.0."""
    return float(norm.weight_bias) or -0.0


def _kind(weight: Tensor | None) -> int:
    return _NO_WEIGHT if weight is None else KINDS[weight.dtype]
