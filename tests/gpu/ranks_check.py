"""Ranks that agree and ranks that differ, on GPUs: the comparison before a graph runs, with and without CUDA graphs.

    torchrun --nproc-per-node 2 tests/gpu/ranks_check.py agree
    torchrun --nproc-per-node 2 tests/gpu/ranks_check.py differ CASE     # one of CASES; each rank must raise in time

"agree" runs programs whose collectives carry something else than the program's (a merged pair, a scale) through
torch.compile, alternating between shapes and between graphs, and under Inductor's CUDA graphs and a capture by hand.
"differ" lets rank 0 go another way. A rank that raises says so and ends; one that waits in NCCL is ended by its peer's end.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import time

os.environ.setdefault("FUSEWIRE_TIMEOUT_S", "15")

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from harness import SHARED_GPU, join
from torch._dynamo.utils import counters
from torch._inductor.exc import InductorError

import fusewire
from fusewire.errors import FusewireError

HIDDEN = 4096
CASES = ("logs", "eager", "number")
failed = 0


def reduce(x):
    return functional.all_reduce(x, "sum", dist.group.WORLD)


def norm(x, w):
    wide = x.float()
    return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def model(x, r, w, log=False, scale=0.5):
    """A merged pair, then a plain and a scaled sum."""
    a, b = reduce(torch.tanh(x)), reduce(x * 0.5)
    seen = a.abs().max() if log else None
    residual = r + (a + b)
    y = norm(residual, w)
    residual = residual + reduce(torch.sin(y)) * scale
    return norm(residual, w), seen


def inputs(tokens):
    own = torch.Generator("cuda").manual_seed(tokens + 1000 * dist.get_rank())
    shared = torch.Generator("cuda").manual_seed(tokens)
    x = torch.randn(tokens, HIDDEN, generator=own, device="cuda").bfloat16()
    r = torch.randn(tokens, HIDDEN, generator=shared, device="cuda").bfloat16()
    return x, r, torch.rand(HIDDEN, generator=shared, device="cuda").bfloat16() + 0.5


def verdict(name, ok, detail=""):
    global failed
    failed += not ok
    print(f"rank {dist.get_rank()}: {'pass' if ok else 'FAIL'} {name} {detail}", flush=True)


def right(run, tokens, name):
    x, r, w = inputs(tokens)
    got, want = run(x, r, w)[0].float().clone(), model(x, r, w)[0].float()
    error = float((got - want).norm() / want.norm())
    verdict(f"{name}, {tokens} tokens", error < 0.02, f"relative error {error:.4f}")


def agree():
    for options in (
        {},
        {"triton.cudagraphs": True},
        {"ir_op_priority": {"all_reduce_rms_norm": ("native",)}},
        {"ir_op_priority": {"all_reduce_rms_norm": ("native",)}, "triton.cudagraphs": True},
        {"batch_invariant": True},
    ):
        if SHARED_GPU and "ir_op_priority" in options and "triton.cudagraphs" in options:
            continue  # native is gloo's all-reduce there, which no graph can hold
        torch._dynamo.reset()
        fusewire.clear_report()
        counters.clear()
        run = torch.compile(model, backend="fusewire", dynamic=False, options=options)
        for tokens in (8, 8, 8, 64, 8, 64, 2048, 2048, 8):
            right(run, tokens, f"{options}")
        skips = counters["inductor"]["cudagraph_skips"]
        verdict(f"{options}: CUDA graphs", skips == 0, f"{skips} skipped; {fusewire.report().summary}")
    torch._dynamo.reset()
    run = torch.compile(model, backend="fusewire", dynamic=False)
    x, r, w = inputs(16)
    right(run, 16, "before capture")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(x, r, w)[0]
    for number in range(3):
        x.copy_(inputs(16)[0] * (number + 1))
        graph.replay()
        want = model(x, r, w)[0].float()
        error = float((got.float() - want).norm() / want.norm())
        verdict(f"replay {number}", error < 0.02, f"relative error {error:.4f}")
    right(run, 16, "after replays")
    del graph


def differ(case):
    """Both run a fused graph; then rank 0 goes another way. Prints what this rank came to.

    In "eager", rank 0 is in the program's own all-reduce, which ends when its peer does.
    """
    first = dist.get_rank() == 0
    run = torch.compile(model, backend="fusewire", dynamic=False)
    if case != "number":
        right(run, 8, "warm-up")
    x, r, w = inputs(8)
    start = time.monotonic()
    try:
        if case == "eager":
            got = (model if first else run)(x, r, w)[0]
        elif case == "number":
            got = run(x, r, w, False, 0.5 if first else 0.25)[0]
            want = model(x, r, w, False, 0.5 if first else 0.25)[0].float()
            verdict("number: unfused on both", float((got.float() - want).norm() / want.norm()) < 0.02)
        else:
            got = run(x, r, w, first)[0]
        torch.cuda.synchronize()
        text = f"gave numbers ({float(got.float().norm()):.3f})"
    except Exception as error:
        text = f"{'raised' if _of_fusewire(error) else 'failed with'} {type(error).__name__}: {error}"
    print(f"rank {dist.get_rank()}: {case} {text[:600]}, after {time.monotonic() - start:.1f} s", flush=True)
    if case != "number" and not (case == "eager" and first):
        verdict(case, "raised" in text)


def _of_fusewire(error):
    """Whether the error or one that it wraps is fusewire's: Inductor wraps those of compiling."""
    while error is not None and not isinstance(error, FusewireError):
        error = error.inner_exception if isinstance(error, InductorError) else error.__cause__
    return error is not None


def main():
    faulthandler.dump_traceback_later(100, exit=True)
    join(60)
    with torch.no_grad():
        agree() if sys.argv[1:2] == ["agree"] else differ(" ".join(sys.argv[2:]))
    print(f"rank {dist.get_rank()}: {failed} failed", flush=True)
    if sys.argv[1:2] == ["agree"]:
        fusewire.close(captured=True)
        dist.destroy_process_group()
    os._exit(bool(failed))


if __name__ == "__main__":
    if sys.argv[1:2] != ["agree"] and " ".join(sys.argv[2:]) not in CASES:
        sys.exit(f"{__doc__}\nCASES: {', '.join(CASES)}")
    main()
