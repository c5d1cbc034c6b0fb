"""The `symm_mem` kernels in batch-invariant mode, in the simulation of `support.simulator`.

Results are held, bit for bit, to a sum in rank order and `torch_batch_invariant`. One row, the
needle, is in every call of a scenario, alone and among others, on both sides of each protocol's
border and in every launch configuration. Values are spread over many magnitudes. The same kernels
without the mode must not pass.
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
DATA, FLAGS = {"protocol": "data"}, {"protocol": "flags"}


def _sliced(slices, block, warps=1, unroll=1):
    return {"config": LaunchConfig(slices, warps, block, slices=slices, unroll=unroll)}


def _flags(programs, block, warps=1, lookahead=1):
    return {**FLAGS, "config": LaunchConfig(programs, warps, block, lookahead=lookahead)}


# 65 to 74 packets a row: blocks of 32, 64 and 128 packets cut the tree at other levels, and leave
# slices empty.
SCENARIOS = {
    "one-shot, 2 ranks": (2, 520, BF16, [
        ("one_shot", 1, {}), ("one_shot", 2, _sliced(2, 64)), ("one_shot", 1, _sliced(4, 32)),
        ("one_shot", 3, _sliced(1, 128, warps=2)), ("one_shot", 1, _sliced(8, 32)), ("one_shot", 9, {}),
    ]),
    "both two-shots, 2 ranks": (2, 264, FP32, [
        ("one_shot", 1, {}), ("two_shot", 2, {**DATA, **_sliced(4, 32)}), ("two_shot", 10, DATA),
        ("two_shot_sharded", 3, {**DATA, **_sliced(2, 64)}), ("two_shot", 4, {**DATA, **_sliced(8, 32, unroll=4)}),
        ("two_shot_sharded", 16, DATA), ("two_shot", 17, _flags(3, 128, warps=2)),
        ("two_shot_sharded", 5, _flags(2, 128, lookahead=2)),
    ]),
    "slices without packets, 3 ranks": (3, 264, FP32, [
        ("two_shot", 2, {**DATA, **_sliced(4, 64)}), ("two_shot_sharded", 5, {**DATA, **_sliced(4, 64)}),
        ("two_shot", 4, {**DATA, **_sliced(4, 64)}), ("two_shot_sharded", 1, {**DATA, **_sliced(8, 64)}),
        ("one_shot", 2, _sliced(4, 128)),
    ]),
    "in a form of a wide sum, 3 ranks": (3, 584, FP16, [
        (kind, tokens, {"form": WIDE_ROUND, **options}) for kind, tokens, options in (
            ("one_shot", 1, _sliced(2, 64)), ("two_shot", 4, {**DATA, **_sliced(4, 32)}),
            ("two_shot_sharded", 2, DATA), ("two_shot", 4, _flags(2, 128)), ("two_shot_sharded", 1, _flags(1, 128)),
        )
    ]),
    "with an inner norm, 2 ranks": (2, 520, BF16, [
        (kind, tokens, {"inner": (FP32, ROUND), **options}) for kind, tokens, options in (
            ("one_shot", 1, _sliced(4, 32)), ("two_shot", 3, {**DATA, **_sliced(2, 64)}),
            ("two_shot_sharded", 3, {**DATA, **_sliced(4, 32)}), ("two_shot", 2, _flags(1, 128, warps=4)),
        )
    ]),
    "8 ranks": (8, 264, FP32, [("one_shot", 1, {}), ("two_shot", 1, DATA), ("two_shot", 9, FLAGS)]),
}  # fmt: skip
VARIANT = "without the mode"  # of the first scenario, which must not pass


@pytest.fixture(scope="module")
def results():
    return run_cases(__file__, [*SCENARIOS, VARIANT])


@pytest.mark.parametrize("name", SCENARIOS)
def test_bits_depend_on_the_row_alone(name, results):
    assert not results[name], results[name]


def test_other_kernels_do_not_pass(results):
    assert "a needle has other bits" in results[VARIANT]


def _spread(rows, hidden, seed):
    generator = torch.Generator().manual_seed(seed)
    powers = torch.randint(-4, 5, (rows, hidden), generator=generator)
    return torch.ldexp(torch.randn(rows, hidden, generator=generator).clamp(-4, 4), powers)


def run_case(name):
    from support import simulator

    world, hidden, dtype, specs = SCENARIOS["both two-shots, 2 ranks" if name == VARIANT else name]
    plain, calls = simulator.make_call, []

    def make_call(kind, tokens, *args, **options):
        call, number = plain(kind, tokens, *args, **options), len(calls)
        call.needle = (tokens - 1) * (number % 2)
        call.weight = _spread(1, hidden, 1)[0].to(call.weight.dtype)
        whole = [*call.parts, call.full]
        for place, tensor in enumerate(whole):
            tensor.copy_(_spread(tokens, hidden, 100 * number + place))
            tensor[call.needle] = _spread(1, hidden, 10**6 + place)[0].to(dtype)
        if inner := call.options.get("inner"):
            inner.weight.copy_(_spread(1, hidden, 2)[0])
        for mine in call.ranks:
            mine.residual.copy_(call.full[mine.rows])
        calls.append(call)
        return call

    mode = {} if name == VARIANT else {"batch_invariant": True}
    simulator.make_call = make_call
    try:
        simulator.simulate(world, hidden, dtype, [(kind, n, {**options, **mode}) for kind, n, options in specs], 0, 8)
    finally:
        simulator.make_call = plain
    integers = torch.int16 if dtype.itemsize == 2 else torch.int32
    found = {tuple(mine.norm_out[call.needle].view(integers).tolist()) for call in calls for mine in call.ranks}
    assert len(found) == 1, "a needle has other bits"


if __name__ == "__main__":
    main(run_case)
