"""Norms as operators, and the fused operator: their forms, dtypes and shapes against plain PyTorch."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm, sum_in_rank_order
from fusewire.custom_ops.ops.norms import NormSpec, add_residual, fused_add_rms_norm, normalize, rms_norm
from fusewire.custom_ops.ops.registry import (
    NATIVE,
)
from fusewire.errors import (
    ArgumentError,
    ProcessGroupError,
    TrainingError,
)

from support.distributed import fake_group, run_ranks

FORMS = (
    "scale_then_round",
    "round_then_scale",
    "wide_sum_scale_then_round",
    "wide_sum_round_then_scale",
)
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


# The norms


def _tensors(dtype: Any, residual: Any = None, weight: Any = None, hidden: int = 48) -> tuple[Any, Any, Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, hidden, generator=generator).to(dtype)
    r = None if residual is None else torch.randn(3, 5, hidden, generator=generator).to(residual)
    w = None if weight is None else torch.randn(hidden, generator=generator).to(weight)
    return x, r, w


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weight", [None, torch.bfloat16, torch.float32], ids=str)
def test_opcheck_rms_norm(weight, form):
    """Schema, fake tensors, autograd and AOTAutograd with dynamic shapes agree with what runs."""
    x, _, w = _tensors(torch.bfloat16, None, weight)
    for tensor in (x, x.transpose(0, 1), x[:, :0], x.detach().requires_grad_()):
        opcheck(rms_norm.torch_op, (tensor, w, 1e-5, 1.0, form))


@pytest.mark.parametrize("residual", [torch.bfloat16, torch.float32], ids=str)
def test_opcheck_fused_add_rms_norm(residual):
    """The same for two outputs."""
    x, r, w = _tensors(torch.bfloat16, residual, torch.float32)
    opcheck(fused_add_rms_norm.torch_op, (x, r, w))
    opcheck(fused_add_rms_norm.torch_op, (x.transpose(0, 1), r.transpose(0, 1), None, 1e-6, 0.0, FORMS[1]))
    opcheck(fused_add_rms_norm.torch_op, (x.detach().requires_grad_(), r, w, 1e-6, 0.0, FORMS[0], NATIVE))
    opcheck(fused_add_rms_norm.torch_op, (x.detach().requires_grad_(), r, w, 1e-6, 1.0, FORMS[3]))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_outputs_have_the_dtype_of_x(dtype):
    """Whatever the residual's and the weight's: eager, fake and traced."""
    for residual, weight, form in itertools.product(FLOATS, (None, *FLOATS), FORMS):
        x, r, w = _tensors(dtype, residual, weight)
        for tensors in ((x, r, w), tuple(None if t is None else t.to("meta") for t in (x, r, w))):
            outputs = fused_add_rms_norm(*tensors, 1e-6, 1.0, form)
            assert [o.dtype for o in outputs] == [dtype, dtype], (residual, weight, form)
            assert rms_norm(tensors[0], tensors[2], 1e-6, 1.0, form).dtype == dtype


@pytest.mark.parametrize("residual", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_residual_sum_is_rounded_once(dtype, residual):
    """Taken in fp32 at least; the norm is of the rounded sum."""
    x, r, w = _tensors(dtype, residual, dtype)
    norm, summed = fused_add_rms_norm(x, r, w)
    wide = torch.float64 if torch.float64 in (dtype, residual) else torch.float32
    assert torch.equal(summed, (x.to(wide) + r.to(wide)).to(dtype))
    assert torch.equal(norm, rms_norm(summed, w))


@pytest.mark.parametrize("weight_bias", [0.0, 1.0])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weight", [None, *FLOATS], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_forms_against_float64(dtype, weight, form, weight_bias):
    """Each form to the roundings it is made of, step by step in float64."""
    x, _, w = _tensors(dtype, None, weight)
    got = rms_norm(x, w, 1e-5, weight_bias, form)
    wide = x.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    roundings = 1
    if w is not None:
        if form.endswith("round_then_scale"):
            scale = (w + weight_bias).double()  # in the weight's own dtype
            exact, roundings = exact * scale, 2
        else:
            exact = exact * (w.double() + weight_bias)
    unit = max(torch.finfo(dtype).eps, 2 * torch.finfo(torch.float32).eps if dtype != torch.float64 else 0)
    bound = roundings * unit / 2 * exact.abs() * 1.01 + torch.finfo(dtype).smallest_normal
    slack = 4 if dtype in (torch.float32, torch.float64) else 1
    assert ((got.double() - exact).abs() <= slack * bound).all()


def test_the_two_forms_are_two():
    """They differ where models differ, so a test that mixed them up would be seen."""
    x, _, w = _tensors(torch.bfloat16, None, torch.bfloat16, 512)
    assert not torch.equal(rms_norm(x, w, form=FORMS[0]), rms_norm(x, w, form=FORMS[1]))
    llama = w * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
    assert torch.equal(rms_norm(x, w, form="round_then_scale"), llama)
    gemma = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + w.float())
    assert torch.equal(rms_norm(x, w, weight_bias=1.0), gemma.to(x.dtype))
    module = torch.nn.RMSNorm(512, eps=1e-6, dtype=torch.float32)
    module.weight.data.copy_(w)
    torch.testing.assert_close(rms_norm(x.float(), w.float()), module(x.float()), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("form", FORMS)
def test_weightless_norms_multiply_by_nothing(form):
    """One multiplication, by the inverse root: with a weight there is one more, with a bias an addition."""

    def count(with_weight: bool, weight_bias: float) -> tuple[int, int]:
        x, w = torch.randn(2, 8, dtype=torch.bfloat16), torch.randn(8, dtype=torch.bfloat16)
        if with_weight:
            graph = make_fx(lambda x, w: normalize(x, NormSpec(w, 1e-6, weight_bias, form)))(x, w).graph
        else:
            graph = make_fx(lambda x: normalize(x, NormSpec(None, 1e-6, weight_bias, form)))(x).graph
        packets = [getattr(node.target, "overloadpacket", None) for node in graph.nodes]
        return packets.count(torch.ops.aten.mul), packets.count(torch.ops.aten.add)

    assert count(False, 0.0) == (1, 1)
    assert count(False, 1.0) == (1, 1)
    assert count(True, 0.0) == (2, 1)
    assert count(True, 1.0) == (2, 2)


def test_weightless_equals_a_weight_of_ones():
    """And its bias is ignored."""
    x, r, _ = _tensors(torch.bfloat16, torch.bfloat16)
    ones = torch.ones(48, dtype=torch.bfloat16)
    assert torch.equal(rms_norm(x), rms_norm(x, ones))
    assert torch.equal(rms_norm(x, None, 1e-6, 1.0), rms_norm(x))
    assert torch.equal(fused_add_rms_norm(x, r)[0], fused_add_rms_norm(x, r, ones)[0])


def test_layouts_do_not_matter():
    """Transposed, sliced, broadcast and empty inputs; outputs are contiguous and alias nothing."""
    x, r, w = _tensors(torch.float32, torch.float32, torch.float32)
    wide = torch.randn(3, 5, 100)
    for a, b in (
        (x.transpose(0, 1), r.transpose(0, 1)),
        (x, r.transpose(0, 1).contiguous().transpose(0, 1)),
        (wide[..., 7:55], wide[..., ::2][..., :48]),
        (x[:1].expand(3, 5, 48), r[:, :1].expand(3, 5, 48)),
        (x[:0], r[:0]),
        (x[0, 0], r[0, 0]),
    ):
        got = fused_add_rms_norm(a, b, w)
        want = fused_add_rms_norm(a.contiguous(), b.contiguous(), w)
        for result, expected in zip(got, want, strict=True):
            assert result.is_contiguous()
            assert torch.equal(result, expected)
        assert torch.equal(rms_norm(a, w), rms_norm(a.contiguous(), w))
    before = (x.clone(), r.clone())
    norm, summed = fused_add_rms_norm(x, r, w)
    norm.zero_()
    assert torch.equal(summed, add_residual(x, r))
    summed.zero_()
    assert torch.equal(x, before[0])
    assert torch.equal(r, before[1])


@pytest.mark.parametrize("weight_bias", [0.0, 1.0])
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form, weight_bias):
    """Of every differentiable input, together and alone, with one output used or both."""
    x, r, w = (t.reshape(-1, 6)[:3] if t.dim() > 1 else t for t in _tensors(*[torch.float64] * 3, hidden=6))
    x, r, w = (t.clone().requires_grad_() for t in (x, r, w))
    rest = (1e-3, weight_bias, form)
    check = torch.autograd.gradcheck
    assert check(lambda x, w: rms_norm(x, w, *rest), (x, w))
    assert check(lambda x: rms_norm(x, None, *rest), (x,))
    assert check(lambda w: rms_norm(x.detach(), w, *rest), (w,))
    assert check(lambda x, r, w: fused_add_rms_norm(x, r, w, *rest), (x, r, w))
    assert check(lambda r: fused_add_rms_norm(x.detach(), r, None, *rest, NATIVE)[1], (r,))
    assert check(lambda x, r: fused_add_rms_norm(x, r)[0], (x, r))


def test_gradients_of_mixed_dtypes_are_natives():
    """Each in its input's dtype, equal to differentiating the definition."""
    x, r, w = _tensors(torch.bfloat16, torch.float32, torch.float32)

    def gradients(norm: Any) -> list[Tensor]:
        inputs = [t.clone().requires_grad_() for t in (x, r, w)]
        norm_out, summed = norm(*inputs, 1e-6, 1.0, FORMS[0])
        (norm_out.float().square().sum() + summed.float().sum()).backward()
        return [t.grad for t in inputs]

    got, want = gradients(fused_add_rms_norm), gradients(fused_add_rms_norm.native)
    assert [g.dtype for g in got] == [torch.bfloat16, torch.float32, torch.float32]
    assert all(torch.equal(g, e) for g, e in zip(got, want, strict=True))


X, W = torch.zeros(2, 8), torch.zeros(8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(()), None), r"x must be a floating-point tensor .* not torch.float32 \[\]"),
        ((X.int(), None), r"x must be a floating-point tensor .* not torch.int32 \[2, 8\]"),
        ((X.to(torch.float8_e4m3fn), None), "bfloat16, float16, float32 or float64.*float8_e4m3fn"),
        ((X.to(torch.complex64), None), "not torch.complex64"),
        ((X, W[:7]), r"the weight has shape \[7\]; for x of shape \[2, 8\] it must be \[8\]"),
        ((X, X), r"the weight has shape \[2, 8\]"),
        ((X, W.int()), "the weight must be floating-point .* not torch.int32"),
        ((X, W.to(torch.float8_e5m2)), "the weight must be floating-point .* not torch.float8_e5m2"),
        ((X, W.to("meta")), "the weight is on meta but x is on cpu; put them on one device"),
        ((X, None, -1.0), "eps is -1.0; it must be zero or positive"),
        ((X, None, float("nan")), "eps is nan"),
        ((X, None, 1e-6, 0.0, "scale"), "form is 'scale'; it must be one of 'scale_then_round', 'round_then"),
    ],
)
def test_argument_errors(arguments, message):
    """The same from each of the three operators, eager and fake."""
    x, *rest = arguments
    calls = [
        lambda x, *rest: rms_norm(x, *rest),
        lambda x, *rest: fused_add_rms_norm(x, x, *rest),
        lambda x, w, e=1e-6, b=0.0, f=FORMS[0]: all_reduce_rms_norm(x, None, w, e, b, f, "0"),
    ]
    for call in calls:
        with pytest.raises(ArgumentError, match=message):
            call(x, *rest)
    if "meta" not in message:
        fake = [t.to("meta") if isinstance(t, Tensor) else t for t in arguments]
        for call in calls:
            with pytest.raises(ArgumentError, match=message):
                call(*fake)


@pytest.mark.parametrize(
    ("residual", "message"),
    [
        (torch.zeros(1, 8), r"the residual has shape \[1, 8\] but x has \[2, 8\]; they must be equal"),
        (X.long(), "the residual must be floating-point .* not torch.int64"),
        (X.to(torch.float8_e4m3fn), "the residual must be floating-point .* not torch.float8_e4m3fn"),
        (X.to("meta"), "the residual is on meta but x is on cpu"),
    ],
)
def test_residual_errors(residual, message):
    """From both operators that take one."""
    with pytest.raises(ArgumentError, match=message):
        fused_add_rms_norm(X, residual)
    with pytest.raises(ArgumentError, match=message):
        all_reduce_rms_norm(X, residual, None, group_name="0")


# The fused operator


@pytest.fixture
def one_rank():
    """The name of a real process group of one rank, in this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD.group_name
    dist.destroy_process_group()


def test_no_process_group():
    """For plain tensors and parameters, with what to do; and a group needs a name."""
    for x in (X, torch.nn.Parameter(X)):
        for policy in ("native", "rank_ordered"):
            with pytest.raises(ProcessGroupError, match=r"not initialised .* call torch.distributed.init_process_g"):
                all_reduce_rms_norm(x, None, None, group_name="0", policy=policy)
    with pytest.raises(ArgumentError, match="group_name is empty"):
        all_reduce_rms_norm(X, None, None)


def test_unknown_process_group(one_rank):
    """The name is given back."""
    for policy in ("native", "rank_ordered"):
        with pytest.raises(ProcessGroupError, match="no process group named 'other' in this process"):
            all_reduce_rms_norm(X, None, None, group_name="other", policy=policy)


@pytest.mark.parametrize("policy", ["rank_ordered", "rank_ordered_batch_invariant"])
def test_gloo_is_not_asked_to_gather_gpu_tensors(one_rank, policy):
    """PyTorch would crash."""
    provider = all_reduce_rms_norm.providers[policy]
    args = (None, None, 1e-6, 0.0, "scale_then_round", one_rank)
    with FakeTensorMode():
        on_gpu, on_cpu = torch.empty(2, 16, device="cuda"), torch.empty(2, 16)
        assert "gloo, which cannot gather cuda tensors; use NCCL" in provider.check(on_gpu, *args).reason
        assert provider.check(on_cpu, *args)


@pytest.mark.parametrize("policy", ["native", "rank_ordered"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_one_rank(one_rank, dtype, policy):
    """A sum of one: exactly the norms without it, inputs untouched, nothing aliased."""
    for residual, weight, form in itertools.product((None, dtype, torch.float32), (None, torch.float32), FORMS):
        x, r, w = _tensors(dtype, residual, weight)
        before = x.clone()
        norm, summed = all_reduce_rms_norm(x, r, w, 1e-5, 1.0, form, one_rank, policy)
        rest = (w, 1e-5, 1.0, form)
        want = (rms_norm(x, *rest), x) if r is None else fused_add_rms_norm(x, r, *rest)
        assert torch.equal(norm, want[0])
        assert torch.equal(summed, want[1])
        assert norm.dtype == summed.dtype == dtype
        norm.zero_()
        summed.zero_()
        assert torch.equal(x, before)


@pytest.mark.parametrize("policy", ["native", "rank_ordered"])
def test_one_rank_layouts(one_rank, policy):
    """No tokens, strided and transposed inputs, a single vector."""
    x, r, w = _tensors(torch.bfloat16, torch.bfloat16, torch.bfloat16)
    for a, b in (
        (x[:0], r[:0]),
        (x[:, ::2], r[:, 1:4]),
        (x.transpose(0, 1), r.transpose(0, 1)),
        (x[0, 0], r[0, 0]),
    ):
        got = all_reduce_rms_norm(a, b, w, group_name=one_rank, policy=policy)
        for result, expected in zip(got, fused_add_rms_norm(a, b, w), strict=True):
            assert torch.equal(result, expected)
            assert result.is_contiguous()


def test_opcheck_all_reduce_rms_norm(one_rank):
    """With and without residual and weight, no tokens, and in a graph."""
    x, r, w = _tensors(torch.bfloat16, torch.bfloat16, torch.float32)
    for tensors in (
        (x, r, w),
        (x, None, None),
        (x.transpose(0, 1), r.transpose(0, 1), None),
        (x[:0], None, w),
    ):
        opcheck(all_reduce_rms_norm.torch_op, (*tensors, 1e-6, 1.0, FORMS[0], one_rank))


def test_fake_group_gives_shapes_only():
    """On any number of ranks, in one process."""
    x, r, w = _tensors(torch.bfloat16, torch.float32, torch.float32)
    with fake_group(4) as group:
        opcheck(all_reduce_rms_norm.torch_op, (x, r, w, 1e-6, 0.0, FORMS[0], group.group_name))
        norm, summed = all_reduce_rms_norm(x, r, w, group_name=group.group_name)
        assert norm.shape == summed.shape == x.shape
        assert norm.dtype == summed.dtype == x.dtype


def test_training_is_refused(one_rank):
    """In backward, where it would be wrong, and not before."""
    x, r, w = (t.requires_grad_() for t in _tensors(*[torch.float32] * 3))
    norm, summed = all_reduce_rms_norm(x, r, w, group_name=one_rank)
    assert norm.requires_grad
    with pytest.raises(TrainingError, match=r"for inference and has no backward; run the model under torch.no_grad"):
        (norm.sum() + summed.sum()).backward()
    with torch.no_grad():
        assert not all_reduce_rms_norm(x, r, w, group_name=one_rank)[0].requires_grad


def _three_ranks() -> list[bool]:
    group, rank = dist.group.WORLD.group_name, dist.get_rank()
    parts = [torch.randn(7, 24, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(3)]
    parts[0][0], parts[1][0], parts[2][0] = 2.0**30, 1.0, -(2.0**30)
    residual, weight = torch.randn(7, 24, generator=torch.Generator().manual_seed(9)), torch.rand(24)
    dist.broadcast(weight, 0)
    reduced = parts[rank].clone()
    dist.all_reduce(reduced)
    ordered = ((parts[0].float() + parts[1].float()) + parts[2].float()).bfloat16()
    checks = [
        torch.equal(sum_in_rank_order(parts[rank], group), ordered),
        ordered[0, 0] == 0,  # another order would give 1
        sum_in_rank_order(parts[rank][:0], group).shape == (0, 24),
        torch.equal(sum_in_rank_order(parts[rank].t(), group), ordered.t()),
        sum_in_rank_order(parts[rank].double(), group).dtype == torch.float64,
    ]
    for summed, policy in ((reduced, "native"), (ordered, "rank_ordered")):
        norm, out = all_reduce_rms_norm(parts[rank], residual, weight, group_name=group, policy=policy)
        want = fused_add_rms_norm(summed, residual, weight)
        checks += [torch.equal(norm, want[0]), torch.equal(out, want[1])]
        bare = all_reduce_rms_norm(parts[rank], None, None, group_name=group, policy=policy)
        checks += [torch.equal(bare[0], rms_norm(summed)), torch.equal(bare[1], summed)]
    return [bool(c) for c in checks]


def test_sums_over_three_ranks():
    """Native is the group's own all-reduce and then the norm, bit for bit; rank_ordered sums rank 0 first."""
    for checks in run_ranks(_three_ranks, 3, timeout_s=120):
        assert checks == [True] * len(checks)
