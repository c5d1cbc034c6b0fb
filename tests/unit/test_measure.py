"""In which order candidates are measured, and which are not measured at all."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from fusewire.custom_ops.tuning import measure, tuner

from support.distributed import fake_group
from support.tables import BF16, HIDDEN


@pytest.mark.parametrize("most", [1, 2, 3, 8, 8192])
def test_coarse_first_keeps_every_size_and_the_largest_early(most):
    grid = tuner.token_grid(most)
    order = measure.coarse_first(grid)
    assert sorted(order) == list(grid)
    assert most in order[: (len(grid) + 1) // 2]


def run_of(times, rejected=()):
    with fake_group(2) as group, mock.patch.object(measure, "Channel"):
        made = measure.Measurement(group, HIDDEN, BF16, torch.device("cpu"), (1, 2, 4), 1.0, times, dict(rejected))
    return lambda label, tokens: made._is_due(
        measure.TimedCall(label, min, range(1, 100), True, label.partition("/")[0]), tokens
    )


def test_far_behind_is_not_tried_at_the_next_size():
    due = run_of({"native": {1: 10.0, 4: 10.0}, "slow": {1: 41.0, 16: 5.0}, "near": {1: 39.0}, "new": {}}, {"bad": ""})
    assert not due("slow", 2)
    assert due("near", 2)
    assert due("native", 2)
    assert due("new", 2)
    assert due("slow", 8)  # it was not tried at 4, so now it is
    assert due("slow", 1)
    assert not due("bad", 8)
    assert not due("native", 100)
