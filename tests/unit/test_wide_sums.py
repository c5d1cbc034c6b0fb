"""Norms of a sum that is not rounded before, and norms and weights in vLLM's spellings: read in the
form they have."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist

import fusewire
from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm
from fusewire.custom_ops.ops.norms import FORMS, forms_of, keeps_wide_sum
from fusewire.custom_ops.ops.sandwich_norm import all_reduce_sandwich_norm
from fusewire.custom_ops.providers.flashinfer.provider import supports_args
from fusewire.fusion_passes.analysis.norm_reader import find_norms

from support import vllm_norms
from support.blocks import HIDDEN, NORMS, reduce_functional, tensors
from support.graphs import capture

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SCALE, ROUND, WIDE_SCALE, WIDE_ROUND = FORMS
FUSED_OP = all_reduce_rms_norm.torch_op
pytestmark = pytest.mark.usefixtures("fake_world")


@pytest.fixture
def operators():
    libraries = vllm_norms.operators()
    yield
    for library in libraries:
        library._destroy()


def draws(dtype, residual=None, weight=None, rows=64, hidden=256):
    generator = torch.Generator().manual_seed(1)
    x, r = (torch.randn(rows, hidden, generator=generator) for _ in range(2))
    w = torch.randn(hidden, generator=generator)
    return x.to(dtype), r.to(residual or dtype), w.to(weight or dtype)


def equal(got, want):
    assert [g.dtype for g in got] == [w.dtype for w in want]
    assert all(map(torch.equal, got, want))


# The operator's definition, bit for bit


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("policy", ["native", "torch_batch_invariant"])
def test_the_forms_are_vllms(dtype, policy):
    """With the weight in the activations' dtype, and for Gemma a weight in fp32 with 1 added."""
    x, r, w = draws(dtype)
    cases = [(w, w, 0.0, WIDE_ROUND), (w.float() + 1.0, w, 1.0, WIDE_SCALE), (None, None, 0.0, WIDE_SCALE)]
    for theirs, weight, bias, form in cases:
        got = fusewire.fused_add_rms_norm(x, r, weight, 1e-5, bias, form, policy=policy)
        want = vllm_norms.fused_add_rms_norm(x, r, theirs, 1e-5)
        plain = fusewire.rms_norm(x, weight, 1e-5, bias, form, policy=policy)
        if policy == "native":
            equal(got, want)
            equal([plain], [vllm_norms.rms_norm(x, theirs, 1e-5)])
        else:  # the squares are added in another order
            equal(got[1:], want[1:])
            torch.testing.assert_close(got[0], want[0], rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        rounded = fusewire.fused_add_rms_norm(x, r, weight, 1e-5, bias, form.removeprefix("wide_sum_"), policy=policy)
        assert torch.equal(rounded[0], got[0]) == (dtype == FP32)


def test_against_vllm_itself():
    layernorm = pytest.importorskip("vllm.ir.ops.layernorm", reason="vLLM is not installed")
    theirs = layernorm.rms_norm.impls["native"].impl_fn, layernorm.fused_add_rms_norm.impls["native"].impl_fn
    for dtype in (BF16, FP16, FP32):
        x, r, w = draws(dtype, rows=512, hidden=576)
        for weight in (w, None, w.float() + 1.0):
            bias, raw, form = (1.0, w, WIDE_SCALE) if weight is not w else (0.0, w, WIDE_ROUND)
            raw = None if weight is None else raw
            equal([vllm_norms.rms_norm(x, weight, 1e-5)], [theirs[0](x, weight, 1e-5)])
            equal(vllm_norms.fused_add_rms_norm(x, r, weight, 1e-5), theirs[1](x, r, weight, 1e-5))
            equal([fusewire.rms_norm.native(x, raw, 1e-5, bias, form)], [theirs[0](x, weight, 1e-5)])
            equal(fusewire.fused_add_rms_norm.native(x, r, raw, 1e-5, bias, form), theirs[1](x, r, weight, 1e-5))


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP64], ids=str)
def test_the_norm_reads_the_sum_before_it_is_rounded(dtype):
    """Whatever the dtypes: to the definition in float64, within the roundings that the form has."""
    for residual, weight, form in itertools.product((BF16, FP32, FP64), (None, BF16, FP32), (WIDE_SCALE, WIDE_ROUND)):
        x, r, w = draws(dtype, residual, weight)
        w = None if weight is None else w
        norm, summed = fusewire.fused_add_rms_norm.native(x, r, w, 1e-5, 0.0, form)
        wide = FP64 if FP64 in (dtype, residual) else FP32
        total = x.to(wide) + r.to(wide)
        assert torch.equal(summed, total.to(dtype))
        total = total.double() if keeps_wide_sum(form, dtype) else summed.double()
        exact = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-5) * (1 if w is None else w.double())
        roundings = 1 if form == WIDE_SCALE or w is None else 2
        unit = max(torch.finfo(dtype).eps / 2, 4 * torch.finfo(FP32).eps if dtype != FP64 else 1e-15)
        smallest = torch.finfo(dtype).smallest_normal
        assert ((norm.double() - exact).abs() <= roundings * unit * exact.abs() * 1.01 + smallest).all()


def test_forms_without_a_residual_or_in_fp32_are_the_plain_ones():
    x, r, w = draws(BF16)
    for plain, wide in ((SCALE, WIDE_SCALE), (ROUND, WIDE_ROUND)):
        assert torch.equal(fusewire.rms_norm(x, w, 1e-5, 0.0, wide), fusewire.rms_norm(x, w, 1e-5, 0.0, plain))
        equal(
            fusewire.fused_add_rms_norm(x.float(), r.float(), w, 1e-5, 0.0, wide),
            fusewire.fused_add_rms_norm(x.float(), r.float(), w, 1e-5, 0.0, plain),
        )
    assert forms_of(FP32) == forms_of(FP64) == FORMS[:2]
    assert forms_of(BF16) == forms_of(FP16) == FORMS


def test_flashinfer_refuses_what_its_kernels_round(monkeypatch):
    monkeypatch.setattr("fusewire.custom_ops.providers.flashinfer.provider._on_gpu", lambda x: True)
    group = dist.group.WORLD.group_name
    for dtype, form in itertools.product((BF16, FP16, FP32), FORMS):
        x, r, w = draws(dtype)
        support = supports_args(x, r, w, 1e-5, 0.0, form, group)
        assert bool(support) == (dtype == FP32 or not form.startswith("wide_sum")), (dtype, form)
        assert support or "before it is rounded" in support.reason
        assert supports_args(x, None, w, 1e-5, 0.0, form, group)


# Sums in fp32 in graphs


SUMS = {
    "both cast": lambda a, r: a.float() + r.float(),
    "residual first": lambda a, r: r.float() + a.float(),
    "one cast": lambda a, r: a.float() + r,
    "residual cast": lambda a, r: r.float() + a,
}
NORMED = {
    "vLLM": (lambda n, w: n.to(w.dtype) * w, WIDE_ROUND, 0.0),
    "Llama": (lambda n, w: w * n.to(w.dtype), WIDE_ROUND, 0.0),
    "Gemma": (lambda n, w: (n * (w.float() + 1.0)).to(w.dtype), WIDE_SCALE, 1.0),
    "Gemma, 1 first": (lambda n, w: (n * (1.0 + w.to(torch.float32))).to(w.dtype), WIDE_SCALE, 1.0),
    "another number": (lambda n, w: ((w.float() + 0.3) * n).to(w.dtype), WIDE_SCALE, 0.3),
    "weight in fp32": (lambda n, w: (n * w.float()).to(w.dtype), WIDE_SCALE, 0.0),
    "rounded last": (lambda n, w: (n * w).to(w.dtype), WIDE_SCALE, 0.0),
    "no weight": (lambda n, w: n.to(w.dtype), WIDE_SCALE, 0.0),
}


def normed(wide, eps=1e-5):
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("tail", NORMED)
@pytest.mark.parametrize("way", SUMS)
def test_sums_in_fp32(way, tail, dtype):
    scale, form, bias = NORMED[tail]

    def block(x, r, w):
        total = SUMS[way](reduce_functional(x), r)
        return scale(normed(total), w), total.to(x.dtype)

    inputs = tensors(dtype)
    captured = capture(block, *inputs, inline_native=False)
    assert captured.verdicts() == [("fused", "")], captured.reasons()
    (call,) = (node for node in captured.graph.nodes if node.target is FUSED_OP)
    plain = form.removeprefix("wide_sum_") if dtype != FP32 else SCALE
    assert call.args[4:6] == (bias, form if dtype != FP32 else plain)
    assert call.args[2] is None or call.args[2].op == "placeholder"
    assert captured.report.entries[0].spelling.endswith("sum not rounded") == (dtype != FP32)
    equal(captured.result, block(*inputs))
    equal(capture(block, *inputs).result, block(*inputs))


@pytest.mark.parametrize("read", ["the sum", "no sum", "the sum twice"])
def test_readers_of_the_rounded_sum(read):
    def block(x, r, w):
        total = reduce_functional(x).float() + r.float()
        norm = normed(total).to(w.dtype) * w
        if read == "no sum":
            return (norm,)
        return (norm, total.to(BF16)) if read == "the sum" else (norm, total.to(BF16), total.to(BF16).sin())

    inputs = tensors()
    captured = capture(block, *inputs, inline_native=False)
    assert captured.verdicts() == [("fused", "")], captured.reasons()
    assert captured.count(torch.ops.aten.add.Tensor) == 0
    equal(captured.result, block(*inputs))


@pytest.mark.parametrize("norm", ["L", "G", "M'", "weightless"])
@pytest.mark.parametrize("way", SUMS)
def test_sums_that_fp32_only_adds_are_plain(way, norm):
    """Models that cast for the add alone: rounded before the norm, as a sum in bf16 is."""

    def block(x, r, w):
        total = SUMS[way](reduce_functional(x), r).to(x.dtype)
        return NORMS[norm](total, w, 1e-5), total

    inputs = tensors()
    captured = capture(block, *inputs, inline_native=False)
    assert captured.verdicts() == [("fused", "")], captured.reasons()
    (call,) = (node for node in captured.graph.nodes if node.target is FUSED_OP)
    assert not call.args[5].startswith("wide_sum")
    equal(captured.result, block(*inputs))


def test_steps_before_a_sum_in_fp32_move():
    """A scale and a bias go before the all-reduce and to the residual; they round elsewhere, and so
    may be forbidden."""

    def block(x, r, w, bias):
        total = (reduce_functional(x) * 0.5 + bias).float() + r.float()
        return normed(total).to(w.dtype) * w, total.to(BF16)

    inputs = [*tensors(), tensors(seed=3)[2]]
    captured = capture(block, *inputs, inline_native=False)
    assert captured.verdicts() == [("fused", "")], captured.reasons()
    assert captured.count(torch.ops._c10d_functional.all_reduce.default) == 0
    for got, want in zip(captured.result, block(*inputs), strict=True):
        torch.testing.assert_close(got, want, atol=0.04, rtol=0.02)
    assert capture(block, *inputs, allow_reassociation=False).verdicts() == [("refused", "match")]


def sum_in_fp32(x, r, w):
    total = reduce_functional(x).float() + r.float()
    return normed(total).to(w.dtype) * w, total


def product_in_fp32(x, r, w):
    value = normed(reduce_functional(x).float() + r.float())
    return value.to(w.dtype) * w, value


def wide_reduced(x, r, w):
    wide = reduce_functional(x).float()
    return normed(wide + r.float()).to(w.dtype) * w, wide


def moved_and_read(x, r, w):
    wide = (reduce_functional(x) * 0.5).float()
    return normed(wide + r.float()).to(w.dtype) * w, wide


def rounded_and_read(x, r, w):
    total = (reduce_functional(x) * 0.5).float() + r.float()
    return NORMS["L"](total.to(x.dtype), w, 1e-5), total


def kept_in_fp32(x, r, w):
    total = reduce_functional(x).float() + r.float()
    return normed(total) * w, total.to(x.dtype)


def wide_stream(x, r, w):
    return normed(reduce_functional(x) + r.float() * 2).to(w.dtype) * w


def wide_weight(x, r, w):
    total = reduce_functional(x).float() + r.float()
    return (normed(total) * (w.float() * 2.0 + 1.0)).to(x.dtype)


@pytest.mark.parametrize(
    ("block", "says"),
    [
        (sum_in_fp32, "the sum that is normalised is also read in torch.float32 (output)"),
        (product_in_fp32, "the sum that is normalised is also read in torch.float32"),
        (wide_reduced, "between the all-reduce and the norm, is also read elsewhere"),
        (moved_and_read, "between the all-reduce and the norm, is also read elsewhere"),
        (rounded_and_read, "between the all-reduce and the norm, is also read elsewhere"),
        (kept_in_fp32, "never rounded to the input's torch.bfloat16"),
        (wide_stream, "the residual is torch.float32 and the all-reduce torch.bfloat16"),
        (wide_weight, "the norm's weight is torch.float32 and its input torch.bfloat16"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_the_operator_does_not_compute_stays(block, says):
    inputs = tensors()
    captured = capture(block, *inputs)
    assert [status for status, _ in captured.verdicts()] == ["refused"]
    assert says in captured.reasons()[0], captured.reasons()[0]
    assert str(captured.graph) == captured.before[0]


def test_batch_invariant_mode_raises_sums_in_fp32_too():
    """Norms without an all-reduce, of a sum that is rounded afterwards and of one that stays in
    fp32."""

    def block(x, r, w):
        total = x.float() + r.float()
        kept = x.float() - r.float()
        return normed(total).to(w.dtype) * w, total.to(BF16), normed(kept), kept

    inputs = tensors()
    captured = capture(block, *inputs, batch_invariant=True)
    assert captured.count(fusewire.fused_add_rms_norm.torch_op) == captured.count(fusewire.rms_norm.torch_op) == 1
    (call,) = (node for node in captured.graph.nodes if node.target is fusewire.fused_add_rms_norm.torch_op)
    assert call.args[5] == WIDE_ROUND
    want = block(*inputs)
    equal(captured.result[1:2], want[1:2])
    torch.testing.assert_close(captured.result[0], want[0], rtol=0.02, atol=0)


def test_sandwich_norms_of_vllm():
    """The first norm's result is rounded; its sum with the residual is not."""

    def block(x, r, w):
        inner = normed(reduce_functional(x).float()).to(w.dtype) * w
        total = inner.float() + r.float()
        return (normed(total) * (w.float() + 1.0)).to(w.dtype), total.to(BF16)

    inputs = tensors()
    captured = capture(block, *inputs, inline_native=False)
    assert captured.verdicts() == [("fused", "")], captured.reasons()
    (call,) = (node for node in captured.graph.nodes if node.target is all_reduce_sandwich_norm.torch_op)
    assert (call.args[5], call.args[9]) == (WIDE_SCALE, ROUND)
    equal(captured.result, block(*inputs))


# vLLM's operators


@pytest.mark.parametrize(
    ("dtype", "weight", "form", "says"),
    [
        (BF16, BF16, ROUND, ""),
        (FP16, FP16, ROUND, ""),
        (FP32, FP32, ROUND, ""),
        (BF16, None, SCALE, ""),
        (BF16, FP32, "", "the norm's weight is torch.float32 and its input torch.bfloat16"),
        (BF16, FP16, "", "rounds to the weight's dtype, torch.float16, and its input is torch.bfloat16"),
        (FP32, BF16, "", "rounds to the weight's dtype, torch.bfloat16, and its input is torch.float32"),
        (FP64, FP64, "", "computed in float32"),
    ],
    ids=str,
)
@pytest.mark.parametrize("residual", [False, True])
def test_dtypes_of_vllms_operators(operators, dtype, weight, form, says, residual):
    def block(x, r, w):
        reduced, w = reduce_functional(x), None if weight is None else w
        if residual:
            return torch.ops.vllm_ir.fused_add_rms_norm(reduced, r, w, 1e-5)
        return torch.ops.vllm_ir.rms_norm(reduced, w, 1e-5), reduced

    x, r, w = tensors(dtype)
    w = w if weight is None else w.to(weight)
    captured = capture(block, x, r, w, inline_native=False)
    if says:
        assert [status for status, _ in captured.verdicts()] == ["refused"]
        assert says in captured.reasons()[0], captured.reasons()[0]
    else:
        assert captured.verdicts() == [("fused", "")], captured.reasons()
        (call,) = (node for node in captured.graph.nodes if node.target is FUSED_OP)
        assert call.args[5] == (f"wide_sum_{form}" if residual and dtype != FP32 else form)
    equal(captured.result, block(x, r, w))


WEIGHTS = {
    "w.float() + 1.0": (lambda w: w.float() + 1.0, 1.0),
    "1.0 + w.to(float32)": (lambda w: 1.0 + w.to(torch.float32), 1.0),
    "w.float() + -0.25": (lambda w: w.float() + -0.25, -0.25),
    "w.float()": (lambda w: w.float(), 0.0),
}


@pytest.mark.parametrize("also_read", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("way", WEIGHTS)
def test_gemmas_weight_becomes_a_bias(operators, way, residual, also_read):
    """Whether something else reads the sum or not: the graph keeps it then."""
    make, bias = WEIGHTS[way]

    def block(x, r, w):
        reduced, weight = reduce_functional(x), make(w)
        if residual:
            results = torch.ops.vllm_ir.fused_add_rms_norm(reduced, r, weight, 1e-5)
        else:
            results = (torch.ops.vllm_ir.rms_norm(reduced, weight, 1e-5), reduced)
        return (*results, weight * 2) if also_read else results

    inputs = tensors()
    captured = capture(block, *inputs, inline_native=False)
    assert captured.verdicts() == [("fused", "")], captured.reasons()
    (call,) = (node for node in captured.graph.nodes if node.target is FUSED_OP)
    assert call.args[2].op == "placeholder"
    assert call.args[4:6] == (bias, WIDE_SCALE if residual else SCALE)
    equal(captured.result, block(*inputs))


@pytest.mark.parametrize(
    "make", [lambda w: w.float() * 2.0 + 1.0, lambda w: torch.add(w.float(), 1.0, alpha=2), lambda w: w.double() + 1.0]
)
def test_other_weights_are_still_refused(operators, make):
    def block(x, w):
        return torch.ops.vllm_ir.rms_norm(reduce_functional(x), make(w), 1e-5)

    x, _, w = tensors()
    captured = capture(block, x, w)
    assert [status for status, _ in captured.verdicts()] == ["refused"]
    assert "weight" in captured.reasons()[0]


def test_the_residual_may_be_the_all_reduce(operators):
    def block(x, r, w):
        return torch.ops.vllm_ir.fused_add_rms_norm(r, reduce_functional(x), w, 1e-5)

    inputs = tensors()
    captured = capture(block, *inputs, inline_native=False)
    assert captured.verdicts() == [("fused", "")], captured.reasons()
    equal(captured.result, block(*inputs))


def test_a_variance_of_part_of_the_row_is_refused(operators):
    def block(x, w):
        return torch.ops.vllm_ir.rms_norm(reduce_functional(x), w, 1e-5, HIDDEN // 2)

    x, _, w = tensors()
    with pytest.raises(AssertionError):
        block(x, w)
    graph = torch.fx.Graph()
    args = [graph.placeholder(name) for name in ("x", "w")]
    for node, value in zip(args, (x, w), strict=True):
        node.meta["val"] = value
    call = graph.call_function(torch.ops.vllm_ir.rms_norm.default, (*args, 1e-5, HIDDEN // 2))
    graph.output(call)
    (norm,) = find_norms(graph)
    assert "an option that a plain RMSNorm does not have" in norm.refusal


# Stacks of vLLM's blocks: embedding, attention and feed-forward, each with an all-reduce


def add_norm(x, r, w, gemma, lowered):
    weight = w.float() + 1.0 if gemma else w
    if not lowered:
        return torch.ops.vllm_ir.fused_add_rms_norm(x, r, weight, 1e-5)
    return vllm_norms.fused_add_rms_norm(x, r, weight, 1e-5)


def first_norm(x, w, gemma, lowered):
    weight = w.float() + 1.0 if gemma else w
    return (vllm_norms.rms_norm if lowered else torch.ops.vllm_ir.rms_norm)(x, weight, 1e-5)


def stack(gemma, lowered, sandwich=False, layers=3):
    def forward(x, weights, matrix):
        residual = reduce_functional(x)
        hidden = first_norm(residual, weights[0], gemma, lowered)
        for layer in range(2 * layers):
            hidden = reduce_functional(hidden @ matrix)
            if sandwich:
                hidden = first_norm(hidden, weights[layer], gemma, lowered)
            hidden, residual = add_norm(hidden, residual, weights[layer + 1], gemma, lowered)
        return hidden

    return forward


@pytest.mark.parametrize("lowered", [False, True], ids=["operators", "lowered"])
@pytest.mark.parametrize("model", ["Llama", "Gemma", "Gemma 2"])
def test_every_all_reduce_of_a_stack_fuses(operators, model, lowered):
    forward = stack(model != "Llama", lowered, model == "Gemma 2")
    x = tensors()[0]
    generator = torch.Generator().manual_seed(5)
    weights = [(torch.randn(HIDDEN, generator=generator) * 0.2).to(BF16) for _ in range(7)]
    matrix = (torch.randn(HIDDEN, HIDDEN, generator=generator) / 8).to(BF16)
    captured = capture(forward, x, weights, matrix, inline_native=False)
    assert captured.verdicts() == [("fused", "")] * 7, captured.reasons()
    equal([captured.result], [forward(x, weights, matrix)])
    equal([capture(forward, x, weights, matrix).result], [forward(x, weights, matrix)])
