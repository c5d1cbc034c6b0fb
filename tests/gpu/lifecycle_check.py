"""Workspaces made and closed, captured, put to sleep and woken; many graphs; streams and threads.

    python tests/gpu/lifecycle_check.py              # 2 GPUs, under 4 minutes
    python tests/gpu/lifecycle_check.py --one-gpu    # making and closing only, both ranks in one process on one GPU
    python tests/gpu/lifecycle_check.py --rounds 20 --part graphs

Prints a line for each part as it ends. Every result is compared with the exact sum. Exits with 1 if
a part failed.
"""

from __future__ import annotations

import argparse
import random
import sys
import threading
import time
from typing import Any

import torch
import torch.distributed as dist
from harness import SCALE, all_reduce_norm, eighths, held, run_ranks, say

import fusewire
from fusewire.custom_ops.ops.norms import NormSpec
from fusewire.custom_ops.workspaces.registry import REGISTRY
from fusewire.errors import WorkspaceError

HIDDEN, BF16 = 4096, torch.bfloat16
MEMORY_BYTES = 2 << 20
PARTS = ("after_close", "captured", "streams", "threads", "branches", "beside", "graphs", "sleep", "rounds")


class Calls:
    """Calls on this rank with exact results."""

    def __init__(self, rank):
        self.rank, self.size, self.gpu = rank, dist.get_world_size(), torch.cuda.current_device()
        self.weight = torch.ones(HIDDEN, device="cuda", dtype=BF16)
        self.number = 0

    def payload(self, tokens, number, rank=None):
        return eighths(tokens, HIDDEN, 3 * number + (self.rank if rank is None else rank), BF16, "cuda")

    def call(self, x):
        return all_reduce_norm(x, None, self.weight, "symm_mem")

    def want(self, tokens, number):
        return sum(self.payload(tokens, number, rank).float() for rank in range(self.size))

    def check(self, tokens, number, results):
        if not torch.equal(results[1].float(), self.want(tokens, number)):
            raise RuntimeError(f"rank {self.rank}: a wrong sum of {tokens} tokens, payload {number}")

    def eager(self, tokens):
        self.number += 1
        self.check(tokens, self.number, self.call(self.payload(tokens, self.number)))

    def graph(self, tokens):
        return Graph(self, tokens)


class Graph:
    """A captured call."""

    def __init__(self, calls, tokens):
        self.calls, self.tokens, self.x = calls, tokens, calls.payload(tokens, 0)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.results = calls.call(self.x)

    def replay(self, number):
        self.x.copy_(self.calls.payload(self.tokens, number))
        self.graph.replay()
        self.calls.check(self.tokens, number, self.results)


def prepare(tokens=2048):
    infos = fusewire.prepare(None, HIDDEN, BF16, max_tokens=tokens)
    made = [info for info in infos if info.provider == "symm_mem"]
    if made[0].reason:
        raise RuntimeError(made[0].reason)


def grown(before, after):
    found = {name: after[name] - before[name] for name in after}
    if found["gpu"] > MEMORY_BYTES or found["files"] > 0:
        raise RuntimeError(f"memory or files grew: {found}")
    return found


def rounds(calls, options):
    """Make, call and close."""
    before = None
    for number in range(options.rounds):
        prepare()
        calls.eager(4)
        fusewire.close()
        if number == options.rounds // 10:
            before = held()
    return grown(before, held())


def after_close(calls, options):
    """A closed workspace serves no call; the operator makes a new one."""
    prepare()
    found: list[Any] = [made for made in REGISTRY.made() if made.key.provider == "symm_mem"]
    fusewire.close()
    try:
        found[0].run(None, calls.payload(4, 1), None, NormSpec(calls.weight, 1e-6, 0.0, SCALE))
    except WorkspaceError:
        calls.eager(4)
    else:
        raise RuntimeError("a closed workspace was used")
    fusewire.close()
    return {}


def captured(calls, options):
    """A captured workspace is neither closed nor grown, and its graph stays right."""
    prepare()
    graph = calls.graph(64)
    for attempt in (fusewire.close, lambda: prepare(4096)):
        try:
            attempt()
        except WorkspaceError:
            graph.replay(1)
        else:
            raise RuntimeError("a captured workspace was closed or grown")
    del graph
    fusewire.close(captured=True)
    return {}


def sleep(calls, options):
    """Graphs deleted, buffers freed; then everything made anew."""
    before = None
    for number in range(20):
        prepare()
        graph = calls.graph(64)
        graph.replay(number)
        del graph
        fusewire.close(captured=True)
        if number == 4:
            before = held()
    return grown(before, held())


def graphs(calls, options):
    """64 graphs of different sizes in any order, eager calls between."""
    prepare()
    order = random.Random(1)  # the same on all ranks
    sizes = order.sample(range(1, 2000), 64)
    for tokens in sizes:
        calls.eager(tokens)
    made = [calls.graph(tokens) for tokens in sizes]
    for number in range(1000):
        order.choice(made).replay(number)
        if number % 10 == 0:
            calls.eager(order.choice(sizes))
    made.clear()
    fusewire.close(captured=True)
    return {"replays": 1000}


def streams(calls, options):
    """Calls on two streams in turn, without any order of the program's."""
    prepare()
    both = [torch.cuda.Stream() for _ in range(2)]
    for number in range(100):
        tokens, found = (4, 64, 600)[number % 3], []
        inputs = [calls.payload(tokens, 2 * number + i) for i in range(2)]
        torch.cuda.synchronize()
        for stream, x in zip(both, inputs, strict=True):
            with torch.cuda.stream(stream):
                found.append(calls.call(x))
        torch.cuda.synchronize()
        for i, results in enumerate(found):
            calls.check(tokens, 2 * number + i, results)
    fusewire.close()
    return {"pairs": 100}


def threads(calls, options):
    """Two threads with a stream each, whose calls take turns and whose checks do not."""
    prepare()
    turns, errors = [threading.Semaphore(1), threading.Semaphore(0)], []

    def work(which):
        try:
            torch.cuda.set_device(calls.gpu)
            with torch.cuda.stream(torch.cuda.Stream()):
                for number in range(which, 200, 2):
                    tokens = (4, 64, 600)[number % 3]
                    x = calls.payload(tokens, number)
                    turns[which].acquire()
                    results = calls.call(x)
                    turns[1 - which].release()
                    torch.cuda.current_stream().synchronize()
                    calls.check(tokens, number, results)
        except Exception as error:
            errors.append(error)
            turns[1 - which].release(200)

    both = [threading.Thread(target=work, args=(which,)) for which in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    if errors:
        raise errors[0]
    fusewire.close()
    return {"calls": 200}


def branches(calls, options):
    """Two branches of one graph, each with a call."""
    prepare()
    calls.eager(64)
    other, xs = torch.cuda.Stream(), [calls.payload(64, i) for i in range(2)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        current = torch.cuda.current_stream()
        other.wait_stream(current)
        first = calls.call(xs[0])
        with torch.cuda.stream(other):
            second = calls.call(xs[1])
        current.wait_stream(other)
    for number in range(100):
        for i, x in enumerate(xs):
            x.copy_(calls.payload(64, 2 * number + i))
        graph.replay()
        torch.cuda.synchronize()
        calls.check(64, 2 * number, first)
        calls.check(64, 2 * number + 1, second)
    del graph
    fusewire.close(captured=True)
    return {"replays": 100}


def beside(calls, options):
    """Matrix products on another stream fill the GPU while calls are launched."""
    prepare()
    other = torch.cuda.Stream()
    factor = torch.randn(8192, 8192, device="cuda", dtype=BF16)
    torch.cuda.synchronize()
    for number in range(300):
        with torch.cuda.stream(other):
            for _ in range(3):
                factor @ factor
        calls.eager((4, 200, 1500)[number % 3])
    torch.cuda.synchronize()
    fusewire.close()
    return {"calls": 300}


def job(rank, options):
    calls, start = Calls(rank), time.monotonic()
    for part in options.part or PARTS:
        begin = time.monotonic()
        if any_late(begin - start > options.limit):
            raise RuntimeError(f"no time for {part}")
        found = globals()[part](calls, options)
        torch.cuda.synchronize()
        dist.barrier()
        if rank == 0:
            say(part=part, ok=True, seconds=round(time.monotonic() - begin, 1), **found)


def any_late(flag):
    found = torch.tensor([flag], dtype=torch.int32)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found)


def one_gpu(options):
    from one_gpu_check import DEVICE, make_ranks

    torch.cuda.set_device(DEVICE)
    before, start = None, time.monotonic()
    for number in range(options.rounds):
        for ws, _ in make_ranks(2, HIDDEN, BF16):
            ws.close()
            try:
                ws.output(0, 1)
            except WorkspaceError:
                pass
            else:
                raise RuntimeError("a closed workspace was used")
        if number == options.rounds // 10:
            before = held()
    say(part="rounds", ok=True, seconds=round(time.monotonic() - start, 1), **grown(before, held()))
    return 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one-gpu", action="store_true")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--part", action="append", choices=PARTS)
    parser.add_argument("--limit", type=float, default=200.0, help="seconds after which no further part begins")
    options = parser.parse_args()
    if options.one_gpu:
        return one_gpu(options)
    statuses = run_ranks(
        job, options.ranks, options, limit_s=options.limit + 25, environment={"FUSEWIRE_TIMEOUT_S": "12"}
    )
    print(f"ranks ended with {statuses}")
    return int(any(statuses))


if __name__ == "__main__":
    sys.exit(main())
