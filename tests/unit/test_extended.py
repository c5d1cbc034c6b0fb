"""Sandwich norms, sequence parallelism and coalesced all-reduces: operators, graphs, refusals, and results."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor

import fusewire
from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm
from fusewire.custom_ops.ops.norms import FORMS, add_residual, normalize
from fusewire.custom_ops.ops.registry import get_op
from fusewire.custom_ops.ops.sandwich_norm import all_reduce_sandwich_norm
from fusewire.custom_ops.ops.sharded_norm import all_reduce_rms_norm_sharded, gather_rows, own_rows, shard_rows
from fusewire.errors import ArgumentError, ConfigError, TrainingError
from fusewire.fusion_passes.config import PassConfig
from fusewire.fusion_passes.report.store import Report

from support.blocks import HIDDEN, NORMS, reduce_functional, tensors
from support.distributed import fake_group, shared_pool
from support.fake_flashinfer import fake_flashinfer
from support.graphs import capture

SANDWICH, SHARDED = all_reduce_sandwich_norm.torch_op, all_reduce_rms_norm_sharded.torch_op
RING = torch.ops._c10d_functional


@pytest.fixture
def world():
    with fake_group(2) as group:
        yield group


# --- The operators, on real ranks -----------------------------------------------------------------------------


def _pieces(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """This rank's partial sums, a residual, and two weights. Sums of eighths are exact in every dtype and order."""

    def eighths(seed: int, *size: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return (torch.randint(-8, 9, size, generator=generator) / 8).to(dtype)

    mine = eighths(100 + dist.get_rank(), *shape)
    return mine, eighths(1, *shape), eighths(2, shape[-1]), eighths(3, shape[-1])


def _total(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    parts = []
    for rank in range(dist.get_world_size()):
        generator = torch.Generator().manual_seed(100 + rank)
        parts.append((torch.randint(-8, 9, shape, generator=generator) / 8).to(dtype))
    return torch.stack(parts).sum(0)


def _operators_on_a_rank(dtype_name: str, policy: str) -> list[str]:
    """The names of the checks that failed."""
    dtype, name, failed = getattr(torch, dtype_name), dist.group.WORLD.group_name, []
    rank, size = dist.get_rank(), dist.get_world_size()

    def same(what: str, got: Tensor, wanted: Tensor) -> None:
        exact = policy in ("native", "rank_ordered")
        close = torch.equal(got, wanted) if exact else torch.allclose(got.float(), wanted.float(), 2e-2, 1e-3)
        if not close or got.shape != wanted.shape:
            failed.append(what)

    for shape in ((1, 16), (size, 16), (5, 16), (2, 3, 16), (0, 16)):
        for form in FORMS:
            x, residual, weight, inner = _pieces(shape, dtype)
            total = _total(shape, dtype)
            outer, first = (weight, 1e-5, 1.0, form), (inner, 1e-6, 0.5, form)
            r = add_residual(normalize(total, *first), residual)
            norm, summed = SANDWICH(x, residual, *outer, *first, name, policy)
            same(f"sandwich {shape} {form}", norm, normalize(r, *outer))
            same(f"sandwich {shape} {form}, sum", summed, r)
            for summed, inner_args, with_residual in (
                (total, (None, 0.0, 0.0, ""), False),
                (add_residual(total, residual), (None, 0.0, 0.0, ""), True),
                (r, first, True),
            ):
                shard = shard_rows.torch_op(residual, name) if with_residual else None
                norm, part = SHARDED(x, shard, *outer, *inner_args, name, policy)
                what = f"sharded {shape} {form} residual {with_residual} inner {inner_args[-1]!r}"
                same(what, norm, normalize(summed, *outer))
                same(f"{what}, shard", part, own_rows(summed, rank, size))
                same(f"{what}, gathered", gather_rows.torch_op(part, x, name), summed)
    return failed


@pytest.mark.parametrize("policy", ["native", "rank_ordered", "rank_ordered_batch_invariant"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_operators(ranks, dtype, policy):
    """Every token count: fewer than ranks, none at all, and such as do not divide."""
    assert shared_pool(ranks).run(_operators_on_a_rank, dtype, policy) == [[]] * ranks


def _over_flashinfer() -> list[bool]:
    """Whether operators that FlashInfer has no kernel for come out right where it serves the plain one."""
    right = []
    with fake_flashinfer():
        name = dist.group.WORLD.group_name
        x, residual, weight, inner = _pieces((4, 64), torch.bfloat16)
        outer, first = (weight, 1e-5, 0.0, FORMS[0]), (inner, 1e-6, 0.0, FORMS[0])
        part = own_rows(residual, dist.get_rank(), dist.get_world_size())
        for op, given, tail in (
            (all_reduce_sandwich_norm, residual, first),
            (all_reduce_rms_norm_sharded, part, first),
            (all_reduce_rms_norm_sharded, part, (None, 0.0, 0.0, "")),
        ):
            args = (x, given, *outer, *tail, name)
            chosen = op.selector(op, args, "flashinfer")
            right.append(chosen.name == "flashinfer" and op.selector(op, args, "flashinfer") is chosen)
            pairs = zip(op.torch_op(*args, "flashinfer"), op.native(*args), strict=True)
            right += [torch.allclose(got.float(), wanted.float(), 2e-2, 1e-3) for got, wanted in pairs]
    return right


def test_operators_over_a_provider_without_a_kernel_for_them():
    assert shared_pool(2).run(_over_flashinfer) == [[True] * 9] * 2


def test_own_rows_cover_every_row_once():
    for tokens in range(12):
        x = torch.arange(tokens * 4.0).reshape(tokens, 4)
        for size in (2, 3, 8):
            shards = [own_rows(x, rank, size) for rank in range(size)]
            assert {tuple(shard.shape) for shard in shards} == {(-(-tokens // size), 4)}
            assert torch.equal(torch.cat(shards)[:tokens], x)
            assert not torch.cat(shards)[tokens:].any()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"residual": torch.zeros(2, 16)}, "residual has shape"),
        ({"weight": torch.ones(8)}, "weight has shape"),
        ({"inner_weight": torch.ones(8)}, "weight has shape"),
        ({"inner_form": "upside_down"}, "form is 'upside_down'"),
        ({"inner_eps": -1.0}, "eps is -1"),
        ({"group_name": ""}, "group_name is empty"),
    ],
)
def test_arguments_of_the_sandwich(world, change, says):
    given = {
        "x": torch.zeros(4, 16),
        "residual": torch.zeros(4, 16),
        "weight": torch.ones(16),
        "group_name": world.group_name,
        **change,
    }
    with pytest.raises(ArgumentError, match=says):
        all_reduce_sandwich_norm(**given)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"residual": torch.zeros(3, 16)}, "the residual has 3 rows; the shard of 4 tokens on 2 ranks has 2"),
        ({"residual": torch.zeros(1, 2, 16)}, "this rank's shard of shape"),
        ({"residual": None, "inner_form": FORMS[0]}, "an inner norm is followed by the residual add"),
        ({"group_name": ""}, "group_name is empty"),
    ],
)
def test_arguments_of_the_sharded(world, change, says):
    given = {"x": torch.zeros(4, 16), "residual": torch.zeros(2, 16), "weight": None, **change}
    given.setdefault("group_name", world.group_name)
    with pytest.raises(ArgumentError, match=says):
        all_reduce_rms_norm_sharded(**given)


def test_no_backward(world):
    x = torch.zeros(4, 16, requires_grad=True)
    norm, _ = all_reduce_sandwich_norm(x, torch.zeros(4, 16), None, group_name=world.group_name)
    with pytest.raises(TrainingError, match="all_reduce_sandwich_norm is for inference"):
        norm.sum().backward()


def test_priorities_are_the_plain_operators():
    with pytest.raises(ConfigError, match="set the priority of all_reduce_rms_norm"):
        PassConfig(ir_op_priority={"all_reduce_sandwich_norm": ("native",)})
    config = PassConfig(ir_op_priority={"all_reduce_rms_norm": ("rank_ordered",)})
    assert config.policy("all_reduce_sandwich_norm") == "rank_ordered"
    assert get_op("all_reduce_rms_norm_sharded").base is all_reduce_rms_norm


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
    (entry,) = captured.account.entries
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


@pytest.mark.parametrize(
    "block",
    [_read_norm, _own_residual, _scaled, _wide_residual, _weight_of_the_sum, _broadcast, _layer_norm, _read_sum],
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
    (entry,) = captured.account.entries
    assert (entry.collective, entry.fusion) == (
        "reduce_scatter",
        "reduce_scatter + fused_add_rms_norm + all_gather",
    )
    assert Report((captured.account,)).summary.startswith("fusewire: 1 of 1 reduce-scatters fused in 1 graph")


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
    (entry,) = captured.account.entries
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
        (_scaled_rows, "a view or a scale stands between"),
        (_own_weight, "weight is computed from"),
    ],
)
def test_sequence_refusals(world, block, says):
    captured = _called(block, *sequence_inputs())
    (entry,) = [e for e in captured.account.entries if e.collective == "reduce_scatter"]
    assert (entry.status, captured.count(SHARDED)) == ("refused", 0)
    assert says in entry.reason
    assert captured.count(RING.reduce_scatter_tensor.default) == 1


def test_sequence_of_two_groups_is_refused(world):
    other = dist.new_group([0, 1])

    def block(x, shard, w):
        return gather(NORMS["L"](shard + scatter(x), w, 1e-5), other)

    captured = _called(block, *sequence_inputs())
    (entry,) = captured.account.entries
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
    assert [entry.fusion for entry in captured.account.entries] == ["", ""]


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
