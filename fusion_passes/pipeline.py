"""Runs the passes over a graph and keeps the account of each run."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
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

import fusewire
from fusewire.custom_ops.ops.registry import _machine_support, all_ops, op_of_target, parse_policy
from fusewire.errors import ConfigError, ExpectationError
from fusewire.fusion_passes.analysis.norm_reader import find_norms
from fusewire.fusion_passes.analysis.why_unfused import explain_unfused
from fusewire.fusion_passes.compiler.inductor import copied, exchange_nodes, graph_kind
from fusewire.fusion_passes.config import PassConfig, disabled_by_environment, unknown_name
from fusewire.fusion_passes.context import MATCH, Refused, RunContext
from fusewire.fusion_passes.observer import Observer, observer_of
from fusewire.fusion_passes.passes.raise_ops import computes_norms_itself
from fusewire.fusion_passes.registry import pass_names, registered_passes
from fusewire.fusion_passes.report.entries import entry_of, source_location
from fusewire.fusion_passes.report.model import ALL_REDUCE, FUSED, REDUCE_SCATTER, Entry, GraphReport
from fusewire.fusion_passes.report.store import Report, add_graph_report
from fusewire.fusion_passes.report.text import describe_counts
from fusewire.fusion_passes.spmd.agreement import settle
from fusewire.fusion_passes.spmd.fingerprint import (
    GroupFingerprint,
    arrived,
    collectives_of,
    fingerprints,
    insert_rendezvous,
)
from fusewire.patterns.collectives import AllReduce, read_all_reduce
from fusewire.patterns.norms import NORM_OPS

log = logging.getLogger("fusewire")
# What these do refuses no all-reduce, so a trial can do without them.
_REFUSE_NOTHING = ("shard_residual", "lower_ops", "place_outputs")
# After these the graph shows what fused with what.
_FUSING = ("fuse_all_reduce", "fuse_sequence_parallel", "fuse_epilogues")


@functools.lru_cache(maxsize=1)
def source_hash() -> str:
    """A hash of fusewire's own source files."""
    from fusewire import custom_ops, fusion_passes, patterns

    digest = hashlib.sha256()
    for package in (fusewire, custom_ops, patterns, fusion_passes):
        folder = Path(package.__path__[0])
        for file in sorted(folder.rglob("*.py")):
            digest.update(file.relative_to(folder).as_posix().encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


def cache_key(config: PassConfig) -> str:
    """Everything beside the graph that the passes' result depends on, hashed."""
    parts = [source_hash(), config.key(), str(disabled_by_environment())]
    parts += [f"{item.name}:{item.source}" for item in registered_passes()]
    for op in all_ops().values():
        parts.append(f"{op.name}={','.join(op.priority)}")
        parts += [f"{p.name}:{p.version}:{p.batch_invariant}" for p in op.providers.values()]
        if op.selector is None:
            # A graph made where a provider was missing must not be found where it is not.
            names = parse_policy(op, config.policy(op.name))
            parts += [f"{name} here: {_machine_support(op.providers[name])}" for name in names]
    return hashlib.sha256("\n".join([*parts, *_groups()]).encode()).hexdigest()


def _groups() -> list[str]:
    """The process groups of this process with their sizes: the checks ask for a group's size, graphs hold its name."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return []
    known = torch.distributed.distributed_c10d._world.pg_map
    return sorted(f"group {group.group_name}: {group.size()} ranks" for group in known)


def run_passes(
    graph: Graph, config: PassConfig | None = None, *, unfused: Mapping[str, str] = MappingProxyType({})
) -> GraphReport:
    """Run all enabled passes over a post-grad graph, in place.

    fusewire's own passes are tried on a copy first: what they refuse, or fail at, leaves this graph as it is. Where they
    rewrote what ranks of other processes take part in, this waits until those have compiled the graph too.

    Args:
        graph: a functional post-grad torch.fx.Graph whose nodes carry `meta["val"]`.
        config: the options; defaults if None.
        unfused: names of process groups whose collectives are to be left as written, with the reason for the report.

    Returns:
        The account of this graph, which `fusewire.report()` has from now on too.

    Raises:
        ConfigError: `disabled_passes` names a pass that does not exist, or an argument is of another kind.
        ExpectationError: the count of fused all-reduces is not what `expect_fused` asks for.
        PeerTimeoutError: a rank did not compile the graph in time.
        RankMismatchError: a rank already runs another graph.
    """
    config = config if config is not None else PassConfig()
    _check_arguments(graph, config)
    if disabled_by_environment():
        return GraphReport(-1, "disabled")
    for name in config.disabled_passes:
        if name not in pass_names():
            raise ConfigError(f"disabled_passes: {unknown_name('pass', name, pass_names())}")
    start = time.perf_counter()
    run = _Run(graph, config, unfused)
    account = run.run()
    seconds = time.perf_counter() - start - run.waited_s
    account = dataclasses.replace(account, pass_seconds=seconds, nodes_after=len(graph.nodes))
    account = add_graph_report(account)
    log.info("%s", Report((account,)).summary)
    _check_expectation(account, config)
    return account


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


def _check_expectation(account: GraphReport, config: PassConfig) -> None:
    expected = config.expect_fused
    if expected is None or (expected != "all" and not account.entries):
        return
    fused = sum(entry.status == FUSED for entry in account.entries)
    wanted = len(account.entries) if expected == "all" else expected
    if fused != wanted:
        raise ExpectationError(
            f"expect_fused={expected!r}, but {describe_counts(account.entries)} were fused.\n{Report((account,))}"
        )


class _Run:
    def __init__(self, graph: Graph, config: PassConfig, unfused: Mapping[str, str]) -> None:
        self.graph = graph
        self.config = config
        self.unfused = dict(unfused)
        self.prints: list[GroupFingerprint] = []
        self.waited_s = 0.0  # for other ranks
        self.passes = [item for item in registered_passes() if item.is_enabled(config)]
        self.notes: list[str] = []
        self.observer: Observer | None = None
        self.sites: list[AllReduce] = []
        self.entries: dict[str, Entry] = {}
        self.dumps = config.dump_graphs is not None

    def run(self) -> GraphReport:
        kind = graph_kind()
        before = len(self.graph.nodes)
        context = RunContext(self.config)
        if kind != "training":
            self._run_leading()
        found = [read_all_reduce(node) for node in self.graph.nodes if node.op == "call_function"]
        self.sites = [site for site in found if site is not None]
        self.entries = {site.name: entry_of(site) for site in self.sites}
        program = arrived(self.graph)
        if kind == "training":
            reason = "the graph is compiled for training; run the model under torch.no_grad() to fuse"
            context.refused = {site.name: Refused(MATCH, reason) for site in self.sites}
            self._settle(program, context)
        elif self._has_work():
            original = copied(self.graph)
            context = self._agreed(original, program)
            self._explain_rest(context, original)
        else:
            self._settle(program, context)
        if kind != "training":
            insert_rendezvous(self.graph, self.prints)
        entries = tuple(self._entry(site.name, context) for site in self.sites)
        account = GraphReport(
            -1,
            kind,
            entries,
            0.0,
            before,
            before,
            tuple(self.notes),
            fingerprints=tuple(self.prints),
            unfused=tuple(sorted(self.unfused)),
        )
        return account if self.observer is None else self.observer.complete(account)

    def _agreed(self, original: Graph, program: Mapping[str, tuple[str, list[str]]]) -> RunContext:
        """Rewrite the graph as far as the ranks of each group agree."""
        notes = list(self.notes)
        self.observer = observer_of(lambda: original)
        context = self._attempt(original)
        unfused = self._settle(program, context)
        if unfused:
            self.unfused.update(unfused)
            self.notes, self.observer = notes, observer_of(lambda: original)
            exchange_nodes(self.graph, copied(original))
            context = self._attempt(original)
            self.prints = self._fingerprints(program, context)
        return context

    def _settle(self, program: Mapping[str, tuple[str, list[str]]], context: RunContext) -> dict[str, str]:
        """Compare with the peers what became of the graph; the groups whose ranks differ, with the reason."""
        self.prints = self._fingerprints(program, context)
        start = time.perf_counter()
        try:
            return settle(self.prints, wait=not self.config.compile_alone)
        finally:
            self.waited_s += time.perf_counter() - start

    def _fingerprints(
        self, program: Mapping[str, tuple[str, list[str]]], context: RunContext
    ) -> list[GroupFingerprint]:
        moved: dict[str, list[str]] = {}
        seen = Counter[str]()  # numbered by group: of this rank's other groups the peers know nothing
        for site in self.sites:
            group = self.entries[site.name].group
            for text in context.moved.get(site.name, ()):
                moved.setdefault(group, []).append(f"all-reduce {seen[group]} {text}")
            seen[group] += 1
        first = next((nodes[0] for nodes in collectives_of(self.graph).values()), None)
        place = "" if first is None else source_location(first)
        return fingerprints(program, self.graph, moved, place or "a graph")

    def _run_leading(self) -> None:
        """The users' passes that stand before all of fusewire's: they make the graph that is judged."""
        while self.passes and self.passes[0].user:
            item = self.passes.pop(0)
            self._dump(self.graph, f"00_before_{item.name}")
            item.run(self.graph, RunContext(self.config))

    def _has_work(self) -> bool:
        if self.sites or any(item.user for item in self.passes) or computes_norms_itself(self.config):
            return True
        names = {entry.op for entry in NORM_OPS}
        return any(
            op_of_target(node.target) is not None or str(node.target).rpartition(".")[0].replace(".", "::") in names
            for node in self.graph.nodes
            if node.op == "call_function"
        )

    def _attempt(self, original: Graph) -> RunContext:
        """Try on copies until nothing more is refused, then rewrite the graph itself."""
        left = (site for site in self.sites if self.entries[site.name].group in self.unfused)
        excluded = {site.name: Refused(MATCH, self.unfused[self.entries[site.name].group]) for site in left}
        unmergeable: set[str] = set()
        unfused_second_norms: set[str] = set()
        try:
            for _ in range(3 * len(self.sites) + 2):  # each round but the last learns of one site at least
                trial = RunContext(self.config, dict(excluded), set(unmergeable), set(unfused_second_norms))
                self._apply(copied(original), trial, trial_run=True)
                vain = trial.merged_in_vain()
                # A reason found at a merged all-reduce is not yet its own.
                new = {n: why for n, why in trial.refused.items() if n not in excluded and n not in vain}
                if not new and vain <= unmergeable and trial.unfused_second_norms <= unfused_second_norms:
                    break
                excluded.update(new)
                unmergeable |= vain
                unfused_second_norms |= trial.unfused_second_norms
            else:
                raise RuntimeError("the passes refuse something new in every round")
        except Exception as error:  # a defect of ours must not cost the user the compilation
            log.warning("fusewire left a graph as it was, since a pass failed on it", exc_info=True)
            return self._failed(f"a pass of fusewire failed and the graph was left alone: {_say(error)}")
        context = RunContext(self.config, dict(excluded), unmergeable, unfused_second_norms)
        try:
            self._apply(self.graph, context, trial_run=False)
            self.graph.lint()
        except _UserPassFailed as failure:
            raise failure.error from None
        except Exception as error:
            log.warning("fusewire took its changes of a graph back, since a pass failed on it", exc_info=True)
            exchange_nodes(self.graph, copied(original))
            return self._failed(f"a pass of fusewire failed and its changes were taken back: {_say(error)}")
        context.refused = {**context.refused, **excluded}
        self.notes += context.notes + context.assumptions()
        return context

    def _failed(self, reason: str) -> RunContext:
        self.notes.append(reason)
        return RunContext(self.config, refused={site.name: Refused(MATCH, reason) for site in self.sites})

    def _apply(self, graph: Graph, context: RunContext, *, trial_run: bool) -> None:
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

    def _explain_rest(self, context: RunContext, original: Graph) -> None:
        nodes = {node.name: node for node in original.nodes}
        fused = [nodes[name] for name in context.fused if name in nodes]  # a user's pass may have added others
        fused_sums = {user.name for node in fused for value in node.users for user in value.users}
        judged = {**context.fused, **context.refused, **context.merged}
        left = [site.name for site in self.sites if site.name not in judged]
        norms = {norm.source for norm in find_norms(original)} if left else set()
        needed = {"raise_ops": "", "fuse_all_reduce": ALL_REDUCE, "fuse_sequence_parallel": REDUCE_SCATTER}
        for name in left:
            disabled = [key for key, kind in needed.items() if kind in ("", self.entries[name].collective)]
            disabled = [key for key in disabled if key in self.config.disabled_passes]
            if disabled:
                context.refuse(name, MATCH, f"disabled_passes switches {' and '.join(disabled)} off")
                continue
            if not self.config.fuse_allreduce_rms:
                context.refuse(name, MATCH, "fuse_allreduce_rms=False switches the fusion off")
                continue
            if not self.config.fuse_sequence_parallel and self.entries[name].collective == REDUCE_SCATTER:
                context.refuse(name, MATCH, "fuse_sequence_parallel=False switches the fusion off")
                continue
            copied = read_all_reduce(nodes[name])
            assert copied is not None
            context.refused[name] = explain_unfused(copied, norms, fused_sums)

    def _entry(self, name: str, context: RunContext) -> Entry:
        entry = self.entries[name]
        if name in context.merged:
            return dataclasses.replace(entry, status=FUSED, fusion=context.merged[name])
        fused = context.fused.get(name)
        if fused is not None:
            return dataclasses.replace(
                entry,
                status=FUSED,
                fusion=fused.fusion,
                spelling=fused.spelling,
                provider=fused.provider,
                reason=fused.detail,
            )
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


def _say(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
