"""Votes and exchanges of real ranks over the group's store: whoever comes late, once more, or not at all."""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from fusewire.custom_ops.coordination import store as stores
from fusewire.custom_ops.coordination import timeouts
from fusewire.custom_ops.coordination import vote as votes
from fusewire.custom_ops.coordination.store import GroupStore
from fusewire.custom_ops.coordination.vote import Channel, vote
from fusewire.errors import PeerTimeoutError, WorkspaceError

from support.distributed import shared_pool

WAIT_S = 1.0
PUBLISH_S = 0.5  # instead of 10 seconds
OUTCOME_S = 1.25 * WAIT_S + PUBLISH_S


def on_ranks(size, job, *args):
    """What a job returns on each rank; the store must hold no more keys after it than before."""
    for kept, found in (results := shared_pool(size).run(_counted, job, args, timeout_s=120)):
        assert kept == 0, found
    return [found for _, found in results]


def _counted(job, args):
    before = _keys()
    patches = [mock.patch.object(module, "PUBLISH_S", PUBLISH_S) for module in (timeouts, votes)]
    with patches[0], patches[1]:
        found = job(dist.get_rank(), *args)
    return _keys() - before, found


def _keys():
    dist.barrier()
    count = dist.distributed_c10d._get_process_group_store(dist.group.WORLD).num_keys()
    dist.barrier()
    return count


def channel(label="label", wait_s=WAIT_S):
    return Channel(dist.group.WORLD, label, wait_s)


def ask(on=None, topic="topic", fact=None, **options):
    """The facts of all ranks by a vote, or the error."""
    start = time.monotonic()
    try:
        result = vote(on or channel(), topic, lambda: {"fact": fact}, **options)
    except PeerTimeoutError as error:
        return str(error), time.monotonic() - start
    return [each["fact"] for each in result.facts]


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
        assert WAIT_S <= took < WAIT_S + 5


def test_a_missing_first_rank_is_an_error_on_every_other():
    for said, took in on_ranks(3, job_missing, 0)[1:]:
        assert said.startswith("label: rank 0 did not publish the outcome of 'topic' within 2 s")
        assert "FUSEWIRE_TIMEOUT_S" in said
        assert OUTCOME_S <= took < OUTCOME_S + 5


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
    with late if rank == 0 else mock.patch.object(votes, "PUBLISH_S", 10.0):
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
    with mock.patch.object(timeouts, "PUBLISH_S", PUBLISH_S):
        return job_same_name(dist.get_rank())


# --- Exchanges, aborts and beats --------------------------------------------------------------------------------


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

    start = time.monotonic()
    reason = vote(one, "create", create, work_s=20.0, release_peers=True).reason
    took = time.monotonic() - start
    again = channel()
    return reason, took, vote(again, "create", lambda: again.barrier(), release_peers=True).reason


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("opened", [True, False])
def test_a_rank_that_fails_frees_those_in_an_exchange(failing, opened):
    freed = ", ".join(str(rank) for rank in range(3) if rank != failing)
    for reason, took, again in on_ranks(3, job_abort, failing, opened):
        assert f"on rank {failing}: out of memory" in reason
        assert f"on ranks {freed}: rank {failing} gave up: out of memory" in reason
        assert took < 10
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
    start = time.monotonic()
    with contextlib.suppress(PeerTimeoutError):
        work = (lambda: time.sleep(seconds)) if rank else (lambda: None)
        return vote(channel(), "topic", work, work_s=work_s).reason, time.monotonic() - start
    return "timed out", time.monotonic() - start


def test_a_rank_at_work_is_waited_for_and_no_longer():
    for reason, took in on_ranks(3, job_slow_work, 20.0, 3 * OUTCOME_S):
        assert reason == ""
        assert took < 3 * OUTCOME_S + 5
    assert {reason for reason, _ in on_ranks(3, job_slow_work, None, 3 * OUTCOME_S)} == {"timed out"}
    for reason, took in on_ranks(3, job_slow_work, 2 * WAIT_S, 10.0):
        assert "topic did not end within 2 s" in reason
        assert took < 2 * WAIT_S + 5


def job_beats_without_coming(rank):
    one = channel()
    if rank:
        for _ in range(60):
            one.beat()
            time.sleep(0.1)
        return one.clear()
    start = time.monotonic()
    with pytest.raises(PeerTimeoutError):
        one.barrier()
    return time.monotonic() - start


def test_beats_do_not_extend_an_exchange():
    assert on_ranks(2, job_beats_without_coming)[0] < WAIT_S + 4


def job_thread_alone(rank):
    """Beats without a vote after them, as the tuner has it."""
    one = channel()
    found = votes.in_thread(lambda: time.sleep(0.6) or rank, 20.0, "work", one)
    with pytest.raises(ValueError, match="odd"):
        votes.in_thread(lambda: int("odd"), 20.0, "work", one)
    with pytest.raises(WorkspaceError, match="work did not end within 0 s"):
        votes.in_thread(lambda: time.sleep(1.0), 0.3, "work", one)
    return found


def test_work_in_a_thread_leaves_no_beat():
    assert on_ranks(2, job_thread_alone) == [0, 1]


def job_stale_beat(rank):
    """A beat that somebody left extends no wait."""
    if rank == 0:
        GroupStore(dist.group.WORLD).set("label/beat/1", "1")
    dist.barrier()
    found = None if rank else ask()
    dist.barrier()
    GroupStore(dist.group.WORLD).delete("label/beat/1")
    return found


def test_a_beat_that_was_left_extends_no_wait():
    said, took = on_ranks(2, job_stale_beat)[0]
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
    with mock.patch.object(stores, "ANNOUNCE_AFTER_S", 0.5), mock.patch.object(stores, "log_line", said.append):
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
