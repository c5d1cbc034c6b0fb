"""Before they run, the ranks compare their graphs: what meets, what does not, what it costs, and what is left behind."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from fusewire.custom_ops.coordination import rendezvous
from fusewire.errors import FusewireError, ProcessGroupError

from support.distributed import shared_pool
from support.rank_programs import SHORT_S, Ranks

X = torch.zeros(2)


def meet(group, fingerprint, strict=False, label=None):
    """ "" or what was raised, and the seconds it took."""
    start = time.monotonic()
    try:
        torch.ops.fusewire.rendezvous(X, group.group_name, fingerprint, label or f"graph {fingerprint}", strict)
    except FusewireError as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - start
    return "", time.monotonic() - start


def _sequence(steps, one_host, limit_s=60.0):
    """Meetings of this rank: for each step its fingerprint, or None for a rank that does not come."""
    ranks = Ranks(limit_s=limit_s)
    hosts = mock.patch.object(rendezvous, "host", return_value="here" if one_host else f"host {ranks.rank}")
    said = []
    with hosts:
        for step in steps:
            dist.barrier()
            fingerprint, strict = step[ranks.rank % len(step)]
            said.append(("absent", 0.0) if fingerprint is None else meet(ranks.group, fingerprint, strict))
    return said


A, B, WRITTEN, ABSENT = ("a", False), ("b", False), ("", False), (None, False)
STRICT = ("a", True)


@pytest.mark.parametrize("one_host", [True, False], ids=["shared memory", "store"])
@pytest.mark.parametrize(
    ("steps", "raise_at"),
    [
        ([[WRITTEN], [ABSENT, WRITTEN]], None),  # as written: nobody is waited for
        ([[A], [A], [ABSENT, A]], None),  # no other fingerprint than before
        ([[A], [B], [A], [WRITTEN], [A]], None),
        ([[A, B]], 0),
        ([[STRICT], [STRICT], [STRICT, WRITTEN]], 2),
        ([[A], [B, WRITTEN]], 1),
        ([[STRICT], [STRICT, B]], 1),
    ],
)
def test_meetings(steps, raise_at, one_host):
    results = shared_pool(2).run(_sequence, steps, one_host)
    for said in results:
        texts = [text for text, _ in said]
        assert all(text in ("", "absent") for text in texts[:raise_at])
        if raise_at is not None:
            assert texts[raise_at].startswith("RankMismatchError: the ranks of group")
            assert "rank 0: graph" in texts[raise_at]
            assert "rank 1: graph" in texts[raise_at]


@pytest.mark.parametrize(
    ("steps", "one_host"),
    [
        ([[A], [ABSENT, B]], True),
        ([[STRICT], [ABSENT, STRICT]], True),
        ([[ABSENT, A]], True),
        pytest.param([[A], [ABSENT, B]], False, marks=pytest.mark.nightly),
        pytest.param([[STRICT], [ABSENT, STRICT]], False, marks=pytest.mark.nightly),
    ],
)
def test_a_rank_that_does_not_come(steps, one_host):
    _, said = shared_pool(2).run(_sequence, steps, one_host, SHORT_S)
    text, seconds = said[-1]
    assert text.startswith("PeerTimeoutError: ")
    assert "FUSEWIRE_TIMEOUT_S" in text
    assert "rank 0" in text or "rank(s) 0" in text
    assert SHORT_S - 0.5 < seconds < SHORT_S * 1.25 + 40


def test_after_a_failure_nothing_runs_any_more():
    for said in shared_pool(2).run(_sequence, [[A], [STRICT, B], [A], [WRITTEN]], True):
        assert all("an earlier call failed; this one did not run" in text for text, _ in said[2:])


def _late():
    ranks = Ranks()
    said = [meet(ranks.group, "a")]
    if ranks.rank == 0:
        time.sleep(0.5)
    return [*said, meet(ranks.group, "b"), meet(ranks.group, "b", True)]


def test_a_late_rank_is_waited_for():
    for said in shared_pool(3).run(_late):
        assert [text for text, _ in said] == [""] * 3


def _many():
    """More meetings than a word has numbers, ranks one ahead of each other, two groups, two threads."""
    ranks = Ranks()
    other = ranks.new_group()
    meetings = rendezvous._meetings_of(ranks.group.group_name, ranks.group)
    said = [meet(ranks.group, "a", True)]
    meetings._number = 0xFFF0
    meetings._board.publish(0xFFF0, rendezvous._digest("a"))
    dist.barrier()
    said += [meet(ranks.group, "ab"[number % 2], True) for number in range(64)]
    threads = [
        threading.Thread(target=lambda g=g: said.extend(meet(g, "c", True) for _ in range(20)))
        for g in (ranks.group, other)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [text for text, _ in said]


def test_many_meetings():
    assert shared_pool(2).run(_many) == [[""] * (1 + 64 + 40)] * 2


def _left_behind():
    ranks = Ranks()
    made, make = [], rendezvous._Board.make
    files = len(os.listdir("/proc/self/fd"))
    with mock.patch.object(rendezvous._Board, "make", lambda size: made.append(make(size)) or made[-1]):
        said = [meet(ranks.group, "a"), meet(ranks.group, "b")]
    dist.barrier()
    mapped = "fusewire-" in Path("/proc/self/maps").read_text()
    return said, made, [os.path.exists(path) for path in made], mapped, len(os.listdir("/proc/self/fd")) - files


def test_no_file_is_left_behind():
    results = shared_pool(2).run(_left_behind)
    assert [len(made) for _, made, *_ in results] == [1, 0]
    for said, _, left, mapped, files in results:
        assert [text for text, _ in said] == ["", ""]
        assert not any(left)
        assert mapped  # the ranks do share a page
        assert files <= 1


def _no_shared_memory():
    """Rank 1 cannot open the page (another container, say): all of them go on in the store."""
    ranks = Ranks()

    def refused(self, *_):
        raise OSError("no such file")

    board = mock.patch.object(rendezvous._Board, "__init__", refused) if ranks.rank == 1 else mock.patch.dict({})
    with board:
        said = [meet(ranks.group, fingerprint) for fingerprint in "abab"]
    return said, rendezvous._meetings_of(ranks.group.group_name, ranks.group)._board is None


def test_ranks_without_a_common_page_meet_in_the_store():
    for said, in_store in shared_pool(2).run(_no_shared_memory):
        assert [text for text, _ in said] == [""] * 4
        assert in_store


def test_a_group_that_does_not_exist():
    with pytest.raises(ProcessGroupError, match="no process group"):
        rendezvous.rendezvous(X, "nowhere", "a", "a graph", True)


def _again():
    ranks = Ranks()
    said = [meet(ranks.group, "a")]
    with mock.patch.object(rendezvous, "_meetings_of", side_effect=AssertionError):
        said += [meet(ranks.group, "a") for _ in range(3)]
    return [text for text, _ in said]


def test_the_same_fingerprint_costs_one_comparison():
    """No store, no lock, no shared memory."""
    assert shared_pool(2).run(_again) == [[""] * 4] * 2
