"""The `symm_mem` kernels run without a GPU: all blocks of all ranks in one process, in a seeded random order.

`support.simulator` is the machine. Results are held, bit for bit, to a reference that sums ranks in order, and
squares in the order that the launch configuration gives them.
"""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from fusewire.custom_ops.providers.symm_mem.launch_config import LaunchConfig

from support.interpreted import main, run_cases

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SCALE, ROUND = "scale_then_round", "round_then_scale"
WIDE_SCALE, WIDE_ROUND = "wide_sum_scale_then_round", "wide_sum_round_then_scale"


# --- Scenarios ----------------------------------------------------------------------------------------------


def _flags(programs, lookahead, result_lag):
    return LaunchConfig(programs, 1, 32, lookahead=lookahead, result_lag=result_lag)


def _racing(protocol, count):
    kinds = ("two_shot", "two_shot_sharded", "two_shot_sharded")
    return [(kinds[i % 3], 2 + i % 2, {"protocol": protocol}) for i in range(count)]


SLICED = LaunchConfig(3, 1, 32, slices=3)
INNER = {"inner": (BF16, SCALE)}
WIDE = {"form": WIDE_ROUND}
SCENARIOS = {
    "one-shot, slices, 3 ranks": (3, 264, FP32, [
        ("one_shot", 2, {"config": SLICED, "bias": 1.0}),
        ("one_shot", 1, {"config": LaunchConfig(2, 1, 64, slices=2), **INNER}),
        ("one_shot", 4, {"config": LaunchConfig(2, 1, 64, slices=2), "residual": False, "weight": FP32}),
        ("one_shot", 3, {"config": SLICED, "inner": (None, ROUND), "form": ROUND}),
    ]),
    "one-shot, racing, 4 ranks": (4, 64, BF16, [
        ("one_shot", 1 + i % 2, INNER if i % 3 == 1 else {}) for i in range(6)
    ]),
    "two-shot, data, 3 ranks": (3, 72, FP16, [
        ("two_shot_sharded", 8, {"config": LaunchConfig(3, 1, 32, slices=2, unroll=2), "weight": None}),
        ("two_shot", 7, {"form": ROUND, "weight": FP16, "inner": (FP32, ROUND)}),
        ("two_shot", 1, {"residual": False, "weight": FP32}),
        ("two_shot_sharded", 4, {"config": LaunchConfig(3, 1, 32, slices=3, unroll=4), "inner": (FP16, ROUND)}),
    ]),
    # Each thread adds the slices' squares itself, or has their sum from each slice.
    "two-shot, data, slices, 3 ranks": (3, 264, FP32, [
        ("two_shot", 4, {"config": SLICED, "bias": 1.0}),
        ("two_shot", 5, {"config": LaunchConfig(3, 1, 32, slices=3, unroll=8), **INNER}),
        ("two_shot", 2, {"config": LaunchConfig(2, 1, 64, slices=2), "inner": (None, ROUND), "form": ROUND}),
        ("two_shot", 3, {"config": LaunchConfig(3, 1, 32, slices=3, unroll=8), "residual": False}),
        ("two_shot", 4, {}),
    ]),
    # With these orders a single slot would not do.
    **{f"two-shot, data, racing, 2 ranks, order {seed}": (2, 64, BF16, _racing("data", 12), seed) for seed in (4, 8)},
    "two-shot, flags, racing, 2 ranks": (2, 64, BF16, _racing("flags", 8)),
    "two-shot, flags, 3 ranks": (3, 72, FP32, [
        ("two_shot", 13, {"protocol": "flags", "config": _flags(2, 1, 0)}),
        ("two_shot_sharded", 14, {"output": 0, "config": _flags(1, 3, 2), "inner": (FP32, SCALE)}),
        ("two_shot", 15, {"output": 0, "config": _flags(2, 2, 1), "residual": False}),
        ("two_shot", 9, {"protocol": "flags", "config": _flags(3, 1, 0), **INNER}),
        ("two_shot_sharded", 2, {"protocol": "flags"}),
    ]),
    "all in turn, 2 ranks": (2, 64, BF16, [
        ("one_shot", 2, INNER), ("two_shot_sharded", 6, INNER), ("two_shot", 19, INNER), ("one_shot", 3, {}),
        ("two_shot", 3, {"need_residual": False}), ("one_shot", 8, {"weight": None, "inner": (None, SCALE)}),
    ]),
    # The norm of a sum that is not rounded: what a peer normalises must not be either.
    "wide sums, one-shot, 3 ranks": (3, 528, BF16, [
        ("one_shot", 2, {"config": SLICED, "form": WIDE_SCALE, "bias": 1.0}),
        ("one_shot", 1, {"config": LaunchConfig(2, 1, 64, slices=2), **INNER, **WIDE}),
        ("one_shot", 3, {"config": SLICED, "residual": False, **WIDE}),
        ("one_shot", 4, {"need_residual": False, "weight": FP32, "form": WIDE_SCALE}),
    ]),
    "wide sums, data, 3 ranks": (3, 528, FP16, [
        ("two_shot", 4, {"config": SLICED, "weight": FP16, **WIDE}),
        ("two_shot", 5, {"config": LaunchConfig(3, 1, 32, slices=3, unroll=8), **INNER, "form": WIDE_SCALE}),
        ("two_shot_sharded", 4, {"config": SLICED, "weight": FP16, **WIDE}),
        ("two_shot_sharded", 7, {"config": LaunchConfig(3, 1, 32, slices=3, unroll=8), "form": WIDE_SCALE}),
        ("two_shot_sharded", 2, {"config": LaunchConfig(3, 1, 32, slices=3), "inner": (FP16, ROUND), **WIDE}),
        ("two_shot", 3, {"residual": False, "weight": None, **WIDE}),
        ("two_shot", 5, {"need_residual": False, "weight": None, "form": WIDE_SCALE}),
    ]),
    "wide sums, flags, 3 ranks": (3, 72, BF16, [
        ("two_shot", 13, {"protocol": "flags", "config": _flags(2, 1, 0), **WIDE}),
        ("two_shot", 15, {"output": 0, "config": _flags(2, 2, 1), "form": WIDE_SCALE, "bias": 1.0}),
        ("two_shot", 9, {"output": 0, "config": _flags(3, 1, 0), **INNER, **WIDE}),
        ("two_shot_sharded", 14, {"output": 0, "config": _flags(1, 3, 2), **INNER, **WIDE}),
        ("two_shot", 8, {"protocol": "flags", "need_residual": False, "form": WIDE_SCALE}),
        ("two_shot_sharded", 2, {"protocol": "flags", **WIDE}),
    ]),
    # Planned by its own number, each of these ranks would share a row among another number of blocks.
    **{f"GPUs with {counts} multiprocessors": (len(counts), 1536, BF16, [
        ("two_shot", 2 * len(counts), {"protocol": "data"}), ("two_shot_sharded", len(counts), {"protocol": "data"}),
        ("one_shot", 2, INNER), ("two_shot", 5, {"protocol": "flags"}),
    ], 0, counts) for counts in ((3, 4), (4, 3), (2, 4, 3))},
}  # fmt: skip
PROTOCOLS = {
    "one-shot": ("one_shot", {}),
    "data, sharded": ("two_shot_sharded", {"protocol": "data"}),
    "data, full": ("two_shot", {"protocol": "data"}),
    "flags, sharded": ("two_shot_sharded", {"protocol": "flags"}),
    "flags, full": ("two_shot", {"protocol": "flags"}),
}
SCENARIOS |= {
    f"{name}: rank {gone} stops after {turns} turns": (
        3, 64, BF16, [(kind, 5, {**options, **norm}) for norm in (WIDE, INNER, {})], turns, 3, (gone, 1, turns),
    )
    for gone, turns in ((2, 0), (1, 12))
    for name, (kind, options) in PROTOCOLS.items()
}  # fmt: skip
# A rank is late by more than the time limit while the others replay CUDA graphs: they know of no
# error and go on.
SCENARIOS |= {
    f"{name}: rank {gone} is late after {turns} turns": (
        3, 64, BF16, [(kind, 4 + i % 2, {**options, **INNER} if i % 3 == 1 else options) for i in range(6)],
        turns, 3, None, (gone, 1, turns),
    )
    for gone, turns in ((1, 12),)  # many more turns in the nightly test
    for name, (kind, options) in PROTOCOLS.items()
}  # fmt: skip
# The process of a rank ends, and the time limit is far.
ENDED = {
    f"{name}: the process of rank 2 ends after {turns} turns": (
        (3, 64, BF16, [(kind, 5, {**options, **norm}) for norm in (WIDE, INNER, {})], turns), (2, 1, turns),
    )
    for turns in (0, 12)
    for name, (kind, options) in PROTOCOLS.items()
}  # fmt: skip
FLAGS = {"protocol": "flags"}
# What the flags show at once: other tokens, another operator, another place of the result.
DIFFERING = {
    f"flags: {name}": (3, 64, BF16, [("two_shot", 5, FLAGS)], ("two_shot", 13, FLAGS), other)
    for name, other in {
        "other tokens": ("two_shot", 14, FLAGS),
        "a sharded residual": ("two_shot_sharded", 13, FLAGS),
        "an inner norm": ("two_shot", 13, {**FLAGS, **INNER}),
        "no residual": ("two_shot", 13, {**FLAGS, "residual": False}),
        "in place": ("two_shot", 13, {"output": 0}),
    }.items()
}


# Where data is its own flag, other calls are noticed by the clock, on every rank.
DIFFERING |= {
    f"{name}, {other[0]}": (2, 64, BF16, [one], one, other)
    for name, one, other in (
        ("data, full", ("two_shot", 5, {}), ("two_shot_sharded", 5, {})),
        ("data, full", ("two_shot", 5, {}), ("two_shot", 5, INNER)),
        ("data, sharded with two norms", ("two_shot_sharded", 4, INNER), ("two_shot_sharded", 4, {})),
        ("data, sharded", ("two_shot_sharded", 4, {}), ("two_shot", 4, INNER)),
        ("one-shot with two norms", ("one_shot", 3, INNER), ("one_shot", 3, {})),
    )
} | {
    f"{name}: {one} and {other} tokens": (
        world, 64, BF16, [(kind, 5, options)], (kind, one, options), (kind, other, options)
    )
    for name, (kind, options) in PROTOCOLS.items()
    if options.get("protocol") != "flags"
    for world, one, other in ((2, 3, 4), (2, 5, 2), (3, 4, 7), (3, 8, 7))
}  # fmt: skip


PARTS = 16  # of the nightly test, each a few minutes long


def every_scenario():
    """Every count of tokens with every kind of norm, protocol, dtype and number of ranks, in several orders."""
    found = {}
    norms = [
        {}, {"residual": False}, {"weight": None}, {"form": ROUND, "bias": 1.0}, {"weight": FP32}, INNER,
        {"inner": (None, SCALE)}, {"inner": (FP32, ROUND), "form": ROUND}, {"inner": (FP16, ROUND), "bias": 1.0},
        WIDE, {"form": WIDE_SCALE, "weight": FP32, "bias": 1.0}, {"inner": (FP32, ROUND), **WIDE},
    ]  # fmt: skip
    for world in (2, 3, 4):
        for dtype, hidden in ((BF16, 64), (FP16, 184), (FP32, 256)):
            for seed, (name, (kind, options)) in enumerate(PROTOCOLS.items()):
                order = random.Random(f"{world} {dtype} {name}")
                specs = [(kind, tokens, {**options, **norm}) for tokens in range(1, 10) for norm in norms]
                order.shuffle(specs)
                if options.get("protocol") != "flags":
                    configs = [
                        None,
                        None,
                        SLICED,
                        LaunchConfig(3, 1, 32, slices=3, unroll=1 if kind == "one_shot" else 8),
                    ]
                    specs = [(k, n, {**o, "config": order.choice(configs)}) for k, n, o in specs]
                for part in range(3):
                    key = f"{name}, {world} ranks, {str(dtype)[6:]}, part {part + 1}"
                    found[key] = (world, hidden, dtype, specs[part::3], seed + 10 * part)
    for name, scenario in list(SCENARIOS.items()):
        if len(scenario) < 7:  # all ranks take part
            for seed in range(10, 30):
                found[f"{name}, seed {seed}"] = (*scenario[:4], seed, *scenario[5:])
        else:
            for turns in (*range(1, 40, 3), *range(40, 200, 20)):
                gone, last, _ = scenario[-1]
                found[f"{name}, {turns}"] = (*scenario[:4], turns, 3, *scenario[6:-1], (gone, last, turns))
    return found


@pytest.fixture(scope="module")
def results():
    return run_cases(__file__, [*SCENARIOS, *DIFFERING, *ENDED])


@pytest.mark.parametrize("name", [*SCENARIOS, *DIFFERING, *ENDED])
def test_ranks_agree_with_the_definition(name, results):
    assert not results[name], results[name]


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(PARTS))
def test_ranks_agree_with_the_definition_in_every_case(part):
    failed = {name: text for name, text in run_cases(__file__, list(every_scenario())[part::PARTS]).items() if text}
    assert not failed, f"{len(failed)} scenarios failed: {dict(list(failed.items())[:2])}"


def run_case(name):
    from support.simulator import simulate, simulate_differing

    if name in DIFFERING:
        simulate_differing(*DIFFERING[name])
    elif name in ENDED:
        simulate(*ENDED[name][0], missing=ENDED[name][1], ended=True)
    else:
        simulate(*{**every_scenario(), **SCENARIOS}[name])


if __name__ == "__main__":
    main(run_case)
