"""vLLM's operators that quantise a norm: functional in both forms and in place, fused or refused
with a reason.
"""

from __future__ import annotations

import functools
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

from support import vllm_norms, vllm_quantizers
from support.distributed import fake_group
from support.graphs import capture
from support.quantizers import assert_same, inputs
from support.vllm_quantizers import group, static, token, whole

QUANTIZED = all_reduce_rms_norm_quantized.torch_op
KEPT = PassConfig(inline_native=False)
FLOOR = 1.0 / (448.0 * 512.0)


@pytest.fixture(autouse=True)
def world():
    libraries = [*vllm_norms.operators(), *vllm_quantizers.operators()]
    with fake_group(2) as made:
        yield made
    for library in libraries:
        library._destroy()


def layer(world, quantizer, with_norm=False):
    def run(x, r, w, s):
        y = functional.wait_tensor(functional.all_reduce(x, "sum", world))
        n, y = torch.ops.vllm_ir.fused_add_rms_norm(y, r, w, 1e-5)
        return quantizer(n, s), (n, y) if with_norm else y

    return run


READ = {
    "static": (static, "tensor apply=reciprocal"),
    "token": (lambda n, s: token(n, None), f"token scale_floor={FLOOR}"),
    "token, bounded": (token, f"token scale_floor={FLOOR}"),
    "group": (group, "group amax_floor=1e-10"),
    "columns": (functools.partial(group, layout="columns"), "group amax_floor=1e-10 layout=columns"),
    "aligned": (functools.partial(group, layout="aligned_columns"), "group amax_floor=1e-10 layout=aligned_columns"),
}


@pytest.mark.parametrize(
    ("name", "version"),
    # vLLM has version 1; in version 2, scales in columns are written to a view of their buffer.
    [*((name, 1) for name in READ), *((name, 2) for name in READ if name != "columns")],
)
def test_functional_calls_are_fused(world, name, version):
    """With the kernels' bits and strides, and dynamic tokens; no call of vLLM's is left."""
    quantizer, spec = READ[name]
    model = layer(world, quantizer)
    given = inputs(6, 256)
    for tensor in given[:2] if version == 2 else ():
        torch._dynamo.mark_dynamic(tensor, 0)
    with inductor_config.patch(enable_auto_functionalized_v2=version == 2):
        captured = capture(model, *given, config=KEPT, dynamic=None)
    (call,) = [node for node in captured.graph.nodes if node.target is QUANTIZED]
    assert call.args[11:13] == (spec, False)
    assert "fp8_quant" not in str(captured.graph)
    assert "empty" not in str(captured.graph)
    assert_same(captured.result, model(*given))
    if version == 1:
        inlined = capture(model, *given)
        assert_same(inlined.result, model(*given))
        assert inlined.report.entries[0].spelling.startswith("vllm_ir::fused_add_rms_norm")


@pytest.mark.parametrize("name", ["static", "token", "group"])
def test_calls_in_place_are_fused(world, name):
    """As vLLM's graphs have them after its passes; the buffers are gone."""
    quantizer, spec = READ[name]
    model, given = layer(world, quantizer, with_norm=True), inputs(6, 256)
    with FakeTensorMode() as mode:
        graph = trace(model, [mode.from_tensor(tensor) for tensor in given])
    run_passes(graph.graph, KEPT)
    graph.recompile()
    (call,) = [node for node in graph.graph.nodes if node.target is QUANTIZED]
    assert call.args[11:13] == (spec, True)
    assert "empty" not in str(graph.graph)
    assert_same(graph(*given), model(*given))
    clear_report()


REFUSED = {
    "whole": (whole, "_C.dynamic_scaled_fp8_quant: its one scale is of the whole tensor"),
    "64": (functools.partial(group, size=64), "group_size is 64"),
    "ue8m0": (functools.partial(group, ue8m0=True), "scale_ue8m0 is True"),
    "channels": (lambda n, s: static(n, torch.linspace(1, 2, 2)), "no float32 tensor with one element"),
    "not the rows": (lambda n, s: static(n.view(-1, 128), s), "something else than the norm's rows"),
    "part of a buffer": (
        lambda n, s: static(n, s, torch.empty((12, 256), dtype=torch.float8_e4m3fn)[:6]),
        "writes to a part of a buffer",
    ),
    "other dtype": (
        lambda n, s: static(n, s, torch.empty(n.shape, dtype=torch.float8_e5m2)),
        "its result is not of",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_others_are_refused_with_a_reason(world, name):
    quantizer, words = REFUSED[name]
    model, given = layer(world, quantizer), inputs(6, 256)
    captured = capture(model, *given, config=KEPT)
    assert captured.count(QUANTIZED) == 0
    assert captured.count(torch.ops.fusewire.all_reduce_rms_norm.default) == 1
    assert any(words in note for note in captured.report.notes), captured.report.notes


def test_vllms_kernel_stays_where_only_native_serves(world):
    """On GPUs, where native is several kernels; another provider's norm is quantised."""
    model, given = layer(world, token), inputs(6, 256)
    with mock.patch("fusewire.fusion_passes.passes.fuse_quantization._on_gpu", return_value=True):
        alone = capture(model, *given, ir_op_priority={"all_reduce_rms_norm": ("native",)})
        other = capture(model, *given, ir_op_priority={"all_reduce_rms_norm": ("rank_ordered", "native")})
    assert any("only native can serve" in note for note in alone.report.notes)
    assert alone.count(QUANTIZED) == 0
    assert other.count(QUANTIZED) == 1


def test_a_buffer_that_is_read_before_is_refused(world):
    """In place, the old values of a buffer are gone."""

    def model(x, r, w, s):
        buffer = torch.empty(x.shape, dtype=torch.float8_e4m3fn)
        before = buffer.float() * 0
        y = functional.wait_tensor(functional.all_reduce(x, "sum", world))
        n, y = torch.ops.vllm_ir.fused_add_rms_norm(y, r, w, 1e-5)
        return static(n, s, buffer), y, before

    with FakeTensorMode() as mode:
        graph = trace(model, [mode.from_tensor(tensor) for tensor in inputs(6, 256)])
    report = run_passes(graph.graph, KEPT)
    assert any("a buffer that is used elsewhere" in note for note in report.notes)
    assert not [node for node in graph.graph.nodes if node.target is QUANTIZED]
    clear_report()
