"""Which of `symm_mem`'s kernels a workspace's calls will need, whatever their number of tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fusewire.custom_ops.ops.norms import FORMS
from fusewire.custom_ops.providers.symm_mem import launcher as symm_mem
from fusewire.custom_ops.providers.symm_mem.launch_config import (
    Plan,
    plan_one_shot,
    plan_two_shot_data,
    plan_two_shot_flags,
)
from fusewire.custom_ops.providers.symm_mem.workspace import SymmMemWorkspace, shard_rows

# Numbers of tokens above which plans change seldom are looked at in steps of a sixteenth.
_STEP = 16


def compilations(made: SymmMemWorkspace) -> list[Callable[[], None]]:
    """For each kernel that calls with a residual and a weight of x's dtype can launch, what compiles it.

    Other calls (no residual, another weight's dtype, sandwich norms, a sharded residual) compile at their first time.
    """
    return [
        functools.partial(_compile, made, call, tokens, form, options)
        for form in FORMS
        for call, tokens, options in _calls(made)
    ]


def _compile(made: SymmMemWorkspace, call: Callable[..., Any], tokens: int, form: str, options: dict[str, Any]) -> None:
    x = torch.empty(tokens, made.hidden, dtype=made.dtype, device=made.device)
    with symm_mem.compiling_only():
        call(made, x, x, x[0], 1e-6, 0.0, form, **options)


def _calls(made: SymmMemWorkspace) -> Iterator[tuple[Callable[..., Any], int, dict[str, Any]]]:
    """The smallest call of each kind of launch."""
    layout, count = made.layout, made.multiprocessors
    world, packets = made.world_size, layout.packets
    one_shots = ((tokens, plan_one_shot(tokens, packets, count)) for tokens in range(1, layout.one_shot_tokens + 1))
    yield from ((symm_mem.one_shot, tokens, {}) for tokens in _first(one_shots))
    shards = ((tokens, shard_rows(tokens, world)) for tokens in range(1, layout.data_tokens + 1))
    datas = ((tokens, plan_two_shot_data(shard, packets, world, count)) for tokens, shard in shards)
    yield from ((symm_mem.two_shot, tokens, {}) for tokens in _first(datas))
    rows = ((tokens, shard_rows(tokens, world)) for tokens in _larger(layout.data_tokens, layout.max_tokens))
    flags = [(tokens, plan_two_shot_flags(shard, packets, world, count, True)) for tokens, shard in rows]
    for tokens in _first(iter(flags)):
        yield symm_mem.two_shot, tokens, {}
        if layout.outputs:
            yield symm_mem.two_shot, tokens, {"output": 0}


def _first(plans: Iterator[tuple[int, Plan]]) -> list[int]:
    """The first number of tokens with each compiled form of a plan: grids and strides are no part of it."""
    found: dict[tuple[int, ...], int] = {}
    for tokens, plan in plans:
        found.setdefault((plan.warps, plan.block, plan.slices, plan.unroll), tokens)
    return list(found.values())


def _larger(after: int, most: int) -> Iterator[int]:
    tokens = after + 1
    while tokens <= most:
        yield tokens
        tokens += max(1, tokens // _STEP)
