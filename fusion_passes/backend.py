"""Define the torch.compile backend, the context manager and the pass that Inductor calls.

torch.compile(model, backend="fusewire", options={"expect_fused": "all", "max_autotune": True})

with fusewire.enable(PassConfig(...)):
    torch.compile(model)(inputs)
"""

from __future__ import annotations

import contextlib
import contextvars
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from fusewire.custom_ops.coordination.busy import busy
from fusewire.errors import ConfigError
from fusewire.fusion_passes.cache_key import cache_key
from fusewire.fusion_passes.compiler.compile_fx import (
    HOOK,
    CustomGraphPass,
    compilations_wrapped,
    compile_graph,
    custom_passes,
    free_cuda_graphs,
    option_names,
    option_type,
    options_of_mode,
    takes_inference,
    with_custom_passes,
)
from fusewire.fusion_passes.compiler.dynamo import (
    RestartAnalysis,
    capture_again_with_numbers,
    float_inputs,
    floats_as_numbers,
    forget_attributes,
    forget_numbers,
    graph_breaks,
    graph_kind,
    steady_attributes,
)
from fusewire.fusion_passes.config import DISABLE_VARIABLE, PassConfig, disabled_by_environment, unknown_option
from fusewire.fusion_passes.pipeline import run_passes
from fusewire.fusion_passes.report.cache import CURRENT_CACHE, hits_noted, reports_kept
from fusewire.fusion_passes.report.expectation import check_graph, check_program
from fusewire.fusion_passes.report.store import add_note, report
from fusewire.fusion_passes.report.structure import compilation_name
from fusewire.fusion_passes.spmd.agreement import PUBLISHED, Posting, agree, announce_unfused

_DISABLED = f"has set {DISABLE_VARIABLE}"
_NOTHING_COMPILED = (
    "in a block of fusewire.enable() nothing was compiled with Inductor: what was compiled "
    "before, or was loaded from an engine's own cache, runs as it is, with fusewire or without; "
    "make the model's first call in the block"
)
_NOT_DUMPED = (
    "dump_graphs wrote nothing of graphs from the compile cache, on which no pass runs; "
    "TORCHINDUCTOR_FORCE_DISABLE_CACHES=1 has them compiled anew"
)
# The graphs compiled so far in this thread's innermost block of `enable`.
_SEEN: contextvars.ContextVar[list[Any] | None] = contextvars.ContextVar("fusewire_seen", default=None)


class FusewirePass(CustomGraphPass):
    """The custom pass that runs fusewire's passes on every post-grad graph in Inductor.

    Holds only its arguments, since Inductor copies and pickles it. May also be called directly.

    Args:
        config: the options; defaults if None.
        report_key: `ReportCache.key` of this compilation. It is part of the compile cache's key, so
            a graph found there always has a report.
        unfused: process groups whose collectives stay as written, with the reason.
    """

    def __init__(
        self,
        config: PassConfig | None = None,
        report_key: str = "",
        unfused: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.config = config if config is not None else PassConfig()
        self.report_key = report_key
        self.unfused = dict(unfused)

    def __call__(self, graph: Graph) -> None:
        report = run_passes(graph, self.config, unfused=self.unfused)
        cache = CURRENT_CACHE.get()
        if cache is not None:
            cache.save(report)

    def uuid(self) -> Any:
        """Return this pass's part of the compile cache's key."""
        return f"fusewire-{cache_key(self.config)}-{self.report_key}-{sorted(self.unfused)}"


class ChainedPass(CustomGraphPass):
    """Several custom passes as one (torch 2.11 takes no list)."""

    def __init__(self, passes: Sequence[Callable[..., None]]) -> None:
        self.passes = tuple(passes)

    def __call__(self, graph: Graph) -> None:
        for item in self.passes:
            if takes_inference(item):
                item(graph, is_inference=graph_kind() == "inference")
            else:
                item(graph)

    def uuid(self) -> Any:
        """Return all uuids; None, which bypasses the compile cache, if a pass has none."""
        keys = [item.uuid() if isinstance(item, CustomGraphPass) else None for item in self.passes]
        return tuple(keys) if all(keys) else None


def chained_hook(ours: FusewirePass, existing: Any = None) -> CustomGraphPass:
    """Return a pass that runs `existing`, without earlier passes of fusewire's, then `ours`."""
    if existing is None:
        return ours
    earlier = existing if isinstance(existing, (list, tuple)) else [existing]
    kept = [item for item in earlier if not isinstance(item, FusewirePass)]
    for item in kept:
        if isinstance(item, ChainedPass):
            kept = [p for p in item.passes if not isinstance(p, FusewirePass)] + [k for k in kept if k is not item]
            break
    return ChainedPass([*kept, ours]) if kept else ours


def split_options(options: Mapping[str, Any] | PassConfig | None) -> tuple[PassConfig, dict[str, Any]]:
    """Split torch.compile's `options` into a PassConfig and Inductor's own options.

    Raises:
        ConfigError: a name is unknown (the nearest is suggested), or a value has another type.
    """
    if isinstance(options, PassConfig):
        return options, {}
    if options is not None and not isinstance(options, Mapping):
        raise ConfigError(f"options is {options!r}; it must be a mapping of names to values, or a PassConfig")
    ours: dict[str, Any] = {}
    inductors: dict[str, Any] = {}
    for name, value in (options or {}).items():
        if not isinstance(name, str):
            raise ConfigError(f"options has the name {name!r}; names of options are strings")
        plain = name.replace("-", "_")
        if plain in PassConfig.field_names():
            ours[plain] = value
        elif (wanted := option_type(plain)) is not None:
            if isinstance(wanted, type) and not isinstance(value, wanted):
                raise ConfigError(f"{name} is {value!r}; Inductor's option must be of type {wanted.__name__}")
            inductors[plain] = value
        else:
            raise ConfigError(unknown_option(name, (*PassConfig.field_names(), *option_names())))
    return PassConfig(**ours), inductors


def fusewire_backend(
    model: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile a graph with Inductor and fusewire's passes: the torch.compile backend "fusewire".

    Args:
        model: the graph that Dynamo captured.
        example_inputs: its inputs.
        options: fields of PassConfig and options of Inductor, mixed.
        mode: as in torch.compile ("reduce-overhead", "max-autotune", ...).

    Raises:
        ConfigError: an option is unknown or has a value that cannot be used.
        ExpectationError: see `PassConfig.expect_fused`.
    """
    config, patches = split_options(options)
    patches = {**options_of_mode(mode), **patches}
    if disabled_by_environment():
        announce_unfused(_DISABLED)
        return compile_graph(model, example_inputs, patches)
    specialize_epsilons(model)
    existing = patches.get(HOOK, custom_passes())
    with _compilation(model, example_inputs, config) as ours:
        compiled = compile_graph(model, example_inputs, {**patches, HOOK: chained_hook(ours, existing)})
    forget_numbers()
    if not graph_breaks():  # the graph is the whole of a compiled function
        check_program(report().graphs, config.expect_fused)
    return compiled


def _reset() -> None:
    free_cuda_graphs()
    forget_attributes()


fusewire_backend.reset = _reset  # type: ignore[attr-defined]  # for torch._dynamo.reset()


@contextlib.contextmanager
def _compilation(model: GraphModule, example_inputs: Sequence[Any], config: PassConfig) -> Iterator[FusewirePass]:
    """Yield the passes for one compilation; keep its reports beside the compile cache.

    Raises:
        PeerTimeoutError, RankMismatchError: ranks cannot agree on a graph that the cache may hold.
        ExpectationError: a graph from the cache does not meet `config.expect_fused`.
    """
    with busy(), reports_kept(compilation_name(model, example_inputs, cache_key(config))) as cache:
        # A rank that finds the graph in the cache runs no pass, so it compares with its peers here.
        prints = cache.fingerprints
        unfused = agree(prints, wait=not config.compile_alone)
        token = PUBLISHED.set(frozenset(Posting(item.program, item.rewritten, item.label) for item in prints))
        try:
            yield FusewirePass(config, cache.key, unfused)
            for kept in cache.restore():
                check_graph(kept, config.expect_fused)
                if config.dump_graphs is not None:
                    add_note(_NOT_DUMPED)
        except RestartAnalysis:  # no failure: Dynamo captures the graph anew
            raise
        except Exception as error:
            announce_unfused(f"could not compile a graph: {type(error).__name__}")
            raise
        finally:
            PUBLISHED.reset(token)


@contextlib.contextmanager
def enable(config: PassConfig | None = None, **fields: Any) -> Iterator[PassConfig]:
    """Within the block, run fusewire's passes on all that this thread compiles with Inductor.

    torch.compile compiles a function at its first call, so make that call within the block. Custom
    passes from Inductor's configuration or from a torch.compile call's options run first.

    Args:
        config: the options; or give single fields as keywords.

    Raises:
        ConfigError: an option is unknown or has a value that cannot be used.
        ExpectationError: see `PassConfig.expect_fused`.
    """
    if config is not None and fields:
        raise ConfigError("give a PassConfig or single fields, not both")
    if config is not None and not isinstance(config, PassConfig):
        raise ConfigError(f"enable takes a PassConfig or fields as keywords, not {type(config).__name__}")
    chosen = config if config is not None else PassConfig.from_options(fields)
    if disabled_by_environment():
        announce_unfused(_DISABLED)
        yield chosen
        return
    hook = chained_hook(FusewirePass(chosen), custom_passes())
    seen: list[Any] = []
    token = _SEEN.set(seen)
    try:
        with with_custom_passes(hook), floats_as_numbers(), compilations_wrapped(_around), hits_noted():
            yield chosen
    finally:
        _SEEN.reset(token)
    if not seen:
        add_note(_NOTHING_COMPILED)
    check_program(report().graphs, chosen.expect_fused)


def _around(model: Any, example_inputs: Any, existing: Any) -> AbstractContextManager[Any] | None:
    """Return the block in which `enable` compiles a graph, or None if it leaves the graph alone.

    A compilation's own custom passes replace fusewire's in Inductor; the block adds fusewire's.
    """
    ours = _ours_in(existing) or _ours_in(custom_passes())
    if (seen := _SEEN.get()) is not None:
        seen.append(model)
    if ours is None or CURRENT_CACHE.get() is not None or not isinstance(model, GraphModule):
        return None
    return _compilation_behind(existing, model, example_inputs, ours.config)


@contextlib.contextmanager
def _compilation_behind(
    existing: Any, model: GraphModule, example_inputs: Sequence[Any], config: PassConfig
) -> Iterator[CustomGraphPass]:
    with _compilation(model, example_inputs, config) as passes:
        yield chained_hook(passes, existing)


def _ours_in(hook: Any) -> FusewirePass | None:
    """Return the FusewirePass among custom passes, or None."""
    if isinstance(hook, ChainedPass):
        hook = hook.passes
    items = hook if isinstance(hook, (list, tuple)) else [hook]
    return next((item for item in items if isinstance(item, FusewirePass)), None)


# Epsilons under dynamic=True


_OPERATIONS = {"mul", "rmul", "imul", "truediv", "div", "add", "radd", "iadd", "sub", "rsub", "isub"}


def specialize_epsilons(model: GraphModule) -> None:
    """Make Dynamo capture again if dynamic=True made a norm's epsilon or a scale an input.

    A norm whose epsilon is an input cannot be fused, nor an all-reduce that an input scales
    (Granite's residual multiplier): the graph does not show that it is equal on every rank. An
    input that is added to 16-bit values is added in fp32, as no residual of 16 bits can be. So
    floats that reach a root become numbers, and module attributes that multiply or are added.
    """
    inputs = dict(float_inputs(model))
    numbers = {node for node in inputs if any(_reaches_rsqrt(user) for user in node.users)}
    operands = [node for node in inputs if node not in numbers and any(_is_operand(user) for user in node.users)]
    numbers |= steady_attributes(operands)
    capture_again_with_numbers([name for node, name in inputs.items() if node in numbers])


def _is_operand(item: Node) -> bool:
    names = (getattr(user.target, "__name__", str(user.target)) for user in item.users)
    return any(name.strip("_") in _OPERATIONS for name in names)


def _reaches_rsqrt(node: Node, depth: int = 4) -> bool:
    name = getattr(node.target, "__name__", str(node.target))
    if "sqrt" in name or "rms_norm" in name:
        return True
    if name == "pow" or node.target in (operator.pow, torch.pow):
        return len(node.args) > 1 and node.args[1] in (-0.5, 0.5)
    if depth == 0 or name not in ("item", "add", "__add__", "__radd__", "iadd", "float"):
        return False
    return any(_reaches_rsqrt(user, depth - 1) for user in node.users)
