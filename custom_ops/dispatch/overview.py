"""List for people which provider serves which numbers of tokens, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist

from fusewire.custom_ops.dispatch.cost_model import CostModel, find_cost_model
from fusewire.custom_ops.dispatch.pick import Capacity, Shape, octaves, pick, wanted_tokens, why_no_workspace
from fusewire.custom_ops.dispatch.policy import Policy, read_policy
from fusewire.custom_ops.dispatch.table_vote import agreed_cost_model, expected_cost_model
from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm, resolve_group
from fusewire.custom_ops.ops.registry import machine_support, unknown_provider
from fusewire.custom_ops.workspaces.provider import PROVIDERS, WorkspaceKey, WorkspaceProvider
from fusewire.custom_ops.workspaces.registry import REGISTRY
from fusewire.errors import ConfigError


class ChoiceRow(NamedTuple):
    """A range of tokens with its provider and the reason; `last` is None for no upper end."""

    first: int
    last: int | None
    provider: str
    reason: str


def explain_choices(
    group: dist.ProcessGroup | str | int,
    hidden: int,
    dtype: torch.dtype,
    *,
    policy: str = "",
    gpu: str | None = None,
) -> list[ChoiceRow]:
    """Return the provider of each range of tokens. Not a collective: expects open votes' outcomes.

    Args:
        group: a process group, its name, or a world size to answer for.
        hidden: the hidden size.
        dtype: of the activations.
        policy: the providers to try; the op's own priority if empty.
        gpu: answer for a GPU of this name, as if every provider were available on it.
    """
    op = all_reduce_rms_norm
    read = read_policy(op, policy)
    pg = resolve_group(group) if isinstance(group, str) else group
    world_size = pg if isinstance(pg, int) else pg.size()
    name = gpu or (torch.cuda.get_device_name() if torch.cuda.is_available() else "a machine without a GPU")
    tuned = None if isinstance(pg, int) else agreed_cost_model(pg, hidden, dtype)
    if tuned is None and gpu is None:
        tuned = expected_cost_model(world_size, hidden, dtype)
    costs = find_cost_model(name, world_size, hidden, dtype, tuned)
    shape = Shape(1, hidden, dtype, world_size)
    capacities, reasons = {}, {}
    for provider_name in read.names:
        provider = op.providers.get(provider_name)
        if provider is None:
            raise ConfigError(unknown_provider(op, provider_name))
        workspace_provider = PROVIDERS.get(provider_name)
        machine = machine_support(provider)
        if gpu is None and not machine:
            reasons[provider_name] = machine.reason
        elif workspace_provider is not None:
            capacities[provider_name] = _capacity(workspace_provider, shape, read, costs, pg)

    def at(tokens: int) -> tuple[str, str]:
        found = pick(shape._replace(tokens=tokens), read, costs, capacities, reasons)
        why = "; ".join([found.reason, *(str(refusal) for refusal in found.refusals)])
        return (found.candidate.label if found.candidate else "none"), why

    return _rows(at, max([capacity.max_tokens for capacity in capacities.values()], default=0) + 1)


def _capacity(
    provider: WorkspaceProvider, shape: Shape, policy: Policy, costs: CostModel, group: dist.ProcessGroup | int
) -> Capacity:
    static = provider.limits(shape.hidden, shape.dtype, shape.world_size)
    if not static:
        return Capacity(0, static.reason)
    if not isinstance(group, int):
        entry = REGISTRY.entries.get(WorkspaceKey(provider.workspace_name, group.group_name, shape.dtype, shape.hidden))
        machine = REGISTRY.machines.get((provider.workspace_name, group.group_name))
        for voted in (entry, machine):
            if voted is not None and voted.serves(group) and (voted.workspace or voted.refusal):
                return Capacity(voted.workspace.max_tokens if voted.workspace else 0, voted.refusal)
    tokens = wanted_tokens(provider, shape, policy, costs)
    return Capacity(tokens, "" if tokens else why_no_workspace(policy, costs))


def _rows(at: Callable[[int], tuple[str, str]], last: int) -> list[ChoiceRow]:
    """Return the ranges of tokens with one answer, by bisection between powers of two."""
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

    for low, high in octaves(last)[1:]:
        split(low, high)
    ends = [*(start - 1 for start in starts[1:]), None]
    return [ChoiceRow(first, end, *at(first)) for first, end in zip(starts, ends, strict=True)]
