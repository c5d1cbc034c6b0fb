"""The FP8 results of the `symm_mem` kernels, run without a GPU by `support.simulator`.

The reference is native's quantisation of the norm that the same launch configuration gives, bit for
bit; in the simulator a NaN in FP8 is 0x7f, and any NaN equals any other.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl

from fusewire.custom_ops.ops.quantization import KERNELS, QuantSpec, quantize, quantize_by_kernel
from fusewire.custom_ops.providers import fp8_rows
from fusewire.custom_ops.providers.symm_mem.arguments import Quantization, quant_tensors
from fusewire.custom_ops.providers.symm_mem.kernels.quantize import divided, divisor_of
from fusewire.custom_ops.providers.symm_mem.launch_config import LaunchConfig
from fusewire.errors import ArgumentError

from support.interpreted import main, run_cases
from support.launches import compiled_with

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SCALE, ROUND = "scale_then_round", "round_then_scale"
WIDE_ROUND = "wide_sum_round_then_scale"
SLICED = LaunchConfig(3, 1, 32, slices=3)
INNER = {"inner": (BF16, SCALE)}
WIDE = {"form": WIDE_ROUND}
STATIC = {"quant": "tensor", "scale": 0.0123}
TOKEN = {"quant": "token scale_floor=4.359654e-06"}
GROUP = {"quant": "group amax_floor=1e-10"}
FLAGS = {"protocol": "flags"}


def _flags(programs, lookahead, result_lag, block=32):
    return LaunchConfig(programs, 1, block, lookahead=lookahead, result_lag=result_lag)


SCENARIOS = {
    "sharded, 2 ranks": (2, 256, BF16, [
        ("two_shot_sharded", 5, {**TOKEN, "config": _flags(2, 1, 0)}),
        ("two_shot_sharded", 6, {**GROUP, "output": 0, "config": _flags(1, 3, 2), **WIDE}),
        ("two_shot_sharded", 3, {**STATIC, "output": 0}),
        ("two_shot_sharded", 4, {**GROUP, "with_norm": True, **INNER}),
        ("two_shot_sharded", 3, {**TOKEN, "with_norm": True, "output": 0, "need_residual": False}),
    ]),
    "one-shot, 2 ranks": (2, 512, BF16, [
        ("one_shot", 2, {**TOKEN, "config": LaunchConfig(2, 1, 32, slices=2), **INNER}),
        ("one_shot", 3, {**GROUP, "with_norm": True, "config": SLICED}),
        ("one_shot", 1, {**STATIC, "config": LaunchConfig(2, 1, 64, slices=2)}),
    ]),
    "full, 2 ranks": (2, 256, BF16, [
        ("two_shot", 5, {**TOKEN, "config": _flags(2, 1, 0)}),
        ("two_shot", 6, {**GROUP, "output": 0, "config": _flags(1, 3, 2), **WIDE}),
        ("two_shot", 3, {**STATIC, "with_norm": True, "output": 0}),
        ("two_shot", 4, {**GROUP, "with_norm": True, **INNER}),
        ("two_shot", 3, {**TOKEN, "need_residual": False}),
    ]),
    "sharded, 3 ranks": (3, 256, FP16, [
        ("two_shot_sharded", 7, {**TOKEN, "output": 0}),
        ("two_shot_sharded", 4, {"quant": "group layout=aligned_columns", "config": _flags(1, 2, 1, 64)}),
        ("two_shot_sharded", 2, {**STATIC, "with_norm": True, "weight": None}),
        ("two_shot", 5, {**GROUP, "with_norm": True, "residual": False}),
    ]),
    "one-shot, racing, 4 ranks": (4, 512, FP16, [
        ("one_shot", 1 + i % 2, {**(TOKEN, GROUP, STATIC)[i % 3], "config": LaunchConfig(2, 1, 32, slices=2)})
        for i in range(3)
    ]),
    "sharded, racing, 2 ranks": (2, 128, BF16, [
        ("two_shot_sharded", 2 + i % 2, {**(TOKEN, GROUP)[i % 2], **({"output": 0} if i % 4 < 2 else {})})
        for i in range(6)
    ]),
}  # fmt: skip
# Each option of a quantisation, on rows of zeros, of numbers far apart, with infinity and with NaN.
OPTIONS = [
    *[("tensor", scale) for scale in (1.0, 2.0**-6, 0.0, 1e-30, float("nan"))],  # ties, nothing, too much
    *[(f"tensor apply={how}", 0.03) for how in ("reciprocal", "multiply")],
    *[(f"tensor{how} narrow=True", 0.0107) for how in ("", " apply=reciprocal", " apply=multiply")],
    *[(f"{kind}{options}", None) for kind in ("token", "group") for options in (
        "", " apply=reciprocal", " amax_by=multiply", " amax_floor=0.5", " scale_floor=0.01", " narrow_scale=True",
        " amax_by=multiply narrow_scale=True narrow=True", " apply=reciprocal narrow_scale=True narrow=True",
        " amax_floor=0.3 narrow_scale=True",
    )],
    ("token amax_floor=0.3 narrow_scale=True", 5.0),
    *[(kind, bound) for kind in ("token", "group amax_floor=1e-10") for bound in (0.7, float("nan"))],
    *[(f"group layout={layout}", None) for layout in ("columns", "aligned_columns")],
]  # fmt: skip
SCENARIOS |= {
    f"options in {str(dtype)[6:]}, {part}": (2, 128, dtype, [
        ("one_shot", 4, {"quant": quant, "scale": scale, "special": True, "with_norm": i % 3 == 0, "weight": None})
        for i, (quant, scale) in enumerate(OPTIONS)
    ][part::2], part)
    for dtype, part in ((BF16, 0), (FP16, 1))
}  # fmt: skip
CALLS = {
    "one-shot": ("one_shot", {**TOKEN, "config": LaunchConfig(2, 1, 32, slices=2)}),
    "sharded": ("two_shot_sharded", GROUP),
    "sharded, in place": ("two_shot_sharded", {**TOKEN, "output": 0}),
    "full": ("two_shot", {**TOKEN, "with_norm": True}),
}
# After a rank stops or is late, what is lost is NaN in FP8 too, and so are its scales.
SCENARIOS |= {
    f"{name}: rank {gone} stops after {turns} turns": (
        2, 512, BF16, [(kind, 3, options)] * 3, turns, 3, (gone, 1, turns),
    )
    for gone, turns in ((1, 0), (0, 7))
    for name, (kind, options) in CALLS.items()
}  # fmt: skip
SCENARIOS |= {
    f"{name}: rank 1 is late": (2, 512, BF16, [(kind, 3, options)] * 5, 1, 3, None, (1, 1, 5))
    for name, (kind, options) in CALLS.items()
}
SHARDED = ("two_shot_sharded", 13, {**FLAGS, **TOKEN})
DIFFERING = {
    f"differing: {name}": (2, 128, BF16, [], SHARDED, (SHARDED[0], 13, {**FLAGS, **options}))
    for name, options in {
        "no quantisation": {}, "another": GROUP, "with the norm": {**TOKEN, "with_norm": True},
    }.items()
}  # fmt: skip


# The kernel that only quantises.
ROWS = {f"rows of {str(dtype)[6:]}": dtype for dtype in (BF16, FP16, FP32)}


def run_rows(dtype):
    from fusewire.custom_ops.providers.symm_mem.kernels import quantize_rows as kernels

    from support import simulator
    from support.simulated_calls import strides_of, wrong

    norm = torch.randn(5, 256, generator=torch.Generator().manual_seed(3)) * torch.logspace(-9, 3, 5)[:, None]
    norm[0], norm[1, 7], norm[2, -1], norm[3, 5] = 0, torch.inf, torch.nan, -0.0
    norm = norm.to(dtype)
    for quant, number in OPTIONS:
        scale = None if number is None else torch.tensor([number])
        arguments, rows, warps, quantized, scales = fp8_rows.launch_of(norm, scale, quant)
        quantized.view(torch.uint8).fill_(0x55)
        machine = simulator.Machine(0)
        simulator.install(machine)
        if scales is not None and scales._base is not None:
            machine.hold(scales._base)  # columns are longer than the scales in them
        config = SimpleNamespace(programs=rows, threads=32 * warps)
        launch = SimpleNamespace(kernel="", tensors=arguments[:4], arguments=arguments[4:], config=config)
        with (
            mock.patch.object(simulator.symm_mem, "kernel", return_value=kernels.quantize_rows_kernel),
            mock.patch.object(kernels, "FP32", 2),
        ):
            for block in machine.blocks_of(launch):
                while not block.over:
                    machine.resume(block, SimpleNamespace(turns=0))
                block.flush()
        wanted, wanted_scales = quantize(norm, scale, quant)
        assert wrong(quantized, wanted, False) == 0, f"{quant}, {number}: rows"
        if scales is not None:
            assert wrong(scales, wanted_scales, False) == 0, f"{quant}, {number}: scales"
            assert strides_of(scales) == strides_of(wanted_scales)


QUOTIENTS = "quotients"


@triton.jit
def quotients_kernel(values, scale, out, N: tl.constexpr):
    """Divide values by a scale as the kernels do."""
    at = tl.arange(0, N)
    factors = divisor_of(tl.load(scale))
    tl.store(out + at, divided(tl.load(values + at), factors[0], factors[1], factors[2]))


def run_quotients():
    """All bf16 numbers, and some in fp32, by scales of every size: the quotients of IEEE 754 where
    they are neither tiny nor huge, and its FP8 numbers everywhere.
    """
    from triton.runtime import interpreter

    from support import simulator

    simulator.install(simulator.Machine(0))
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(-(2**31), 2**31, (1 << 14,), generator=generator).to(torch.int32)
    halves = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)
    given = [halves.view(BF16).float(), words.view(FP32)]
    ends = [0.0, -0.0, float("inf"), float("nan"), 1e-45, 1e-40, 3e38, 2.0**-126, 2.0**127, -0.37, 1.0]
    scales = [
        *torch.tensor(ends),
        *words[:24].view(FP32).abs(),
        *(halves[100:12000:500].view(BF16).float().abs() / 448),
    ]
    for scale in scales:
        for values in given:
            out = torch.empty_like(values)
            with mock.patch.object(interpreter, "_patch_lang", return_value=mock.Mock()):  # it is patched already
                quotients_kernel[(1,)](values, scale.reshape(1).clone(), out, len(values))
            exact = values / scale
            normal = (exact.abs() > 1e-30) & (exact.abs() < 1e30)
            assert torch.equal(out[normal], exact[normal]), scale
            got, wanted = (part.clamp(-448, 448).to(torch.float8_e4m3fn) for part in (out, exact))
            same = (got.view(torch.uint8) == wanted.view(torch.uint8)) | (out.isnan() & exact.isnan())
            assert same.all(), (scale, values[~same][:3])


@pytest.mark.parametrize("quant", ["token", "group layout=columns", "tensor apply=reciprocal"])
def test_a_kernel_of_its_own_compiles(quant):
    """For sm_90, without a conversion of layouts, without spills to speak of."""
    norm, scale = torch.empty(3, 8192, dtype=BF16), torch.ones(1) if quant.startswith("tensor") else None
    arguments, _, warps, *_ = fp8_rows.launch_of(norm, scale, quant)
    kernel = compiled_with(fp8_rows.kernel(), arguments, {"num_warps": warps, "enable_fp_fusion": False})
    assert "convert_layout" not in kernel.asm["ttgir"]
    assert "cvt.rn.satfinite.e4m3x2.f32" in kernel.asm["ptx"]
    assert "ftz" not in kernel.asm["ptx"]


def test_rows_that_no_kernel_takes_are_natives():
    """On a CPU always; and where a kernel takes them, its results are the results."""
    norm = torch.randn(3, 256).to(BF16)
    assert fp8_rows.quantize_rows in KERNELS
    assert fp8_rows.quantize_rows(norm, None, "token") is None
    made = [part.view(torch.uint8) if part.itemsize == 1 else part for part in quantize(norm, None, "token")]
    found = quantize_by_kernel(norm, None, "token")
    assert all(torch.equal(a.view(b.dtype), b) for a, b in zip(found, made, strict=True))
    with mock.patch.object(fp8_rows, "_fits", return_value=True), mock.patch.dict(fp8_rows._passed):
        fp8_rows._passed.clear()
        with mock.patch.object(fp8_rows, "is_capturing", return_value=True):  # cannot be tested now, but later
            assert fp8_rows.quantize_rows(norm, None, "token") is None
        assert not fp8_rows._passed
        for launch in (quantize, off_by_one_bit, mock.Mock(side_effect=RuntimeError("no such instruction"))):
            fp8_rows._passed.clear()
            with (
                mock.patch.object(fp8_rows, "_launch", launch),
                mock.patch.object(fp8_rows, "is_capturing", return_value=False),
            ):
                assert (fp8_rows.quantize_rows(norm, None, "token") is not None) == (launch is quantize)


def off_by_one_bit(norm, scale, quant):
    quantized, scales = quantize(norm, scale, quant)
    quantized.view(torch.uint8)[-1, -1] ^= 1
    return quantized, scales


@pytest.fixture(scope="module")
def results():
    return run_cases(__file__, [*SCENARIOS, *DIFFERING, *ROWS, QUOTIENTS])


@pytest.mark.parametrize("name", [*SCENARIOS, *DIFFERING, *ROWS, QUOTIENTS])
def test_quantised_norms_are_natives(name, results):
    assert not results[name], results[name]


def run_case(name):
    from support.simulator import simulate, simulate_differing

    if name in DIFFERING:
        simulate_differing(*DIFFERING[name])
    elif name in ROWS:
        run_rows(ROWS[name])
    elif name == QUOTIENTS:
        run_quotients()
    else:
        simulate(*SCENARIOS[name])


def test_every_option_of_a_quantisation_is_among_them():
    """Except those that the kernels refuse."""
    left_out = {"kind", "power_of_two", "clamp"}
    said = " ".join(quant for quant, _ in OPTIONS)
    assert {item.name for item in dataclasses.fields(QuantSpec) if f" {item.name}=" not in said} <= left_out
    for quant, scale, dtype, said in (
        ("group power_of_two=True", None, BF16, "power of two"),
        ("tensor clamp=False", torch.ones(1), BF16, "without a clamp"),
        ("token", None, FP32, "float32"),
    ):
        with pytest.raises(ArgumentError, match=said):
            quant_tensors(Quantization(quant, scale, False), torch.zeros(1, 128, dtype=dtype))


if __name__ == "__main__":
    main(run_case)
