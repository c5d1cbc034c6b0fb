"""Read operators that are an RMSNorm and its quantisation to FP8 in one (vLLM's)."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from fusewire.custom_ops.ops.norms import ROUND_THEN_SCALE, keeps_wide_sum, without_wide_sum
from fusewire.fusion_passes.analysis.graph import dtype_of, first_refusal, is_number, is_row_major, value_of
from fusewire.fusion_passes.analysis.norm_quant_forms import form_of
from fusewire.fusion_passes.analysis.norm_reader import Norm
from fusewire.fusion_passes.analysis.quantizing_ops import QuantizationRefusal, read_call
from fusewire.fusion_passes.compiler.mutating_calls import MutatingCall, called_op, op_of_name, read_mutating_call
from fusewire.patterns.quantizations import NORM_QUANT_OPS, NormQuantOp


@dataclass(frozen=True)
class NormQuant:
    """A call of an operator that is a norm and its quantisation.

    Attributes:
        norm: the norm; its `out` is the call.
        quant: the call of the operator that quantises alone, with the norm's source in place of
            the norm. It has the same node and buffers. None if the call is not read.
        sums: the nodes that have the sum's value after the call.
        refusal: why the two operators cannot stand for it, or "".
    """

    norm: Norm
    quant: MutatingCall | None
    sums: tuple[Node, ...]
    refusal: str

    def because(self, refusal: str) -> str:
        """Return the whole refusal for the report."""
        name = self.norm.spelling.replace("::", ".")
        return f"{name}, a norm and its quantisation in one, stays as it is: {refusal}"


def is_norm_quant(node: Node) -> bool:
    """Return whether a node calls an operator that is a norm and its quantisation."""
    return _name(node) in NORM_QUANT_OPS


def read_norm_quant(node: Node, order: dict[Node, int]) -> NormQuant:
    """Return what a call of such an operator computes.

    Args:
        node: a call, functional or in place; see `is_norm_quant`.
        order: the nodes' positions in the graph.
    """
    name, call = _name(node), read_mutating_call(node)
    entry = NORM_QUANT_OPS[name]
    why = "it writes to a part of a buffer" if call is None else _schema_refusal(call, entry)
    if call is None or why:
        source: Any = node.kwargs["input"] if call is None else call.arguments["input"]
        norm = Norm(source, None, node, (), None, 0.0, 0.0, ROUND_THEN_SCALE, name)
        return NormQuant(norm, None, (), why)
    given = call.arguments
    source, residual = given["input"], given.get("residual")
    dtype = dtype_of(source)
    form, unknown = _form(call, entry, source)
    if dtype is None or not keeps_wide_sum(form, dtype):
        form = without_wide_sum(form)
    norm = Norm(source, residual, node, (), given["weight"], given["epsilon"], 0.0, form, name)
    renamed = {new: given[old] for new, old in entry.renamed.items()}
    written = {new: call.written[old] for new, old in entry.renamed.items() if old in call.written}
    quant = MutatingCall(node, entry.quant, {"input": source, **renamed, **entry.constants}, written)
    refusal = first_refusal(_refusals(norm, call, entry.must_be_none)) or _quant_refusal(quant, source, order)
    refusal = refusal or unknown
    return NormQuant(norm, quant, call.written.get("residual", ()), refusal)


def norm_quant_inputs(graph: Graph) -> set[Node]:
    """Return the tensors that such operators of a graph normalise, or add to a residual before."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    return {read_norm_quant(node, order).norm.input for node in graph.nodes if is_norm_quant(node)}


def _name(node: Node) -> str:
    op = called_op(node) if node.op == "call_function" else None
    return "" if op is None else str(op._schema.name)


def _form(call: MutatingCall, entry: NormQuantOp, source: Node) -> tuple[str, str]:
    """Return the form of a call's norm and "", or any form and why the true one is not known."""
    op, quant, value = op_of_name(call.op), op_of_name(entry.quant), value_of(source)
    if op is None or quant is None or value is None:
        return (
            ROUND_THEN_SCALE,
            "it could not be tried: the operator that quantises, or its input's device, is not known",
        )
    form, refusal = form_of(op, quant, entry, call.arguments.get("residual") is not None, value.device.type)
    return form or ROUND_THEN_SCALE, refusal


def _schema_refusal(call: MutatingCall, entry: NormQuantOp) -> str:
    """Return why a version of the operator with these arguments is not known, or ""."""
    needed = {"input", "weight", "epsilon", *entry.renamed.values()}
    known = {"residual", *needed, *entry.must_be_none}
    if not needed <= call.arguments.keys():
        return f"this version of it has no {', '.join(sorted(needed - call.arguments.keys()))}"
    other = next((name for name, value in call.arguments.items() if name not in known and value), "")
    return other and f"{other} is {call.arguments[other]}, which is not known"


def _refusals(norm: Norm, call: MutatingCall, must_be_none: tuple[str, ...]) -> Iterator[tuple[bool, str]]:
    dtype, residual = dtype_of(norm.source), norm.residual
    given = next((name for name in must_be_none if call.arguments.get(name) is not None), "")
    yield given != "", f"{given} is given, and its quantisation by itself takes none"
    transposed, scale = call.arguments.get("is_scale_transposed"), call.arguments["scale"]
    value = value_of(scale)
    same = transposed is None or value is None or any(isinstance(n, int) and n == 1 for n in value.shape)
    yield (
        not same and transposed == is_row_major(scale),
        f"is_scale_transposed is {transposed}, and its scales are in {'rows' if transposed else 'columns'}",
    )
    dtypes = {dtype_of(node) for node in (norm.weight, residual) if node is not None}
    yield dtypes != {dtype}, f"its weight and residual must be in the input's {dtype}"
    yield not is_number(norm.eps), "its epsilon is computed in the graph"
    yield dtype is torch.float64, "it computes a norm of float64 in float32"
    yield (
        residual is not None and not call.functional and not _is_unshared(residual),
        "it writes into a residual in place that is an input or shares its memory",
    )


def _quant_refusal(quant: MutatingCall, source: Node, order: dict[Node, int]) -> str:
    if op_of_name(quant.op) is None:
        return f"this process has no {quant.op.replace('::', '.')} to quantise with"
    try:
        read_call(quant, source, order)
    except QuantizationRefusal as refusal:
        return str(refusal)
    return ""


def _is_unshared(node: Node) -> bool:
    """Return whether a node computes a tensor of its own, of which no other node is a view."""
    maker: Any = node.args[0] if node.target is operator.getitem else node
    readers = [user for user in node.users if user.op != "output"]
    return not any(map(_may_alias, (maker, *readers)))


def _may_alias(node: Node) -> bool:
    """Return whether a call may return a view of its input."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    return any(result.alias_info is not None for result in node.target._schema.returns)
