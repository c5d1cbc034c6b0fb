"""Name a graph's nodes in pictures."""

from __future__ import annotations

from torch.fx import Node

from fusewire.fusion_passes.analysis.graph import (
    CASTS,
    VIEWS,
    aten,
    dtype_of,
    is_number,
    plain_add,
    plain_mul,
    value_of,
)
from fusewire.patterns.collectives import WAIT, op_name, read_all_reduce

_NAMES = {
    **dict.fromkeys(("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_scaled_mm"), "matrix product"),
    "aten::embedding": "embedding lookup",
    "aten::add": "add",
    "aten::sub": "subtract",
    "aten::mul": "multiply",
    "aten::mean": "mean",
    "aten::index_put": "masked write",
    "aten::rsqrt": "1 / √",
    "aten::var_mean": "LayerNorm (mean, variance)",
    "aten::native_layer_norm": "LayerNorm",
    **dict.fromkeys(
        (
            "fusewire::all_reduce_rms_norm",
            "fusewire::all_reduce_sandwich_norm",
            "fusewire::all_reduce_rms_norm_sharded",
            "fusewire::all_reduce_rms_norm_quantized",
            "fusewire::all_reduce_rms_norm_quantized_sharded",
        ),
        "the next fused operator",
    ),
    "_c10d_functional::reduce_scatter_tensor": "reduce-scatter",
    "_c10d_functional::all_gather_into_tensor": "all-gather",
}


def name_of(node: Node) -> str:
    """Return what a node does, in short."""
    if node.op != "call_function":
        return "result of the graph" if node.op == "output" else "input"
    site = read_all_reduce(node)
    if site is not None or node.target is WAIT:
        return "reduce-scatter" if site is not None and site.spelling.scatters else "all-reduce"
    if node.target in VIEWS:
        return "reshape"
    if node.target in CASTS:
        return f"to {str(dtype_of(node)).removeprefix('torch.')}"
    return _arithmetic(node) or _operator(node)


def _arithmetic(node: Node) -> str:
    """Return the name of a power, a square or an operation with a number; "" for others."""
    if node.target is aten.pow.Tensor_Scalar:
        return {"2": "square", "-0.5": "1 / √"}.get(str(node.args[1]), f"power {node.args[1]}")
    factors = plain_mul(node)
    for sign, operands in (("+", plain_add(node)), ("\N{MULTIPLICATION SIGN}", factors)):
        for number in filter(is_number, operands or ()):
            return f"{sign} {number:.6g}"
    return "square" if factors is not None and factors[0] is factors[1] else ""


def _operator(node: Node) -> str:
    name = op_name(node)
    if name == "aten::index_put" and any(source.target is aten.embedding.default for source in node.all_input_nodes):
        return "embedding lookup"  # of a part of the vocabulary: other tokens' rows become zeros
    return _NAMES.get(name) or name.rpartition("::")[2] or str(getattr(node.target, "__name__", node.target))


def names_of_readers(users: list[Node]) -> str:
    """Return the names of at most two nodes that read a value, directly or through views."""
    names = sorted({name_of(reader) for user in users for reader in _past_views(user, 4)})
    if {"mean", "subtract"} <= set(names):
        return "LayerNorm"
    return ", ".join(names[:2]) + (", …" if len(names) > 2 else "")


def passes(node: Node) -> bool:
    """Return whether a node is a step that may stand between an all-reduce and its norm."""
    return node.target in VIEWS | CASTS or plain_add(node) is not None or plain_mul(node) is not None


def label_of_input(node: Node, role: str) -> str:
    """Return the label of a value from outside the picture; `role`: its use there, or ""."""
    value = value_of(node)
    if value is not None and value.dim() <= 1 and node.op != "call_function":
        scalar = value.dim() == 0 or (isinstance(value.shape[0], int) and value.shape[0] == 1)
        return "scale" if scalar else ("weight" if role == "weight" else "bias")
    while not role and node.target in VIEWS | CASTS and isinstance(node.args[0], Node):
        node = node.args[0]
    return role or name_of(node)


def is_epsilon(node: Node) -> bool:
    """Return whether a step of a norm adds epsilon to the mean."""
    operands = plain_add(node)
    return any(isinstance(value, Node) and value.target is aten.mean.dim for value in operands or ())


def _past_views(node: Node, steps: int) -> list[Node]:
    """Return the nodes that read a value, directly or through views of it."""
    if steps == 0 or not node.users or node.target not in VIEWS | {aten.expand.default}:
        return [node]
    return [reader for user in node.users for reader in _past_views(user, steps - 1)]
