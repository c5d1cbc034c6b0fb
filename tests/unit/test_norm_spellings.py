"""RMSNorms that are spelled with other operations than rsqrt of a mean, and what comes near one and is none."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.utils import fresh_cache
from torch.torch_version import TorchVersion

import fusewire
from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm
from fusewire.fusion_passes.analysis.norm_arithmetic import Row
from fusewire.patterns.norms import VARIANTS

from support.blocks import HIDDEN, NORMS, reduce_functional, tensors
from support.graphs import capture
from support.spellings import IN_FP32, ROOT, TAILS, WAYS, WEIGHTED, blocks, length, mean, total, ulps

DTYPES = [torch.bfloat16, torch.float32]
FUSED_OP = all_reduce_rms_norm.torch_op
pytestmark = pytest.mark.usefixtures("fake_world")


# From 2.14 on torch makes rsqrt of these itself, before any pass of ours sees them.
RSQRT_BY_TORCH = ("one over", "reciprocal") if TorchVersion(torch.__version__) >= (2, 14) else ()


def name_of(way: str) -> str:
    return "" if way in RSQRT_BY_TORCH else WAYS[way].name


def close(got: Tensor, want: Tensor, units: int) -> None:
    assert got.dtype == want.dtype
    if got.dtype == torch.float32:
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    else:
        assert ulps(got, want) <= units


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_fuses(way, tail, dtype):
    def norm(x, w, eps):
        return TAILS[tail](x, WAYS[way].normed(x.float(), eps), w)

    inputs = tensors(dtype)
    captured = capture(blocks(norm), *inputs, inline_native=False)
    assert captured.verdicts() == [("fused", "")] * 2, captured.reasons()
    named = (IN_FP32[tail] if dtype == torch.float32 else tail) + name_of(way)
    assert [entry.spelling for entry in captured.report.entries] == [named] * 2
    calls = [node for node in captured.graph.nodes if node.target is FUSED_OP]
    assert [call.args[2].op for call in calls] == ["placeholder"] * 2
    wanted = [0.125, 1e-5] if WAYS[way].fixed_eps is None else [WAYS[way].fixed_eps] * 2
    assert [call.args[3] for call in calls] == pytest.approx(wanted, rel=1e-12)
    for got, want in zip(captured.result, blocks(norm)(*inputs), strict=True):
        # Where it is rounded before the weight, one unit more or less can become two in the product.
        close(got, want, 2 if tail == "L" else 1)
        assert WAYS[way].name or torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", WEIGHTED)
def test_weights_that_are_not_multiplied_last(way, dtype):
    normed, tail, name = WEIGHTED[way]

    def norm(x, w, eps):
        return normed(x.float(), w, eps).to(x.dtype)

    inputs = tensors(dtype)
    captured = capture(blocks(norm), *inputs, inline_native=False)
    assert captured.verdicts() == [("fused", "")] * 2, captured.reasons()
    if dtype != torch.float32:
        assert [entry.spelling for entry in captured.report.entries] == [tail + name] * 2
    calls = [node for node in captured.graph.nodes if node.target is FUSED_OP]
    assert {(call.args[2].op, call.args[4], call.args[5]) for call in calls} == {
        ("placeholder", 1.0 if "1 +" in way else 0.0, "scale_then_round")
    }
    for got, want in zip(captured.result, blocks(norm)(*inputs), strict=True):
        close(got, want, 1)


@pytest.mark.parametrize("way", [*WAYS, *WEIGHTED])
def test_without_reassociation_only_what_rounds_alike_fuses(way):
    def norm(x, w, eps):
        if way in WAYS:
            return TAILS["L"](x, WAYS[way].normed(x.float(), eps), w)
        return WEIGHTED[way][0](x.float(), w, eps).to(x.dtype)

    inputs = tensors()
    captured = capture(blocks(norm), *inputs, allow_reassociation=False)
    moves = WEIGHTED[way][2] if way in WEIGHTED else name_of(way)
    assert captured.verdicts() == [("refused", "match") if moves else ("fused", "")] * 2
    for reason in captured.reasons():
        assert "allow_reassociation=False forbids" in reason if moves else True
        assert all((variant.does in reason) == (variant.name in moves) for variant in VARIANTS) if moves else True
    for got, want in zip(captured.result, blocks(norm)(*inputs), strict=True):
        assert way in RSQRT_BY_TORCH or torch.equal(got, want)


def test_norms_raised_alone_and_second_norms_obey_allow_reassociation():
    def divided(x, w):
        return TAILS["L"](x, WAYS["divided"].normed(x.float(), 1e-5), w)

    def block(x, residual, w):
        return divided(residual + NORMS["L"](reduce_functional(x), w, 1e-5), w), divided(residual, w)

    others = {"rms_norm": ["native"], "fused_add_rms_norm": ["native"], "all_reduce_rms_norm": ["native"]}
    allowed = capture(block, *tensors(), batch_invariant=True)
    assert allowed.count(fusewire.rms_norm.torch_op) == 1
    assert allowed.report.entries[0].fusion.count("norm") == 2
    kept = capture(block, *tensors(), batch_invariant=True, allow_reassociation=False)
    assert kept.count(fusewire.rms_norm.torch_op) == 0
    assert kept.report.entries[0].fusion.count("norm") == 1
    inputs = tensors()
    exact = capture(block, *inputs, allow_reassociation=False, ir_op_priority=others)
    for got, want in zip(exact.result, block(*inputs), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("way", ["divided", "sum put back", "length"])
def test_through_inductor(way):
    def norm(x, w, eps):
        return TAILS["M'"](x, WAYS[way].normed(x.float(), eps), w)

    inputs = tensors(torch.float32)
    torch._dynamo.reset()
    with torch.no_grad(), fresh_cache():
        compiled = torch.compile(
            blocks(norm), backend="fusewire", options={"expect_fused": "all", "inline_native": False}, fullgraph=True
        )
        results = compiled(*inputs)
    assert [entry.status for entry in fusewire.report().entries] == ["fused"] * 2
    for got, want in zip(results, blocks(norm)(*inputs), strict=True):
        close(got, want, 1)


@pytest.mark.parametrize("twice", ["cast twice", "never cast"])
def test_input_that_is_not_cast_once(twice):
    """`x.float()` written twice is two nodes; x times a root in fp32 is widened by the product."""

    def norm(x, w, eps):
        scaled = x.float() if twice == "cast twice" else x
        return (scaled * torch.rsqrt((x.float() * x.float()).mean(-1, keepdim=True) + eps)).to(x.dtype) * w

    inputs = tensors()
    captured = capture(blocks(norm), *inputs)
    assert captured.verdicts() == [("fused", "")] * 2, captured.reasons()
    for got, want in zip(captured.result, blocks(norm)(*inputs), strict=True):
        assert torch.equal(got, want)


CONSTANTS = {
    "epsilon": (lambda x, w: NORMS["L"](x, w, torch.tensor(1e-5)), 9.999999747378752e-06, 0.0),
    "epsilon in float64": (lambda x, w: NORMS["M"](x, w, torch.tensor(1e-5, dtype=torch.float64)), 1e-5, 0.0),
    "epsilon in bf16": (lambda x, w: NORMS["L"](x, w, torch.tensor([0.3]).bfloat16().float()), 0.30078125, 0.0),
    "epsilon by full": (lambda x, w: NORMS["L"](x, w, x.new_full((1,), 0.25)), 0.25, 0.0),
    "hidden size": (
        lambda x, w: (x.float() * torch.rsqrt(total(x.float()) / torch.tensor(64.0) + 0.125)).to(x.dtype) * w,
        0.125,
        0.0,
    ),
    "one, added to the weight": (
        lambda x, w: (x.float() * torch.rsqrt(mean(x.float()) + 0.125) * (torch.tensor(1.0) + w.float())).to(x.dtype),
        0.125,
        1.0,
    ),
    "ones, added to the weight": (
        lambda x, w: (x.float() * torch.rsqrt(mean(x.float()) + 0.125) * (w.float() + torch.ones_like(w))).to(x.dtype),
        0.125,
        1.0,
    ),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_numbers_that_are_constant_tensors(name):
    norm, eps, bias = CONSTANTS[name]

    def block(x, r, w):
        return norm(r + reduce_functional(x), w)

    inputs = tensors()
    captured = capture(block, *inputs, inline_native=False)
    assert captured.verdicts() == [("fused", "")], captured.reasons()
    (call,) = captured.graph.find_nodes(op="call_function", target=FUSED_OP)
    assert (call.args[2].op, *call.args[3:5]) == ("placeholder", eps, bias)
    assert torch.equal(captured.result, block(*inputs))


def test_a_weight_that_a_buffer_is_added_to():
    def block(x, r, w, one):
        s = (r + reduce_functional(x)).float()
        return (s * torch.rsqrt(mean(s) + 1e-5) * (one + w.float())).to(x.dtype)

    captured = capture(block, *tensors(), torch.tensor(1.0))
    assert captured.verdicts() == [("refused", "supported")]
    assert captured.reasons()[0].endswith("so compute the weight in torch.bfloat16")


def test_a_weight_that_ones_in_another_dtype_are_added_to():
    def norm(x, w):
        return NORMS["weightless"](x, w, 1e-5) * (w + torch.ones(HIDDEN))

    refused(norm, *tensors(), says="multiplies by a weight of dtype torch.float32, so its result is torch.float32")


@pytest.mark.parametrize("way", ["over the size", "times one over the size"])
def test_symbolic_hidden_size(way):
    def norm(x, w, eps):
        size = x.shape[-1]
        squares = total(x) / size if way == "over the size" else total(x) * (1 / size)
        return x * torch.rsqrt(squares + eps) * w

    captured = capture(blocks(norm), *tensors(torch.float32), dynamic=True)
    assert captured.verdicts() == [("fused", "")] * 2, captured.reasons()


def test_other_symbolic_size():
    def norm(x, w, eps):
        return x * torch.rsqrt(total(x) / x.shape[0] + eps) * w

    captured = capture(blocks(norm), *tensors(torch.float32), dynamic=True)
    assert captured.verdicts() == [("refused", "match")] * 2


# What is no RMSNorm. Each with words of the reason; "" where nothing of a norm can be said of it.

NEAR = {
    "eps outside the root": (
        lambda x, w: x / (torch.sqrt(mean(x)) + 1e-5) * w,
        "adds its epsilon outside the square root",
    ),
    "eps beside rsqrt": (lambda x, w: x * (torch.rsqrt(mean(x)) + 1e-5) * w, "adds its epsilon outside"),
    "clamped length": (lambda x, w: F.normalize(x, dim=-1, eps=1e-6) * ROOT * w, "clamps"),
    "clamped root": (lambda x, w: x / torch.sqrt(mean(x)).clamp(min=1e-6) * w, "clamps"),
    "clamped mean": (lambda x, w: x * torch.rsqrt(mean(x).clamp_min(1e-6)) * w, "clamps"),
    "maximum": (lambda x, w: x * torch.rsqrt(torch.maximum(mean(x), mean(x) * 0 + 1e-6)) * w, "clamps"),
    "twice the length": (lambda x, w: x / length(x) * 2.0 * w, "divides the sum of squares by 4, where"),
    "length with 1 + weight": (lambda x, w: x / length(x) * (1 + w), "divides the sum of squares by 1, where"),
    "sum over another number": (
        lambda x, w: x * torch.rsqrt(total(x) / 32 + 1e-5) * w,
        "by 32, where RMSNorm's mean square divides by the hidden size 64",
    ),
    "corrected": (lambda x, w: x * torch.rsqrt(total(x) / (HIDDEN - 1) + 1e-5) * w, "by 63, where"),
    "another root of the size": (lambda x, w: x / length(x) * 7.0 * w, "by 49, where"),
    "negated": (lambda x, w: x * (-1 / torch.sqrt(mean(x) + 1e-5)) * w, "divides the sum of squares by something else"),
    "mean over tokens": (lambda x, w: x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + 1e-5) * w, ""),
    "mean over tokens put back": (lambda x, w: x * torch.rsqrt(x[:, :5].pow(2).mean(0) + 1e-5)[:, None] * w, ""),
    "another exponent": (lambda x, w: x / (mean(x) + 1e-5) ** 0.25 * w, ""),
    "another power": (lambda x, w: x / torch.sqrt(x.pow(4).mean(-1, keepdim=True) + 1e-5) * w, ""),
    "multiplied by the root": (lambda x, w: x * torch.sqrt(mean(x) + 1e-5) * w, ""),
    "divided by rsqrt": (lambda x, w: x / torch.rsqrt(mean(x) + 1e-5) * w, ""),
    "root over x": (lambda x, w: torch.sqrt(mean(x) + 1e-5) / x * w, ""),
    "another tensor scaled": (lambda x, w: x.abs() / torch.sqrt(mean(x) + 1e-5) * w, ""),
    "product, not square": (lambda x, w: x / torch.sqrt((x * x.abs()).sum(-1, keepdim=True) / HIDDEN + 1e-5) * w, ""),
    "mean not put back": (lambda x, w: x[:1] / torch.sqrt(x.pow(2).mean(-1)[:1] + 1e-5) * w, ""),
    "centred": (lambda x, w: (x - x.mean(-1, keepdim=True)) / torch.sqrt(mean(x) + 1e-5) * w, "LayerNorm"),
    "standard deviation": (lambda x, w: x / x.std(-1, keepdim=True) * w, ""),
    "rounding modes": (lambda x, w: torch.div(x, torch.sqrt(mean(x) + 1e-5), rounding_mode="floor") * w, ""),
    "alpha": (lambda x, w: x / torch.sqrt(torch.add(mean(x), 1e-5, alpha=2)) * w, ""),
    "two numbers added": (lambda x, w: x / torch.sqrt(mean(x) + 1e-5 + 0.125) * w, ""),
    "root of a square with eps below zero": (lambda x, w: x / torch.sqrt(torch.sqrt((mean(x) + -0.5) ** 2)) * w, ""),
    "weight in two dimensions": (lambda x, w: x * (torch.rsqrt(mean(x) + 1e-5) * w[None, :]), ""),
    "weight of another tensor": (lambda x, w: x.abs() * w * torch.rsqrt(mean(x) + 1e-5), ""),
}


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("near", NEAR)
def test_near_misses_stay(near, residual):
    function, says = NEAR[near]

    def block(x, r, w):
        summed = reduce_functional(x)
        return function(summed + r if residual else summed, w)

    inputs = tensors(torch.float32)
    captured = capture(block, *inputs)
    assert captured.verdicts() == [("refused", "match")]
    (reason,) = captured.reasons()
    assert says in reason, reason
    assert says or "the norm " not in reason, reason
    assert str(captured.graph) == captured.before[0]
    torch.testing.assert_close(captured.result, block(*inputs), rtol=1e-6, atol=0, equal_nan=True)


def refused(norm, *inputs, gate="match", says):
    def block(x, r, w):
        return norm(reduce_functional(x) + r, w)

    captured = capture(block, *inputs)
    assert captured.verdicts() == [("refused", gate)], captured.reasons()
    assert says in captured.reasons()[0], captured.reasons()[0]
    assert str(captured.graph) == captured.before[0]


@pytest.mark.parametrize(
    ("norm", "what"),
    [
        (lambda x, w: x * (torch.rsqrt(mean(x.float()) + 1e-5) * w).to(x.dtype), "a product (convert"),
        (lambda x, w: ((x * w) * torch.rsqrt(mean(x.float()) + 1e-5)).to(x.dtype), "a product (mul"),
        (lambda x, w: ((x * w).float() / torch.sqrt(mean(x.float()) + 1e-5)).to(x.dtype), "a product (mul"),
        (lambda x, w: x.float() * (torch.rsqrt(mean(x.float()) + 1e-5) * w).to(x.dtype), "a product (convert"),
        (lambda x, w: (x.float() * w).to(x.dtype) * torch.rsqrt(mean(x.float()) + 1e-5), "a product (convert"),
        (lambda x, w: x * torch.rsqrt(mean(x.float()) + 1e-5).to(x.dtype) * w, "the root to torch.bfloat16"),
        (lambda x, w: x / length(x) * ROOT * w, "the root to torch.bfloat16"),
    ],
    ids=[
        "root weighted",
        "input weighted",
        "input weighted and widened",
        "root weighted and narrowed",
        "input weighted and narrowed",
        "root",
        "length",
    ],
)
def test_narrow_values_in_between(norm, what):
    refused(norm, *tensors(), says=f"the norm rounds {what}")


@pytest.mark.parametrize("way", ["divided", "sum", "reciprocal", "length over root"])
def test_narrow_arithmetic(way):
    refused(lambda x, w: WAYS[way].normed(x, 1e-5) * w, *tensors(), says="the norm ")


@pytest.mark.parametrize("way", ["divided", "length"])
def test_double_arithmetic(way):
    refused(
        lambda x, w: (WAYS[way].normed(x.double(), 1e-5) * w).float(),
        *tensors(torch.float32),
        says="a cast from torch.float32 to torch.float64",
    )


def test_integer_input():
    x, r, w = tensors(torch.float32)
    integers = (x * 9).int(), (r * 9).int(), w
    refused(lambda s, w: s / torch.sqrt(total(s) / HIDDEN + 1e-5) * w, *integers, says="computed in torch.int32")


def test_float64_input_is_judged_as_in_every_spelling():
    inputs = tensors(torch.float64)
    verdicts = []
    for normed in (lambda x, e: x * torch.rsqrt(mean(x) + e), WAYS["divided"].normed, WAYS["length over root"].normed):

        def block(x, r, w, normed=normed):
            return normed(reduce_functional(x) + r, 1e-5) * w

        captured = capture(block, *inputs)
        verdicts.append(captured.verdicts() + captured.reasons())
        torch.testing.assert_close(captured.result, block(*inputs), rtol=1e-14, atol=0)
    assert verdicts[1:] == verdicts[:1] * 2


def test_two_dimensional_weight_stays_outside():
    """As for every norm: the norm without a weight fuses, and the product stays."""
    x, r, w = tensors(torch.float32)
    rows = w.repeat(5, 1) * x

    def block(x, r, w):
        return WAYS["divided"].normed(reduce_functional(x) + r, 1e-5) * w

    captured = capture(block, x, r, rows, inline_native=False)
    assert captured.verdicts() == [("fused", "")]
    assert [node.args[2] for node in captured.graph.nodes if node.target is FUSED_OP] == [None]
    close(captured.result, block(x, r, rows), 1)


@pytest.mark.parametrize("way", ["x * w", "root * w"])
def test_weight_computed_from_the_sum(way):
    refused(
        lambda s, w: WEIGHTED[way][0](s, w * s[0], 1e-5),
        *tensors(torch.float32),
        says="the norm's weight is computed from the all-reduce's own result",
    )


def test_weight_of_another_dtype():
    x, r, w = tensors()
    refused(
        lambda s, w: WEIGHTED["x * w"][0](s.float(), w, 1e-5).to(s.dtype),
        x,
        r,
        w.float(),
        gate="supported",
        says="store the weight in torch.bfloat16",
    )


def test_mean_of_another_tensor_added():
    refused(
        lambda s, w: s / torch.sqrt(mean(s) + mean(s.abs() + 1)) * w,
        *tensors(torch.float32),
        says="the norm's eps is computed from the all-reduce's own result",
    )


@pytest.mark.parametrize(
    "norm",
    [
        lambda x, w: x / torch.sqrt(x.pow(2).mean(0) + 1e-5)[..., None] * w,
        lambda x, w: x / torch.sqrt(x.pow(2).mean(-1) + 1e-5) * w,
        lambda x, w: x / torch.sqrt(mean(x) + 1e-5).view(1, -1) * w,
    ],
    ids=["mean over tokens", "not put back", "turned"],
)
def test_rows_are_told_apart_where_the_shape_does_not_tell(norm):
    """As many tokens as hidden units, and the mean of a token used for a hidden unit or the other way round."""
    refused(norm, *tensors(torch.float32, shape=(HIDDEN,)), says="")


def test_numbers_expanded_along_the_rows_alone():
    """As many tokens as hidden units, and each token's number spread over all tokens."""

    def norm(x, w):
        return x / torch.sqrt(mean(x).squeeze(-1) + 1e-5).expand(x.shape) * w

    refused(norm, *tensors(torch.float32, shape=(HIDDEN,)), says="")


def test_product_of_a_vector_with_a_number_is_narrow():
    """For one token without dimensions, x of 16 bits times a 0-d fp32 tensor is of 16 bits."""

    def norm(x, w):
        return x * torch.rsqrt(x.float().pow(2).mean(-1) + 1e-5) * w

    refused(norm, *tensors(shape=()), says="the norm rounds a product (mul) to torch.bfloat16")


def test_one_token_without_dimensions():
    def block(x, r, w):
        s = reduce_functional(x) + r
        return s / torch.sqrt(s.pow(2).mean(-1) + 1e-5) * w

    inputs = tensors(torch.float32, shape=())
    captured = capture(block, *inputs)
    assert captured.verdicts() == [("fused", "")], captured.reasons()
    close(captured.result, block(*inputs), 1)


@pytest.mark.parametrize("factor", [0.0, -1.0, 1e40, 1e-40, float("inf"), float("nan"), 1e200], ids=str)
@pytest.mark.parametrize("way", ["times the root", "over the root", "in the root", "times the power"])
def test_numbers_that_are_no_scale(way, factor):
    norms = {
        "times the root": lambda x, w: x * (torch.rsqrt(mean(x) + 1e-5) * factor),
        "over the root": lambda x, w: x / (torch.sqrt(mean(x) + 1e-5) * factor),
        "in the root": lambda x, w: x * torch.rsqrt((mean(x) + 1e-5) * factor),
        "times the power": lambda x, w: x * torch.rsqrt((torch.sqrt(mean(x) + 1e-5) * factor) ** 2),
    }

    def block(x, r, w):
        return norms[way](reduce_functional(x) + r, w)

    captured = capture(block, *tensors(torch.float32))
    assert not captured.report.notes, captured.report.notes
    assert [status for status, _ in captured.verdicts()] == ["refused"]


def test_row_without_a_hidden_size():
    """The numbers of a formula whose size is unknown are no mean, unless the size itself divides."""
    graph = torch.fx.Graph()
    wide = graph.placeholder("x")
    assert Row(wide, power=-0.5, sizes=-1).is_mean
    assert not Row(wide, power=-0.5).is_mean
    assert "something else" in Row(wide, power=-0.5).norm_refusal
