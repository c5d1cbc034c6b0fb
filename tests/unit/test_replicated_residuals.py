"""What assume_replicated_residuals=False keeps from kernels and from sharding, and the note on what was assumed."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

import fusewire
from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm
from fusewire.custom_ops.ops.sandwich_norm import all_reduce_sandwich_norm
from fusewire.fusion_passes.config import PassConfig
from fusewire.fusion_passes.context import RunContext
from fusewire.fusion_passes.passes import shard_residual
from fusewire.fusion_passes.passes.lower_ops import lower_ops

from support.blocks import HIDDEN, NORMS, reduce_functional, tensors
from support.compiles import WITHOUT_CODE
from support.distributed import fake_group, shared_pool
from support.graphs import capture
from support.written_graphs import SHARDED, Build

PLAIN, SANDWICH = all_reduce_rms_norm.torch_op, all_reduce_sandwich_norm.torch_op


# What the option does

KERNEL = "test_kernel"


def _as_native(x, residual, weight, eps, weight_bias, form, group_name):
    return all_reduce_rms_norm.native(x, residual, weight, eps, weight_bias, form, group_name)


@pytest.fixture
def world():
    """Two ranks, and a provider of which nothing is known."""
    with fake_group(2) as group:
        all_reduce_rms_norm.register_impl(KERNEL)(_as_native)
        yield group
        all_reduce_rms_norm.unregister_impl(KERNEL)


@pytest.fixture(autouse=True)
def cheap_gathers(monkeypatch):
    monkeypatch.setattr(shard_residual, "OPS_PER_GATHER", 3)


WITH_KERNEL = {"ir_op_priority": {"all_reduce_rms_norm": (KERNEL, "native")}}
TAKEN = "taken to be equal on all ranks: "
PARAMETERS = (
    "comes from inputs or parameters of the graph and may differ between ranks (assume_replicated_residuals=False)"
)


def two_layers(x, residual, w):
    residual = residual + reduce_functional(x)
    residual = residual + reduce_functional(NORMS["L"](residual, w, 1e-5).sin())
    return NORMS["L"](residual, w, 1e-5), residual


def proved(x, residual, w):
    """The residual is a sum over the ranks, too, and the norms have no weight."""
    residual = reduce_functional(x)
    for _ in range(4):
        residual = residual + reduce_functional(NORMS["weightless"](residual, None, 1e-5).sin())
    return NORMS["weightless"](residual, None, 1e-5), residual


def policies(captured):
    return [node.args[-1] for node in captured.graph.nodes if node.target in (PLAIN, SANDWICH, SHARDED)]


def test_a_kernels_assumption_is_in_the_report(world):
    captured = capture(two_layers, *tensors(), **WITH_KERNEL)
    assert policies(captured) == [f"{KERNEL},native"] * 2
    assert captured.report.notes == (f"{TAKEN}the residual or weight of 2 operators (assume_replicated_residuals)",)
    assert TAKEN in str(fusewire.report())


@pytest.mark.parametrize("dynamic", [False, True])
def test_without_the_assumption_native_serves(world, dynamic):
    captured = capture(two_layers, *tensors(), dynamic=dynamic, assume_replicated_residuals=False, **WITH_KERNEL)
    assert captured.verdicts() == [("fused", "")] * 2
    assert policies(captured) == []
    assert [entry.provider for entry in captured.report.entries] == ["native"] * 2
    assert captured.reasons() == [f"{KERNEL}: the residual {PARAMETERS}"] * 2
    assert captured.report.notes == ()


def test_without_the_assumption_the_call_carries_native_alone(world):
    options = {**WITH_KERNEL, "inline_native": False, "fi_allreduce_fusion_max_size_mb": 4.0}
    assert policies(capture(two_layers, *tensors(), **options)) == [f"{KERNEL},native;max_size_mb=4"] * 2
    assert policies(capture(two_layers, *tensors(), assume_replicated_residuals=False, **options)) == ["native"] * 2


@pytest.mark.parametrize("assume", [False, True])
def test_what_is_proved_needs_no_assumption(world, assume):
    captured = capture(proved, *tensors(), assume_replicated_residuals=assume, **WITH_KERNEL)
    assert policies(captured) == [f"{KERNEL},native"] * 5
    assert captured.report.notes == ()
    assert not any("assume_replicated" in reason for reason in captured.reasons())


def test_a_forced_kernel_does_not_serve_without_the_assumption(world):
    options = {"ir_op_priority": {"all_reduce_rms_norm": (KERNEL,)}, "inline_native": False}
    captured = capture(two_layers, *tensors(), assume_replicated_residuals=False, **options)
    assert policies(captured) == ["native"] * 2


@pytest.mark.parametrize(
    ("options", "policy"),
    [
        ({"ir_op_priority": {"all_reduce_rms_norm": ("rank_ordered", KERNEL, "native")}}, "rank_ordered,native"),
        ({"ir_op_priority": {"all_reduce_rms_norm": ("rank_ordered",)}}, "rank_ordered"),
        ({"batch_invariant": True}, "rank_ordered_batch_invariant"),
        ({"inline_native": False, "ir_op_priority": {"all_reduce_rms_norm": ("native", KERNEL)}}, f"native,{KERNEL}"),
    ],
)
def test_providers_that_add_each_ranks_own_residual_stay(world, options, policy):
    captured = capture(two_layers, *tensors(), assume_replicated_residuals=False, **options)
    assert policies(captured) == [policy] * 2
    assert captured.report.notes == ()


@pytest.mark.parametrize("provider", ["rank_ordered", "native"])
def test_providers_that_add_each_ranks_own_residual_assume_nothing(world, provider):
    options = {"ir_op_priority": {"all_reduce_rms_norm": (provider,)}, "inline_native": False}
    captured = capture(two_layers, *tensors(), **options)
    assert policies(captured) == [provider] * 2
    assert captured.report.notes == ()


def test_a_batch_invariant_provider_of_the_users_is_taken_for_a_kernel(world):
    all_reduce_rms_norm.register_impl("test_steady", batch_invariant=True)(_as_native)
    options = {"batch_invariant": True, "ir_op_priority": {"all_reduce_rms_norm": ("test_steady",)}}
    try:
        taken = capture(two_layers, *tensors(), **options)
        kept = capture(two_layers, *tensors(), assume_replicated_residuals=False, **options)
    finally:
        all_reduce_rms_norm.unregister_impl("test_steady")
    assert policies(taken) == ["test_steady,rank_ordered_batch_invariant"] * 2
    assert len(taken.report.notes) == 1
    assert policies(kept) == ["rank_ordered_batch_invariant"] * 2
    assert kept.report.notes == ()


def test_on_cpus_nothing_is_assumed(world):
    captured = capture(two_layers, *tensors())
    assert captured.verdicts() == [("fused", "")] * 2
    assert captured.report.notes == ()


def test_inner_weights_of_sandwich_norms(world):
    def block(x, residual, w):
        residual = reduce_functional(residual)
        total = residual + NORMS["G"](reduce_functional(x), w, 1e-6)
        return NORMS["weightless"](total, None, 1e-6), total

    options = {**WITH_KERNEL, "inline_native": False}
    assert len(capture(block, *tensors(), **options).report.notes) == 1
    captured = capture(block, *tensors(), assume_replicated_residuals=False, **options)
    assert captured.count(SANDWICH) == 1
    assert policies(captured) == ["native"]
    assert f"the inner weight {PARAMETERS}" in captured.reasons()[1]


def sequence(x, residual, w):
    """Sequence parallelism: the residual is this rank's own rows."""
    rows = residual + functional.reduce_scatter_tensor(x, "sum", 0, dist.group.WORLD)
    normed = NORMS["L"](rows, w, 1e-5) if w is not None else NORMS["weightless"](rows, None, 1e-5)
    return functional.all_gather_tensor(normed, 0, dist.group.WORLD).relu(), rows


def test_sequence_parallelism_needs_equal_weights_only(world):
    x, residual, w = tensors(shape=(6,))
    for weight, notes, policy in ((w, 1, "native"), (None, 0, f"{KERNEL},native")):
        inputs = (x, residual[:3], weight)
        captured = capture(sequence, *inputs, **WITH_KERNEL, inline_native=False)
        assert (policies(captured), len(captured.report.notes)) == ([f"{KERNEL},native"], notes)
        captured = capture(sequence, *inputs, assume_replicated_residuals=False, **WITH_KERNEL, inline_native=False)
        assert (policies(captured), len(captured.report.notes)) == ([policy], 0)
        assert (f"the weight {PARAMETERS}" in captured.reasons()[0]) == (weight is not None)


def test_calls_of_the_users_own(world):
    """Also such as name their provider."""
    name = world.group_name

    def block(x, residual, w):
        return torch.ops.fusewire.all_reduce_rms_norm(x, residual, w, 1e-5, 0.0, "scale_then_round", name, KERNEL)

    captured = capture(block, *tensors())
    assert policies(captured) == [KERNEL]
    assert captured.report.notes == (f"{TAKEN}the residual or weight of 1 operator (assume_replicated_residuals)",)
    captured = capture(block, *tensors(), assume_replicated_residuals=False, inline_native=False)
    assert policies(captured) == ["native"]


@pytest.mark.parametrize(("assume", "policy"), [(True, ()), (False, ("native",))])
def test_a_call_that_decides_at_run_time(world, assume, policy):
    """One whose arguments the passes do not know."""
    build = Build()
    call = build.fused(build.r)
    lower_ops(build.graph, RunContext(PassConfig(assume_replicated_residuals=assume, **WITH_KERNEL)))
    assert call.args[7:] == policy


def test_a_policy_of_options_alone_means_the_default_providers(world):
    """Those of the operator that the call's operator extends."""
    build = Build()
    call = build.sandwich(build.r)
    call.args = (*call.args, ";max_size_mb=1")
    lower_ops(build.graph, RunContext(PassConfig(assume_replicated_residuals=False)))
    assert call.args[-1] == "native"


# Sharding


def chain(x, residual, w):
    for _ in range(4):
        residual = residual + reduce_functional(x.sin())
        x = NORMS["L"](residual, w, 1e-5)
    return x


@pytest.mark.parametrize("options", [{"inline_native": False}, WITH_KERNEL], ids=["native", "kernel"])
def test_a_sharded_residual_is_an_assumption(world, options):
    """Counted once an operator, whoever serves it."""
    captured = capture(chain, *tensors(shape=(32,)), shard_residual=True, **options)
    assert captured.count(SHARDED) == 4
    assert captured.report.notes == (f"{TAKEN}the residual or weight of 4 operators (assume_replicated_residuals)",)


def test_without_the_assumption_the_residual_is_not_sharded(world):
    options = {"shard_residual": True, "assume_replicated_residuals": False, "inline_native": False}
    captured = capture(chain, *tensors(shape=(32,)), **options)
    assert (captured.count(SHARDED), captured.count(PLAIN)) == (0, 4)
    assert captured.report.notes == (f"shard_residual: 4 operators stay as they are: the residual {PARAMETERS}",)


def test_a_proved_residual_is_sharded_without_the_assumption(world):
    options = {"shard_residual": True, "assume_replicated_residuals": False, **WITH_KERNEL}
    captured = capture(proved, *tensors(shape=(32,)), **options)
    assert captured.count(SHARDED) == 5
    assert policies(captured) == [f"{KERNEL},native"] * 5
    assert captured.report.notes == ()


def _wrong_where_residuals_differ(assume: bool) -> bool:
    """Whether a rank's own residual is lost."""
    torch._dynamo.reset()
    shard_residual.MIN_TOKENS, shard_residual.OPS_PER_GATHER = 1, 3
    x, residual, w = tensors(torch.float32, (4,))
    residual = residual * (1 + dist.get_rank())
    options = {"shard_residual": True, "assume_replicated_residuals": assume, "expect_fused": "all", **WITHOUT_CODE}
    with torch.no_grad():
        found = torch.compile(chain, backend="fusewire", options=options)(x, residual, w)
        return not torch.allclose(found, chain(x, residual, w), 1e-3, 1e-3)


def test_unequal_residuals_stay_each_ranks_own():
    assert shared_pool(2).run(_wrong_where_residuals_differ, False) == [False, False]
    assert any(shared_pool(2).run(_wrong_where_residuals_differ, True))  # what the option is for


# Scales and gates


def scaled(x, residual, w, scale):
    return NORMS["G"](residual + reduce_functional(x) * scale, w, 1e-6)


def gated(x, residual, w, gate):
    summed = reduce_functional(residual)
    hidden = NORMS["G"](summed, w, 1e-6)
    return NORMS["G"](summed + reduce_functional(hidden.sin()) * torch.sigmoid(hidden @ gate), w, 1e-6)


def gated_by_the_sum(x, residual, w, gate):
    """The gate is computed from nothing but an all-reduce's result."""
    summed = reduce_functional(residual)
    gate = summed.mean(-1, keepdim=True).sigmoid()
    return NORMS["G"](summed + reduce_functional(x) * gate, w, 1e-6)


SCALE, GATE = torch.tensor(8.0, dtype=torch.bfloat16), torch.ones(HIDDEN, 1, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("block", "extra", "options", "note"),
    [
        (scaled, SCALE, {}, "1 scale (assume_replicated_scales)"),
        (gated, GATE, {"assume_replicated_gates": True}, "1 gate (assume_replicated_gates)"),
        (
            lambda x, r, w, s: scaled(scaled(x, r, w, s).sin(), r, w, s),
            SCALE,
            {},
            "2 scales (assume_replicated_scales)",
        ),
        (
            lambda x, r, w, s: NORMS["L"](x + (reduce_functional(x) * s + reduce_functional(r) * s), w, 1e-6),
            SCALE,
            {},
            "2 scales (assume_replicated_scales)",
        ),
        (
            scaled,
            SCALE,
            WITH_KERNEL,
            "the residual or weight of 1 operator (assume_replicated_residuals), 1 scale (assume_replicated_scales)",
        ),
    ],
    ids=["scale", "gate", "two scales", "merged", "all"],
)
def test_what_moved_is_in_the_report(world, block, extra, options, note):
    captured = capture(block, *tensors(), extra, **options)
    assert captured.report.notes == (TAKEN + note,)


@pytest.mark.parametrize(
    ("block", "extra", "options"),
    [
        (scaled, 0.5, {}),
        (scaled, SCALE, {"allow_reassociation": False}),
        (scaled, SCALE, {"assume_replicated_scales": False}),
        (gated, GATE, {}),
        (gated_by_the_sum, GATE, {"assume_replicated_gates": True}),
    ],
)
def test_what_did_not_move_or_is_proved_is_not(world, block, extra, options):
    assert capture(block, *tensors(), extra, **options).report.notes == ()


def test_only_the_last_run_counts(world):
    """A refused site makes the passes run again, on a graph where its scale stays."""

    def block(x, residual, w, scale, wide):
        first = scaled(x, residual, w, scale)
        return first, scaled(first.cos(), residual, wide, scale)

    captured = capture(block, *tensors(), SCALE, torch.ones(HIDDEN))
    assert [status for status, _ in captured.verdicts()] == ["fused", "refused"]
    assert captured.report.notes == (f"{TAKEN}1 scale (assume_replicated_scales)",)
