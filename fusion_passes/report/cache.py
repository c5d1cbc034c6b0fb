"""Keep reports of graphs beside the compile cache, since no pass runs on a graph from there."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import hashlib
import json
import logging
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from fusewire.fusion_passes.compiler import compile_cache
from fusewire.fusion_passes.compiler.cache_artifact import cache_folder, write_file
from fusewire.fusion_passes.report.model import GraphReport, graph_reports_from_json, graph_reports_to_json
from fusewire.fusion_passes.report.store import add_graph_report
from fusewire.fusion_passes.spmd.fingerprint import GroupFingerprint

log = logging.getLogger("fusewire")
# Above this size the least recently used reports are deleted, and their graphs compiled anew. The
# report of 60 all-reduces takes 25 kB.
MOST_BYTES = 64 * 2**20
_NOT_RUN: dict[str, Any] = {
    "cached": True,
    "pass_seconds": 0.0,
    "pass_processor_seconds": 0.0,
    "waited_seconds": 0.0,
}


class ReportCache:
    """The reports of one compilation's graphs, in a file beside Inductor's cache.

    The file also holds a random part of the graphs' key in that cache. So a graph that is found
    there has a report, and a graph whose report was lost is compiled anew.

    Args:
        name: identifies the compilation (see `compilation_name`).
    """

    def __init__(self, name: str) -> None:
        self.file = cache_folder() / f"{name}.json"
        self.made: list[GraphReport] = []  # by the passes, in this compilation
        self.kept: list[GraphReport] = []
        self.salt = uuid.uuid4().hex[:16]
        self._text = ""
        self._read()
        self.key = f"{name}-{self.salt}"

    @property
    def fingerprints(self) -> list[GroupFingerprint]:
        """Return the fingerprints of the kept graphs, which all ranks must have to run them."""
        return [item for report in self.kept for item in report.fingerprints]

    def save(self, report: GraphReport) -> None:
        """Add a report to those of this compilation, and write them.

        The passes call this before Inductor puts the graph into its cache, where another rank may
        find it at once. A file that cannot be written only gives a warning in the log.
        """
        self.made.append(report)
        text = json.dumps({"salt": self.salt, "graphs": graph_reports_to_json(self.made)})
        try:
            write_file(self.file, text)
            _evict(self.file)
        except OSError as error:
            log.warning("the report of a graph could not be kept beside the compile cache: %s", error)
        compile_cache.take_along(self.file.name, text)

    def restore(self) -> None:
        """Report the kept graphs if no pass ran, because the compile cache had them."""
        if self.made or not self.kept:
            return
        for report in self.kept:
            add_graph_report(dataclasses.replace(report, **_NOT_RUN))
        compile_cache.take_along(self.file.name, self._text)
        with contextlib.suppress(OSError):
            self.file.touch()

    def _read(self) -> None:
        try:
            text = self.file.read_text()
            data = json.loads(text)
            kept, salt = graph_reports_from_json(data["graphs"]), str(data["salt"])
        except FileNotFoundError:
            return
        except (OSError, ValueError, TypeError, KeyError) as error:
            log.warning("the report of a graph cannot be read, so the graph is compiled anew: %s", error)
            return
        # A graph that stayed as written because the ranks' graphs differed is tried anew each time.
        if not any(report.unfused for report in kept):
            self.kept, self.salt, self._text = kept, salt, text


def _evict(newest: Path) -> None:
    """Delete the least recently used reports, never the newest, down to `MOST_BYTES` in all.

    Other processes may delete the same files meanwhile.
    """
    found = []
    for file in newest.parent.glob("*.json"):
        with contextlib.suppress(FileNotFoundError):
            found.append((file == newest, file.stat().st_mtime, file.stat().st_size, file))
    excess = sum(size for _, _, size, _ in found) - MOST_BYTES
    for is_newest, _, size, file in sorted(found):
        if excess <= 0 or is_newest:
            return
        file.unlink(missing_ok=True)
        excess -= size


CURRENT_CACHE: contextvars.ContextVar[ReportCache | None] = contextvars.ContextVar(
    "fusewire_report_cache", default=None
)
_reported_hits = 0


@contextlib.contextmanager
def reports_kept(name: str) -> Iterator[ReportCache]:
    """Keep a compilation's reports in the block; restore them if the cache had the graph."""
    global _reported_hits
    cache, before = ReportCache(name), compile_cache.hits()
    token = CURRENT_CACHE.set(cache)
    try:
        yield cache
    finally:
        CURRENT_CACHE.reset(token)
    _reported_hits += compile_cache.hits() - before
    cache.restore()


@contextlib.contextmanager
def hits_noted() -> Iterator[None]:
    """Report after the block how many graphs came from the compile cache without a report."""
    before = compile_cache.hits() - _reported_hits
    yield
    hits = compile_cache.hits() - _reported_hits - before
    if hits > 0:
        graphs = "graph" if hits == 1 else "graphs"
        note = f"the compile cache held {hits} {graphs}, rewritten as they were when they were made; no report was kept"
        add_graph_report(GraphReport(-1, "inference", notes=(note,), cached=True))


def compilation_name(model: GraphModule, example_inputs: Sequence[Any], passes_key: str) -> str:
    """Return a name that only equal compilations share: of graph, inputs' metadata and passes."""
    parts = [str(model.graph), passes_key, torch.__version__, str(torch.is_grad_enabled())]
    for value in example_inputs:
        if isinstance(value, torch.Tensor):
            strides = value.stride() if value.layout is torch.strided else ""
            parts.append(f"{value.dtype}{list(value.shape)}{strides}{value.device}")
        else:
            parts.append(str(value))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
