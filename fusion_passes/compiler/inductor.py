"""Wrap Inductor's pattern matcher, tracing, fake values and lowerings; copy graphs."""

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
    """Return a tree of patterns.fusions as a pattern of the matcher."""
    if isinstance(pattern, Capture):
        return inductor.KeywordArg(pattern.name)
    if isinstance(pattern, Call):
        users = inductor.MULTIPLE if pattern.shared else 1
        return inductor.CallFunction(pattern.target, *map(_tree, pattern.args), _users=users)
    return pattern


class FusionMatcher:
    """Applies fusions to graphs with Inductor's pattern matcher.

    Args:
        name: shown in Inductor's own logs.
    """

    def __init__(self, name: str) -> None:
        self._pass = inductor.PatternMatcherPass(pass_name=name)

    def add(self, fusion: Fusion, check: Check, handle: Handler) -> None:
        """Register a fusion; `check` may refuse a match (extra_check), `handle` rewrites it.

        Both take the captures by name, the root of the match, and all its nodes.
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
        """Rewrite every match in the graph; return how many there were."""
        if graph.owning_module is None:
            GraphModule(torch.nn.Module(), graph)
        return self._pass.apply(graph)


def trace(function: Callable[..., Any], values: Sequence[Any]) -> GraphModule:
    """Return the post-grad graph of a function on these fake values, decomposed as by Inductor."""
    modes = (getattr(value, "fake_mode", None) for value in values)
    mode = next((mode for mode in modes if mode is not None), contextlib.nullcontext())
    with mode, torch.no_grad():  # the mode, since factory functions have no fake argument
        return make_fx(function, decomposition_table=select_decomp_table())(*values)


def fresh_fake(value: Any, *, contiguous: bool = False) -> Any:
    """Return a fake tensor with the metadata of `value` and a storage of its own.

    It is row-major if `contiguous`. Inductor takes tensors with a shared storage for aliases. A
    factory function under the fake mode does the same, but takes thirty times as long.
    """
    mode = getattr(value, "fake_mode", None)
    if mode is not None:
        meta = _fresh_meta(mode, value, contiguous)
        if type(meta) is torch.Tensor:  # no other active mode changes what this creates
            return mode.fake_tensor_converter.from_meta_and_device(mode, meta, value.device)
    with mode if mode is not None else contextlib.nullcontext():
        if contiguous:
            return torch.empty(value.shape, dtype=value.dtype, device=value.device)
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def _fresh_meta(mode: Any, value: Any, contiguous: bool) -> torch.Tensor:
    """Return a meta tensor with the layout of `value`, or row-major.

    With symbolic sizes `empty` takes 170 us and `empty_strided` 280 us. So strides and storage size
    (bytes) are computed once for each shape and kept with the fake mode: 30 us a call.
    """
    shape, dtype = value.shape, value.dtype
    key = (dtype, *(size if isinstance(size, int) else size.node.expr for size in shape))
    layouts: dict[Any, torch.Tensor] = mode.__dict__.setdefault("_fusewire_layouts", {})
    row_major = layouts.get(key)
    if row_major is None:
        row_major = torch.empty(shape, dtype=dtype, device="meta")
        if type(row_major) is not torch.Tensor:
            return row_major
        layouts[key] = row_major
    if not contiguous and not all(map(_same_number, row_major.stride(), value.stride())):
        return torch.empty_strided(shape, value.stride(), dtype=dtype, device="meta")
    meta = torch.empty(0, dtype=dtype, device="meta")
    torch.ops.inductor.resize_storage_bytes_.default(meta, row_major.untyped_storage().nbytes())
    return meta.as_strided(row_major.shape, row_major.stride())


def _same_number(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Return whether two sizes or strides are one number or expression; adds no guard."""
    if isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt):
        return bool(a.node.expr == b.node.expr)
    return isinstance(a, int) and isinstance(b, int) and a == b


def known_equal(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Return whether two sizes are equal wherever the graph's guards hold; adds no guard."""
    return bool(statically_known_true(a == b))


def never_reuse_outputs(op: torch._ops.OpOverload, marked: Callable[[Sequence[Any]], bool]) -> None:
    """Keep Inductor from reusing the output buffers of calls of `op` with `marked(args)`.

    Else Inductor lowers the operator as usual. Call this before Inductor lowers it.
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


class GraphRecord:
    """A graph's state at one time, which can be copied after the graph has been rewritten.

    Recording takes a twentieth of the time of a copy.
    """

    def __init__(self, graph: Graph) -> None:
        owner = graph.owning_module
        self._owner = owner if owner is not None else GraphModule(torch.nn.Module(), Graph())
        self._nodes = [(node, node.target, node.args, node.kwargs, dict(node.meta)) for node in graph.nodes]

    def copy(self) -> Graph:
        """Return a copy with the same node names and metadata of its own."""
        result = Graph()
        mapping: dict[Node, Node] = {}
        for node, target, args, kwargs, meta in self._nodes:
            # Set arguments later: create_node searches them for symbols, half of its time.
            new = result.create_node(node.op, target, name=node.name, type_expr=node.type)
            new.args = map_arg(args, mapping.__getitem__)
            if kwargs:
                new.kwargs = map_arg(kwargs, mapping.__getitem__)
            new.meta = dict(meta)
            mapping[node] = new
        result.owning_module = self._owner
        return result


def exchange_nodes(graph: Graph, other: Graph) -> None:
    """Make each of two graphs hold the nodes of the other, with their names and metadata."""
    kept = ("_owning_module", "_tracer_cls", "_tracer_extras", "_codegen")
    for name in set(graph.__dict__) - set(kept):
        graph.__dict__[name], other.__dict__[name] = other.__dict__[name], graph.__dict__[name]
    for held in (graph, other):
        for node in (held._root, *held.nodes):
            node.graph = held
