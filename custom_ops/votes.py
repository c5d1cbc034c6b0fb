"""How the ranks of a group talk and vote: over the store that their process group was made with, never over the GPUs, and
every wait ends."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from fusewire.errors import ConfigError, PeerTimeoutError, WorkspaceError

TIMEOUT_VARIABLE = "FUSEWIRE_TIMEOUT_S"
DEFAULT_TIMEOUT_S = 600.0
_SAY_AFTER_S = 30.0


def timeout_s() -> float:
    """How long a rank waits for its peers, in seconds: FUSEWIRE_TIMEOUT_S, 600 by default."""
    text = os.environ.get(TIMEOUT_VARIABLE, "")
    try:
        value = float(text) if text else DEFAULT_TIMEOUT_S
    except ValueError:
        value = -1.0
    if not value > 0:
        raise ConfigError(f"{TIMEOUT_VARIABLE}={text!r} is not a positive number of seconds")
    return value


def say(text: str) -> None:
    """One line on stderr, for what takes long or what a user must know though nobody asked."""
    print(f"[fusewire] {text}", file=sys.stderr, flush=True)


# --- The side channel ---------------------------------------------------------------------------------------


class Channel:
    """The ranks of a group, talking over the group's store, on the CPU, with bounded waits.

    Also fits where FlashInfer asks for a `CommBackend` (Get_rank, Get_size, allgather, bcast, barrier).
    """

    def __init__(self, group: dist.ProcessGroup, label: str, wait_s: float | None = None) -> None:
        self.rank = group.rank()
        self.size = group.size()
        self.global_ranks = dist.get_process_group_ranks(group)
        self.wait_s = timeout_s() if wait_s is None else wait_s
        self._store = dist.distributed_c10d._get_process_group_store(group)
        # The same label comes again (after a close, say), and the store keeps the keys of the time before.
        arrivals = self._store.add(f"fusewire/{label}/arrivals", 1)
        self._prefix = f"fusewire/{label}/{(arrivals - 1) // self.size}"
        self.label = label
        self._step = 0
        self._beats = 0

    def post(self, key: str, value: bytes) -> None:
        self._store.set(f"{self._prefix}/{key}", value)  # type: ignore[arg-type]

    def beat(self) -> None:
        """Tell ranks that wait for this one that it is at work, so that they go on waiting."""
        self._beats += 1
        self.post(f"beat of rank {self.global_ranks[self.rank]}", str(self._beats).encode())

    def collect(self, keys: Sequence[str], wait_s: float, abortable: bool = False) -> list[bytes | None]:
        """The values of the keys, None for each that did not come within wait_s seconds of the ranks' last
        beat.

        If `abortable`, beats do not count, and a rank that aborts makes this raise WorkspaceError with its
        words.
        """
        names = [f"{self._prefix}/{key}" for key in keys]
        abort = f"{self._prefix}/abort"
        start = last_sign = next_look = time.monotonic()
        pause, said, beats = 0.001, False, self._heard()
        while not self._store.check(names):
            if abortable and self._store.check([abort]):
                raise WorkspaceError(self._store.get(abort).decode())
            now = time.monotonic()
            if not abortable and now - next_look > min(2.0, wait_s / 4):
                next_look, heard = now, self._heard()
                last_sign, beats = (now, heard) if heard != beats else (last_sign, beats)
            if now - last_sign > wait_s:
                break
            if now - start > _SAY_AFTER_S and not said and self.rank == 0:
                said = True
                missing = [key for key, at in zip(keys, names, strict=True) if not self._store.check([at])]
                say(f"{self.label}: waiting for {', '.join(missing)}, {wait_s:.0f} s without a beat")
            time.sleep(pause)
            pause = min(pause * 1.5, 0.05)
        return [self._store.get(name) if self._store.check([name]) else None for name in names]

    def _heard(self) -> list[bytes | None]:
        names = [f"{self._prefix}/beat of rank {rank}" for rank in self.global_ranks]
        return [self._store.get(name) if self._store.check([name]) else None for name in names]

    def abort(self, reason: str) -> None:
        """Make every rank that waits, or will wait, in `allgather` raise WorkspaceError with this reason."""
        self.post("abort", reason.encode())

    def allgather(self, data: Any) -> tuple[Any, ...]:
        """Every rank's object. Raises PeerTimeoutError if one is late, WorkspaceError on an abort."""
        self._step += 1
        keys = [f"step {self._step} of rank {rank}" for rank in self.global_ranks]
        self.post(keys[self.rank], pickle.dumps(data))
        found = self.collect(keys, self.wait_s, abortable=True)
        if None in found:
            missing = ", ".join(key for key, value in zip(keys, found, strict=True) if value is None)
            raise PeerTimeoutError(f"{self.label}: {missing} did not come within {self.wait_s:.0f} s")
        return tuple(pickle.loads(value) for value in found if value is not None)

    def bcast(self, data: Any, root: int) -> Any:
        """The object of the group's rank `root`."""
        return self.allgather(data if self.rank == root else None)[root]

    def barrier(self) -> None:
        """Return once every rank has come here."""
        self.allgather(None)

    def Get_rank(self) -> int:
        return self.rank

    def Get_size(self) -> int:
        return self.size


@dataclass(frozen=True)
class Verdict:
    """What the ranks of a group found together: the same on each of them."""

    reasons: tuple[str, ...]
    facts: tuple[Mapping[str, Any], ...]
    ranks: tuple[int, ...]

    @property
    def ok(self) -> bool:
        return not any(self.reasons)

    @property
    def reason(self) -> str:
        """Who cannot and why; ranks with the same reason are named together."""
        by_reason: dict[str, list[int]] = {}
        for rank, reason in zip(self.ranks, self.reasons, strict=True):
            if reason:
                by_reason.setdefault(reason, []).append(rank)
        parts = []
        for reason, ranks in by_reason.items():
            if len(ranks) == len(self.ranks) > 1:
                parts.append(f"on every rank: {reason}")
            else:
                parts.append(f"on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}: {reason}")
        return "; ".join(parts)


def agree(
    channel: Channel,
    topic: str,
    work: Callable[[], Mapping[str, Any] | None],
    *,
    work_s: float | None = None,
    release_peers: bool = False,
) -> Verdict:
    """Do a rank's share of something and vote on it. A collective: every rank of the group calls it alike.

    Args:
        topic: names the vote; the same on every rank.
        work: this rank's share. What it returns are facts for the others (JSON types); what it raises is a
            "no".
        work_s: run the work in a thread and give it up after so many seconds (None: wait for it, in this
            thread).
        release_peers: the work talks over the channel itself: if it fails here, peers that wait in it are
            freed.

    Raises:
        PeerTimeoutError: on every rank, if one did not vote in time or its work ran out of time on the GPU.
    """
    ballot: dict[str, Any] = {"reason": "", "facts": {}, "fatal": False}
    try:
        ballot["facts"] = dict((work() if work_s is None else in_thread(work, work_s, topic, channel)) or {})
    except Exception as error:
        ballot["reason"] = describe(error)
        ballot["fatal"] = isinstance(error, PeerTimeoutError) and not release_peers
        if release_peers:
            channel.abort(f"rank {channel.global_ranks[channel.rank]} gave up: {describe(error)}")
    return _vote(channel, topic, ballot)


def _vote(channel: Channel, topic: str, ballot: Mapping[str, Any]) -> Verdict:
    """Post a ballot; the group's first rank publishes them all, so that no two ranks see different ones."""
    wait_s = channel.wait_s
    topic_key = f"vote on {topic}"
    keys = [f"{topic_key} of rank {rank}" for rank in channel.global_ranks]
    channel.post(keys[channel.rank], json.dumps(ballot).encode())
    if channel.rank == 0:
        found = channel.collect(keys, wait_s)
        parsed = [None if value is None else json.loads(value) for value in found]
        channel.post(f"outcome of the {topic_key}", json.dumps(parsed).encode())
    outcome = channel.collect([f"outcome of the {topic_key}"], wait_s * 1.25 + 10.0)[0]
    if outcome is None:
        raise PeerTimeoutError(
            f"{channel.label}: rank {channel.global_ranks[0]} did not publish the outcome of {topic!r} in "
            "time; has it "
            f"died, or does it run another program? ({TIMEOUT_VARIABLE} sets how long to wait)"
        )
    ballots = json.loads(outcome)
    missing = [str(rank) for rank, b in zip(channel.global_ranks, ballots, strict=True) if b is None]
    if missing:
        raise PeerTimeoutError(
            f"{channel.label}: no vote on {topic!r} from rank(s) {', '.join(missing)} within {wait_s:.0f} "
            "s; every rank "
            f"of the group must make the same calls in the same order ({TIMEOUT_VARIABLE} sets how long to "
            "wait)"
        )
    verdict = Verdict(
        tuple(b["reason"] for b in ballots), tuple(b["facts"] for b in ballots), tuple(channel.global_ranks)
    )
    if any(b["fatal"] for b in ballots):
        raise PeerTimeoutError(f"{channel.label}: {verdict.reason}")
    return verdict


def in_thread(work: Callable[[], Any], limit_s: float, topic: str, channel: Channel) -> Any:
    """work() in a thread, given up after limit_s seconds: a library may wait for a peer for ever.

    The thread has another use. While Inductor's CUDA graphs warm up, this thread allocates from a pool
    that the graphs will overwrite; buffers made in another thread lie outside it.
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
    start = time.monotonic()
    while thread.is_alive() and time.monotonic() - start < limit_s:
        thread.join(min(5.0, channel.wait_s / 4, limit_s))
        channel.beat()
    if not result:
        raise WorkspaceError(f"{topic} did not end within {limit_s:.0f} s")
    value, error = result[0]
    if error is not None:
        raise error
    return value


def describe(error: BaseException) -> str:
    """An exception in one line, with its class where the message alone would be a riddle."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 400 else text[:400] + "..."
    return text if isinstance(error, WorkspaceError | PeerTimeoutError) and text else f"{type(error).__name__}: {text}"
