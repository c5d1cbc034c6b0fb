"""Measure what fusewire's passes cost a compilation: time, share of compiling, and memory, by number of layers.

    python examples/benchmarks/compile_cost.py                        # 8, 16, 32, 64 layers; 32 compiled in full
    python examples/benchmarks/compile_cost.py --full 8 32 --check    # fail if the cost is above its limits

A Llama-like decoder, tensor-parallel over a process group of simulated ranks, is compiled in this one
process, with static shapes and with a dynamic number of tokens; no GPU is needed. The post-grad graph
is taken from a compilation that is cut short, and the passes run over copies of it: several times for
the time (the median counts), then once under tracemalloc for the memory (the peak, and what stays
allocated). Numbers of layers under --full are also compiled to the end, with caches off, for the
passes' share of the whole.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import resource
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import clear_caches

import fusewire
from fusewire.fusion_passes.backend import FusewirePass

VOCABULARY, HEAD_DIM = 1024, 32
SHAPES = ("static", "dynamic")
MAX_SHARE, MAX_MEGABYTES, LIMITS_AT = 0.02, 50.0, 32
# Twice the layers may take twice the time and a little more, since clocks and garbage collection vary.
MAX_GROWTH = 1.4


@dataclasses.dataclass
class Row:
    """One measurement. Times in seconds, memory in MB (10**6 bytes).

    Processor times are this process's own, in user mode, which other work on the machine changes
    least; the C++ or Triton compiler runs in other processes and is not counted. The shares are of the
    passes in one whole compilation, by the processor and by the clock. They leave out garbage
    collections that happened to fall into the passes (`collected_seconds`, by the clock): a full
    one visits everything that the compilation has made so far, whoever's it is.
    """

    layers: int
    shapes: str
    nodes: int
    all_reduces: int
    fused: int
    pass_seconds: float
    peak_megabytes: float
    kept_megabytes: float
    clock_seconds: float = 0.0
    processor_seconds: float = 0.0
    clock_share: float = 0.0
    processor_share: float = 0.0
    collected_seconds: float = 0.0


class Layer(nn.Module):
    """A decoder layer with this rank's heads and this rank's part of the feed-forward network."""

    def __init__(self, hidden: int, world_size: int) -> None:
        super().__init__()
        own = hidden // world_size
        self.norms = nn.ModuleList(nn.RMSNorm(hidden, eps=1e-5) for _ in range(2))
        self.q, self.k, self.v = (nn.Linear(hidden, own, bias=False) for _ in range(3))
        self.o = nn.Linear(own, hidden, bias=False)
        self.gate, self.up = (nn.Linear(hidden, 3 * own, bias=False) for _ in range(2))
        self.down = nn.Linear(3 * own, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + reduce(self.attention(self.norms[0](x), cos, sin))
        y = self.norms[1](x)
        return x + reduce(self.down(F.silu(self.gate(y)) * self.up(y)))

    def attention(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (linear(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        q, k = (t * cos + torch.cat((-t[..., HEAD_DIM // 2 :], t[..., : HEAD_DIM // 2]), -1) * sin for t in (q, k))
        return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, layers: int, hidden: int, world_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, hidden)
        self.layers = nn.ModuleList(Layer(hidden, world_size) for _ in range(layers))
        self.norm = nn.RMSNorm(hidden, eps=1e-5)
        self.head = nn.Linear(hidden, VOCABULARY // world_size, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1])[:, None] * 10000.0 ** -torch.linspace(0, 1, HEAD_DIM // 2)
        angles = torch.cat((positions, positions), -1)
        cos, sin = angles.cos().to(torch.bfloat16), angles.sin().to(torch.bfloat16)
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.head(self.norm(x))


def reduce(x: Tensor) -> Tensor:
    return funcol.all_reduce(x, "sum", dist.group.WORLD)


def processor_time(of: int) -> float:
    return resource.getrusage(of).ru_utime


def now() -> tuple[float, float]:
    """Return the clock's and this thread's processor time, in seconds."""
    return time.perf_counter(), processor_time(resource.RUSAGE_THREAD)


class _Enough(Exception):
    """The graph has been seen; the rest of the compilation is not needed."""


class _Timed(CustomGraphPass):
    """fusewire's passes, timed by the clock and by the processor; Inductor's copies of it are itself."""

    def __init__(self) -> None:
        self.ours = FusewirePass()
        self.clock, self.processor = 0.0, 0.0
        self.collected, self.began = 0.0, (0.0, 0.0)

    def __deepcopy__(self, memo: object) -> _Timed:
        return self

    def __call__(self, graph: torch.fx.Graph) -> None:
        gc.callbacks.append(self._collection)
        clock, processor = now()
        self.ours(graph)
        self.clock += now()[0] - clock
        self.processor += now()[1] - processor
        gc.callbacks.remove(self._collection)

    def _collection(self, phase: str, _: dict[str, int]) -> None:
        """Take a garbage collection out of the passes' time."""
        if phase == "start":
            self.began = now()
            return
        clock, processor = (end - start for start, end in zip(self.began, now(), strict=True))
        self.clock -= clock
        self.processor -= processor
        self.collected += clock

    def uuid(self) -> None:
        return None


class _Probe(CustomGraphPass):
    """Inductor copies its configuration, so what this finds goes to `found`, which the copies share."""

    def __init__(self, look: Callable[[torch.fx.Graph], Row], found: list[Row]) -> None:
        self.look, self.found = look, found

    def __deepcopy__(self, memo: object) -> _Probe:
        return self

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.found.append(self.look(graph))
        raise _Enough

    def uuid(self) -> None:
        return None


def measure_passes(model: Model, ids: Tensor, repeat: int, shapes: str) -> Row:
    """Time and memory of the passes over this model's post-grad graph."""

    def look(graph: torch.fx.Graph) -> Row:
        seconds = []
        for _ in range(repeat):
            copied = copy_of(graph)
            gc.collect()
            gc.disable()  # a full collection takes as long as the passes, and falls into a run or not
            start = processor_time(resource.RUSAGE_THREAD)
            fusewire.run_passes(copied)
            seconds.append(processor_time(resource.RUSAGE_THREAD) - start)
            gc.enable()
        copied = copy_of(graph)
        gc.collect()
        tracemalloc.start()
        try:
            report = fusewire.run_passes(copied)
            gc.collect()
            kept, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        fused = sum(entry.status == "fused" for entry in report.entries)
        found = len(report.entries)
        return Row(
            len(model.layers),
            shapes,
            len(graph.nodes),
            found,
            fused,
            statistics.median(seconds),
            peak / 1e6,
            kept / 1e6,
        )

    found: list[Row] = []
    try:
        compile_with(_Probe(look, found), model, ids, shapes)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        if not isinstance(error.inner_exception, _Enough):
            raise
    return found[0]


def copy_of(graph: torch.fx.Graph) -> torch.fx.Graph:
    copied = torch.fx.Graph()
    copied.output(copied.graph_copy(graph, {}))
    copied.owning_module = graph.owning_module
    return copied


def compile_with(passes: CustomGraphPass, model: Model, ids: Tensor, shapes: str) -> tuple[float, float]:
    """Compile and call the model with nothing in any cache; seconds of that first call, by clock and by processor."""
    torch._dynamo.reset()
    clear_caches()
    # A full garbage collection visits all that torch ever made, and would fall on whatever happens to run just then.
    gc.collect()
    gc.freeze()
    with (
        tempfile.TemporaryDirectory() as cache,
        mock.patch.dict("os.environ", TORCHINDUCTOR_CACHE_DIR=cache),
        inductor_config.patch({"post_grad_custom_post_pass": passes, "fx_graph_remote_cache": False}),
        torch.no_grad(),
    ):
        clock, processor = time.perf_counter(), processor_time(resource.RUSAGE_SELF)
        if shapes == "dynamic":
            ids = ids.clone()
            torch._dynamo.mark_dynamic(ids, 1)
        torch.compile(model, fullgraph=True, dynamic=None if shapes == "dynamic" else False)(ids)
        return time.perf_counter() - clock, processor_time(resource.RUSAGE_SELF) - processor


def measure(layers: int, shapes: str, arguments: argparse.Namespace) -> Row:
    """One row; compiled to the end too if `layers` is under --full."""
    torch.manual_seed(0)
    model = Model(layers, arguments.hidden, arguments.world_size).to(torch.bfloat16).eval()
    ids = torch.randint(0, VOCABULARY, (1, arguments.tokens))
    row = measure_passes(model, ids, arguments.repeat, shapes)
    if layers in arguments.full:
        timed = _Timed()
        row.clock_seconds, row.processor_seconds = compile_with(timed, model, ids, shapes)
        row.clock_share = timed.clock / row.clock_seconds
        row.processor_share = timed.processor / row.processor_seconds
        row.collected_seconds = timed.collected
    return row


def problems(rows: list[Row]) -> list[str]:
    """Return a message for each limit that is exceeded."""
    found = []
    for row in rows:
        what = f"{row.layers} layers, {row.shapes} shapes"
        share = max(row.processor_share, row.clock_share)
        if row.layers <= LIMITS_AT and share >= MAX_SHARE:
            found.append(f"{what}: {share:.1%} of compiling, the limit is {MAX_SHARE:.0%}")
        if row.layers <= LIMITS_AT and row.peak_megabytes >= MAX_MEGABYTES:
            found.append(f"{what}: {row.peak_megabytes:.0f} MB, the limit is {MAX_MEGABYTES:.0f} MB")
        if row.fused != row.all_reduces:
            found.append(f"{what}: {row.fused} of {row.all_reduces} all-reduces fused")
    for shapes in dict.fromkeys(row.shapes for row in rows):
        of_these = [row for row in rows if row.shapes == shapes]
        first, last = of_these[0], of_these[-1]
        growth = (last.pass_seconds / first.pass_seconds) / (last.layers / first.layers)
        if growth > MAX_GROWTH:
            found.append(
                f"{shapes} shapes: from {first.layers} to {last.layers} layers the time per layer "
                f"grew {growth:.2f} times"
            )
    return found


def as_table(rows: list[Row]) -> str:
    lines = [
        "| layers | shapes | nodes | all-reduces fused | passes, s | per layer, ms | peak "
        "memory, MB | kept, MB | compile, s | share of it | compile, processor s | share of it | "
        "collected meanwhile, s |",
        "|--:|:--|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        full = [""] * 5
        if row.clock_seconds:
            full = [f"{row.clock_seconds:.1f}", f"{row.clock_share:.2%}"]
            full += [f"{row.processor_seconds:.1f}", f"{row.processor_share:.2%}", f"{row.collected_seconds:.2f}"]
        cells = [
            row.layers,
            row.shapes,
            row.nodes,
            f"{row.fused} of {row.all_reduces}",
            f"{row.pass_seconds:.3f}",
            f"{1000 * row.pass_seconds / row.layers:.2f}",
            f"{row.peak_megabytes:.1f}",
            f"{row.kept_megabytes:.1f}",
            *full,
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--full", type=int, nargs="*", default=[32], help="numbers of layers to compile to the end")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=SHAPES)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--world-size", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=3, help="how often the passes run for the time")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a limit is exceeded")
    parser.add_argument("--out", type=Path, help="file for the rows as JSON")
    arguments = parser.parse_args()
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=arguments.world_size)
    print(f"torch {torch.__version__}, {time.strftime('%Y-%m-%d')}, {arguments.world_size} ranks", flush=True)
    rows = []
    small = Model(1, arguments.hidden, arguments.world_size).to(torch.bfloat16)
    measure_passes(small, torch.zeros(1, 8).long(), 1, "static")
    for layers in sorted({*arguments.layers, *arguments.full}):
        for shapes in arguments.shapes:
            rows.append(measure(layers, shapes, arguments))
            print(f"{layers} layers, {shapes}: passes {rows[-1].pass_seconds:.3f} s", file=sys.stderr, flush=True)
    dist.destroy_process_group()
    print(as_table(rows))
    if arguments.out:
        arguments.out.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
    exceeded = problems(rows)
    for problem in exceeded:
        print(problem, file=sys.stderr)
    return 1 if arguments.check and exceeded else 0


if __name__ == "__main__":
    raise SystemExit(main())
