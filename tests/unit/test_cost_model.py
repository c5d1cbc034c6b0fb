"""Costs by size: the shipped tables, the formula fitted to them, and the choices at sizes that were
not measured.
"""

from __future__ import annotations

import ast
import itertools
from pathlib import Path

import pytest
import torch

from fusewire.custom_ops.dispatch import cost_formula, cost_model, cost_tables
from fusewire.custom_ops.dispatch.cost_formula import CostFormula, data_tokens
from fusewire.custom_ops.dispatch.cost_parameters import PARAMETERS
from fusewire.custom_ops.dispatch.cost_tables import NATIVE, ONE_SHOT, SYMM_ONE_SHOT, SYMM_TWO_SHOT, TWO_SHOT
from fusewire.custom_ops.dispatch.table_store import Table, TableKey

from support import costs

BF16 = torch.bfloat16
H200 = "NVIDIA H200"
MEASURED = cost_model.find_cost_model(H200, 4, 8192, BF16)


def test_tables_are_sorted_and_costs_grow():
    for table in cost_tables.TABLES:
        for points in table.times.values():
            assert list(points) == sorted(points)
            assert len({size for size, _ in points}) == len(points)


@pytest.mark.parametrize(
    ("gpu", "ranks", "hidden", "said"),
    [
        (H200, 4, 8192, "measured on 4 H200s"),
        (H200, 4, 6144, "by a formula fitted to measurements of 2, 4, 8 x NVIDIA H200"),
        (H200, 3, 8192, "by a formula fitted to measurements of 2, 4, 8 x NVIDIA H200"),
        ("NVIDIA H100 80GB HBM3", 4, 8192, "taken for NVIDIA H100 80GB HBM3"),
        ("NVIDIA H100 80GB HBM3", 7, 8192, "taken for NVIDIA H100 80GB HBM3"),
        ("NVIDIA B200", 8, 8192, "nothing was measured on 8 x NVIDIA B200"),
        (H200, 16, 8192, "nothing was measured on 16 x NVIDIA H200"),
    ],
)
def test_costs_say_where_they_come_from(gpu, ranks, hidden, said):
    assert said in cost_model.find_cost_model(gpu, ranks, hidden, BF16).source


def test_a_table_serves_other_dtypes_with_as_many_bytes():
    half = cost_model.find_cost_model(H200, 4, 8192, torch.float16)
    wide = cost_model.find_cost_model(H200, 4, 4096, torch.float32)
    assert "at as many bytes of bfloat16" in half.source
    assert half.cost(NATIVE, 32) == wide.cost(NATIVE, 32) == MEASURED.cost(NATIVE, 32)


# --- Between measured numbers of tokens -----------------------------------------------------------


@pytest.mark.parametrize("table", cost_tables.TABLES, ids=lambda table: f"{table.world_size}x{table.hidden}")
def test_measured_costs_are_returned_as_they_are(table):
    costs_here = cost_model.find_cost_model(H200, table.world_size, table.hidden, table.dtype)
    for label, points in table.times.items():
        assert [costs_here.cost(label, tokens) for tokens, _ in points] == [us for _, us in points]


def test_between_measurements_the_ratio_to_the_formula_lies_on_a_line():
    at, formula = dict(MEASURED.times[NATIVE]), CostFormula(16384, 4)
    ratio = {tokens: MEASURED.cost(NATIVE, tokens) / formula.cost(NATIVE, tokens) for tokens in (64, 96, 128)}
    assert ratio[96] == pytest.approx((ratio[64] + ratio[128]) / 2)
    beyond = [MEASURED.cost(NATIVE, tokens) / formula.cost(NATIVE, tokens) for tokens in (8192, 9000, 50000)]
    assert beyond[1:] == pytest.approx(beyond[:1] * 2)
    assert 0 < MEASURED.cost(NATIVE, 0) < at[1]
    assert MEASURED.cost("nobody", 1) is None


def test_on_other_gpus_tuned_times_lie_on_lines():
    tuned = cost_model.CostModel("tuned", {NATIVE: ((4, 10.0), (8, 30.0))}, only_measured=True)
    assert [tuned.cost(NATIVE, tokens) for tokens in (0, 1, 4, 6, 8, 16)] == [10.0, 10.0, 10.0, 20.0, 30.0, 60.0]


def test_the_step_between_two_protocols_is_not_smoothed():
    """The table has 512 tokens (data as flag) and 1024 (flags): 513 tokens cost as the latter."""
    costs_here = cost_model.find_cost_model(H200, 2, 4096, BF16)
    last, first = costs_here.cost(SYMM_TWO_SHOT, data_tokens(2)), costs_here.cost(SYMM_TWO_SHOT, data_tokens(2) + 1)
    assert last == 16.5
    assert first > 1.2 * last


def test_a_tuned_table_has_no_cost_for_what_the_tuner_left_out():
    key = TableKey("cuda", H200, "", "", 4, 8192, "bfloat16", {})
    tuned = Table(key, {NATIVE: ((1, 10.0), (64, 90.0))}, "today").cost_model()
    assert MEASURED.cost(TWO_SHOT, 64) is not None
    assert tuned.cost(TWO_SHOT, 64) is None
    assert tuned.cost(NATIVE, 64) == 90.0
    assert tuned.formula == CostFormula(16384, 4)
    assert Table(TableKey(**{**vars(key), "gpu": "NVIDIA B200"}), tuned.times).cost_model().formula is None


# --- The formula ----------------------------------------------------------------------------------


def test_the_parameters_are_those_of_the_shipped_tables():
    """`python -m tests.support.costs --write custom_ops/dispatch/cost_parameters.py` after a change
    of either.
    """
    fitted = costs.fit()
    assert fitted.keys() == PARAMETERS.keys()
    for variant, protocols in fitted.items():
        for found, kept in zip(protocols, PARAMETERS[variant], strict=True):
            assert found == pytest.approx(dict(kept), rel=1e-3)
    assert Path(cost_formula.__file__).with_name("cost_parameters.py").read_text() == costs.as_source(PARAMETERS)


def test_the_formula_rounds_alike_on_every_machine():
    """IEEE 754 fixes the bits of + - * / and the square root; not those of logarithms and powers."""
    for module in (cost_formula, cost_model):
        nodes = list(ast.walk(ast.parse(Path(module.__file__).read_text())))
        assert not any(isinstance(node, ast.Pow) for node in nodes)
        named = [n for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)]
        assert {node.attr for node in named if node.value.id == "math"} <= {"sqrt"}


def test_costs_between_two_world_sizes_are_like_theirs():
    known = {ranks: cost_model.find_cost_model(H200, ranks, 8192, BF16) for ranks in range(2, 9)}
    for tokens, variant in itertools.product((1, 100, 4096, 20000), (SYMM_ONE_SHOT, SYMM_TWO_SHOT, NATIVE)):
        at = {ranks: costs_here.cost(variant, tokens) for ranks, costs_here in known.items()}
        for below, above in ((2, 4), (4, 8)):
            low, high = sorted((at[below], at[above]))
            assert all(0.8 * low < at[ranks] < 1.25 * high for ranks in range(below + 1, above))


def test_the_formula_predicts_sizes_measured_besides_the_tables():
    """docs/benchmarks.md: 4 GPUs at 5120, and 777 tokens of 1536 on 2 GPUs, far from all tables."""
    us = CostFormula(2 * 5120, 4)
    for tokens, native, two_shot in (
        (1024, 86.5, 58.7),
        (2048, 137.7, 101.5),
        (4096, 253.5, 190.6),
        (8192, 478.5, 372.1),
    ):
        assert us.cost(NATIVE, tokens) == pytest.approx(native, rel=0.07)
        assert us.cost(SYMM_TWO_SHOT, tokens) == pytest.approx(two_shot, rel=0.06)
    small = cost_model.find_cost_model(H200, 2, 1536, BF16)
    assert small.cost(SYMM_TWO_SHOT, 777) == pytest.approx(19.5, rel=0.05)
    assert small.cost(ONE_SHOT, 777) == pytest.approx(15.9, rel=0.09)
    assert small.cost(ONE_SHOT, 777) < small.cost(SYMM_TWO_SHOT, 777)


@pytest.mark.parametrize("hidden", [1536, 3072, 6144, 12288])
def test_the_kernels_lead_where_they_were_found_to(hidden):
    """On 2 GPUs `symm_mem` was measured at most 0.99 of every peer there, but for 777 tokens of
    1536.
    """
    us = CostFormula(2 * hidden, 2)
    for tokens in (7, 77, *((777,) if hidden > 1536 else ()), 3333):
        own = us.cost(SYMM_ONE_SHOT if tokens <= 128 else SYMM_TWO_SHOT, tokens)
        assert own < min(us.cost(peer, tokens) for peer in (ONE_SHOT, TWO_SHOT, NATIVE))


# --- Points that are left out of the fit ----------------------------------------------------------


@pytest.mark.parametrize("leave_out", [costs.without_hidden_size, costs.without_tokens])
def test_choices_at_points_left_out_of_the_fit(leave_out):
    """Where one-shot takes 4.4 us by the table and two-shot 4.1, both are scaled from earlier times
    that were equal.
    """
    found = list(costs.choices(leave_out))
    assert len(found) == 252
    beyond = {choice[2:]: choice.ratio for choice in found if choice.ratio > 1.05}
    scaled = (4, 8192, 4, SYMM_ONE_SHOT, SYMM_TWO_SHOT)
    assert beyond.keys() <= {scaled}, costs.distribution(found)
    assert all(ratio < 1.08 for ratio in beyond.values())
