"""Post-grad graphs for tests: everything Inductor does up to its custom pass, without generating code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import _recursive_post_grad_passes, compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensor

from fusewire.fusion_passes.backend import specialize_epsilons
from fusewire.fusion_passes.config import PassConfig
from fusewire.fusion_passes.pipeline import run_passes
from fusewire.fusion_passes.report.model import GraphReport


@dataclass
class Captured:
    """What the passes made of one compiled function; `run` executes the rewritten graph operator by operator."""

    graphs: list[torch.fx.Graph] = field(default_factory=list)
    before: list[str] = field(default_factory=list)
    graph_reports: list[GraphReport] = field(default_factory=list)
    run: Callable[..., Any] | None = None

    @property
    def graph(self) -> torch.fx.Graph:
        assert len(self.graphs) == 1, f"{len(self.graphs)} graphs were compiled"
        return self.graphs[0]

    @property
    def report(self) -> GraphReport:
        assert len(self.graph_reports) == 1, f"{len(self.graph_reports)} graphs were compiled"
        return self.graph_reports[0]

    def targets(self) -> list[str]:
        """What the rewritten graph calls, in order."""
        return [str(node.target) for node in self.graph.nodes if node.op == "call_function"]

    def count(self, target: Any) -> int:
        return sum(node.target is target for node in self.graph.nodes)

    def verdicts(self) -> list[tuple[str, str]]:
        """(status, gate) of each all-reduce."""
        return [(entry.status, entry.gate) for entry in self.report.entries]

    def reasons(self) -> list[str]:
        return [entry.reason for entry in self.report.entries]


class _Recorder(CustomGraphPass):
    def __init__(self, captured: Captured, config: PassConfig) -> None:
        self.captured, self.config = captured, config

    def __deepcopy__(self, memo: Any) -> _Recorder:
        return self

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.captured.before.append(str(graph))
        self.captured.graph_reports.append(run_passes(graph, self.config))
        graph.lint()
        self.captured.graphs.append(graph)

    def uuid(self) -> Any:
        return None


def capture(
    fn: Callable[..., Any],
    *inputs: Any,
    config: PassConfig | None = None,
    dynamic: bool | None = False,
    grad: bool = False,
    specialize: bool = True,
    **options: Any,
) -> Captured:
    """Compile `fn(*inputs)` up to the post-grad passes, run ours, and execute the result once."""
    captured = Captured()
    recorder = _Recorder(captured, config if config is not None else PassConfig(**options))

    def inner(gm: torch.fx.GraphModule, example_inputs: Any, **kwargs: Any) -> Callable[..., Any]:
        mode = next(v.fake_mode for v in example_inputs if isinstance(v, FakeTensor))
        with V.set_fake_mode(mode):
            _recursive_post_grad_passes(gm, is_inference=bool(kwargs.get("is_inference")))
        gm.recompile()

        def boxed(args: Any) -> Any:
            return gm.forward(*args)

        boxed._boxed_call = True  # type: ignore[attr-defined]
        return boxed

    def backend(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        if specialize:
            specialize_epsilons(gm)
        patches = {"post_grad_custom_post_pass": recorder, "force_disable_caches": True}
        with inductor_config.patch(patches):
            return compile_fx(gm, example_inputs, inner_compile=inner)

    torch._dynamo.reset()
    captured.run = torch.compile(fn, backend=backend, dynamic=dynamic, fullgraph=True)
    with torch.set_grad_enabled(grad):
        captured.result = captured.run(*inputs)  # type: ignore[attr-defined]
    return captured
