"""The tuner on real ranks without a GPU: what it measures, leaves out, and does when something fails.

Times are the wall clock's, or made up where a test is about what follows from them; FlashInfer is a fake.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from fusewire.custom_ops import api
from fusewire.custom_ops.dispatch import cost_tables, table_store, table_vote
from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm as op
from fusewire.custom_ops.ops.norms import NormSpec, normalize
from fusewire.custom_ops.tuning import measure, tuner
from fusewire.custom_ops.workspaces import provider as interface
from fusewire.custom_ops.workspaces import registry as workspace
from fusewire.errors import CaptureError, ConfigError, PeerTimeoutError, WorkspaceError

from support.distributed import RankPool, shared_pool
from support.tables import BF16, HIDDEN, chosen, on_rank, times_of

pytestmark = pytest.mark.usefixtures("cache")


@pytest.mark.parametrize(
    ("most", "named", "grid"),
    [(8, (), (1, 2, 4, 8)), (9, (), (1, 2, 4, 8, 9)), (1, (), (1,)), (8, (5, 3, 5), (3, 5))],
)
def test_token_grid(most, named, grid):
    assert tuner.token_grid(most, named) == grid


@pytest.mark.parametrize(("most", "named"), [(0, ()), (-4, ()), (8, (0, 1))])
def test_a_token_count_is_at_least_one(most, named):
    with pytest.raises(ConfigError, match="at least 1"):
        tuner.token_grid(most, named)


def job_tune(cache):
    group = dist.group.WORLD
    with on_rank(cache, times_of) as fake:
        tuned = tuner.tune(group, HIDDEN, BF16, tokens=(1, 2, 4, 8))
        left = api.workspaces()
        served = chosen((1, 2, 4, 8, 100))
        info = api.workspaces()[0]
        return tuned, left, served, info.table, [call["backend"] for call in fake.created]


def test_ranks_measure_one_table_and_choose_by_it(cache):
    (first, left, served, text, backends), second = shared_pool(2).run(job_tune, cache)
    assert second[0] == first
    assert second[1:] == (left, served, text, backends)
    table = first.table
    # The slowest rank's time.
    assert table.times == {
        "native": ((1, 11.0), (2, 21.0), (4, 21.0), (8, 21.0)),
        cost_tables.ONE_SHOT: ((1, 21.0), (2, 11.0), (4, 11.0), (8, 21.0)),
        cost_tables.TWO_SHOT: ((4, 21.0), (8, 11.0)),
    }
    assert "CUDA GPU" in table.absent["symm_mem"]
    assert table.rejected == {}
    assert (table.key.device, table.key.world_size, table.key.driver) == ("cpu", 2, "none")
    assert left == []  # what was made for measuring is gone
    assert served == ["native", cost_tables.ONE_SHOT, cost_tables.ONE_SHOT, cost_tables.TWO_SHOT, cost_tables.TWO_SHOT]
    assert text == table.cost_model().source
    assert backends == ["trtllm"] * 2
    assert table_store.read(Path(first.path)).table == table
    assert first.problem == ""


def job_reload(cache, environment):
    with on_rank(cache, **environment), mock.patch.object(tuner, "tune", side_effect=AssertionError):
        return chosen((1, 8)), api.workspaces()[0].table


def test_the_next_process_loads_it(cache):
    tuned = shared_pool(2).run(job_tune, cache)[0][0]
    for environment in ({}, {table_vote.TUNE_VARIABLE: "1"}):
        for served, text in shared_pool(2).run(job_reload, cache, environment):
            assert served == ["native", cost_tables.TWO_SHOT]
            assert text == tuned.table.cost_model().source


def job_capture(cache):
    capturing = {"is_available": lambda: True, "is_current_stream_capturing": lambda: True}
    errors = []
    with on_rank(cache), mock.patch.multiple(torch.cuda, **capturing):
        for work in (tuner.tune, table_vote.tuned_cost_model):
            try:
                work(dist.group.WORLD, HIDDEN, BF16, torch.device("cpu"))
            except CaptureError as error:
                errors.append(str(error))
    return len(errors)


def test_never_while_a_graph_is_captured(cache):
    assert shared_pool(2).run(job_capture, cache) == [2, 2]


def job_failing_tuner(cache):
    failing = mock.patch.object(measure, "draw", side_effect=RuntimeError("no memory"))
    with on_rank(cache, **{table_vote.TUNE_VARIABLE: "1"}), failing:
        return chosen((1,)), api.workspaces()[0].table


def test_a_model_runs_where_tuning_fails(cache):
    for served, text in shared_pool(2).run(job_failing_tuner, cache):
        assert served == [cost_tables.ONE_SHOT]
        assert "tuning failed: nothing could be timed" in text
        assert "no memory" in text


def job_existing_workspace(cache):
    """What a program prepared before is used as it is, and left."""
    with on_rank(cache, times_of) as fake:
        before = api.prepare(None, HIDDEN, BF16, max_tokens=4)
        tuned = tuner.tune(dist.group.WORLD, HIDDEN, BF16, tokens=(1, 4, 8))
        after = api.workspaces()
        return tuned.table, len(fake.created), [(i.provider, i.max_tokens) for i in before + after]


def test_workspaces_of_the_program_are_used_and_left(cache):
    for table, made, sizes in shared_pool(2).run(job_existing_workspace, cache):
        assert made == 1
        assert sizes.count(("flashinfer", 4)) == 2
        assert [tokens for tokens, _ in table.times[cost_tables.ONE_SHOT]] == [1, 4]
        assert table.notes == ("flashinfer was not measured above its workspace's size (4 tokens, there before)",)


def job_no_choice(cache):
    with mock.patch.dict(os.environ, {table_store.CACHE_VARIABLE: str(cache)}):
        infos = api.prepare(None, HIDDEN, BF16, max_tokens=4, tune=True)
        text = workspace.REGISTRY.tables[dist.group.WORLD.group_name, HIDDEN, BF16].text
        try:
            tuner.tune(dist.group.WORLD, HIDDEN, BF16, tokens=(1,))
        except WorkspaceError as error:
            return [info.max_tokens for info in infos], text, str(error)
        finally:
            api.close()


def test_where_only_native_can_serve_there_is_nothing_to_measure(cache):
    for sizes, text, error in shared_pool(2).run(job_no_choice, cache):
        assert set(sizes) == {0}
        assert "only native can serve here (symm_mem: " in error
        assert f"tuning failed: {error}" in text
    assert table_store.all_files() == []


def job_wrong(cache, fault):
    """FlashInfer passes its proof and then fails one variant."""
    workspace_provider, rank = interface.PROVIDERS["flashinfer"], dist.get_rank()
    bind = workspace_provider.bind

    def bound(made, variant, *output):
        call = bind(made, variant, *output)
        if variant != cost_tables.TWO_SHOT:
            return call

        def broken(x, *rest):
            norm, total = call(x, *rest)
            if fault == "raises":
                raise RuntimeError("it does not like this")
            if rank == 1 and x.shape[0] == 8:
                (norm if fault == "norm" else total)[-1, 3] += 1 if fault != "nan" else float("nan")
            if fault == "differs" and rank == 1:
                total.view(torch.int16)[0, 0] ^= 1
            return norm, total

        return broken

    with (
        on_rank(cache, lambda label, tokens, _: 1.0 if label == cost_tables.TWO_SHOT else 5.0),
        contextlib.ExitStack() as s,
    ):
        s.enter_context(mock.patch.object(workspace_provider, "bind", bound))
        said = s.enter_context(mock.patch.object(measure, "log_line"))
        # In the order 4, 16, 8: what was measured before the fault showed is to go, too.
        tuned = tuner.tune(dist.group.WORLD, HIDDEN, BF16, tokens=(4, 8, 16))
        loud = [call.args[0] for call in said.call_args_list if "LEFT OUT" in call.args[0]]
        return tuned, chosen((8,)), api.workspaces(), loud


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("norm", "on rank 1, 8 tokens: the norm is off in 1 of"),
        ("total", "on rank 1, 8 tokens: the residual is off in 1 of"),
        ("nan", "on rank 1, 8 tokens: the residual is off in 1 of"),
        ("differs", "on rank 1, 4 tokens: the residual is off"),
        ("raises", "on rank 0, 4 tokens: RuntimeError: it does not like this"),
    ],
)
def test_a_candidate_that_is_wrong_on_one_rank_is_left_out_on_all(cache, fault, said):
    answers = shared_pool(2).run(job_wrong, cache, fault)
    for tuned, served, infos, _ in answers:
        assert set(tuned.table.times) == {"native", cost_tables.ONE_SHOT}
        assert said in tuned.table.rejected[cost_tables.TWO_SHOT]
        assert served != [cost_tables.TWO_SHOT]
        assert all("is left out" in info.table for info in infos)
        assert table_store.read(Path(tuned.path)).table == tuned.table
    assert len(answers[0][3]) == 1
    assert cost_tables.TWO_SHOT in answers[0][3][0]


def job_bits(cache):
    """Results right on each rank, with norms that differ in a last bit: not what kernels of one sum may do."""
    workspace_provider, rank = interface.PROVIDERS["flashinfer"], dist.get_rank()
    bind = workspace_provider.bind

    def bound(made, variant, *output):
        call = bind(made, variant, *output)

        def nudged(*args):
            norm, total = call(*args)
            norm.view(torch.int16)[0, 0] ^= rank
            return norm, total

        return nudged

    with on_rank(cache), mock.patch.object(workspace_provider, "bind", bound):
        return tuner.tune(dist.group.WORLD, HIDDEN, BF16, tokens=(4,)).table.rejected


def test_ranks_must_have_the_same_bits(cache):
    for rejected in shared_pool(2).run(job_bits, cache):
        assert set(rejected) == {cost_tables.ONE_SHOT, cost_tables.TWO_SHOT}
        assert rejected[cost_tables.ONE_SHOT] == "4 tokens: the ranks' results differ"


def job_own_provider(cache):
    def mine(x, residual, weight, eps, weight_bias, form, group_name):
        summed = x + residual  # forgets the other ranks
        return normalize(summed, NormSpec(weight, eps, weight_bias, form)), summed

    op.register_impl("mine")(mine)
    try:
        with on_rank(cache):
            return tuner.tune(dist.group.WORLD, HIDDEN, BF16, tokens=(1, 2), providers=("mine", "native")).table
    finally:
        op.unregister_impl("mine")


def test_a_users_provider_is_measured_and_checked_too(cache):
    for table in shared_pool(2).run(job_own_provider, cache):
        assert set(table.times) == {"native"}
        assert "the residual is off" in table.rejected["mine"]


def job_unsaved(caches):
    with on_rank(caches, times_of):
        tuned = tuner.tune(dist.group.WORLD, HIDDEN, BF16, tokens=(1, 8))
        served, text = chosen((1, 8)), api.workspaces()[0].table
        api.prepare(None, HIDDEN, BF16, max_tokens=8)  # looks at the disk again, and keeps what it has
        return tuned.problem, served, text, chosen((1, 8))


def test_a_folder_that_cannot_be_written_costs_only_the_next_run(cache):
    blocked = cache / "a file"
    blocked.write_text("")
    for folders, ranks in (([blocked, blocked], "every rank"), ([cache, blocked], "rank 1")):
        for problem, served, text, again in shared_pool(2).run(job_unsaved, folders):
            assert served == again == ["native", cost_tables.TWO_SHOT]
            assert "not saved everywhere" in problem
            assert problem in text
            if ranks == "rank 1":
                assert "on rank 1: " in problem
        assert len(list((cache / "tables").glob("*"))) == (ranks == "rank 1")


def job_unlike(cache, what):
    rank = dist.get_rank()
    arguments = {"tokens": (1, 2)} | ({what: [(1, 2), (1, 4)][rank]} if what == "tokens" else {})
    hidden = HIDDEN * (1 + rank) if what == "hidden" else HIDDEN
    if what == "providers":
        arguments["providers"] = [("native",), ("native", "rank_ordered")][rank]
    with on_rank(cache):
        try:
            tuner.tune(dist.group.WORLD, hidden, BF16, **arguments)
        except ConfigError as error:
            return str(error)


@pytest.mark.parametrize("what", ["tokens", "hidden", "providers"])
def test_ranks_that_ask_for_different_things_are_told(cache, what):
    for said in shared_pool(2).run(job_unlike, cache, what):
        assert "the ranks are to tune different things: rank 0" in said


@pytest.mark.parametrize(
    "changes",
    [{"hidden": 0}, {"dtype": torch.float64}, {"budget_s": 0.0}, {"providers": ("nobody",)}, {"tokens": (0,)}],
)
def test_arguments_that_cannot_be_used(fake_world, changes):
    arguments = {"hidden": HIDDEN, "dtype": BF16, **changes}
    with mock.patch.object(measure, "Channel", side_effect=AssertionError), pytest.raises(ConfigError):
        tuner.tune(fake_world, **arguments)


def job_budget(cache):
    def slow(*args):
        time.sleep(0.3)
        return times_of(*args)

    with on_rank(cache, slow):
        return tuner.tune(dist.group.WORLD, HIDDEN, BF16, max_tokens=64, budget_s=1.5).table


def test_time_that_runs_out_leaves_sizes_out_alike(cache):
    tables = shared_pool(2).run(job_budget, cache)
    assert tables[0] == tables[1]
    assert "these token counts were left out" in tables[0].notes[0]
    assert len(tables[0].times["native"]) < 7


def job_memory(cache):
    with on_rank(cache, times_of):
        check = measure.Measurement._check_memory

        def scarce(self, nbytes):
            if dist.get_rank() == 1 and nbytes > 20 * 16 * HIDDEN * 2:
                raise WorkspaceError("no room")
            check(self, nbytes)

        with mock.patch.object(measure.Measurement, "_check_memory", scarce):
            return tuner.tune(dist.group.WORLD, HIDDEN, BF16, max_tokens=64).table


def test_sizes_that_do_not_fit_one_rank_are_left_out_on_all(cache):
    tables = shared_pool(2).run(job_memory, cache)
    assert tables[0] == tables[1]
    assert "on rank 1: no room" in tables[0].notes[0]
    sizes = [tokens for tokens, _ in tables[0].times["native"]]
    assert sizes[0] == 1
    assert sizes[-1] < 64


def job_missing(cache):
    text = ""
    with on_rank(cache, FUSEWIRE_TIMEOUT_S="1"):
        if dist.get_rank() == 0:
            try:
                tuner.tune(dist.group.WORLD, HIDDEN, BF16, tokens=(1,))
            except PeerTimeoutError as error:
                text = str(error)
        dist.barrier()  # the other waits here
    return text


def test_a_rank_that_does_not_come_ends_the_wait(cache):
    said, _ = shared_pool(2).run(job_missing, cache)
    assert "rank(s) 1" in said


def job_stuck(cache):
    """A measurement that never returns, on one rank."""
    with on_rank(cache, FUSEWIRE_TIMEOUT_S="3", FUSEWIRE_TUNING_TIMEOUT_S="2"):
        wait = (lambda self: threading.Event().wait()) if dist.get_rank() == 1 else (lambda self: None)
        with mock.patch.object(measure.Measurement, "_compile_ahead", wait):
            try:
                tuner.tune(dist.group.WORLD, HIDDEN, BF16, tokens=(1,), budget_s=0.1)
            except (WorkspaceError, PeerTimeoutError) as error:
                return type(error).__name__


def test_a_rank_that_hangs_ends_the_wait():
    with RankPool(2) as pool:  # its own: a thread is left in it
        for name in pool.run(job_stuck, os.environ[table_store.CACHE_VARIABLE]):
            assert name in ("WorkspaceError", "PeerTimeoutError")
