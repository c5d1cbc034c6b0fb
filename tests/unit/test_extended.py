"""Sandwich norms, sequence parallelism and coalesced all-reduces: operators, graphs, refusals, and results."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

import fusewire
from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm
from fusewire.custom_ops.ops.sandwich_norm import all_reduce_sandwich_norm
from fusewire.custom_ops.ops.sharded_norm import all_reduce_rms_norm_sharded
from fusewire.fusion_passes.report.store import Report

from support.blocks import HIDDEN, NORMS, reduce_functional, tensors
from support.distributed import fake_group, shared_pool
from support.graphs import capture

SANDWICH, SHARDED = all_reduce_sandwich_norm.torch_op, all_reduce_rms_norm_sharded.torch_op
RING = torch.ops._c10d_functional


@pytest.fixture
def world():
    with fake_group(2) as group:
        yield group


# --- Graphs of sandwich norms ---------------------------------------------------------------------------------


def sandwich(x, residual, w, spelling="G"):
    total = residual + NORMS[spelling](reduce_functional(x), w, 1e-6)
    return NORMS[spelling](total, w, 1e-6), total


def _called(block, *inputs, **options):
    return capture(block, *(inputs or tensors()), inline_native=False, **options)


@pytest.mark.parametrize("spelling", NORMS)
def test_sandwich_fuses(world, spelling):
    captured = _called(lambda x, r, w: sandwich(x, r, w, spelling))
    assert captured.count(SANDWICH) == 1
    assert captured.count(all_reduce_rms_norm.torch_op) == 0
    (entry,) = captured.report.entries
    assert entry.fusion == "all_reduce + rms_norm + fused_add_rms_norm"


def test_sandwich_of_two_layers_and_dynamic_tokens(world):
    def layers(x, residual, w):
        for _ in range(2):
            x, residual = sandwich(x, residual, w)
        return x, residual

    for dynamic in (False, True):
        captured = _called(layers, dynamic=dynamic)
        assert captured.count(SANDWICH) == 2


def _read_norm(x, r, w):
    norm = NORMS["G"](reduce_functional(x), w, 1e-6)
    return NORMS["G"](r + norm, w, 1e-6), norm


def _read_sum(x, r, w):
    total = reduce_functional(x)
    return NORMS["G"](r + NORMS["G"](total, w, 1e-6), w, 1e-6), total


def _own_residual(x, r, w):
    total = reduce_functional(x)
    return NORMS["G"](total.sin() + NORMS["G"](total, w, 1e-6), w, 1e-6)


def _scaled(x, r, w):
    return NORMS["G"](r + NORMS["G"](reduce_functional(x), w, 1e-6) * r, w, 1e-6)


def _wide_residual(x, r, w):
    return NORMS["G"]((r.float() + NORMS["G"](reduce_functional(x), w, 1e-6)).to(x.dtype), w, 1e-6)


def _weight_of_the_sum(x, r, w):
    total = reduce_functional(x)
    return NORMS["G"](r + NORMS["G"](total, w, 1e-6), total[0], 1e-6)


def _broadcast(x, r, w):
    return NORMS["G"](r[0] + NORMS["G"](reduce_functional(x), w, 1e-6), w, 1e-6)


def _layer_norm(x, r, w):
    return torch.nn.functional.layer_norm(r + NORMS["G"](reduce_functional(x), w, 1e-6), (HIDDEN,), w)


def test_a_sum_that_is_cast_only_for_the_add_is_a_plain_one(world):
    """It is rounded once, as the sum without casts."""
    called = _called(_wide_residual)
    assert called.count(SANDWICH) == 1
    assert torch.equal(called.result, _wide_residual(*tensors()))


@pytest.mark.parametrize(
    "block",
    [_read_norm, _own_residual, _scaled, _weight_of_the_sum, _broadcast, _layer_norm, _read_sum],
)
def test_near_misses_keep_the_first_norm(world, block):
    """What is no sandwich is still an all-reduce with a norm, as it was before there were sandwiches."""
    with_them = _called(block)
    without = _called(block, fuse_sandwich_norms=False)
    assert with_them.count(SANDWICH) == 0
    assert with_them.verdicts() == without.verdicts()
    assert [str(t) for t in with_them.targets()].count("fusewire.fused_add_rms_norm.default") == 0


def test_second_weight_of_another_dtype_keeps_the_first_norm(world):
    def block(x, r, w, w32):
        return NORMS["G"](r + NORMS["G"](reduce_functional(x), w, 1e-6), w32, 1e-6)

    x, r, w = tensors()
    captured = capture(block, x, r, w, w.float())
    assert (captured.count(SANDWICH), captured.verdicts()) == (0, [("fused", "")])


def written_with_operators(x, r, w):
    return torch.ops.fusewire.fused_add_rms_norm(fusewire.rms_norm(reduce_functional(x), w), r, w)


def written_the_other_way_round(x, r, w):
    return torch.ops.fusewire.fused_add_rms_norm(r, fusewire.rms_norm(reduce_functional(x), w), w)


@pytest.mark.parametrize("block", [written_with_operators, written_the_other_way_round])
def test_a_sandwich_of_operators_fuses(world, block):
    captured = _called(block)
    assert (captured.count(SANDWICH), captured.verdicts()) == (1, [("fused", "")])


def collective_between(x, r, w):
    """The residual comes from another all-reduce, which must not change places with the first."""
    norm = NORMS["G"](reduce_functional(x), w, 1e-6)
    return NORMS["G"](reduce_functional(r).sin() + norm, w, 1e-6)


def test_a_sandwich_keeps_the_order_of_collectives(world):
    captured = _called(collective_between)
    assert captured.count(SANDWICH) == 0
    assert captured.count(all_reduce_rms_norm.torch_op) == 1


def test_sandwich_toggle(world):
    captured = _called(sandwich, fuse_sandwich_norms=False)
    assert (captured.count(SANDWICH), captured.count(all_reduce_rms_norm.torch_op)) == (0, 1)


# --- Sequence parallelism -------------------------------------------------------------------------------------


def scatter(x, group=None):
    return functional.reduce_scatter_tensor(x, "sum", 0, group or dist.group.WORLD)


def gather(x, group=None):
    return functional.all_gather_tensor(x, 0, group or dist.group.WORLD)


def sequence(x, shard, w, spelling="L"):
    total = shard + scatter(x)
    return gather(NORMS[spelling](total, w, 1e-5)), total


def sequence_inputs(dtype=torch.bfloat16, tokens=6):
    x, _, w = tensors(dtype, (tokens,))
    return x, tensors(dtype, (tokens // 2,), seed=3)[0], w


@pytest.mark.parametrize("spelling", NORMS)
def test_sequence_fuses(world, spelling):
    captured = _called(lambda *a: sequence(*a, spelling), *sequence_inputs())
    assert captured.count(SHARDED) == 1
    assert (
        captured.count(RING.reduce_scatter_tensor.default) == captured.count(RING.all_gather_into_tensor.default) == 0
    )
    (entry,) = captured.report.entries
    assert (entry.collective, entry.fusion) == (
        "reduce_scatter",
        "reduce_scatter + fused_add_rms_norm + all_gather",
    )
    assert Report((captured.report,)).summary.startswith("fusewire: 1 of 1 reduce-scatters fused in 1 graph")


def two_layers(x, w):
    total = scatter(x)
    hidden = gather(NORMS["L"](total, w, 1e-5))
    total = total + scatter(hidden.sin())
    return gather(NORMS["L"](total, w, 1e-5)), total


def test_sequence_with_dynamic_tokens(world):
    x, _, w = tensors(shape=(6,))
    captured = _called(two_layers, x, w, dynamic=True)
    assert captured.count(SHARDED) == 2
    assert captured.verdicts() == [("fused", "")] * 2


def test_sequence_with_a_wide_weight_is_refused(world):
    x, shard, w = sequence_inputs()
    captured = _called(sequence, x, shard, w.float())
    (entry,) = captured.report.entries
    assert (entry.status, captured.count(SHARDED)) == ("refused", 0)


def test_sequence_without_residual_in_three_dimensions(world):
    def block(x, w):
        total = scatter(x)
        return gather(NORMS["L"](total, w, 1e-5)), total

    x, _, w = tensors(shape=(4, 3))
    captured = _called(block, x, w)
    assert captured.count(SHARDED) == 1
    full, shard = captured.result
    assert (tuple(full.shape), tuple(shard.shape)) == ((4, 3, HIDDEN), (2, 3, HIDDEN))


def test_native_sequence_is_what_it_was(world):
    """Inlined, the same collectives and the same arithmetic."""
    captured = capture(sequence, *sequence_inputs())
    assert (
        captured.count(RING.reduce_scatter_tensor.default) == captured.count(RING.all_gather_into_tensor.default) == 1
    )
    assert not [name for name in captured.targets() if "pad" in name or "slice" in name or "fusewire" in name]


def test_gathers_of_one_norm_become_one(world):
    def block(x, shard, w):
        norm = NORMS["L"](shard + scatter(x), w, 1e-5)
        return gather(norm) @ w, gather(norm).sum()

    captured = _called(block, *sequence_inputs())
    assert captured.verdicts() == [("fused", "")]
    assert captured.count(SHARDED) == 1


def _no_gather(x, shard, w):
    return NORMS["L"](shard + scatter(x), w, 1e-5)


def _rows_read(x, shard, w):
    norm = NORMS["L"](shard + scatter(x), w, 1e-5)
    return gather(norm), norm.sum()


def _partial_read(x, shard, w):
    part = scatter(x)
    return gather(NORMS["L"](shard + part, w, 1e-5)), part.sum()


def _average(x, shard, w):
    part = functional.reduce_scatter_tensor(x, "avg", 0, dist.group.WORLD)
    return gather(NORMS["L"](shard + part, w, 1e-5))


def _between(x, shard, w):
    norm = NORMS["L"](shard + scatter(x), w, 1e-5)
    other = reduce_functional(x)
    return gather(norm), other


def _scaled_rows(x, shard, w):
    return gather(NORMS["L"](shard + scatter(x) * 0.5, w, 1e-5))


def _own_weight(x, shard, w):
    part = scatter(x)
    return gather(NORMS["L"](shard + part, part[0], 1e-5))


@pytest.mark.parametrize(
    ("block", "says"),
    [
        (_no_gather, "read by something else than an all-gather"),
        (_rows_read, "read by something else than an all-gather"),
        (_partial_read, "read elsewhere"),
        (_average, "'avg'"),
        (_between, "another collective of the same group"),
        (_scaled_rows, "a view, a scale or a sum stands between"),
        (_own_weight, "weight is computed from"),
    ],
)
def test_sequence_refusals(world, block, says):
    captured = _called(block, *sequence_inputs())
    (entry,) = [e for e in captured.report.entries if e.collective == "reduce_scatter"]
    assert (entry.status, captured.count(SHARDED)) == ("refused", 0)
    assert says in entry.reason
    assert captured.count(RING.reduce_scatter_tensor.default) == 1


def test_sequence_of_two_groups_is_refused(world):
    other = dist.new_group([0, 1])

    def block(x, shard, w):
        return gather(NORMS["L"](shard + scatter(x), w, 1e-5), other)

    captured = _called(block, *sequence_inputs())
    (entry,) = captured.report.entries
    assert "they must be one group" in entry.reason


def test_sequence_toggle(world):
    captured = _called(sequence, *sequence_inputs(), fuse_sequence_parallel=False)
    assert captured.count(SHARDED) == 0
    assert captured.reasons() == ["fuse_sequence_parallel=False switches the fusion off"]


# --- Coalesced all-reduces ------------------------------------------------------------------------------------


def coalesced(*xs):
    return functional.all_reduce_coalesced(list(xs), "sum", dist.group.WORLD)


def test_coalesced_parts_fuse_and_the_rest_stays(world):
    def block(x, r, w):
        a, b, c = coalesced(x, r, x * 2)
        return NORMS["L"](r + a, w, 1e-5), b.sum(), c.sum()

    captured = _called(block)
    assert sorted(captured.verdicts()) == [("fused", ""), ("refused", "match"), ("refused", "match")]
    (left,) = captured.graph.find_nodes(op="call_function", target=RING.all_reduce_coalesced.default)
    assert len(left.args[0]) == 2


def test_one_tensor_left_of_a_coalesced_all_reduce_is_a_plain_one(world):
    def block(x, r, w):
        a, b = coalesced(x, r)
        return NORMS["L"](r + a, w, 1e-5), b.sum()

    captured = _called(block)
    assert captured.count(RING.all_reduce_coalesced.default) == 0
    assert captured.count(RING.all_reduce.default) == 1


def test_coalesced_without_a_norm_stays(world):
    captured = _called(lambda x, r, w: [t * 2 for t in coalesced(x, r)])
    assert captured.verdicts() == [("refused", "match")] * 2
    assert captured.before[0] == str(captured.graph)


def test_attention_and_feed_forward_side_by_side_become_one(world):
    """x + attention + feed-forward, each all-reduced: one all-reduce of the sum."""

    def block(x, r, w):
        total = (r + reduce_functional(x)) + reduce_functional(x * 2)
        return NORMS["L"](total, w, 1e-5), total

    captured = _called(block)
    assert captured.verdicts() == [("fused", "")] * 2
    assert captured.count(all_reduce_rms_norm.torch_op) == 1
    assert captured.count(RING.all_reduce.default) == 0


def test_sums_that_do_not_fuse_are_not_merged(world):
    def block(x, r, w):
        return ((r + reduce_functional(x)) + reduce_functional(x * 2)).sin()

    captured = _called(block)
    assert len([name for name in captured.targets() if "all_reduce" in name]) == 2
    assert [entry.fusion for entry in captured.report.entries] == ["", ""]


# --- The same results -----------------------------------------------------------------------------------------


def _compiled_on_a_rank(name: str, backend: str) -> bool:
    """Whether the compiled block gives bit for bit what it gives in eager."""
    torch._dynamo.reset()
    block = globals()[name]
    inputs = sequence_inputs(torch.float32, 6 * dist.get_world_size())[:3] if name == "sequence" else None
    if inputs is not None:
        x, _, w = inputs
        inputs = (x, tensors(torch.float32, (6,), seed=3)[0], w)
    else:
        inputs = tuple(tensors(torch.float32))
    inputs = (inputs[0] * (1 + dist.get_rank()), *inputs[1:])
    with torch.no_grad():
        wanted = block(*inputs)
        got = torch.compile(block, backend=backend, fullgraph=True)(*inputs)
    return all(torch.allclose(a, b, 1e-6, 1e-6) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("name", ["sandwich", "sequence"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_compiled_results(ranks, name):
    assert shared_pool(ranks).run(_compiled_on_a_rank, name, "fusewire") == [True] * ranks
