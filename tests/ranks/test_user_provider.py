"""A provider of a user's that not every rank has, or that says no on one rank only: all ranks do the same nevertheless."""

from __future__ import annotations

import contextlib
import threading
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from fusewire.custom_ops.dispatch import dispatcher as dispatch
from fusewire.custom_ops.dispatch import provider_vote
from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm as op
from fusewire.custom_ops.ops.all_reduce_norm import sum_in_rank_order
from fusewire.custom_ops.ops.norms import SCALE_THEN_ROUND, NormSpec, add_residual, normalize
from fusewire.custom_ops.ops.registry import YES, Support
from fusewire.custom_ops.ops.sandwich_norm import all_reduce_sandwich_norm
from fusewire.custom_ops.ops.sharded_norm import all_reduce_rms_norm_sharded, gather_rows, own_rows
from fusewire.custom_ops.workspaces.registry import REGISTRY
from fusewire.errors import CaptureError, ConfigError, NoProviderError, SchemaError

from support.distributed import fake_group, shared_pool

HIDDEN = 16


def on_ranks(job, *args, size=2):
    return shared_pool(size).run(job, *args, timeout_s=40)


class Mine:
    """A provider that computes with another collective than native, and counts its calls."""

    def __init__(self, **checks):
        self.checks, self.calls = checks, 0

    def __call__(self, x, residual, weight, eps, weight_bias, form, group_name):
        self.calls += 1
        summed = sum_in_rank_order(x, group_name)
        if residual is not None:
            summed = add_residual(summed, residual)
        return normalize(summed, NormSpec(weight, eps, weight_bias, form)), summed

    @contextlib.contextmanager
    def registered(self, name="mine"):
        def mine(x, residual, weight, eps, weight_bias, form, group_name):
            return self(x, residual, weight, eps, weight_bias, form, group_name)

        op.register_impl(name, **self.checks)(mine)
        try:
            yield self
        finally:
            op.unregister_impl(name)


def say_no(reason="not installed"):
    return lambda *args: Support.no(reason)


def on_rank_1(check):
    """The check on rank 1; on the others a check that says yes."""
    return check if dist.get_rank() == 1 else lambda *args: YES


def few(x, *rest):
    return Support.all_of((x.shape[0] <= 4, f"{x.shape[0]} tokens; it takes 4"))


def broken(*args):
    raise ValueError("the driver is gone")


# On rank 1; rank 0 says yes to everything.
CHECKS = {
    "supported": lambda: {"supported": on_rank_1(say_no())},
    "supports_args": lambda: {"supports_args": on_rank_1(say_no("no such dtype"))},
    "supports_tokens": lambda: {"supports_tokens": on_rank_1(few)},
    "a check that raises": lambda: {"supports_args": on_rank_1(broken)},
    "checks on one rank only": lambda: {"supported": say_no()} if dist.get_rank() == 1 else {},
}
REASONS = {
    "supported": "on rank 1: not installed",
    "supports_args": "on rank 1: no such dtype",
    "supports_tokens": "on rank 1: 6 tokens; it takes 4",
    "a check that raises": "on rank 1: ValueError: the driver is gone",
    "checks on one rank only": "on rank 1: not installed",
}


def arguments(tokens=6):
    """Native's: x differs between the ranks, and every sum is exact."""
    generator = torch.Generator().manual_seed(tokens)
    x, residual = (torch.randint(-8, 9, (tokens, HIDDEN), generator=generator) / 8 for _ in range(2))
    weight = torch.randint(1, 9, (HIDDEN,), generator=generator) / 8
    return (x * (1 + dist.get_rank()), residual, weight, 1e-5, 0.0, SCALE_THEN_ROUND, dist.group.WORLD.group_name)


def same(got, wanted):
    return all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def said_by(call, *errors):
    try:
        call()
    except errors as error:
        return f"{type(error).__name__}: {error}"
    return ""


def job_differs(kind, on_gpu):
    with Mine(**CHECKS[kind]()).registered() as mine, mock.patch.object(dispatch, "on_gpu", return_value=on_gpu):
        right = [same(op(*arguments(tokens), policy="mine,native"), op.native(*arguments(tokens))) for tokens in (6, 5)]
        calls = mine.calls
        forced = said_by(lambda: op(*arguments(), policy="mine"), NoProviderError)
        return right, calls, forced


@pytest.mark.parametrize("on_gpu", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize("kind", CHECKS)
def test_one_rank_says_no(kind, on_gpu):
    """All pass the provider over, and the reason names the rank that cannot."""
    for right, calls, forced in on_ranks(job_differs, kind, on_gpu):
        assert right == [True, True]
        assert calls == 0
        assert f"mine: {REASONS[kind]}" in forced


def job_serves():
    found = []
    for checks in ({}, {"supported": lambda: YES}, {"supports_tokens": on_rank_1(few)}):
        with Mine(**checks).registered() as mine:
            for tokens in (3, 6, 4):
                before = mine.calls
                right = same(op(*arguments(tokens), policy="mine,native"), op.native(*arguments(tokens)))
                found.append((right, mine.calls - before))
    return found


def test_what_every_rank_can_do_is_done():
    """By number of tokens, and by a provider that is registered anew under a known name."""
    for found in on_ranks(job_serves):
        assert [right for right, _ in found] == [True] * 9
        assert [calls for _, calls in found] == [1, 1, 1, 1, 1, 1, 1, 0, 1]


def job_extended():
    with Mine(supported=on_rank_1(say_no())).registered() as mine:
        x, residual, weight, eps, bias, form, name = arguments()
        part = own_rows(residual, dist.get_rank(), dist.get_world_size())
        inner = (weight, eps, bias, form)
        calls = [
            (all_reduce_sandwich_norm, (x, residual, weight, eps, bias, form, *inner, name)),
            (all_reduce_rms_norm_sharded, (x, part, weight, eps, bias, form, None, 0.0, 0.0, "", name)),
        ]
        right = [same(each(*args, policy="mine,native"), each.native(*args)) for each, args in calls]
        return right, mine.calls


def test_operators_that_extend_it_follow():
    assert on_ranks(job_extended) == [([True, True], 0)] * 2


def job_missing(everywhere):
    mine = Mine()
    with contextlib.nullcontext() if everywhere or dist.get_rank() == 1 else mine.registered():
        said = [said_by(lambda: op(*arguments(), policy="mine,native"), ConfigError) for _ in range(2)]
    return said, mine.calls, same(op(*arguments(), policy="native"), op.native(*arguments()))


def test_a_provider_that_one_rank_lacks_is_an_error_on_all():
    for (first, second), calls, right in on_ranks(job_missing, False):
        assert first == second
        assert "on rank 0: without checks; on rank 1: not registered" in first
        assert "'mine'" in first
        assert (calls, right) == (0, True)


def test_a_provider_that_every_rank_lacks():
    for (first, _), _, _ in on_ranks(job_missing, True):
        assert "all_reduce_rms_norm has no provider 'mine'" in first


def job_no_reason():
    with Mine(supports_args=on_rank_1(lambda *args: False)).registered():
        return said_by(lambda: op(*arguments(), policy="mine,native"), SchemaError)


def test_a_no_without_a_reason_is_an_error_on_all_ranks():
    for said in on_ranks(job_no_reason):
        assert "on rank 1" in said
        assert "refuses with False, which has no reason" in said


@contextlib.contextmanager
def counted_votes():
    topics, vote = [], provider_vote.vote

    def count(channel, topic, work):
        topics.append(topic)
        return vote(channel, topic, work)

    with mock.patch.object(provider_vote, "vote", count):
        yield topics


def job_once():
    seen = []
    with Mine(supported=on_rank_1(say_no())).registered(), counted_votes() as topics:
        for tokens in (6, 6, 5):
            op(*arguments(tokens), policy="mine,native")
            seen.append(len(topics))
        if dist.get_rank() == 1:
            REGISTRY.changed()  # as another thread may do
        op(*arguments(5), policy="mine,native")
        seen.append(len(topics))
        # Another group has other ranks.
        group = dist.new_group([0, 1])
        op(*arguments(5)[:-1], group.group_name, policy="mine,native")
        return [*seen, len(topics)]


def test_the_ranks_vote_once():
    """On how it is registered, and then on each shape; also if one rank decides anew where others do not."""
    assert on_ranks(job_once) == [[2, 2, 3, 3, 5]] * 2


def job_own():
    with Mine().registered(), counted_votes() as topics:
        for policy in ("native", "rank_ordered,native", "native,mine", ""):
            op(*arguments(), policy=policy)
        for _ in range(3):
            op(*arguments(), policy="mine,native")
        return len(topics)


def test_nobody_asks_about_fusewires_own_providers_or_checks_that_are_not_there():
    assert on_ranks(job_own) == [1, 1]
    assert set(op.providers) == provider_vote.OWN


def job_capture():
    capturing = mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=True)
    said = []
    with (
        Mine(supported=on_rank_1(say_no())).registered(),
        mock.patch.object(torch.cuda, "is_available", return_value=True),
    ):
        call = lambda: op(*arguments(), policy="mine,native")  # noqa: E731
        with capturing:
            said.append(said_by(call, CaptureError))
        with mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=False):
            call()
        with capturing:
            said.append(said_by(call, CaptureError))
    return said


def test_no_vote_during_capture():
    for before, after in on_ranks(job_capture):
        assert before.startswith("CaptureError: mine is not voted on yet")
        assert "run the model once" in before
        assert after == ""


def job_alone():
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    name = groups[dist.get_rank()].group_name
    with Mine(supported=on_rank_1(say_no())).registered() as mine, counted_votes() as topics:
        op(*arguments()[:-1], name, policy="mine,native")
        return mine.calls, len(topics)


def test_a_rank_alone_decides_alone():
    assert on_ranks(job_alone) == [(1, 0), (0, 0)]


def test_ranks_that_are_only_pretended_are_not_asked():
    with fake_group(2), Mine(supported=say_no()).registered(), counted_votes() as topics:
        with pytest.raises(NoProviderError, match="mine: not installed"):
            op(*arguments(), policy="mine")
        assert topics == []


def job_gather():
    calls = []

    def mine(shard, like, group_name):
        calls.append(1)
        return gather_rows.native(shard * 2, like, group_name) / 2

    gather_rows.register_impl("mine", supported=on_rank_1(say_no()))(mine)
    try:
        like = torch.arange(5.0 * HIDDEN).view(5, HIDDEN)
        args = (own_rows(like, dist.get_rank(), 2), like, dist.group.WORLD.group_name)
        right = torch.equal(gather_rows(*args, policy="mine,native"), like)
        return right, len(calls), said_by(lambda: gather_rows(*args, policy="mine"), NoProviderError)
    finally:
        gather_rows.unregister_impl("mine")


def test_the_other_collective_operator_goes_by_the_vote_too():
    for right, calls, forced in on_ranks(job_gather):
        assert (right, calls) == (True, 0)
        assert "mine: on rank 1: not installed" in forced


def test_threads_ask_once():
    outcomes, asked = provider_vote._Outcomes(), []

    def ask():
        asked.append(1)
        time.sleep(0.05)
        return {"mine": YES}

    found = []
    threads = [threading.Thread(target=lambda: found.append(outcomes.once("key", ask))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(asked) == 1
    assert found == [{"mine": YES}] * 8
    assert outcomes.turns == {}


def test_an_error_is_not_kept():
    outcomes = provider_vote._Outcomes()
    with pytest.raises(ConfigError):
        outcomes.once("key", mock.Mock(side_effect=ConfigError("planted")))
    assert outcomes.once("key", lambda: 1) == 1
