"""Run the passes over a graph: rewrite, refuse, agree with the other ranks, report.

Refused sites stay as they were. If a run over the graph refuses a site that one of its passes has
changed, the graph is restored. Then the passes run on copies until they refuse nothing new, and
last on the graph, except for the refused sites.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import Graph, GraphModule

from fusewire.custom_ops.ops.registry import op_of_target
from fusewire.errors import ConfigError
from fusewire.fusion_passes.analysis.graph import source_location
from fusewire.fusion_passes.analysis.norm_quant_ops import norm_quant_inputs
from fusewire.fusion_passes.analysis.norm_reader import find_norms
from fusewire.fusion_passes.analysis.why_unfused import explain_unfused
from fusewire.fusion_passes.compiler.dynamo import graph_kind
from fusewire.fusion_passes.compiler.inductor import GraphRecord, exchange_nodes
from fusewire.fusion_passes.config import PassConfig, disabled_by_environment, unknown_name
from fusewire.fusion_passes.context import MATCH, Refused, RunContext
from fusewire.fusion_passes.observer import Observer, observer_of
from fusewire.fusion_passes.passes.raise_ops import computes_norms_itself
from fusewire.fusion_passes.registry import pass_names, registered_passes
from fusewire.fusion_passes.report.entries import entry_of, unread_in
from fusewire.fusion_passes.report.expectation import check_graph
from fusewire.fusion_passes.report.model import ALL_REDUCE, FUSED, Entry, GraphReport
from fusewire.fusion_passes.report.store import Report, add_graph_report
from fusewire.fusion_passes.spmd.agreement import agree
from fusewire.fusion_passes.spmd.fingerprint import (
    GroupFingerprint,
    collectives_of,
    fingerprint_groups,
    insert_rendezvous,
    programs_of,
)
from fusewire.patterns.collectives import AllReduce, all_reduces_in, op_name, read_all_reduce
from fusewire.patterns.norms import NORM_OPS

log = logging.getLogger("fusewire")
# These refuse no all-reduce, so a trial leaves them out.
_REFUSE_NOTHING = ("fuse_quantization", "shard_residual", "lower_ops", "place_outputs")
# After each of these the graph shows what fused with what.
_FUSING = ("fuse_all_reduce", "fuse_sequence_parallel", "fuse_epilogues")


def run_passes(
    graph: Graph, config: PassConfig | None = None, *, unfused: Mapping[str, str] = MappingProxyType({})
) -> GraphReport:
    """Run all enabled passes over a post-grad graph, in place.

    fusewire's own passes run on a copy first: what they refuse, or fail at, stays as it is. If they
    rewrite collectives with ranks of other processes, this is a collective: it waits until those
    ranks have compiled the graph too, unless `compile_alone` is on.

    Args:
        graph: a functional post-grad torch.fx.Graph whose nodes carry `meta["val"]`.
        config: the options; defaults if None.
        unfused: names of process groups whose collectives stay as written, with the reasons.

    Returns:
        The report of this graph, which `fusewire.report()` includes from now on.

    Raises:
        ConfigError: `disabled_passes` names an unknown pass, or an argument cannot be used.
        ExpectationError: the number of fused all-reduces is not what `expect_fused` asks for.
        PeerTimeoutError: a rank did not compile the graph in time.
        RankMismatchError: a rank already waits to run another graph.
    """
    config = config if config is not None else PassConfig()
    _check_arguments(graph, config)
    if disabled_by_environment():
        return GraphReport(-1, "disabled")
    for name in config.disabled_passes:
        if name not in pass_names():
            raise ConfigError(f"disabled_passes: {unknown_name('pass', name, pass_names())}")
    start, processor = time.perf_counter(), time.thread_time()
    run = _Run(graph, config, unfused)
    report = run.run()
    report = dataclasses.replace(
        report,
        pass_seconds=time.perf_counter() - start - run.waited_s,
        pass_processor_seconds=time.thread_time() - processor - run.waited_processor_s,
        waited_seconds=run.waited_s,
        nodes_after=len(graph.nodes),
    )
    report = add_graph_report(report)
    log.info("%s", Report((report,)).summary)
    check_graph(report, config.expect_fused)
    return report


def _check_arguments(graph: Any, config: Any) -> None:
    if not isinstance(config, PassConfig):
        raise ConfigError(f"run_passes takes a PassConfig, not {type(config).__name__}: PassConfig(**options)")
    if not isinstance(graph, Graph):
        hint = ": give its .graph" if isinstance(graph, GraphModule) else ""
        raise ConfigError(f"run_passes takes a torch.fx.Graph, not {type(graph).__name__}{hint}")
    for node in graph.nodes:
        if node.op in ("call_method", "call_module") or ("example_value" in node.meta and "val" not in node.meta):
            raise ConfigError(
                f"run_passes takes a post-grad graph of ATen operators, and this is one as Dynamo captures it (see "
                f'{node.name}); use torch.compile(backend="fusewire") or fusewire.enable(), which run at the right place'
            )


class _Run:
    """One run of the passes over one graph: rewrite, refuse, agree with the other ranks."""

    def __init__(self, graph: Graph, config: PassConfig, unfused: Mapping[str, str]) -> None:
        self.graph = graph
        self.config = config
        self.unfused = dict(unfused)
        self.prints: list[GroupFingerprint] = []
        self.waited_s = self.waited_processor_s = 0.0  # for other ranks; wall and processor time
        self.passes = [item for item in registered_passes() if item.is_enabled(config)]
        self.notes: list[str] = []
        self.observer: Observer | None = None
        self.sites: list[AllReduce] = []
        self.entries: dict[str, Entry] = {}
        self.dumps = config.dump_graphs is not None

    def run(self) -> GraphReport:
        """Rewrite the graph and return its report."""
        kind, before = graph_kind(), len(self.graph.nodes)
        if kind != "training":
            self._run_leading()
        self.sites = all_reduces_in(self.graph)
        self.entries = {site.name: entry_of(site) for site in self.sites}
        self.program, unread = programs_of(self.graph), unread_in(self.graph)
        context = RunContext(self.config)
        if kind == "training":
            context = self._refuse_all(
                "the graph is compiled for training; run the model under torch.no_grad() to fuse"
            )
            self._agree(context)
        elif self._has_work():
            context = self._rewrite_as_agreed()
        else:
            self._agree(context)
        if kind != "training":
            insert_rendezvous(self.graph, self.prints)
        entries = tuple(self._entry(site.name, context) for site in self.sites)
        report = GraphReport(
            -1,
            kind,
            entries,
            0.0,
            before,
            before,
            tuple(self.notes),
            fingerprints=tuple(self.prints),
            unfused=tuple(sorted(self.unfused)),
            unread=unread,
        )
        return report if self.observer is None else self.observer.complete(report)

    def _rewrite_as_agreed(self) -> RunContext:
        """Rewrite the graph; if ranks differ, again without the collectives of their group."""
        record, notes = GraphRecord(self.graph), list(self.notes)
        self.observer = observer_of(record.copy)
        context = self._rewrite(record)
        unfused = self._agree(context)
        if unfused:
            self.unfused.update(unfused)
            self.notes, self.observer = notes, observer_of(record.copy)
            exchange_nodes(self.graph, record.copy())
            context = self._rewrite(record)
            self.prints = self._fingerprints(context)
        self._explain_rest(context, record)
        return context

    def _agree(self, context: RunContext) -> dict[str, str]:
        """Publish the fingerprints; return the groups to leave as written, with the reasons."""
        self.prints = self._fingerprints(context)
        start, processor = time.perf_counter(), time.thread_time()
        try:
            return agree(self.prints, wait=not self.config.compile_alone)
        finally:
            self.waited_s += time.perf_counter() - start
            self.waited_processor_s += time.thread_time() - processor

    def _fingerprints(self, context: RunContext) -> list[GroupFingerprint]:
        moved: dict[str, list[str]] = {}
        seen = Counter[str]()  # by group: peers do not know this rank's other groups
        for site in self.sites:
            group = self.entries[site.name].group
            for text in context.moved.get(site.name, ()):
                moved.setdefault(group, []).append(f"all-reduce {seen[group]} {text}")
            seen[group] += 1
        first = next((nodes[0] for nodes in collectives_of(self.graph).values()), None)
        place = "" if first is None else source_location(first)
        return fingerprint_groups(self.program, self.graph, moved, place or "a graph")

    def _run_leading(self) -> None:
        """Run the users' passes that come before fusewire's; the trials start from their result."""
        while self.passes and self.passes[0].user:
            item = self.passes.pop(0)
            self._dump(self.graph, f"00_before_{item.name}")
            item.run(self.graph, RunContext(self.config))

    def _has_work(self) -> bool:
        """Return whether a pass could change the graph, so that it is worth a copy."""
        if self.sites or any(item.user for item in self.passes) or computes_norms_itself(self.config):
            return True
        names = {entry.op for entry in NORM_OPS}
        return any(
            op_of_target(node.target) is not None or op_name(node) in names
            for node in self.graph.nodes
            if node.op == "call_function"
        )

    def _rewrite(self, record: GraphRecord) -> RunContext:
        """Rewrite all of the graph that is not refused; return what was fused and refused."""
        context = self._rewrite_at_once(record) or self._rewrite_after_trials(record)
        context.refused = {**context.refused, **context.excluded}
        self.notes += context.notes + context.assumptions()
        return context

    def _rewrite_at_once(self, record: GraphRecord) -> RunContext | None:
        """Rewrite the graph; restore it and return None if a pass refuses what another changed.

        Most graphs are done after this, without a copy. Users' passes must run only once, so graphs
        that have any are left to the trials.
        """
        if any(item.user for item in self.passes):
            return None
        start = self._start()
        context = start.next_run()
        try:
            self._apply(self.graph, context, trial_run=False)
            self.graph.lint()
            if self._learn(start, context):
                return context
        except Exception:  # the trials fail in the same pass, and report it
            log.debug("a pass of fusewire failed; its changes are taken back", exc_info=True)
        exchange_nodes(self.graph, record.copy())
        if self.observer is not None:
            self.observer = observer_of(record.copy)
        return None

    def _rewrite_after_trials(self, record: GraphRecord) -> RunContext:
        """Find on copies what to refuse, then rewrite the rest in the graph itself."""
        try:
            context = self._try_on_copies(record)
        except Exception as error:  # a bug in fusewire must not fail the compilation
            log.warning("fusewire left a graph as it was, since a pass failed on it", exc_info=True)
            return self._failed(f"a pass of fusewire failed and the graph was left alone: {_describe(error)}")
        try:
            self._apply(self.graph, context, trial_run=False)
            self.graph.lint()
        except _UserPassFailed as failure:
            raise failure.error from None
        except Exception as error:
            log.warning("fusewire took its changes of a graph back, since a pass failed on it", exc_info=True)
            exchange_nodes(self.graph, record.copy())
            return self._failed(f"a pass of fusewire failed and its changes were taken back: {_describe(error)}")
        return context

    def _try_on_copies(self, record: GraphRecord) -> RunContext:
        """Run the passes on copies until they refuse nothing new; return a context of refusals."""
        start = self._start()
        for _ in range(3 * len(self.sites) + 2):  # each round but the last learns something
            trial = start.next_run()
            self._apply(record.copy(), trial, trial_run=True)
            if self._learn(start, trial):
                return start
        raise RuntimeError("the passes refuse something new in every round")

    def _start(self) -> RunContext:
        """Return the start of the first run: sites of groups whose ranks differ are excluded."""
        groups = {site.name: self.entries[site.name].group for site in self.sites}
        left = {name: Refused(MATCH, self.unfused[group]) for name, group in groups.items() if group in self.unfused}
        return RunContext(self.config, left)

    @staticmethod
    def _learn(start: RunContext, run: RunContext) -> bool:
        """Add a run's refusals to the next start; return whether the next run would do the same."""
        vain = run.merged_in_vain()
        # A refusal of a merged all-reduce does not yet apply to the all-reduces by themselves.
        new = {name: why for name, why in run.refused.items() if name not in start.excluded and name not in vain}
        learned = vain - start.unmergeable or run.unfused_second_norms - start.unfused_second_norms
        start.excluded.update(new)
        start.unmergeable |= vain
        start.unfused_second_norms |= run.unfused_second_norms
        # All-reduces refused before canonicalization left the graph as it was.
        return not learned and not new.keys() & run.spelling.keys()

    def _failed(self, reason: str) -> RunContext:
        self.notes.append(reason)
        return self._refuse_all(reason)

    def _refuse_all(self, reason: str) -> RunContext:
        return RunContext(self.config, refused={site.name: Refused(MATCH, reason) for site in self.sites})

    def _apply(self, graph: Graph, context: RunContext, *, trial_run: bool) -> None:
        """Run the passes over a graph; in a trial, only fusewire's own that can refuse."""
        for index, item in enumerate(self.passes):
            if trial_run and (item.user or item.name in _REFUSE_NOTHING):
                continue
            if not trial_run:
                self._dump(graph, f"{index}0_before_{item.name}")
            try:
                changed = item.run(graph, context)
            except Exception as error:
                if item.user:
                    raise _UserPassFailed(error) from error
                raise
            if changed:
                context.changes.append(item.name)
            if not trial_run and self.observer is not None and item.name in _FUSING:
                self.observer.fused(graph)
        if not trial_run:
            self._dump(graph, "99_after")

    def _explain_rest(self, context: RunContext, record: GraphRecord) -> None:
        """Refuse, with a reason, the all-reduces that no pass fused or refused."""
        judged = {**context.fused, **context.refused, **context.merged}
        left = [site.name for site in self.sites if site.name not in judged]
        if not left:
            return
        original = record.copy()
        nodes = {node.name: node for node in original.nodes}
        # A user's pass may have added others.
        fused = [nodes[name] for name in context.fused if name in nodes]
        fused_sums = {user.name for node in fused for value in node.users for user in value.users}
        norms = {norm.input for norm in find_norms(original)} | norm_quant_inputs(original)
        for name in left:
            switched_off = self._switched_off(self.entries[name].collective)
            site = read_all_reduce(nodes[name])
            assert site is not None
            context.refused[name] = (
                Refused(MATCH, switched_off) if switched_off else explain_unfused(site, norms, fused_sums, self.config)
            )

    def _switched_off(self, collective: str) -> str:
        """Return which option keeps this kind of collective from being fused, or ""."""
        needed = ("raise_ops", "fuse_all_reduce" if collective == ALL_REDUCE else "fuse_sequence_parallel")
        disabled = [name for name in needed if name in self.config.disabled_passes]
        if disabled:
            return f"disabled_passes switches {' and '.join(disabled)} off"
        options = (option for item in registered_passes() if item.name in needed for option in item.options)
        off = next((option for option in options if not getattr(self.config, option)), "")
        return off and f"{off}=False switches the fusion off"

    def _entry(self, name: str, context: RunContext) -> Entry:
        entry = self.entries[name]
        if name in context.merged:
            return dataclasses.replace(entry, status=FUSED, fusion=context.merged[name])
        fused = context.fused.get(name)
        if fused is not None:
            entry = dataclasses.replace(entry, status=FUSED, fusion=fused.fusion, spelling=fused.spelling)
            return dataclasses.replace(entry, provider=fused.provider, reason=fused.detail)
        refused = context.refused[name]
        return dataclasses.replace(entry, gate=refused.gate, reason=refused.reason)

    def _dump(self, graph: Graph, name: str) -> None:
        if not self.dumps:
            return
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        folder = Path(str(self.config.dump_graphs))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / f"rank{rank}_pid{os.getpid()}_graph{id(self) & 0xFFFFFF:06x}_{name}.txt"
            file.write_text(f"{graph}\n")
        except OSError as error:  # a full disk must not change what this rank fuses
            self.dumps = False
            self.notes.append(f"dump_graphs: graphs are missing in {folder}: {error}")


class _UserPassFailed(Exception):
    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
