"""Random programs through the passes (see __main__.py): a fixed set on every run, many every night.

The seeds start at FUSEWIRE_FUZZ_SEED (0 by default). A failure prints its seed, the command that repeats it, and the
source of the program, reduced to the layers that it takes.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections import Counter

import pytest
import torch
import torch.distributed as dist

import fusewire

from fuzz import __main__ as fuzz
from fuzz import compiled as fuzz_compiled
from fuzz import differ as fuzz_differ
from fuzz.faults import FAULTS, holds
from support.distributed import shared_pool

FIRST = int(os.environ.get("FUSEWIRE_FUZZ_SEED", "0"))
GRAPHS, CHUNK, GLOO = 300, 50, 20
OFTEN = 150  # programs that every run checks; the nightly one checks all


def chunk(start: int, size: int) -> range:
    return range(FIRST + start, FIRST + start + size)


def no_failures(failures: list[fuzz.Failure]) -> None:
    if failures:
        pytest.fail("\n\n".join(map(str, failures)), pytrace=False)


@functools.cache
def checked(start: int) -> tuple[list[fuzz.Failure], Counter[str]]:
    return fuzz.run_in_process(chunk(start, CHUNK))


# What two tests look at.
SHARED = (0, CHUNK)


STARTS = [pytest.param(start, marks=[pytest.mark.nightly] * (start >= OFTEN)) for start in range(0, GRAPHS, CHUNK)]


@pytest.mark.parametrize("start", STARTS)
def test_passes_keep_results_and_verdicts(start):
    no_failures(checked(start)[0])


def test_results_on_two_processes():
    """Real all-reduces, of different values on each rank."""
    no_failures(fuzz.run_on_gloo(shared_pool(2), chunk(0, GLOO)))


@pytest.mark.nightly
@pytest.mark.timeout(4 * 3600)
def test_ten_thousand_graphs():
    no_failures(fuzz.run_in_process(chunk(100_000, 10_000))[0])


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("start", range(0, 500, 50))
def test_five_hundred_graphs_on_two_processes(start):
    no_failures(fuzz.run_on_gloo(shared_pool(2), chunk(200_000 + start, 50), timeout_s=900))


def results_in_buffers_agree(seeds):
    found = shared_pool(2).run(fuzz_compiled.compiled_on_rank, seeds, timeout_s=600)
    no_failures([difference for differences, _ in found for difference in differences])
    return found[0][1]


def chains(start, size):
    return [seed for seed in chunk(start, size) if fuzz_compiled.fits(fuzz.generate(seed))]


def test_compiled_results_in_buffers():
    """Inductor's own code of a program whose results stay in buffers; more of it is in test_place_outputs.py."""
    assert results_in_buffers_agree([111])


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("start", range(0, 400, 80))
def test_compiled_results_in_buffers_of_many(start):
    assert results_in_buffers_agree(chains(410_000 + start, 80))


# Inductor's own code, of the fused graph and of the plain one

CLOSE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}  # in units of the output's mean magnitude


def compiled(program, **kwargs):
    """What a program returns and leaves of its arguments, once Inductor has generated code for it."""
    torch._dynamo.reset()
    arguments = fuzz.make_arguments(program, 0)
    settings = {"emulate_precision_casts": True, "compile_threads": 1}
    with torch.no_grad(), warnings.catch_warnings(), torch._inductor.config.patch(settings):
        warnings.simplefilter("ignore")
        function = torch.compile(fuzz.module_of(program), dynamic=program.dynamic, fullgraph=True, **kwargs)
        return [*function(*arguments), *arguments]


def generated_code_agrees(program):
    with fuzz.fake_group(2), fuzz.groups():
        plain = compiled(program)
        fused = compiled(program, backend="fusewire", options={"inline_native": program.seed % 2 == 0})
    close = CLOSE[next(iter(program.inputs.values())).dtype] * (20 if program.may_move else 1)
    for want, got in zip(plain, fused, strict=True):
        assert want.stride() == got.stride()
        scale = float(want.double().abs().mean()) + 1e-3 if want.numel() else 1.0
        torch.testing.assert_close(
            got, want, rtol=0, atol=close * scale, equal_nan=True, msg=lambda m: f"{m}\n{program}"
        )


@pytest.mark.parametrize("which", range(2))
def test_generated_code(which):
    """Programs that call fusewire's operators, which stay calls: Inductor must take them as the passes leave them."""
    first_layers = (fuzz.generate(seed, [0]) for seed in chunk(0, 400) if seed % 2)
    generated_code_agrees([program for program in first_layers if "fusewire." in program.source][which])


@pytest.mark.nightly
@pytest.mark.parametrize("seed", chunk(300_000, 60))
def test_generated_code_of_many(seed):
    generated_code_agrees(fuzz.generate(seed))


# Ranks that differ

DIFFER = 8


def right_or_all_raise(seeds):
    failed, seen = fuzz_differ.run_seeds(shared_pool(2), seeds)
    no_failures(failed)
    return seen


def test_ranks_that_differ():
    seen = right_or_all_raise(chunk(0, DIFFER))
    assert seen["plans where all is right"] >= DIFFER // 3, seen
    assert seen["plans with collectives that mix with no others"], seen


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("start", range(0, 200, 50))
def test_many_ranks_that_differ(start):
    right_or_all_raise(chunk(500_000 + start, 50))


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("fault", fuzz_differ.FAULTS)
def test_broken_coordination_is_caught(fault):
    """Without one of its guards fusewire gives wrong numbers, or another guard is there."""
    if not fuzz_differ.FAULTS[fault].shows:
        no_failures(fuzz_differ.run_seeds(shared_pool(2), chunk(0, 60), fault)[0])
        return
    results = (fuzz_differ.run_seed(shared_pool(2), seed, fault) for seed in chunk(0, 200))
    assert any(not result.unfit and any(outcome.wrong for outcome in result.outcomes) for result in results)


def test_plans_depend_on_their_seed_alone_and_try_everything():
    plans = [fuzz_differ.plan_of(seed) for seed in chunk(0, 40)]
    assert list(map(str, plans)) == [str(fuzz_differ.plan_of(seed)) for seed in chunk(0, 40)]
    many = [fuzz_differ.plan_of(seed) for seed in chunk(0, 600)]
    assert {change.kind for plan in many for change in plan.changes} == set(fuzz_differ.KINDS)
    assert set(fuzz_differ.OPTIONS) == set(fusewire.PassConfig.field_names())


# The generator


def test_programs_depend_on_their_seed_alone():
    assert [str(fuzz.generate(seed)) for seed in chunk(0, 40)] == [str(fuzz.generate(seed)) for seed in chunk(0, 40)]
    assert len({fuzz.generate(seed).source for seed in chunk(0, 40)}) == 40


def test_a_layer_stays_the_same_without_the_others():
    program = next(p for p in map(fuzz.generate, chunk(0, 100)) if len(p.layers) == 3 and len(p.sites) == 3)
    alone = fuzz.generate(program.seed, [2])
    assert [site.miss for site in alone.sites] == [program.sites[2].miss]


def test_enough_near_misses_and_every_kind():
    sites = [site for seed in chunk(0, GRAPHS) for site in fuzz.generate(seed).sites]
    misses = Counter(site.miss for site in sites)
    assert misses[""] <= 0.6 * len(sites)
    assert sum(site.expect == fuzz.REFUSED for site in sites) >= 0.25 * len(sites)
    many = Counter(site.miss for seed in chunk(0, 2000) for site in fuzz.generate(seed).sites)
    assert {*fuzz.MISSES, *fuzz.SEQUENCE_MISSES} <= set(many)


def test_passes_have_something_to_do():
    """Sequence parallelism fuses, residuals are sharded and gathered, results stay in place: none of it for nothing."""
    seen = sum((checked(start)[1] for start in SHARED), Counter())
    for what in ("reduce-scatters fused", "sharded operators", "residuals gathered", "results in place"):
        assert seen[what] >= 2, seen


def test_ranks_at_different_collectives_are_an_error():
    def work(late, rank):
        x = torch.ones(4, 2)
        name = dist.group.WORLD.group_name
        ops = torch.ops._c10d_functional
        if rank == late:
            x = ops.all_gather_into_tensor(x, 2, name)
        return ops.all_reduce(x, "sum", name)

    with fuzz.fake_group(2), fuzz.groups() as ranks:
        for late in (0, 1):
            with pytest.raises(RuntimeError, match="different collectives"):
                ranks.run(functools.partial(work, late))
        results = ranks.run(functools.partial(work, 2))
    assert all(torch.equal(result, torch.full((4, 2), 2.0)) for result in results)


# The checker: passes that are broken on purpose (see faults.py) must be caught


@pytest.mark.nightly
@pytest.mark.parametrize("name", FAULTS)
def test_broken_passes_are_caught(name, monkeypatch):
    where, changes = FAULTS[name]
    for owner, attribute, value in changes:
        monkeypatch.setattr(owner, attribute, value)
    programs = (program for program in map(fuzz.generate, chunk(0, 100_000)) if holds(program, where))
    with fuzz.fake_group(2), fuzz.groups() as ranks:
        caught = (fuzz.check(next(programs), ranks) for _ in range(400))  # up to the first that is
        assert any(caught), f"400 programs went through the broken passes ({name}) unharmed"
