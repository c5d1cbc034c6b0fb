"""The ranks of a group compare the graphs that they compile, and leave the group's collectives as written if these differ.

Each rank compiles for itself and sees its own graph only. Where the ranks' graphs differ (one reads a value that the
others do not), one may fuse or merge collectives that another keeps. Every rank therefore posts in the group's store what
it compiled. A rank that rewrote a group's collectives waits until every peer has posted the same rewriting of the same
program, or something else; then one of them writes the decision, once, and all obey it: also those who come later.

Nothing here makes fusing safe: `fusewire::rendezvous` does, before the graph runs. The agreement only finds the ranks
that differ early enough to go on unfused instead of raising. So it pairs compilations by what they are, and once the
ranks' histories differ it stops rewriting. No time limit decides anything: past it, the rank raises.
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

from fusewire.custom_ops.coordination import rendezvous
from fusewire.custom_ops.coordination.rendezvous import AS_WRITTEN
from fusewire.custom_ops.coordination.store import GroupStore, poll
from fusewire.custom_ops.coordination.timeouts import TIMEOUT_VARIABLE, group_timeout_s
from fusewire.custom_ops.ops.all_reduce_norm import resolve_group
from fusewire.errors import PeerTimeoutError, ProcessGroupError, RankMismatchError
from fusewire.fusion_passes.spmd.fingerprint import GroupFingerprint, has_peers

FUSED = "fused"
# What the `program` of a posting begins with that is no graph: a rank that does not compile what the others do.
_NONE = "none: "

# What this compilation has posted already, from the report kept beside the compile cache.
POSTED: contextvars.ContextVar[frozenset[Posting]] = contextvars.ContextVar("fusewire_posted", default=frozenset())


class Posting(NamedTuple):
    """One graph that a rank compiled, over one group (see `GroupFingerprint`)."""

    program: str
    rewritten: str
    label: str

    @property
    def key(self) -> tuple[str, str]:
        """What two ranks' postings are compared by."""
        return self.program, self.rewritten


class _Group:
    """What this rank has posted about one process group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = weakref.ref(group)
        self.store = GroupStore(group)
        self.ranks = dist.get_process_group_ranks(group)
        self.rank = dist.get_rank()
        self.postings: list[Posting] = []
        self.decided: dict[tuple[str, str], str] = {}
        # Groups come back with the same name, and stores keep what the one before left.
        self._nonce = uuid.uuid4().hex
        self.store.set(f"graphs/{self.rank}", self._nonce)

    def post(self, posting: Posting) -> None:
        """Tell the others of a graph that this rank compiled."""
        self.postings.append(posting)
        self.store.set(f"graphs/{self.rank}/{self._nonce}", json.dumps(self.postings))

    def read(self, rank: int) -> list[Posting]:
        """What a rank has posted so far."""
        if rank == self.rank:
            return self.postings
        nonce = self.store.get(f"graphs/{rank}")
        text = None if nonce is None else self.store.get(f"graphs/{rank}/{nonce}")
        return [] if text is None else [Posting(*item) for item in json.loads(text)]

    def decide(self, posting: Posting) -> str:
        """FUSED, or why this group's collectives stay as written: the same on every rank.

        Raises:
            PeerTimeoutError: a rank posted nothing that tells, in time.
            RankMismatchError: a peer already waits for this rank before a graph of its own.
        """
        if posting.key not in self.decided:
            self.decided[posting.key] = self._decide(posting)
        return self.decided[posting.key]

    def _decide(self, posting: Posting) -> str:
        group = self.group()
        assert group is not None
        limit_s, first = group_timeout_s(group), self.ranks[0]
        name = hashlib.sha256("".join(posting.key).encode()).hexdigest()[:16]
        missing: list[int] = []
        elsewhere: list[int] = []

        def look() -> str | None:
            nonlocal missing, elsewhere
            # Under the first rank's nonce, which this rank has to hear of in any case.
            nonce = self._nonce if self.rank == first else self.store.get(f"graphs/{first}")
            decision = None if nonce is None else self.store.get(f"decisions/{name}/{nonce}")
            if decision is None:
                postings = {rank: self.read(rank) for rank in self.ranks}
                found, missing = compare(postings, self.rank, posting.key)
                running, elsewhere = rendezvous.waiting_peers(group, posting.rewritten) if missing else ([], [])
                # A rank may have loaded the graph, compiled elsewhere, and wait to run it.
                missing = [rank for rank in missing if rank not in running]
                found = found or (None if missing else FUSED)
                if found is not None and nonce is not None:
                    decision = self.store.set_once(f"decisions/{name}/{nonce}", found)
                elif found == FUSED:
                    decision = found  # the first rank has loaded the graph and posts nothing
            if decision is None and set(elsewhere) & set(missing):
                self._refuse(group, posting, elsewhere)
            return decision

        def who() -> str:
            return f"rank(s) {', '.join(map(str, missing))} of group {group.group_name!r} to compile {posting.label}"

        decision = poll(look, limit_s, waiting_for=who)
        if decision is None:
            raise PeerTimeoutError(
                f"waited {limit_s:.0f} s for {who()}. They run the program without compiling it, or compile something else "
                f"there, or have stopped, or take longer: {TIMEOUT_VARIABLE} sets how long to wait, and the group's own "
                "timeout bounds it. Set FUSEWIRE_DISABLE=1 on every rank, or, where one rank compiles for the others, "
                "compile with PassConfig(compile_alone=True)"
            )
        return decision

    def _refuse(self, group: dist.ProcessGroup, posting: Posting, waiting: Sequence[int]) -> None:
        """Raise on this rank, and on those that already wait for it before another graph."""
        reason = (
            f"rank {self.rank} compiles a graph ({posting.label}) that rank {waiting[0]} of group {group.group_name!r} "
            "does not: that rank already waits before another graph. Make every rank run the same program on equal shapes, "
            "or set FUSEWIRE_DISABLE=1 on all of them"
        )
        rendezvous.fail(group, reason)
        raise RankMismatchError(reason)


def compare(postings: Mapping[int, Sequence[Posting]], own: int, key: tuple[str, str]) -> tuple[str | None, list[int]]:
    """Compare what the ranks have posted up to the graph of that key.

    Returns:
        The decision, or None while it is open; and the ranks that have not posted that graph.
    """
    mine = _up_to(postings[own], key)
    missing = [rank for rank, theirs in postings.items() if key not in {item.key for item in theirs}]
    for rank, all_of_theirs in postings.items():
        theirs = _up_to(all_of_theirs, key)
        other = _more(theirs, mine, key) or (rank not in missing and _more(mine, theirs, key)) or None
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
    keys = [item.key for item in postings]
    return list(postings[: keys.index(key) + 1] if key in keys else postings)


def _more(some: Sequence[Posting], others: Sequence[Posting], key: tuple[str, str]) -> Posting | None:
    """A graph among `some` that has no counterpart among the others.

    Of the program in question each compilation counts: a rank that compiles it once more, otherwise than this one, goes
    another way. Of other programs it only matters that both have compiled them: how, they decided then.
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


_groups: dict[str, _Group] = {}
_lock = threading.Lock()


def _group_of(name: str) -> _Group:
    group = resolve_group(name)
    with _lock:
        found = _groups.get(group.group_name)
        if found is None or found.group() is not group:
            for gone in [other for other, known in _groups.items() if known.group() is None]:
                del _groups[gone]
            found = _groups[group.group_name] = _Group(group)
        return found


def settle(prints: Sequence[GroupFingerprint], *, wait: bool = True) -> dict[str, str]:
    """Tell the peers what this rank compiled, and hear whether all may run it.

    Waits only for groups whose collectives were rewritten.

    Args:
        prints: of one graph, for each group.
        wait: False only tells.

    Returns:
        The groups whose collectives are to be left as written, with the reason. The same for every rank of a group.

    Raises:
        PeerTimeoutError, RankMismatchError: see `_Group.decide`.
    """
    posted, rewritten, unfused = POSTED.get(), [], dict[str, str]()
    for item in prints:
        posting = Posting(item.program, item.rewritten, item.label)
        try:
            group = _group_of(item.group)
        except ProcessGroupError as error:
            if item.rewritten != AS_WRITTEN:
                unfused[item.group] = str(error)
            continue
        if posting not in posted and posting.key not in group.decided:
            group.post(posting)
        if item.rewritten != AS_WRITTEN:
            rewritten.append((item.group, group, posting))
    for name, group, posting in rewritten if wait else ():
        decision = group.decide(posting)
        if decision != FUSED:
            unfused[name] = decision
    return unfused


def announce_unfused(reason: str) -> None:
    """Tell the peers in all groups of this process that this rank will not compile what they do, so that none waits."""
    if not dist.is_available() or not dist.is_initialized():
        return
    for group in list(dist.distributed_c10d._world.pg_map):
        if has_peers(group.group_name):
            known, posting = _group_of(group.group_name), Posting(_NONE + reason, AS_WRITTEN, reason)
            if posting not in known.postings:
                known.post(posting)
