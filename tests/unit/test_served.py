"""Which provider served which calls: counts by operator, group, hidden size, dtype and tokens, and
their text."""

from __future__ import annotations

import json
import threading

import pytest
import torch
import torch.distributed as dist

import fusewire
from fusewire.custom_ops.dispatch import derived_ops, served
from fusewire.custom_ops.dispatch import dispatcher as dispatch
from fusewire.custom_ops.dispatch.served import ServedCalls
from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm as op
from fusewire.custom_ops.ops.sandwich_norm import all_reduce_sandwich_norm
from fusewire.custom_ops.ops.sharded_norm import all_reduce_rms_norm_sharded
from fusewire.fusion_passes.report.text import describe_served

from support.distributed import fake_group, shared_pool
from support.fake_flashinfer import args_of, fake_flashinfer

BF16 = torch.bfloat16
NAME = "all_reduce_rms_norm"


@pytest.fixture(autouse=True)
def _world():
    with fake_group(2), torch.no_grad():
        yield


def call(tokens, hidden=64, dtype=BF16, policy="native", group="", eps=1e-6):
    x = torch.ones(tokens, hidden, dtype=dtype)
    op(x, x, None, eps, group_name=group or dist.group.WORLD.group_name, policy=policy)


def counts():
    return {(row.provider, row.tokens): (row.calls, row.captured) for row in fusewire.report().served}


def test_calls_are_counted_by_what_they_are():
    for _ in range(3):
        call(4)
    call(4, eps=1e-5)  # another decision, the same kind of call
    call(4, policy="rank_ordered")
    call(5)
    call(4, hidden=32)
    call(4, dtype=torch.float32)
    assert fusewire.report().served == (
        ServedCalls(NAME, "0", 32, "bfloat16", 4, "native", "", 1, 0),
        ServedCalls(NAME, "0", 64, "bfloat16", 4, "native", "", 4, 0),
        ServedCalls(NAME, "0", 64, "bfloat16", 4, "rank_ordered", "", 1, 0),
        ServedCalls(NAME, "0", 64, "bfloat16", 5, "native", "", 1, 0),
        ServedCalls(NAME, "0", 64, "float32", 4, "native", "", 1, 0),
    )
    data = json.loads(fusewire.report().to_json())["served"]
    assert data[1] == {
        "op": NAME, "group": "0", "hidden": 64, "dtype": "bfloat16", "tokens": 4, "provider": "native", "variant": "",
        "calls": 4, "captured": 0, "reason": "",
    }  # fmt: skip


def test_a_graph_and_eager_code_count_alike():
    def block(x):
        x = x + 1
        for _ in range(2):
            x, _ = op(x, x, None, group_name="0", policy="native")
        return x

    torch.compile(block, backend="aot_eager")(torch.ones(4, 64, dtype=BF16))
    call(4)
    assert counts() == {("native", 4): (3, 0)}


def test_dimensions_before_the_last_are_tokens():
    op(torch.ones(2, 3, 64), None, None, group_name="0")
    assert counts() == {("native", 6): (1, 0)}


def test_derived_operators_are_counted_under_their_own_names():
    x = torch.ones(4, 64, dtype=BF16)
    all_reduce_sandwich_norm(x, x, None, inner_weight=None, group_name="0")
    for _ in range(2):
        all_reduce_rms_norm_sharded(x, None, None, group_name="0")
    assert [(row.op, row.calls) for row in fusewire.report().served] == [
        ("all_reduce_rms_norm_sharded", 2),
        ("all_reduce_sandwich_norm", 1),
    ]


def test_a_capture_counts_by_itself(monkeypatch):
    """Simulated: without a GPU nothing can be captured. tests/gpu/one_gpu_check.py has the real
    thing."""
    call(4)
    x = torch.ones(4, 64, dtype=BF16)
    held = dispatch.decide(op, (x, x, None, 1e-6, 0.0, "scale_then_round", "0"), "native").served
    monkeypatch.setattr(dispatch, "is_capturing", lambda: True)
    call(4)
    assert counts() == {("native", 4): (2, 0)}  # not on a GPU: nobody asks whether it is captured
    monkeypatch.setattr(held, "on_gpu", True)
    call(4)
    call(4)
    assert counts() == {("native", 4): (2, 2)}
    all_reduce_sandwich_norm(x, x, None, inner_weight=None, group_name="0")
    for counter in served._counters.values():
        monkeypatch.setattr(counter, "on_gpu", True)
    monkeypatch.setattr(derived_ops, "is_capturing", lambda: True)
    all_reduce_sandwich_norm(x, x, None, inner_weight=None, group_name="0")
    assert [(row.calls, row.captured) for row in fusewire.report().served] == [(2, 2), (1, 1)]


def test_counts_outlive_decisions_and_end_with_the_report():
    call(4)
    fusewire.custom_ops.workspaces.registry.REGISTRY.changed()  # every call is decided anew
    call(4)
    assert counts() == {("native", 4): (2, 0)}
    fusewire.clear_report()
    assert fusewire.report().served == ()
    call(4)  # by a decision from before
    assert counts() == {("native", 4): (1, 0)}


def test_no_call_of_a_thread_is_lost():
    def run():
        for _ in range(2000):
            call(1, hidden=8)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts() == {("native", 1): (8000, 0)}


def test_what_is_only_traced_is_not_counted():
    x = torch.ones(4, 64, dtype=BF16)
    torch.compile(lambda x: op(x, x, None, group_name="0"), backend=lambda model, inputs: lambda *_: (x, x))(x)
    assert fusewire.report().served == ()


def job_served():
    """Two groups, and a provider with variants: on each rank."""
    fusewire.clear_report()
    pair = dist.new_group([0, 1])
    world = dist.group.WORLD.group_name
    with fake_flashinfer(), torch.no_grad():
        x = torch.ones(2, 64, dtype=BF16)
        for name, repeats in ((world, 3), (pair.group_name, 1)):
            for _ in range(repeats):
                op(*args_of(x, x, None, name), policy="flashinfer")
        op(*args_of(x, x, None, world), policy="native")
        return world, pair.group_name, fusewire.report().served


def test_groups_and_variants():
    for world, pair, rows in shared_pool(2).run(job_served):
        found = {(row.group, row.provider, row.variant.partition("/")[0]): row.calls for row in rows}
        assert found == {
            (world, "flashinfer", "flashinfer"): 3,
            (pair, "flashinfer", "flashinfer"): 1,
            (world, "native", ""): 1,
        }


# Text


def row(tokens, provider, calls=1, captured=0, **other):
    fields = {"op": NAME, "group": "0", "hidden": 4096, "dtype": "bfloat16", "variant": ""}
    return ServedCalls(**{**fields, **other}, tokens=tokens, provider=provider, calls=calls, captured=captured)


def test_text():
    rows = [
        row(1, "symm_mem", 300, variant="symm_mem/oneshot"),
        row(256, "symm_mem", 12, 5, variant="symm_mem/twoshot"),
        row(8192, "native", 3),
        row(8192, "symm_mem", 1),
        row(1, "native", 0, 2, group="tp:0"),
        row(1, "native", 1, hidden=64),
    ]
    assert list(describe_served(rows)) == [
        "served since start (calls that a CUDA graph replays run no host code and are not counted):",
        "  all_reduce_rms_norm, hidden 64, bfloat16, group 0: native 1 token (1 call)",
        "  all_reduce_rms_norm, hidden 4096, bfloat16, group 0: symm_mem 1-256 tokens (312 "
        "calls, 5 captured), native 8192 tokens (3 calls), symm_mem 8192 tokens (1 call)",
        "  all_reduce_rms_norm, hidden 4096, bfloat16, group tp:0: native 1 token (2 captured)",
    ]
    assert list(describe_served([])) == []


def test_text_in_the_report():
    call(4)
    assert str(fusewire.report()).splitlines() == [
        "fusewire: 0 of 0 all-reduces fused in 0 graphs; passes took 0.00 s",
        "served since start (calls that a CUDA graph replays run no host code and are not counted):",
        "  all_reduce_rms_norm, hidden 64, bfloat16, group 0: native 4 tokens (1 call)",
    ]
