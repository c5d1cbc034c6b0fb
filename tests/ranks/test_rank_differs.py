"""Rank 0 differs by X: the result is what the program says, or every rank raises in time. Never numbers, never a hang."""

from __future__ import annotations

import functools
import re
import shutil
import tempfile
import time
from pathlib import Path

import pytest
import torch

import fusewire
from fusewire import custom_ops, fusion_passes, patterns
from fusewire.custom_ops.coordination.timeouts import Limit
from fusewire.custom_ops.dispatch import compare_calls

from support.distributed import shared_pool
from support.rank_programs import SHORT_S, Ranks, check, environment, norm

# For each option a value that a rank might have where the others have the default.
OPTIONS = {
    "fuse_allreduce_rms": False,
    "fuse_sandwich_norms": False,
    "fuse_sequence_parallel": False,
    "fuse_quantization": False,
    "shard_residual": True,
    "output_in_place": True,
    "eliminate_noops": False,
    "fi_allreduce_fusion_max_size_mb": 1.0,
    "ir_op_priority": {"all_reduce_rms_norm": ("rank_ordered", "native")},
    "batch_invariant": True,
    "inline_native": False,
    "allow_reassociation": False,
    "merge_allreduces": False,
    "assume_replicated_scales": False,
    "assume_replicated_gates": True,
    "assume_replicated_residuals": False,
    "expect_fused": 1,
    "compile_alone": True,
    "disabled_passes": ("raise_ops",),
    "dump_graphs": "",
}
# Tried in every run: the others change little of a graph, or end at a time limit.
OFTEN = ("batch_invariant", "compile_alone", "inline_native", "ir_op_priority", "merge_allreduces", "shard_residual")
VARIABLES = {
    "FUSEWIRE_DISABLE": "1",
    "FUSEWIRE_BATCH_INVARIANT": "1",
    "FUSEWIRE_TIMEOUT_S": "80",
    "FUSEWIRE_ON_FAULT": "abort",
    "FUSEWIRE_TUNE": "1",
    "FUSEWIRE_CACHE_DIR": "",
}
# FUSEWIRE_TIMEOUT_S scales all limits. The other is read once in a process: see
# test_compare_calls.py. vLLM's front end reads the last and hands all ranks one configuration.
LEFT_OUT = {*(limit.variable for limit in Limit), compare_calls.VARIABLE, "FUSEWIRE_VLLM"}


def nightly(*values):
    """A parameter of a test that is too long for every run."""
    return pytest.param(*values, marks=pytest.mark.nightly)


def run(case, *arguments, world=2, cache_dir=None):
    return shared_pool(world).run(case, *arguments, cache_dir=cache_dir)


def program(ranks, scale):
    """A merged pair, and scaled sums in a chain that can be sharded: something for every option."""

    def model(x, r, w):
        out, _ = ranks.merged(x, r, w)
        residual = r
        for _ in range(2):
            residual = residual + ranks.reduce(x) * scale
            out = out + norm(residual, w)
        return out

    return model


def want(ranks, x, r, w, scale):
    out, residual = ranks.merged_want(x, r, w), r
    for _ in range(2):
        residual = residual + ranks.total(x) * scale
        out = out + norm(residual, w)
    return out


# --- Options and environment variables --------------------------------------------------------------------------


def _options(options, differ):
    ranks = Ranks()
    with tempfile.TemporaryDirectory() as folder:
        if "dump_graphs" in options:
            options = {"dump_graphs": folder}
        chosen = options if ranks.rank == 0 or not differ else {}
        compiled = ranks.compile(program(ranks, 0.5), **chosen)
        for tokens in (32, 32):
            x, r, w = ranks.inputs(tokens)
            ranks.call(compiled, (x, r, w), want(ranks, x, r, w, 0.5), f"{tokens} tokens")
    return ranks.seen


@pytest.mark.parametrize("name", [name if name in OFTEN else nightly(name) for name in OPTIONS])
def test_an_option(name):
    check(run(_options, {name: OPTIONS[name]}, True))


def test_every_option_is_tried():
    assert set(OPTIONS) == set(fusewire.PassConfig.field_names())


def _variable(name, value):
    ranks = Ranks()
    with tempfile.TemporaryDirectory() as folder, environment(**({name: value or folder} if ranks.rank == 0 else {})):
        compiled = ranks.compile(program(ranks, 0.5))
        for tokens in (32, 32):
            x, r, w = ranks.inputs(tokens)
            ranks.call(compiled, (x, r, w), want(ranks, x, r, w, 0.5), f"{tokens} tokens")
    return ranks.seen


@pytest.mark.parametrize("name", VARIABLES)
def test_an_environment_variable(name):
    check(run(_variable, name, VARIABLES[name]), right=True)


def test_every_environment_variable_is_tried():
    folders = [Path(package.__path__[0]) for package in (custom_ops, patterns, fusion_passes, fusewire)]
    text = "".join(file.read_text() for folder in folders for file in folder.rglob("*.py"))
    assert set(VARIABLES) | LEFT_OUT == set(re.findall(r'"(FUSEWIRE_[A-Z_]+)"', text))


# --- Graphs -----------------------------------------------------------------------------------------------------


def _graph(kind):
    """Both ranks compile, each its own graph."""
    ranks = Ranks()
    first = ranks.rank == 0

    def logs(x, r, w):
        return ranks.merged(x, r, w, log=first)

    def breaks(x, r, w):
        a, b = ranks.reduce(torch.tanh(x)), ranks.reduce(x * 0.5)
        if first:
            torch._dynamo.graph_break()
        return norm(r + (a + b), w)

    def number(x, r, w):
        total = ranks.reduce(torch.tanh(x)) * (0.5 if first else 0.25) * (1.0 if first else 2.0)
        return norm(r + total * 2 + ranks.reduce(x * 0.5), w)

    def constant(x, r, w):
        total = ranks.reduce(torch.tanh(x)) * torch.tensor(0.5 if first else 0.25)
        return norm(r + total * (2 if first else 4) + ranks.reduce(x * 0.5), w)

    def order(x, r, w):
        scale = 2.0 if first else 1.0
        a = ranks.reduce(torch.tanh(x) / scale) * scale
        return norm(r + a + ranks.reduce(x * 0.5), w)

    def epsilon(x, r, w):
        out, _ = ranks.merged(x, r, w)
        return out if first else out * (1 + 0 * x)

    functions = (logs, breaks, number, constant, order, epsilon)
    compiled = ranks.compile(next(function for function in functions if function.__name__ == kind))
    for tokens in (6, 6, 7):
        x, r, w = ranks.inputs(tokens)
        ranks.call(compiled, (x, r, w), ranks.merged_want(x, r, w), f"{tokens} tokens")
    return ranks.seen


@pytest.mark.parametrize("kind", ["logs", "breaks", "number", "constant", "epsilon"])
@pytest.mark.parametrize("world", [2, nightly(3)])
def test_a_graph(kind, world):
    check(run(_graph, kind, world=world), right=True)


def test_a_scale_on_both_sides_of_the_sum():
    """The program itself sums different things, so only this much holds: nobody gets numbers that nobody asked for."""
    for of_rank in run(_graph, "order"):
        assert all("6 tokens" in line or "7 tokens" in line for line in of_rank)


def _late_variant(agreed_before):
    """Rank 0 alone compiles another graph after both run a fused one."""
    ranks = Ranks()
    compiled = ranks.compile(ranks.merged)
    x, r, w = ranks.inputs()
    expected = ranks.merged_want(x, r, w)
    if agreed_before:
        ranks.call(compiled, (x, r, w, True), expected, "both log")
    ranks.call(compiled, (x, r, w, False), expected, "fused")
    fused = ranks.merges
    ranks.call(compiled, (x, r, w, ranks.rank == 0), expected, "rank 0 logs")
    ranks.call(compiled, (x, r, w, False), expected, "fused again")
    return ranks.seen, fused


@pytest.mark.parametrize(("agreed_before", "world"), [(False, 2), (True, 3), nightly(False, 3), nightly(True, 2)])
def test_a_rank_that_goes_another_way_later(agreed_before, world):
    results = run(_late_variant, agreed_before, world=world)
    text = check([seen for seen, _ in results])
    assert all(fused for _, fused in results), text
    assert "do not fit together" in text
    assert "as written" in text
    assert "merged" in text


def _draft():
    """Rank 0 compiles the same code unsharded once more (a draft model): the pairs that follow stay pairs."""
    ranks = Ranks()
    torch._dynamo.config.recompile_limit = 16

    def block(x, r, w, sharded, log):
        return ranks.merged(x, r, w, log) if sharded else (norm(r + torch.tanh(x), w), None)

    compiled, fused = ranks.compile(block), []
    x, r, w = ranks.inputs()
    if ranks.rank == 0:
        ranks.call(compiled, (x, r, w, False, False), norm(r + torch.tanh(x), w), "draft")
    for tokens, log in ((6, False), (7, ranks.rank == 0), (8, False)):
        x, r, w = ranks.inputs(tokens)
        ranks.call(compiled, (x, r, w, True, log), ranks.merged_want(x, r, w), f"{tokens} tokens")
        fused.append(ranks.merges)
    torch._dynamo.config.recompile_limit = 8
    return ranks.seen, fused


def test_one_compilation_more_on_one_rank():
    results = run(_draft)
    check([seen for seen, _ in results], right=True)
    assert [fused for _, fused in results] == [[1, 1, 2], [1, 1, 2]]  # merged wherever the ranks are alike


# --- Ranks that are late, or run without compiling ----------------------------------------------------------------


def _late(where):
    ranks = Ranks()
    compiled = ranks.compile(ranks.merged)
    for tokens in (6, 8):
        x, r, w = ranks.inputs(tokens)
        if ranks.rank == 0:
            time.sleep(0.5)
        ranks.call(
            compiled,
            (x, r, w, where == "both" or (where == "first" and ranks.rank == 0)),
            ranks.merged_want(x, r, w),
            f"{tokens} tokens",
        )
    return ranks.seen, ranks.merges


@pytest.mark.parametrize(("where", "fused"), [("none", 2), ("both", 0), ("first", 0)])
def test_a_late_rank(where, fused):
    results = run(_late, where)
    check([seen for seen, _ in results], right=True)
    assert [count for _, count in results] == [fused, fused]


def _eager(how, warm):
    ranks = Ranks()
    first = ranks.rank == 0
    model = ranks.merged
    compiled = ranks.compile(model)
    x, r, w = ranks.inputs()
    expected = ranks.merged_want(x, r, w)
    if warm:
        for _ in range(2):
            ranks.call(compiled, (x, r, w), expected, "warm-up")
    ranks.limit(SHORT_S)
    run_now = compiled
    if first and how == "disable":
        run_now = torch._dynamo.disable(model)
    elif first and how == "plain call":
        run_now = model
    elif first and how == "stance":
        torch.compiler.set_stance("force_eager")
    elif first and how == "another backend":
        run_now = torch.compile(model, dynamic=False)
    elif first and how == "recompile limit":
        torch._dynamo.config.recompile_limit = 1
        x, r, w = ranks.inputs(9)
        expected = ranks.merged_want(x, r, w)
    elif how == "recompile limit":
        x, r, w = ranks.inputs(9)
        expected = ranks.merged_want(x, r, w)
    elif first and how == "suppressed errors":
        torch._dynamo.config.suppress_errors = True

        def broken(graph):
            raise ValueError("planted")

        run_now = ranks.compile(lambda *given: model(*given), post_grad_custom_pre_pass=broken)
    try:
        ranks.call(run_now, (x, r, w), expected, how)
        ranks.call(run_now, (x, r, w), expected, f"{how} again")
    finally:
        torch.compiler.set_stance("default")
        torch._dynamo.config.recompile_limit = 8
        torch._dynamo.config.suppress_errors = False
    return ranks.seen


WAYS = ("disable", "plain call", "stance", "another backend", "recompile limit", "suppressed errors")
IN_EVERY_RUN = {("stance", True), ("recompile limit", True), ("suppressed errors", True), ("plain call", False)}


@pytest.mark.parametrize(
    ("how", "warm"),
    [(how, warm) if (how, warm) in IN_EVERY_RUN else nightly(how, warm) for how in WAYS for warm in (True, False)],
)
def test_a_rank_that_does_not_compile(how, warm):
    text = check(run(_eager, how, warm))
    if warm:
        assert "PeerTimeoutError" in text


# --- Caches -------------------------------------------------------------------------------------------------------


def _cached(state, folder):
    ranks = Ranks()
    own = Path(folder) / str(ranks.rank)
    with environment(TORCHINDUCTOR_CACHE_DIR=str(own)):
        if state == "cleaned" and ranks.rank == 0:
            shutil.rmtree(own)
        if state == "report lost" and ranks.rank == 0:
            shutil.rmtree(own / "fusewire")
        if state == "report damaged" and ranks.rank == 0:
            for file in (own / "fusewire").iterdir():
                file.write_text("{}")
        if state == "copied" and ranks.rank == 0:
            shutil.rmtree(own)
            shutil.copytree(Path(folder) / "1", own)
        artifacts = Path(folder) / "artifacts"
        if state == "artifacts" and ranks.rank == 0:
            shutil.rmtree(own)
            torch.compiler.load_cache_artifacts(artifacts.read_bytes())
        compiled = ranks.compile(ranks.merged)
        x, r, w = ranks.inputs()
        ranks.call(compiled, (x, r, w), ranks.merged_want(x, r, w), state)
        if state == "first" and ranks.rank == 1:
            artifacts.write_bytes(torch.compiler.save_cache_artifacts()[0])
    return ranks.seen, ranks.merges, [graph.cached for graph in fusewire.report().graphs]


@pytest.mark.parametrize(
    ("state", "cached"),
    [
        nightly("warm", True),
        nightly("cleaned", False),
        ("report lost", False),
        nightly("report damaged", False),
        nightly("copied", True),
        ("artifacts", True),
    ],
)
def test_a_compile_cache(state, cached, tmp_path):
    for now in ("first", state):
        results = run(_cached, now, str(tmp_path))
        check([seen for seen, _, _ in results], right=True)
        assert [merges for _, merges, _ in results] == [1, 1]
        if now != "first":
            assert [kept for _, _, kept in results] == [[cached], [True]]


def _cached_variants(step, folder):
    """The second process of rank 0 loads what it compiled; rank 1 compiles another graph of the same program."""
    ranks = Ranks()
    with environment(TORCHINDUCTOR_CACHE_DIR=f"{folder}/{ranks.rank}"):
        compiled = ranks.compile(ranks.merged)
        x, r, w = ranks.inputs()
        log = (step == "rank 1 logs" and ranks.rank == 1) or step == "both log"
        ranks.call(compiled, (x, r, w, log), ranks.merged_want(x, r, w), step)
    return ranks.seen, ranks.merges


def test_a_cached_graph_that_no_longer_fits(tmp_path):
    for step, fused in (("fused", 1), ("rank 1 logs", 0), ("fused", 1), ("rank 1 logs", 0), ("both log", 0)):
        results = run(_cached_variants, step, str(tmp_path))
        check([seen for seen, _ in results], right=True)
        assert [count for _, count in results] == [fused, fused], step


# --- Groups -------------------------------------------------------------------------------------------------------


def _two_groups(differ):
    """Ranks 0, 1 and 2; groups {0, 1} and {1, 2} overlap; rank 0 reads a sum once more."""
    ranks = Ranks()
    left, right = ranks.new_group([0, 1]), ranks.new_group([1, 2])
    mine = [group for group, members in ((left, (0, 1)), (right, (1, 2))) if ranks.rank in members]

    def model(x, r, w):
        out, seen = r, []
        for group in mine:
            a, b = ranks.reduce(torch.tanh(x), group), ranks.reduce(x * 0.5, group)
            out = out + norm(r + (a + b), w)
            seen.append(a.abs().max() if differ and ranks.rank == 0 else None)
        return out, seen

    x, r, w = ranks.inputs()
    expected = model(x, r, w)[0]
    compiled = ranks.compile(model)
    for number in range(2):
        ranks.call(compiled, (x, r, w), expected, f"call {number}")
    entries = fusewire.report().entries
    merged = {entry.group for entry in entries if entry.fusion.startswith("merged")}
    return ranks.seen, {entry.group: entry.group in merged for entry in entries}


def test_only_the_group_that_differs_stays_unfused():
    results = run(_two_groups, True, world=3)
    check([seen for seen, _ in results], right=True)
    (_, first), (_, both), (_, last) = results
    assert set(first) | set(last) == set(both)
    assert not any(first.values())
    assert all(last.values())
    assert both == {**first, **last}


def test_overlapping_groups_that_agree():
    results = run(_two_groups, False, world=3)
    check([seen for seen, _ in results], right=True)
    assert [list(merged.values()) for _, merged in results] == [[True], [True, True], [True]]


def _group_made_anew():
    ranks = Ranks()
    for number in range(3):
        group = ranks.group
        compiled = ranks.compile(functools.partial(ranks.merged, log=number == 1 and ranks.rank == 0))
        x, r, w = ranks.inputs()
        ranks.call(compiled, (x, r, w), ranks.merged_want(x, r, w), f"group {number}")
        torch.distributed.destroy_process_group(group)
        torch._dynamo.reset()
        ranks.group = ranks.new_group()
    return ranks.seen, ranks.merges


def test_a_group_that_is_made_anew():
    results = run(_group_made_anew)
    check([seen for seen, _ in results], right=True)
    assert [merges for _, merges in results] == [2, 2]  # the ranks differ in the second group only
