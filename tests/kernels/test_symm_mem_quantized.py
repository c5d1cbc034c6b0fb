"""The FP8 results of the `symm_mem` kernels, run without a GPU by `support.simulator`.

The reference is native's quantisation of the norm that the same launch configuration gives, bit for
bit; in the simulator a NaN in FP8 is 0x7f, and any NaN equals any other.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from fusewire.custom_ops.ops.quantization import QuantSpec
from fusewire.custom_ops.providers.symm_mem.arguments import Quantization, quant_tensors
from fusewire.custom_ops.providers.symm_mem.launch_config import LaunchConfig
from fusewire.errors import ArgumentError

from support.interpreted import main, run_cases

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
    "sharded, 3 ranks": (3, 256, FP32, [
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
    *[(f"tensor{how} clamp=False", 37.0) for how in (" apply=reciprocal", " apply=multiply")],
    *[(f"{kind}{options}", None) for kind in ("token", "group") for options in (
        "", " apply=reciprocal", " amax_by=multiply", " amax_floor=0.5", " scale_floor=0.01", " narrow_scale=True",
        " amax_by=multiply narrow_scale=True narrow=True", " apply=reciprocal narrow_scale=True narrow=True",
    )],
    *[(kind, bound) for kind in ("token", "group amax_floor=1e-10") for bound in (0.7, float("nan"))],
    *[(f"group layout={layout}", None) for layout in ("columns", "aligned_columns")],
]  # fmt: skip
SCENARIOS |= {
    f"options in {str(dtype)[6:]}, {part}": (2, 128, dtype, [
        ("one_shot", 4, {"quant": quant, "scale": scale, "special": True, "with_norm": i % 3 == 0, "weight": None})
        for i, (quant, scale) in enumerate(OPTIONS)
    ][part::2], part)
    for dtype, part in ((BF16, 0), (FP16, 1), (FP32, 0))
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


@pytest.fixture(scope="module")
def results():
    return run_cases(__file__, [*SCENARIOS, *DIFFERING])


@pytest.mark.parametrize("name", [*SCENARIOS, *DIFFERING])
def test_quantised_norms_are_natives(name, results):
    assert not results[name], results[name]


def run_case(name):
    from support.simulator import simulate, simulate_differing

    if name in DIFFERING:
        simulate_differing(*DIFFERING[name])
    else:
        simulate(*SCENARIOS[name])


def test_every_option_of_a_quantisation_is_among_them():
    """Except those that the kernels refuse."""
    left_out = {"kind", "power_of_two", "layout"}
    said = " ".join(quant for quant, _ in OPTIONS)
    assert {item.name for item in dataclasses.fields(QuantSpec) if f" {item.name}=" not in said} <= left_out
    with pytest.raises(ArgumentError, match="power of two"):
        quant_tensors(Quantization("group power_of_two=True", None, False), torch.zeros(1, 128))


if __name__ == "__main__":
    main(run_case)
