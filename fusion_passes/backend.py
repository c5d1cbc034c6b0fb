"""The three ways in: a torch.compile backend, a context manager, and the passes on their own.

torch.compile(model, backend="fusewire", options={"expect_fused": "all", "max_autotune": True})

with fusewire.enable(PassConfig(...)):
    torch.compile(model)(inputs)

fusewire.run_passes(graph)
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch._dynamo.exc import RestartAnalysis
from torch._inductor import config as inductor_config
from torch._inductor import custom_graph_pass
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, GraphModule, Node

from fusewire.errors import ConfigError
from fusewire.fusion_passes.compiler.compile_cache import KEEPER, accounts_kept, hits_noted, key_of_compilation
from fusewire.fusion_passes.compiler.inductor import graph_kind
from fusewire.fusion_passes.config import DISABLE_VARIABLE, PassConfig, disabled_by_environment, unknown_option
from fusewire.fusion_passes.pipeline import cache_key, run_passes
from fusewire.fusion_passes.spmd.agreement import POSTED, Posting, announce_unfused, settle

_HOOK = "post_grad_custom_post_pass"
_DISABLED = f"has set {DISABLE_VARIABLE}"
_InferenceAware = getattr(custom_graph_pass, "CustomInferenceAwareGraphPass", None)  # not in torch 2.11


class FusewirePass(CustomGraphPass):
    """fusewire's passes, as what Inductor calls on every post-grad graph.

    Stateless but for its configuration, since Inductor copies and pickles it. Can also be called on a graph by hand.

    Args:
        config: the options; defaults if None.
        account_key: names the place where the account of this compilation is kept. As part of the cache's key it makes
            sure that whoever finds a compiled graph in the cache finds the account of it too.
        unfused: process groups whose collectives are left as written, with the reason.
    """

    def __init__(
        self,
        config: PassConfig | None = None,
        account_key: str = "",
        unfused: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.config = config if config is not None else PassConfig()
        self.account_key = account_key
        self.unfused = dict(unfused)

    def __call__(self, graph: Graph) -> None:
        account = run_passes(graph, self.config, unfused=self.unfused)
        keeper = KEEPER.get()
        if keeper is not None:
            keeper.save(account)

    def uuid(self) -> Any:
        """Enters the compile cache's key."""
        return f"fusewire-{cache_key(self.config)}-{self.account_key}-{sorted(self.unfused)}"


class ChainedPass(CustomGraphPass):
    """Several custom passes in Inductor's one place for them (torch 2.11 takes no list)."""

    def __init__(self, passes: Sequence[Callable[[Graph], None]]) -> None:
        self.passes = tuple(passes)

    def __call__(self, graph: Graph) -> None:
        for item in self.passes:
            if _InferenceAware is not None and isinstance(item, _InferenceAware):
                item(graph, is_inference=graph_kind() == "inference")
            else:
                item(graph)

    def uuid(self) -> Any:
        """The uuids of all; None, which bypasses the compile cache, if one of them has none."""
        keys = [item.uuid() if isinstance(item, CustomGraphPass) else None for item in self.passes]
        return tuple(keys) if all(keys) else None


def chained_hook(ours: FusewirePass, existing: Any = None) -> CustomGraphPass:
    """fusewire's passes behind whatever custom pass is set already."""
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
    """Sort torch.compile's `options` into a PassConfig and Inductor's own options.

    Raises:
        ConfigError: a name is neither (the message suggests the nearest name), or a value is of another type.
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
        elif (wanted := _inductor_type(plain)) is not None:
            if isinstance(wanted, type) and not isinstance(value, wanted):
                raise ConfigError(f"{name} is {value!r}; Inductor's option must be of type {wanted.__name__}")
            inductors[plain] = value
        else:
            raise ConfigError(unknown_option(name, (*PassConfig.field_names(), *inductor_config.get_config_copy())))
    return PassConfig(**ours), inductors


def _inductor_type(name: str) -> Any:
    """The type of one of Inductor's options, aliases included, or None if there is no such option."""
    try:
        return inductor_config.get_type(name)  # type: ignore[attr-defined]
    except KeyError:
        return None


def fusewire_backend(
    model: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The torch.compile backend "fusewire": Inductor, with fusewire's passes.

    Args:
        model: the graph that Dynamo captured.
        example_inputs: its inputs.
        options: fields of PassConfig and options of Inductor, mixed.
        mode: as in torch.compile ("reduce-overhead", "max-autotune", ...).

    Raises:
        ConfigError: an option is unknown or has a value that cannot be used.
    """
    from torch._inductor.compile_fx import compile_fx

    config, patches = split_options(options)
    if mode is not None and mode != "default":
        patches = {**torch._inductor.list_mode_options(mode), **patches}
    if disabled_by_environment():
        announce_unfused(_DISABLED)
        return _callable(compile_fx(model, list(example_inputs), config_patches=patches))
    specialize_epsilons(model)
    existing = patches.get(_HOOK, getattr(inductor_config, _HOOK))
    with _compilation(model, example_inputs, config) as ours:
        hook = {_HOOK: chained_hook(ours, existing)}
        return _callable(compile_fx(model, list(example_inputs), config_patches={**patches, **hook}))


@contextlib.contextmanager
def _compilation(model: GraphModule, example_inputs: Sequence[Any], config: PassConfig) -> Iterator[FusewirePass]:
    """The passes for one compilation, with what the ranks agreed on and what is kept beside the compile cache.

    Raises:
        PeerTimeoutError, RankMismatchError: the compile cache may hold the graph, and the ranks cannot agree to run it.
    """
    with accounts_kept(key_of_compilation(model, example_inputs, config)) as keeper:
        # Whoever finds the graph in the cache runs no pass that could ask the peers.
        prints = keeper.fingerprints
        unfused = settle(prints, wait=not config.compile_alone)
        token = POSTED.set(frozenset(Posting(item.program, item.rewritten, item.label) for item in prints))
        try:
            yield FusewirePass(config, keeper.key, unfused)
        except RestartAnalysis:  # no failure: Dynamo captures the graph anew
            raise
        except Exception as error:
            announce_unfused(f"could not compile a graph: {type(error).__name__}")
            raise
        finally:
            POSTED.reset(token)


def _reset() -> None:
    """Free the CUDA graphs of compiled models. `torch._dynamo.reset()` calls this, as for "inductor"."""
    if torch.cuda.is_available():
        from torch._inductor.cudagraph_trees import reset_cudagraph_trees

        reset_cudagraph_trees()


fusewire_backend.reset = _reset  # type: ignore[attr-defined]


def _callable(compiled: Any) -> Callable[..., Any]:
    """What compile_fx gives back for a JIT compilation; its other kinds of result belong to ahead-of-time modes."""
    function: Callable[..., Any] = compiled
    return function


@contextlib.contextmanager
def enable(config: PassConfig | None = None, **fields: Any) -> Iterator[PassConfig]:
    """Within the block, whatever torch.compile compiles with Inductor in this thread goes through fusewire's passes.

    Compilation happens at a compiled function's first call, so that call belongs into the block. A custom pass that is
    set already, in Inductor's configuration or by a torch.compile call's options, runs first.

    Args:
        config: the options; or give single fields as keywords.

    Raises:
        ConfigError: an option is unknown or has a value that cannot be used.
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
    hook = chained_hook(FusewirePass(chosen), getattr(inductor_config, _HOOK))
    floats = torch._dynamo.config.patch(specialize_float=True)
    with inductor_config.patch({_HOOK: hook}), floats, _compilations_accounted(), hits_noted():
        yield chosen


_INSTALLING = threading.Lock()
_blocks = 0  # of enable, now open
_installed: Callable[..., Any] | None = None  # our wrapper, as long as it may still be in use


@contextlib.contextmanager
def _compilations_accounted() -> Iterator[None]:
    """Within the block, Inductor compiles by way of `_accounted`.

    What others wrapped around Inductor's function stays: wrappers from before the block come back as they were, and where
    somebody wraps ours within the block it stays below, where it does nothing once no block is open.
    """
    global _blocks, _installed
    from torch._inductor import compile_fx as module

    with _INSTALLING:
        _blocks += 1
        if not any(function is _installed for function in _wrappers(module.compile_fx)):
            _installed = module.compile_fx = _accounted(module.compile_fx)
    try:
        yield
    finally:
        with _INSTALLING:
            _blocks -= 1
            if _blocks == 0 and module.compile_fx is _installed:
                module.compile_fx = module.compile_fx.__wrapped__  # type: ignore[attr-defined]


def _wrappers(function: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """A function, the one that it wraps, and so on."""
    while function is not None:
        yield function
        function = getattr(function, "__wrapped__", None)  # type: ignore[assignment]


def _accounted(compile_fx: Callable[..., Any]) -> Callable[..., Any]:
    """Inductor's `compile_fx` with, if `enable` is in force, all that the backend does around it.

    Whoever sets a custom pass for one compilation would put it in the place of ours; here ours runs behind it.
    """
    signature = inspect.signature(compile_fx)

    @functools.wraps(compile_fx)
    def compile_accounted(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        patches = dict(given.arguments.get("config_patches") or {})
        outer = getattr(inductor_config, _HOOK)
        existing = patches.get(_HOOK, outer)
        ours = _ours_in(existing) or _ours_in(outer)
        model = given.arguments["model_"]
        if ours is None or KEEPER.get() is not None or not isinstance(model, GraphModule):
            return compile_fx(*args, **kwargs)
        with _compilation(model, given.arguments["example_inputs_"], ours.config) as passes:
            given.arguments["config_patches"] = {**patches, _HOOK: chained_hook(passes, existing)}
            return compile_fx(*given.args, **given.kwargs)

    return compile_accounted


def _ours_in(hook: Any) -> FusewirePass | None:
    """fusewire's passes among custom passes."""
    if isinstance(hook, ChainedPass):
        hook = hook.passes
    items = hook if isinstance(hook, (list, tuple)) else [hook]
    return next((item for item in items if isinstance(item, FusewirePass)), None)


# Epsilons under dynamic=True


def specialize_epsilons(model: GraphModule) -> None:
    """Make Dynamo capture again, with the epsilons and scales of norms as numbers, if dynamic=True made them inputs.

    A float attribute becomes an input of the graph under dynamic=True. A norm whose epsilon is an input cannot be fused,
    nor can an all-reduce that is scaled by one (Granite's residual multiplier), which the graph does not know to be the
    same on every rank. Dynamo has a restart for floats that Inductor cannot take; this asks for the same for floats that
    reach a root, and for those that are attributes of modules and multiply something.
    """
    from torch._dynamo.exc import TensorifyScalarRestartAnalysis
    from torch._dynamo.symbolic_convert import TensorifyState

    found = False
    for node in model.graph.nodes:
        if node.op != "placeholder":
            continue
        memo = getattr(node.meta.get("example_value"), "item_memo", None)
        name = getattr(getattr(getattr(memo, "node", None), "_expr", None), "name", None)
        if name is None or TensorifyState.should_specialize(name):
            continue
        scales = _is_attribute(node) and any(_scales(user) for user in node.users)
        if scales or any(_reaches_rsqrt(user) for user in node.users):
            TensorifyState.specialize(name)
            found = True
    if found:
        raise TensorifyScalarRestartAnalysis


def _is_attribute(node: Node) -> bool:
    """Whether an input of the graph is an attribute of a module of the model, and no argument of a call."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    return type(getattr(source, "base", None)).__name__.endswith("NNModuleSource")


def _scales(item: Node) -> bool:
    names = (getattr(user.target, "__name__", str(user.target)) for user in item.users)
    return any(name.strip("_") in ("mul", "rmul", "imul", "truediv", "div") for name in names)


def _reaches_rsqrt(node: Node, depth: int = 4) -> bool:
    name = getattr(node.target, "__name__", str(node.target))
    if "sqrt" in name or "rms_norm" in name:
        return True
    if name == "pow" or node.target in (operator.pow, torch.pow):
        return len(node.args) > 1 and node.args[1] in (-0.5, 0.5)
    if depth == 0 or name not in ("item", "add", "__add__", "__radd__", "iadd", "float"):
        return False
    return any(_reaches_rsqrt(user, depth - 1) for user in node.users)
