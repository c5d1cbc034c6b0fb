"""Run named cases in a process in which Triton interprets kernels (TRITON_INTERPRET=1)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback

import pytest


def run_cases(script, names, timeout_s=590):
    """Return what failed, by name ("" if nothing), from a process that runs `script`, which ends in
    `main`.
    """
    from triton.runtime import interpreter

    if not all(hasattr(interpreter, n) for n in ("GridExecutor", "_patch_lang", "_implicit_cvt")):
        pytest.skip("this Triton's interpreter is not the one that this simulation knows")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    run = subprocess.run(
        [sys.executable, script], input=json.dumps(list(names)), env=environment, capture_output=True, text=True,
        timeout=timeout_s, check=False,
    )  # fmt: skip
    results = dict(json.loads(line) for line in run.stdout.splitlines() if line.startswith("["))
    missing = run.stdout[-2000:] + run.stderr[-4000:]
    return {name: results.get(name, f"the process ended with {run.returncode}: {missing}") for name in names}


def main(run_case):
    """Call run_case(name) for each name from stdin and print what failed; an exception is a
    failure.
    """
    import numpy as np
    import torch

    torch.set_num_threads(1)
    np.seterr(all="ignore")
    for name in json.load(sys.stdin):
        start = time.process_time()
        try:
            run_case(name)
            text = ""
        except (Exception, pytest.fail.Exception):
            text = traceback.format_exc()[-3000:]
        print(json.dumps([name, text]), flush=True)
        print(f"{time.process_time() - start:.2f} s {name}", file=sys.stderr, flush=True)
