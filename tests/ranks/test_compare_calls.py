"""FUSEWIRE_DEBUG_CALLS: ranks that make different calls are named before anything is launched."""

from __future__ import annotations

import contextlib
import os
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import fusewire
from fusewire.custom_ops.dispatch import compare_calls
from fusewire.custom_ops.ops.sandwich_norm import all_reduce_sandwich_norm
from fusewire.errors import ConfigError, PeerTimeoutError, RankMismatchError

from support.distributed import shared_pool

SCALE = "scale_then_round"


@contextlib.contextmanager
def debugging(on="1"):
    compare_calls.comparing.cache_clear()
    compare_calls._counts.clear()
    with mock.patch.dict(os.environ, {compare_calls.VARIABLE: on, "FUSEWIRE_TIMEOUT_S": "2"}):
        yield
    compare_calls.comparing.cache_clear()


def call(tokens=4, dtype=torch.float32, residual=True, eps=1e-6, policy="native", sandwich=False):
    x = torch.ones(tokens, 16, dtype=dtype)
    inner = (x[0], 1e-6, 0.0, SCALE) if sandwich else ()
    op = all_reduce_sandwich_norm if sandwich else fusewire.all_reduce_rms_norm
    return op(x, x if residual else None, x[0], eps, 0.0, SCALE, *inner, dist.group.WORLD.group_name, policy=policy)


def job_differs(calls, options):
    """Rank 0 makes `calls` plain calls and one more; rank 1 makes one with these options instead of
    the last."""
    with debugging():
        for _ in range(calls):
            call()
        try:
            call(**(options if dist.get_rank() else {}))
        except RankMismatchError as error:
            text = str(error)
        else:
            text = "no error"
    dist.barrier()
    return text


@pytest.mark.parametrize(
    ("options", "rank0", "rank1"),
    [
        ({}, "no error", "no error"),
        (
            {"tokens": 8},
            "call 3, all_reduce_rms_norm: x float32 [4, 16]",
            "call 3, all_reduce_rms_norm: x float32 [8, 16]",
        ),
        ({"dtype": torch.bfloat16}, "x float32 [4, 16]", "x bfloat16 [4, 16]"),
        ({"residual": False}, "residual float32 [4, 16]", "residual None"),
        ({"eps": 1e-5}, "eps 1e-06", "eps 1e-05"),
        ({"policy": "rank_ordered"}, "providers native", "providers rank_ordered"),
        ({"sandwich": True}, "call 3, all_reduce_rms_norm", "call 3, all_reduce_sandwich_norm"),
    ],
)
def test_both_sides_are_named_on_both_ranks(options, rank0, rank1):
    first, second = shared_pool(2).run(job_differs, 2, options)
    assert first == second
    assert f"rank 0: {rank0}" in first or rank0 in first.partition("rank 1: ")[0]
    assert rank1 in first.partition("rank 1: ")[2] or rank1 == first


def job_skips():
    """Rank 1 leaves out a call and makes the next, with another shape."""
    with debugging():
        call()
        if dist.get_rank() == 0:
            with pytest.raises(RankMismatchError) as error:
                call()
        else:
            with pytest.raises(RankMismatchError) as error:
                call(tokens=8)
    dist.barrier()
    return str(error.value)


def test_a_call_that_one_rank_leaves_out_is_noticed_at_the_next():
    for text in shared_pool(2).run(job_skips):
        assert "rank 0: call 2, all_reduce_rms_norm: x float32 [4, 16]" in text
        assert "rank 1: call 2, all_reduce_rms_norm: x float32 [8, 16]" in text


def job_absent():
    text = ""
    with debugging():
        call()
        if dist.get_rank() == 0:
            with pytest.raises(PeerTimeoutError) as error:
                call()
            text = str(error.value)
        dist.barrier()
    return text


def test_a_rank_that_makes_no_call_is_named():
    assert "rank(s) 1" in shared_pool(2).run(job_absent)[0]


def job_path():
    """The same arguments, and a provider that only one rank would take."""
    from fusewire.custom_ops.dispatch import dispatcher

    decide = dispatcher.decide

    def other(op, args, policy):
        return decide(op, args, "rank_ordered" if dist.get_rank() else policy)

    with debugging(), mock.patch.object(dispatcher, "decide", other), pytest.raises(RankMismatchError) as error:
        call()
    dist.barrier()
    return str(error.value)


def test_another_path_is_named():
    for text in shared_pool(2).run(job_path):
        assert "rank 0: all_reduce_rms_norm by native; rank 1: all_reduce_rms_norm by rank_ordered" in text


def job_off():
    with debugging(on=""), mock.patch.object(compare_calls, "vote", side_effect=AssertionError):
        call()
    with debugging(on="maybe"), pytest.raises(ConfigError, match=compare_calls.VARIABLE):
        call()
    return True


def test_nothing_is_compared_by_default():
    assert shared_pool(2).run(job_off) == [True, True]
