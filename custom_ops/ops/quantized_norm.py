"""All-reduce + residual + RMSNorm with the norm quantised to FP8, and with a sharded residual.

With a sharded residual the rank that owns a row quantises it, and only FP8 rows and their scales
are gathered: half the bytes of bf16 rows. The result is the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusewire.custom_ops.ops.all_reduce_norm import (
    all_reduce_rms_norm,
    all_reduce_sum,
    check_group_name,
    no_backward,
    resolve_group,
)
from fusewire.custom_ops.ops.norms import SCALE_THEN_ROUND, NormSpec, add_normalize, check_norm_args, normalize
from fusewire.custom_ops.ops.quantization import (
    FP8,
    ROWS,
    check_quant_args,
    fake_quantized,
    in_layout,
    parse_quant,
    quantize,
    scales_shape,
)
from fusewire.custom_ops.ops.registration import register_autograd, register_op
from fusewire.custom_ops.ops.sharded_norm import (
    NO_INNER,
    AddNorm,
    check_sharded,
    gather_rows,
    own_norm,
    rows_per_rank,
)
from fusewire.errors import ArgumentError

_Results = tuple[Tensor, Tensor, Tensor, Tensor]


def _check(x: Tensor, residual: Tensor | None, *rest: Any) -> None:
    inner = NormSpec(*rest[4:8])
    check_norm_args(x, NormSpec(*rest[:4]), residual)
    check_group_name(rest[-1])
    if inner.form != NO_INNER:
        check_norm_args(x, inner)
        if residual is None:
            raise ArgumentError("an inner norm is followed by the residual add; pass the residual")
    check_quant_args(x, *rest[8:10])


def _fake(x: Tensor, *rest: Any) -> _Results:
    return _fake_results(x, x.shape, rest)


def _fake_results(x: Tensor, residual_shape: Any, rest: tuple[Any, ...]) -> _Results:
    quant, with_norm = rest[-3:-1]
    return (
        torch.empty(x.shape if with_norm else (0,), dtype=x.dtype, device=x.device),
        torch.empty(residual_shape, dtype=x.dtype, device=x.device),
        *fake_quantized(x, quant),
    )


def _base_args(a: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*a[:6], a[-1]) if a[9] == NO_INNER else (a[0], None, *a[6:10], a[-1])


@register_op(fake=_fake, check=_check, derives_from=(all_reduce_rms_norm, _base_args))
def all_reduce_rms_norm_quantized(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float = 1e-6,
    weight_bias: float = 0.0,
    form: str = SCALE_THEN_ROUND,
    inner_weight: Tensor | None = None,
    inner_eps: float = 1e-6,
    inner_weight_bias: float = 0.0,
    inner_form: str = NO_INNER,
    scale: Tensor | None = None,
    quant: str = "",
    with_norm: bool = True,
    group_name: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute `all_reduce_rms_norm` and quantise the norm to FP8. A collective.

        norm, r = all_reduce_rms_norm(...), or with an inner norm all_reduce_sandwich_norm(...)
        quantised, scales = quantize(norm, scale, quant); see fusewire.custom_ops.ops.quantization

    The provider that serves `all_reduce_rms_norm` serves it: with one kernel for the whole if it
    has one, else with its own norm and then native quantisation. Both give the same bits.

    Args:
        x, residual, weight, eps, weight_bias, form: as in `all_reduce_rms_norm`.
        inner_weight, inner_eps, inner_weight_bias, inner_form: a norm between the sum and the
            residual add, as in `all_reduce_sandwich_norm`; inner_form "" for none.
        scale: one fp32 number, equal on all ranks: a static quantisation's scale, else the upper
            bound of the largest absolute values, or None.
        quant: the text of a QuantSpec, which says how to quantise.
        with_norm: whether the norm is returned too.
        group_name: the process group's name.

    Returns:
        (norm, r, quantised, scales): the first two as `all_reduce_rms_norm`, but norm has shape
        (0,) without `with_norm`; quantised float8_e4m3fn of x's shape; scales fp32 (..., 1) for
        each token, (..., hidden / 128) for groups, (0,) if static.

    Raises:
        ArgumentError: shapes, dtypes or devices do not fit, or `quant` describes no quantisation.
        ProcessGroupError: there is no such group.
        TrainingError: in backward; the operator is for inference.
    """
    if not torch.compiler.is_compiling() and type(x) in (Tensor, torch.nn.Parameter):
        resolve_group(group_name)
    summed = all_reduce_sum(x, group_name)
    if inner_form != NO_INNER:
        summed = normalize(summed, NormSpec(inner_weight, inner_eps, inner_weight_bias, inner_form))
    norm, added = add_normalize(summed, residual, NormSpec(weight, eps, weight_bias, form))
    return with_quantized(norm, added, scale, quant, with_norm)


def with_quantized(
    norm: Tensor,
    added: Tensor,
    scale: Tensor | None,
    quant: str,
    with_norm: bool,
    quantizer: Callable[[Tensor, Tensor | None, str], tuple[Tensor, Tensor]] = quantize,
) -> _Results:
    """Return the results of a quantised operator from those of the plain one."""
    return (norm if with_norm else norm.new_empty((0,)), added, *quantizer(norm, scale, quant))


def _check_sharded(x: Tensor, residual: Tensor | None, *rest: Any) -> None:
    check_sharded(x, residual, *rest)
    check_quant_args(x, *rest[8:10])


def _fake_sharded(x: Tensor, *rest: Any) -> _Results:
    size = rows_per_rank(x.numel() // x.shape[-1], resolve_group(rest[-1]).size())
    return _fake_results(x, (size, x.shape[-1]), rest)


@register_op(fake=_fake_sharded, check=_check_sharded, derives_from=(all_reduce_rms_norm, lambda a: (*a[:6], a[-1])))
def all_reduce_rms_norm_quantized_sharded(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float = 1e-6,
    weight_bias: float = 0.0,
    form: str = SCALE_THEN_ROUND,
    inner_weight: Tensor | None = None,
    inner_eps: float = 1e-6,
    inner_weight_bias: float = 0.0,
    inner_form: str = NO_INNER,
    scale: Tensor | None = None,
    quant: str = "",
    with_norm: bool = True,
    group_name: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute `all_reduce_rms_norm_quantized` with the residual sharded by rows. A collective.

    Each rank quantises the rows that it owns, and FP8 rows and scales are gathered.

    Args:
        x, residual, weight, eps, weight_bias, form: as in `all_reduce_rms_norm_sharded`.
        inner_weight, inner_eps, inner_weight_bias, inner_form: likewise.
        scale, quant, with_norm: as in `all_reduce_rms_norm_quantized`.
        group_name: the process group's name.

    Returns:
        (norm, r, quantised, scales): as `all_reduce_rms_norm_quantized`, complete on every rank,
        but r is this rank's shard (S, hidden), zeros past the rows it owns.

    Raises:
        ArgumentError: shapes, dtypes or devices do not fit, or `quant` describes no quantisation.
        ProcessGroupError: there is no such group.
        TrainingError: in backward; the operator is for inference.
    """
    norm = NormSpec(weight, eps, weight_bias, form)
    inner = NormSpec(inner_weight, inner_eps, inner_weight_bias, inner_form)
    return compute_quantized_sharded(add_normalize, x, residual, norm, inner, scale, quant, with_norm, group_name)


def compute_quantized_sharded(
    add_norm: AddNorm,
    x: Tensor,
    residual: Tensor | None,
    norm: NormSpec,
    inner: NormSpec,
    scale: Tensor | None,
    quant: str,
    with_norm: bool,
    group_name: str,
    quantizer: Callable[[Tensor, Tensor | None, str], tuple[Tensor, Tensor]] = quantize,
) -> _Results:
    """Compute `all_reduce_rms_norm_quantized_sharded` with reduce-scatter and all-gather.

    A collective. Args: as of `sharded_norm.compute_sharded` and of the operator.
    """
    normed, shard = own_norm(add_norm, x, residual, norm, inner, group_name)
    if with_norm:  # the norm's rows travel anyway, so every rank quantises them itself
        return with_quantized(gather_rows.native(normed, x, group_name), shard, scale, quant, True, quantizer)
    spec = parse_quant(quant)
    quantized, scales = quantizer(normed, scale, str(dataclasses.replace(spec, layout=ROWS)))
    # Collectives know bytes, not FP8.
    quantized = gather_rows.native(quantized.view(torch.uint8), x, group_name).view(FP8)
    if not spec.static:
        gathered = gather_rows.native(scales, x.new_empty(scales_shape(x, quant)), group_name)
        scales = in_layout(gathered, spec.layout)
    return normed.new_empty((0,)), shard, quantized, scales


for _op in (all_reduce_rms_norm_quantized, all_reduce_rms_norm_quantized_sharded):
    register_autograd(_op, no_backward(_op.name))
