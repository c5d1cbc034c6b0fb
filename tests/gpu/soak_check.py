"""Many fused calls with fresh payloads, each result compared bit for bit; and memory that stays
flat.

    python tests/gpu/soak_check.py                         # 2 GPUs, two minutes
    python tests/gpu/soak_check.py --calls 10000000 --limit 900
    python tests/gpu/soak_check.py --one-gpu               # both ranks as streams of one GPU
    python tests/gpu/soak_check.py --tokens 600,1500       # these shapes only, which use flags
    python tests/gpu/soak_check.py --cpu --calls 600       # gloo, without GPUs

A CUDA graph holds CALLS calls, one after another, each with a payload of its own. A replay takes
the next payloads, so no two calls in a row are alike. The payloads are multiples of 1/8, whose sums
are exact in every
dtype: every number of every sum is compared with the exact one inside the graph, every norm with
the norm of that sum. Prints a line per shape as it goes. Exits with 1 if a number was wrong, a call
failed, or GPU memory grew by more than 2 MiB.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
import torch.distributed as dist
from harness import all_reduce_norm, eighths, held, run_ranks, say

import fusewire
from fusewire.custom_ops.ops.norms import NormSpec, normalize

CALLS, PAYLOADS, ROUND = 100, 256, 20  # of a graph; in the pool; replays between two reports
SHAPES = [  # tokens, hidden: one-shot, data as flag, flags
    (1, 1024), (4, 4096), (16, 8192), (64, 4096), (200, 1536), (600, 4096), (1500, 4096),
]  # fmt: skip
CPU_SHAPES = [(1, 256), (4, 512), (16, 768)]
MEMORY_BYTES, RESIDENT_BYTES = 2 << 20, 64 << 20  # of GPUs; of the process, where malloc keeps what is freed


class Pattern:
    """A pool of payloads, their sums over the ranks, and the norms of these."""

    def __init__(self, tokens, hidden, size, dtype, device):
        def pool(rank):
            return torch.stack([eighths(tokens, hidden, 5 * i + rank, dtype, device) for i in range(PAYLOADS)])

        self.parts = [pool(rank) for rank in range(size)]
        self.sums = sum(part.float() for part in self.parts).to(dtype)
        self.weight = eighths(1, hidden, 1, dtype, device)[0] + 1
        self.norm = NormSpec(self.weight, 1e-6, 0.0, "scale_then_round")
        self.norms = torch.stack([normalize(each, self.norm) for each in self.sums])
        self.slack = 4 * torch.finfo(dtype).eps

    def wrong(self, index, results):
        """Return how many numbers of calls with the payloads `index` are wrong (a tensor)."""
        norms, sums = (torch.stack(each) for each in zip(*results, strict=True))
        want, exact = self.norms[index].float(), self.sums[index]
        far = ~((norms.float() - want).abs() <= want.abs() * self.slack + 1e-6)  # NaN is far
        return (sums != exact).sum() + far.sum()


def steps(pattern, rank, call, device):
    """Return a function that makes CALLS calls with the next payloads, and the count of wrong
    numbers."""
    at, wrong = torch.zeros((), dtype=torch.int64, device=device), torch.zeros((), dtype=torch.int64, device=device)
    order = torch.arange(CALLS, device=device) * 7

    def step():
        index = (order + at) % PAYLOADS
        xs = pattern.parts[rank][index]
        wrong.add_(pattern.wrong(index, [call(x) for x in xs]))
        at.add_(11)

    return step, wrong


def captured(step):
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph.replay


def budgets(arguments):
    """Yield each shape with its part of the calls and of the time."""
    shapes = CPU_SHAPES if arguments.cpu else SHAPES
    if arguments.tokens:
        chosen = [int(each) for each in arguments.tokens.split(",")]
        shapes = [shape for shape in shapes if shape[0] in chosen]
    for tokens, hidden in shapes:
        yield tokens, hidden, arguments.calls // len(shapes), (arguments.limit - 20) / len(shapes)


def soak(rank, step, wrong, calls, seconds, label, agree, synchronize):
    """Run steps until the calls are made or the time is up; return (calls made, wrong numbers)."""
    for _ in range(3):
        step()
    before, start, made = held(), time.monotonic(), 0
    while made < calls:
        for _ in range(ROUND if synchronize else 1):
            step()
            made += CALLS
        if synchronize:
            torch.cuda.synchronize()
        fusewire.check()
        if agree(time.monotonic() - start > seconds):
            break
    after, found = held(), int(wrong)
    grown = {name: after[name] - before[name] for name in after}
    flat = grown["gpu"] <= MEMORY_BYTES and grown["files"] <= 0 and grown["resident"] <= RESIDENT_BYTES
    fields = {
        "rank": rank,
        "calls": made,
        "wrong": found,
        "us_per_call": round((time.monotonic() - start) / made * 1e6, 1),
    }
    say(shape=label, **fields, grown=grown, ok=flat and not found)
    if found or not flat:
        raise RuntimeError(f"{label}: {found} wrong numbers, memory grew by {grown}")
    return made


def any_rank(flag):
    """Whether it holds on any rank: all stop together."""
    found = torch.tensor([flag], dtype=torch.int32)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found)


def job(rank, arguments):
    gpu, made = not arguments.cpu, 0
    torch.set_num_threads(1)
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    policy = "symm_mem" if gpu else "native"
    for tokens, hidden, calls, seconds in budgets(arguments):
        pattern = Pattern(tokens, hidden, dist.get_world_size(), dtype, device)

        def call(x, pattern=pattern):
            return all_reduce_norm(x, None, pattern.weight, policy)

        step, wrong = steps(pattern, rank, call, device)
        run = captured(step) if gpu else step
        made += soak(rank, run, wrong, calls, seconds, [tokens, hidden], any_rank, gpu)
        del run, step
        if gpu:
            torch.cuda.synchronize()
            dist.barrier()
            fusewire.close(captured=True)
    say(rank=rank, calls=made, asked=arguments.calls, wrong=0, ok=True)


def one_gpu(arguments):
    """Both ranks as streams of one GPU, in this process and in one graph."""
    from one_gpu_check import DATA_TOKENS, DEVICE, MAX_TOKENS, ONE_SHOT_TOKENS, make_ranks

    from fusewire.custom_ops.providers.symm_mem import launcher
    from fusewire.custom_ops.providers.symm_mem.prepared_launch import PreparedCall

    torch.cuda.set_device(DEVICE)
    for tokens, hidden, calls, seconds in budgets(arguments):
        if tokens > MAX_TOKENS:
            continue
        pattern, ranks = Pattern(tokens, hidden, 2, torch.bfloat16, DEVICE), make_ranks(2, hidden, torch.bfloat16)
        make = launcher.one_shot_launch if tokens <= ONE_SHOT_TOKENS // 4 else launcher.two_shot_launch
        prepared = [PreparedCall(ws, make) for ws, _ in ranks]
        at, wrong = (torch.zeros((), dtype=torch.int64, device=DEVICE) for _ in range(2))
        order = torch.arange(CALLS, device=DEVICE) * 7

        def step(pattern=pattern, ranks=ranks, prepared=prepared, at=at, wrong=wrong, order=order):
            index, current = (order + at) % PAYLOADS, torch.cuda.current_stream()
            parts, found = [part[index] for part in pattern.parts], [[], []]
            for (_, stream), call, xs, results in zip(ranks, prepared, parts, found, strict=True):
                stream.wait_stream(current)
                with torch.cuda.stream(stream):
                    results += [call(x, None, pattern.norm) for x in xs]
            for _, stream in ranks:
                current.wait_stream(stream)
            wrong.add_(sum(pattern.wrong(index, results) for results in found))
            at.add_(11)

        with launcher.compiling_only():
            step()
        torch.cuda.synchronize()
        wrong.zero_()
        label = [tokens, hidden, "data" if ONE_SHOT_TOKENS // 4 < tokens <= DATA_TOKENS else ""]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            step()
        soak(0, graph.replay, wrong, calls, seconds, label, bool, True)
        for ws, _ in ranks:
            ws.check(synchronize=True)
    return 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="gloo ranks without GPUs, without graphs")
    parser.add_argument("--one-gpu", action="store_true", help="both ranks as streams of one GPU")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--calls", type=int, default=1_000_000, help="calls of all shapes together")
    parser.add_argument("--limit", type=float, default=150.0, help="seconds; the calls are as many as fit")
    parser.add_argument("--tokens", help="only the shapes with these numbers of tokens, such as 600,1500")
    arguments = parser.parse_args()
    if arguments.one_gpu:
        return one_gpu(arguments)
    statuses = run_ranks(job, arguments.ranks, arguments, limit_s=arguments.limit + 20, gpu=not arguments.cpu)
    print(f"ranks ended with {statuses}")
    return int(any(statuses))


if __name__ == "__main__":
    sys.exit(main())
