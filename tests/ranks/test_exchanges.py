"""Exchanges, aborts, busy ranks and threads of real ranks over the group's store."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from fusewire.custom_ops.coordination import store as stores
from fusewire.custom_ops.coordination import vote as votes
from fusewire.custom_ops.coordination.busy import busy
from fusewire.custom_ops.coordination.store import GroupStore
from fusewire.custom_ops.coordination.timeouts import Limit
from fusewire.custom_ops.coordination.vote import Channel, vote
from fusewire.errors import PeerTimeoutError, WorkspaceError

from support.distributed import shared_pool
from support.votes import OUTCOME_S, WAIT_S, ask, channel, on_ranks

# --- Exchanges, aborts and busy ranks
# ----------------------------------------------------------------------------


def job_exchange(rank):
    one = channel()
    sent = one.allgather((f"host {rank}", None, bytes([0, 255, rank])))
    with contextlib.suppress(TypeError):
        one.allgather({rank})
        return "a set was sent"
    return sent, one.bcast({"from": rank}, 2), one.barrier(), (one.Get_rank(), one.Get_size())


def test_exchanges_carry_what_flashinfer_sends():
    sent = tuple([f"host {rank}", None, bytes([0, 255, rank])] for rank in range(3))
    for rank, found in enumerate(on_ranks(3, job_exchange)):
        assert found == (sent, {"from": 2}, None, (rank, 3))


def job_exchange_missing(rank):
    try:
        return None if rank == 2 else channel().barrier()
    except PeerTimeoutError as error:
        return str(error)


def test_a_rank_missing_in_an_exchange_is_an_error_on_every_other():
    first, second, _ = on_ranks(3, job_exchange_missing)
    assert first == second
    assert "no vote on 'allgather' from rank(s) 2 within 1 s" in first


def job_abort(rank, failing, opened):
    one = channel(wait_s=20.0)
    if opened:
        ask(one)

    def create():
        if rank == failing:
            raise WorkspaceError("out of memory")
        one.allgather(rank)

    reason = vote(one, "create", create, work_s=20.0, release_peers=True).reason
    again = channel()
    return reason, vote(again, "create", lambda: again.barrier(), release_peers=True).reason


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("opened", [True, False])
def test_a_rank_that_fails_frees_those_in_an_exchange(failing, opened):
    freed = ", ".join(str(rank) for rank in range(3) if rank != failing)
    for reason, again in on_ranks(3, job_abort, failing, opened):
        assert f"on rank {failing}: out of memory" in reason
        assert f"on ranks {freed}: rank {failing} gave up: out of memory" in reason
        assert again == ""


def job_stale_abort(rank, opened):
    """The rank that aborts ends before it has removed the abort."""
    one, again = channel(), channel()
    if opened:
        ask(one)
    with mock.patch.object(Channel, "clear"):
        vote(one, "create", (lambda: int("odd")) if rank else one.barrier, release_peers=True)
    reason = vote(again, "create", again.barrier, release_peers=True).reason
    dist.barrier()
    one.clear()
    return reason


@pytest.mark.parametrize("opened", [True, False])
def test_an_abort_that_was_left_harms_no_later_try(opened):
    assert on_ranks(2, job_stale_abort, opened) == ["", ""]


def job_given_up_thread(rank):
    """Rank 1's creation hangs, is given up, and goes on when the ranks try again."""
    ended, go_on, one = [], threading.Event(), channel(wait_s=20.0)

    def create():
        if rank:
            go_on.wait(20)
        try:
            one.allgather("old")
        except Exception as error:
            ended.append(str(error))
            raise

    first = vote(one, "create", create, work_s=WAIT_S if rank else 20.0, release_peers=True).reason
    go_on.set()
    again = channel(wait_s=20.0)
    found = []
    second = vote(again, "create", lambda: found.extend(again.allgather(rank)), work_s=20, release_peers=True).reason
    time.sleep(0.3)
    return first, second, found, ended


def test_work_that_was_given_up_takes_no_part_any_more():
    for first, second, found, ended in on_ranks(2, job_given_up_thread):
        assert "create did not end within 1 s" in first
        assert second == ""
        assert found == [0, 1]
        assert "gave up" in ended[0]


def job_old_channel(rank):
    """A thread of rank 1 votes over a channel of an earlier try."""
    old = channel()
    ask(old)
    left = []
    thread = threading.Thread(target=lambda: left.append(ask(old, fact="old")))
    if rank:
        thread.start()
    new = channel()
    dist.barrier()
    time.sleep(0.2)
    met = [ask(new, fact=rank), ask(new, fact=rank)]
    if rank:
        thread.join()
    return met, left


def test_a_thread_left_over_from_an_earlier_try_meets_nobody():
    (met, _), (met_too, left) = on_ranks(2, job_old_channel)
    assert met == met_too == [[0, 1], [0, 1]]
    assert "did not publish" in left[0][0]


def job_slow_work(rank, work_s, seconds):
    with contextlib.suppress(PeerTimeoutError):
        work = (lambda: time.sleep(seconds)) if rank else (lambda: None)
        return vote(channel(), "topic", work, work_s=work_s).reason
    return "timed out"


def test_a_rank_at_work_is_waited_for_and_no_longer():
    assert on_ranks(3, job_slow_work, 20.0, 2 * OUTCOME_S) == [""] * 3
    assert on_ranks(3, job_slow_work, None, 2 * OUTCOME_S) == ["timed out"] * 3
    for reason in on_ranks(3, job_slow_work, WAIT_S, 10.0):
        assert "topic did not end within 1 s" in reason


def job_busy_without_coming(rank):
    """Rank 1 is busy until rank 0 has given up; whether it did before a minute was over."""
    if rank:
        given_up = dist.barrier(async_op=True)
        with busy():
            for _ in range(600):
                if given_up.is_completed():
                    break
                time.sleep(0.1)
        return given_up.is_completed()
    with pytest.raises(PeerTimeoutError):
        channel().barrier()
    dist.barrier()
    return True


def test_messages_do_not_extend_an_exchange():
    assert on_ranks(2, job_busy_without_coming) == [True, True]


def job_thread_alone(rank):
    """Work without a vote after it, as the tuner has it."""
    found = votes.in_thread(lambda: time.sleep(0.6) or rank, 20.0, "work")
    with pytest.raises(ValueError, match="odd"):
        votes.in_thread(lambda: int("odd"), 20.0, "work")
    with pytest.raises(WorkspaceError, match="work did not end within 0 s"):
        votes.in_thread(lambda: time.sleep(1.0), 0.3, "work")
    return found


def test_work_in_a_thread_leaves_no_message():
    assert on_ranks(2, job_thread_alone) == [0, 1]


def job_stale_message(rank):
    """A message that somebody left extends no wait."""
    if rank == 0:
        GroupStore(dist.group.WORLD).set("busy/1", "1")
    dist.barrier()
    found = None if rank else ask()
    dist.barrier()
    GroupStore(dist.group.WORLD).delete("busy/1")
    return found


def test_a_message_that_was_left_extends_no_wait():
    said, took = on_ranks(2, job_stale_message)[0]
    assert "no vote" in said
    assert took < WAIT_S + 4


# --- Threads, words, the store ---------------------------------------------------------------------------------


def job_threads(rank, labels):
    found = {}

    def one(i):
        found[i] = ask(channel(labels[i % len(labels)], 20.0), fact=f"{rank}.{i}")

    threads = [threading.Thread(target=one, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(found.values())


@pytest.mark.parametrize("labels", [("label",), ("label", "other")])
def test_threads_do_not_mix_up(labels):
    results = on_ranks(2, job_threads, labels)
    assert results[0] == results[1]
    assert all(isinstance(pair, list) for pair in results[0])
    assert {pair[1] for pair in results[0]} == {f"1.{i}" for i in range(4)}


def _job_groups():
    """A thread for each of two groups, begun in another order on each rank."""
    rank, groups, found = dist.get_rank(), [dist.new_group([0, 1]) for _ in range(2)], {}

    def one(i):
        found[i] = ask(Channel(groups[i], "label", 5.0), fact=f"{rank}.{i}")

    threads = [threading.Thread(target=one, args=(i,)) for i in (rank, 1 - rank)]
    for thread in threads:
        thread.start()
        time.sleep(0.3)
    for thread in threads:
        thread.join()
    return found


def test_threads_of_different_groups_do_not_wait_for_each_other():
    assert shared_pool(2).run(_job_groups, timeout_s=60) == [{i: [f"0.{i}", f"1.{i}"] for i in range(2)}] * 2


def job_announced(rank):
    said = []
    limits = mock.patch.dict(os.environ, {Limit.ANNOUNCEMENT.variable: "0.5"})
    with limits, mock.patch.object(stores, "log_line", said.append):
        time.sleep(1.5 * (rank == 2))
        ask(channel(wait_s=20.0))
    return said


def test_the_first_rank_says_for_whom_it_waits():
    said = on_ranks(3, job_announced)
    assert said == [["waiting for rank(s) 2 to vote on 'topic' (label), at most 20 s"], [], []]


class _AtomicOnly:
    """A store without the calls that wait for a key."""

    def __init__(self, inner):
        self.compare_set, self.set, self.delete_key = inner.compare_set, inner.set, inner.delete_key


@pytest.mark.parametrize("kind", ["hash", "file", "tcp"])
def test_the_store_reads_and_replaces_without_waiting(kind):
    with tempfile.TemporaryDirectory() as folder:
        make = {
            "hash": dist.HashStore,
            "file": lambda: dist.FileStore(str(Path(folder) / "store"), 1),
            "tcp": lambda: dist.TCPStore("127.0.0.1", 0, 1, True),
        }
        inner = make[kind]()
        store = object.__new__(GroupStore)
        store._store = _AtomicOnly(inner)
        before = inner.num_keys()
        assert store.get("key") is None
        assert not store.replace("key", "old", "new")
        assert inner.num_keys() == before
        store.set("key", "old")
        assert store.get("key") == "old"
        assert not store.replace("key", "other", "new")
        assert store.replace("key", "old", "new")
        assert store.set_once("key", "later") == store.get("key") == "new"
        store.delete("key")
        store.delete("key")
        assert store.get("key") is None
        assert inner.num_keys() == before
