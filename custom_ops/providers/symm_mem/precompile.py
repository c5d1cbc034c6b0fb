"""List the kernels that a workspace's calls need, for any number of tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fusewire.custom_ops.ops.norms import NormSpec, forms_of
from fusewire.custom_ops.ops.sharded_norm import rows_per_rank
from fusewire.custom_ops.providers.symm_mem import launcher as symm_mem
from fusewire.custom_ops.providers.symm_mem.launch_config import (
    LaunchConfig,
    launch_config_one_shot,
    launch_config_two_shot_data,
    launch_config_two_shot_flags,
)
from fusewire.custom_ops.providers.symm_mem.workspace import SymmMemWorkspace

# Above the data-as-flag limit configurations change rarely: check token counts in steps of 1/16.
_STEP = 16


def compilations(ws: SymmMemWorkspace, batch_invariant: bool = False) -> list[Callable[[], None]]:
    """Return functions that each compile a kernel of calls with a residual and a weight.

    The weight is of x's dtype. Other calls (no residual, another weight dtype, sandwich norms, a
    sharded residual) compile when they are first made.
    """
    return [
        functools.partial(_compile, ws, call, tokens, form, {**options, "batch_invariant": batch_invariant})
        for form in forms_of(ws.dtype)
        for call, tokens, options in _calls(ws)
    ]


def _compile(ws: SymmMemWorkspace, call: Callable[..., Any], tokens: int, form: str, options: dict[str, Any]) -> None:
    x = torch.empty(tokens, ws.hidden, dtype=ws.dtype, device=ws.device)
    with symm_mem.compiling_only():
        call(ws, x, x, NormSpec(x[0], 1e-6, 0.0, form), **options)


def _calls(ws: SymmMemWorkspace) -> Iterator[tuple[Callable[..., Any], int, dict[str, Any]]]:
    """Yield the smallest call for each compiled form."""
    layout, count, world, packets = ws.layout, ws.multiprocessors, ws.world_size, ws.layout.packets

    def one_shot(tokens: int) -> LaunchConfig:
        return launch_config_one_shot(tokens, packets, count)

    def data(tokens: int) -> LaunchConfig:
        return launch_config_two_shot_data(rows_per_rank(tokens, world), packets, world, count)

    def flags(tokens: int) -> LaunchConfig:
        return launch_config_two_shot_flags(rows_per_rank(tokens, world), packets, world, count, True)

    for tokens in _first(one_shot, range(1, layout.one_shot_tokens + 1)):
        yield symm_mem.one_shot, tokens, {}
    for tokens in _first(data, range(1, layout.data_tokens + 1)):
        yield symm_mem.two_shot, tokens, {}
    for tokens in _first(flags, _larger(layout.data_tokens, layout.max_tokens)):
        yield symm_mem.two_shot, tokens, {}
        if layout.outputs:
            yield symm_mem.two_shot, tokens, {"output": 0}


def _first(config_of: Callable[[int], LaunchConfig], counts: Iterator[int] | range) -> list[int]:
    """Return the first token count of each compiled form; grid and strides do not matter."""
    found: dict[tuple[int, ...], int] = {}
    for tokens in counts:
        config = config_of(tokens)
        found.setdefault((config.warps, config.block, config.slices, config.unroll), tokens)
    return list(found.values())


def _larger(after: int, most: int) -> Iterator[int]:
    tokens = after + 1
    while tokens <= most:
        yield tokens
        tokens += max(1, tokens // _STEP)
