"""Accounts of graphs that come from Inductor's compile cache, in which no pass runs: kept beside it, and brought back."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from fusewire.fusion_passes.config import PassConfig
from fusewire.fusion_passes.manager import cache_key
from fusewire.fusion_passes.report import GraphAccount, accounts_from_json, accounts_to_json, add_account, report

log = logging.getLogger("fusewire")


class Keeper:
    """Keeps the accounts of one compilation in a file beside Inductor's cache."""

    def __init__(self, key: str) -> None:
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        self.file = Path(cache_dir()) / "fusewire" / f"{key}.json"
        self.before = len(report().graphs)

    def save(self) -> None:
        """Write what there is so far.

        Called by the passes, so before Inductor puts the graph into its cache: another rank may find it there at once.
        """
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.file.with_suffix(f".{os.getpid()}")
            temporary.write_text(accounts_to_json(report().graphs[self.before :]))
            temporary.replace(self.file)
        except OSError as error:
            log.warning("the account of a graph could not be kept beside the compile cache: %s", error)

    def restore(self) -> None:
        """Bring the accounts back if a warm cache skipped the passes."""
        if len(report().graphs) == self.before:
            for account in self._read():
                add_account(dataclasses.replace(account, cached=True, pass_seconds=0.0))

    def _read(self) -> list[GraphAccount]:
        try:
            return accounts_from_json(self.file.read_text())
        except FileNotFoundError:
            why = "no account was kept when it was made"
        except (OSError, ValueError, TypeError, KeyError) as error:
            why = f"its account cannot be read ({error})"
        return [_unaccounted(f"the compile cache held this graph, and {why}")]


KEEPER: contextvars.ContextVar[Keeper | None] = contextvars.ContextVar("fusewire_keeper", default=None)


@contextlib.contextmanager
def accounts_kept(key: str) -> Iterator[None]:
    """Keep the accounts of a compilation, or bring them back from an earlier one."""
    global _accounted_hits
    keeper, before = Keeper(key), _cache_hits()
    token = KEEPER.set(keeper)
    try:
        yield
    finally:
        KEEPER.reset(token)
    _accounted_hits += _cache_hits() - before
    keeper.restore()


def _unaccounted(note: str) -> GraphAccount:
    return GraphAccount(-1, "inference", notes=(note,), cached=True)


_accounted_hits = 0


def _cache_hits() -> int:
    from torch._dynamo.utils import counters

    return int(counters["inductor"]["fxgraph_cache_hit"])


@contextlib.contextmanager
def hits_noted() -> Iterator[None]:
    """Say in the report that graphs came from the compile cache without our having seen their compilation."""
    before = _cache_hits() - _accounted_hits
    yield
    hits = _cache_hits() - _accounted_hits - before
    if hits > 0:
        note = "graph" if hits == 1 else "graphs"
        add_account(
            _unaccounted(
                f"the compile cache held {hits} {note}, rewritten as they were when they were made; no account was kept"
            )
        )


def key_of_compilation(model: GraphModule, example_inputs: Sequence[Any], config: PassConfig) -> str:
    """Names one compilation: equal exactly when graph, inputs' metadata, options and fusewire are."""
    parts = [str(model.graph), cache_key(config), torch.__version__, str(torch.is_grad_enabled())]
    for value in example_inputs:
        if isinstance(value, torch.Tensor):
            parts.append(f"{value.dtype}{list(value.shape)}{value.device}")
        else:
            parts.append(str(value))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
