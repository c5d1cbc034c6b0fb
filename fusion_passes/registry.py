"""Define the passes: their names, their order, and the options that switch each off."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from torch.fx import Graph

from fusewire.errors import ConfigError
from fusewire.fusion_passes.config import PassConfig
from fusewire.fusion_passes.context import RunContext
from fusewire.fusion_passes.passes.eliminate_noops import eliminate_noops
from fusewire.fusion_passes.passes.fuse_all_reduce import fuse_all_reduce
from fusewire.fusion_passes.passes.fuse_epilogues import fuse_epilogues
from fusewire.fusion_passes.passes.fuse_quantization import fuse_quantization
from fusewire.fusion_passes.passes.fuse_sequence_parallel import fuse_sequence_parallel
from fusewire.fusion_passes.passes.lower_ops import lower_ops
from fusewire.fusion_passes.passes.merge_all_reduces import merge_all_reduces
from fusewire.fusion_passes.passes.place_outputs import place_outputs
from fusewire.fusion_passes.passes.raise_ops import raise_ops
from fusewire.fusion_passes.passes.shard_residual import shard_residual

PassFunction = Callable[[Graph, RunContext], bool]
UserPass = Callable[[Graph, PassConfig], "bool | None"]


@dataclass(frozen=True)
class RegisteredPass:
    """A pass with its name and the options that switch it off.

    Attributes:
        run: rewrites the graph in place; returns whether it changed it. It does not look at
            `options` itself.
        options: the PassConfig fields that must all be on for the pass to run.
        source: what enters the compile cache's key for a user's pass.
        user: whether a user registered it.
    """

    name: str
    run: PassFunction
    options: tuple[str, ...] = ()
    source: str = ""
    user: bool = False

    def is_enabled(self, config: PassConfig) -> bool:
        """Return whether the options let this pass run."""
        return self.name not in config.disabled_passes and all(getattr(config, name) for name in self.options)


_PASSES: list[RegisteredPass] = [
    RegisteredPass("eliminate_noops", eliminate_noops, ("eliminate_noops",)),
    RegisteredPass("merge_all_reduces", merge_all_reduces, ("merge_allreduces", "allow_reassociation")),
    RegisteredPass("raise_ops", raise_ops),
    RegisteredPass("fuse_all_reduce", fuse_all_reduce, ("fuse_allreduce_rms",)),
    RegisteredPass("fuse_sequence_parallel", fuse_sequence_parallel, ("fuse_allreduce_rms", "fuse_sequence_parallel")),
    RegisteredPass("fuse_epilogues", fuse_epilogues, ("fuse_sandwich_norms",)),
    RegisteredPass("fuse_quantization", fuse_quantization, ("fuse_quantization",)),
    RegisteredPass("shard_residual", shard_residual, ("shard_residual",)),
    RegisteredPass("lower_ops", lower_ops),
    RegisteredPass("place_outputs", place_outputs, ("output_in_place",)),
]


def registered_passes() -> tuple[RegisteredPass, ...]:
    """Return all passes in the order in which they run."""
    return tuple(_PASSES)


def pass_names() -> tuple[str, ...]:
    """Return the names of all passes in the order in which they run."""
    return tuple(item.name for item in _PASSES)


def register_pass(
    name: str, run: UserPass, *, before: str | None = None, after: str | None = None, source: str | None = None
) -> None:
    """Add a pass of your own, which runs on every inference graph.

    Args:
        name: shown in reports and usable in PassConfig.disabled_passes.
        run: called as `run(graph, config)` with the post-grad torch.fx.Graph, which it rewrites in
            place. It must set `node.meta["val"]` of every node it adds. It is not tried on a copy
            first, as fusewire's own passes are: an exception in it ends the compilation.
        before, after: the name of the pass to stand next to; by default it stands just before
            `lower_ops`, where the graph holds the IR operators.
        source: a text that changes whenever the pass does; it enters the compile cache's key. By
            default it is the source code of `run`. A closure or a method depends on more than its
            code, so give the text.

    Raises:
        ConfigError: the name is taken, a neighbour does not exist, or `source` must be given.
    """
    if name in pass_names():
        raise ConfigError(f"there is already a pass named {name!r}; the passes are: {', '.join(pass_names())}")
    if before is not None and after is not None:
        raise ConfigError("give `before` or `after`, not both")
    neighbour = before or after or "lower_ops"
    if neighbour not in pass_names():
        raise ConfigError(f"there is no pass {neighbour!r}; the passes are: {', '.join(pass_names())}")
    source = source if source is not None else _source_of(name, run)

    def adapted(graph: Graph, context: RunContext) -> bool:
        return bool(run(graph, context.config))

    index = pass_names().index(neighbour) + (after is not None)
    _PASSES.insert(index, RegisteredPass(name, adapted, source=source, user=True))


def _source_of(name: str, run: UserPass) -> str:
    """Return the source code of a pass; raise ConfigError if the pass depends on more than that."""
    try:
        source = inspect.getsource(run)
    except (OSError, TypeError) as error:
        why = f"the source code of pass {name!r} cannot be found ({error})"
    else:
        if not inspect.ismethod(run) and not getattr(run, "__closure__", None):
            return source
        why = f"pass {name!r} depends on more than its source code, since it is a closure or a method"
    raise ConfigError(
        f"{why}; pass source=..., a text that changes whenever the pass does, so that compiled "
        "graphs are not taken from the cache wrongly"
    )


def unregister_pass(name: str) -> None:
    """Remove a pass that `register_pass` added.

    Raises:
        ConfigError: no user's pass has that name.
    """
    for item in _PASSES:
        if item.name == name and item.user:
            _PASSES.remove(item)
            return
    raise ConfigError(f"no registered pass of yours is named {name!r}")
