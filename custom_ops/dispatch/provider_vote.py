"""Vote on which providers that a user has registered serve a call on every rank of its group.

Such a provider may be registered on one rank only, or its checks may answer differently. If each
rank used its own answer, ranks would run different collectives. So the ranks of a group vote: once
for each set of providers on their registration, and once for each shape and dtype on their checks.
One refusal counts for all.

Fusewire's own providers are registered on every rank and need no vote here. The ranks vote on their
workspaces in `custom_ops/workspaces/registry.py`, and their `supports_args` checks only properties
that are equal on every rank.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from fusewire.custom_ops.coordination.log import log_line
from fusewire.custom_ops.coordination.vote import Channel, VoteResult, describe, vote
from fusewire.custom_ops.ops.all_reduce_norm import resolve_group
from fusewire.custom_ops.ops.registry import (
    NATIVE,
    YES,
    IrOp,
    Provider,
    Support,
    always,
    no_without_reason,
    parse_policy,
    unknown_provider,
)
from fusewire.custom_ops.ops.sharded_norm import gather_rows
from fusewire.custom_ops.workspaces.capture import refuse_capture
from fusewire.custom_ops.workspaces.provider import PROVIDERS
from fusewire.errors import ConfigError, PeerTimeoutError, SchemaError

# The providers of collective operators that fusewire registers itself, on every rank.
OWN = frozenset(
    {NATIVE, "rank_ordered", "rank_ordered_batch_invariant", "flashinfer", "symm_mem", "symm_mem_batch_invariant"}
)

# How a rank has a provider registered.
_MISSING = "not registered"
_WORKSPACE = "with a workspace"
_NO_CHECKS = "without checks"
_CHECKS = "with checks"
_MAX_OUTCOMES = 1 << 15  # stored per group


class Agreed(NamedTuple):
    """The outcome of a group's votes on providers.

    Attributes:
        support: the ranks' combined answer for each provider that was voted on.
        group: the group that voted; None if no vote was needed.
    """

    support: Mapping[str, Support]
    group: dist.ProcessGroup | None


@dataclass
class _Outcomes:
    """The votes of one group, each held once. Thread-safe."""

    found: dict[Any, Any] = field(default_factory=dict)
    turns: dict[Any, threading.Lock] = field(default_factory=dict)
    logged: set[str] = field(default_factory=set)

    def once(self, key: Any, ask: Callable[[], Any]) -> Any:
        """Return the outcome under a key; if unknown, one thread asks while others wait."""
        if (outcome := self.found.get(key)) is not None:
            return outcome
        with self.turns.setdefault(key, threading.Lock()):
            try:
                if (outcome := self.found.get(key)) is None:
                    outcome = ask()
                    if len(self.found) >= _MAX_OUTCOMES:
                        self.found = {}
                    self.found[key] = outcome
            finally:
                self.turns.pop(key, None)
        return outcome


_outcomes: weakref.WeakKeyDictionary[dist.ProcessGroup, _Outcomes] = weakref.WeakKeyDictionary()
_outcomes_lock = threading.Lock()


def agree_on_providers(op: IrOp, names: Sequence[str], args: tuple[Any, ...]) -> Agreed:
    """Return the combined answer of a call's ranks about the providers that a user has registered.

    The first call of its kind in a group is a collective; later calls look it up. Not a collective
    with fusewire's own providers only, in a group of one rank, or with torch's "fake" backend.
    Thread-safe.

    Args:
        op: the operator.
        names: the providers to try.
        args: native's arguments; the last is the group's name.

    Raises:
        ConfigError: on every rank, if a rank lacks a provider or has it registered differently.
        SchemaError: on every rank, if a check refuses without a reason.
        CaptureError: the ranks must still vote, and a CUDA graph is being captured.
        PeerTimeoutError: a rank did not take part in the vote.
    """
    asked = tuple(name for name in names if name not in OWN)
    group = _voters(args[-1]) if asked else None
    if group is None:
        return Agreed({}, None)
    with _outcomes_lock:
        outcomes = _outcomes.setdefault(group, _Outcomes())
    here = tuple(op.providers.get(name) for name in asked)
    key = (op.name, asked, here)
    registered: Mapping[str, str] = outcomes.once(key, lambda: _vote_on_registration(op, asked, group))
    checked = tuple(name for name, how in registered.items() if how == _CHECKS)
    if not checked:
        return Agreed({}, group)
    support = outcomes.once((key, _kind_of(args)), lambda: _vote_on_call(op, checked, args, group, outcomes))
    return Agreed(support, group)


def select(op: IrOp, args: tuple[Any, ...], policy: str) -> Provider:
    """Return the provider for a call of a collective without costs, by its providers' checks.

    Raises: as `agree_on_providers` and `IrOp.choose`.
    """
    agreed = agree_on_providers(op, parse_policy(op, policy), args)
    return op.choose(*args, policy=policy, known=agreed.support).provider


def _voters(group_name: str) -> dist.ProcessGroup | None:
    """Return the group whose ranks must agree, or None."""
    if not dist.is_initialized():
        return None
    group = resolve_group(group_name)
    return None if group.size() == 1 or dist.get_backend(group) == "fake" else group


def _vote_on_registration(op: IrOp, names: tuple[str, ...], group: dist.ProcessGroup) -> dict[str, str]:
    """Return how the ranks together have each provider registered. A collective."""
    listed = ", ".join(names)
    channel = _channel(op, listed, group)
    result = vote(channel, f"registration of {listed}", lambda: {name: _registration(op, name) for name in names})
    return {name: _together(op, name, result) for name in names}


def _registration(op: IrOp, name: str) -> str:
    """Return how this rank has a provider registered."""
    provider = op.providers.get(name)
    if provider is None:
        return _MISSING
    if name in PROVIDERS:
        return _WORKSPACE
    checks = (provider.supported, provider.supports_args, provider.supports_tokens)
    return _NO_CHECKS if all(check is always for check in checks) else _CHECKS


def _together(op: IrOp, name: str, result: VoteResult) -> str:
    """Return how all ranks have a provider registered: with checks if any rank has checks."""
    found = [str(fact[name]) for fact in result.facts]
    if set(found) == {_MISSING}:
        raise ConfigError(unknown_provider(op, name))
    if len(set(found)) > 1 and {_MISSING, _WORKSPACE} & set(found):
        each = VoteResult(tuple(found), result.facts, result.ranks).reason
        raise ConfigError(
            f"the ranks have the provider {name!r} of {op.name} registered differently "
            f"({each}); register it alike on every rank, or leave it out of the policy"
        )
    return _CHECKS if _CHECKS in found else found[0]


def _vote_on_call(
    op: IrOp, names: tuple[str, ...], args: tuple[Any, ...], group: dist.ProcessGroup, outcomes: _Outcomes
) -> dict[str, Support]:
    """Return the combined answer of the ranks' checks. A collective."""
    listed = ", ".join(names)
    channel = _channel(op, listed, group)
    result = vote(channel, f"{listed} for {_kind_of(args)}", lambda: {name: _reason(op, name, args) for name in names})
    if not result.ok:
        raise SchemaError(result.reason)
    support = {}
    for name in names:
        reasons = tuple(str(fact[name]) for fact in result.facts)
        reason = VoteResult(reasons, result.facts, result.ranks).reason
        support[name] = Support.no(reason) if reason else YES
        if reason and not all(reasons) and name not in outcomes.logged:
            outcomes.logged.add(name)
            if group.rank() == 0:
                log_line(f"{op.name}: no rank uses {name}, which not all of them can: {reason}")
    return support


def _reason(op: IrOp, name: str, args: tuple[Any, ...]) -> str:
    """Return why a provider cannot serve a call on this rank, or ""."""
    try:
        support = op.providers[name].check(*args)
    except PeerTimeoutError:
        raise
    except Exception as error:
        return describe(error)
    if support:
        return ""
    if not isinstance(support, Support):
        raise SchemaError(no_without_reason(op, name, support))
    return support.reason


def _kind_of(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the properties that a provider's checks may depend on, the same on every rank."""
    return tuple(
        (tuple(arg.shape), str(arg.dtype), arg.device.type) if isinstance(arg, Tensor) else arg for arg in args
    )


def _channel(op: IrOp, listed: str, group: dist.ProcessGroup) -> Channel:
    """Return a channel for a vote. Raises CaptureError during the capture of a CUDA graph."""
    remedy = "run the model once, with the same numbers of tokens, before capture"
    refuse_capture(listed, "registered by the user", "is not voted on yet", remedy)
    return Channel(group, f"providers of {op.name}, group {group.group_name}")


gather_rows.selector = select
