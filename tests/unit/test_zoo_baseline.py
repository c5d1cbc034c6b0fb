"""The zoo and the harness are right: everything else that runs on several ranks rests on them."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from support.distributed import RankFailure, RankPool, RankTimeout, fake_group, shared_pool
from support.zoo import MODELS, forward_logits, prefill_and_decode

WORLD_SIZE = 2
DECODE_STEPS = 3


@pytest.fixture(scope="module")
def pool() -> RankPool:
    return shared_pool(WORLD_SIZE)


def _require(name: str) -> None:
    if reason := MODELS[name].skip_reason:
        pytest.skip(reason)


def _sharded_logits(name: str) -> torch.Tensor:
    spec = MODELS[name]
    with torch.no_grad():
        return forward_logits(spec.build(torch.float32), spec.inputs(2, 8))


def _decoded_logits(name: str, cache: str) -> torch.Tensor:
    spec = MODELS[name]
    with torch.no_grad():
        return torch.cat(prefill_and_decode(spec.build(torch.float32), spec.inputs(2, 8), DECODE_STEPS, cache), 1)


def _reference_logits(name: str) -> torch.Tensor:
    spec = MODELS[name]
    with torch.no_grad():
        return forward_logits(spec.reference(torch.float32), spec.inputs(2, 8))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_sharded_model_equals_the_whole_one(pool: RankPool, name: str) -> None:
    _require(name)
    expected = _reference_logits(name)
    ranks = pool.run(_sharded_logits, name)
    assert all(torch.equal(ranks[0], other) for other in ranks[1:])
    torch.testing.assert_close(ranks[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_decoding_with_a_cache_equals_one_forward_pass(pool: RankPool, cache: str) -> None:
    _require("llama")
    expected = _reference_logits("llama")
    torch.testing.assert_close(pool.run(_decoded_logits, "llama", cache)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "center"), [("llama", 1.0), ("gemma2", 0.0)])
def test_norm_weights_are_random_around_what_the_model_starts_with(name: str, center: float) -> None:
    _require(name)
    weights = [p for n, p in MODELS[name].reference(torch.float32).named_parameters() if "norm" in n]
    assert weights
    for weight in weights:
        assert weight.std() > 0.1
        assert abs(weight.mean().item() - center) < 0.1


def _fail_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise KeyError("only here")
    dist.barrier()


def _die_on_rank_1() -> None:
    if dist.get_rank() == 1:
        os._exit(7)
    dist.barrier()


def _wait_for_nobody() -> None:
    if dist.get_rank() == 0:
        dist.barrier()


def _sum_of_ranks() -> torch.Tensor:
    ranks = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(ranks)
    return ranks


def _cache_directory() -> str:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return cache_dir()


def test_failing_rank_is_named_and_the_others_do_not_hang() -> None:
    with RankPool(WORLD_SIZE) as pool:
        with pytest.raises(KeyError, match="only here") as caught:
            pool.run(_fail_on_rank_1, timeout_s=60)
        assert isinstance(caught.value.__cause__, RankFailure)
        assert caught.value.__cause__.rank == 1
        assert "_fail_on_rank_1" in caught.value.__cause__.details
        assert pool.run(_sum_of_ranks) == [torch.tensor([1.0])] * WORLD_SIZE


def test_dead_rank_is_reported() -> None:
    with RankPool(WORLD_SIZE) as pool, pytest.raises(RankFailure, match=r"rank 1 .*\n.*exit code 7"):
        pool.run(_die_on_rank_1, timeout_s=60)


def test_stuck_rank_ends_in_time_with_its_stack() -> None:
    with RankPool(WORLD_SIZE) as pool:
        pool.run(_sum_of_ranks)
        start = time.monotonic()
        with pytest.raises(RankTimeout, match=r"rank\(s\) \[0(.|\n)*_wait_for_nobody"):
            pool.run(_wait_for_nobody, timeout_s=3)
        assert time.monotonic() - start < 30


def test_cache_directory_holds_for_one_call(pool: RankPool, tmp_path: Path) -> None:
    before = pool.run(_cache_directory)
    assert pool.run(_cache_directory, cache_dir=tmp_path) == [str(tmp_path)] * WORLD_SIZE
    assert pool.run(_cache_directory) == before
    assert str(tmp_path) not in before


def test_fake_group_leaves_nothing_behind() -> None:
    with fake_group(4, rank=2):
        assert (dist.get_world_size(), dist.get_rank()) == (4, 2)
        with pytest.raises(RuntimeError, match="exists already"), fake_group(2):
            pass
    assert not dist.is_initialized()
