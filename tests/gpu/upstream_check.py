"""The cases of FlashInfer's tests of its fused all-reduce, served by fusewire's providers on GPUs.

    PYTHONPATH=tests torchrun --nproc-per-node 2 tests/gpu/upstream_check.py   # or 4

One line for each provider and test; exits with 1 if one failed. tests/support/upstream.py has the
cases and FlashInfer's tolerances. Residual and weight are equal on all ranks, as kernels need.
"""

from __future__ import annotations

import faulthandler
import sys

import torch
import torch.distributed as dist
from harness import join, say

import fusewire
import fusewire.errors

from support import upstream


def main() -> int:
    faulthandler.dump_traceback_later(540, exit=True)  # never hang: say where, and end
    join(120)
    failed = 0
    for policy in ("symm_mem", "flashinfer"):
        place = upstream.Place("cuda", policy, own=False)
        cases = {
            "gemma": lambda place=place: upstream.gemma(place),
            "dynamic FP8": lambda place=place: list(upstream.dynamic_fp8(place)),
            "groups, bf16": lambda place=place: upstream.group_fp8(place, torch.bfloat16),
            "groups, fp16": lambda place=place: upstream.group_fp8(place, torch.float16),
        }
        for name, case in cases.items():
            try:
                outcome: object = case()
            except fusewire.errors.NoProviderError as error:
                outcome = f"SKIP {error}"
            except AssertionError as error:
                outcome = f"FAIL {error}"
            wrong = torch.tensor(int(isinstance(outcome, str) and outcome.startswith("FAIL")), device="cuda")
            dist.all_reduce(wrong)
            failed += int(wrong) > 0
            if dist.get_rank() == 0 or str(outcome).startswith("FAIL"):
                say(rank=dist.get_rank(), policy=policy, case=name, wrong_ranks=int(wrong), outcome=outcome)
    if dist.get_rank() == 0:
        for info in fusewire.workspaces():
            print(info)
        say(gpus=dist.get_world_size(), failed=failed, torch=torch.__version__, fusewire=fusewire.__version__)
    fusewire.close()
    dist.destroy_process_group()
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
