"""Wrap Dynamo's private parts: restarts with floats as numbers, graph breaks, kinds of graphs."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch._dynamo.exc import RestartAnalysis as RestartAnalysis
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.symbolic_convert import InstructionTranslator, TensorifyState
from torch._dynamo.utils import counters
from torch.fx import GraphModule, Node

# The values that a function's float attributes have had together: sets of (attribute, value).
_attribute_values: defaultdict[Any, set[frozenset[tuple[str, float]]]] = defaultdict(set)


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
    for node in model.graph.find_nodes(op="placeholder"):
        memo = getattr(node.meta.get("example_value"), "item_memo", None)
        name = getattr(getattr(getattr(memo, "node", None), "_expr", None), "name", None)
        if name is not None and not TensorifyState.should_specialize(name):
            yield node, name


def steady_attributes(nodes: Iterable[Node]) -> set[Node]:
    """Return the float inputs that are attributes of modules and have had few values so far.

    As numbers, all their values together are one compilation. Dynamo compiles a function 8 times at
    most (its recompile_limit) and then runs it uncompiled, so after 4 compilations only attributes
    that have had one value stay numbers.
    """
    given: dict[Node, tuple[str, float]] = {}
    for node in nodes:
        argument: Any = node.meta.get("grapharg")
        source: Any = getattr(argument, "source", None)
        if type(getattr(source, "base", None)).__name__.endswith("NNModuleSource"):
            given[node] = (source.name, float(argument.example))
    if not given:
        return set()
    values, seen = frozenset(given.values()), _attribute_values[InstructionTranslator.current_tx().f_code]
    if len(seen) < torch._dynamo.config.recompile_limit // 2:
        seen.add(values)
    if values in seen:
        return set(given)
    found = Counter(name for name, _ in values.union(*seen))
    return {node for node, (name, _) in given.items() if found[name] == 1}


def capture_again_with_numbers(names: list[str]) -> None:
    """Make Dynamo capture the graph again with these symbols as numbers; do nothing without any.

    Call `forget_numbers` when the graph is compiled.

    Raises:
        RestartAnalysis: Dynamo catches it; it is no failure.
    """
    for name in names:
        TensorifyState.specialize(name)
    if names:
        raise TensorifyScalarRestartAnalysis


def forget_numbers() -> None:
    """Forget which symbols are to be numbers: floats of later graphs have symbols of these names."""
    TensorifyState.clear()


def forget_attributes() -> None:
    """Forget which values the float attributes of modules have had."""
    _attribute_values.clear()


def graph_breaks() -> dict[str, int]:
    """Return, by reason, how many graph breaks this process has had."""
    return dict(counters["graph_break"])


def forget_graph_breaks() -> None:
    """Reset the counts of `graph_breaks`."""
    counters["graph_break"].clear()
