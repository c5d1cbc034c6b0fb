"""A rank whose process has ended is found at once: no wait for it lasts until its time limit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from fusewire.custom_ops.coordination import processes, rendezvous
from fusewire.custom_ops.coordination.busy import busy, poll_ranks
from fusewire.custom_ops.coordination.processes import Process, announce, ended, how_long
from fusewire.custom_ops.coordination.store import GroupStore, default_store
from fusewire.custom_ops.coordination.vote import Channel, vote
from fusewire.custom_ops.coordination.watchdog import Watchdog
from fusewire.custom_ops.providers.symm_mem.layout import CTL_LIMIT_NS, WAIT_RESULT_FLAG
from fusewire.errors import FusewireError
from fusewire.fusion_passes.spmd import agreement
from fusewire.fusion_passes.spmd.fingerprint import GroupFingerprint

from support.distributed import shared_pool
from support.rank_programs import Ranks
from support.words import held

WITHIN_S = 60  # of a test that would fail: the limits are ten times as long
LONG_S = 600.0


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def said(call):
    try:
        return call()
    except FusewireError as error:
        return f"{type(error).__name__}: {error}"


def on_ranks(size, victim, job, *arguments):
    results = shared_pool(size).run(job, victim, *arguments, timeout_s=WITHIN_S, may_die=[victim])
    assert results[victim] is None
    return [result for rank, result in enumerate(results) if rank != victim]


# --- Waits of ranks for each other -----------------------------------------------------------------


def _vote(victim, after_ballot):
    rank = dist.get_rank()
    vote(Channel(dist.group.WORLD, "first", LONG_S), "topic", dict)
    announce(default_store())  # whoever came last in that vote has not waited
    dist.barrier()
    if rank == victim and not after_ballot:
        die()
    if rank == victim:  # as a rank that is killed while it waits for the outcome
        threading.Timer(0.5, die).start()
    elif after_ballot:
        time.sleep(2.0)
    result = said(lambda: vote(Channel(dist.group.WORLD, "label", LONG_S), "topic", lambda: {"fact": rank}))
    if rank == victim:
        time.sleep(WITHIN_S)
    return result if isinstance(result, str) else [fact["fact"] for fact in result.facts]


@pytest.mark.parametrize("victim", [1, 2])
def test_a_vote_without_a_rank_that_ended(victim):
    first, second = on_ranks(3, victim, _vote, False)
    assert first == second
    gone = f"(rank {victim}: the process has ended)"
    assert first.startswith(f"PeerTimeoutError: label: no vote on 'topic' from rank(s) {victim} {gone}; every rank")


def test_a_vote_without_its_first_rank():
    for text in on_ranks(3, 0, _vote, False):
        gone = "(rank 0: the process has ended)"
        assert text.startswith(f"PeerTimeoutError: label: rank 0 did not publish the outcome of 'topic' {gone};")


def test_the_vote_of_a_rank_that_ended_afterwards_counts():
    assert on_ranks(3, 2, _vote, True) == [[0, 1, 2]] * 2


def _rendezvous(victim, one_host):
    ranks = Ranks(limit_s=LONG_S)
    with mock.patch.object(rendezvous, "host", return_value="here" if one_host else f"host {ranks.rank}"):
        meet = torch.ops.fusewire.rendezvous
        meet(torch.zeros(1), ranks.group.group_name, "a", "graph a", False)
        announce(default_store())
        dist.barrier()
        if ranks.rank == victim:
            die()
        return said(lambda: meet(torch.zeros(1), ranks.group.group_name, "b", "graph b", False))


@pytest.mark.parametrize("one_host", [True, False], ids=["shared memory", "store"])
def test_a_meeting_before_a_graph(one_host):
    (text,) = on_ranks(2, 1, _rendezvous, one_host)
    assert text.startswith("PeerTimeoutError: ")
    assert "(rank 1: the process has ended)" in text


def _agreement(victim):
    ranks = Ranks(limit_s=LONG_S)
    with busy():  # as every compilation: says which process this is
        pass
    dist.barrier()
    if ranks.rank == victim:
        die()
    return said(lambda: agreement.agree([GroupFingerprint(ranks.group.group_name, "a", "1", "a 1", True)]))


def test_a_graph_that_a_rank_does_not_compile_any_more():
    (text,) = on_ranks(2, 1, _agreement)
    assert text.startswith("PeerTimeoutError: waited in vain for rank(s) 1 of group")
    assert "to compile a 1 (rank 1: the process has ended)" in text


def _others(victim, same_host):
    rank = dist.get_rank()
    with mock.patch.object(processes, "_sight", return_value="here" if same_host else f"host {rank}"):
        announce(default_store())
        dist.barrier()
        if rank == 1:
            die()
        deadline = time.monotonic() + WITHIN_S
        while same_host and not ended([1]) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
        # Without an end of the process, the limit counts.
        waited = poll_ranks(lambda: [1], lambda: None, 3.0)
        return ended([0, 1]), waited, how_long([0, 1], 3.0)


def test_processes_of_other_hosts_count_as_running():
    assert on_ranks(2, 1, _others, True) == [([1], None, "(rank 1: the process has ended)")]
    assert on_ranks(2, 1, _others, False) == [([], None, "within 3 s")]


def _another_group():
    """A later default group's ranks are looked up anew."""
    announce(default_store())
    before = processes.processes([0])[0].pid
    store = GroupStore(dist.group.WORLD)
    store.set("process/0", f"1 0 {processes._sight()}")
    kept = processes.processes([0])[0].pid
    with mock.patch.object(processes._Known, "last", None):
        anew = processes.processes([0])[0].pid
    return before == os.getpid(), kept == before, anew


def test_what_is_known_belongs_to_a_default_group():
    assert shared_pool(1).run(_another_group) == [(True, True, 1)]


# --- One process -----------------------------------------------------------------------------------


@pytest.fixture
def child():
    found = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield found
    found.kill()
    found.wait()


def process_of(child):
    return Process(child.pid, processes._state_and_start(str(child.pid))[1])


def test_the_end_of_a_process(child):
    process = process_of(child)
    assert not process.ended
    assert not process_of(mock.Mock(pid=os.getpid())).ended
    assert process._replace(start="1").ended  # an earlier process with this id
    child.send_signal(signal.SIGSTOP)
    time.sleep(0.05)
    assert not process.ended
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert process.ended  # a zombie
    child.wait()
    assert process.ended


def test_kernels_wait_less_for_a_process_that_has_ended(child, monkeypatch):
    monkeypatch.setenv("FUSEWIRE_WATCHDOG_INTERVAL_S", "0.01")
    monkeypatch.setenv("FUSEWIRE_ENDED_PEER_TIMEOUT_S", "0.5")
    dog, workspace, shortened = Watchdog(), held(), threading.Event()
    real = workspace.made._set_limit
    monkeypatch.setattr(workspace.made, "_set_limit", lambda: (real(), shortened.set()))
    dog.watch(workspace, {1: process_of(child)})
    try:
        assert not shortened.wait(0.2)
        child.kill()
        assert shortened.wait(WITHIN_S)
        assert int(workspace.made.ctl[CTL_LIMIT_NS]) == 500_000_000
        assert workspace.fault() is None  # its program may just be done
        workspace.made.give_up(kind=WAIT_RESULT_FLAG, rank=1)
        text = str(workspace.fault())
    finally:
        dog.unwatch(workspace)
    assert text.startswith("the process of rank 1 of group 'group' has ended, and rank 0 waited in vain for rank 1")
    assert "two-shot all-reduce + norm (flags): its finished rows, call 17 of the workspace" in text


def test_a_limit_is_never_longer_after_an_end():
    workspace = held()
    workspace.made.timeout_s = 0.25
    workspace.lose(1)
    assert int(workspace.made.ctl[CTL_LIMIT_NS]) == 250_000_000


def test_a_device_that_has_failed_does_not_stop_the_watchdog(child, monkeypatch):
    monkeypatch.setenv("FUSEWIRE_WATCHDOG_INTERVAL_S", "0.01")
    dog, broken, heard = Watchdog(), held(), threading.Event()
    monkeypatch.setattr(broken.made, "_set_limit", mock.Mock(side_effect=RuntimeError("CUDA error")))
    dog.on_fault(lambda error: heard.set())
    dog.watch(broken, {1: process_of(child)})
    try:
        child.kill()
        child.wait()
        broken.made.give_up()
        assert heard.wait(WITHIN_S)
    finally:
        dog.unwatch(broken)
