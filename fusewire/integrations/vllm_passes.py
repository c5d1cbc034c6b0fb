"""vLLM's pass manager with fusewire's passes in it. Imported in the workers, when they compile.

vLLM compiles a model in pieces, equal pieces once. The report counts all-reduces as the running
model has them, and is kept beside vLLM's compile cache, from which later starts run no pass.
"""

from __future__ import annotations

import contextvars
import dataclasses
import functools
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.fx import Graph
from vllm.compilation.backends import CompilerManager
from vllm.compilation.passes.inductor_pass import InductorPass
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname

from fusewire.errors import ExpectationError
from fusewire.fusion_passes.cache_key import cache_key
from fusewire.fusion_passes.compiler.cache_artifact import cache_folder
from fusewire.fusion_passes.config import PassConfig
from fusewire.fusion_passes.pipeline import run_passes
from fusewire.fusion_passes.report.cache import load_report, save_report
from fusewire.fusion_passes.report.expectation import check_model
from fusewire.fusion_passes.report.model import GraphReport
from fusewire.fusion_passes.report.store import add_note, add_use, report
from fusewire.integrations.vllm_options import KEY, OPTIONS

if TYPE_CHECKING:
    from vllm.compilation.passes.pass_manager import PostGradPassManager
else:
    PostGradPassManager = resolve_obj_by_qualname(current_platform.fusewire_extends)

# vLLM's passes that clean up, canonicalize, or split a sequence. All others fuse norms with what
# follows, so fusewire comes before them.
_BEFORE = ("NoOpEliminationPass", "AddRMSNormFusionPass", "SequenceParallelismPass", "AsyncTPPass")


class FusewirePass(InductorPass):  # type: ignore[misc]
    """fusewire's passes, as one pass of vLLM's."""

    def __init__(self, config: PassConfig) -> None:
        # The expectation is of the model, which vLLM compiles in pieces.
        self.config = dataclasses.replace(config, expect_fused=None)
        self.expect_fused = config.expect_fused

    def __call__(self, graph: Graph) -> None:
        """Rewrite a piece of the model in place. A collective of the ranks that compile it."""
        made = run_passes(graph, self.config)
        piece = _piece.get()
        if piece is not None:
            piece.append(made)

    def uuid(self) -> str:
        """Return what this pass adds to the keys of compiled pieces; equal on all ranks."""
        return f"fusewire-{cache_key(self.config, groups=False)}"


class FusewirePassManager(PostGradPassManager):  # type: ignore[misc]
    """vLLM's pass manager, with fusewire's pass where the configuration asks for it."""

    def configure(self, config: Any) -> None:
        """Assemble vLLM's passes and insert fusewire's before the first that fuses norms."""
        super().configure(config)
        asked = config.additional_config
        if not isinstance(asked, dict) or KEY not in asked:
            return
        names = [type(item).__name__ for item in self.passes]
        place = next((i for i, name in enumerate(names) if name not in _BEFORE), len(names))
        self.passes.insert(place, FusewirePass(PassConfig.from_options(asked[OPTIONS])))
        if not hasattr(CompilerManager.compile, "fusewire"):
            CompilerManager.compile = _reporting(CompilerManager.compile)


# The reports of the piece that is being compiled.
_piece: contextvars.ContextVar[list[GraphReport] | None] = contextvars.ContextVar("fusewire_vllm_piece", default=None)


@dataclasses.dataclass
class _Model:
    """The pieces of one model, compiled for one range of token counts.

    Attributes:
        pieces: by identity, each compiled piece with its reports.
        unreported: how many pieces came from a cache, so that no pass ran.
    """

    pieces: dict[int, tuple[Any, list[GraphReport]]] = dataclasses.field(default_factory=dict)
    unreported: int = 0


_models: weakref.WeakKeyDictionary[Any, dict[str, _Model]] = weakref.WeakKeyDictionary()


def _reporting(compile_piece: Callable[..., Any]) -> Callable[..., Any]:
    """Return vLLM's function that compiles one piece, with the counting of equal pieces."""

    @functools.wraps(compile_piece)
    def compile_and_count(
        manager: Any, graph: Any, inputs: Any, inductor: Any, compilation: Any, compile_range: Any, **place: Any
    ) -> Any:
        token = _piece.set([])
        try:
            compiled = compile_piece(manager, graph, inputs, inductor, compilation, compile_range, **place)
            made = _piece.get() or []
        finally:
            _piece.reset(token)
        ours = _our_pass(inductor)
        if ours is not None:
            model = _models.setdefault(manager, {}).setdefault(str(compile_range), _Model())
            _count(model, compiled, made)
            if place["graph_index"] == place["num_graphs"] - 1:
                prefix = Path(compilation.local_cache_dir).name  # which of the engine's models
                _finish(model, _kept_report(f"{prefix}-{compile_range}"), ours.expect_fused)
        return compiled

    compile_and_count.fusewire = True  # type: ignore[attr-defined]
    return compile_and_count


def _our_pass(inductor: dict[str, Any]) -> FusewirePass | None:
    managers = [value for value in inductor.values() if isinstance(value, FusewirePassManager)]
    return next((item for manager in managers for item in manager.passes if isinstance(item, FusewirePass)), None)


def _count(model: _Model, compiled: Any, made: list[GraphReport]) -> None:
    """Note the reports of a new piece, or one more use of an earlier one's."""
    if made:
        model.pieces[id(compiled)] = compiled, made
    elif id(compiled) in model.pieces:
        for graph in model.pieces[id(compiled)][1]:
            add_use(graph)
    else:
        model.unreported += 1


def _finish(model: _Model, kept: Path, expect_fused: int | str | None) -> None:
    """Keep the report of a model whose pieces are all compiled, and check the expectation.

    Raises:
        ExpectationError: another number of all-reduces is fused, or no report says how many.
    """
    numbers = {graph.number for _, made in model.pieces.values() for graph in made}
    graphs = [graph for graph in report().graphs if graph.number in numbers]
    if not model.unreported:
        save_report(kept, graphs)  # first: the pieces stay in the caches if the check fails
    elif not graphs and kept.exists():
        graphs = list(load_report(kept).graphs)
    else:
        lost = f"{model.unreported} pieces of the model came from vLLM's compile cache without a report"
        if expect_fused is not None:
            raise ExpectationError(
                f"expect_fused={expect_fused!r} cannot be checked: {lost}. Remove the cache "
                f"({kept.parent.parent}) and start again"
            )
        add_note(f"{lost}; the counts leave them out")
        return
    check_model(graphs, expect_fused)


def _kept_report(name: str) -> Path:
    # vLLM moves Inductor's cache into a folder of this configuration, before it compiles or loads.
    rank = dist.get_rank() if dist.is_initialized() else 0
    return cache_folder() / f"vllm-rank{rank}-{name}.json"


def report_text() -> str:
    """Return this worker's report as text; of a start from vLLM's cache, what was kept with it."""
    if not report().graphs:
        for file in sorted(cache_folder().glob(_kept_report("*").name)):
            load_report(file)
    return str(report())
