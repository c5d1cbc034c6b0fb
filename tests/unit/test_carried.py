"""Subtractions, numbers, scales after addends, divisors, constants, L2 norms and LoRA between an
all-reduce and its norm.

The programs stand in tests/support/carried.py: what was moved must give the same bits.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm
from fusewire.patterns.collectives import ALL_REDUCE

from support.blocks import HIDDEN, NORMS, reduce_functional, tensors
from support.carried import KINDS, PARTS, SCALES, differing, inputs, norm, of_kind
from support.distributed import fake_group, shared_pool
from support.graphs import capture

OTHER = []
FUSED_OP = all_reduce_rms_norm.torch_op


@pytest.fixture
def world():
    with fake_group(2) as group:
        OTHER[:] = [dist.new_group([0, 1])]
        yield group


# --- What fuses. ------------------------------------------------------------------------------------


def lora(x, r, w, s, b, c, base, down, up):
    total = r + (reduce_functional(x @ base) + (reduce_functional(x @ down) @ up) * 2.0)
    return norm(total, w), total


def lora_unscaled(x, r, w, s, b, c, base, down, up):
    """Inductor writes it as one addmm."""
    total = r + (reduce_functional(x @ base) + reduce_functional(x @ down) @ up)
    return norm(total, w), total


def lora_of_a_biased_projection(x, r, w, s, b, c, base, down, up):
    total = r + ((reduce_functional(x @ base) + b) + (reduce_functional(x @ down) @ up.t().t()) * c)
    return norm(total, w), total


def lora_beside_the_residual(x, r, w, s, b, c, base, down, up):
    total = (r + reduce_functional(x @ base)) + reduce_functional(x @ down) @ up
    return norm(total, w), total


LORA = {f.__name__: f for f in (lora, lora_unscaled, lora_of_a_biased_projection, lora_beside_the_residual)}


def length(x):
    return torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-5)


L2_NORMS = {
    "weightless": lambda x, w: (x.float() * length(x.float())).to(x.dtype),
    "L": lambda x, w: w * (x.float() * length(x.float())).to(x.dtype),
    "M": lambda x, w: (w * (x.float() * length(x.float()))).to(x.dtype),
    "F": lambda x, w: (x.float() * length(x.float()) * w.float()).to(x.dtype),
    "divided": lambda x, w: (x.float() / (x.float().pow(2).sum(-1, keepdim=True) + 1e-5).sqrt()).to(x.dtype) * w,
}


def l2(name):
    def block(x, r, w, *_):
        total = r + reduce_functional(x)
        return L2_NORMS[name](total, w), L2_NORMS[name](reduce_functional(x + 1), w), total

    return block


def equal(got, want):
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("name", KINDS)
def test_kinds_fuse(world, name):
    """Scales in bf16, whose rounding they have; the others in fp32 with a symbolic number of
    tokens.
    """
    dtype, dynamic = (torch.bfloat16, False) if name in SCALES else (torch.float32, True)
    given = inputs(dtype, (2, 3))
    captured = capture(of_kind(name), *given, dynamic=dynamic, inline_native=False)
    assert captured.verdicts() == [("fused", "")], captured.reasons()
    assert (captured.count(FUSED_OP), captured.count(ALL_REDUCE)) == (1, 0)
    equal(captured.result, of_kind(name)(*given))


def test_a_constant_has_its_tensors_rounding(world):
    """0.3 in bfloat16 is 0.30078125; its number moves."""

    def block(x, r, w, *_):
        return norm(r + reduce_functional(x) * torch.full((1,), 0.3, dtype=x.dtype), w)

    captured = capture(block, *inputs(torch.bfloat16), inline_native=False)
    (call,) = captured.graph.find_nodes(op="call_function", target=FUSED_OP)
    assert call.args[0].args[1] == 0.30078125


@pytest.mark.parametrize("name", LORA)
@pytest.mark.parametrize("shape", [(6,), (2, 3)], ids=["rank 2", "rank 3"])
def test_lora_becomes_one_all_reduce(world, name, shape):
    given = inputs(shape=shape)
    captured = capture(LORA[name], *given, inline_native=False)
    assert captured.verdicts() == [("fused", "")] * 2, captured.reasons()
    assert (captured.count(FUSED_OP), captured.count(ALL_REDUCE)) == (1, 0)
    (note,) = captured.report.notes
    assert "1 matrix (assume_replicated_residuals)" in note
    equal(captured.result, LORA[name](*given))


@pytest.mark.parametrize("name", L2_NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_l2_norms_fuse(world, name, dtype):
    """The root of 64 is a power of two, so that the weight is exact."""
    given = inputs(dtype)
    captured = capture(l2(name), *given, inline_native=False)
    assert captured.verdicts() == [("fused", "")] * 2, captured.reasons()
    calls = captured.graph.find_nodes(op="call_function", target=FUSED_OP)
    assert [call.args[3] for call in calls] == [1e-5 / HIDDEN] * 2
    assert all(", L2" in entry.spelling for entry in captured.report.entries)
    for got, want in zip(captured.result, l2(name)(*given), strict=True):
        torch.testing.assert_close(got, want, rtol=0 if name != "divided" else 1e-6, atol=0)


def _block(name):
    return LORA[name] if name in LORA else l2("L") if name == "l2" else of_kind(name)


@pytest.mark.parametrize("part", PARTS)
def test_results_on_ranks(part):
    assert shared_pool(2).run(differing, _block, [*KINDS, *LORA, "l2"][part], timeout_s=300) == [[], []]


@pytest.mark.parametrize("name", ["r - y", "y - r", "b - y", "rsub"])
def test_signs_are_exact(world, name):
    """They fuse in float16 too. Without allow_reassociation no all-reduce carries negated values."""
    for dtype in (torch.float16, torch.float32):
        x, r, w = tensors(dtype, (6,))
        given = x, r, w, *inputs(dtype)[3:]
        captured = capture(of_kind(name), *given, allow_reassociation=name != "y - r")
        assert captured.verdicts() == [("fused", "")], captured.reasons()
        equal(captured.result, of_kind(name)(*given))
        if name != "y - r":
            refused(of_kind(name), *given, says="the program's own values, not their", allow_reassociation=False)


# --- What does not --------------------------------------------------------------------------------


def refused(block, *given, says, **options):
    captured = capture(block, *given, **options)
    reasons = [entry.reason for entry in captured.report.entries if entry.status == "refused"]
    assert any(says in reason for reason in reasons), reasons
    assert _calls(str(captured.graph)) == _calls(captured.before[0])
    return reasons


def _calls(text):
    """Return a graph's lines without unused constants, with all-reduces as before Inductor reuses
    their inputs.
    """
    return [line.replace("all_reduce_.", "all_reduce.") for line in text.splitlines() if "num_users=0" not in line]


def test_scales_that_are_assumed_are_counted(world):
    captured = capture(of_kind("computed"), *inputs())
    assert captured.report.notes == ("taken to be equal on all ranks: 1 scale (assume_replicated_scales)",)
    assert capture(of_kind("full"), *inputs()).report.notes == ()
    says = "which the graph does not prove; assume_replicated_scales=True assumes it"
    refused(of_kind("computed"), *inputs(), says=says, assume_replicated_scales=False)
    capture(of_kind("full"), *inputs(), assume_replicated_scales=False, expect_fused="all")


@pytest.mark.parametrize("name", ["r - y * 0.5", "r + (y - b)", "(r + y) * 0.25", "full", "cast"])
def test_other_kinds_need_reassociation(world, name):
    refused(of_kind(name), *inputs(), says="allow_reassociation=False forbids", allow_reassociation=False)


TENSOR = "no option assumes; multiply before the all-reduce instead"
FACTORS = {
    "vector": (lambda y, x, r, b, c: r + y * b, TENSOR),
    "of the input": (lambda y, x, r, b, c: r + y * x.abs().max(), TENSOR),
    "two numbers": (lambda y, x, r, b, c: r + y * torch.tensor([0.5, 2.0]).repeat(HIDDEN // 2), TENSOR),
    "random": (lambda y, x, r, b, c: r + y * torch.rand_like(c), "comes from random numbers"),
    "another group's": (
        lambda y, x, r, b, c: r + y * functional.all_reduce(c, "sum", OTHER[0]),
        "comes from a collective over another group",
    ),
    "its own": (lambda y, x, r, b, c: r - y * y, "it is multiplied by a tensor (mul) before the norm; that tensor is"),
    "dividend": (lambda y, x, r, b, c: r + c / (y + 9), "aten::div (div) divides by it before the norm, which is"),
    "its own divisor": (lambda y, x, r, b, c: r + y / (y * y + 1), "before the norm; that tensor is computed from"),
    "a vector's quotient": (
        lambda y, x, r, b, c: r + y / b,
        "is divided by a tensor (div) before the norm; the quotient of a sum is the sum of quotients only if that "
        "tensor is the same on every rank, which the graph does not prove and no option assumes; divide before",
    ),
    "zero": (lambda y, x, r, b, c: r + y / 0, "it is divided by 0 (div) before the norm; only divisors from 1e-30"),
    "rounded quotient": (
        lambda y, x, r, b, c: r + torch.div(y, c, rounding_mode="floor"),
        "aten::div (div) between the all-reduce and the norm cannot",
    ),
    "alpha": (
        lambda y, x, r, b, c: torch.sub(y, r, alpha=2),
        "aten::sub (sub) multiplies what it adds by alpha=2, so the all-reduce cannot be carried over it; write that",
    ),
    "alpha of a number": (lambda y, x, r, b, c: torch.add(y, 1, alpha=2), "aten::add (add) multiplies what it adds by"),
    "rolled": (lambda y, x, r, b, c: torch.cat([r, y]), "aten::cat (cat) between the all-reduce and the norm cannot"),
    "wide": (
        lambda y, x, r, b, c: r.double() - y,
        "a tensor in torch.float64 to the all-reduce's result in torch.float32",
    ),
    "column": (lambda y, x, r, b, c: r + (y + x[:, :1]), "aten::add (add) adds a tensor of another shape than the"),
    "bool": (lambda y, x, r, b, c: r + (y + True), "aten::add (add) adds True, so it cannot be carried over it; add"),
    "wide element": (lambda y, x, r, b, c: r + (y + c.double().view(1)).to(y.dtype), "adds a tensor in torch.float64"),
    "its own addend": (
        lambda y, x, r, b, c: r + (y + y.sin()) * 0.5,
        "computed from that result, which has to be there",
    ),
    "its own residual": (lambda y, x, r, b, c: y - y.sin(), "computed from that result, which has to be there first"),
}


@pytest.mark.parametrize("name", FACTORS)
def test_factors_and_operations_that_stay(world, name):
    function, says = FACTORS[name]

    def block(x, r, w, s, b, c, *_):
        return norm(function(reduce_functional(x), x, r, b, c).to(x.dtype), w)

    reasons = refused(block, *inputs(), says=says)
    assert not any("=True assumes it" in reason for reason in reasons)


def test_an_addend_in_float16_stays_unless_it_becomes_the_residual(world):
    given = inputs(torch.float16)
    refused(of_kind("r + (y + s) * 0.25"), *given, says="make more than float16 holds")
    for name in ("(r + y) * 0.25", "(b + y) * 0.25 + r", "r + (y - b)"):
        assert capture(of_kind(name), *given).verdicts() == [("fused", "")]
    for name in ("computed", "over c"):
        refused(of_kind(name), *given, says="a scale (of unknown size)")


def test_divisors_below_one_stay_in_float16(world):
    def block(x, r, w, s, *_):
        return norm(r + reduce_functional(x) / 4, w), norm(r + reduce_functional(s) / 0.5, w)

    captured = capture(block, *inputs(torch.float16))
    assert [entry.status for entry in captured.report.entries] == ["fused", "refused"]
    assert captured.reasons()[1].startswith("a scale (2) stands between")


@pytest.mark.parametrize("name", ["over c", "computed"])
def test_divisors_and_factors_move_under_one_option(world, name):
    captured = capture(of_kind(name), *inputs())
    assert captured.report.notes == ("taken to be equal on all ranks: 1 scale (assume_replicated_scales)",)
    refused(of_kind(name), *inputs(), says="assume_replicated_scales=True assumes it", assume_replicated_scales=False)


def test_a_gate_that_divides(world):
    def block(x, r, w, *_):
        return norm(r + reduce_functional(x) / (x[:, :1].sign() + 1.5), w)

    x, *rest = inputs()
    says = "is the sum of quotients only if that tensor is the same on every rank, which the graph does not prove; "
    refused(block, x, *rest, says=f"{says}assume_replicated_gates=True assumes it")
    captured = capture(block, x, *rest, assume_replicated_gates=True)
    assert captured.verdicts() == [("fused", "")]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_number_alone_is_the_residual(world, dtype):
    """Nothing is moved, so the bits are the program's for any values."""

    def block(x, r, w, s, b, c, *_):
        return norm(reduce_functional(x) + 0.625, w), norm(reduce_functional(r) - c, w)

    given = (*tensors(dtype, (6,)), *inputs(dtype)[3:])
    captured = capture(block, *given, allow_reassociation=False)
    assert captured.verdicts() == [("fused", "")] * 2, captured.reasons()
    equal(captured.result, block(*given))
    refused(of_kind("r + (y - 1)"), *given, says="allow_reassociation=False forbids", allow_reassociation=False)


@pytest.mark.parametrize("number", [0.3, 1e-9, 1e9, float("nan")])
def test_a_number_that_the_dtype_does_not_hold_stays(world, number):
    def block(x, r, w, *_):
        return norm(r + (reduce_functional(x) + number), w)

    refused(block, *inputs(torch.bfloat16), says=f"aten::add (add) adds {number!r} between the all-reduce and the norm")
    if number == number:
        given = inputs()
        captured = capture(block, *given)
        assert captured.verdicts() == [("fused", "")], captured.reasons()


def test_a_scaled_sum_that_is_read_elsewhere_stays(world):
    def block(x, r, w, s, *_):
        inner = reduce_functional(x) + s
        return norm(r + inner * 0.5, w), inner

    refused(block, *inputs(), says="add, between the all-reduce and the norm, is also read elsewhere")


def test_l2_norms_that_stay(world):
    given = inputs()
    refused(l2("L"), *given, says="by the row's length", allow_reassociation=False)
    half = inputs(torch.float16)
    refused(lambda x, r, w, *_: L2_NORMS["L"](r + reduce_functional(x), w), *half, says="float16 is too small")
    assert capture(lambda x, r, w, *_: L2_NORMS["weightless"](r + reduce_functional(x), w), *half).verdicts() == [
        ("fused", "")
    ]

    def tensor_eps(x, r, w, s, b, c, *_):
        total = r + reduce_functional(x)
        return total * torch.rsqrt(total.pow(2).sum(-1, keepdim=True) + c)

    refused(tensor_eps, *given, says="divides the sum of squares by 1, where")


def test_an_l2_norm_without_an_all_reduce_stays(world):
    """No operator is made of it, where every other norm becomes one."""

    def block(x, r, w, *_):
        return L2_NORMS["L"](r, w) + norm(reduce_functional(x), w)

    captured = capture(block, *inputs(), batch_invariant=True)
    assert captured.verdicts() == [("fused", "")]
    assert captured.count(torch.ops.fusewire.rms_norm.default) == 0


def _own_matrix(x, r, w, s, b, c, base, down, up):
    return norm(r + (reduce_functional(x @ base) + reduce_functional(x @ down) @ reduce_functional(up)), w)


def _random_matrix(x, r, w, s, b, c, base, down, up):
    return norm(r + (reduce_functional(x @ base) + reduce_functional(x @ down) @ torch.rand_like(up)), w)


def _read_twice(x, r, w, s, b, c, base, down, up):
    low = reduce_functional(x @ down)
    return norm(r + (reduce_functional(x @ base) + low @ up), w), low.sin()


def _alone(x, r, w, s, b, c, base, down, up):
    return norm(r + reduce_functional(x @ down) @ up, w)


def _two_groups(x, r, w, s, b, c, base, down, up):
    return norm(r + (reduce_functional(x @ base) + functional.all_reduce(x @ down, "sum", OTHER[0]) @ up), w)


def _beta(x, r, w, s, b, c, base, down, up):
    return norm(r + torch.addmm(reduce_functional(x @ base), reduce_functional(x @ down), up, beta=0.5), w)


@pytest.mark.parametrize(
    ("block", "options"),
    [
        (_own_matrix, {}),
        (_random_matrix, {}),
        (_read_twice, {}),
        (_alone, {}),
        (_two_groups, {}),
        (_beta, {}),
        (lora, {"allow_reassociation": False}),
        (lora, {"assume_replicated_residuals": False}),
        (lora, {"merge_allreduces": False}),
    ],
)
def test_matrices_that_stay(world, block, options):
    captured = capture(block, *inputs(), inline_native=False, **options)
    assert not any(entry.fusion.startswith("merged") for entry in captured.report.entries)
    assert not any("matri" in note for note in captured.report.notes)
    products = [
        node
        for node in captured.graph.nodes
        if node.target in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    ]
    assert len(products) == captured.before[0].count("aten.mm.default") + captured.before[0].count("aten.addmm.default")


def _wide_pair(x, r, w, s, *_):
    """Routed and shared experts, added in fp32 and rounded at once (Hunyuan V3)."""
    total = r + (reduce_functional(x).float() + reduce_functional(s).float()).to(r.dtype)
    return norm(total, w), total


def _wide_pair_also_read(x, r, w, s, *_):
    wide = reduce_functional(x).float() + reduce_functional(s).float()
    return norm(r + wide.to(r.dtype), w), wide


def test_a_sum_in_fp32_that_is_rounded_at_once_is_merged(world):
    given = inputs(torch.bfloat16)
    captured = capture(_wide_pair, *given, inline_native=False)
    assert captured.verdicts() == [("fused", "")] * 2, captured.reasons()
    assert (captured.count(FUSED_OP), captured.count(ALL_REDUCE)) == (1, 0)
    equal(captured.result, _wide_pair(*given))
    read = capture(_wide_pair_also_read, *given, inline_native=False)
    assert not any(entry.fusion.startswith("merged") for entry in read.report.entries)
    equal(read.result, _wide_pair_also_read(*given))


def test_lora_in_float16_is_not_merged(world):
    captured = capture(lora, *inputs(torch.float16))
    assert [entry.status for entry in captured.report.entries] == ["refused"] * 2


class Own(torch.nn.Module):
    """Calls a function with a value of the module's own, a buffer or a parameter."""

    def __init__(self, function, value):
        super().__init__()
        self.function = function
        if isinstance(value, torch.nn.Parameter):
            self.value = value
        else:
            self.register_buffer("value", value)

    def forward(self, x, r, w):
        return self.function(self.value, r + reduce_functional(x), w)


TENSOR_EPSILONS = {
    "float64": (torch.tensor(1e-6, dtype=torch.float64), "a tensor (arg"),
    "float32": (torch.tensor(1e-6), "a tensor (arg"),
    "bfloat16": (torch.tensor([1e-6], dtype=torch.bfloat16), "a tensor (arg"),
    "parameter": (torch.nn.Parameter(torch.tensor(1e-6)), "a tensor (arg"),
    "float64, one element": (torch.tensor([1e-6], dtype=torch.float64), "computes the root in torch.float64, where"),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", TENSOR_EPSILONS)
def test_an_epsilon_that_is_a_tensor(world, name, dynamic):
    """Its value may change from call to call."""
    value, says = TENSOR_EPSILONS[name]
    given = inputs(torch.bfloat16)[:3]
    (reason,) = refused(Own(lambda eps, x, w: NORMS["L"](x, w, eps), value), *given, says=says, dynamic=dynamic)
    assert "dynamic=True" not in reason
    assert reason.endswith(("keep it as a Python float in the module", "keep it in torch.float32"))


def test_an_epsilon_that_the_graph_computes(world):
    block = Own(lambda eps, x, w: NORMS["L"](x, w, eps.abs() + 1e-6), torch.nn.Parameter(torch.tensor(1e-6)))
    refused(block, *inputs()[:3], says="a tensor (add_1), which the graph computes; the operators take a number")
    wide = Own(lambda eps, x, w: NORMS["L"](x, w, eps.float()), torch.tensor(1e-6, dtype=torch.float64))
    says = "a float that dynamic=True made an input, or a float64 buffer; the operators take a number"
    refused(wide, *inputs()[:3], says=says)
    own = Own(lambda eps, x, w: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w, wide.value)
    refused(own, *inputs(torch.float64)[:3], says=says)
