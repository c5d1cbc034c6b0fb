"""The quantisation after a norm, in graphs: what is fused, with which spec, and what is refused and
why.
"""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed._functional_collectives as functional
from torch import Tensor

from fusewire.custom_ops.ops.quantized_norm import (
    all_reduce_rms_norm_quantized,
    all_reduce_rms_norm_quantized_sharded,
)
from fusewire.fusion_passes.config import PassConfig

from support.distributed import fake_group
from support.graphs import capture
from support.quantizers import READ, REFUSED, assert_same, inputs, vllm_group, vllm_static, vllm_token

QUANTIZED, SHARDED = all_reduce_rms_norm_quantized.torch_op, all_reduce_rms_norm_quantized_sharded.torch_op
KEPT = PassConfig(inline_native=False)


@pytest.fixture(autouse=True)
def group():
    with fake_group(2) as made:
        yield made


def norm(x: Tensor, w: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * w


def layer(group, quantizer, *, with_norm=False, residual=True):
    """all_reduce [+ add] + norm + quantisation."""

    def run(x, r, w, s):
        y = functional.wait_tensor(functional.all_reduce(x, "sum", group))
        y = y + r if residual else y
        n = norm(y, w)
        return quantizer(n, s), (y, n) if with_norm else y

    return run


def quant_of(captured) -> str:
    (node,) = [node for node in captured.graph.nodes if node.target in (QUANTIZED, SHARDED)]
    return node.args[11]


@pytest.mark.parametrize("name", READ)
def test_each_spelling_is_fused_with_its_spec(group, name):
    """And computes the same bits: as a call, and inlined."""
    quantizer, spec = READ[name]
    model, given = layer(group, quantizer), inputs(5, 256)
    called = capture(model, *given, config=KEPT)
    assert quant_of(called) == str(spec)
    (call,) = [node for node in called.graph.nodes if node.target is QUANTIZED]
    assert call.args[12] is False
    assert [node for node in called.graph.nodes if "amax" in str(node.target) or "max.dim" in str(node.target)] == []
    inlined = capture(model, *given)
    assert inlined.count(QUANTIZED) == 0
    for captured in (called, inlined):
        assert_same(captured.result, model(*given))
        assert captured.report.notes in ((), called.report.notes)
        assert " + " in captured.report.entries[0].fusion
        assert "FP8" in captured.report.entries[0].fusion


@pytest.mark.parametrize("name", REFUSED)
def test_each_refusal_has_its_reason(group, name):
    """The norm stays fused, and the result as written."""
    quantizer, words = REFUSED[name]
    model, given = layer(group, quantizer), inputs(5, 256)
    captured = capture(model, *given, config=KEPT)
    assert captured.count(QUANTIZED) == 0
    assert captured.count(torch.ops.fusewire.all_reduce_rms_norm.default) == 1
    (note,) = [note for note in captured.report.notes if note.startswith("fuse_quantization: 1 quantisation not fused")]
    assert re.search(words, note), note
    assert_same(captured.result, model(*given))


@pytest.mark.parametrize("name", ["vLLM static", "torchao row", "group"])
def test_shapes_and_the_norm(group, name):
    """Three dimensions, fixed and dynamic, with the norm read too, without a residual."""
    quantizer, _ = READ[name]
    for dynamic, with_norm, config in ((False, True, KEPT), (True, False, KEPT), (True, True, PassConfig())):
        model = layer(group, quantizer, with_norm=with_norm, residual=dynamic)
        given = inputs(3, 5, 256)
        for tensor in given[:2] if dynamic else ():
            torch._dynamo.mark_dynamic(tensor, (0, 1))
        captured = capture(model, *given, config=config, dynamic=None)
        if config is KEPT:
            (call,) = [node for node in captured.graph.nodes if node.target is QUANTIZED]
            assert call.args[12] is with_norm
        assert "FP8" in captured.report.entries[0].fusion
        assert_same(captured.result, model(*given))


def test_float32_and_float16(group):
    """What is narrow in bfloat16 is not in fp32."""
    for dtype in (torch.float16, torch.float32):
        model, given = layer(group, READ["torchao row"][0]), inputs(5, 256, dtype=dtype)
        captured = capture(model, *given, config=KEPT)
        assert quant_of(captured) == ("token narrow_scale=True" if dtype is torch.float16 else "token")
        assert_same(captured.result, model(*given))


def test_equal_quantisations_become_one(group):
    """As of q, k and v, each of which quantises the norm."""
    for quantizer in (vllm_static, vllm_token, vllm_group):

        def thrice(n, s, quantizer=quantizer):
            return [quantizer(n, s) for _ in range(3)]

        model, given = layer(group, thrice), inputs(4, 256)
        captured = capture(model, *given, config=KEPT)
        assert captured.count(QUANTIZED) == 1
        assert not [n for n in captured.graph.nodes if n.target is torch.ops.aten.reciprocal.default]
        assert_same(captured.result, model(*given))
        assert captured.report.notes == capture(layer(group, quantizer), *given, config=KEPT).report.notes


def test_another_quantisation_reads_the_norm(group):
    """The first is fused, the operator returns the norm too, and the report says so."""

    def both(n, s):
        return vllm_static(n, s), vllm_static(n, s * 2), vllm_token(n, s)

    model, given = layer(group, both), inputs(4, 256)
    captured = capture(model, *given, config=KEPT)
    (call,) = [node for node in captured.graph.nodes if node.target is QUANTIZED]
    assert call.args[12] is True
    assert any("2 quantisations not fused: the norm is quantised in another way" in n for n in captured.report.notes)
    assert_same(captured.result, model(*given))


def test_hidden_sizes_without_groups(group):
    """Whole tokens need no multiple of 128, and 128 is one token."""
    model, given = layer(group, READ["vLLM token"][0]), inputs(4, 96)
    captured = capture(model, *given, config=KEPT)
    assert_same(captured.result, model(*given))
    assert quant_of(captured).startswith("token")


def test_the_option_switches_it_off(group):
    captured = capture(layer(group, vllm_token), *inputs(4, 256), inline_native=False, fuse_quantization=False)
    assert captured.count(QUANTIZED) == 0
    assert captured.report.notes == capture(layer(group, lambda n, s: n), *inputs(4, 256)).report.notes


def test_weight_bias_and_sandwich(group):
    """Gemma's weight, and the second norm of a sandwich."""

    def gemma(x, w):
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + w.float())).to(x.dtype)

    def model(x, r, w, s):
        y = functional.wait_tensor(functional.all_reduce(x, "sum", group))
        r = r + gemma(y, w)
        return vllm_token(gemma(r, w * 2), s), r

    given = inputs(4, 256)
    captured = capture(model, *given, config=KEPT)
    (call,) = [node for node in captured.graph.nodes if node.target is QUANTIZED]
    assert call.args[4] == call.args[8] == 1.0
    assert call.args[9]
    assert_same(captured.result, model(*given))


def decoder(group, quantizer, layers=2):
    """Layers whose residual only the next fused operator reads."""

    def run(x, r, w, s):
        for _ in range(layers):
            y = functional.wait_tensor(functional.all_reduce(x, "sum", group))
            r = y + r
            quantized = quantizer(norm(r, w), s)
            q, scale = quantized if isinstance(quantized, tuple) else (quantized, s)
            x = (q.float() * scale).to(r.dtype)
        return x

    return run


@pytest.mark.parametrize("quantizer", [vllm_static, vllm_token])
def test_a_sharded_residual_gathers_fp8_rows(group, quantizer):
    """And shards nothing if the scale may differ between ranks."""
    model, given = decoder(group, quantizer), inputs(32, 256)
    captured = capture(model, *given, shard_residual=True, inline_native=False)
    assert captured.count(SHARDED) == 2
    assert all("residual sharded" in entry.fusion for entry in captured.report.entries)
    refused = capture(model, *given, shard_residual=True, assume_replicated_residuals=False)
    assert refused.count(SHARDED) == 0
    inlined = capture(model, *given, shard_residual=True)
    gathers = [n for n in inlined.graph.nodes if "all_gather_into_tensor" in str(n.target)]
    sent = [n.args[0].meta["val"].dtype for n in gathers]
    assert sent.count(torch.uint8) == 2
    assert sent.count(torch.float32) == (2 if quantizer is vllm_token else 0)
    assert len(sent) == sent.count(torch.uint8) + sent.count(torch.float32)


def test_sequence_parallelism(group):
    """reduce_scatter + norm + all_gather + quantisation."""

    def model(x, r, w, s):
        y = functional.wait_tensor(functional.reduce_scatter_tensor(x, "sum", 0, group)) + r
        n = functional.wait_tensor(functional.all_gather_tensor(norm(y, w), 0, group))
        return vllm_static(n, s), y

    x, r, w, s = inputs(4, 256)
    captured = capture(model, x, r[:2], w, s, config=KEPT)
    assert captured.count(SHARDED) == 1
    unequal = PassConfig(inline_native=False, assume_replicated_residuals=False)
    captured = capture(model, x, r[:2], w, s, config=unequal)
    assert captured.count(SHARDED) == 0
    assert any("the scale comes from inputs" in note for note in captured.report.notes)


def test_a_scale_behind_the_operator(group):
    """Computed where it is used: the operator moves behind it, but not past another collective."""

    def model(x, r, w, s):
        y = functional.wait_tensor(functional.all_reduce(x, "sum", group)) + r
        n = norm(y, w)
        return vllm_static(n, s.exp() + 1), y * 2

    given = inputs(4, 256)
    captured = capture(model, *given, config=KEPT)
    assert captured.count(QUANTIZED) == 1
    assert_same(captured.result, model(*given))

    def later(x, r, w, s):
        y = functional.wait_tensor(functional.all_reduce(x, "sum", group)) + r
        n = norm(y, w)
        z = functional.wait_tensor(functional.all_reduce(s, "sum", group))
        return vllm_static(n, z), y

    captured = capture(later, *given, config=KEPT)
    assert captured.count(QUANTIZED) == 0
    assert any("after the group's next collective" in note for note in captured.report.notes)
    assert_same(captured.result, later(*given))
