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
from collections.abc import Callable, Mapping, Sequence
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


def compare(
    description: str | None,
    places: Mapping[str, Sequence[int]],
    names: tuple[str, str],
    worlds: Sequence[int],
    hidden_sizes: Sequence[int],
    graphs_of: Callable[[Sequence[Any], str, int], Sequence[tuple[Any, Any]]],
) -> int:
    """Time two graphs for each place of the command line, print a table and the ratios.

    Args:
        places: numbers of tokens, by kernel.
        names: of the two columns; the ratio is the second divided by the first.
        worlds, hidden_sizes: the default ones.
        graphs_of: returns the two results of `graph_of` for ranks, a kernel and a number of tokens.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, nargs="+", default=worlds)
    parser.add_argument("--hidden", type=int, nargs="+", default=hidden_sizes)
    parser.add_argument("--tokens", type=int, nargs="+", help="default: some for each kernel")
    options = parser.parse_args()
    torch.cuda.set_device(ranks_of_one_gpu.DEVICE)
    print(f"{torch.cuda.get_device_name()}, bf16, all ranks on it; us per call, medians of {ROUNDS - 3} replays")
    print(" | ".join(("ranks | hidden | kernel | tokens", *names, "ratio")))
    ratios = []
    for world in options.world:
        for hidden in options.hidden:
            ranks = ranks_of_one_gpu.make_ranks(world, hidden, torch.bfloat16)
            for kind, counts in places.items():
                for tokens in options.tokens or counts:
                    if kind == "one_shot" and tokens > ranks_of_one_gpu.ONE_SHOT_TOKENS:
                        continue
                    graphs = graphs_of(ranks, kind, tokens)
                    first, second = times([graph for graph, _ in graphs])
                    ranks[0][0].check(synchronize=True)
                    ratios.append(second / first)
                    row = (world, hidden, kind, tokens, f"{first:.2f}", f"{second:.2f}", f"{ratios[-1]:.3f}")
                    print(*row, sep=" | ", flush=True)
    print(f"ratio: geometric mean {statistics.geometric_mean(ratios):.3f}, largest {max(ratios):.3f}")
    return 0


def main() -> int:
    def graphs_of(ranks: Sequence[Any], kind: str, tokens: int) -> list[tuple[Any, Any]]:
        return [graph_of(ranks, kind, tokens, invariant) for invariant in (False, True)]

    return compare(__doc__, PLACES, ("plain", "batch-invariant"), [2, 4], [4096, 8192], graphs_of)


if __name__ == "__main__":
    sys.exit(main())
