"""Compare the graphs that the ranks of a group are about to run, before they run.

The passes put a call of `fusewire::rendezvous` before the first collective of every graph. It has
the graph's fingerprint, so the fingerprint is part of cached, copied and shipped graphs too. While
a rank runs graphs of one fingerprint, a call is one comparison. Before the first collective of a
graph with another fingerprint the ranks meet: each publishes its fingerprint and waits for the
others'. If they differ, or a rank does not come, every rank that waits raises.

Graphs whose collectives are the program's own, as written, all have the empty fingerprint: they are
compatible however they were compiled, and also with uncompiled code. So a process that rewrites
nothing never waits.

If a graph's collectives carry other data than the program's (a moved scale, a merged sum), they
could mix unnoticed with those of a rank that runs the program as written. Before such a graph the
ranks meet at every call ("strict"). Replays of CUDA graphs do not meet: their collectives were
compared at capture.

Ranks of one host meet in a page of shared memory; others in the group's store.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import tempfile
import threading
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from fusewire.custom_ops._torch_private import process_group
from fusewire.custom_ops.coordination.busy import poll_ranks
from fusewire.custom_ops.coordination.processes import host, how_long
from fusewire.custom_ops.coordination.store import GroupStore, poll
from fusewire.custom_ops.coordination.timeouts import TIMEOUT_VARIABLE, Limit, group_timeout_s, limit_s
from fusewire.custom_ops.coordination.vote import Channel, VoteResult, vote
from fusewire.custom_ops.ops.all_reduce_norm import resolve_group
from fusewire.errors import PeerTimeoutError, RankMismatchError

AS_WRITTEN = ""  # the fingerprint of graphs whose collectives are the program's own
_NEVER = "-"  # equal to no fingerprint
_LINE_WORDS = 8  # a cache line for each rank
_SPIN_S = 0.001
_SHARED_MEMORY = "/dev/shm"


class _Board:
    """A page that the ranks of one host share, with a 64-bit word per rank, which it alone writes.

    A word holds the number of the rank's last meeting (16 bits) and its fingerprint's digest (48
    bits; 0: the rank has given up). Ranks are at most one meeting apart, so the number may wrap.
    """

    def __init__(self, path: str, rank: int, size: int) -> None:
        with open(path, "r+b") as file:
            self._words = memoryview(mmap.mmap(file.fileno(), 8 * _LINE_WORDS * size)).cast("Q")
        self._rank, self._others = rank, [peer for peer in range(size) if peer != rank]

    @staticmethod
    def make(size: int) -> str:
        """Create the file, filled with zeros; return its path."""
        folder = _SHARED_MEMORY if os.path.isdir(_SHARED_MEMORY) else None
        handle, path = tempfile.mkstemp(prefix="fusewire-", dir=folder)
        os.write(handle, bytes(8 * _LINE_WORDS * size))
        os.close(handle)
        return path

    def publish(self, number: int, digest: int) -> None:
        self._words[self._rank * _LINE_WORDS] = (number & 0xFFFF) << 48 | digest

    def look(self, number: int, digest: int) -> tuple[list[int], list[int]]:
        """Return the absent ranks, and the ranks with another digest or that have given up."""
        absent, differing = [], []
        for peer in self._others:
            word = self._words[peer * _LINE_WORDS]
            ahead = ((word >> 48) - number + 0x8000 & 0xFFFF) - 0x8000
            theirs = word & 0xFFFFFFFFFFFF
            if theirs == 0 and word:
                differing.append(peer)
            elif ahead < 0:
                absent.append(peer)
            elif ahead == 0 and theirs != digest:
                differing.append(peer)
        return absent, differing

    def ahead(self, number: int) -> dict[int, int]:
        """Return the ranks that wait at a later meeting, with their digests."""
        words = ((peer, self._words[peer * _LINE_WORDS]) for peer in self._others)
        return {peer: word & 0xFFFFFFFFFFFF for peer, word in words if 0 < ((word >> 48) - number & 0xFFFF) < 0x8000}


class _Meetings:
    """The meetings of one process group, on this rank."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = weakref.ref(group)
        self.last = AS_WRITTEN  # the fingerprint of this rank's last graph
        self.failure = ""  # why no graph may run any more
        self.lock = threading.Lock()
        self.ranks = dist.get_process_group_ranks(group)
        self._rank = group.rank()
        self._number = 0
        self._board: _Board | None = None
        self._name = ""  # the page's name in the store, the same on every rank

    def meet(self, group: dist.ProcessGroup, fingerprint: str, label: str) -> None:
        """Compare a fingerprint with the peers'. A collective that waits for every rank.

        Raises:
            RankMismatchError: a peer is about to run another graph, or an earlier meeting failed.
            PeerTimeoutError: a peer did not come.
        """
        if self.failure:
            raise RankMismatchError(f"{self.failure} (an earlier call failed; this one did not run)")
        try:
            if self._number == 0:
                self._first(group, fingerprint, label)
            elif self._board is not None:
                self._at_board(group, fingerprint, label)
            else:
                self._in_store(group, fingerprint, label)
        except BaseException as error:
            self.fail(group, str(error) or type(error).__name__)
            raise
        self._number += 1
        self.last = fingerprint

    def fail(self, group: dist.ProcessGroup, reason: str) -> None:
        """Stop this group's graphs, here and on ranks that wait for this one."""
        self.failure, self.last = reason, _NEVER
        if self._board is not None:
            self._explain(group, f"gave up: {reason}")
            self._board.publish(self._number + 1, 0)

    def waiting(self, group: dist.ProcessGroup) -> dict[int, int]:
        """Return the global ranks that wait for this one, with their fingerprints' digests."""
        if self._board is not None:
            return {self.ranks[peer]: digest for peer, digest in self._board.ahead(self._number).items()}
        store = GroupStore(group)
        found = {rank: store.get(f"waiting/{rank}") for rank in self.ranks if rank != self.ranks[self._rank]}
        return {rank: _digest(fingerprint) for rank, fingerprint in found.items() if fingerprint is not None}

    @property
    def at_board(self) -> bool:
        """Whether the ranks meet in shared memory already."""
        return self._board is not None

    def answer(self, group: dist.ProcessGroup, label: str) -> None:
        """Answer a meeting in the store, so that the ranks that wait there raise."""
        self._in_store(group, _NEVER, label)

    def _first(self, group: dist.ProcessGroup, fingerprint: str, label: str) -> None:
        """Meet in the store; share a page for later meetings if all ranks are on one host."""
        path = _Board.make(group.size()) if self._rank == 0 else ""
        try:
            found = self._in_store(group, fingerprint, label, {"host": host(), "path": path})
            if len({fact["host"] for fact in found.facts}) > 1:
                return
            board: list[_Board] = []

            def share() -> dict[str, Any]:
                board.append(_Board(found.facts[0]["path"], self._rank, group.size()))
                board[0].publish(1, _digest(fingerprint))
                return {}

            if vote(Channel(group, _CHANNEL, group_timeout_s(group)), "page", share).ok:
                self._board, self._name = board[0], os.path.basename(found.facts[0]["path"])
        finally:
            if path:
                os.unlink(path)

    def _in_store(
        self, group: dist.ProcessGroup, fingerprint: str, label: str, facts: Mapping[str, Any] | None = None
    ) -> VoteResult:
        given = {"fingerprint": fingerprint, "label": label, **(facts or {})}
        store, waiting = GroupStore(group), f"waiting/{self.ranks[self._rank]}"
        store.set(waiting, fingerprint)
        try:
            found = vote(Channel(group, _CHANNEL, group_timeout_s(group)), "fingerprints", lambda: given)
        finally:
            store.delete(waiting)
        if len({fact["fingerprint"] for fact in found.facts}) > 1:
            labels = zip(self.ranks, (fact["label"] for fact in found.facts), strict=True)
            raise RankMismatchError(_difference(group, dict(labels)))
        return found

    def _at_board(self, group: dist.ProcessGroup, fingerprint: str, label: str) -> None:
        board, number, digest = self._board, self._number + 1, _digest(fingerprint)
        assert board is not None
        board.publish(number, digest)
        absent: list[int] = []

        def look() -> list[int] | None:
            nonlocal absent
            absent, differing = board.look(number, digest)
            return differing if differing or not absent else None

        def awaited() -> list[int]:
            return [self.ranks[peer] for peer in absent]

        def who() -> str:
            return f"{_listed(awaited())} of group {group.group_name!r} before {label}"

        most_s = group_timeout_s(group)
        differing = poll_ranks(awaited, look, most_s, waiting_for=who, spin_s=_SPIN_S)
        if differing is None:
            raise PeerTimeoutError(
                f"{who()}: did not come {how_long(awaited(), most_s)}. Either it runs something "
                "else there (the program without compiling it, another graph, a graph that breaks "
                f"elsewhere), or it has stopped, or it takes longer: {TIMEOUT_VARIABLE} sets how "
                "long to wait, and the group's own timeout bounds it. Make every rank run the "
                "same program, or set FUSEWIRE_DISABLE=1 on all of them"
            )
        if differing:
            raise RankMismatchError(_difference(group, self._explanations(group, label)))

    def _explanations(self, group: dist.ProcessGroup, label: str) -> dict[int, str]:
        """Return the texts that other ranks have published in time, for the error message."""
        assert self._board is not None
        self._explain(group, label)
        self._board.publish(self._number + 1, 0)
        store, found = GroupStore(group), dict[int, str]()

        def look() -> bool | None:
            for peer, rank in enumerate(self.ranks):
                text = store.get(f"running/{self._name}/{peer}")
                if text is not None:
                    found[rank] = text
            return len(found) == len(self.ranks) or None

        poll(look, limit_s(Limit.EXPLANATION))
        return found

    def _explain(self, group: dist.ProcessGroup, text: str) -> None:
        """Publish for the others' messages which graph this rank runs, or why it runs none."""
        GroupStore(group).set_once(f"running/{self._name}/{self._rank}", text)


_CHANNEL = "rendezvous"
_meetings: dict[str, _Meetings] = {}
_lock = threading.Lock()


def rendezvous(x: torch.Tensor, group_name: str, fingerprint: str, label: str, strict: bool) -> None:
    """Compare the fingerprint of the graph that is about to run with the group's other ranks'.

    Args:
        x: the input of the graph's first collective. It is declared as mutated so that the compiler
            keeps the call before that collective; it is not changed.
        fingerprint: of the graph's collectives over the group; "" if they are the program's own.
        label: a description of the graph for people.
        strict: meet at every call, not only when the fingerprint changes.

    Raises:
        RankMismatchError, PeerTimeoutError: see `_Meetings.meet`.
        ProcessGroupError: there is no such group in this process.
    """
    known = _meetings.get(group_name)
    if known is not None and known.last == fingerprint and not strict and known.group() is process_group(group_name):
        return
    group = resolve_group(group_name)
    meetings = _meetings_of(group_name, group)
    with meetings.lock:
        if strict or meetings.last != fingerprint:
            meetings.meet(group, fingerprint, label)


def _meetings_of(name: str, group: dist.ProcessGroup) -> _Meetings:
    """Return a group's meetings under any of its names; a new group gets new meetings."""
    with _lock:
        found = _meetings.get(name)
        if found is None or found.group() is not group:
            for gone in [other for other, held in _meetings.items() if held.group() is None]:
                del _meetings[gone]
            same = (other for other in _meetings.values() if other.group() is group)
            found = _meetings[name] = next(same, None) or _Meetings(group)
        return found


def waiting_peers(group: dist.ProcessGroup, fingerprints: Iterable[str]) -> dict[int, str | None]:
    """Return the global ranks that wait for this rank before a graph.

    Each comes with the graph's fingerprint if it is among these, else with None.
    """
    known = {_digest(fingerprint): fingerprint for fingerprint in fingerprints}
    return {rank: known.get(digest) for rank, digest in _meetings_of(group.group_name, group).waiting(group).items()}


def fail(group: dist.ProcessGroup, reason: str) -> None:
    """Stop all rewritten graphs over a group; ranks that wait for this one raise.

    Waits for other ranks only if some wait at the group's first meeting and not all have come.
    """
    meetings = _meetings_of(group.group_name, group)
    meetings.fail(group, reason)
    if meetings.waiting(group) and not meetings.at_board:
        with contextlib.suppress(RankMismatchError, PeerTimeoutError):
            meetings.answer(group, f"gave up: {reason}")


def _digest(fingerprint: str) -> int:
    return int(hashlib.sha256(fingerprint.encode()).hexdigest()[:12], 16) or 1


def _listed(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _difference(group: dist.ProcessGroup, labels: Mapping[int, str]) -> str:
    listed = "; ".join(f"rank {rank}: {label}" for rank, label in sorted(labels.items()))
    return (
        f"the ranks of group {group.group_name!r} are about to run graphs whose collectives do not "
        f"fit together, and nothing was sent. {listed}. Make every rank run the same program with "
        "the same options on equal shapes, or set FUSEWIRE_DISABLE=1 on all of them"
    )


_LIBRARY = torch.library.Library("fusewire", "FRAGMENT")
_LIBRARY.define("rendezvous(Tensor(a!) x, str group_name, str fingerprint, str label, bool strict) -> ()")
_LIBRARY.impl("rendezvous", rendezvous, "CompositeExplicitAutograd")
torch.library.register_fake("fusewire::rendezvous", lambda *_: None, lib=_LIBRARY)
RENDEZVOUS = torch.ops.fusewire.rendezvous.default
