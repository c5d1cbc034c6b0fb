"""Name compilations by their graphs' structure, so that equal parts of a model share a name."""

from __future__ import annotations

import hashlib
import operator
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node, map_arg

# Constants of up to so many elements are compared by value: a report may hold them.
_COMPARED = 1024


def compilation_name(model: GraphModule, example_inputs: Sequence[Any], passes_key: str) -> str:
    """Return a name that only equal compilations share: of graph, inputs' metadata and passes.

    Names of nodes, inputs and attributes do not count: the layers of a model differ in them only.
    """
    parts = [*_structure(model), passes_key, torch.__version__, str(torch.is_grad_enabled())]
    parts += [_metadata(value) for value in example_inputs]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


class _Reference:
    """Stands for a node in arguments: its number in the graph."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __repr__(self) -> str:
        return f"%{self._number}"


def _structure(model: GraphModule) -> list[str]:
    """Return a line for each node of a graph and of the graphs that it calls."""
    references: dict[Node, Any] = {}
    lines = []
    for node in model.graph.nodes:
        args, kwargs = map_arg((node.args, node.kwargs), references.__getitem__)
        lines.append(f"{node.op} {_target(model, node)} {args} {kwargs}")
        references[node] = _Reference(len(references))
    return lines


def _target(model: GraphModule, node: Node) -> str:
    if node.op in ("placeholder", "output"):
        return ""
    if node.op == "get_attr":
        return _attribute(model, str(node.target))
    named = isinstance(node.target, (types.FunctionType, types.BuiltinFunctionType, type))
    return torch.typename(node.target) if named else str(node.target)


def _attribute(model: GraphModule, path: str) -> str:
    """Return an attribute's content: a graph's structure, a constant's value, or metadata."""
    try:
        value = operator.attrgetter(path)(model)
    except AttributeError:
        return path
    if isinstance(value, GraphModule):
        return "\n".join(["{", *_structure(value), "}"])
    if type(value) is torch.Tensor and value.numel() <= _COMPARED and value.device.type != "meta":
        return f"{_metadata(value)} {value.tolist()}"
    return _metadata(value) if isinstance(value, torch.Tensor) else path


def _metadata(value: Any) -> str:
    """Return a tensor's dtype, sizes, strides and device; another value as text."""
    if not isinstance(value, torch.Tensor):
        return str(value)
    strides = value.stride() if value.layout is torch.strided else ""
    return f"{value.dtype}{list(value.shape)}{strides}{value.device}"
