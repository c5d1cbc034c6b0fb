"""Wrap Dynamo's private parts: restarts with floats as numbers, graph breaks, kinds of graphs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch._dynamo.exc import RestartAnalysis as RestartAnalysis
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.symbolic_convert import TensorifyState
from torch._dynamo.utils import counters
from torch.fx import GraphModule, Node


def graph_kind() -> str:
    """Return "training" for a graph with gradients (forward, backward, joint), else "inference"."""
    context = torch._guards.TracingContext.try_get()
    names = (context.aot_graph_name or []) if context is not None else []
    return "training" if any(str(name).endswith(("forward", "backward", "joint")) for name in names) else "inference"


def floats_as_numbers() -> AbstractContextManager[Any]:
    """Have Dynamo capture Python floats as numbers, not as inputs, within the block."""
    switched: AbstractContextManager[Any] = torch._dynamo.config.patch(specialize_float=True)
    return switched


def float_inputs(model: GraphModule) -> Iterator[tuple[Node, str]]:
    """Yield each input of a graph that is a Python float (dynamic=True), with its symbol's name."""
    for node in model.graph.nodes:
        if node.op != "placeholder":
            continue
        memo = getattr(node.meta.get("example_value"), "item_memo", None)
        name = getattr(getattr(getattr(memo, "node", None), "_expr", None), "name", None)
        if name is not None and not TensorifyState.should_specialize(name):
            yield node, name


def is_module_attribute(node: Node) -> bool:
    """Return whether an input of a captured graph is an attribute of one of the model's modules."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    return type(getattr(source, "base", None)).__name__.endswith("NNModuleSource")


def capture_again_with_numbers(names: list[str]) -> None:
    """Make Dynamo capture the graph again with these symbols as numbers; do nothing without any.

    Raises:
        RestartAnalysis: Dynamo catches it; it is no failure.
    """
    for name in names:
        TensorifyState.specialize(name)
    if names:
        raise TensorifyScalarRestartAnalysis


def graph_breaks() -> dict[str, int]:
    """Return, by reason, how many graph breaks this process has had."""
    return dict(counters["graph_break"])


def forget_graph_breaks() -> None:
    """Reset the counts of `graph_breaks`."""
    counters["graph_break"].clear()
