"""Inductor's pattern matcher, behind the few functions that fusewire needs of it.

This file and backend.py are the only ones that touch private parts of PyTorch's compiler; tests/test_canaries.py has
one test for each part used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._inductor import lowering
from torch._inductor import pattern_matcher as inductor
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.virtualized import V
from torch.fx import Graph, GraphModule, Node, map_arg
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fusewire.custom_ops.ops.registry import Support
from fusewire.patterns.fusions import Call, Capture, Fusion

Check = Callable[[dict[str, Any], Node, Sequence[Node]], Support]
Handler = Callable[[dict[str, Any], Node, Sequence[Node]], None]


def _tree(pattern: Any) -> Any:
    """A tree of patterns.fusions in the matcher's own terms."""
    if isinstance(pattern, Capture):
        return inductor.KeywordArg(pattern.name)
    if isinstance(pattern, Call):
        users = inductor.MULTIPLE if pattern.shared else 1
        return inductor.CallFunction(pattern.target, *map(_tree, pattern.args), _users=users)
    return pattern


class FusionMatcher:
    """Applies fusions to graphs by Inductor's matcher.

    Args:
        name: shown in Inductor's own logs.
    """

    def __init__(self, name: str) -> None:
        self._pass = inductor.PatternMatcherPass(pass_name=name)

    def add(self, fusion: Fusion, check: Check, handle: Handler) -> None:
        """Register a fusion; `check` refuses matches (extra_check), `handle` rewrites those it lets through.

        Both get the captures by name, the root of the match, and all its nodes.
        """

        def extra_check(match: inductor.Match) -> bool:
            return bool(check(match.kwargs, match.output_node(), match.nodes))

        def handler(match: inductor.Match, **captures: Any) -> None:
            handle(captures, match.output_node(), match.nodes)

        inductor.register_graph_pattern(
            _tree(fusion.tree),
            extra_check=extra_check,
            pass_dict=self._pass,  # type: ignore[arg-type]
        )(handler)

    def apply(self, graph: Graph) -> int:
        """Rewrite every match in the graph; returns how many there were."""
        if graph.owning_module is None:
            GraphModule(torch.nn.Module(), graph)
        return self._pass.apply(graph)


def trace(function: Callable[..., Any], values: Sequence[Any]) -> GraphModule:
    """The post-grad graph of a function of these fake values, with Inductor's decompositions."""
    with torch.no_grad():
        return make_fx(function, decomposition_table=select_decomp_table())(*values)


def fresh_fake(value: Any, *, contiguous: bool = False) -> Any:
    """A fake tensor with the metadata of `value` and a storage of its own, row-major if `contiguous`.

    Inductor takes a shared storage for an alias. Asking a factory function under the fake mode comes to the same, and
    takes thirty times as long, which made up most of the passes' time.
    """
    layout = (value.shape, torch.empty(value.shape, device="meta").stride() if contiguous else value.stride())
    mode = getattr(value, "fake_mode", None)
    if mode is not None:
        meta = torch.empty_strided(*layout, dtype=value.dtype, device="meta")
        if type(meta) is torch.Tensor:  # else some mode is active, and this was no short way
            return mode.fake_tensor_converter.from_meta_and_device(mode, meta, value.device)
    with mode if mode is not None else contextlib.nullcontext():
        return torch.empty_strided(*layout, dtype=value.dtype, device=value.device)


def known_equal(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Whether two sizes are equal wherever the graph's guards hold; asks for no further guard."""
    return bool(statically_known_true(a == b))


def never_reuse_outputs(op: torch._ops.OpOverload, marked: Callable[[Sequence[Any]], bool]) -> None:
    """Have Inductor reuse no output of a call of `op` for another buffer, where `marked(args)` says so.

    It lowers the operator as Inductor would by itself, and must be called before that.
    """
    if getattr(lowering.lowerings.get(op), "_fusewire", False):
        return
    if op not in lowering.lowerings:
        tag = torch._library.utils.get_layout_constraint_tag(op, with_default=True)
        lowering.make_fallback(op, layout_constraint=lowering.tag_to_layout_constraint(tag))
    inner = lowering.lowerings[op]

    def lower(*args: Any, **kwargs: Any) -> Any:
        outputs = inner(*args, **kwargs)
        if marked(args):
            for output in outputs:
                V.graph.never_reuse_buffers.add(output.get_name())
        return outputs

    lower._fusewire = True  # type: ignore[attr-defined]
    lowering.lowerings[op] = lower


def copied(graph: Graph) -> Graph:
    """A copy with the same node names, and metadata of its own."""
    result = Graph()
    mapping: dict[Node, Node] = {}
    for node in graph.nodes:
        # Arguments are set afterwards: create_node would search each of them for symbols, half of its time.
        new = result.create_node(node.op, node.target, name=node.name, type_expr=node.type)
        new.args = map_arg(node.args, mapping.__getitem__)
        if node.kwargs:
            new.kwargs = map_arg(node.kwargs, mapping.__getitem__)
        new.meta = dict(node.meta)
        mapping[node] = new
    owner = graph.owning_module
    result.owning_module = owner if owner is not None else GraphModule(torch.nn.Module(), Graph())
    return result


def exchange_nodes(graph: Graph, other: Graph) -> None:
    """Make each of two graphs hold the nodes of the other, with their names and metadata."""
    kept = ("_owning_module", "_tracer_cls", "_tracer_extras", "_codegen")
    for name in set(graph.__dict__) - set(kept):
        graph.__dict__[name], other.__dict__[name] = other.__dict__[name], graph.__dict__[name]
    for held in (graph, other):
        for node in (held._root, *held.nodes):
            node.graph = held


def graph_kind() -> str:
    """Which graph is being compiled: "inference" or "training" (a forward or backward with gradients)."""
    context = torch._guards.TracingContext.try_get()
    names = (context.aot_graph_name or []) if context is not None else []
    return "training" if any(str(name).endswith(("forward", "backward", "joint")) for name in names) else "inference"
