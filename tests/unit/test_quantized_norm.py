"""Quantisation to FP8 and its operators, against plain PyTorch bit for bit and float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.library import opcheck

from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm
from fusewire.custom_ops.ops.norms import FORMS, NormSpec, normalize
from fusewire.custom_ops.ops.quantization import CAST_SATURATES, FP8, QuantSpec, parse_quant, quantize
from fusewire.custom_ops.ops.quantized_norm import (
    all_reduce_rms_norm_quantized,
    all_reduce_rms_norm_quantized_sharded,
)
from fusewire.custom_ops.ops.sandwich_norm import all_reduce_sandwich_norm
from fusewire.custom_ops.ops.sharded_norm import all_reduce_rms_norm_sharded, own_rows, shard_rows
from fusewire.errors import ArgumentError, TrainingError

from support.distributed import fake_group, shared_pool

QUANTIZED, SHARDED = all_reduce_rms_norm_quantized.torch_op, all_reduce_rms_norm_quantized_sharded.torch_op
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SPECS = (
    QuantSpec("tensor"),
    QuantSpec("tensor", apply="reciprocal"),
    QuantSpec("tensor", apply="multiply", narrow=True, clamp=False),
    QuantSpec("token", amax_by="multiply", amax_floor=1e-12),
    QuantSpec("token", apply="reciprocal", scale_floor=1.0 / (448 * 512)),
    QuantSpec("token", narrow_scale=True, narrow=True),
    QuantSpec("group", amax_floor=1e-10),
    QuantSpec("group", scale_floor=1e-10, power_of_two=True, layout="columns"),
    QuantSpec("group", layout="aligned_columns"),
)


def same_bits(got: Tensor, wanted: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bits."""
    sized = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[wanted.element_size()]
    return got.dtype == wanted.dtype and got.shape == wanted.shape and torch.equal(got.view(sized), wanted.view(sized))


def _norm(dtype: torch.dtype, tokens: int = 5, hidden: int = 256) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return (torch.randn(tokens, hidden, generator=generator) * torch.logspace(-3, 2, tokens)[:, None]).to(dtype)


SCALE = torch.tensor(0.0371)


# What programs write, and the spec of it.
WRITTEN = {
    "divide": (QuantSpec("tensor"), lambda n: (n / SCALE[None]).clamp(-448, 448).to(FP8)),
    "multiply": (QuantSpec("tensor", apply="multiply"), lambda n: (n.float() * SCALE).clamp(-448, 448).to(FP8)),
    "vLLM": (
        QuantSpec("tensor", apply="reciprocal"),
        lambda n: (n.float() * SCALE.reciprocal()).clamp(-448, 448).to(FP8),
    ),
    "in the norm's dtype": (
        QuantSpec("tensor", narrow=True),
        lambda n: (n / SCALE.to(n.dtype)).clamp(-448, 448).to(FP8),
    ),
    "times in the norm's dtype": (
        QuantSpec("tensor", apply="multiply", narrow=True, clamp=False),
        lambda n: (n * SCALE.to(n.dtype)).to(FP8),
    ),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", WRITTEN)
def test_static_equals_what_programs_write(name, dtype):
    """Bit for bit, and specs that round elsewhere do not."""
    spec, written = WRITTEN[name]
    norm = _norm(dtype, 64)
    wanted = written(norm)
    got, scales = quantize(norm, SCALE[None], str(spec))
    assert same_bits(got, wanted)
    assert scales.shape == (0,)
    others = [other for other, _ in WRITTEN.values() if (other.apply == "multiply") != (spec.apply == "multiply")]
    if dtype != torch.float32:
        others += [other for other, _ in WRITTEN.values() if other.narrow != spec.narrow]
    for other in others:
        assert not same_bits(quantize(norm, SCALE[None], str(other))[0], wanted), other


def test_a_reciprocal_is_no_division():
    """Halfway between two FP8 numbers specs round apart, each as the program that it names."""
    ties = torch.arange(17, 32, 2) / 16
    apart = 0
    for odd in range(3, 64, 2):
        scale = torch.tensor(odd / 64)
        norm = (ties * scale)[None]
        divided, times = (norm / scale).to(FP8), (norm * scale.reciprocal()).to(FP8)
        apart += not same_bits(divided, times)
        assert same_bits(quantize(norm, scale, "tensor")[0], divided)
        assert same_bits(quantize(norm, scale, "tensor apply=reciprocal")[0], times)
    assert apart


def test_the_cast_saturates_or_not():
    """What a spec without a clamp relies on: PyTorch's cast of large numbers, and infinity."""
    large = torch.tensor([[449.0, 463.0, 465.0, 1e4, -1e4, float("inf"), float("-inf"), float("nan")]])
    cast, clamped = large.to(FP8), large.clamp(-448, 448).to(FP8)
    assert same_bits(cast, clamped) == CAST_SATURATES
    assert same_bits(quantize(large, torch.tensor(1.0), "tensor clamp=False")[0], cast)
    assert same_bits(quantize(large, torch.tensor(1.0), "tensor")[0], clamped)


def test_the_largest_value_is_divided_or_multiplied():
    """amax / 448 and amax * (1 / 448) are not always one number; each spec as its arithmetic."""
    norm = _norm(torch.float32, 256)
    amax = norm.abs().amax(-1, keepdim=True)
    divided, times = amax / torch.tensor(448.0), amax * torch.tensor(448.0).reciprocal()
    assert not torch.equal(divided, times)
    assert same_bits(quantize(norm, None, "token")[1], divided)
    assert same_bits(quantize(norm, None, "token amax_by=multiply")[1], times)
    for dtype in (torch.bfloat16, torch.float16):
        largest = norm.to(dtype).abs().amax(-1, keepdim=True).float()
        for text, scales in (("", largest / 448.0), (" amax_by=multiply", largest * torch.tensor(448.0).reciprocal())):
            got = quantize(norm.to(dtype), None, f"token{text} narrow_scale=True")[1]
            assert same_bits(got, scales.to(dtype).float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_equal_what_programs_write(dtype):
    """torchao's, in the norm's dtype; vLLM's kernel, in fp32; and with an upper bound."""
    norm = _norm(dtype, 64)
    amax = norm.abs().amax(-1, keepdim=True)
    scale = (amax / 448.0).float()
    got, scales = quantize(norm, None, str(QuantSpec("token", narrow_scale=True)))
    assert same_bits(scales, scale)
    assert same_bits(got, (norm.float() / scale).clamp(-448, 448).to(FP8))
    bound = torch.tensor([3.0])
    floor = 1.0 / (448 * 512)
    got, scales = quantize(norm, bound, str(QuantSpec("token", scale_floor=floor)))
    scale = (amax.float().clamp(max=3.0) / 448.0).clamp(min=floor)
    assert same_bits(scales, scale)
    assert same_bits(got, (norm.float() / scale).clamp(-448, 448).to(FP8))
    assert (scale == floor).any() == (amax.float() / 448 < floor).any()
    narrow = amax / 448.0
    got, scales = quantize(norm, None, str(QuantSpec("token", narrow_scale=True, narrow=True)))
    assert same_bits(scales.to(dtype), narrow)
    assert same_bits(got, (norm / narrow).to(FP8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups_equal_what_programs_write(dtype):
    """Groups of 128, floored as vLLM's, in each layout."""
    norm = _norm(dtype, 6)
    norm[2] = 0
    groups = norm.float().view(6, 2, 128)
    scale = groups.abs().amax(-1).clamp(min=1e-10) / 448.0
    wanted = (groups / scale[..., None]).clamp(-448, 448).to(FP8).view(6, 256)
    for layout, strides in (("rows", (2, 1)), ("columns", (1, 6)), ("aligned_columns", (1, 8))):
        got, scales = quantize(norm, None, str(QuantSpec("group", amax_floor=1e-10, layout=layout)))
        assert same_bits(got, wanted)
        assert torch.equal(scales, scale)
        assert scales.stride() == strides
    power = torch.exp2(torch.ceil(torch.log2(scale.clamp(min=1e-10))))
    got, scales = quantize(norm, None, str(QuantSpec("group", amax_floor=1e-10, scale_floor=1e-10, power_of_two=True)))
    assert torch.equal(scales, power)
    assert same_bits(got, (groups / power[..., None]).clamp(-448, 448).to(FP8).view(6, 256))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_against_float64(spec, dtype):
    """Within the roundings: the quotient times the scale is the norm, to half a unit of e4m3."""
    norm = _norm(dtype)
    norm = norm.clamp(-8, 8) if spec.static else norm
    got, scales = quantize(norm, SCALE if spec.static else None, str(spec))
    if spec.static:
        scales = SCALE.reciprocal() if spec.apply == "multiply" else SCALE
    elif spec.kind == "group":
        scales = scales.repeat_interleave(128, -1)
    unit = (1 / 16 + 4 * torch.finfo(dtype).eps) * norm.double().abs() + scales * 2.0**-9
    assert ((got.double() * scales.double() - norm.double()).abs() <= unit).all()
    assert not got.isnan().any()


def test_nan_stays_nan_and_a_row_of_zeros_is_as_its_arithmetic():
    """Nothing is hidden: 0 / 0 is NaN without a floor, zero with one."""
    norm = _norm(torch.bfloat16)
    norm[0, 3] = float("nan")
    norm[1] = 0
    for spec in SPECS:
        got, _ = quantize(norm, SCALE if spec.static else None, str(spec))
        assert got[0, 3].isnan()
        floored = spec.static or spec.amax_floor or spec.scale_floor
        assert bool(got[1].float().isnan().any()) != bool(floored), spec


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_text_and_back(spec):
    """A spec's text describes it, and nothing else does."""
    assert parse_quant(str(spec)) == spec
    assert parse_quant(str(QuantSpec("token", scale_floor=1.0 / 229376))).scale_floor == 1.0 / 229376
    for text in ("", "rows", f"{spec} ", f"{spec} clamp=True", f"{spec} colour=red", f"{spec} amax_floor=x"):
        with pytest.raises(ArgumentError):
            parse_quant(text)


def test_specs_that_mean_nothing():
    """Options that say nothing, and values that no program has."""
    for bad in (
        {"kind": "tensor", "amax_floor": 1.0},
        {"kind": "tensor", "amax_by": "multiply"},
        {"kind": "tensor", "power_of_two": True},
        {"kind": "token", "apply": "multiply"},
        {"kind": "token", "clamp": False},
        {"kind": "token", "layout": "columns"},
        {"kind": "group", "scale_floor": -1.0},
        {"kind": "group", "scale_floor": float("nan")},
        {"kind": "row"},
    ):
        with pytest.raises(ArgumentError):
            QuantSpec(**bad)


# The operators


@pytest.fixture
def group():
    with fake_group(2) as name:
        yield name


def test_opcheck(group):
    """Schema, fake tensors and AOTAutograd with dynamic shapes agree with what runs."""
    x, w = _norm(torch.bfloat16), torch.rand(256).bfloat16()
    for spec, with_norm in itertools.product(SPECS, (False, True)):
        scale = SCALE if spec.static else None
        rest = (w, 1e-5, 1.0, FORMS[0], None, 1e-6, 0.0, "", scale, str(spec), with_norm, group.group_name)
        with torch.no_grad():
            opcheck(QUANTIZED, (x, x.flip(0), *rest), test_utils=("test_schema", "test_faketensor"))
            opcheck(SHARDED, (x, x[:3].flip(0), *rest), test_utils=("test_schema", "test_faketensor"))
    opcheck(QUANTIZED, (x, None, *rest))


def test_bad_arguments(group):
    """Each is named."""
    x, w = _norm(torch.bfloat16), torch.rand(256).bfloat16()

    def call(x=x, residual=None, scale=None, quant="token", inner_form=""):
        inner = (None, 1e-6, 0.0, inner_form)
        return QUANTIZED(x, residual, w, 1e-5, 0.0, FORMS[0], *inner, scale, quant, True, group.group_name)

    for words, options in (
        ("describes no quantisation", {"quant": "token clamp=1"}),
        ("kind of a quantisation", {"quant": ""}),
        ("needs its scale", {"quant": "tensor"}),
        ("one element", {"quant": "tensor", "scale": torch.ones(2)}),
        ("float32 tensor", {"quant": "tensor", "scale": torch.ones(1, dtype=torch.bfloat16)}),
        ("x is torch.float64", {"x": x.double()}),
        ("two dimensions", {"x": x[None], "quant": "group layout=columns"}),
        ("pass the residual", {"inner_form": FORMS[0]}),
    ):
        with pytest.raises(ArgumentError, match=words):
            call(**options)
    with pytest.raises(ArgumentError, match="a multiple of 128"):
        QUANTIZED(x[:, :64], None, None, quant="group", group_name=group.group_name)
    norm = call(x=x.detach().requires_grad_())[0]
    with pytest.raises(TrainingError):
        norm.sum().backward()


# On real ranks


def _on_a_rank(policy: str) -> list[str]:
    """The names of the checks that failed: quantised operators against the plain ones' norms."""
    name, failed = dist.group.WORLD.group_name, []
    plain, sandwich = all_reduce_rms_norm.torch_op, all_reduce_sandwich_norm.torch_op
    sharded = all_reduce_rms_norm_sharded.torch_op
    for shape, spec, with_norm, form in itertools.product(
        ((1, 128), (5, 256), (4, 128)), SPECS, (False, True), (FORMS[0], FORMS[3])
    ):
        generator = torch.Generator().manual_seed(50)
        x, residual = (torch.randn(shape, generator=generator).bfloat16() for _ in range(2))
        x = (x * (1 + dist.get_rank())).bfloat16()
        weight, first = (torch.rand(shape[-1], generator=generator).bfloat16() for _ in range(2))
        outer, inner, none = (weight, 1e-5, 1.0, form), (first, 1e-6, 0.5, FORMS[1]), (None, 1e-6, 0.0, "")
        scale = SCALE if spec.static else None
        tail = (scale, str(spec), with_norm, name, policy)
        shard = shard_rows.torch_op(residual, name)
        for what, got, (norm, added) in (
            ("alone", QUANTIZED(x, None, *outer, *none, *tail), plain(x, None, *outer, name, policy)),
            ("residual", QUANTIZED(x, residual, *outer, *none, *tail), plain(x, residual, *outer, name, policy)),
            (
                "sandwich",
                QUANTIZED(x, residual, *outer, *inner, *tail),
                sandwich(x, residual, *outer, *inner, name, policy),
            ),
            ("sharded", SHARDED(x, shard, *outer, *none, *tail), sharded(x, shard, *outer, *none, name, policy)),
            ("sharded alone", SHARDED(x, None, *outer, *none, *tail), sharded(x, None, *outer, *none, name, policy)),
            (
                "sharded sandwich",
                SHARDED(x, shard, *outer, *inner, *tail),
                sharded(x, shard, *outer, *inner, name, policy),
            ),
        ):
            wanted = (norm if with_norm else norm.new_empty(0), added, *quantize(norm, scale, str(spec)))
            if not all(map(same_bits, got, wanted)) or got[3].stride() != wanted[3].stride():
                failed.append(f"{what} {shape} {spec} {with_norm} {form}")
    total = x.double() / (1 + dist.get_rank()) * sum(range(1, dist.get_world_size() + 1)) + residual.double()
    exact = normalize(total, NormSpec(weight.double(), 1e-5, 1.0, FORMS[0]))
    got = QUANTIZED(x, residual, weight, 1e-5, 1.0, FORMS[0], *none, None, "token", False, name, policy)
    if not torch.allclose(got[2].double() * got[3].double(), exact, rtol=0.1, atol=0.02):
        failed.append("float64")
    if not same_bits(got[1], (plain(x, residual, *outer, name, policy))[1]) or own_rows(got[1], 0, 1).shape != shape:
        failed.append("sum")
    return failed


@pytest.mark.parametrize("policy", ["native", "rank_ordered"])
def test_equals_quantising_the_plain_operators_norm(policy):
    """Bit for bit on 2 ranks: every form, sharded or not, with and without the norm."""
    assert shared_pool(2).run(_on_a_rank, policy) == [[], []]
