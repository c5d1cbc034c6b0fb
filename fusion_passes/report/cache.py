"""Keep reports of graphs beside the compile cache, since no pass runs on a graph from there."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import json
import logging
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fusewire.errors import ConfigError
from fusewire.fusion_passes.compiler import compile_cache
from fusewire.fusion_passes.compiler.cache_artifact import cache_folder, write_file
from fusewire.fusion_passes.report.model import GraphReport, graph_reports_from_json, graph_reports_to_json
from fusewire.fusion_passes.report.store import Report, add_graph_report, add_use, report
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
        name: identifies the compilation (see `structure.compilation_name`).
    """

    def __init__(self, name: str) -> None:
        self.name = name
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
        _reported[self.name] = list(self.made)
        text = json.dumps({"salt": self.salt, "graphs": graph_reports_to_json(self.made)})
        try:
            write_file(self.file, text)
            _evict(self.file)
        except OSError as error:
            log.warning("the report of a graph could not be kept beside the compile cache: %s", error)
        compile_cache.take_along(self.file.name, text)

    def restore(self) -> list[GraphReport]:
        """Report and return the kept graphs if no pass ran, since the compile cache had them."""
        if self.made or not self.kept:
            return []
        _reported[self.name] = [add_graph_report(dataclasses.replace(report, **_NOT_RUN)) for report in self.kept]
        compile_cache.take_along(self.file.name, self._text)
        with contextlib.suppress(OSError):
            self.file.touch()
        return _reported[self.name]

    def count_use(self) -> None:
        """Count one more place of the model that runs an earlier, equal compilation."""
        known = _reported.get(self.name, [])
        if not known or not all(map(add_use, known)):  # the report was cleared
            self.restore()

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
# The latest graphs of each compilation in this process, as they stand in its report.
_reported: dict[str, list[GraphReport]] = {}
# vLLM raises it, a BaseException, to end a compilation whose graph equals one that it has compiled.
_EQUAL_GRAPH = "StopCompiling"


@contextlib.contextmanager
def reports_kept(name: str) -> Iterator[ReportCache]:
    """Keep a compilation's reports in the block, which calls `restore` at its end.

    An exception of the compilation passes through.
    """
    global _reported_hits
    cache, before = ReportCache(name), compile_cache.hits()
    token = CURRENT_CACHE.set(cache)
    try:
        yield cache
    except BaseException as stop:
        if type(stop).__name__ == _EQUAL_GRAPH:
            cache.count_use()
        raise
    finally:
        CURRENT_CACHE.reset(token)
    _reported_hits += compile_cache.hits() - before


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


def save_report(path: str | os.PathLike[str], graphs: Iterable[GraphReport] | None = None) -> None:
    """Write the reports of graphs to a file, to be read by `load_report` when no pass runs.

    Meant for callers of `run_passes` who keep compiled graphs themselves, as serving engines do.
    Each rank writes a file of its own.

    Args:
        path: the file; it is replaced, and its folder is made.
        graphs: by default all of `fusewire.report()`.

    Raises:
        OSError: the file cannot be written.
    """
    kept = report().graphs if graphs is None else graphs
    write_file(Path(path), graph_reports_to_json(kept))


def load_report(path: str | os.PathLike[str]) -> Report:
    """Add the reports of a file to `fusewire.report()`, as of graphs from a compile cache.

    Returns:
        A report of the added graphs only.

    Raises:
        OSError: the file cannot be read (FileNotFoundError if there is none).
        ConfigError: `save_report` of this version of fusewire did not write it.
    """
    try:
        kept = graph_reports_from_json(Path(path).read_text())
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path} holds no report that this version of fusewire has written: {error}") from error
    return Report(tuple(add_graph_report(dataclasses.replace(item, **_NOT_RUN)) for item in kept))
