"""Votes and exchanges of real ranks over the group's store: whoever comes late, once more, or not at all."""

from __future__ import annotations

import contextlib
import threading
import time
from unittest import mock

import pytest
import torch.distributed as dist

from fusewire.custom_ops.coordination.store import GroupStore
from fusewire.custom_ops.coordination.vote import Channel, vote
from fusewire.errors import PeerTimeoutError, WorkspaceError

from support.distributed import shared_pool
from support.votes import OUTCOME_S, WAIT_S, ask, channel, on_ranks, short_limits

# --- One outcome ----------------------------------------------------------------------------------------------


def job_outcome(rank):
    def work():
        if rank:
            raise WorkspaceError("no room") if rank < 3 else ValueError("odd")
        return {"pair": (1, 2)}

    return vote(channel(), "topic", work)


def test_all_ranks_get_one_outcome():
    results = on_ranks(3, job_outcome)
    assert results[0] == results[1] == results[2]
    assert results[0].reason == "on ranks 1, 2: no room"
    assert not results[0].ok
    assert results[0].facts == ({"pair": [1, 2]}, {}, {})
    assert results[0].ranks == (0, 1, 2)


def job_unsendable(rank):
    return vote(channel(), "topic", lambda: {"fact": {1, 2} if rank else 0}).reasons


def test_facts_that_cannot_be_sent_are_a_no():
    for reasons in on_ranks(2, job_unsendable):
        assert reasons == ("", "TypeError: a set cannot be sent to other ranks")


def job_fatal(rank, released):
    def work():
        if rank:
            raise PeerTimeoutError("the kernel waited in vain")

    try:
        return vote(channel(), "topic", work, release_peers=released).reason
    except PeerTimeoutError as error:
        return f"raised: {error}"


def test_a_timeout_in_the_work_is_raised_on_every_rank():
    assert on_ranks(2, job_fatal, False) == ["raised: label: on rank 1: the kernel waited in vain"] * 2
    assert on_ranks(2, job_fatal, True) == ["on rank 1: the kernel waited in vain"] * 2


def job_many(rank, count):
    one = channel()
    for i in range(count):
        assert ask(one, fact=[rank, i]) == [[peer, i] for peer in range(dist.get_world_size())]
        assert one.allgather(i) == (i,) * dist.get_world_size()
    for i in range(5):  # the first exchange of a channel, time and again
        assert ask(fact=[rank, i]) == [[peer, i] for peer in range(dist.get_world_size())]


def test_one_topic_many_times():
    on_ranks(2, job_many, 500)
    on_ranks(3, job_many, 100)


def job_alone(rank):
    alone = [dist.new_group([peer]) for peer in range(2)][rank]
    one = Channel(alone, "label", WAIT_S)
    return vote(one, "topic", lambda: {"fact": rank}).facts, one.bcast(b"x", 0), one.global_ranks


def test_a_group_of_one():
    results = shared_pool(2).run(_job_alone, timeout_s=60)
    assert results == [(({"fact": rank},), b"x", [rank]) for rank in range(2)]


def _job_alone():
    return job_alone(dist.get_rank())


# --- Ranks that do not come, come late, or come once more ------------------------------------------------------


def job_missing(rank, missing):
    return None if rank == missing else ask()


def test_a_missing_rank_is_an_error_on_every_other():
    results = on_ranks(3, job_missing, 2)
    assert results[0][0] == results[1][0]
    for said, took in results[:2]:
        assert said.startswith("label: no vote on 'topic' from rank(s) 2 within 1 s")
        assert "FUSEWIRE_TIMEOUT_S" in said
        assert took >= WAIT_S


def test_a_missing_first_rank_is_an_error_on_every_other():
    for said, took in on_ranks(3, job_missing, 0)[1:]:
        assert said.startswith("label: rank 0 did not publish the outcome of 'topic' within 2 s")
        assert "FUSEWIRE_TIMEOUT_S" in said
        assert took >= OUTCOME_S


def job_once_more(rank, extra):
    tries = [ask(fact=f"try {i} of {rank}") for i in range(2 if rank == extra else 0)]
    dist.barrier()
    return tries, ask(fact=rank), ask(fact=rank)


@pytest.mark.parametrize("extra", [0, 1])
def test_a_rank_that_came_once_more_fits_again(extra):
    results = on_ranks(2, job_once_more, extra)
    assert [len(tries) for tries, _, _ in results] == ([2, 0] if extra == 0 else [0, 2])
    for tries, first, second in results:
        assert all(isinstance(tried, tuple) for tried in tries)
        assert first == second == [0, 1]


def job_given_up(rank):
    tried = ask(fact="given up") if rank else None
    dist.barrier()
    return tried if rank else ask()


def test_the_ballot_of_a_rank_that_gave_up_is_not_taken():
    first, second = on_ranks(2, job_given_up)
    assert "no vote on 'topic' from rank(s) 1" in first[0]
    assert "rank 0 did not publish" in second[0]


def job_late(rank):
    if rank:
        time.sleep(WAIT_S + 0.5)
        return ask(fact="late")
    tries = []
    while not tries or isinstance(tries[-1], tuple):
        tries.append(ask(fact=f"try {len(tries)}"))
    return tries


def test_a_late_rank_meets_those_who_try_again():
    (failed, met), late = on_ranks(2, job_late)
    assert "no vote on 'topic' from rank(s) 1" in failed[0]
    assert met == late == ["try 1", "late"]


def job_topics(rank):
    return ask(topic=f"topic {rank}"), dist.barrier(), ask(fact=rank)


def test_different_topics_are_an_error_and_harm_no_later_vote():
    results = on_ranks(2, job_topics)
    assert "no vote on 'topic 0' from rank(s) 1" in results[0][0][0]
    assert "did not publish the outcome of 'topic 1'" in results[1][0][0]
    assert [met for *_, met in results] == [[0, 1], [0, 1]]


def job_between(rank):
    """Rank 0 fails between two votes and starts anew, while rank 1 goes on in the old try."""
    one = channel()
    tries = [ask(one, "first", rank), ask(one if rank else channel(), "second", rank)]
    dist.barrier()
    return tries, ask(topic="first", fact=rank)


def test_an_error_between_two_votes():
    for tries, met in on_ranks(2, job_between):
        assert tries[0] == [0, 1]
        assert isinstance(tries[1], tuple)
        assert met == [0, 1]


# --- Each write is for one try ---------------------------------------------------------------------------------


def job_stale(rank, value):
    key = "label/first/topic/1"
    if rank == 0:
        GroupStore(dist.group.WORLD).set(key, value)
    dist.barrier()
    time.sleep(0.3 * rank)  # the first rank finds it first
    return ask(fact=rank)


@pytest.mark.parametrize(
    "value",
    [
        'outcome [{"nonce": "a", "payload": {"reason": "", "facts": {"fact": "old"}, "fatal": false}}, null]',
        "taken b",
        "withdrawn",
    ],
)
def test_what_an_earlier_try_left_is_ignored(value):
    assert on_ranks(2, job_stale, value) == [[0, 1], [0, 1]]


@contextlib.contextmanager
def _slow(prefix, ready):
    """On this rank wait for `ready(store, key)` before a ballot's key gets a value that begins so."""
    replace = GroupStore.replace

    def slowly(self, key, old, new):
        deadline = time.monotonic() + 20
        while new.startswith(prefix) and not ready(self, key) and time.monotonic() < deadline:
            time.sleep(0.01)
        return replace(self, key, old, new)

    with mock.patch.object(GroupStore, "replace", slowly):
        yield


def job_withdrawn(rank):
    """Rank 1 gives up after rank 0 has read its ballot and before rank 0 takes it."""
    gone = _slow("taken", lambda store, key: store.get(key) is None)
    with gone if rank == 0 else contextlib.nullcontext():
        return ask()


def test_a_ballot_is_taken_or_withdrawn_and_never_both():
    first, second = on_ranks(2, job_withdrawn)
    assert "no vote on 'topic' from rank(s) 1" in first[0]
    assert "rank 0 did not publish" in second[0]


def job_published_late(rank):
    """Rank 0 takes rank 1's ballot in time and publishes the outcome shortly after rank 1's limit."""
    passed = time.monotonic() + OUTCOME_S + 0.2
    late = _slow("outcome", lambda *_: time.monotonic() > passed)
    with late if rank == 0 else short_limits(publication_s=10.0):
        return ask(fact=rank)


def test_a_rank_whose_ballot_is_taken_waits_for_the_outcome():
    assert on_ranks(2, job_published_late) == [[0, 1], [0, 1]]


def job_published_into_next(rank):
    """Rank 0 publishes so late that rank 1 has given up and has come again."""
    if rank:
        return ask(fact="a"), ask(fact="b")
    store = GroupStore(dist.group.WORLD)
    taken = []

    def come_again(_, key):
        taken.append(store.get(key))
        return taken[-1] is not None and taken[-1].startswith("ballot")

    with _slow("outcome", come_again):
        first = ask(fact="first")
    return first, ask(fact="second")


def test_a_late_outcome_does_not_meet_the_next_try():
    first, second = on_ranks(2, job_published_into_next)
    assert "did not publish" in second[0][0]
    assert first[1] == second[1] == ["second", "b"]


def job_same_name(rank):
    """A group of one name made twice on one store; a try over the first one is abandoned."""
    group, other = (Channel(dist.new_group([0, 1]), "label", WAIT_S) for _ in range(2))
    other._group_name, other._store = group._group_name, group._store
    assert ask(group, fact=rank) == [0, 1]
    if rank == 0:
        tried = ask(Channel(dist.group.WORLD, "label", WAIT_S))
        assert isinstance(tried, tuple)
    # Rank 1 has a thread that still votes over the first group.
    thread = threading.Thread(target=ask, args=(group,), kwargs={"fact": "old"})
    if rank:
        thread.start()
        time.sleep(0.1)
    dist.barrier()
    met = [ask(other, fact=rank), ask(other, fact=rank)]
    if rank:
        thread.join()
    return met


def test_a_group_made_anew_with_the_same_name():
    results = shared_pool(2).run(_job_same_name, timeout_s=60)
    assert results == [[[0, 1], [0, 1]]] * 2


def _job_same_name():
    with short_limits():
        return job_same_name(dist.get_rank())
