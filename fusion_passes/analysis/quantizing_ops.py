"""Read operators that quantise a norm to FP8 (fusewire.patterns.quantizations)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fusewire.custom_ops.ops.quantization import ALIGNED_COLUMNS, ALIGNED_ROWS, COLUMNS, FP8, ROWS, TOKEN, QuantSpec
from fusewire.fusion_passes.analysis.graph import (
    CASTS,
    VIEWS,
    aten,
    cast_source,
    dtype_of,
    is_row_major,
    last_size,
    same_shape,
    same_size,
    value_of,
)
from fusewire.fusion_passes.compiler.mutating_calls import MutatingCall, called_op, read_mutating_call
from fusewire.patterns.quantizations import QUANT_OPS, UNREAD_QUANT_OPS, QuantOp

_EMPTY = (aten.empty.memory_format, aten.empty_strided.default)


@dataclass(frozen=True)
class Quantization:
    """A quantisation of a norm that a graph computes.

    Attributes:
        spec: its arithmetic.
        scale: the node of a static scale, else of the bound of the largest values, or None.
        quantized: the nodes of FP8 values to replace.
        scales: the nodes of a dynamic quantisation's scales to replace.
        call: the call of an operator that computes it, or None if it is written out.
    """

    spec: QuantSpec
    scale: Node | None
    quantized: tuple[Node, ...]
    scales: tuple[Node, ...]
    call: MutatingCall | None = None


class QuantizationRefusal(Exception):
    """Why a quantisation is not read."""


def is_norm(node: Node, norm: Node) -> bool:
    """Return whether a node is a norm, viewed or in fp32."""
    while node is not norm:
        if node.target in CASTS and cast_source(node) is not None:
            if dtype_of(node) not in (torch.float32, dtype_of(norm)):
                return False
        elif node.target not in VIEWS:
            return False
        node = node.args[0]  # type: ignore[assignment]
    return True


def quantizing_op(node: Node) -> str:
    """Return the name of the operator that quantises and that a node calls, or ""."""
    op = called_op(node)
    name = "" if op is None else str(op._schema.name)
    return name if name in QUANT_OPS or name in UNREAD_QUANT_OPS else ""


def read_quantizing_op(node: Node, norm: Node, order: dict[Node, int]) -> Quantization:
    """Return the quantisation of a norm that one call of an operator computes.

    Raises:
        QuantizationRefusal: it is not read.
    """
    name = quantizing_op(node)
    if name in UNREAD_QUANT_OPS:
        raise QuantizationRefusal(f"{name.replace('::', '.')}: {UNREAD_QUANT_OPS[name]}")
    call = read_mutating_call(node)
    if call is None:
        raise QuantizationRefusal(f"{name.replace('::', '.')} writes to a part of a buffer")
    return read_call(call, norm, order)


def read_call(call: MutatingCall, norm: Node, order: dict[Node, int]) -> Quantization:
    """Return the quantisation of a norm that a call of an operator of QUANT_OPS computes.

    Raises:
        QuantizationRefusal: it is not read.
    """
    entry = QUANT_OPS[call.op]
    _check_call(call, entry, norm, order)
    given = call.arguments
    options: dict[str, Any] = {}
    if entry.floor:
        options["amax_floor"] = float(given[entry.floor])
    if not entry.spec.static:
        options["layout"] = _layout(given[entry.scale], entry.spec.kind)
    scale = given[entry.scale] if entry.spec.static else given.get(entry.bound)
    value = value_of(scale)
    if scale is not None and (value is None or value.dtype is not torch.float32 or value.numel() != 1):
        raise QuantizationRefusal("its scale is no float32 tensor with one element")
    written = () if entry.spec.static else call.written[entry.scale]
    spec = dataclasses.replace(entry.spec, **options)
    return Quantization(spec, scale, call.written[entry.result], written, call)


def _check_call(call: MutatingCall, entry: QuantOp, norm: Node, order: dict[Node, int]) -> None:
    """Refuse a call with other options, or of other values, than the operators'."""
    given, result = call.arguments, value_of(call.arguments[entry.result])
    source = given["input"]
    for argument, (wanted, why) in entry.required.items():
        if given[argument] != wanted:
            raise QuantizationRefusal(f"{argument} is {given[argument]}; {why}")
    if not is_norm(source, norm) or not same_size(last_size(source), last_size(norm)):
        raise QuantizationRefusal("it reads something else than the norm's rows")
    if result is None or result.dtype is not FP8 or not same_shape(given[entry.result], source):
        raise QuantizationRefusal(f"its result is not of {FP8} and the norm's shape")
    _check_buffers(call, order)


def _check_buffers(call: MutatingCall, order: dict[Node, int]) -> None:
    """Refuse a call that is not functional and whose buffers are used before it, or as views."""
    if call.functional:
        return
    for buffer, *_ in call.written.values():
        early = any(order[user] < order[call.node] for user in buffer.users)
        if early or buffer.op != "call_function" or buffer.target not in _EMPTY:
            raise QuantizationRefusal("it writes into a buffer that is used elsewhere")


def _layout(scales: Node, kind: str) -> str:
    """Return the layout in memory of an operator's scales."""
    value = value_of(scales)
    if value is None or value.dtype is not torch.float32 or value.dim() != 2:
        raise QuantizationRefusal("its scales are no float32 tensor of two dimensions")
    if kind == TOKEN or is_row_major(scales):
        return ROWS
    tokens, (row, column) = value.shape[0], value.stride()
    aligned = (tokens + ALIGNED_ROWS - 1) // ALIGNED_ROWS * ALIGNED_ROWS
    for layout, stride in ((COLUMNS, tokens), (ALIGNED_COLUMNS, aligned)):
        if same_size(row, 1) and same_size(column, stride):
            return layout
    raise QuantizationRefusal(f"its scales have strides {list(value.stride())}, a layout that is not known")
