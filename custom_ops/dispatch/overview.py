"""The plan as a person reads it: which provider serves how many tokens, and why."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist

from fusewire.custom_ops.dispatch.cost_model import Plan, find_plan
from fusewire.custom_ops.dispatch.dispatcher import Policy, Room, Shape, _no_use, pick, read_policy, wanted_tokens
from fusewire.custom_ops.dispatch.table_vote import agreed_plan, expected_plan
from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm, resolve_group
from fusewire.custom_ops.ops.registry import _machine_support, unknown_provider
from fusewire.custom_ops.workspaces.provider import PROVIDERS, WorkspaceKey, WorkspaceProvider
from fusewire.custom_ops.workspaces.registry import REGISTRY
from fusewire.errors import ConfigError


class PlanRow(NamedTuple):
    """From `first` to `last` tokens (None: without an end) `provider` serves, and why."""

    first: int
    last: int | None
    provider: str
    reason: str


def explain_plan(
    group: dist.ProcessGroup | str | int,
    hidden: int,
    dtype: torch.dtype,
    device: torch.device | None = None,
    *,
    policy: str = "",
    gpu: str | None = None,
) -> list[PlanRow]:
    """Which provider serves how many tokens. Asks no other rank: where there was no vote yet, what it would
    bring.

    Args:
        group: a process group, its name, or a world size for which to show the plan.
        hidden: the hidden size.
        dtype: of the activations.
        device: whose GPU to show the plan for; the current one by default.
        policy: the providers to try; the op's own priority if empty.
        gpu: show the plan for a GPU of this name, as if every provider were available on it.
    """
    op = all_reduce_rms_norm
    read = read_policy(op, policy)
    pg = resolve_group(group) if isinstance(group, str) else group
    world_size = pg if isinstance(pg, int) else pg.size()
    name = gpu or _gpu_name(device)
    tuned = None if isinstance(pg, int) else agreed_plan(pg, hidden, dtype)
    if tuned is None and gpu is None:
        tuned = expected_plan(world_size, hidden, dtype, device)
    plan = find_plan(name, world_size, hidden, dtype, tuned)
    shape = Shape(1, hidden, dtype, world_size)
    rooms, reasons = {}, {}
    for provider_name in read.names:
        provider = op.providers.get(provider_name)
        if provider is None:
            raise ConfigError(unknown_provider(op, provider_name))
        keeper = PROVIDERS.get(provider_name)
        machine = _machine_support(provider)
        if gpu is None and not machine:
            reasons[provider_name] = machine.reason
        elif keeper is not None:
            rooms[provider_name] = _room(keeper, shape, read, plan, pg)

    def at(tokens: int) -> tuple[str, str]:
        found = pick(shape._replace(tokens=tokens), read, plan, rooms, reasons)
        why = "; ".join([found.reason, *(str(refusal) for refusal in found.refusals)])
        return (found.candidate.label if found.candidate else "none"), why

    return _rows(at, max([room.max_tokens for room in rooms.values()], default=0) + 1)


def _room(keeper: WorkspaceProvider, shape: Shape, policy: Policy, plan: Plan, group: dist.ProcessGroup | int) -> Room:
    static = keeper.limits(shape.hidden, shape.dtype, shape.world_size)
    if not static:
        return Room(0, static.reason)
    if not isinstance(group, int):
        entry = REGISTRY.entries.get(WorkspaceKey(keeper.name, group.group_name, shape.dtype, shape.hidden))
        machine = REGISTRY.machines.get((keeper.name, group.group_name))
        for voted in (entry, machine):
            if voted is not None and voted.serves(group) and (voted.workspace or voted.reason):
                return Room(voted.workspace.max_tokens if voted.workspace else 0, voted.reason)
    tokens = wanted_tokens(keeper, shape, policy, plan)
    return Room(tokens, "" if tokens else _no_use(policy, plan))


def _gpu_name(device: torch.device | None) -> str:
    if not torch.cuda.is_available():
        return "a machine without a GPU"
    return torch.cuda.get_device_name(device)


def _rows(at: Callable[[int], tuple[str, str]], last: int) -> list[PlanRow]:
    """Ranges of tokens with one answer: each octave is halved where its ends differ."""
    starts = [1]

    def split(low: int, high: int) -> None:
        if at(low)[0] == at(high)[0]:
            return
        if high - low == 1:
            starts.append(high)
            return
        middle = (low + high) // 2
        split(low, middle)
        split(middle, high)

    edges = sorted({1 << power for power in range(last.bit_length())} | {last})
    for low, high in itertools.pairwise(edges):
        split(low, high)
    ends = [*(start - 1 for start in starts[1:]), None]
    return [PlanRow(first, end, *at(first)) for first, end in zip(starts, ends, strict=True)]
