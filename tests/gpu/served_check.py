"""Which calls the report counts as served on a GPU: eager ones, captured ones, no replays; and what
counting costs.

    python tests/gpu/served_check.py    # needs one GPU; the group's collectives are torch's fake ones

Exits with 1 if a count is wrong.
"""

from __future__ import annotations

import sys
import time

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import fusewire
from fusewire.custom_ops.dispatch import dispatcher
from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm as op

EAGER, CAPTURED, REPLAYS, TIMED = 5, 3, 7, 20000


def best_ns(call):
    """Nanoseconds a call: the best of 20 rounds."""
    rounds = []
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(TIMED):
            call()
        rounds.append((time.perf_counter() - start) / TIMED * 1e9)
    return min(rounds)


def main():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    x = torch.randn(4, 4096, device="cuda", dtype=torch.bfloat16)
    args = (x, x, None, 1e-5, 0.0, "scale_then_round", dist.group.WORLD.group_name)
    with torch.no_grad():
        for _ in range(EAGER):
            op(*args, policy="native")
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(CAPTURED):
                op(*args, policy="native")
        for _ in range(REPLAYS):
            graph.replay()
        torch.cuda.synchronize()
    (row,) = fusewire.report().served
    print(fusewire.report())
    print(f"select: {best_ns(lambda: dispatcher.select(op, args, 'native')):.0f} ns")
    print(f"of which decide: {best_ns(lambda: dispatcher.decide(op, args, 'native')):.0f} ns")
    right = (row.calls, row.captured) == (EAGER, CAPTURED)
    print("right" if right else f"WRONG: {row}")
    return int(not right)


if __name__ == "__main__":
    sys.exit(main())
