"""Wrap Inductor's entry point, its options and its hook for custom passes."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch._inductor import config, custom_graph_pass
from torch._inductor.custom_graph_pass import CustomGraphPass as CustomGraphPass
from torch.fx import GraphModule

HOOK = "post_grad_custom_post_pass"
# torch 2.11 does not have it.
_INFERENCE_AWARE = getattr(custom_graph_pass, "CustomInferenceAwareGraphPass", None)
# Takes the captured graph, its inputs and the custom passes that are set (or None). Returns a block
# that yields the custom passes to set instead; None leaves the compilation as it is.
Around = Callable[[Any, Any, Any], "AbstractContextManager[Any] | None"]


def compile_graph(model: GraphModule, inputs: Sequence[Any], patches: Mapping[str, Any]) -> Callable[..., Any]:
    """Compile a graph that Dynamo captured, with these of Inductor's options patched."""
    from torch._inductor.compile_fx import compile_fx

    # compile_fx returns other types in ahead-of-time modes only.
    compiled: Any = compile_fx(model, list(inputs), config_patches=dict(patches))
    function: Callable[..., Any] = compiled
    return function


def option_names() -> tuple[str, ...]:
    """Return the names of Inductor's options."""
    return tuple(config.get_config_copy())


def option_type(name: str) -> Any:
    """Return the type of one of Inductor's options or aliases, or None if there is none."""
    try:
        return config.get_type(name)  # type: ignore[attr-defined]
    except KeyError:
        return None


def options_of_mode(mode: str | None) -> dict[str, Any]:
    """Return the options that a mode of torch.compile stands for."""
    return {} if mode in (None, "default") else dict(torch._inductor.list_mode_options(mode))  # type: ignore[arg-type]


def custom_passes() -> Any:
    """Return the custom passes that are set for post-grad graphs: one, a list, or None."""
    return getattr(config, HOOK)


def with_custom_passes(passes: Any) -> AbstractContextManager[Any]:
    """Have Inductor call these passes on every post-grad graph within the block."""
    patched: AbstractContextManager[Any] = config.patch({HOOK: passes})
    return patched


def takes_inference(item: Any) -> bool:
    """Return whether a custom pass is called with `is_inference` too."""
    return _INFERENCE_AWARE is not None and isinstance(item, _INFERENCE_AWARE)


def free_cuda_graphs() -> None:
    """Free the CUDA graphs of compiled models."""
    if torch.cuda.is_available():
        from torch._inductor.cudagraph_trees import reset_cudagraph_trees

        reset_cudagraph_trees()


_LOCK = threading.Lock()
_open_blocks = 0
_installed: Callable[..., Any] | None = None  # the wrapper, as long as it may still be in use


@contextmanager
def compilations_wrapped(around: Around) -> Iterator[None]:
    """Within the block, run every compilation of Inductor's in the block that `around` returns.

    Other wrappers of `compile_fx` stay. If one put on within the block wraps ours, ours stays after
    the block, where `around` has to return None. Nests, also over threads, with the same `around`.
    """
    global _open_blocks, _installed
    from torch._inductor import compile_fx as inductor

    with _LOCK:
        _open_blocks += 1
        if not any(function is _installed for function in _wrappers(inductor.compile_fx)):
            _installed = inductor.compile_fx = _wrapped(inductor.compile_fx, around)
    try:
        yield
    finally:
        with _LOCK:
            _open_blocks -= 1
            if _open_blocks == 0 and inductor.compile_fx is _installed:
                inductor.compile_fx = inductor.compile_fx.__wrapped__  # type: ignore[attr-defined]


def _wrappers(function: Callable[..., Any] | None) -> Iterator[Callable[..., Any]]:
    """Yield a function, the one that it wraps, and so on."""
    while function is not None:
        yield function
        function = getattr(function, "__wrapped__", None)


def _wrapped(compile_fx: Callable[..., Any], around: Around) -> Callable[..., Any]:
    signature = inspect.signature(compile_fx)

    @functools.wraps(compile_fx)
    def compile_within(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        patches = dict(given.arguments.get("config_patches") or {})
        block = around(
            given.arguments["model_"], given.arguments["example_inputs_"], patches.get(HOOK, custom_passes())
        )
        if block is None:
            return compile_fx(*args, **kwargs)
        with block as passes:
            given.arguments["config_patches"] = {**patches, HOOK: passes}
            return compile_fx(*given.args, **given.kwargs)

    return compile_within
