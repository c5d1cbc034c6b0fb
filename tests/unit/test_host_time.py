"""The benchmark of host time (examples/benchmarks/host_time.py), tried without GPUs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "benchmarks" / "host_time.py"


def host_time(*arguments, **environment):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def test_every_line_has_a_time_or_a_reason():
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    done = host_time("--cpu", "--calls", "4", "--hidden", "64", **rank, MASTER_PORT="0")
    assert done.returncode == 0, done.stderr
    head, *lines = done.stdout.splitlines()
    assert head.startswith("1 x CPU ranks, torch ")
    times = [line for line in lines if re.search(r" +\d+\.\d us$", line)]
    reasons = [line for line in lines if "no provider of fusewire::all_reduce_rms_norm can serve" in line]
    assert [line.partition(":")[0] for line in reasons] == [
        f"all_reduce_rms_norm, {p}" for p in ("symm_mem", "flashinfer")
    ]
    assert len(times) == len(lines) - 2 == 7


def test_it_says_how_it_wants_to_be_started():
    for arguments, said in ((("--cpu",), "torchrun"), (("--cpu", "--hidden", "12"), "multiple of 8")):
        done = host_time(*arguments, **({"RANK": "0"} if "--hidden" in arguments else {}))
        assert done.returncode == 2
        assert said in done.stderr
