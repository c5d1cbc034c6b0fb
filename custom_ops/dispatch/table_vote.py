"""Vote on the tuned table that the ranks of a group use.

Every rank reads its own disk. Ranks that chose by different tables would wait for each other for
ever. So they vote once for each group, hidden size and dtype: all use the table of the first rank
that has one, and log where others differ. They also vote on whether to tune at first use.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from fusewire.custom_ops.coordination.log import log_line
from fusewire.custom_ops.coordination.vote import Channel, VoteResult, vote
from fusewire.custom_ops.dispatch.cost_model import CostModel
from fusewire.custom_ops.dispatch.table_store import Table, key_of, load, local_key, machine_facts, table_from_json
from fusewire.custom_ops.environment import env_flag
from fusewire.custom_ops.workspaces.capture import refuse_capture
from fusewire.custom_ops.workspaces.registry import REGISTRY
from fusewire.errors import WorkspaceError

TUNE_VARIABLE = "FUSEWIRE_TUNE"
# Measures a table for a group, hidden size, dtype, device and number of tokens, and stores it. Set
# by fusewire.custom_ops.tuning.tuner, which imports this module.
run_tuner: Callable[[dist.ProcessGroup, int, torch.dtype, torch.device, int], object] | None = None


@dataclass(frozen=True)
class AgreedTable:
    """A group's agreed table for a hidden size and dtype, the same on every rank."""

    group: weakref.ref[dist.ProcessGroup]
    costs: CostModel | None = None
    note: str = ""
    tune: bool = False  # every rank asks for tuning, and there is no table

    @property
    def text(self) -> str:
        """The text that `fusewire.workspaces()` reports."""
        return "; ".join(part for part in (self.costs.source if self.costs else "", self.note) if part)


def agreed_cost_model(group: dist.ProcessGroup, hidden: int, dtype: torch.dtype) -> CostModel | None:
    """Return the tuned costs that the ranks agreed on, or None. Not a collective."""
    found: AgreedTable | None = REGISTRY.tables.get((group.group_name, hidden, dtype))
    return found.costs if found is not None and found.group() is group else None


def expected_cost_model(world_size: int, hidden: int, dtype: torch.dtype) -> CostModel | None:
    """Return the costs that ranks with this disk's table would agree on. Not a collective."""
    key = local_key(world_size, hidden, dtype)
    found = None if key is None else load(key).table
    return None if found is None else found.cost_model()


def tuned_cost_model(
    group: dist.ProcessGroup,
    hidden: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    tune: bool = False,
    fresh: bool = False,
    max_tokens: int = 0,
) -> CostModel | None:
    """Return the costs of a group's tuned table, if there is one. A collective at the first call.

    Args:
        tune: measure a table if there is none and all ranks ask (FUSEWIRE_TUNE=1 also asks).
        fresh: read the disks and vote again.
        max_tokens: the largest number of tokens of later calls, if known.

    Raises:
        CaptureError: the ranks must still vote, and a CUDA graph is being captured.
        PeerTimeoutError: a rank did not take part.
    """
    with REGISTRY.lock:
        known: AgreedTable | None = REGISTRY.tables.get((group.group_name, hidden, dtype))
        if known is not None and known.group() is not group:
            known = None
        if known is not None and not fresh:
            return known.costs
        refuse_capture("fusewire", f"group {group.group_name}, hidden size {hidden}")
        agreed = _agree(group, hidden, dtype, device, tune)
        if agreed.costs is None and known is not None and known.costs is not None:
            return known.costs  # measured before, but could not be written to disk
        _keep(group, hidden, dtype, agreed)
        if agreed.note and group.rank() == 0:
            log_line(f"hidden size {hidden}, {str(dtype).removeprefix('torch.')}: {agreed.note}")
        if agreed.tune:
            _tune(group, hidden, dtype, device, max_tokens, agreed)
        return agreed_cost_model(group, hidden, dtype)


def _tune(
    group: dist.ProcessGroup,
    hidden: int,
    dtype: torch.dtype,
    device: torch.device,
    max_tokens: int,
    agreed: AgreedTable,
) -> None:
    assert run_tuner is not None
    try:
        run_tuner(group, hidden, dtype, device, max_tokens)
    except WorkspaceError as error:  # the same on every rank; the model can run without a table
        agreed = dataclasses.replace(agreed, tune=False, note=f"tuning failed: {error}")
        _keep(group, hidden, dtype, agreed)
        log_line(agreed.note)


def keep(group: dist.ProcessGroup, hidden: int, dtype: torch.dtype, table: Table, note: str = "") -> None:
    """Use a table that every rank of the group has just received. Not a collective."""
    _keep(group, hidden, dtype, AgreedTable(weakref.ref(group), table.cost_model(), _with_rejected(table, note)))


def _keep(group: dist.ProcessGroup, hidden: int, dtype: torch.dtype, agreed: AgreedTable) -> None:
    REGISTRY.tables[group.group_name, hidden, dtype] = agreed
    REGISTRY.changed()  # invalidates earlier decisions


def _with_rejected(table: Table, note: str) -> str:
    left_out = [f"{label} is left out: {reason}" for label, reason in table.rejected.items()]
    return "; ".join([*([note] if note else []), *left_out])


def _agree(group: dist.ProcessGroup, hidden: int, dtype: torch.dtype, device: torch.device, tune: bool) -> AgreedTable:
    label = f"tuned table, group {group.group_name}, hidden {hidden}, {dtype}"
    channel, reference = Channel(group, label), weakref.ref(group)
    result = vote(channel, "facts", lambda: {**machine_facts(device), "tune": tune or env_flag(TUNE_VARIABLE)})
    if not result.ok:
        return AgreedTable(reference, note=f"no tuned table: {result.reason}")
    key = key_of(result.facts, hidden, dtype)
    asking = [bool(fact["tune"]) for fact in result.facts]

    def look() -> dict[str, Any]:
        found = load(key)
        table = found.table
        return {
            "digest": table.digest if table else "",
            "table": table.as_json() if table else None,
            "reason": found.reason,
        }

    result = vote(channel, "table", look)
    if not result.ok:
        return AgreedTable(reference, note=f"no tuned table: {result.reason}")
    table, note = _chosen(result)
    if any(asking) and not all(asking) and table is None:
        silent = ", ".join(str(r) for r, asks in zip(result.ranks, asking, strict=True) if not asks)
        note = f"nobody tunes: rank(s) {silent} did not ask for it ({TUNE_VARIABLE}=1, prepare(..., tune=True))" + (
            f"; {note}" if note else ""
        )
    if table is not None:
        note = _with_rejected(table, note)
    costs = None if table is None else table.cost_model()
    return AgreedTable(reference, costs, note, table is None and all(asking))


def _chosen(result: VoteResult) -> tuple[Table | None, str]:
    """Return the table of the first rank that has one, and a text about the other ranks."""
    holders = [i for i, fact in enumerate(result.facts) if fact["digest"]]
    reasons = [f"rank {r}: {f['reason']}" for r, f in zip(result.ranks, result.facts, strict=True) if f["reason"]]
    if not holders:
        return None, "; ".join(reasons)
    first = result.facts[holders[0]]
    pairs = list(zip(result.ranks, result.facts, strict=True))
    others = [str(r) for r, f in pairs if f["digest"] and f["digest"] != first["digest"]]
    without = [str(r) for r, f in pairs if not f["digest"]]
    parts = [f"rank(s) {', '.join(others)} had another"] if others else []
    parts += [f"rank(s) {', '.join(without)} had none"] if without else []
    if not parts:
        return table_from_json(first["table"]), ""
    note = f"the tuned table of rank {result.ranks[holders[0]]} is used on every rank: {'; '.join([*parts, *reasons])}"
    return table_from_json(first["table"]), note
