"""Which tuned table the ranks of a group go by.

Every rank reads its own disk, and ranks that chose by different tables would wait for each other for ever.
So they vote, once for each group, hidden size and dtype: all take the table of the first rank that has one,
whatever the others have, and say so where they differ. Whether to tune at first use is voted on, too.
"""

from __future__ import annotations

import dataclasses
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from fusewire.custom_ops.coordination.store import log_line
from fusewire.custom_ops.coordination.vote import Channel, VoteResult, vote
from fusewire.custom_ops.dispatch.cost_model import Plan
from fusewire.custom_ops.dispatch.table_store import (
    Table,
    key_of,
    load,
    local_key,
    machine_facts,
    table_from_json,
)
from fusewire.custom_ops.workspaces.registry import REGISTRY, refuse_capture
from fusewire.errors import ConfigError, WorkspaceError

TUNE_VARIABLE = "FUSEWIRE_TUNE"
# Measures a table for a group, hidden size, dtype, device and number of tokens, and keeps it. Set by
# fusewire.custom_ops.tuning.tuner, which imports this module.
run_tuner: Callable[[dist.ProcessGroup, int, torch.dtype, torch.device, int], object] | None = None


@dataclass(frozen=True)
class Agreed:
    """What the ranks of a group agreed on for a hidden size and dtype: the same on each."""

    group: weakref.ref[dist.ProcessGroup]
    plan: Plan | None = None
    note: str = ""
    tune: bool = False  # every rank asks for a table, and there is none

    @property
    def text(self) -> str:
        """For fusewire.workspaces()."""
        return "; ".join(part for part in (self.plan.source if self.plan else "", self.note) if part)


def agreed_plan(group: dist.ProcessGroup, hidden: int, dtype: torch.dtype) -> Plan | None:
    """The tuned plan that the ranks agreed on before, if any. Asks nobody."""
    found: Agreed | None = REGISTRY.plans.get((group.group_name, hidden, dtype))
    return found.plan if found is not None and found.group() is group else None


def expected_plan(world_size: int, hidden: int, dtype: torch.dtype, device: torch.device | None = None) -> Plan | None:
    """The tuned plan of this machine's disk, as it would be agreed on if all ranks have the same."""
    key = local_key(world_size, hidden, dtype, device)
    found = None if key is None else load(key).table
    return None if found is None else found.plan()


def tuned_plan(
    group: dist.ProcessGroup,
    hidden: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    tune: bool = False,
    fresh: bool = False,
    max_tokens: int = 0,
) -> Plan | None:
    """The tuned plan for a group, agreed on at the first call, when all ranks must call it alike.

    Args:
        tune: measure one if there is none; FUSEWIRE_TUNE=1 asks for the same. If not all ranks ask, nobody
            measures.
        fresh: vote again, and look at the disks again.
        max_tokens: the largest number of tokens that there will be, if known.

    Raises:
        CaptureError: there was no vote yet, and a CUDA graph is being captured.
        PeerTimeoutError: a rank did not take part.
    """
    with REGISTRY._lock:
        known: Agreed | None = REGISTRY.plans.get((group.group_name, hidden, dtype))
        if known is not None and known.group() is not group:
            known = None
        if known is not None and not fresh:
            return known.plan
        refuse_capture("fusewire", f"group {group.group_name}, hidden size {hidden}")
        agreed = _agree(group, hidden, dtype, device, tune)
        if agreed.plan is None and known is not None and known.plan is not None:
            return known.plan  # measured before, and not on disk because it could not be written
        _keep(group, hidden, dtype, agreed)
        if agreed.note and group.rank() == 0:
            log_line(f"hidden size {hidden}, {str(dtype).removeprefix('torch.')}: {agreed.note}")
        if agreed.tune:
            _tune(group, hidden, dtype, device, max_tokens, agreed)
        return agreed_plan(group, hidden, dtype)


def _tune(
    group: dist.ProcessGroup, hidden: int, dtype: torch.dtype, device: torch.device, max_tokens: int, agreed: Agreed
) -> None:
    assert run_tuner is not None
    try:
        run_tuner(group, hidden, dtype, device, max_tokens)
    except WorkspaceError as error:  # the same on every rank; a model need not fail for want of a table
        agreed = dataclasses.replace(agreed, tune=False, note=f"tuning failed: {error}")
        _keep(group, hidden, dtype, agreed)
        log_line(agreed.note)


def keep(group: dist.ProcessGroup, hidden: int, dtype: torch.dtype, table: Table, note: str = "") -> None:
    """Go by a table that every rank of the group has just been given."""
    _keep(group, hidden, dtype, Agreed(weakref.ref(group), table.plan(), _with_rejected(table, note)))


def _keep(group: dist.ProcessGroup, hidden: int, dtype: torch.dtype, agreed: Agreed) -> None:
    REGISTRY.plans[group.group_name, hidden, dtype] = agreed
    REGISTRY.changed()  # decisions made before are void


def _with_rejected(table: Table, note: str) -> str:
    left_out = [f"{label} is left out: {reason}" for label, reason in table.rejected.items()]
    return "; ".join([*([note] if note else []), *left_out])


def _agree(group: dist.ProcessGroup, hidden: int, dtype: torch.dtype, device: torch.device, tune: bool) -> Agreed:
    label = f"tuned table, group {group.group_name}, hidden {hidden}, {dtype}"
    channel, reference = Channel(group, label), weakref.ref(group)
    verdict = vote(channel, "facts", lambda: {**machine_facts(device), "tune": tune or wants_tuning()})
    if not verdict.ok:
        return Agreed(reference, note=f"no tuned table: {verdict.reason}")
    key = key_of(verdict.facts, hidden, dtype)
    asking = [bool(fact["tune"]) for fact in verdict.facts]

    def look() -> dict[str, Any]:
        found = load(key)
        table = found.table
        return {
            "digest": table.digest if table else "",
            "table": table.as_json() if table else None,
            "reason": found.reason,
        }

    verdict = vote(channel, "table", look)
    if not verdict.ok:
        return Agreed(reference, note=f"no tuned table: {verdict.reason}")
    table, note = _chosen(verdict)
    if any(asking) and not all(asking) and table is None:
        silent = ", ".join(str(r) for r, asks in zip(verdict.ranks, asking, strict=True) if not asks)
        note = f"nobody tunes: rank(s) {silent} did not ask for it ({TUNE_VARIABLE}=1, prepare(..., tune=True))" + (
            f"; {note}" if note else ""
        )
    if table is not None:
        note = _with_rejected(table, note)
    plan = None if table is None else table.plan()
    return Agreed(reference, plan, note, table is None and all(asking))


def _chosen(verdict: VoteResult) -> tuple[Table | None, str]:
    """The table of the first rank that has one, and what to say about the others."""
    holders = [i for i, fact in enumerate(verdict.facts) if fact["digest"]]
    reasons = [f"rank {r}: {f['reason']}" for r, f in zip(verdict.ranks, verdict.facts, strict=True) if f["reason"]]
    if not holders:
        return None, "; ".join(reasons)
    first = verdict.facts[holders[0]]
    pairs = list(zip(verdict.ranks, verdict.facts, strict=True))
    others = [str(r) for r, f in pairs if f["digest"] and f["digest"] != first["digest"]]
    without = [str(r) for r, f in pairs if not f["digest"]]
    parts = [f"rank(s) {', '.join(others)} had another"] if others else []
    parts += [f"rank(s) {', '.join(without)} had none"] if without else []
    if not parts:
        return table_from_json(first["table"]), ""
    note = f"the tuned table of rank {verdict.ranks[holders[0]]} is used on every rank: {'; '.join([*parts, *reasons])}"
    return table_from_json(first["table"]), note


def wants_tuning() -> bool:
    """Whether FUSEWIRE_TUNE asks for tuning at first use. Raises ConfigError if it says neither."""
    text = os.environ.get(TUNE_VARIABLE, "").strip().lower()
    if text in ("", "0", "off", "false", "no"):
        return False
    if text in ("1", "on", "true", "yes"):
        return True
    raise ConfigError(f"{TUNE_VARIABLE}={text!r} is neither 1 nor 0")
