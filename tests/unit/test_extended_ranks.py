"""Extended operators on real ranks: native and FlashInfer against their definition."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm
from fusewire.custom_ops.ops.norms import FORMS, NormSpec, add_residual, normalize
from fusewire.custom_ops.ops.registry import get_op
from fusewire.custom_ops.ops.sandwich_norm import all_reduce_sandwich_norm
from fusewire.custom_ops.ops.sharded_norm import all_reduce_rms_norm_sharded, gather_rows, own_rows, shard_rows
from fusewire.errors import ArgumentError, ConfigError, TrainingError
from fusewire.fusion_passes.config import PassConfig

from support.distributed import fake_group, shared_pool
from support.fake_flashinfer import fake_flashinfer

SANDWICH, SHARDED = all_reduce_sandwich_norm.torch_op, all_reduce_rms_norm_sharded.torch_op


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


def _of_sum(x: Tensor, residual: Tensor, outer: NormSpec) -> Tensor:
    """The norm of x and the residual, of their rounded sum or of the sum in fp32."""
    wide = x.float() + residual.float()
    if outer.form.startswith("wide_sum"):
        return normalize(wide, outer._replace(form=outer.form.removeprefix("wide_sum_")), x.dtype)
    return normalize(wide.to(x.dtype), outer)


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
            outer, first = NormSpec(weight, 1e-5, 1.0, form), NormSpec(inner, 1e-6, 0.5, form)
            n = normalize(total, first)
            r, of_r = add_residual(n, residual), _of_sum(n, residual, outer)
            total_r, of_total_r = add_residual(total, residual), _of_sum(total, residual, outer)
            norm, summed = SANDWICH(x, residual, *outer, *first, name, policy)
            same(f"sandwich {shape} {form}", norm, of_r)
            same(f"sandwich {shape} {form}, sum", summed, r)
            for summed, wanted, inner_args, with_residual in (
                (total, normalize(total, outer), (None, 0.0, 0.0, ""), False),
                (total_r, of_total_r, (None, 0.0, 0.0, ""), True),
                (r, of_r, first, True),
            ):
                shard = shard_rows.torch_op(residual, name) if with_residual else None
                norm, part = SHARDED(x, shard, *outer, *inner_args, name, policy)
                what = f"sharded {shape} {form} residual {with_residual} inner {inner_args[-1]!r}"
                same(what, norm, wanted)
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
        wide = (weight, 1e-5, 0.0, FORMS[3])
        part = own_rows(residual, dist.get_rank(), dist.get_world_size())
        for op, given, norm, tail in (
            (all_reduce_sandwich_norm, residual, outer, first),
            (all_reduce_sandwich_norm, residual, wide, first),
            (all_reduce_rms_norm_sharded, part, outer, first),
            (all_reduce_rms_norm_sharded, part, outer, (None, 0.0, 0.0, "")),
        ):
            args = (x, given, *norm, *tail, name)
            chosen = op.selector(op, args, "flashinfer")
            right.append(chosen.name == "flashinfer" and op.selector(op, args, "flashinfer") is chosen)
            pairs = zip(op.torch_op(*args, "flashinfer"), op.native(*args), strict=True)
            right += [torch.allclose(got.float(), wanted.float(), 2e-2, 1e-3) for got, wanted in pairs]
    return right


def test_operators_over_a_provider_without_a_kernel_for_them():
    assert shared_pool(2).run(_over_flashinfer) == [[True] * 12] * 2


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
    assert get_op("all_reduce_rms_norm_sharded").derives_from is all_reduce_rms_norm
