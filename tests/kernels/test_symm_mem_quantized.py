"""The FP8 results of the `symm_mem` kernels, run without a GPU by `support.simulator`.

The reference is native's quantisation of the norm that the same launch configuration gives, bit for
bit; in the simulator a NaN in FP8 is 0x7f, and any NaN equals any other.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from fusewire.custom_ops.providers.symm_mem.launch_config import LaunchConfig

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


def _flags(programs, lookahead, result_lag):
    return LaunchConfig(programs, 1, 32, lookahead=lookahead, result_lag=result_lag)


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
}  # fmt: skip


@pytest.fixture(scope="module")
def results():
    return run_cases(__file__, SCENARIOS)


@pytest.mark.parametrize("name", SCENARIOS)
def test_quantised_norms_are_natives(name, results):
    assert not results[name], results[name]


def run_case(name):
    from support.simulator import simulate

    simulate(*SCENARIOS[name])


if __name__ == "__main__":
    main(run_case)
