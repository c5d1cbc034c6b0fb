"""The choice of a provider by number of tokens: table, policy, cache, what it costs, how it
explains.
"""

from __future__ import annotations

import itertools
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from fusewire.custom_ops import api
from fusewire.custom_ops.dispatch import cost_model, cost_tables
from fusewire.custom_ops.dispatch import dispatcher as dispatch
from fusewire.custom_ops.dispatch import pick as picking
from fusewire.custom_ops.dispatch.overview import ChoiceRow, explain_choices
from fusewire.custom_ops.dispatch.pick import Capacity, Shape, pick
from fusewire.custom_ops.dispatch.policy import Policy, read_policy
from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm as op
from fusewire.custom_ops.providers.flashinfer import provider
from fusewire.custom_ops.workspaces import capture
from fusewire.custom_ops.workspaces import provider as interface
from fusewire.custom_ops.workspaces import registry as workspace
from fusewire.errors import ConfigError, NoProviderError
from fusewire.fusion_passes.config import PassConfig

from support.distributed import fake_group, shared_pool
from support.fake_flashinfer import args_of, fake_flashinfer

BF16 = torch.bfloat16
H200 = "NVIDIA H200"
CAPACITY = {"flashinfer": Capacity(8191)}
MEASURED = cost_model.find_cost_model(H200, 4, 8192, BF16)
UNKNOWN = cost_model.find_cost_model("some GPU", 4, 8192, BF16)


def label(tokens, policy, plan=MEASURED, hidden=8192, ranks=4, capacities=CAPACITY, reasons=None):
    found = pick(Shape(tokens, hidden, BF16, ranks), read_policy(op, policy), plan, capacities, reasons or {})
    return found.candidate.label if found.candidate else None


# --- The choice -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "policy", "chosen"),
    [
        (1, "flashinfer,native", "flashinfer/oneshot"),
        (128, "flashinfer,native", "flashinfer/oneshot"),
        (512, "flashinfer,native", "flashinfer/twoshot"),
        (0, "flashinfer,native", "flashinfer/oneshot"),
        # Whoever stands behind native is never asked.
        (1, "native,flashinfer", "native"),
        (1, "native", "native"),
        # Alone, it serves wherever it can.
        (8000, "flashinfer", "flashinfer/twoshot"),
        (8192, "flashinfer", None),
        # 16 KiB a token: 64 tokens are 1 MiB.
        (64, "flashinfer,native;max_size_mb=1", "flashinfer/oneshot"),
        (65, "flashinfer,native;max_size_mb=1", "native"),
        (8191, "flashinfer,native;max_size_mb=4096", "flashinfer/twoshot"),
        (1, "flashinfer,native;max_size_mb=0", "native"),
        # What nothing is known about serves where it comes first.
        (1, "rank_ordered,flashinfer,native", "rank_ordered"),
        (1, "flashinfer,rank_ordered", "flashinfer/oneshot"),
    ],
)
def test_choice(tokens, policy, chosen):
    assert label(tokens, policy) == chosen


@pytest.mark.parametrize(
    ("tokens", "policy", "chosen"),
    [
        (32, "flashinfer,native", "flashinfer/oneshot"),
        (33, "flashinfer,native", "native"),
        (33, "flashinfer,rank_ordered", "rank_ordered"),
        (33, "flashinfer", "flashinfer/twoshot"),
        (33, "flashinfer,native;max_size_mb=2", "flashinfer/twoshot"),
        (129, "flashinfer,native;max_size_mb=2", "native"),
        (1, "native", "native"),
    ],
)
def test_choice_on_a_gpu_that_was_not_measured(tokens, policy, chosen):
    assert label(tokens, policy, UNKNOWN) == chosen


def test_eight_gpus_leave_large_inputs_to_nccl():
    plan = cost_model.find_cost_model(H200, 8, 8192, BF16)
    assert label(32, "flashinfer,native", plan, ranks=8) == "flashinfer/oneshot"
    assert [label(tokens, "flashinfer,native", plan, ranks=8) for tokens in (256, 1024, 4096)] == ["native"] * 3


def test_sizes_that_were_not_measured_are_chosen_by_the_formula():
    """777 tokens of 1536 on 2 GPUs took 15.9 us by FlashInfer's one-shot, and 19.5 by symm_mem's
    two-shot with flags.
    """
    capacities = {"symm_mem": Capacity(4096), "flashinfer": Capacity(4096)}
    small = cost_model.find_cost_model(H200, 2, 1536, BF16)
    chosen = [label(tokens, "symm_mem,flashinfer,native", small, 1536, 2, capacities) for tokens in (1, 512, 777)]
    assert chosen == [cost_tables.SYMM_ONE_SHOT, cost_tables.SYMM_TWO_SHOT, cost_tables.ONE_SHOT]
    three = cost_model.find_cost_model(H200, 3, 8192, BF16)
    assert label(2048, "symm_mem,native", three, 8192, 3, capacities) == cost_tables.SYMM_TWO_SHOT


def test_two_shot_is_not_chosen_where_it_cannot_run():
    cheap = cost_model.CostModel(
        "made up", {cost_tables.ONE_SHOT: ((1, 9.0),), cost_tables.TWO_SHOT: ((1, 1.0),), "native": ((1, 20.0),)}
    )
    assert label(4, "flashinfer,native", cheap) == "flashinfer/oneshot"
    assert label(5, "flashinfer,native", cheap) == "flashinfer/twoshot"


def test_a_refusal_reaches_the_outcome():
    shape, policy = Shape(1, 8192, BF16, 4), Policy(("flashinfer", "native"))
    found = pick(shape, policy, MEASURED, {"flashinfer": Capacity(0, "on rank 3: no memory")}, {})
    assert (found.candidate.label, str(found.refusals[0])) == ("native", "flashinfer: on rank 3: no memory")
    found = pick(shape, policy, MEASURED, {}, {"flashinfer": "x is float64", "native": "broken"})
    assert found.candidate is None
    assert [r.reason for r in found.refusals] == ["x is float64", "broken"]


@pytest.mark.parametrize("policy", ["flashinfer;max_size_mb=big", "flashinfer;size=3"])
def test_bad_options_are_named(policy):
    with pytest.raises(ConfigError, match=policy.partition(";")[2].replace("=", ".")):
        read_policy(op, policy)


def test_the_configurations_text_is_read_back():
    text = PassConfig(fi_allreduce_fusion_max_size_mb=0.5).policy("all_reduce_rms_norm")
    assert read_policy(op, text) == Policy(("symm_mem", "flashinfer", "native"), 0.5)
    assert op.priority == ("symm_mem", "flashinfer", "native")


def test_the_choice_is_the_same_for_equal_facts():
    """Nothing but its arguments enters: no pointer, no clock, no memory of this rank."""
    before = [label(tokens, "flashinfer,native") for tokens in range(1, 600)]
    with mock.patch.object(torch.cuda, "mem_get_info", side_effect=AssertionError):
        assert [label(tokens, "flashinfer,native") for tokens in range(1, 600)] == before


def test_batch_invariant_mode_is_fused_as_far_as_the_workspace_reaches():
    policy = "symm_mem_batch_invariant,rank_ordered_batch_invariant"
    capacities = {"symm_mem_batch_invariant": Capacity(1000)}
    for tokens in (1, 129, 1000):
        same = label(tokens, "symm_mem,native", capacities={"symm_mem": Capacity(1000)})
        assert label(tokens, policy, capacities=capacities) == same
    assert label(1001, policy, capacities=capacities) == "rank_ordered_batch_invariant"
    refused = {"symm_mem_batch_invariant": Capacity(1000, "its test failed")}
    assert label(1, policy, capacities=refused) == "rank_ordered_batch_invariant"


# --- Sizes of workspaces --------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [576, 4096, 8192])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_workspace_of_the_first_call_fits_all_that_comes_to_it(hidden, ranks):
    workspace_provider, policy = interface.PROVIDERS["flashinfer"], read_policy(op, "flashinfer,native")
    plan = cost_model.find_cost_model(H200, ranks, hidden, BF16)
    tokens = picking.wanted_tokens(workspace_provider, Shape(1, hidden, BF16, ranks), policy, plan)
    assert workspace_provider.nbytes(hidden, BF16, ranks, tokens) <= picking.DEFAULT_WORKSPACE_BYTES
    capacities = {"flashinfer": Capacity(tokens)}
    assert label(tokens, "flashinfer,native", plan, hidden, ranks, capacities).startswith("flashinfer")
    larger = label(tokens + 1, "flashinfer,native", plan, hidden, ranks, {"flashinfer": Capacity(tokens + 1)})
    fits = workspace_provider.nbytes(hidden, BF16, ranks, tokens + 1) <= picking.DEFAULT_WORKSPACE_BYTES
    assert larger == "native" or not fits


def test_sizes_that_the_policy_asks_for():
    workspace_provider, shape = interface.PROVIDERS["flashinfer"], Shape(6000, 8192, BF16, 4)

    def size(policy, plan=MEASURED, shape=shape):
        return picking.wanted_tokens(workspace_provider, shape, read_policy(op, policy), plan)

    assert size("flashinfer,native;max_size_mb=1") == 64
    assert size("flashinfer,native;max_size_mb=100000") == 16383 == provider.max_tokens(8192, BF16, 4)
    assert size("flashinfer") == 6000
    assert size("flashinfer,native", UNKNOWN) == 32
    assert size("flashinfer,native", cost_model.CostModel("nothing", limits={})) == 0


# --- The selector ---------------------------------------------------------------------------------


def test_on_the_cpu_native_serves_without_vote_or_workspace():
    x = torch.zeros(2, 64, dtype=BF16)
    with fake_group(2) as group, mock.patch.object(workspace, "Channel", side_effect=AssertionError):
        chosen = dispatch.select(op, args_of(x, x, None, group.group_name), "")
        assert chosen is op.providers["native"]
        assert dispatch.select(op, args_of(x, x, None, group.group_name), "rank_ordered").name == "rank_ordered"
        with pytest.raises(NoProviderError, match="flashinfer: "):
            dispatch.select(op, args_of(x, x, None, group.group_name), "flashinfer")


def test_unknown_providers_are_an_error():
    x = torch.zeros(2, 64)
    with fake_group(2) as group, pytest.raises(ConfigError, match="no provider 'nobody'"):
        dispatch.select(op, args_of(x, None, None, group.group_name), "nobody")


def test_a_provider_that_goes_is_no_longer_chosen():
    x = torch.zeros(2, 64)

    def mine(x, residual, weight, eps, weight_bias, form, group_name):
        return x, x

    with fake_group(2) as group:
        args = args_of(x, None, None, group.group_name)
        op.register_impl("mine")(mine)
        try:
            assert dispatch.select(op, args, "mine,native").fn is mine
        finally:
            op.unregister_impl("mine")
        with pytest.raises(ConfigError, match="mine"):
            dispatch.select(op, args, "mine,native")


def job_cache():
    """Decisions are kept by shape, and given up when the workspace, the group or the provider goes."""
    name, said = dist.group.WORLD.group_name, {}
    with fake_flashinfer():
        x = torch.ones(2, 64, dtype=BF16)
        first = dispatch.select(op, args_of(x, None, None, name), "flashinfer")
        with mock.patch.object(dispatch, "_decide", side_effect=AssertionError):
            said["same"] = dispatch.select(op, args_of(x.clone(), None, None, name), "flashinfer") is first
            for change in (
                args_of(torch.ones(3, 64, dtype=BF16), None, None, name),
                args_of(x, x, None, name),
                args_of(x, None, torch.ones(64, dtype=BF16), name),
                args_of(x.half(), None, None, name),
            ):
                try:
                    dispatch.select(op, change, "flashinfer")
                    said["other"] = "taken for the same"
                except AssertionError:
                    pass
        api.close()
        again = dispatch.select(op, args_of(x, None, None, name), "flashinfer")
        said["after close"] = again is not first
        return said


def test_decisions_are_cached_by_what_they_depend_on():
    for said in shared_pool(2).run(job_cache):
        assert said == {"same": True, "after close": True}


def job_mixed_gpus():
    """Ranks with different GPUs: no plan is for them, so all take the cautious one."""
    name = dist.group.WORLD.group_name
    gpu = [H200, "NVIDIA B200"][dist.get_rank()]
    facts = {"gpu": gpu, "host": "here", "uuid": gpu}
    with fake_flashinfer(), mock.patch.object(provider, "device_facts", return_value=facts):
        chosen = [
            dispatch.select(op, args_of(torch.ones(n, 8192, dtype=BF16), None, None, name), "").name
            for n in (1, 64, 65, 512)
        ]
        return chosen, api.workspaces()[0].max_tokens


def test_ranks_with_different_gpus_choose_alike():
    for chosen, tokens in shared_pool(2).run(job_mixed_gpus):
        assert chosen == ["flashinfer", "flashinfer", "native", "native"]
        assert tokens == 64


def job_hosts(host, uuid):
    facts = {"gpu": H200, "host": [host, "b"][dist.get_rank()], "uuid": [uuid, "2"][dist.get_rank()]}
    with fake_flashinfer(), mock.patch.object(provider, "device_facts", return_value=facts):
        made = api.prepare(None, 64, BF16, max_tokens=8)[0]
        return made.reason


@pytest.mark.parametrize(("host", "uuid", "said"), [("a", "1", "2 hosts"), ("b", "2", "share one GPU"), ("b", "1", "")])
def test_machines_that_do_not_fit_together(host, uuid, said):
    for reason in shared_pool(2).run(job_hosts, host, uuid):
        assert bool(reason) == bool(said)
        assert said in reason


def test_a_choice_made_before_costs_little():
    x = torch.zeros(8, 8192, dtype=BF16)
    with fake_group(2) as group:
        args = args_of(x, x, torch.zeros(8192, dtype=BF16), group.group_name)
        dispatch.select(op, args, "flashinfer,native")
        best = min(_time_of(args) for _ in range(5))
    assert best < 20e-6  # about 2 microseconds on a quiet machine; the bound is loose for busy ones


def _time_of(args, calls=2000):
    start = time.perf_counter()
    for _ in itertools.repeat(None, calls):
        dispatch.select(op, args, "flashinfer,native")
    return (time.perf_counter() - start) / calls


# --- Explaining -----------------------------------------------------------------------------------


def test_a_plan_is_explained_in_ranges_without_gaps():
    rows = explain_choices(4, 8192, BF16, gpu=H200, policy="flashinfer,native")
    assert [row.provider for row in rows] == ["flashinfer/oneshot", "flashinfer/twoshot", "native"]
    assert rows[0].first == 1
    assert rows[-1].last is None
    assert all(row.last + 1 == after.first for row, after in itertools.pairwise(rows))
    for row in rows:
        assert (
            label(row.first, "flashinfer,native", capacities={"flashinfer": Capacity(rows[-1].first - 1)})
            == row.provider
        )
    assert "6.3 us (native 13.9); measured on 4 H200s" in rows[0].reason
    assert "not the fastest" in rows[-1].reason
    larger = explain_choices(4, 8192, BF16, gpu=H200, policy="symm_mem,native")
    assert "fusewire.prepare" in larger[-1].reason


def test_a_machine_without_a_gpu_is_explained():
    with mock.patch.object(torch.cuda, "is_available", return_value=False):
        provider.machine_support.cache_clear()
        rows = explain_choices(4, 8192, BF16)
        provider.machine_support.cache_clear()
    assert [row[:3] for row in rows] == [(1, None, "native")]
    assert "FlashInfer's kernels run on NVIDIA GPUs" in rows[0].reason


def test_a_world_size_that_cannot_be_served_is_explained():
    rows = explain_choices(3, 8192, BF16, gpu=H200, policy="flashinfer,native")
    assert rows == [ChoiceRow(1, None, "native", mock.ANY)]
    assert "3 ranks" in rows[0].reason
    assert "not the fastest" in explain_choices(8, 8192, BF16, gpu=H200, policy="flashinfer,native")[-1].reason


def test_our_own_kernels_lead_where_they_were_measured():
    for world_size in (2, 4, 8):
        rows = explain_choices(world_size, 8192, BF16, gpu=H200)
        assert rows[0].provider == "symm_mem/oneshot"
        assert {row.provider.partition("/")[0] for row in rows if row.first >= 512} <= {"symm_mem", "native"}


def job_explain():
    group = dist.group.WORLD
    with fake_flashinfer():
        before = explain_choices(group, 64, BF16)
        api.prepare(group, 64, BF16, max_tokens=7)
        after = explain_choices(group.group_name, 64, BF16, policy="flashinfer,native;max_size_mb=1")
        return before[0].provider, [row[:3] for row in after], after[-1].reason


def test_after_the_vote_the_explanation_is_of_the_workspace():
    for before, after, reason in shared_pool(2).run(job_explain):
        assert before == "flashinfer/oneshot"
        assert (after[0][0], after[-1][1], after[-1][0]) == (1, None, 8)
        assert "takes up to 7" in reason or "not the fastest" in reason


@pytest.mark.parametrize("capturing", [True, False])
def test_capture_is_asked_of_the_current_stream(capturing):
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=capturing),
    ):
        assert capture.capturing() is capturing
