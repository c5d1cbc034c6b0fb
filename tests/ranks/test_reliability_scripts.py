"""Short forms on gloo of the scripts that check faults and many calls on GPUs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

GPU = Path(__file__).resolve().parents[1] / "gpu"


def run(script, *arguments):
    command = [sys.executable, str(GPU / script), "--cpu", *arguments]
    found = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


CASES = ["kill-in", "skip", "path", "no-memory", "no-compile"]


@pytest.fixture(scope="module")
def faults():
    return run("fault_check.py", *(argument for case in CASES for argument in ("--case", case)))


@pytest.mark.parametrize("case", CASES)
def test_faults_end_in_an_error(case, faults):
    assert f"pass {case}" in faults
    assert f"{len(CASES)} passed, 0 failed, 0 left out" in faults


def test_many_calls_with_fresh_payloads():
    text = run("soak_check.py", "--calls", "600", "--limit", "120")
    assert text.count('"ok": true') == 8  # each of 3 shapes and the whole, on 2 ranks
