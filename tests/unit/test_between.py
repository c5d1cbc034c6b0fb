"""The reason names the operator between an all-reduce and a norm that nothing can be carried over."""

from __future__ import annotations

import pytest
import torch
import torch.distributed._functional_collectives as functional
import torch.nn.functional as F

from support.blocks import HIDDEN, reduce_functional
from support.carried import inputs, norm
from support.graphs import capture

ROWS = torch.arange(6).flip(0)
# An operator on `y`, the all-reduced value, and what the reason calls it; `x` is what was reduced.
OPERATORS = {
    "relu": (lambda y, x: F.relu(y), "aten::relu (relu)", ""),
    "clamp": (lambda y, x: y.clamp(-2, 2), "aten::clamp_min (clamp_min)", "part of aten::clamp, "),
    "where": (lambda y, x: torch.where(y > 0, y, x), "aten::where (where)", ""),
    "remainder": (lambda y, x: y.remainder(3), "aten::remainder (remainder)", ""),
    "pow": (lambda y, x: y.pow(3), "aten::pow (pow_1)", ""),
    "softcap": (lambda y, x: 30 * torch.tanh(y / 30), "aten::tanh (tanh)", ""),
    "masked_fill": (lambda y, x: y.masked_fill(x > 0, 0.0), "aten::where (where)", "part of aten::masked_fill, "),
    "index_select": (lambda y, x: y.index_select(0, ROWS), "aten::index (index)", "part of aten::index_select, "),
    "gather": (lambda y, x: y.gather(0, (x > 0).long()), "aten::gather (gather)", ""),
    "flip": (lambda y, x: y.flip(0), "prims::rev (rev)", "part of aten::flip, "),
    "cat": (lambda y, x: torch.cat([y[3:], y[:3]]), "aten::slice (slice_1)", ""),
    "transpose": (
        lambda y, x: y.view(2, 3, HIDDEN).transpose(0, 1).reshape(6, HIDDEN),
        "aten::permute (permute)",
        "part of aten::transpose, ",
    ),
    "sort": (lambda y, x: y.sort(-1).values, "aten::sort (sort)", ""),
}
OWN = {
    "silu": (lambda y, x: F.silu(y), "it is divided by a tensor (div)", "part of aten::silu, "),
    "softmax": (lambda y, x: y.softmax(-1), "aten::sub (sub) adds a tensor that is", "part of aten::_softmax, "),
    "gated by itself": (lambda y, x: y * y.sigmoid(), "it is multiplied by a tensor (mul)", ""),
}


@pytest.fixture(autouse=True)
def _world(fake_world):
    return fake_world


def reason(operator, dtype, beside):
    """Return the reason of an all-reduce with this operator before its norm or the residual add."""

    def block(x, r, w):
        y = operator(reduce_functional(x), x)
        return norm(r + y if beside else y, w)

    given = inputs(dtype)[:3]
    captured = capture(block, *given)
    assert captured.verdicts() == [("refused", "match")]
    assert torch.allclose(captured.result, block(*given), rtol=0.02, atol=0.02)
    return captured.reasons()[0], f"unit/test_between.py:{operator.__code__.co_firstlineno}"


CASES = pytest.mark.parametrize(
    ("dtype", "beside"), [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, True)]
)


@CASES
@pytest.mark.parametrize("name", OPERATORS)
def test_the_operator_is_named(name, dtype, beside):
    operator, what, part = OPERATORS[name]
    says, place = reason(operator, dtype, beside)
    assert says == (
        f"{what} between the all-reduce and the norm cannot be carried over it: only views, scales "
        f"and additions can, and no option helps ({part}{place})"
    )


@CASES
@pytest.mark.parametrize("name", OWN)
def test_an_operand_of_its_own_result(name, dtype, beside):
    operator, what, part = OWN[name]
    says, place = reason(operator, dtype, beside)
    assert says.startswith(what)
    own = "computed from the all-reduce's own result, so it cannot move before it; no option helps"
    assert says.endswith(f"{own} ({part}{place})")


def test_dropout_is_nothing_in_evaluation():
    captured = capture(lambda x, r, w: norm(r + F.dropout(reduce_functional(x), training=False), w), *inputs()[:3])
    assert captured.verdicts() == [("fused", "")]


def test_where_no_norm_follows_none_is_named():
    captured = capture(lambda x, r, w: (r + reduce_functional(x).relu()).sin(), *inputs()[:3])
    assert captured.reasons() == ["no RMSNorm follows; aten::relu reads its result"]


@pytest.mark.parametrize("operator", [F.relu, lambda y: y * 0.5 + torch.tanh(y)])
def test_a_second_wait_is_no_operator(operator):
    def block(x, r, w):
        y = operator(functional.wait_tensor(reduce_functional(x)))
        return norm(r + y, w), y.sin()

    (reason,) = capture(block, *inputs()[:3]).reasons()
    assert reason.startswith(("aten::relu (relu) between", "what is added to the all-reduce's result is computed"))


def test_a_second_wait_reads_nothing():
    captured = capture(lambda x, r, w: functional.wait_tensor(reduce_functional(x)).sin().cos(), *inputs()[:3])
    assert captured.reasons() == ["no RMSNorm follows; aten::sin reads its result"]


def test_a_norm_behind_a_matrix_product_is_another_layers():
    def block(x, r, w, s, b, c, base, *_):
        return norm((reduce_functional(x).relu() @ base).abs() + r, w)

    assert capture(block, *inputs()).reasons() == ["no RMSNorm follows; aten::relu reads its result"]
