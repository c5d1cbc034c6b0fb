"""The ranks compare what they compile: which histories agree, who obeys whom, and who waits for what."""

from __future__ import annotations

import contextlib
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import fusewire
from fusewire.custom_ops.coordination import rendezvous
from fusewire.errors import PeerTimeoutError
from fusewire.fusion_passes import backend
from fusewire.fusion_passes import pipeline as manager
from fusewire.fusion_passes.backend import fusewire_backend
from fusewire.fusion_passes.spmd import agreement
from fusewire.fusion_passes.spmd.agreement import FUSED, Posting, compare
from fusewire.fusion_passes.spmd.fingerprint import GroupFingerprint

from support.distributed import fake_group, shared_pool
from support.rank_programs import SHORT_S, Ranks, check, norm


def history(text):
    """Postings from a text such as "a=1 b": program a rewritten as 1, then program b as written."""
    items = [item.partition("=") for item in text.split()]
    return [Posting(program, rewritten, f"{program} {rewritten}".strip()) for program, _, rewritten in items]


@pytest.mark.parametrize(
    ("mine", "theirs", "decision"),
    [
        ("a=1", "a=1", FUSED),
        ("a=1", "", None),  # not there yet
        ("a=1", "a", "differ"),  # the same program, left as written
        ("a=1", "a=2", "differ"),
        ("a=1", "b", "differ"),  # goes another way
        ("a=1", "b a=1", "differ"),
        ("b a=1", "a=1", "differ"),
        ("b a=1", "b", None),
        ("b a=1", "b a=1 c", FUSED),  # what a rank compiled later does not count
        ("a=1", "a=1 a", FUSED),
        ("a a=1", "a", None),  # as written, as here; the next may come
        ("a a=1", "a a", "differ"),  # compiled once more, and not as here
        ("a a=1", "a a=1", FUSED),
        ("b=1 a=1", "b a=1", FUSED),  # what became of b was decided then
        ("b b a=1", "b a=1", FUSED),  # compiled twice on one rank, for other guards
        ("b a=1", "a=1 b", "differ"),
    ],
)
def test_histories(mine, theirs, decision):
    postings = {0: history(mine), 1: history(theirs)}
    found, missing = compare(postings, 0, ("a", "1"))
    assert found == decision if decision in (FUSED, None) else found.startswith("the ranks' graphs differ")
    assert missing == ([] if "a=1" in theirs else [1])


def test_a_difference_names_both_sides():
    found, _ = compare({0: history("a=1"), 1: history("a=1"), 2: history("a")}, 0, ("a", "1"))
    assert found.endswith("rank 0 compiled a 1; rank 2 compiled a")
    found, _ = compare({0: history("b a=1"), 1: history("a=1")}, 0, ("a", "1"))
    assert found.endswith("rank 0 compiled b; rank 1 compiled nothing like it before a 1")


def test_histories_that_agree_agree_from_both_sides():
    for mine, theirs in (("b a=1", "a=1"), ("a=1", "a=1"), ("a a=1", "a a a=1")):
        postings = {0: history(mine), 1: history(theirs)}
        assert (compare(postings, 0, ("a", "1"))[0] == FUSED) == (compare(postings, 1, ("a", "1"))[0] == FUSED)


def _print(program, rewritten):
    return [GroupFingerprint(dist.group.WORLD.group_name, program, rewritten, f"{program} {rewritten}", True)]


def _late_obeys():
    """The decision is written once: who comes later obeys, whatever it would have found itself."""
    Ranks()
    rank = dist.get_rank()
    if rank == 1:
        agreement.agree(_print("a", ""))
    dist.barrier()
    found = []
    if rank == 0:
        found.append(agreement.agree(_print("a", "1")))
    dist.barrier()
    if rank == 1:
        found.append(agreement.agree(_print("a", "1")))
    dist.barrier()
    with mock.patch.object(agreement, "poll_ranks", side_effect=AssertionError):  # known by now: nobody is asked
        found.append(agreement.agree(_print("a", "1")))
    return found


def test_who_comes_later_obeys():
    for first, again in shared_pool(2).run(_late_obeys):
        assert list(first.values()) == list(again.values())
        assert "rank 0 compiled a 1; rank 1 compiled a" in next(iter(first.values()))


def _alone(how):
    """Rank 0 rewrites what rank 1 never compiles. Who compiles alone waits for nobody, nor who rewrites nothing."""
    ranks = Ranks(limit_s=SHORT_S if how == "silent" else 60.0)
    text = ""
    waits = ranks.rank == 0 and how != "compile_alone"
    with contextlib.nullcontext() if waits else mock.patch.object(agreement, "poll_ranks", side_effect=AssertionError):
        if ranks.rank == 0:
            prints = [GroupFingerprint(ranks.group.group_name, "a", "1", "a 1", True)]
            try:
                text = str(agreement.agree(prints, wait=how != "compile_alone"))
            except PeerTimeoutError as error:
                text = f"PeerTimeoutError: {error}"
        elif how == "as written":
            agreement.agree([GroupFingerprint(ranks.group.group_name, "b", "", "b", False)])
        elif how == "disabled":
            agreement.announce_unfused("has set FUSEWIRE_DISABLE=1")
            agreement.announce_unfused("has set FUSEWIRE_DISABLE=1")
    dist.barrier()
    return text


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("silent", "PeerTimeoutError: waited in vain for rank(s) 1 of group"),
        ("as written", "rank 1 compiled b"),
        ("disabled", "rank 1 has set FUSEWIRE_DISABLE=1"),
        ("compile_alone", "{}"),
    ],
)
def test_a_rank_that_rewrites_alone(how, says):
    text, _ = shared_pool(2).run(_alone, how)
    assert says in text


def _one_fails(options):
    ranks = Ranks()

    def broken(graph):
        raise ValueError("planted")

    hook = {"post_grad_custom_pre_pass": broken} if ranks.rank == 0 else {}

    def backend(model, example_inputs):
        fusewire_backend(model, example_inputs, options={**hook, **(options if ranks.rank == 1 else {})})
        return lambda *_: (torch.zeros(()),)

    error = ""
    with torch.no_grad():
        try:
            torch.compile(ranks.merged, backend=backend)(*ranks.inputs())
        except Exception as raised:
            error = str(raised)
    return error, [entry.reason for entry in fusewire.report().entries]


# With a cache of their own: where other tests have left the graph, the ranks agree before they compile.


def test_a_rank_whose_compilation_fails_keeps_nobody_waiting(tmp_path):
    (error, _), (second, reasons) = shared_pool(2).run(_one_fails, {}, cache_dir=tmp_path)
    assert "planted" in error
    assert second == ""  # no time limit was reached
    assert all("rank 0 could not compile a graph" in reason for reason in reasons), reasons


def test_an_expectation_that_the_ranks_defeat_says_so(tmp_path):
    _, (second, _) = shared_pool(2).run(_one_fails, {"expect_fused": "all"}, cache_dir=tmp_path)
    assert "expect_fused='all', but 0 of 2" in second
    assert "the ranks' graphs differ" in second


def _waiting_elsewhere():
    """Rank 1 waits before the graph that both compiled; rank 0 compiles another, which it also rewrites."""
    ranks = Ranks()

    def model(x, r, w, scaled):
        a, b = ranks.reduce(torch.tanh(x)), ranks.reduce(x * (0.25 if scaled else 0.5))
        return norm(r + (a + (b * 2.0 if scaled else b)), w)

    compiled = ranks.compile(model)
    x, r, w = ranks.inputs()
    ranks.call(compiled, (x, r, w, False), ranks.merged_want(x, r, w), "both")
    ranks.call(compiled, (x, r, w, ranks.rank == 0), ranks.merged_want(x, r, w), "apart")
    return ranks.seen


def test_a_rank_that_compiles_while_its_peer_waits_before_another_graph():
    text = check(shared_pool(2).run(_waiting_elsewhere))
    assert "that rank already waits before another graph" in text
    assert "PeerTimeoutError" not in text


def _loaded(first_meeting, same):
    """Rank 0 runs a graph that it has loaded, and posts nothing; rank 1 compiles."""
    ranks = Ranks()
    x, r, w = ranks.inputs()
    if not first_meeting:
        ranks.call(
            ranks.compile(lambda x, r, w: ranks.merged(x, r, w)), (x, r, w), ranks.merged_want(x, r, w), "before"
        )
    x, r, w = ranks.inputs(7)
    scale = 1.0 if same or ranks.rank else 2.0
    compiled = ranks.compile(lambda x, r, w: norm(r + ranks.reduce(torch.tanh(x)) * 0.5 * scale, w))
    tanh = sum(torch.tanh(x / (1 + ranks.rank) * (1 + rank)) for rank in range(2))
    with contextlib.ExitStack() as silent:
        for module in (manager, backend) if ranks.rank == 0 else ():
            silent.enter_context(mock.patch.object(module, "agree", return_value={}))
        ranks.call(compiled, (x, r, w), norm(r + tanh * 0.5 * scale, w), "loaded")
    return ranks.seen, [entry.status for entry in fusewire.report().entries]


@pytest.mark.parametrize("first_meeting", [True, False])
def test_a_rank_that_has_loaded_the_graph_is_not_waited_for(first_meeting):
    results = shared_pool(2).run(_loaded, first_meeting, True)
    check([seen for seen, _ in results], right=True)
    assert all(status == "fused" for _, statuses in results for status in statuses)


@pytest.mark.parametrize("first_meeting", [True, False])
def test_a_rank_that_has_loaded_another_graph(first_meeting):
    text = check([seen for seen, _ in shared_pool(2).run(_loaded, first_meeting, False)])
    assert "that rank already waits before another graph" in text


def _loaded_all(first):
    """Rank 0 runs two graphs that it has loaded; rank 1 compiles both before it runs one, as vLLM
    does."""
    name, x, found = dist.group.WORLD.group_name, torch.zeros(1), []
    if dist.get_rank() != first:
        found = [agreement.agree(_print(program, rewritten)) for program, rewritten in ("a1", "b2")]
    for program, rewritten in ("a1", "b2"):
        rendezvous.rendezvous(x, name, rewritten, program, True)
    return found


@pytest.mark.parametrize("first", [0, 1])
def test_a_rank_that_has_loaded_all_graphs_is_not_waited_for(first):
    results = shared_pool(2).run(_loaded_all, first)
    assert results[1 - first] == [{}, {}]


def test_simulated_ranks_have_nobody_to_ask():
    with fake_group(2):
        agreement.announce_unfused("nobody hears this")
        assert not agreement._groups or all(known.group() is None for known in agreement._groups.values())


def _without_a_store():
    """A group that torch.distributed has not made: its ranks cannot compare, so what was rewritten stays as written."""
    ranks = Ranks()
    known = dist.distributed_c10d._world.pg_map
    entry = known.pop(ranks.group)
    try:
        rewritten = GroupFingerprint(ranks.group.group_name, "a", "1", "a 1", True)
        return agreement.agree([rewritten]), agreement.agree([GroupFingerprint(rewritten.group, "a", "", "a", False)])
    finally:
        known[ranks.group] = entry


def test_a_group_without_a_store():
    for unfused, as_written in shared_pool(2).run(_without_a_store):
        (reason,) = unfused.values()
        assert "have no store in which they could compare" in reason
        assert as_written == {}
