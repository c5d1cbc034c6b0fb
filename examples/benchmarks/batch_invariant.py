"""Time the batch-invariant `symm_mem` kernels against the others, on one GPU.

    python examples/benchmarks/batch_invariant.py
    python examples/benchmarks/batch_invariant.py --world 4 --hidden 8192 --tokens 1 64 512

All ranks are in this process, each on a stream and a share of the multiprocessors, as in
tests/gpu/one_gpu_check.py; the links are the GPU's own memory. So the times are not those of ranks
on GPUs of their own, but both kernels are timed alike: by turns, each as the replay of a CUDA graph
with many calls. Prints medians in microseconds per call, and the ratio batch-invariant / plain.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

import torch
from gpu import one_gpu_check as ranks_of_one_gpu

from fusewire.custom_ops.ops.norms import SCALE_THEN_ROUND, NormSpec
from fusewire.custom_ops.ops.sharded_norm import own_rows
from fusewire.custom_ops.providers.symm_mem import launcher
from fusewire.custom_ops.providers.symm_mem.prepared_launch import PreparedCall

CALLS, ROUNDS = 20, 25
PLACES = {
    "one_shot": (1, 16, 64),
    "two_shot": (1, 16, 64, 256, 257, 512, 1024, 2048),
    "two_shot_sharded": (64, 256, 512, 2048),
}


def graph_of(ranks: Sequence[Any], kind: str, tokens: int, batch_invariant: bool) -> tuple[Any, Any]:
    """Return a CUDA graph of CALLS calls on all ranks, once they have run, and its inputs.

    The inputs must be kept as long as the graph, which reads them.
    """
    hidden, dtype = ranks[0][0].hidden, ranks[0][0].dtype
    make = functools.partial(getattr(launcher, f"{kind}_launch"), batch_invariant=batch_invariant)
    calls = [PreparedCall(ws, make) for ws, _ in ranks]
    device, world = ranks_of_one_gpu.DEVICE, len(ranks)
    xs = [torch.randn(tokens, hidden, device=device).to(dtype) for _ in ranks]
    full = torch.randn(tokens, hidden, device=device).to(dtype)
    weight = torch.randn(hidden, device=device).to(dtype)
    residuals = [own_rows(full, rank, world) if kind == "two_shot_sharded" else full for rank in range(world)]

    def run() -> None:
        current = torch.cuda.current_stream()
        for (_, stream), call, x, residual in zip(ranks, calls, xs, residuals, strict=True):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                call(x, residual, NormSpec(weight, 1e-5, 0.0, SCALE_THEN_ROUND))
        for _, stream in ranks:
            current.wait_stream(stream)

    with launcher.compiling_only():
        run()
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(CALLS):
            run()
    return graph, (xs, full, weight, residuals)


def times(graphs: Sequence[Any]) -> list[float]:
    """Return the median microseconds per call of each graph, replayed by turns."""
    found: list[list[float]] = [[] for _ in graphs]
    for _ in range(ROUNDS):
        for graph, each in zip(graphs, found, strict=True):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            each.append(start.elapsed_time(end) * 1e3 / CALLS)
    return [statistics.median(each[3:]) for each in found]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--hidden", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--tokens", type=int, nargs="+", help="default: some for each kernel")
    options = parser.parse_args()
    torch.cuda.set_device(ranks_of_one_gpu.DEVICE)
    print(f"{torch.cuda.get_device_name()}, bf16, all ranks on it; us per call, medians of {ROUNDS - 3} replays")
    print("ranks | hidden | kernel | tokens | plain | batch-invariant | ratio")
    ratios = []
    for world in options.world:
        for hidden in options.hidden:
            ranks = ranks_of_one_gpu.make_ranks(world, hidden, torch.bfloat16)
            for kind, counts in PLACES.items():
                for tokens in options.tokens or counts:
                    if kind == "one_shot" and tokens > ranks_of_one_gpu.ONE_SHOT_TOKENS:
                        continue
                    graphs = [graph_of(ranks, kind, tokens, invariant) for invariant in (False, True)]
                    plain, invariant = times([graph for graph, _ in graphs])
                    ranks[0][0].check(synchronize=True)
                    ratios.append(invariant / plain)
                    row = (world, hidden, kind, tokens, f"{plain:.2f}", f"{invariant:.2f}", f"{ratios[-1]:.3f}")
                    print(*row, sep=" | ", flush=True)
    print(f"ratio: geometric mean {statistics.geometric_mean(ratios):.3f}, largest {max(ratios):.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
