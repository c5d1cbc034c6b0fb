"""Time what the in-band checks of the `symm_mem` kernels cost, on one GPU.

    python examples/benchmarks/check_cost.py
    python examples/benchmarks/check_cost.py --world 4 --hidden 8192 --tokens 1 64 512

The checks are: every kernel reads the error word when it starts, and a flag has the call's tokens
and options beside its number. The kernels are timed against copies of themselves without both. All
ranks are in this process, as in batch_invariant.py, whose way of timing this is. Prints medians in
microseconds per call, and the ratio with / without.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from batch_invariant import ROUNDS, graph_of, ranks_of_one_gpu, times

from fusewire.custom_ops.providers.symm_mem import kernels, launcher

PLACES = {"one_shot": (1, 4, 16, 64), "two_shot": (64, 256, 512, 1024, 2048)}
COPY = "kernels_without_checks"
TAKEN_OUT = {  # file, and a line of it with what replaces it
    "counters.py": ("return read_counter(ctl + 8 * CTL_ERROR) != 0", "return ctl == 0"),
    "packets.py": ("return (alike << FLAG_CALL_BITS) | (call & ((1 << FLAG_CALL_BITS) - 1))", "return call"),
}


def copy_without_checks(folder: Path) -> None:
    """Write the kernels' package without the checks into a folder, and let Python find it there."""
    (folder / COPY).mkdir()
    for path in Path(kernels.__file__).parent.glob("*.py"):
        text = path.read_text().replace(kernels.__name__, COPY)
        if path.name in TAKEN_OUT:
            line, other = TAKEN_OUT[path.name]
            if text.count(line) != 1:
                raise RuntimeError(f"{path.name} has {text.count(line)} lines {line!r}, not one: repair this script")
            text = text.replace(line, other)
        (folder / COPY / path.name).write_text(text)
    sys.path.insert(0, str(folder))


def kernel_without_checks(name: str) -> Any:
    return getattr(importlib.import_module(f"{COPY}.{name.removesuffix('_kernel')}"), name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, nargs="+", default=[2])
    parser.add_argument("--hidden", type=int, nargs="+", default=[4096])
    parser.add_argument("--tokens", type=int, nargs="+", help="default: some for each kernel")
    options = parser.parse_args()
    torch.cuda.set_device(ranks_of_one_gpu.DEVICE)
    print(f"{torch.cuda.get_device_name()}, bf16, all ranks on it; us per call, medians of {ROUNDS - 3} replays")
    print("ranks | hidden | kernel | tokens | without checks | with | ratio")
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        copy_without_checks(Path(folder))
        for world in options.world:
            for hidden in options.hidden:
                ranks = ranks_of_one_gpu.make_ranks(world, hidden, torch.bfloat16)
                for kind, counts in PLACES.items():
                    for tokens in options.tokens or counts:
                        if kind == "one_shot" and tokens > ranks_of_one_gpu.ONE_SHOT_TOKENS:
                            continue
                        with mock.patch.object(launcher, "kernel", kernel_without_checks):
                            plain = graph_of(ranks, kind, tokens, False)
                        checked = graph_of(ranks, kind, tokens, False)
                        before, after = times([plain[0], checked[0]])
                        ranks[0][0].check(synchronize=True)
                        ratios.append(after / before)
                        row = (world, hidden, kind, tokens, f"{before:.2f}", f"{after:.2f}", f"{ratios[-1]:.3f}")
                        print(*row, sep=" | ", flush=True)
    print(f"ratio: geometric mean {statistics.geometric_mean(ratios):.3f}, largest {max(ratios):.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
