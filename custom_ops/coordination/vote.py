"""Votes: a question that every rank of a group answers, with one outcome for all of them.

A vote is an exchange over the group's store of one text from each rank:

1. Every rank but the group's first posts its ballot, with a random nonce, under its own key.
2. The first rank waits for all ballots, marks each as taken, and then replaces the marks by the
   outcome, which has all ballots.
3. Every other rank reads the outcome from its key and removes the key.

The first rank replaces only values that it has read, so an outcome never reaches another attempt. A
rank that gives up removes its ballot unless it is taken; then the outcome follows. So all ranks get
the outcome or each gets an error, unless the first rank dies between its writes.
"""

from __future__ import annotations

import contextlib
import json
import threading
import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fusewire.custom_ops.coordination.busy import busy, poll_ranks
from fusewire.custom_ops.coordination.processes import how_long
from fusewire.custom_ops.coordination.store import GroupStore, poll
from fusewire.custom_ops.coordination.timeouts import TIMEOUT_VARIABLE, Limit, limit_s, outcome_timeout_s
from fusewire.errors import PeerTimeoutError, WorkspaceError

T = TypeVar("T")
# The prefixes of values under a rank's key.
_BALLOT, _TAKEN, _OUTCOME, _WITHDRAWN = "ballot ", "taken ", "outcome ", "withdrawn"
_NO_SESSION = "first"
_BYTES = "bytes in hex"
_locks: weakref.WeakValueDictionary[str, threading.Lock] = weakref.WeakValueDictionary()
_locks_guard = threading.Lock()


class Channel:
    """Communication of a group's ranks over the group's store, on the CPU, with bounded waits.

    Also implements FlashInfer's `CommBackend` (Get_rank, Get_size, allgather, bcast, barrier).

    The keys of later exchanges contain the first one's nonce, so an abandoned thread of an earlier
    attempt, with its own channel, reaches no other. After an error make a new channel. Not
    thread-safe; but threads may use separate channels with the same label, because exchanges of one
    topic wait for each other.

    Args:
        label: a name for the channel's purpose, the same on every rank.
        wait_s: the limit of a wait for a rank in seconds; by default `Limit.VOTE`.
    """

    def __init__(self, group: dist.ProcessGroup, label: str, wait_s: float | None = None) -> None:
        self.rank = group.rank()
        self.size = group.size()
        self.global_ranks = dist.get_process_group_ranks(group)
        self.wait_s = limit_s(Limit.VOTE) if wait_s is None else wait_s
        self.label = label
        self._store = GroupStore(group)
        self._group_name = group.group_name
        self._session = _NO_SESSION
        self._abort_reason = ""
        self._abort_key = ""  # as long as it is in the store

    def abort(self, reason: str) -> None:
        """Make `allgather` raise WorkspaceError: here for good, on other ranks until `clear`.

        The first reason counts. Call it after the channel's first exchange, so that other attempts
        are not affected.
        """
        self._abort_reason = reason
        self._abort_key = f"{self.label}/{self._session}/abort"
        self._store.set_once(self._abort_key, reason)

    def clear(self) -> None:
        """Remove the key that `abort` wrote."""
        if self._abort_key:
            self._store.delete(self._abort_key)
            self._abort_key = ""

    def allgather(self, data: Any) -> tuple[Any, ...]:
        """Return the objects of all ranks. A collective. Tuples arrive as lists.

        Raises:
            PeerTimeoutError: on every rank, if a rank did not come within wait_s.
            WorkspaceError: a rank has called `abort`.
            TypeError: the object has types other than JSON's and bytes.
        """
        return tuple(self._exchange("allgather", data, abortable=True))

    def bcast(self, data: Any, root: int) -> Any:
        """Return the object of the group's rank `root`. Otherwise as `allgather`."""
        return self.allgather(data if self.rank == root else None)[root]

    def barrier(self) -> None:
        """Wait for every rank. Otherwise as `allgather`."""
        self.allgather(None)

    def Get_rank(self) -> int:
        return self.rank

    def Get_size(self) -> int:
        return self.size

    def _exchange(self, topic: str, payload: Any, abortable: bool = False) -> list[Any]:
        """Return the payloads of all ranks; if abortable, without restarts of the time limit."""
        ballot = _BALLOT + _encode({"nonce": uuid.uuid4().hex, "payload": payload})
        key = f"{self.label}/{self._session}/{topic}"
        with _turn(f"{self._group_name} {key}/{self.rank}"):
            outcome = (self._follow if self.rank else self._lead)(key, topic, ballot, abortable)
        ballots = json.loads(outcome, object_hook=_with_bytes)
        missing = [rank for rank, found in zip(self.global_ranks, ballots, strict=True) if found is None]
        if missing:
            raise PeerTimeoutError(
                f"{self.label}: no vote on {topic!r} from rank(s) {_listed(missing)} "
                f"{how_long(missing, self.wait_s)}; every rank of the group must make the same "
                f"calls in the same order ({TIMEOUT_VARIABLE} sets how long to wait)"
            )
        if self._session == _NO_SESSION:
            self._session = ballots[0]["nonce"]
        return [found["payload"] for found in ballots]

    def _lead(self, key: str, topic: str, ballot: str, abortable: bool) -> str:
        """Collect the ballots as the first rank and publish them; null for absent ranks."""
        texts, absent = {0: ballot}, list[int]()

        def look() -> bool | None:
            texts.update((rank, self._store.get(f"{key}/{rank}") or "") for rank in range(1, self.size))
            absent[:] = [rank for rank, text in texts.items() if not text.startswith(_BALLOT)]
            return not absent or None

        def awaited() -> list[int]:
            return [self.global_ranks[rank] for rank in absent]

        def who() -> str:
            return f"rank(s) {_listed(awaited())} to vote on {topic!r} ({self.label})"

        self._wait(look, self.wait_s, abortable, awaited, who)
        ballots = [None if r in absent else json.loads(text.removeprefix(_BALLOT)) for r, text in texts.items()]
        for rank in range(1, self.size):
            found = ballots[rank]
            if found and not self._store.replace(f"{key}/{rank}", texts[rank], _TAKEN + found["nonce"]):
                ballots[rank] = None  # it has just given up
        outcome = json.dumps(ballots)
        for rank, found in enumerate(ballots):
            if found and rank:
                self._store.replace(f"{key}/{rank}", _TAKEN + found["nonce"], _OUTCOME + outcome)
        return outcome

    def _follow(self, key: str, topic: str, ballot: str, abortable: bool) -> str:
        """Post a ballot as another rank and wait for the outcome."""
        own, most_s = f"{key}/{self.rank}", outcome_timeout_s(self.wait_s)

        def look() -> str | None:
            text = self._store.get(own) or ""
            return text.removeprefix(_OUTCOME) if text.startswith(_OUTCOME) else None

        self._store.set(own, ballot)
        try:
            outcome = self._wait(look, most_s, abortable, lambda: self.global_ranks[:1])
            if outcome is None and not self._store.replace(own, ballot, _WITHDRAWN):
                outcome = poll(look, limit_s(Limit.PUBLICATION))  # the ballot has been taken
        finally:
            self._store.delete(own)
        if outcome is None:
            raise PeerTimeoutError(
                f"{self.label}: rank {self.global_ranks[0]} did not publish the outcome of "
                f"{topic!r} {how_long(self.global_ranks[:1], most_s)}; does it run another "
                f"program? ({TIMEOUT_VARIABLE} sets how long to wait)"
            )
        return outcome

    def _wait(
        self,
        look: Callable[[], T | None],
        most_s: float,
        abortable: bool,
        needed: Callable[[], Sequence[int]],
        who: Callable[[], str] | None = None,
    ) -> T | None:
        """Poll `look`; if abortable an abort ends it, else busy ranks restart the time limit."""

        def look_out() -> T | None:
            reason = abortable and (self._abort_reason or self._store.get(f"{self.label}/{self._session}/abort"))
            if reason:
                raise WorkspaceError(reason)
            return look()

        others = [] if abortable else [rank for rank in self.global_ranks if rank != self.global_ranks[self.rank]]
        return poll_ranks(lambda: others, look_out, most_s, needed=needed, waiting_for=who)


@dataclass(frozen=True)
class VoteResult:
    """The outcome of a vote, the same on every rank."""

    reasons: tuple[str, ...]  # why a rank refuses, or ""
    facts: tuple[Mapping[str, Any], ...]
    ranks: tuple[int, ...]  # global

    @property
    def ok(self) -> bool:
        return not any(self.reasons)

    @property
    def reason(self) -> str:
        """The ranks that refuse and why; ranks with the same reason are listed together."""
        by_reason: dict[str, list[int]] = {}
        for rank, reason in zip(self.ranks, self.reasons, strict=True):
            if reason:
                by_reason.setdefault(reason, []).append(rank)

        def who(ranks: list[int]) -> str:
            every = len(ranks) == len(self.ranks) > 1
            return "on every rank" if every else f"on rank{'s' * (len(ranks) > 1)} {_listed(ranks)}"

        return "; ".join(f"{who(ranks)}: {reason}" for reason, ranks in by_reason.items())


def vote(
    channel: Channel,
    topic: str,
    work: Callable[[], Mapping[str, Any] | None],
    *,
    work_s: float | None = None,
    release_peers: bool = False,
) -> VoteResult:
    """Run this rank's work and vote on whether it succeeded. A collective of the whole group.

    Args:
        topic: the name of the vote, the same on every rank.
        work: returns facts for the other ranks (JSON types); an exception is a "no".
        work_s: run the work in a thread and give up after this many seconds; None runs it in this
            thread without a limit.
        release_peers: if the work fails here, free the peers that wait in theirs over the channel.

    Raises:
        PeerTimeoutError: on every rank, if one did not vote in time or its work on the GPU did not
            end in time.
    """
    if release_peers and channel._session == _NO_SESSION:
        channel.barrier()
    answer: dict[str, Any] = {"reason": "", "facts": {}, "fatal": False}
    try:
        found = work() if work_s is None else in_thread(work, work_s, topic)
        answer["facts"] = json.loads(_encode(dict(found or {})))  # raises for other types: a "no"
    except Exception as error:
        answer["reason"] = describe(error)
        answer["fatal"] = isinstance(error, PeerTimeoutError) and not release_peers
        if release_peers:
            channel.abort(f"rank {channel.global_ranks[channel.rank]} gave up: {describe(error)}")
    try:
        answers = channel._exchange(topic, answer)
    finally:
        channel.clear()
    reasons, facts_of_all = (tuple(each[name] for each in answers) for name in ("reason", "facts"))
    result = VoteResult(reasons, facts_of_all, tuple(channel.global_ranks))
    if any(each["fatal"] for each in answers):
        raise PeerTimeoutError(f"{channel.label}: {result.reason}")
    return result


def in_thread(work: Callable[[], Any], most_s: float, topic: str) -> Any:
    """Call work() in a thread, as a busy rank, and give up after most_s seconds.

    A library may wait for a peer for ever. Buffers made in the thread also lie outside the pool
    that the caller's thread uses while Inductor's CUDA graphs warm up, which they will overwrite.

    Raises:
        WorkspaceError: it did not end in time. Exceptions of work() are raised too.
    """
    result: list[Any] = []
    device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def run() -> None:
        try:
            with contextlib.nullcontext() if device is None else torch.cuda.device(device):
                result.append((work(), None))
        except Exception as error:
            result.append((None, error))

    thread = threading.Thread(target=run, name=f"fusewire {topic}", daemon=True)
    thread.start()
    with busy():
        thread.join(most_s)
    if not result:
        raise WorkspaceError(f"{topic} did not end within {most_s:.0f} s")
    value, error = result[0]
    if error is not None:
        raise error
    return value


def describe(error: BaseException) -> str:
    """Return an exception as one line, with its class if that helps."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 400 else text[:400] + "..."
    return text if isinstance(error, WorkspaceError | PeerTimeoutError) and text else f"{type(error).__name__}: {text}"


def _turn(key: str) -> threading.Lock:
    with _locks_guard:
        return _locks.setdefault(key, threading.Lock())


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


def _encode(payload: Any) -> str:
    return json.dumps(payload, default=_without_bytes)


def _without_bytes(value: object) -> dict[str, str]:
    if not isinstance(value, bytes):
        raise TypeError(f"a {type(value).__name__} cannot be sent to other ranks")
    return {_BYTES: value.hex()}


def _with_bytes(value: dict[str, Any]) -> Any:
    return bytes.fromhex(value[_BYTES]) if value.keys() == {_BYTES} else value
