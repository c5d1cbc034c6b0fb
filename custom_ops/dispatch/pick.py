"""Pick the provider for one shape from costs and capacities, without side effects.

Of a policy's providers before `native`, the one with the least cost at this size serves. A provider
without a known cost serves only if it comes first.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fusewire.custom_ops.dispatch.cost_model import CostModel
from fusewire.custom_ops.dispatch.policy import Policy
from fusewire.custom_ops.ops.registry import NATIVE, Refusal
from fusewire.custom_ops.workspaces.provider import PROVIDERS, WorkspaceProvider

# Bytes that a workspace may take on each GPU if no number of tokens was given.
DEFAULT_WORKSPACE_BYTES = 512 << 20


class Shape(NamedTuple):
    """The properties of a call that a choice depends on, besides the policy."""

    tokens: int
    hidden: int
    dtype: torch.dtype
    world_size: int

    @property
    def nbytes(self) -> int:
        """The size of x, in bytes."""
        return self.tokens * self.hidden * self.dtype.itemsize


@dataclass(frozen=True)
class Candidate:
    """A provider's variant that can compute a call. `label` names it in the costs."""

    name: str
    label: str


@dataclass(frozen=True)
class Pick:
    """The outcome for one shape. `candidate` is None if nothing can serve."""

    candidate: Candidate | None
    reason: str
    refusals: tuple[Refusal, ...] = ()


@dataclass(frozen=True)
class Capacity:
    """The agreed capacity of one workspace in tokens, or why there is none."""

    max_tokens: int = 0
    refusal: str = ""


def pick(
    shape: Shape, policy: Policy, costs: CostModel, capacities: Mapping[str, Capacity], reasons: Mapping[str, str]
) -> Pick:
    """Return the choice for one shape.

    Args:
        capacities: the agreed capacity of each provider with a workspace.
        reasons: why a provider cannot serve such a call, by provider.
    """
    refusals: list[Refusal] = []
    known: list[Candidate] = []
    for name in policy.names:
        if name in reasons:
            refusals.append(Refusal(name, reasons[name]))
            continue
        found = _candidates(name, shape, policy, costs, capacities, refusals)
        limited = policy.max_bytes(name) is not None
        has_costs = (
            name == NATIVE or name in PROVIDERS or any(costs.cost(c.label, shape.tokens) is not None for c in found)
        )
        if found and not known and (limited or not has_costs):
            known = found
            break
        known += found
    if not known:
        return Pick(None, "nothing can serve", tuple(refusals))
    candidate, why = _by_time(known, shape, costs) or _by_limits(known, shape, costs, policy)
    return Pick(candidate, why, tuple(refusals))


def _candidates(
    name: str,
    shape: Shape,
    policy: Policy,
    costs: CostModel,
    capacities: Mapping[str, Capacity],
    refusals: list[Refusal],
) -> list[Candidate]:
    provider = PROVIDERS.get(name)
    if provider is None:
        return [Candidate(name, name)]
    capacity, limit = capacities[name], policy.max_bytes(name)
    found: list[Candidate] = []
    if capacity.refusal:
        refusal = capacity.refusal
    elif limit is not None and shape.nbytes > limit:
        refusal = f"the input is larger than max_size_mb={policy.max_size_mb:g}"
    else:
        found = _variants(provider, shape, capacity.max_tokens)
        refusal = "" if found else _too_small(provider, shape, policy, costs, capacity)
    if refusal:
        refusals.append(Refusal(name, refusal))
    return found


def _variants(provider: WorkspaceProvider, shape: Shape, max_tokens: int) -> list[Candidate]:
    return [
        Candidate(provider.name, label)
        for label in provider.variants
        if shape.tokens in provider.token_limit(label, shape.hidden, shape.dtype, shape.world_size, max_tokens)
    ]


def _too_small(provider: WorkspaceProvider, shape: Shape, policy: Policy, costs: CostModel, capacity: Capacity) -> str:
    """Return why a workspace does not take a call: by policy, too small, or impossible."""
    cap = provider.max_tokens(shape.hidden, shape.dtype, shape.world_size)
    larger = _variants(provider, shape, cap)
    if not larger:
        return f"{shape.tokens} tokens; it takes at most {cap} at this hidden size"
    native = costs.cost(NATIVE, shape.tokens)
    times = [cost for c in larger if (cost := costs.cost(c.label, shape.tokens)) is not None]
    if not policy.forced and not (native and times and min(times) < native):
        return f"not the fastest for {shape.tokens} tokens"
    return (
        f"{shape.tokens} tokens; its workspace takes up to {capacity.max_tokens} "
        "(fusewire.prepare(..., max_tokens=...) on every rank, before the first call, makes a "
        "larger one)"
    )


def _by_time(found: Sequence[Candidate], shape: Shape, costs: CostModel) -> tuple[Candidate, str] | None:
    """Return the fastest candidate with a known cost, and why; None if there is none."""
    pairs = [(candidate, costs.cost(candidate.label, shape.tokens)) for candidate in found]
    timed = [(cost, candidate) for candidate, cost in pairs if cost is not None]
    if not timed:
        return None
    least, best = min(timed, key=lambda pair: pair[0])
    rest = ", ".join(f"{c.label} {cost:.1f}" for cost, c in timed if c.label != best.label)
    return best, f"{least:.1f} us" + (f" ({rest})" if rest else "") + f"; {costs.source}"


def _by_limits(found: Sequence[Candidate], shape: Shape, costs: CostModel, policy: Policy) -> tuple[Candidate, str]:
    """Return the first unmeasured candidate that may serve this size, and why."""
    within = [c for c in found if shape.nbytes <= costs.limits.get(c.label, 0)]
    others = [c for c in found if c.name not in PROVIDERS]
    if others and not within:
        return others[0], costs.source if len(found) > 1 else "first by priority"
    if policy.forced or policy.max_size_mb is not None:
        return (within or found[-1:])[0], "asked for by the policy"
    return (within or found)[0], costs.source


def wanted_tokens(provider: WorkspaceProvider, shape: Shape, policy: Policy, costs: CostModel) -> int:
    """Return the number of tokens for a workspace made at the first call; 0 for none."""
    hidden, dtype, world_size = shape.hidden, shape.dtype, shape.world_size
    cap = provider.max_tokens(hidden, dtype, world_size)
    limit = policy.max_bytes(provider.name)
    if limit is not None:
        return min(cap, int(limit) // (hidden * dtype.itemsize))
    budget = last(lambda tokens: provider.nbytes(hidden, dtype, world_size, tokens) <= DEFAULT_WORKSPACE_BYTES, cap)
    if policy.forced:
        return min(cap, max(budget, shape.tokens))
    capacities = {name: Capacity(cap if name == provider.name else 0) for name in policy.names if name in PROVIDERS}

    def wins(tokens: int) -> bool:
        candidate = pick(shape._replace(tokens=tokens), policy, costs, capacities, {}).candidate
        return candidate is not None and candidate.name == provider.name

    return max((last(wins, end, start) for start, end in octaves(budget)), default=0)


def why_no_workspace(policy: Policy, costs: CostModel) -> str:
    """Return why `wanted_tokens` is 0."""
    if policy.max_size_mb is not None:
        return f"max_size_mb={policy.max_size_mb:g} is less than one token"
    return f"not the fastest at any size ({costs.source})"


def last(holds: Callable[[int], bool], end: int, start: int = 0) -> int:
    """Return the last number in (start, end] for which `holds` is true; 0 if there is none."""
    low, high = start, end
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low if low > start else 0


def octaves(end: int) -> list[tuple[int, int]]:
    """Return the ranges (low, high] between powers of two, from 0 to `end`."""
    edges = [0, *(1 << power for power in range(end.bit_length())), end]
    return [(low, high) for low, high in itertools.pairwise(edges) if low < high]
