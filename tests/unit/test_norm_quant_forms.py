"""vLLM's operators that are a norm and its quantisation are tried: the form is that of the version
at hand, and one that computes something else stays.
"""

from __future__ import annotations

import functools
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed._functional_collectives as functional
from torch._subclasses.fake_tensor import FakeTensorMode

from fusewire.custom_ops.ops.quantized_norm import all_reduce_rms_norm_quantized
from fusewire.fusion_passes.analysis.norm_quant_forms import form_of
from fusewire.fusion_passes.cache_key import cache_key
from fusewire.fusion_passes.config import PassConfig
from fusewire.patterns.quantizations import NORM_QUANT_OPS

from support import vllm_quantizers
from support.distributed import fake_group
from support.graphs import capture
from support.quantizers import assert_same, inputs

OP, TOKEN_OP = "fused_add_rms_norm_static_fp8_quant", "rms_norm_dynamic_per_token_quant"
ROUNDS_FIRST = functools.partial(vllm_quantizers._add_norm_static, rounds_first=True)


def not_compiled(*_args):
    raise ValueError("not compiled for this machine")


def of_the_unrounded_sum(result, input, residual, weight, scale, epsilon):
    wide = input.float() + residual.float()
    residual.copy_(wide)
    norm = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon) * weight.float()
    vllm_quantizers._static(result, norm.to(weight.dtype), scale)


def of_half_the_scale(result, input, residual, weight, scale, epsilon):
    vllm_quantizers._add_norm_static(result, input, residual, weight, scale / 2, epsilon)


def without_its_sum(result, input, residual, weight, scale, epsilon):
    vllm_quantizers._add_norm_static(result, input, residual.clone(), weight, scale, epsilon)


def with_inverse_scales(result, input, weight, scale, epsilon, scale_ub, residual):
    vllm_quantizers._norm_token(result, input, weight, scale, epsilon, scale_ub, residual)
    scale.reciprocal_()


@pytest.fixture
def define():
    """Define vLLM's operators, some of them changed, for one test."""
    libraries = []
    yield lambda **changed: libraries.extend(vllm_quantizers.operators(**changed))
    for library in libraries:
        library._destroy()


def tried(name, with_residual):
    entry = NORM_QUANT_OPS[f"_C::{name}"]
    op, quant = (getattr(torch.ops._C, each.partition("::")[2] or each).default for each in (name, entry.quant))
    return form_of(op, quant, entry, with_residual, "cpu")


@pytest.mark.parametrize(
    ("function", "form"),
    [
        (vllm_quantizers._add_norm_static, "scale_then_round"),
        (ROUNDS_FIRST, "round_then_scale"),
        (of_the_unrounded_sum, "wide_sum_scale_then_round"),
    ],
    ids=["0.26 to 0.33", "later", "unrounded sum"],
)
def test_the_form_is_found(define, function, form):
    define(**{OP: function})
    assert tried(OP, True) == (form, "")


@pytest.mark.parametrize(
    ("name", "with_residual", "form"),
    [
        ("rms_norm_static_fp8_quant", False, "scale_then_round"),
        (TOKEN_OP, False, "round_then_scale"),
        (TOKEN_OP, True, "wide_sum_round_then_scale"),
        ("rms_norm_per_block_quant", False, "round_then_scale"),
        ("rms_norm_per_block_quant", True, "wide_sum_round_then_scale"),
    ],
)
def test_forms_of_the_other_operators(define, name, with_residual, form):
    define()
    with FakeTensorMode():  # as while a graph is compiled
        assert tried(name, with_residual) == (form, "")


@pytest.mark.parametrize(
    ("name", "function", "words"),
    [
        (OP, of_half_the_scale, "on cpu its results are not those of one of the norms that fusewire computes"),
        (OP, without_its_sum, "on cpu its results are not those of one of the norms that fusewire computes"),
        (TOKEN_OP, with_inverse_scales, "on cpu its results are not those of one of the norms"),
        (OP, not_compiled, "it could not be tried on cpu: ValueError: not compiled for this machine"),
    ],
)
def test_another_arithmetic_is_refused(define, name, function, words):
    define(**{name: function})
    form, refusal = tried(name, True)
    assert form == ""
    assert words in refusal


@pytest.mark.parametrize("function", [ROUNDS_FIRST, without_its_sum], ids=["later", "unknown"])
def test_a_graph_has_the_operators_bits(define, function):
    """Fused in the operator's form, or left with the reason."""
    define(**{OP: function})

    def model(x, r, w, s):
        y = functional.wait_tensor(functional.all_reduce(x, "sum", world))
        r, result = r * 2, torch.empty(y.shape, dtype=torch.float8_e4m3fn)
        torch.ops._C.fused_add_rms_norm_static_fp8_quant(result, y, r, w, s, 1e-5)
        return result, r

    given = inputs(6, 256)
    with fake_group(2) as world:
        captured = capture(model, *given, config=PassConfig(inline_native=False))
        wanted = model(*given)
    fused = captured.count(all_reduce_rms_norm_quantized.torch_op)
    assert fused == (function is ROUNDS_FIRST)
    if not fused:
        assert "a norm and its quantisation in one, stays as it is: on cpu its results" in captured.reasons()[0]
    assert_same(captured.result, wanted)


def test_the_caches_key_has_vllms_version():
    keys = set()
    for version in ("0.33.0", "0.34.0"):
        with mock.patch.dict(sys.modules, {"vllm": SimpleNamespace(__version__=version)}):
            keys.add(cache_key(PassConfig()))
    assert len(keys) == 2
