"""Compare the graphs that a group's ranks compile; if they differ, its collectives stay as written.

Each rank compiles for itself and sees only its own graph. If the graphs differ (one rank reads a
value that the others do not), one rank may fuse or merge collectives that another keeps. So every
rank publishes in the group's store what it compiled. A rank that rewrote a group's collectives
waits until every peer has published the same rewriting of the same program, or something else.
Then one rank writes the decision, once, and every rank obeys it, later ones too.

This finds ranks that differ early enough to go on unfused instead of raising. It does not make
fusing safe: `fusewire::rendezvous` does, before the graph runs. Compilations are paired by content,
not by counting. Once the ranks' histories differ, nothing more is rewritten. No decision depends
on the clock: past the time limit the rank raises.
"""

from __future__ import annotations

import contextvars
import hashlib
import json
import threading
import uuid
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch.distributed as dist

from fusewire.custom_ops._torch_private import process_groups
from fusewire.custom_ops.coordination import rendezvous
from fusewire.custom_ops.coordination.busy import poll_ranks
from fusewire.custom_ops.coordination.processes import how_long
from fusewire.custom_ops.coordination.rendezvous import AS_WRITTEN
from fusewire.custom_ops.coordination.store import GroupStore
from fusewire.custom_ops.coordination.timeouts import TIMEOUT_VARIABLE, group_timeout_s
from fusewire.custom_ops.ops.all_reduce_norm import resolve_group
from fusewire.errors import PeerTimeoutError, ProcessGroupError, RankMismatchError
from fusewire.fusion_passes.spmd.fingerprint import GroupFingerprint, has_peers

FUSED = "fused"
# Prefix of the `program` of a posting by a rank that does not compile what its peers do.
_NONE = "none: "

# What this compilation has published already, from the report kept beside the compile cache.
PUBLISHED: contextvars.ContextVar[frozenset[Posting]] = contextvars.ContextVar(
    "fusewire_published", default=frozenset()
)


class Posting(NamedTuple):
    """One compiled graph, as one group's fingerprint (see `GroupFingerprint`)."""

    program: str
    rewritten: str
    label: str

    @property
    def key(self) -> tuple[str, str]:
        """Return the fields that are compared between ranks."""
        return self.program, self.rewritten


class GraphAgreement:
    """The graphs that this rank has published to one process group, and the decisions on them."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = weakref.ref(group)
        self.store = GroupStore(group)
        self.ranks = dist.get_process_group_ranks(group)
        self.rank = dist.get_rank()
        self.postings: list[Posting] = []
        self.decided: dict[tuple[str, str], str] = {}
        # A new group may reuse a name, and stores keep what the old group wrote.
        self._nonce = uuid.uuid4().hex
        self.store.set(f"graphs/{self.rank}", self._nonce)

    def publish(self, posting: Posting) -> None:
        """Publish a graph that this rank compiled. Does not wait."""
        self.postings.append(posting)
        self.store.set(f"graphs/{self.rank}/{self._nonce}", json.dumps(self.postings))

    def read(self, rank: int) -> list[Posting]:
        """Return what a rank (given by its global number) has published so far."""
        if rank == self.rank:
            return self.postings
        nonce = self.store.get(f"graphs/{rank}")
        text = None if nonce is None else self.store.get(f"graphs/{rank}/{nonce}")
        return [] if text is None else [Posting(*item) for item in json.loads(text)]

    def await_decision(self, posting: Posting) -> str:
        """Wait for the decision on a published graph, which is the same on every rank.

        Returns:
            FUSED, or the reason why this group's collectives stay as written.

        Raises:
            PeerTimeoutError: a rank publishes nothing that decides within the time limit.
            RankMismatchError: a peer already waits for this rank before another graph.
        """
        if posting.key not in self.decided:
            self.decided[posting.key] = self._wait(posting)
        return self.decided[posting.key]

    def _wait(self, posting: Posting) -> str:
        group = self.group()
        assert group is not None
        most_s, first = group_timeout_s(group), self.ranks[0]
        name = hashlib.sha256("".join(posting.key).encode()).hexdigest()[:16]
        missing: list[int] = []
        elsewhere: list[int] = []

        def read_or_write_decision() -> str | None:
            nonlocal missing, elsewhere
            # Kept under the first rank's nonce, which every rank reads anyway.
            nonce = self._nonce if self.rank == first else self.store.get(f"graphs/{first}")
            decision = None if nonce is None else self.store.get(f"decisions/{name}/{nonce}")
            if decision is None:
                postings = {rank: self.read(rank) for rank in self.ranks}
                found, missing = compare(postings, self.rank, posting.key)
                loaded, elsewhere = self._waiting(group, postings, posting) if missing else ([], [])
                missing = [rank for rank in missing if rank not in loaded]
                found = found or (None if missing else FUSED)
                if found is not None and nonce is not None:
                    decision = self.store.set_once(f"decisions/{name}/{nonce}", found)
                elif found == FUSED:
                    decision = found  # the first rank has loaded the graph and publishes nothing
            if decision is None and set(elsewhere) & set(missing):
                self._refuse(group, posting, elsewhere)
            return decision

        def describe_missing() -> str:
            return f"rank(s) {', '.join(map(str, missing))} of group {group.group_name!r} to compile {posting.label}"

        decision = poll_ranks(lambda: missing, read_or_write_decision, most_s, waiting_for=describe_missing)
        if decision is None:
            raise PeerTimeoutError(
                f"waited in vain for {describe_missing()} {how_long(missing, most_s)}. They run the "
                "program without compiling it, or compile something else there, or have stopped, or "
                f"take longer: {TIMEOUT_VARIABLE} sets how long to wait, and the group's own timeout "
                "bounds it. Set FUSEWIRE_DISABLE=1 on every rank, or, where one rank compiles for the "
                "others, compile with PassConfig(compile_alone=True)"
            )
        return decision

    def _waiting(
        self, group: dist.ProcessGroup, postings: Mapping[int, Sequence[Posting]], posting: Posting
    ) -> tuple[list[int], list[int]]:
        """Return the waiting ranks that loaded their graphs, and those that wait elsewhere.

        A rank that loaded its graphs ready-made publishes nothing. It waits before this graph.
        Where a program compiles all its graphs before it runs one, it may also wait before another
        that this rank has published.
        """
        waiting = rendezvous.waiting_peers(group, [item.rewritten for item in self.postings])
        loaded = [
            rank
            for rank, before in waiting.items()
            if before == posting.rewritten
            or (before is not None and all(before != item.rewritten for item in postings[rank]))
        ]
        return loaded, [rank for rank in waiting if rank not in loaded]

    def _refuse(self, group: dist.ProcessGroup, posting: Posting, waiting: Sequence[int]) -> None:
        """Raise on this rank and on the peers that already wait for it before another graph."""
        reason = (
            f"rank {self.rank} compiles a graph ({posting.label}) that rank {waiting[0]} of group "
            f"{group.group_name!r} does not: that rank already waits before another graph. Make "
            "every rank run the same program on equal shapes, or set FUSEWIRE_DISABLE=1 on all of "
            "them"
        )
        rendezvous.fail(group, reason)
        raise RankMismatchError(reason)


def compare(postings: Mapping[int, Sequence[Posting]], own: int, key: tuple[str, str]) -> tuple[str | None, list[int]]:
    """Compare what the ranks have published, up to the graph with that key.

    Returns:
        The decision, or None while it is open; and the ranks that have not published that graph.
    """
    mine = _up_to(postings[own], key)
    missing = [rank for rank, theirs in postings.items() if key not in {item.key for item in theirs}]
    for rank, all_of_theirs in postings.items():
        theirs = _up_to(all_of_theirs, key)
        other = _unmatched(theirs, mine, key) or (rank not in missing and _unmatched(mine, theirs, key)) or None
        if other is not None:
            ours, others = f"compiled {mine[-1].label}", f"compiled {other.label}"
            if other in mine:
                ours, others = f"compiled {other.label}", f"compiled nothing like it before {theirs[-1].label}"
            elif other.program.startswith(_NONE):
                others = other.label
            return (
                "the ranks' graphs differ, and ranks must run the same collectives: "
                f"rank {own} {ours}; rank {rank} {others}"
            ), missing
    return (FUSED if not missing else None), missing


def _up_to(postings: Sequence[Posting], key: tuple[str, str]) -> list[Posting]:
    """Return the postings up to the one with that key, included; all if there is none."""
    keys = [item.key for item in postings]
    return list(postings[: keys.index(key) + 1] if key in keys else postings)


def _unmatched(some: Sequence[Posting], others: Sequence[Posting], key: tuple[str, str]) -> Posting | None:
    """Return a graph among `some` without a counterpart among `others`, or None.

    Every compilation of the program `key[0]` counts: a rank that compiles it again otherwise
    differs. Other programs only need to be compiled by both ranks; they have been decided before.
    """
    program = key[0]
    count = Counter(item.key for item in others)
    known = {item.program for item in others}
    for item in some:
        if item.program != program and item.program not in known:
            return item
        if item.program == program:
            count[item.key] -= 1
            if count[item.key] < 0:
                return item
    return None


_groups: dict[str, GraphAgreement] = {}
_lock = threading.Lock()


def _group_of(name: str) -> GraphAgreement:
    group = resolve_group(name)
    with _lock:
        found = _groups.get(group.group_name)
        if found is None or found.group() is not group:
            for gone in [other for other, known in _groups.items() if known.group() is None]:
                del _groups[gone]
            found = _groups[group.group_name] = GraphAgreement(group)
        return found


def agree(fingerprints: Sequence[GroupFingerprint], *, wait: bool = True) -> dict[str, str]:
    """Publish one compiled graph to each of its groups, and await the decisions.

    Waits only for groups whose collectives were rewritten.

    Args:
        fingerprints: of one graph, one for each group.
        wait: False only publishes.

    Returns:
        The groups whose collectives stay as written, with the reason; equal on a group's ranks.

    Raises:
        PeerTimeoutError, RankMismatchError: see `GraphAgreement.await_decision`.
    """
    published, rewritten, unfused = PUBLISHED.get(), [], dict[str, str]()
    for item in fingerprints:
        posting = Posting(item.program, item.rewritten, item.label)
        try:
            group = _group_of(item.group)
        except ProcessGroupError as error:
            if item.rewritten != AS_WRITTEN:
                unfused[item.group] = str(error)
            continue
        if posting not in published and posting.key not in group.decided:
            group.publish(posting)
        if item.rewritten != AS_WRITTEN:
            rewritten.append((item.group, group, posting))
    for name, group, posting in rewritten if wait else ():
        decision = group.await_decision(posting)
        if decision != FUSED:
            unfused[name] = decision
    return unfused


def announce_unfused(reason: str) -> None:
    """Publish in every group that this rank will not compile what its peers do, so none waits."""
    for group in process_groups():
        if has_peers(group.group_name):
            known, posting = _group_of(group.group_name), Posting(_NONE + reason, AS_WRITTEN, reason)
            if posting not in known.postings:
                known.publish(posting)
