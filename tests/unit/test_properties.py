"""Properties of each pass alone, over small random graphs that are traced without compiling anything.

The graphs are those that Inductor's decompositions give, but not made functional: a program that writes in place keeps
its writes, in the middle of the graph, so that what may not move past them shows.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule

import fusewire
from fusewire.custom_ops.ops.norms import FORMS
from fusewire.fusion_passes.analysis.norm_reader import find_norms
from fusewire.fusion_passes.compiler.inductor import trace
from fusewire.fusion_passes.config import PassConfig
from fusewire.fusion_passes.context import RunContext
from fusewire.fusion_passes.passes.fuse_all_reduce import fuse_all_reduce
from fusewire.fusion_passes.passes.lower_ops import lower_ops
from fusewire.fusion_passes.passes.raise_ops import raise_ops
from fusewire.fusion_passes.pipeline import run_passes

from fuzz import __main__ as fuzz

HIDDEN = 8
OPS = torch.ops._c10d_functional
DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])
EPSILONS = st.sampled_from([0.0, 1e-12, 1e-6, 1e-5, 0.125, 1.0, 3]) | st.floats(1e-9, 10.0)
SHAPES = st.sampled_from([(HIDDEN,), (3, HIDDEN), (1, HIDDEN), (HIDDEN, HIDDEN), (2, 3, HIDDEN)])
pytestmark = pytest.mark.usefixtures("fake_world")


def many(examples: int) -> Any:
    suppressed = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    scale = int(os.environ.get("FUSEWIRE_FUZZ_SCALE", "1"))
    return settings(max_examples=examples * scale, deadline=None, suppress_health_check=suppressed)


def reduced(x: Tensor, op: str = "sum") -> Tensor:
    return OPS.wait_tensor(OPS.all_reduce(x, op, dist.group.WORLD.group_name))


def traced(function: Any, *inputs: Tensor) -> GraphModule:
    """The graph of a function of tensors like these."""
    with FakeTensorMode() as mode:
        module = trace(function, [mode.from_tensor(value) for value in inputs])
    module.graph.eliminate_dead_code()
    return module


def run(module: GraphModule, inputs: list[Tensor]) -> fuzz.Outcome:
    """Execute a graph on copies of these inputs; an all-reduce gives three times what it is given."""
    outcome = fuzz.Outcome([], [value.clone() for value in inputs], [], [])
    result = fuzz.Executor(module, {dist.group.WORLD.group_name: 3.0}, outcome).run(*outcome.inputs)
    outcome.outputs = list(result) if isinstance(result, (tuple, list)) else [result]
    return outcome


def same(want: fuzz.Outcome, got: fuzz.Outcome) -> None:
    problems = list(fuzz.compare(want, got, 0.0))
    assert not problems, problems


def rewritten(module: GraphModule, config: PassConfig, *passes: Any) -> tuple[GraphModule, RunContext]:
    copied = fuzz.copy_of(module.graph)
    context = RunContext(config)
    for item in passes:
        item(copied.graph, context)
        copied.graph.lint()
    return copied, context


# Norms, spelled in every way


@dataclass(frozen=True)
class Spelling:
    """A norm as a program spells it, and what the reader must find."""

    tail: str
    square: str
    root: str
    mean: str
    eps: float
    bias: float

    def __call__(self, x: Tensor, w: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        square = {"pow": lambda v: v.pow(2), "mul": lambda v: v * v, "square": torch.square}[self.square](wide)
        mean = square.mean(-1, keepdim=True) if self.mean == "-1" else square.mean([x.dim() - 1], True)
        shifted = mean + self.eps if self.mean == "-1" else self.eps + mean
        n = wide * {"rsqrt": torch.rsqrt, "pow": lambda s: torch.pow(s, -0.5)}[self.root](shifted)
        return {
            "L": lambda: w * n.to(x.dtype),
            "L'": lambda: n.to(x.dtype) * w,
            "M": lambda: (w * n).to(x.dtype),
            "M'": lambda: (n * w).to(x.dtype),
            "F": lambda: (n * w.float()).to(x.dtype),
            "G": lambda: (n * (self.bias + w.float())).to(x.dtype),
            "g": lambda: n.to(x.dtype) * (w + self.bias),
            "weightless": lambda: n.to(x.dtype),
        }[self.tail]()

    @property
    def weight_bias(self) -> float:
        return self.bias if self.tail in ("G", "g") else 0.0

    def form(self, dtype: torch.dtype) -> str:
        """The rounding order; in fp32 there is only one."""
        return "round_then_scale" if self.tail in ("L", "L'", "g") and dtype != torch.float32 else "scale_then_round"


SPELLINGS = st.builds(
    Spelling,
    st.sampled_from(["L", "L'", "M", "M'", "F", "G", "g", "weightless"]),
    st.sampled_from(["pow", "mul", "square"]),
    st.sampled_from(["rsqrt", "pow"]),
    st.sampled_from(["-1", "last"]),
    EPSILONS,
    st.sampled_from([1.0, 0.5, -1.0, 2]),
)


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, r = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    return [x, r, (torch.randn(HIDDEN, generator=generator) * 0.3 + 1).to(dtype)]


@many(60)
@given(SPELLINGS, SHAPES, DTYPES)
def test_reader_finds_each_norm_with_its_numbers(spelling, shape, dtype):
    x, _, w = values(shape, dtype)
    graph = traced(lambda x, w: spelling(x, w), x, w).graph
    (norm,) = find_norms(graph)
    first, second = graph.find_nodes(op="placeholder")
    assert norm.refusal == ""
    assert norm.source is first
    assert norm.weight is (None if spelling.tail == "weightless" else second)
    assert (norm.eps, norm.weight_bias) == (spelling.eps, spelling.weight_bias)
    if norm.weight is not None:
        assert norm.form == spelling.form(dtype)


ALMOST = {
    "wrong dimension": lambda x: x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + 1e-5),
    "two dimensions": lambda x: x * torch.rsqrt(x.pow(2).mean((0, 1), keepdim=True) + 1e-5),
    "half the sum": lambda x: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) * 0.5 + 1e-5),
    "cube": lambda x: x * torch.rsqrt(x.pow(3).abs().mean(-1, keepdim=True) + 1e-5),
    "alpha": lambda x: x * torch.rsqrt(torch.add(x.pow(2).mean(-1, keepdim=True), 1, alpha=2)),
    "another tensor": lambda x: x.abs() * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5),
    "another square": lambda x: x * torch.rsqrt((x * x.abs()).abs().mean(-1, keepdim=True) + 1e-5),
    "cube root": lambda x: x * torch.pow(x.pow(2).mean(-1, keepdim=True) + 1e-5, -0.25),
    "layer norm": lambda x: F.layer_norm(x, (HIDDEN,), eps=1e-5),
    "centred": lambda x: (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5),
}


@pytest.mark.parametrize("name", ALMOST)
def test_reader_finds_nothing_else(name):
    for shape in ((3, HIDDEN), (HIDDEN, HIDDEN)):
        graph = traced(ALMOST[name], torch.randn(shape)).graph
        assert [norm for norm in find_norms(graph) if not norm.refusal] == []


# Raise, fuse and lower, each alone


def block(spelling: Spelling, order: str, shape: tuple[int, ...], readers: str) -> Any:
    """An all-reduce, a view, a residual added or not, the norm; and who else reads the values between."""

    def function(x: Tensor, r: Tensor, w: Tensor) -> Any:
        summed = reduced(x.reshape(-1, HIDDEN)).reshape(shape) if len(shape) == 3 else reduced(x)
        total = {"none": lambda: summed, "left": lambda: r + summed, "right": lambda: summed + r}[order]()
        norm = spelling(total, w)
        others = {
            "none": (),
            "sum": (total,),
            "all-reduce": (summed * 2,),
            "both": (total.abs(), norm * 2, norm.reshape(-1)),
        }
        return (norm, *others[readers])

    return function


BLOCKS = (
    SPELLINGS,
    st.sampled_from(["none", "left", "right"]),
    SHAPES,
    st.sampled_from(["none", "sum", "all-reduce", "both"]),
    DTYPES,
)


@many(40)
@given(*BLOCKS, st.booleans())
def test_raise_then_lower_computes_what_was_written(spelling, order, shape, readers, dtype, inline):
    inputs = values(shape, dtype)
    module = traced(block(spelling, order, shape, readers), *inputs)
    config = PassConfig(inline_native=inline)
    raised, context = rewritten(module, config, raise_ops, lower_ops)
    same(run(module, inputs), run(raised, inputs))
    calls = [str(node.target) for node in rewritten(module, config, raise_ops)[0].graph.nodes]
    assert any(call.startswith("fusewire.") for call in calls) != bool(context.refused)


@many(40)
@given(*BLOCKS)
def test_raise_and_fuse_compute_what_was_written(spelling, order, shape, readers, dtype):
    inputs = values(shape, dtype)
    module = traced(block(spelling, order, shape, readers), *inputs)
    fused, context = rewritten(module, PassConfig(), raise_ops, fuse_all_reduce)
    same(run(module, inputs), run(fused, inputs))
    count = sum(node.target is fuzz.FUSED_OP for node in fused.graph.nodes)
    # Only a reader of the all-reduce's own result stands in the way, and only where a residual is added to it.
    assert count == (not (readers == "all-reduce" and order != "none"))
    assert bool(context.refused) != bool(count)


@many(30)
@given(st.sampled_from(FORMS), st.sampled_from([0.0, 1.0, -1]), EPSILONS, SHAPES, DTYPES, st.booleans(), st.booleans())
def test_lower_keeps_the_operators_meaning(form, bias, eps, shape, dtype, weighted, with_residual):
    inputs = values(shape, dtype)
    group = dist.group.WORLD.group_name

    def function(x: Tensor, r: Tensor, w: Tensor) -> Any:
        options = (w if weighted else None, float(eps), bias, form)
        fused = fusewire.all_reduce_rms_norm(x, r if with_residual else None, *options, group)
        other = fusewire.rms_norm(fused[1][..., :4], None, float(eps) + 0.5), fusewire.rms_norm(r, None, 0.25)
        return (
            *fused,
            fusewire.rms_norm(fused[1], *options),
            *fusewire.fused_add_rms_norm(fused[0], r, *options),
            *other,
        )

    module = traced(function, *inputs)
    want = run(module, inputs)
    for inline in (False, True):
        lowered, _ = rewritten(module, PassConfig(inline_native=inline), lower_ops)
        same(want, run(lowered, inputs))
        calls = [node for node in lowered.graph.nodes if str(node.target).startswith("fusewire.")]
        assert len(calls) == (0 if inline else 5)


# All passes


def text(module: GraphModule) -> str:
    """The graph with its nodes numbered in order, since a second run names them anew."""
    numbers = {node: i for i, node in enumerate(module.graph.nodes)}
    return "\n".join(
        f"{node.op} {node.op == 'call_function' and node.target} "
        f"{torch.fx.map_arg((node.args, node.kwargs), lambda n: f'n{numbers[n]}')}"
        for node in module.graph.nodes
    )


@many(40)
@given(*BLOCKS, st.booleans())
def test_passes_are_idempotent(spelling, order, shape, readers, dtype, inline):
    inputs = values(shape, dtype)
    module = traced(block(spelling, order, shape, readers), *inputs)
    config = PassConfig(inline_native=inline)
    once = fuzz.copy_of(module.graph)
    run_passes(once.graph, config)
    twice = fuzz.copy_of(once.graph)
    run_passes(twice.graph, config)
    assert text(once) == text(twice)
    same(run(module, inputs), run(twice, inputs))


# Programs that write in place. Their numbers are small integers, so that nothing depends on where is rounded.

WRITES = (
    "x.mul_(2)", "y.mul_(2)", "r.add_(1)", "w.add_(1)", "b.add_(1)", "a.add_(1)", "t.mul_(2)", "v.mul_(2)", "x.copy_(r)",
    "r.copy_(a)", "w.copy_(b)", "b.copy_(a[0])", "wide.add_(1)", "o.mul_(2)", "c.add_(1)", "c.copy_(r)", "k.add_(1)",
    "ws.add_(1)", "x[0].zero_()", "r.view(-1)[:3].mul_(2)", "t.index_copy_(0, i, r)", "scale.mul_(2)", "wb.add_(1)",
)  # fmt: skip


@st.composite
def writing_programs(draw: Any) -> str:
    """Straight-line programs around one norm, with in-place writes between any two of their lines."""
    between = draw(
        st.sampled_from(["a * 1", "a * scale", "a * 2", "a + b", "a.view(1, 3, 8).view(3, 8)", "a + c", "c + a", "a"])
    )
    added = draw(st.sampled_from(["r + v", "v + k", "k + v", "v"]))
    weighted = draw(
        st.sampled_from(["(n * (ws + 1)).to(d)", "(n * wb).to(d)", "n.to(d) * w", "(n * ws).to(d)", "n.to(d)"])
    )
    early = draw(
        st.permutations(["k = x.to(d, copy=True)", "ws = w.float()", "a = reduced(x)", "c = reduced(y)", "wb = w + 1"])
    )
    if early.index("ws = w.float()") < early.index("wb = w + 1") and draw(st.booleans()):
        early[early.index("wb = w + 1")] = "wb = ws + 1"
    norm = ["wide = t.float()", "n = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 0.5)", f"o = {weighted}"]
    lines = [*early, f"v = {between}", f"t = {added}", *norm]
    for _ in range(draw(st.integers(1, 3))):
        write = draw(st.sampled_from(WRITES))
        read = set(re.findall(r"\b[a-z]+\b", write)) - set("xyrwbi")
        start = max((i + 1 for i, line in enumerate(lines) if line.split(" ")[0] in read), default=0)
        # Past the all-reduces a write forbids every fusion; before and between them it must forbid the right ones.
        last = lines.index(f"v = {between}") if draw(st.integers(0, 3)) else len(lines)
        lines.insert(draw(st.integers(start, max(start, last))), write)
    outputs = draw(st.lists(st.sampled_from(["a", "v", "t", "c", "k", "n", "wide"]), max_size=2, unique=True))
    return "\n".join([*lines, f"return ({', '.join(['o', *outputs])},)"])


def whole(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, shape, generator=generator).to(dtype)


NORM = "wide = t.float()\nn = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 0.5)\n"
WEIGHT_WRITTEN = f"wb = w.float() + 1\nw.add_(1)\na = reduced(x)\nt = r + a\n{NORM}o = (n * wb).to(d)\nreturn (o,)"
WRITTEN_BETWEEN = f"a = reduced(x)\nx.mul_(2)\nc = reduced(y)\nt = r + (a + c)\n{NORM}o = n.to(d) * w\nreturn (o,)"


@many(300)
@example(WEIGHT_WRITTEN, torch.bfloat16, False)
@example(WRITTEN_BETWEEN, torch.bfloat16, False)
@given(writing_programs(), st.sampled_from([torch.bfloat16, torch.float32]), st.booleans())
def test_nothing_moves_past_a_write(program, dtype, inline):
    scope: dict[str, Any] = {"torch": torch, "reduced": reduced, "d": dtype}
    body = "\n".join(f"    {line}" for line in program.splitlines())
    exec(f"def function(x, y, r, w, b, i, scale):\n{body}", scope)
    inputs = [whole((3, HIDDEN), s, dtype) for s in (1, 2, 3)] + [whole((HIDDEN,), s, dtype) for s in (4, 5)]
    inputs += [torch.tensor([2, 0, 1]), torch.tensor(2.0, dtype=dtype)]
    module = traced(scope["function"], *inputs)
    want = run(module, inputs)
    copied = fuzz.copy_of(module.graph)
    report = run_passes(copied.graph, PassConfig(inline_native=inline))
    copied.graph.lint()
    got = run(copied, inputs)
    assert all(note.startswith("taken to be equal on all ranks: 1 scale") for note in report.notes)
    for before, after in zip([*want.outputs, *want.inputs], [*got.outputs, *got.inputs], strict=True):
        assert torch.equal(before, after), program
    assert len(got.collectives) <= len(want.collectives)
