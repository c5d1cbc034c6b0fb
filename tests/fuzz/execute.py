"""Compiles a program up to its post-grad graph, and executes copies of that graph operator by operator."""

from __future__ import annotations

import linecache
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.nn.functional as F
from torch import Tensor
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import _recursive_post_grad_passes, compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensor

import fusewire
from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm
from fusewire.custom_ops.ops.sandwich_norm import all_reduce_sandwich_norm
from fusewire.custom_ops.ops.sharded_norm import all_reduce_rms_norm_sharded
from fusewire.fusion_passes.backend import specialize_epsilons
from fusewire.fusion_passes.config import PassConfig
from fusewire.fusion_passes.pipeline import run_passes
from fusewire.fusion_passes.report.model import GraphReport
from fusewire.patterns.collectives import ALL_REDUCE, COALESCED

from fuzz.program import Program, make_arguments
from fuzz.ranks import GROUPS, Ranks

FUSED_OP = all_reduce_rms_norm.torch_op
SANDWICH_OP = all_reduce_sandwich_norm.torch_op
SHARDED_OP = all_reduce_rms_norm_sharded.torch_op
# Of each fused operator, the result that may be left in a buffer, as the kernels do it.
LEFT_IN_BUFFER = {FUSED_OP: 1, SANDWICH_OP: 1, SHARDED_OP: 0}
_SLOT = re.compile(r";output=(\d+)")


@dataclass
class Variant:
    """A copy of a program's graph, rewritten with one configuration; `late`, with everything computed where it is read."""

    module: torch.fx.GraphModule
    report: GraphReport | None = None
    text: str = ""
    late: torch.fx.GraphModule | None = None


@dataclass
class Outcome:
    """What one execution returned, what it left of its arguments, and the collectives it ran."""

    outputs: list[Any]
    inputs: list[Any]
    collectives: list[tuple[str, str, float]]  # (group, reduction, sum of the input, to tell them apart)
    wrong: list[str]
    buffers: Buffers = field(default_factory=lambda: Buffers())


class Buffers:
    """Buffers that calls leave results in, as symmetric workspaces have them: a call writes as soon as it runs."""

    def __init__(self) -> None:
        self.made: dict[Any, Tensor] = {}

    def clear(self, key: Any, like: Tensor) -> None:
        """Overwrite a buffer, which the results of the calls before it are then gone from."""
        if key not in self.made or self.made[key].numel() < like.numel():
            self.spoil(key)
            self.made[key] = torch.empty(like.numel(), dtype=like.dtype)
        self.spoil(key)

    def spoil(self, key: Any) -> None:
        if key in self.made:
            self.made[key].fill_(torch.nan)

    def leave(self, key: Any, result: Tensor) -> Tensor:
        left = self.made[key][: result.numel()].view(result.shape)
        return left.copy_(result)


def copy_of(graph: torch.fx.Graph) -> torch.fx.GraphModule:
    copied = torch.fx.Graph()
    copied.output(copied.graph_copy(graph, {}))
    return torch.fx.GraphModule(graph.owning_module, copied)


def computed_late(graph: torch.fx.Graph) -> torch.fx.GraphModule:
    """A copy in which everything stands just before its first reader, and what is cheap is computed anew for each.

    So Inductor may schedule it. What communicates or writes in place keeps its place among its like.
    """
    module = copy_of(graph)
    nodes = list(module.graph.nodes)
    for node in reversed(nodes):
        users = list(node.users)
        if _is_cheap(node) and 1 < len(users) <= 6 and not any(user.op == "output" for user in users):
            for user in users[1:]:
                with module.graph.inserting_after(node):
                    user.replace_input_with(node, module.graph.node_copy(node))
    nodes = list(module.graph.nodes)
    order: dict[torch.fx.Node, None] = {}
    for index, node in enumerate(nodes):
        if node.op in ("placeholder", "get_attr", "output") or _keeps_its_place(node):
            if _writes(node):  # what reads the value that is overwritten has to come before
                order.update(dict.fromkeys(n for n in nodes[:index] if n.op == "call_function"))
            _place_with_inputs(node, order)
    first = next(iter(order))
    for node in list(order)[1:]:
        first.append(node)
        first = node
    return module


def _place_with_inputs(node: torch.fx.Node, order: dict[torch.fx.Node, None]) -> None:
    pending = [node]
    while pending:
        current = pending[-1]
        missing = [source for source in current.all_input_nodes if source not in order]
        if missing:
            pending += missing[:1]
        else:
            order[pending.pop()] = None


def _is_cheap(node: torch.fx.Node) -> bool:
    overload = isinstance(node.target, torch._ops.OpOverload) and node.op == "call_function"
    return overload and (torch.Tag.pointwise in node.target.tags or node.target.is_view)


def _writes(node: torch.fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _keeps_its_place(node: torch.fx.Node) -> bool:
    groups = {name for key, name in GROUPS.items() if key.endswith("NAME")}
    return (
        _writes(node)
        or "_c10d_functional" in str(node.target)
        or any(isinstance(argument, str) and argument in groups for argument in node.args)
    )


class Executor(torch.fx.Interpreter):
    """Executes a graph operator by operator, and compares what each gives with what its metadata says.

    With `factors` the all-reduces get no kernels: each multiplies its input by its group's factor, as if the other ranks
    held multiples of this rank's tensor.
    """

    def __init__(
        self, module: torch.fx.GraphModule, factors: dict[str, float] | None, outcome: Outcome, metadata: bool = True
    ) -> None:
        super().__init__(module)
        self.factors, self.outcome, self.metadata = factors, outcome, metadata

    def run_node(self, n: torch.fx.Node) -> Any:
        result = super().run_node(n)
        if self.metadata and n.op in ("call_function", "placeholder"):
            self._compare(n, n.meta.get("val"), result)
        return result

    def _compare(self, node: torch.fx.Node, said: Any, got: Any) -> None:
        if isinstance(got, (tuple, list)):
            for a, b in zip(said, got, strict=True):
                self._compare(node, a, b)
        elif isinstance(got, Tensor) and (problem := _differs(said, got)):
            self.outcome.wrong.append(f"{node.name} ({node.target}): {problem}")

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        name = str(target)
        if self.factors is not None and name in _COLLECTIVES:
            group, reduction = _COLLECTIVES[name](args)
            given = args[0] if target is COALESCED else [args[0]]
            self.outcome.collectives += [(group, reduction.lower(), float(t.double().sum())) for t in given]
            given = [_over_ranks(t, self.factors[group], reduction.lower()) for t in given]
            args = (given if target is COALESCED else given[0], *args[1:])
        slot = _SLOT.search(args[-1]) if target in LEFT_IN_BUFFER and isinstance(args[-1], str) else None
        if slot is None:
            return super().call_function(target, args, kwargs)
        key = args[-2], args[0].dtype, args[0].shape[-1], slot[1]
        self.outcome.buffers.clear(key, args[0])
        results = list(super().call_function(target, args, kwargs))
        left = LEFT_IN_BUFFER[target]
        results[left] = self.outcome.buffers.leave(key, results[left])
        return tuple(results)


# Group and reduction of a call, by the operator.
_COLLECTIVES: dict[str, Callable[[Any], tuple[str, str]]] = {
    str(ALL_REDUCE): lambda args: (args[2], args[1]),
    str(COALESCED): lambda args: (args[2], args[1]),
    str(FUSED_OP): lambda args: (args[6], "sum"),
    str(SANDWICH_OP): lambda args: (args[10], "sum"),
    "vllm.all_reduce.default": lambda args: (args[1], "sum"),
}


def _over_ranks(x: Tensor, factor: float, reduction: str) -> Tensor:
    """What the fake group's all-reduce is given, so that it returns what the ranks' tensors would reduce to."""
    factors = {"sum": factor, "avg": factor / 2, "max": factor + 1, "min": factor + 2, "product": factor + 3}
    return x if factor == 1 else x * factors[reduction]


def _differs(said: Any, got: Tensor) -> str:
    if not isinstance(said, Tensor):
        return f"its metadata is {said!r}"
    if said.dtype != got.dtype:
        return f"metadata says {said.dtype}, executing gives {got.dtype}"
    shape = tuple(_size(s) for s in said.shape)
    if shape != tuple(got.shape):
        return f"metadata says {list(said.shape)}, executing gives {list(got.shape)}"
    stride = tuple(_size(s) for s in said.stride())
    if got.numel() and any(n > 1 and a != b for n, a, b in zip(shape, stride, got.stride(), strict=True)):
        return f"metadata says strides {list(stride)}, executing gives {list(got.stride())}"
    return ""


def _size(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


class _Recorder(CustomGraphPass):
    def __init__(self, make: Callable[[torch.fx.Graph], None]) -> None:
        self.make = make

    def __deepcopy__(self, memo: Any) -> _Recorder:
        return self

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.make(graph)

    def uuid(self) -> Any:
        return None


class _CompiledOnly(Exception):
    pass


class Compiled:
    """A program, compiled once; `variants` are its graphs, and `execute` runs one of them on fresh arguments."""

    def __init__(self, program: Program, configs: dict[str, PassConfig], ranks: Ranks) -> None:
        self.program, self.configs, self.ranks = program, configs, ranks
        self.variants: dict[str, Variant] = {}
        self.selected = ""
        self.late = self.other_sizes = self.recompiled = self.ready = False
        self.outcomes: dict[int, Outcome] = {}
        self.module = module_of(program)
        torch._dynamo.reset()
        self.compiled = torch.compile(self.module, backend=self._backend, dynamic=program.dynamic, fullgraph=True)

    def execute(self, name: str, tokens: int = 0, late: bool = False) -> list[Outcome]:
        """What each rank of this process gets of a variant, with so many tokens; `late`: of its late schedule."""
        self.selected, self.late = name, late
        if not self.ready or self.other_sizes != (tokens > 0):
            self._compile(tokens)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.ranks.run(lambda rank: self._execute(rank, tokens))

    def recompiles(self, tokens: int) -> bool:
        """Whether another number of tokens takes another graph: the program is not as dynamic as it was meant to be."""
        self._compile(tokens)
        return self.recompiled

    def _compile(self, tokens: int) -> None:
        """Let Dynamo compile, or find what it has compiled, on one thread alone and without executing anything."""
        self.ready, self.other_sizes = False, tokens > 0
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                self.compiled(*make_arguments(self.program, 0, tokens))
            except _CompiledOnly:
                self.ready = True

    def _execute(self, rank: int, tokens: int) -> Outcome:
        arguments = make_arguments(self.program, rank, tokens)
        self.outcomes[rank] = outcome = Outcome([], arguments, self.ranks.log, [])
        with torch.no_grad():
            outcome.outputs = list(self.compiled(*arguments))
        for key in outcome.buffers.made:
            outcome.buffers.spoil(key)  # as the next call of the program would
        return outcome

    def _make(self, graph: torch.fx.Graph) -> None:
        assert not self.variants, "the program has more than one graph"
        self.variants["before"] = Variant(copy_of(graph), None, str(graph))
        for name, config in self.configs.items():
            module = copy_of(graph)
            report = run_passes(module.graph, config)
            module.graph.lint()
            late = computed_late(module.graph) if config.output_in_place else None
            self.variants[name] = Variant(module, report, str(module.graph), late)

    def _backend(self, gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        if self.other_sizes:
            self.recompiled = True
            return self._stop
        specialize_epsilons(gm)
        patches = {"post_grad_custom_post_pass": _Recorder(self._make), "force_disable_caches": True}
        with inductor_config.patch(patches):
            return compile_fx(gm, example_inputs, inner_compile=self._inner)

    def _stop(self, *args: Any) -> Any:
        raise _CompiledOnly

    def _inner(self, gm: torch.fx.GraphModule, example_inputs: Any, **kwargs: Any) -> Callable[..., Any]:
        mode = next(v.fake_mode for v in example_inputs if isinstance(v, FakeTensor))
        with V.set_fake_mode(mode):
            _recursive_post_grad_passes(gm, is_inference=bool(kwargs.get("is_inference")))

        def boxed(args: Any) -> Any:
            if not self.ready:
                raise _CompiledOnly
            variant = self.variants[self.selected]
            module = variant.late if self.late else variant.module
            metadata = not self.other_sizes and not self.late
            return Executor(module, None, self.outcomes[self.ranks.rank], metadata).run(*args)

        boxed._boxed_call = True  # type: ignore[attr-defined]
        return boxed


def module_of(program: Program) -> torch.nn.Module:
    """The program as a module; its epsilons may be attributes, which dynamic=True would make inputs."""
    name = f"fuzz_seed_{program.seed}_{'_'.join(map(str, program.layers))}.py"
    linecache.cache[name] = (len(program.source), None, program.source.splitlines(True), name)
    scope: dict[str, Any] = dict(
        torch=torch, F=F, dist=dist, functional=functional, fusewire=fusewire, ops=torch.ops._c10d_functional, **GROUPS
    )
    exec(compile(program.source, name, "exec"), scope)
    module = type("Program", (torch.nn.Module,), {"forward": scope["forward"]})()
    for key, value in program.numbers.items():
        setattr(module, key, value)
    return module
