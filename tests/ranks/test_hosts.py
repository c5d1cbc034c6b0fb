"""Ranks on two hosts: inside a host all fuses as ever, and a group across hosts reduces with its
own collective.

The hosts are Linux namespaces (tests/support/hosts.py): four ranks, two on each, that reach each
other by TCP only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import subprocess
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import fusewire
from fusewire.custom_ops.coordination import processes, rendezvous
from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm as op
from fusewire.custom_ops.workspaces import registry

from support.distributed import RankPool
from support.fake_flashinfer import args_of, fake_flashinfer
from support.hosts import NoHostsError, two_hosts
from support.rank_programs import HIDDEN, SHORT_S, Ranks, norm

SIZE = 4
PID_NAMESPACE = 0x20000000
SAID = "flashinfer: the group's ranks are on 2 hosts"


@pytest.fixture(scope="module")
def pool():
    try:
        with two_hosts() as hosts, RankPool(SIZE, hosts=hosts) as ranks:
            yield ranks
    except NoHostsError as error:
        pytest.skip(f"namespaces cannot stand for hosts here: {error}")


@contextlib.contextmanager
def counted_votes():
    """The topics of this rank's votes, by the group's name."""
    held = Counter()

    def counting(vote):
        def call(channel, topic, *args, **options):
            held[channel._group_name, topic] += 1
            return vote(channel, topic, *args, **options)

        return call

    with contextlib.ExitStack() as stack:
        for module in (rendezvous, registry):
            stack.enter_context(mock.patch.object(module, "vote", counting(module.vote)))
        yield held


def topics(held, group):
    return sorted(topic for (name, topic), count in held.items() for _ in range(count) if name == group.group_name)


def at_board(group):
    return rendezvous._meetings_of(group.group_name, group).at_board


def job_groups():
    """A program with a tensor-parallel group inside each host, and one across: as on GPUs,
    FlashInfer being faked.
    """
    ranks = Ranks()
    pairs = [ranks.new_group(pair) for pair in ([0, 1], [2, 3])]
    inside, across = pairs[ranks.rank // 2], ranks.group

    def model(x, r, w):
        for group in (inside, across):
            for _ in range(2):
                r = r + ranks.reduce(x, group)
                x = norm(r, w)
        return x, r

    priority = {"all_reduce_rms_norm": ("flashinfer", "native")}
    given = ranks.inputs()
    with fake_flashinfer() as fake, counted_votes() as held, torch.no_grad():
        results = ranks.compile(model, ir_op_priority=priority)(*given)
        return {
            "wrong": max((a - b).abs().max().item() for a, b in zip(results, model(*given), strict=True)),
            "fused": fusewire.report().summary,
            "served": {row.group: (row.provider, row.reason) for row in fusewire.report().served},
            "text": str(fusewire.report()),
            "inside": (inside.group_name, topics(held, inside), at_board(inside)),
            "across": (across.group_name, topics(held, across), at_board(across)),
            "workspaces": [entry.group_name for entry in fusewire.workspaces()],
            "loads": fake.loads,
        }


def test_groups_inside_a_host_and_across(pool):
    for found in pool.run(job_groups):
        assert found["wrong"] < 1e-5
        assert found["fused"].startswith("fusewire: 4 of 4 all-reduces fused")
        inside, votes, shared_page = found["inside"]
        assert shared_page
        assert votes[:2] == ["capacity", "create"]
        assert found["workspaces"] == [inside]
        assert found["served"][inside] == ("flashinfer", "")
        across, votes, shared_page = found["across"]
        assert not shared_page
        assert votes == ["fingerprints", "machine"]  # nothing was loaded, made or tested
        provider, reason = found["served"][across]
        assert provider == "native"
        assert reason.startswith(SAID)
        assert f"\n       {SAID}" in found["text"]
        assert found["loads"] == 1


def job_across_only():
    """The engine's own all-reduce serves a group across hosts, bit for bit, and FlashInfer is not
    even loaded.
    """
    ranks = Ranks()
    summed = []

    def engines(x):
        summed.append(x)
        return ranks.reduce(x)

    fusewire.name_group("tp:0", ranks.group, engines)
    x, r, w = ranks.inputs()
    with fake_flashinfer() as fake, torch.no_grad():
        results = [op(*args_of(x, r, w, "tp:0"), policy="flashinfer,native") for _ in range(2)]
        plain = op.native(*args_of(x, r, w, ranks.group.group_name))
        equal = all(torch.equal(a, b) for result in results for a, b in zip(result, plain, strict=True))
        made = fusewire.prepare("tp:0", HIDDEN, x.dtype, max_tokens=8)
        return equal, len(summed), fake.loads, {entry.provider: entry.reason for entry in made}["flashinfer"]


def test_the_engines_all_reduce_serves_a_group_across_hosts(pool):
    for equal, calls, loads, reason in pool.run(job_across_only):
        assert equal
        assert calls == 2
        assert loads == 0
        assert SAID.endswith(reason.split(",")[0])


def job_differs():
    """Rank 3 scales by another number, and no rank has compared what it compiled."""
    ranks = Ranks()
    scale = 0.25 if ranks.rank == 3 else 0.5
    run = ranks.compile(lambda x, r, w: norm(r + ranks.reduce(x) * scale, w), compile_alone=True)
    x, r, w = ranks.inputs()
    ranks.call(run, (x, r, w), norm(r + ranks.total(x) * scale, w))
    return ranks.seen


def test_ranks_that_differ_meet_in_the_store(pool):
    for (seen,) in pool.run(job_differs):
        assert "RankMismatchError: the ranks of group" in seen
        assert "nothing was sent" in seen
        assert all(f"rank {rank}: " in seen for rank in range(SIZE))


def job_leaves(leaves, how):
    ranks = Ranks()
    run = ranks.compile(ranks.merged)  # whose ranks meet before each call
    given = ranks.inputs()
    ranks.call(run, given, ranks.merged_want(*given), "together")
    dist.barrier()
    Path("/proc/sys/net/ipv4/tcp_retries2").write_text("3")  # of these hosts only: seconds, not minutes
    if ranks.rank == leaves and how == "process":
        os._exit(1)
    if ranks.rank == leaves and how == "cable":
        subprocess.run(["ip", "link", "set", "eth0", "down"], check=True)
    ranks.limit(SHORT_S)
    ranks.call(run, given, ranks.merged_want(*given), "alone")
    if ranks.rank == leaves:
        subprocess.run(["ip", "link", "set", "eth0", "up"], check=True)  # for the next test
    return ranks.merges, ranks.seen


GONE = "PeerTimeoutError: the store of group "
ABSENT = r"PeerTimeoutError: rendezvous: no vote on 'fingerprints' from rank\(s\) "


@pytest.mark.parametrize(
    ("leaves", "how", "said"),
    [
        (3, "process", [ABSENT + "3 "] * 3),
        (0, "process", [GONE] * 3),
        pytest.param(3, "cable", [ABSENT + "(2, )?3 "] * 2 + [GONE] * 2, marks=pytest.mark.nightly),
    ],
    ids=["a rank", "the rank that serves the store", "the cable"],
)
def test_who_leaves_is_an_error_on_the_others(pool, leaves, how, said):
    results = pool.run(job_leaves, leaves, how, may_die=[leaves])
    survivors = [found for found in results if found is not None]
    for (merges, (together, alone)), text in zip(survivors, said, strict=True):
        assert merges == 1
        assert together == "together right"
        assert re.match(f"alone raised {text}", alone)


def job_names():
    """What distinguishes this process, another rank, and a container on the same host."""
    here, there = os.pipe()
    if not os.fork():
        ctypes.CDLL(None).unshare(PID_NAMESPACE)
        if not os.fork():
            os.write(there, processes.host().encode())
        os._exit(0)
    os.close(there)
    container = os.read(here, 4096).decode()
    return processes.host(), container


def test_hosts_and_containers_are_told_apart(pool):
    hosts, containers = zip(*pool.run(job_names), strict=True)
    assert hosts[0] == hosts[1] != hosts[2] == hosts[3]
    assert len({*hosts, *containers}) == 2 + SIZE
    for host, container in zip(hosts, containers, strict=True):
        assert host.split()[0] == container.split()[0]  # the boot id
