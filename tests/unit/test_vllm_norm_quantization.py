"""vLLM's operators that are a norm and its quantisation in one: fused after an all-reduce, or left
with a reason.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed._functional_collectives as functional
from torch._inductor import config as inductor_config
from torch._subclasses.fake_tensor import FakeTensorMode

from fusewire.custom_ops.ops.quantized_norm import all_reduce_rms_norm_quantized
from fusewire.fusion_passes.compiler.inductor import trace
from fusewire.fusion_passes.config import PassConfig
from fusewire.fusion_passes.pipeline import run_passes
from fusewire.fusion_passes.report.store import clear_report
from fusewire.patterns.quantizations import NORM_QUANT_OPS

from support import vllm_quantizers
from support.distributed import fake_group
from support.graphs import capture
from support.quantizers import assert_same, inputs

QUANTIZED = all_reduce_rms_norm_quantized.torch_op
KEPT = PassConfig(inline_native=False)
FP8 = torch.float8_e4m3fn
TOKEN = f"token scale_floor={1.0 / (448.0 * 512.0)}"
GROUP = "group amax_floor=0.001953125"
BOUND = torch.tensor([1.25])


@pytest.fixture(autouse=True)
def world():
    libraries = vllm_quantizers.operators()
    with fake_group(2) as made:
        yield made
    for library in libraries:
        library._destroy()


def static(y, w, s, r):
    result = torch.empty(y.shape, dtype=FP8)
    if r is None:
        torch.ops._C.rms_norm_static_fp8_quant(result, y, w, s, 1e-5)
    else:
        torch.ops._C.fused_add_rms_norm_static_fp8_quant(result, y, r, w, s, 1e-5)
    return result


def token(y, w, s, r, *, bound=None, dtype=FP8):
    result, scale = torch.empty(y.shape, dtype=dtype), torch.empty(y.shape[0], 1)
    torch.ops._C.rms_norm_dynamic_per_token_quant(result, y, w, scale, 1e-5, bound, r)
    return result, scale


def bounded(y, w, s, r):
    return token(y, w, s, r, bound=s)


def block(y, w, s, r, *, layout="rows", size=128, bound=None, transposed=None):
    tokens, groups = y.shape[0], y.shape[-1] // size
    result = torch.empty(y.shape, dtype=FP8)
    if layout == "columns":
        scale = torch.empty(groups, tokens).permute(-1, -2)
    elif layout == "aligned_columns":
        scale = torch.empty_strided((tokens, groups), (1, (tokens + 3) // 4 * 4))
    else:
        scale = torch.empty(tokens, groups)
    transposed = layout != "rows" if transposed is None else transposed
    torch.ops._C.rms_norm_per_block_quant(result, y, w, scale, 1e-5, bound, r, size, transposed)
    return result, scale


def columns(y, w, s, r):
    return block(y, w, s, r, layout="columns")


def aligned(y, w, s, r):
    return block(y, w, s, r, layout="aligned_columns")


READ = {
    "static": (static, "tensor apply=reciprocal"),
    "token": (token, TOKEN),
    "bounded": (bounded, TOKEN),
    "block": (block, GROUP),
    "columns": (columns, f"{GROUP} layout=columns"),
    "aligned": (aligned, f"{GROUP} layout=aligned_columns"),
}


def layer(world, joined, with_residual=True):
    """A layer whose residual, a tensor of its own, is read after the call that writes it."""

    def run(x, r, w, s):
        y = functional.wait_tensor(functional.all_reduce(x, "sum", world))
        r = r * 2 if with_residual else None
        results = joined(y, w, s, r)
        return results, (r if r is None else r + 1)

    return run


@pytest.mark.parametrize(
    ("name", "with_residual", "dtype"),
    [
        *((name, with_residual, torch.bfloat16) for name in READ for with_residual in (True, False)),
        *((name, True, dtype) for name in ("static", "token") for dtype in (torch.float16, torch.float32)),
    ],
)
def test_functional_calls_are_fused(world, name, with_residual, dtype):
    """With the operators' bits and strides, the residual's too; nothing of vLLM's is left."""
    joined, spec = READ[name]
    model, given = layer(world, joined, with_residual), inputs(6, 256, dtype=dtype)
    with inductor_config.patch(enable_auto_functionalized_v2=name in ("token", "block")):
        captured = capture(model, *given, config=KEPT)
    (call,) = [node for node in captured.graph.nodes if node.target is QUANTIZED]
    wide = with_residual and name != "static" and dtype != torch.float32
    form = "scale_then_round" if name == "static" else "round_then_scale"
    assert call.args[5] == (f"wide_sum_{form}" if wide else form)
    assert call.args[11:13] == (spec, False)
    assert "_C." not in str(captured.graph)
    assert "empty" not in str(captured.graph)
    assert_same(captured.result, model(*given))
    (entry,) = captured.report.entries
    assert entry.spelling.startswith("_C::")
    assert "FP8" in entry.fusion


def test_tiny_values_and_dynamic_tokens(world):
    """The least scale holds for groups whose values are tiny or zero."""
    model, given = layer(world, block), list(inputs(6, 256))
    given[2] = given[2] * torch.tensor([1e-3, 1e-6]).repeat_interleave(128).bfloat16()
    given[1] = given[0]  # one symbol for both numbers of tokens
    given[0][:2] = 0
    torch._dynamo.mark_dynamic(given[0], 0)
    captured = capture(model, *given, config=KEPT, dynamic=None)
    assert captured.count(QUANTIZED) == 1
    wanted = model(*given)
    assert_same(captured.result, wanted)
    assert len(wanted[0][1].unique()) > 4
    assert (wanted[0][1] == vllm_quantizers.FLOOR).any(0).all()


def test_one_token_or_group_has_every_layout(world):
    for shape in ((1, 256), (6, 128)):
        model, given = layer(world, columns), inputs(*shape)
        with inductor_config.patch(enable_auto_functionalized_v2=False):
            captured = capture(model, *given, config=KEPT)
        assert captured.count(QUANTIZED) == 1, captured.reasons()
        (got, scale), _ = captured.result
        (wanted, scales), _ = model(*given)
        assert torch.equal(scale, scales)  # but for the stride of a dimension of one number
        assert torch.equal(got.float(), wanted.float())


def in_place(model, given):
    """Return the module of a model's calls in place, and the report of the passes over it."""
    with FakeTensorMode() as mode:
        module = trace(model, [mode.from_tensor(tensor) for tensor in given])
    report = run_passes(module.graph, KEPT)
    module.graph.lint()
    module.recompile()
    clear_report()
    return module, report


@pytest.mark.parametrize("name", ["static", "bounded", "block", "aligned"])
def test_calls_in_place_are_fused(world, name):
    """Two layers with one residual, which is read before, between and after them."""
    joined, spec = READ[name]

    def model(x, r, w, s):
        r = r * 2
        before = r + 1
        found = []
        for _ in range(2):
            y = functional.wait_tensor(functional.all_reduce(x, "sum", world))
            found.append((joined(y, w, s, r), r + 1))
        return before, found, r

    given = inputs(6, 256)
    module, report = in_place(model, given)
    calls = [node for node in module.graph.nodes if node.target is QUANTIZED]
    assert [call.args[11] for call in calls] == [spec, spec], report.notes
    assert "empty" not in str(module.graph)
    assert_same(module(*given), model(*given))


def test_no_residual_in_place(world):
    model, given = layer(world, token, False), inputs(6, 256)
    module, _ = in_place(model, given)
    assert [node.target for node in module.graph.nodes].count(QUANTIZED) == 1
    assert_same(module(*given), model(*given))


@pytest.mark.parametrize("shared", ["input", "has a view", "is a view"])
def test_a_shared_residual_in_place_is_refused(world, shared):
    """What shares the residual's memory would miss the sum."""

    def model(x, r, w, s):
        base = r if shared == "input" else r.view(3, 2, 256) * 2 if shared == "is a view" else r * 2
        written = base.view(-1, 256) if shared == "is a view" else base
        other = base.view(3, 2, 256) if shared == "has a view" else base
        y = functional.wait_tensor(functional.all_reduce(x, "sum", world))
        return token(y, w, s, written), other + 0

    given = inputs(6, 256)
    module, report = in_place(model, given)
    assert "an input or shares its memory" in report.entries[0].reason
    assert "_C.rms_norm_dynamic_per_token_quant" in str(module.graph)
    wanted = model(*map(torch.clone, given))
    assert_same(module(*given), wanted)


def wide_weight(y, w, s, r):
    return static(y, w.float(), s, r)


def int8(y, w, s, r):
    return token(y, w, s, r, dtype=torch.int8)


def block64(y, w, s, r):
    return block(y, w, s, r, size=64)


def bounded_block(y, w, s, r):
    return block(y, w, s, r, bound=s)


def rows_as_columns(y, w, s, r):
    return block(y, w, s, r, transposed=True)


def columns_as_rows(y, w, s, r):
    return block(y, w, s, r, layout="columns", transposed=False)


def channels(y, w, s, r):
    return static(y, w, torch.linspace(1, 2, 2), r)


def part(y, w, s, r):
    result = torch.empty((12, 256), dtype=FP8)[:6]
    torch.ops._C.fused_add_rms_norm_static_fp8_quant(result, y, r, w, s, 1e-5)
    return result


def assert_left(captured):
    """Check that the program's call stands in the graph, and nothing of fusewire's."""
    text = str(captured.graph)
    assert captured.count(QUANTIZED) == 0
    assert "torch.ops._C." in text
    assert "_scaled_fp8_quant" not in text
    assert "fusewire" not in text


REFUSED = {
    "int8": (int8, {}, "its result is not of torch.float8_e4m3fn"),
    "64": (block64, {}, "group_size is 64"),
    "bounded block": (bounded_block, {}, "scale_ub is given"),
    "rows as columns": (rows_as_columns, {}, "is_scale_transposed is True, and its scales are in rows"),
    "columns as rows": (columns_as_rows, {}, "is_scale_transposed is False, and its scales are in columns"),
    "wide weight": (wide_weight, {}, "its weight and residual must be in the input's torch.bfloat16"),
    "channels": (channels, {}, "no float32 tensor with one element"),
    "part of a buffer": (part, {}, "writes to a part of a buffer"),
    "switched off": (token, {"fuse_quantization": False}, "fuse_quantization is switched off"),
    "disabled": (token, {"disabled_passes": ("fuse_quantization",)}, "fuse_quantization is switched off"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_others_stay_with_a_reason(world, name):
    joined, options, words = REFUSED[name]
    model, given = layer(world, joined), inputs(6, 256)
    with inductor_config.patch(enable_auto_functionalized_v2=name == "part of a buffer"):
        captured = capture(model, *given, **options)
    (reason,) = captured.reasons()
    assert words in reason
    assert "a norm and its quantisation in one, stays as it is" in reason
    assert_left(captured)


@pytest.mark.parametrize(
    ("extra", "value", "words"),
    [
        ("bool scale_ue8m0=False", True, "scale_ue8m0 is True, which is not known"),
        ("bool scale_ue8m0=False", False, ""),
        ("", None, "this version of it has no is_scale_transposed"),
    ],
)
def test_other_versions_of_an_operator(world, extra, value, words):
    """An option that is not known must be off; one that is missing is no reason to fail."""
    library = torch.library.Library("fusewire_test", "FRAGMENT")
    known = f"int group_size, bool is_scale_transposed, {extra}" if extra else "int group_size"
    library.define(
        "block(Tensor! result, Tensor input, Tensor weight, Tensor! scale, float epsilon, Tensor? scale_ub, "
        f"Tensor!? residual, {known}) -> ()"
    )
    library.impl("block", lambda *args: vllm_quantizers._norm_block(*args[:8], False), "CompositeExplicitAutograd")
    torch.library.register_fake("fusewire_test::block", lambda *args: None, lib=library)

    def joined(y, w, s, r):
        result, scale = torch.empty(y.shape, dtype=FP8), torch.empty(y.shape[0], 2)
        rest = (128,) if value is None else (128, False, value)
        torch.ops.fusewire_test.block(result, y, w, scale, 1e-5, None, r, *rest)
        return result, scale

    model, given = layer(world, joined), inputs(6, 256)
    with mock.patch.dict(NORM_QUANT_OPS, {"fusewire_test::block": NORM_QUANT_OPS["_C::rms_norm_per_block_quant"]}):
        captured = capture(model, *given, config=KEPT)
    assert captured.count(QUANTIZED) == (not words)
    assert words in captured.reasons()[0]
    assert_same(captured.result, model(*given))
    library._destroy()


def test_the_programs_kernel_stays_where_only_native_serves(world):
    model, given = layer(world, token), inputs(6, 256)
    with mock.patch("fusewire.fusion_passes.passes.fuse_quantization._on_gpu", return_value=True):
        alone = capture(model, *given, ir_op_priority={"all_reduce_rms_norm": ("native",)})
        other = capture(model, *given, ir_op_priority={"all_reduce_rms_norm": ("rank_ordered", "native")})
    assert "only native can serve" in alone.reasons()[0]
    assert_left(alone)
    assert other.count(QUANTIZED) == 1


def test_without_the_operator_that_quantises_it_stays(world):
    """In a process whose extension has the joined operators only."""
    model, given = layer(world, token), inputs(6, 256)
    with mock.patch("fusewire.fusion_passes.analysis.norm_quant_ops.op_of_name", return_value=None):
        captured = capture(model, *given)
    assert "no _C.dynamic_per_token_scaled_fp8_quant to quantise with" in captured.reasons()[0]


@pytest.mark.parametrize(("kind", "words"), [("max", "computes the sum only"), ("sum", "computed from that result")])
def test_a_refusal_of_the_norm_takes_the_split_back(world, kind, words):
    """The next all-reduce is fused all the same."""

    def model(x, r, w, s):
        y = functional.wait_tensor(functional.all_reduce(x, kind, world))
        first = token(y, w, s, (y if kind == "sum" else r) * 2)
        y = functional.wait_tensor(functional.all_reduce(x, "sum", world))
        return first, token(y, w, s, None)

    given = inputs(6, 256)
    captured = capture(model, *given, config=KEPT)
    assert [status for status, _ in captured.verdicts()] == ["refused", "fused"]
    assert words in captured.reasons()[0]
    assert str(captured.graph).count("torch.ops._C.rms_norm_dynamic_per_token_quant") == 1
    assert "_scaled_fp8_quant" not in str(captured.graph)
    assert captured.count(QUANTIZED) == 1
    assert_same(captured.result, model(*given))


def test_two_readers_of_one_all_reduce_stay_right(world):
    def model(x, r, w, s):
        y = functional.wait_tensor(functional.all_reduce(x, "sum", world))
        return static(y, w, s, None), token(y, w, s, None)

    given = inputs(6, 256)
    captured = capture(model, *given, config=KEPT)
    assert captured.count(QUANTIZED) == 1
    assert "torch.ops._C.rms_norm_dynamic_per_token_quant" in str(captured.graph)
    assert_same(captured.result, model(*given))


def test_without_an_all_reduce_nothing_changes(world):
    def model(x, r, w, s):
        y = functional.wait_tensor(functional.all_reduce(x, "sum", world))
        return y, token(x, w, s, None)

    captured = capture(model, *inputs(6, 256))
    assert_left(captured)


@pytest.mark.parametrize("name", ["static", "bounded", "aligned"])
def test_a_quantisation_refused_later_is_vllms_own(world, name):
    """The norm is fused, and vLLM's operator that only quantises follows."""
    model, given = layer(world, READ[name][0]), inputs(6, 256)
    with mock.patch("fusewire.fusion_passes.passes.fuse_quantization._QuantizationFuser._refusal", return_value="no"):
        captured = capture(model, *given, config=KEPT)
    assert captured.count(torch.ops.fusewire.all_reduce_rms_norm.default) == 1
    assert "torch.ops._C.rms_norm" not in str(captured.graph)
    assert "torch.ops._C." in str(captured.graph)
    assert_same(captured.result, model(*given))


def test_what_stands_before_it_is_explained(world):
    def model(x, r, w, s):
        return token(functional.all_reduce(x, "sum", world).cos(), w, s, None)

    captured = capture(model, *inputs(6, 256))
    assert "aten::cos (cos) between the all-reduce and the norm" in captured.reasons()[0]
