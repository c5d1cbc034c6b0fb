"""Accounts of graphs that come from Inductor's compile cache, in which no pass runs: kept beside it, and brought back."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import hashlib
import json
import logging
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.compiler._cache import CacheArtifactManager
from torch.fx import GraphModule

from fusewire.fusion_passes.compiler.cache_artifact import GraphReportArtifact, cache_folder, write_file
from fusewire.fusion_passes.config import PassConfig
from fusewire.fusion_passes.pipeline import cache_key
from fusewire.fusion_passes.report.model import GraphReport, graph_reports_from_json, graph_reports_to_json
from fusewire.fusion_passes.report.store import add_graph_report
from fusewire.fusion_passes.spmd.fingerprint import GroupFingerprint

log = logging.getLogger("fusewire")


class Keeper:
    """Keeps the accounts of one compilation in a file beside Inductor's cache.

    The file also holds a random part of the compiled graphs' key in that cache. So whoever finds a graph there has its
    account, and a graph whose account was lost is compiled anew.

    Args:
        name: tells one compilation from others (see `key_of_compilation`).
    """

    def __init__(self, name: str) -> None:
        self.file = cache_folder() / f"{name}.json"
        self.made: list[GraphReport] = []  # by the passes, in this compilation
        self.kept: list[GraphReport] = []
        self.salt = uuid.uuid4().hex[:16]
        self._read()
        self.key = f"{name}-{self.salt}"

    @property
    def fingerprints(self) -> list[GroupFingerprint]:
        """What ranks must have alike to run the graphs that were kept."""
        return [item for account in self.kept for item in account.fingerprints]

    def save(self, account: GraphReport) -> None:
        """Add an account to those of this compilation, and write them.

        Called by the passes, so before Inductor puts the graph into its cache: another rank may find it there at once.
        """
        self.made.append(account)
        text = json.dumps({"salt": self.salt, "graphs": graph_reports_to_json(self.made)})
        try:
            write_file(self.file, text)
        except OSError as error:
            log.warning("the account of a graph could not be kept beside the compile cache: %s", error)
        CacheArtifactManager.record_artifact(GraphReportArtifact.type(), self.file.name, text.encode())

    def restore(self) -> None:
        """Bring the accounts back if a warm cache skipped the passes."""
        if self.made or not self.kept:
            return
        for account in self.kept:
            add_graph_report(dataclasses.replace(account, cached=True, pass_seconds=0.0))
        CacheArtifactManager.record_artifact(GraphReportArtifact.type(), self.file.name, self.file.read_bytes())

    def _read(self) -> None:
        try:
            data = json.loads(self.file.read_text())
            kept, salt = graph_reports_from_json(data["graphs"]), str(data["salt"])
        except FileNotFoundError:
            return
        except (OSError, ValueError, TypeError, KeyError) as error:
            log.warning("the account of a graph cannot be read, so the graph is compiled anew: %s", error)
            return
        # A graph that was left as written since the ranks' graphs differed says nothing about this time.
        if not any(account.unfused for account in kept):
            self.kept, self.salt = kept, salt


KEEPER: contextvars.ContextVar[Keeper | None] = contextvars.ContextVar("fusewire_keeper", default=None)


@contextlib.contextmanager
def accounts_kept(name: str) -> Iterator[Keeper]:
    """Keep the accounts of a compilation, or bring them back from an earlier one."""
    global _accounted_hits
    keeper, before = Keeper(name), _cache_hits()
    token = KEEPER.set(keeper)
    try:
        yield keeper
    finally:
        KEEPER.reset(token)
    _accounted_hits += _cache_hits() - before
    keeper.restore()


def _unaccounted(note: str) -> GraphReport:
    return GraphReport(-1, "inference", notes=(note,), cached=True)


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
        add_graph_report(
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
