"""Make a table of the time that each provider of `all_reduce_rms_norm` takes on the real group.

Called by `python -m fusewire tune`, and at first use with FUSEWIRE_TUNE=1 or
`fusewire.prepare(..., tune=True)`. See `measure` and `timers` in this package for the method.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fusewire.custom_ops.coordination.log import log_line
from fusewire.custom_ops.coordination.timeouts import Limit, limit_s
from fusewire.custom_ops.coordination.vote import in_thread
from fusewire.custom_ops.dispatch import dispatcher as dispatch
from fusewire.custom_ops.dispatch import table_store, table_vote
from fusewire.custom_ops.dispatch.table_store import Table, TableKey
from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm as op
from fusewire.custom_ops.ops.all_reduce_norm import resolve_group
from fusewire.custom_ops.ops.norms import SCALE_THEN_ROUND
from fusewire.custom_ops.ops.registry import NATIVE
from fusewire.custom_ops.tuning.measure import Measurement, TimedCall
from fusewire.custom_ops.tuning.timers import EPS
from fusewire.custom_ops.workspaces.capture import refuse_capture
from fusewire.custom_ops.workspaces.provider import PROVIDERS, WorkspaceKey, WorkspaceProvider
from fusewire.custom_ops.workspaces.registry import ABANDONED, REGISTRY
from fusewire.errors import ConfigError, PeerTimeoutError, WorkspaceError

DEFAULT_MAX_TOKENS = 8192
BUDGET_S = 30.0
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Tuned(NamedTuple):
    """A table, its path on this rank's disk, and the problem if it could not be written."""

    table: Table
    path: str
    problem: str


def token_grid(max_tokens: int, tokens: Sequence[int] = ()) -> tuple[int, ...]:
    """Return the token counts to measure: those given, else the powers of two and max_tokens.

    Raises:
        ConfigError: a number is not positive.
    """
    if tokens:
        grid = sorted(set(tokens))
    else:
        grid = sorted({*(1 << power for power in range(max(0, max_tokens).bit_length())), max_tokens})
    if grid[0] < 1:
        raise ConfigError(f"{grid[0]} tokens cannot be timed; a number of tokens is at least 1")
    return tuple(grid)


def tune(
    group: dist.ProcessGroup | str,
    hidden: int,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | None = None,
    *,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    tokens: Sequence[int] = (),
    providers: Sequence[str] = (),
    budget_s: float = BUDGET_S,
    save: bool = True,
) -> Tuned:
    """Measure a table for a group and use it from now on. A collective of the whole group.

    Takes about budget_s seconds at most, plus the compilation at providers' first use. Existing
    workspaces are used; others are made and freed again.

    Args:
        hidden, dtype: of the activations; bfloat16, float16 or float32.
        device: this rank's GPU, by default the current one; or the CPU, for a table for CPUs only.
        max_tokens, tokens: measure powers of two up to max_tokens, or exactly these token counts.
        providers: the providers to time; by default the operator's own priority.
        budget_s: start no further size that would exceed this many seconds in total.
        save: write the table to this rank's disk, where later runs find it.

    Raises:
        ConfigError: an argument cannot be used, or the ranks gave different ones.
        WorkspaceError: a rank failed, or nothing could be timed.
        CaptureError: a CUDA graph is being captured.
        PeerTimeoutError: a rank did not take part in time; the process cannot go on.
    """
    pg = resolve_group(group) if isinstance(group, str) else group
    names = tuple(providers) or op.priority
    unknown = [name for name in names if name not in op.providers]
    if unknown or hidden < 1 or dtype not in DTYPES or not budget_s > 0:
        raise ConfigError(
            f"tune(hidden={hidden}, dtype={dtype}, budget_s={budget_s:g}): needs a positive hidden size and budget, "
            "bfloat16, float16 or float32" + (f", and there is no provider {unknown[0]!r}" if unknown else "")
        )
    if device is None:
        on_gpu = torch.cuda.is_available()
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    refuse_capture("the tuner", f"group {pg.group_name}")
    run = _Tuning(pg, hidden, dtype, device, token_grid(max_tokens, tokens), budget_s)
    run.agree_on_task(names)
    try:
        run.open(names)
        # In another thread, because this one may allocate from a pool that Inductor's CUDA graphs
        # will overwrite.
        in_thread(run.measure, limit_s(Limit.TUNING) + 10 * budget_s, "tuning")
        tuned = run.finish(save)
    except BaseException as error:
        if run.busy or isinstance(error, PeerTimeoutError):
            run.abandon()
        else:
            run.close()
        raise
    run.close()
    return tuned


@dataclass
class _Tuning(Measurement):
    """One tuning: a measurement, its set-up and results, and the workspaces made for it."""

    absent: dict[str, str] = field(default_factory=dict)
    opened: list[WorkspaceKey] = field(default_factory=list)

    def agree_on_task(self, names: Sequence[str]) -> None:
        """Check that all ranks measure the same, and exchange their machines' facts."""
        asked = [self.hidden, str(self.dtype), self.device.type, list(self.grid), list(names), self.budget_s]

        def work() -> dict[str, Any]:
            one = torch.zeros(1, self.hidden, dtype=self.dtype, device=self.device)
            args = (one, one, one[0], EPS, 0.0, SCALE_THEN_ROUND, self.group.group_name)
            checked = {name: op.providers[name].check(*args) for name in names if name not in PROVIDERS}
            reasons = {name: support.reason for name, support in checked.items() if not support}
            return {"machine": table_store.machine_facts(self.device), "asked": asked, "reasons": reasons}

        result = self.vote("task", work)
        if not result.ok:
            raise WorkspaceError(f"tuning: {result.reason}")
        for rank, fact in zip(result.ranks, result.facts, strict=True):
            if fact["asked"] != result.facts[0]["asked"]:
                raise ConfigError(
                    f"the ranks are to tune different things: rank {result.ranks[0]} "
                    f"{result.facts[0]['asked']}, rank {rank} {fact['asked']}; call tune alike on "
                    "every rank"
                )
            for name, reason in fact["reasons"].items():
                self.absent.setdefault(name, f"on rank {rank}: {reason}")
        self.key: TableKey = table_store.key_of([fact["machine"] for fact in result.facts], self.hidden, self.dtype)

    def open(self, names: Sequence[str]) -> None:
        """Find the candidates and open workspaces for those that need them."""
        for name in names:
            workspace_provider = PROVIDERS.get(name)
            if workspace_provider is not None:
                self._open(workspace_provider)
            elif name not in self.absent:
                call = self._native if name == NATIVE else op.providers[name].fn
                self.candidates.append(TimedCall(name, call, range(1, self.grid[-1] + 1), False, name))
        if len(self.candidates) < 2:
            able = ", ".join(candidate.label for candidate in self.candidates) or "nothing"
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.absent.items())
            raise WorkspaceError(f"there is no choice to measure, since only {able} can serve here ({reasons})")

    def _open(self, provider: WorkspaceProvider) -> None:
        ranks = self.group.size()
        static = provider.limits(self.hidden, self.dtype, ranks)
        if not static:
            self.absent[provider.name] = static.reason
            return
        key = WorkspaceKey(provider.workspace_name, self.group.group_name, self.dtype, self.hidden)
        known = REGISTRY.entries.get(key)
        if known is None or not known.serves(self.group):
            self.opened.append(key)
        entry = REGISTRY.open(
            provider, self.group, self.dtype, self.hidden, self.device, lambda _: self._fitting_tokens(provider)
        )
        made = entry.workspace
        if made is None:
            self.absent[provider.name] = entry.refusal
            return
        wanted = min(self.grid[-1], provider.max_tokens(self.hidden, self.dtype, ranks))
        if made.max_tokens < wanted:
            size = f"{made.max_tokens} tokens, {'there before' if key not in self.opened else 'all that there is room for'}"
            self.notes.append(f"{provider.name} was not measured above its workspace's size ({size})")
        for label in provider.variants:
            if reason := provider.left_out(label):
                self.absent[label] = reason
                continue
            limit = provider.token_limit(label, self.hidden, self.dtype, ranks, made.max_tokens)
            self.candidates.append(TimedCall(label, provider.bind(made, label), limit, True, provider.name))

    def _fitting_tokens(self, provider: WorkspaceProvider) -> int:
        """Return the most tokens to measure that fit a quarter of the free memory."""
        free = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else sys.maxsize
        fitting = [t for t in self.grid if provider.nbytes(self.hidden, self.dtype, self.group.size(), t) <= free // 4]
        return fitting[-1] if fitting else self.grid[0]

    def _native(self, *args: Any) -> tuple[Tensor, Tensor]:
        call = dispatch.native_with_norm_kernel if dispatch.norm_kernel_serves(args) else op.native
        both: tuple[Tensor, Tensor] = call(*args)
        return both

    def finish(self, save: bool) -> Tuned:
        """Save the table on every rank's disk and use it from now on; return it."""
        if not self.times:
            pairs = [*self.rejected.items(), *self.absent.items()]
            reasons = [*self.notes, *(f"{name}: {reason}" for name, reason in pairs)]
            raise WorkspaceError(f"nothing could be timed: {'; '.join(reasons)}")
        now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
        result = self.vote("end", lambda: {"now": now, "s": round(time.monotonic() - self.start, 1)})
        table = Table(
            key=self.key,
            times={label: tuple(sorted(found.items())) for label, found in self.times.items()},
            measured=result.facts[0]["now"],
            seconds=max(0.1, result.facts[0]["s"]),
            rejected=self.rejected,
            absent=self.absent,
            link_rate=self.link_rate,
            notes=tuple(self.notes),
        )
        path, problem = "", ""
        if save:
            # Rank 0 first: ranks of one host write the same file, and the others then find it.
            for first in (True, False):
                result = self.vote(f"save {first}", functools.partial(self._save, table, first))
                problem = problem or result.reason
            path = str(table_store.folder() / table.key.file_name)
        if problem:
            problem = f"the table was not saved everywhere: {problem}"
            if self.is_logging_rank:
                log_line(f"tuning {self.title}: {problem}")
        table_vote.keep(self.group, self.hidden, self.dtype, table, problem)
        return Tuned(table, path, problem)

    def _save(self, table: Table, first: bool) -> None:
        if first == (self.group.rank() == 0):
            try:
                table_store.save(table)
            except OSError as error:
                raise WorkspaceError(f"{table_store.folder()}: {error}") from error

    def close(self) -> None:
        """Free the workspaces that were made for this tuning."""
        for key in self.opened:
            REGISTRY.drop(key)
        if self.device.type == "cuda" and self.opened:
            torch.cuda.empty_cache()

    def abandon(self) -> None:
        """Keep the workspaces after a failure: kernels may still be running in them."""
        for key in self.opened:
            entry = REGISTRY.entries.pop(key, None)
            if entry is not None and entry.workspace is not None:
                ABANDONED.append(entry.workspace)
        REGISTRY.changed()


def _tune_at_first_use(
    group: dist.ProcessGroup, hidden: int, dtype: torch.dtype, device: torch.device, max_tokens: int
) -> None:
    """Tune for more tokens than this program asks for, since later programs use the table too."""
    tune(group, hidden, dtype, device, max_tokens=max(max_tokens, DEFAULT_MAX_TOKENS))


table_vote.run_tuner = _tune_at_first_use
