"""Measure the host time of a call that no CUDA graph replays.

    torchrun --nproc-per-node 2 examples/benchmarks/host_time.py
    torchrun --nproc-per-node 2 examples/benchmarks/host_time.py --cpu    # on gloo ranks: to try the command

Measured are fusewire's operator by provider, the ranks' comparison before a graph runs, and a compiled
layer. The GPU's queue is empty before each round of calls and never full. So the time is that of the
Python and C++ before the kernel: the best of several rounds, on the slowest rank. One token, bf16,
with residual and weight.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
import time
from collections.abc import Callable
from typing import Any

# A failure of NVLink multicast can take a machine's GPUs out of service.
os.environ["NCCL_NVLS_ENABLE"] = "0"
os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor

import fusewire
from fusewire.errors import NoProviderError

EPS = 1e-5
FORM = "scale_then_round"
SITES = 16  # all-reduces of the compiled program


class Layers(torch.nn.Module):
    """A program that repeats all-reduce, add and RMSNorm."""

    def forward(self, x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        for _ in range(SITES):
            residual = residual + functional.all_reduce(x, "sum", dist.group.WORLD)
            wide = residual.float()
            x = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)
        return x, residual


def host_time(call: Callable[[], Any], calls: int, synchronize: Callable[[], None]) -> float:
    """Return microseconds per call: the best of five rounds, on the slowest rank."""
    best = float("inf")
    for timed in (False, *(5 * (True,))):
        synchronize()
        dist.barrier()
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        if timed:
            best = min(best, (time.perf_counter() - start) / calls * 1e6)
    synchronize()
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, best)
    return max(found)


def read_options() -> argparse.Namespace:
    """Return the command line's options; exit with a message if they cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=8192, help="default: %(default)s")
    parser.add_argument("--calls", type=int, default=200, help="calls a round (default %(default)s)")
    parser.add_argument("--limit", type=float, default=300.0, help="end the process after so many seconds")
    parser.add_argument("--cpu", action="store_true", help="on gloo ranks: says nothing about GPUs")
    options = parser.parse_args()
    if options.hidden < 8 or options.hidden % 8 or options.calls < 1:
        parser.error("--hidden must be a positive multiple of 8, and --calls positive")
    if not options.cpu and not torch.cuda.is_available():
        parser.error("there is no GPU; --cpu tries the command without")
    if "RANK" not in os.environ:
        parser.error("start it with torchrun --nproc-per-node N")
    return options


def main() -> int:
    options = read_options()
    faulthandler.dump_traceback_later(options.limit, exit=True)
    if options.cpu:
        device, synchronize = torch.device("cpu"), lambda: None
        dist.init_process_group("gloo")
    else:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
        synchronize = torch.cuda.synchronize
    group = dist.group.WORLD.group_name
    x = torch.randn(1, options.hidden, device=device).to(torch.bfloat16)
    weight, residual = torch.ones_like(x[0]), x.clone()

    def say(what: str, us: float) -> None:
        if dist.get_rank() == 0:
            print(f"{what:50s} {us:8.1f} us", flush=True)

    def reduced() -> None:
        dist.all_reduce(x.clone())

    if dist.get_rank() == 0:
        where = "CPU ranks" if options.cpu else torch.cuda.get_device_name()
        print(f"{dist.get_world_size()} x {where}, torch {torch.__version__}, hidden size {options.hidden}")
    with torch.no_grad():
        say("all-reduce of a copy, by the process group", host_time(reduced, options.calls, synchronize))
        for policy in ("symm_mem", "flashinfer", "native", ""):

            def operator(policy: str = policy) -> None:
                fusewire.all_reduce_rms_norm(x, residual, weight, EPS, 0.0, FORM, group, policy=policy)

            name = policy or "as dispatched"
            try:
                say(f"all_reduce_rms_norm, {name}", host_time(operator, options.calls, synchronize))
            except NoProviderError as error:
                if dist.get_rank() == 0:
                    print(f"all_reduce_rms_norm, {name}: {' '.join(str(error).split())[:200]}", flush=True)
        for what, strict in (("the same graph again", False), ("a strict call", True)):

            def compared(strict: bool = strict) -> None:
                torch.ops.fusewire.rendezvous(x, group, "a fingerprint", "host_time", strict)

            say(f"rendezvous, {what}", host_time(compared, options.calls, synchronize))
        for backend in ("inductor", "fusewire"):
            torch._dynamo.reset()
            run = torch.compile(Layers(), backend=backend)

            def program(run: Callable[..., Any] = run) -> None:
                run(x, residual, weight)

            calls = max(1, options.calls // SITES)
            say(f"compiled by {backend}, each of {SITES}", host_time(program, calls, synchronize) / SITES)
    fusewire.close(captured=True)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
