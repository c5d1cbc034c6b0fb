"""Random programs through the passes (see fuzz.py): a fixed set on every run, many every night.

The seeds start at FUSEWIRE_FUZZ_SEED (0 by default). A failure prints its seed, the command that repeats it, and the
source of the program, reduced to the layers that it takes.
"""

from __future__ import annotations

import operator
import os
import warnings
from collections import Counter

import pytest
import torch

from fusewire.fusion_passes import carriers, eliminate_noops, fuse_all_reduce, merge_all_reduces, norm_reader, raise_ops
from fusewire.fusion_passes.graph_tools import aten
from fusewire.patterns import norms

import fuzz
from distributed import shared_pool

FIRST = int(os.environ.get("FUSEWIRE_FUZZ_SEED", "0"))
GRAPHS, CHUNK, GLOO = 300, 50, 20


def chunk(start: int, size: int) -> range:
    return range(FIRST + start, FIRST + start + size)


def no_failures(failures: list[fuzz.Failure]) -> None:
    if failures:
        pytest.fail("\n\n".join(map(str, failures)), pytrace=False)


@pytest.mark.parametrize("start", range(0, GRAPHS, CHUNK))
def test_passes_keep_results_and_verdicts(start):
    no_failures(fuzz.run_in_process(chunk(start, CHUNK))[0])


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
    assert set(fuzz.MISSES) <= set(many)


# The checker: passes that are broken on purpose must be caught


def yes(*_, **__):
    return fuse_all_reduce.YES


def without_clause(name):
    return [(fuse_all_reduce, "CLAUSES", tuple(c for c in fuse_all_reduce.CLAUSES if c.__name__ != name))]


def without_obstacle(words):
    """A raise pass that goes on where `_obstacle` refuses with these words."""
    real = raise_ops._Raiser._obstacle

    def obstacle(self, norm, path, residual):
        reason = real(self, norm, path, residual)
        return "" if words in reason else reason

    return [(raise_ops._Raiser, "_obstacle", obstacle)]


def swapped_outputs(graph, node, index):
    item = graph.call_function(operator.getitem, (node, 1 - index))
    item.meta["val"] = node.meta["val"][1 - index]
    return item


def forgets_weight_bias(user, value, hidden):
    found = real_weight_of(user, value, hidden)
    return None if found is None else (found[0], 0.0, found[2])


def rounded_sum_unrounded(user, value, hidden):
    """Reads `1 + w`, rounded in the weight's dtype, as Gemma's `1 + w` in fp32."""
    found = real_weight_of(user, value, hidden)
    if found is None or found[1]:
        return found
    operands = norm_reader.plain_add(found[0])
    if operands is None or not norm_reader.is_number(operands[1]):
        return found
    return operands[0], operands[1], found[2]


def scale_not_moved(path, *kinds):
    return tuple(step for step in path.steps if step.kind in kinds and step.kind != carriers.SCALE)


real_weight_of = norm_reader._weight_of
MUTANTS = {
    "any reduction is a sum": ("other reduction", without_clause("check_reduction")),
    "one rank is enough": ("group of one rank", without_clause("check_group")),
    "any weight": ("wide weight", without_clause("check_weight")),
    "any residual": ("wide residual", without_clause("check_residual")),
    "broadcast residual": ("broadcast residual", without_clause("check_residual")),
    "any epsilon": ("negative epsilon", without_clause("check_epsilon")),
    "further readers ignored": ("all-reduce also read", [(fuse_all_reduce._Fuser, "_check_readers", yes)]),
    "order ignored": ("collective between", [(fuse_all_reduce._Fuser, "_check_order", yes)]),
    "own result added": ("doubled", without_obstacle("computed from that result")),
    "steps also read": ("step also read", without_obstacle("is also read elsewhere")),
    "weight of the sum": ("weight of the sum", without_obstacle("the norm's weight")),
    "epsilon of the sum": ("epsilon of the sum", without_obstacle("the norm's eps")),
    "strides ignored": ("strided residual", without_obstacle("is not contiguous")),
    # Both refuse it: with either alone nothing goes wrong.
    "broadcast sum": ("broadcast all-reduce", [*without_obstacle("broadcast"), *without_clause("check_residual")]),
    "outputs swapped": ("", [(raise_ops, "getitem", swapped_outputs)]),
    "weight bias lost": ("", [(norm_reader, "_weight_of", forgets_weight_bias)]),
    "rounding of 1 + w lost": ("", [(norm_reader, "_weight_of", rounded_sum_unrounded)]),
    "rounding order lost": ("", [(norm_reader, "tail_form", lambda steps: norms.SCALE_THEN_ROUND)]),
    "rounding order turned": ("", [(norm_reader, "tail_form", lambda steps: norms.ROUND_THEN_SCALE)]),
    "any dimension": ("mean over tokens", [(norm_reader, "_over_last_dimension", lambda mean, wide: True)]),
    "any product": ("product, not square", [(norm_reader, "_squared", lambda node: node.args[0])]),
    "any mean": ("sum of squares", [(norm_reader, "_is_mean", lambda node: node.op == "call_function")]),
    "alpha ignored": ("alpha", [(raise_ops, "plain_add", lambda node: tuple(node.args[:2]))]),
    "narrow arithmetic": (
        "narrow arithmetic",
        [(norm_reader, "_computed_in", norm_reader.dtype_of)],
    ),
    "double arithmetic": ("double arithmetic", [(norm_reader, "_computed_in", lambda node: torch.float64)]),
    "scales dropped": ("", [(carriers.Path, "of_kind", scale_not_moved)]),
    "views dropped": ("", [(raise_ops, "VIEW", "nothing")]),
    "relu is a view": ("relu", [(carriers, "VIEWS", carriers.VIEWS | {aten.relu.default})]),
    "slice is a view": ("slice", [(carriers, "VIEWS", carriers.VIEWS | {aten.slice.Tensor})]),
    "any group merges": ("two all-reduces", [(merge_all_reduces, "_same_reduction", lambda a, b: True)]),
    "copies are no-ops": ("", [(eliminate_noops, "_same_layout", lambda node, source: True)]),
}


@pytest.mark.nightly
@pytest.mark.parametrize("name", MUTANTS)
def test_broken_passes_are_caught(name, monkeypatch):
    miss, changes = MUTANTS[name]
    for owner, attribute, value in changes:
        monkeypatch.setattr(owner, attribute, value)
    seeds = (seed for seed in chunk(0, 100_000) if any(site.miss == miss for site in fuzz.generate(seed).sites))
    with fuzz.fake_group(2), fuzz.groups() as factors:
        caught = (fuzz.check(fuzz.generate(next(seeds)), factors) for _ in range(400))  # up to the first that is
        assert any(caught), f"400 programs went through the broken passes ({name}) unharmed"
