"""The `symm_mem` kernels on real GPUs: against float64 and exact references, then timed. Run with torchrun:

    torchrun --nproc-per-node 4 tests/gpu/symm_mem_check.py --out /tmp/check  # correctness
    torchrun --nproc-per-node 4 tests/gpu/symm_mem_check.py --out /tmp/check --bench  # timing
    ... --bench --sweep flags --tokens 512,2048  # and launch parameters

Prints a table last; logs, results.csv and bench.csv go to --out. Exits with 1 if a case failed. Nothing waits
for ever: kernels give up after 5 s, and a step that takes longer than --limit ends the process, with the
table so far and a stack trace in the log. Every rank draws the inputs of all ranks, so references need no
communication.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import faulthandler
import itertools
import os
import random
import statistics
import sys
import threading
import time
import traceback
from collections import Counter
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from harness import join

from fusewire.custom_ops.ops.norms import NormSpec
from fusewire.custom_ops.ops.quantization import quantize
from fusewire.custom_ops.ops.sharded_norm import rows_per_rank
from fusewire.custom_ops.providers.symm_mem import launcher as symm_mem
from fusewire.custom_ops.providers.symm_mem.arguments import Quantization
from fusewire.custom_ops.providers.symm_mem.launch_config import (
    ONE_SHOT_KERNEL,
    LaunchConfig,
    check_launch_config,
    launch_config_two_shot_flags,
)
from fusewire.custom_ops.providers.symm_mem.layout import owned_rows
from fusewire.custom_ops.providers.symm_mem.prepared_launch import PreparedCall
from fusewire.custom_ops.providers.symm_mem.workspace import SymmMemWorkspace
from fusewire.errors import PeerTimeoutError

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SCALE, ROUND = "scale_then_round", "round_then_scale"
WIDE_SCALE, WIDE_ROUND = "wide_sum_scale_then_round", "wide_sum_round_then_scale"
EPS = 1e-5
INNER_EPS = 1e-3
# How far fp32 may take a norm from float64 before it is rounded to its dtype.
SLACK = 2.0**-19
ULP = {BF16: 2.0**-7, FP16: 2.0**-10, FP32: 2.0**-18}
KINDS = ("one_shot", "two_shot", "two_shot_sharded")


@dataclasses.dataclass(frozen=True)
class Case:
    """A call and what it is given."""

    kind: str
    tokens: int
    hidden: int = 8192
    dtype: torch.dtype = BF16
    weight: torch.dtype | None = BF16
    residual: bool = True
    bias: float = 0.0
    form: str = SCALE
    special: bool = False
    inner: tuple | None = None  # weight's dtype or None, weight's bias, form
    options: tuple = ()

    def __str__(self) -> str:
        extra = [f"{k}={v}" for k, v in self.options]
        extra += ["no residual"] * (not self.residual) + ["NaN, -0.0, sentinel"] * self.special
        extra += [f"inner w={str(self.inner[0])[6:]} bias={self.inner[1]} {self.inner[2][:5]}"] if self.inner else []
        what = [self.kind, f"{self.tokens}x{self.hidden}", str(self.dtype)[6:], f"w={str(self.weight)[6:]}"]
        return " ".join([*what, f"bias={self.bias}" if self.bias else "", self.form.replace("_then", "")[:14], *extra])


class Run:
    """This rank, its workspace, and what has happened so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.out = Path(args.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.log = (self.out / f"rank{self.rank}.log").open("w", buffering=1)
        self.results: list[tuple[str, str, bool, str]] = []
        self.ws: SymmMemWorkspace | None = None
        self.wanted: tuple = ()  # what self.ws was made for
        self.dead = False
        dist.all_reduce(torch.ones(1, device=self.device))

    def say(self, text: str) -> None:
        self.log.write(f"{time.strftime('%H:%M:%S')} {text}\n")
        if self.rank == 0:
            print(text, flush=True)

    def gather(self, value, end: bool = False):
        """Every rank's value, over the CPU. `end`: of a step; ranks that are not there yet learn of it."""
        while True:
            values = [None] * self.world
            dist.all_gather_object(values, (end, value), group=self.args.cpu_group)
            ended = [there for there, _ in values]
            if all(ended) or not any(ended):
                return [value for _, value in values]
            if not end:
                raise RuntimeError("another rank has failed")

    def workspace(self, hidden: int, dtype: torch.dtype, **options) -> SymmMemWorkspace:
        """The workspace for these activations; the one before is closed."""
        wanted = (hidden, dtype, tuple(options.items()))
        if self.ws is None or self.ws.closed or self.wanted != wanted:
            self.drop()
            options = {"one_shot_tokens": 256, "data_tokens": 1024, "outputs": 2, "timeout_s": 5.0, **options}
            tokens = options.pop("max_tokens", 2048)
            name = dist.group.WORLD.group_name
            options["barrier"] = lambda: dist.barrier(group=self.args.cpu_group)
            self.ws = SymmMemWorkspace(name, hidden, dtype, tokens, device=self.device, **options)
            self.wanted = wanted
        return self.ws

    def drop(self) -> None:
        if self.ws is not None:
            self.ws.close()
        self.ws = None
        torch.cuda.empty_cache()

    def step(self, phase: str, name: str, work) -> bool:
        """Do one case on all ranks; it passes if it passes on each and their fingerprints are equal."""
        if self.dead:
            return False
        watchdog = threading.Timer(self.args.limit, self.give_up, (f"{phase}: {name}",))
        watchdog.daemon = True
        watchdog.start()
        ok, detail, prints = True, "", None
        start = time.monotonic()
        try:
            prints = work()
        except Exception as error:
            ok, detail = False, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            self.log.write(traceback.format_exc())
        took = time.monotonic() - start
        everyone = self.gather((ok, detail, prints), end=True)
        watchdog.cancel()
        details = [f"rank {rank}: {d}" for rank, (good, d, _) in enumerate(everyone) if not good]
        if not details and len({p for _, _, p in everyone}) > 1:
            details = ["the ranks' results differ"]
        self.results.append((phase, name, not details, "; ".join(details)))
        times = f"{took:.2f} s + {time.monotonic() - start - took:.2f} s for the peers"
        self.log.write(f"{'ok' if not details else 'FAIL'} {phase}: {name} ({times}) {'; '.join(details)}\n")
        if details:
            self.say(f"FAIL {phase}: {name}: {details[0]}")
            self.dead = any("CUDA error" in d or "AcceleratorError" in d for d in details)
            if not self.dead:
                self.drop()  # its kernels may have given up: later cases start afresh
        return not details

    def give_up(self, what: str) -> None:
        """The watchdog's end of the process."""
        faulthandler.dump_traceback(file=self.log, all_threads=True)
        self.results.append(("time limit", what, False, f"rank {self.rank} took over {self.args.limit} s"))
        self.report()
        os._exit(3)

    def report(self) -> None:
        """The table, on rank 0."""
        if self.rank:
            return
        with (self.out / "results.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("phase", "case", "passed", "detail"), *self.results])
        table = Counter((phase, ok) for phase, _, ok, _ in self.results)
        print(f"\n{self.world} GPUs\n{'phase':15s} {'run':>5s} {'passed':>7s} {'failed':>7s}", flush=True)
        for phase in dict.fromkeys(phase for phase, *_ in self.results):
            passed, failed = table[(phase, True)], table[(phase, False)]
            print(f"{phase:15s} {passed + failed:5d} {passed:7d} {failed:7d}")
        for phase, name, ok, detail in self.results:
            if not ok:
                print(f"FAILED {phase}: {name}: {detail[:300]}")
        if self.dead:
            print("A CUDA error ended the run early: cases after it were not run.")
        sys.stdout.flush()


# --- References ---------------------------------------------------------------------------------------------


def draw(run: Run, case: Case, seed: int) -> dict:
    """Inputs of all ranks, the exact residual and the norm in float64."""
    generator = torch.Generator(run.device).manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=run.device)

    total, mine = None, None
    for rank in range(run.world):
        part = randn(case.tokens, case.hidden).to(case.dtype)
        if case.special:
            part[-1, 5] = -0.0
            if rank == 0:
                part.view(torch.int16 if case.dtype.itemsize == 2 else torch.int32)[0, 2:4] = -1
        total = part.to(torch.float32, copy=True) if total is None else total.add_(part.float())
        mine = part if rank == run.rank else mine
    total = total.to(case.dtype)
    residual = randn(case.tokens, case.hidden).to(case.dtype) if case.residual else None
    inner, bounds = None, (total,)
    if case.inner is not None:
        inner_dtype, bias, form = case.inner
        inner = NormSpec(None if inner_dtype is None else randn(case.hidden).to(inner_dtype), INNER_EPS, bias, form)
        bounds = [exact_norm(total, inner, slack).to(case.dtype) for slack in (0.0, -SLACK, SLACK)]
    if residual is not None:
        if case.special:
            residual[-1, 5] = -0.0
        bounds = [(bound.float() + residual.float()).to(case.dtype) for bound in bounds]
    weight = None if case.weight is None else randn(case.hidden).to(case.weight)
    outer = NormSpec(weight, EPS, case.bias, case.form)
    data = {"x": mine, "residual": residual, "weight": weight, "total": bounds[0], "inner": inner}
    rows = bounds[0]
    if case.form in (WIDE_SCALE, WIDE_ROUND) and case.dtype != FP32:
        rows = total.float() + residual.float()
    data["norm"] = exact_norm(rows, outer, dtype=case.dtype)
    if inner is not None:
        # Where fp32 and float64 round the inner norm to different neighbours, so does all that follows.
        _, one, other = bounds
        data["low"], data["high"] = torch.minimum(one, other), torch.maximum(one, other)
        ends = [exact_norm(bound, outer, like=bounds[0]) for bound in bounds[1:]]
        data["spread"] = (ends[1] - ends[0]).abs()
    return data


def exact_norm(
    rows: torch.Tensor,
    norm: NormSpec,
    slack: float = 0.0,
    like: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The norm in float64, its numbers off by `slack` before each rounding (to `dtype`, or the
    rows'); with the mean squares of `like`.
    """
    round_first = norm.form in (ROUND, WIDE_ROUND)
    wide, squares = rows.double(), (rows if like is None else like).double()
    wide = wide * torch.rsqrt(squares.pow(2).mean(-1, keepdim=True) + norm.eps) * (1 + slack)
    wide = wide.to(dtype or rows.dtype).double() if round_first else wide
    if norm.weight is None:
        return wide
    biased = norm.weight + norm.weight_bias if round_first else norm.weight.double() + norm.weight_bias
    return wide * biased.double() * (1 + slack)


def call(run: Run, ws: SymmMemWorkspace, case: Case, data: dict):
    """Make the call, its outputs full of NaN before, as far as the caller provides them."""
    options = {**dict(case.options), "inner": data["inner"]}
    residual = data["residual"]
    if case.kind == "two_shot_sharded" and residual is not None:
        shard = rows_per_rank(case.tokens, run.world)
        residual = residual[run.rank * shard : (run.rank + 1) * shard].clone()
    if "output" not in options or case.kind == "two_shot":
        options["norm_out"] = torch.full_like(data["x"], torch.nan)
    if "output" in options:
        ws.output(options["output"], case.tokens).fill_(torch.nan)  # peers write there once this call began
    function = getattr(symm_mem, case.kind)
    return function(ws, data["x"], residual, NormSpec(data["weight"], EPS, case.bias, case.form), **options)


def compare(run: Run, case: Case, data: dict, norm: torch.Tensor, kept: torch.Tensor | None) -> int:
    """Raise if a result is wrong; else a fingerprint of what must be equal on all ranks."""
    bits = torch.int16 if case.dtype.itemsize == 2 else torch.int32
    rows = slice(None)
    if kept is not None:
        if case.kind == "two_shot_sharded":
            shard, owned = rows_per_rank(case.tokens, run.world), owned_rows(case.tokens, run.world, run.rank)
            kept, rows = kept[:owned], slice(run.rank * shard, run.rank * shard + owned)
        total = data["total"][rows]
        wrong = (kept.view(bits) != total.view(bits)) & ~(kept.isnan() & total.isnan())
        if case.inner is not None:
            wrong &= ~((kept >= data["low"][rows]) & (kept <= data["high"][rows]))
        if wrong.any():
            raise AssertionError(f"residual: {int(wrong.sum())} of {wrong.numel()} elements, {where(wrong)}")
    exact = data["norm"]
    error = (norm.double() - exact).abs() - 1.01 * ULP[case.dtype] * (exact.abs() + 1e-2)
    if case.inner is not None:
        error -= data["spread"]
    wrong = (error > 0) | (norm.isnan() != exact.isnan())
    if wrong.any():
        raise AssertionError(f"norm: {int(wrong.sum())} of {wrong.numel()} elements, {where(wrong)}")
    return fingerprint(norm)


def where(wrong: torch.Tensor) -> str:
    rows = wrong.any(-1).nonzero().flatten()
    columns = wrong[rows[0]].nonzero().flatten()[:4].tolist()
    return f"{len(rows)} rows, first {rows[:4].tolist()}, columns {columns}"


def fingerprint(tensor: torch.Tensor) -> int:
    flat = tensor.reshape(-1).view(torch.int16 if tensor.itemsize == 2 else torch.int32)
    total = 0
    for start in range(0, len(flat), 1 << 24):
        part = flat[start : start + (1 << 24)].long()
        factors = torch.arange(start, start + len(part), device=flat.device).mul_(2654435761).remainder_(1 << 31)
        total = (total + int((part * (factors | 1)).sum())) % (1 << 61)
    return total


# --- Correctness --------------------------------------------------------------------------------------------


def matrix(args: argparse.Namespace, world: int) -> list[Case]:
    """Small and plain ones first."""
    data, flags = (("protocol", "data"),), (("protocol", "flags"),)
    cases = [Case(kind, tokens) for tokens in (1, 2, world + 1, 16) for kind in KINDS]
    cases += [Case(kind, tokens, options=flags) for tokens in (1, 3, 16) for kind in KINDS[1:]]
    cases += [Case("one_shot", tokens) for tokens in (33, 64, 100, 133, 256)]
    cases += [Case(kind, t, options=data) for t in (33, 64, 130, 512, 1000) for kind in KINDS[1:]]
    cases += [Case(kind, t, options=flags) for t in (64, 129, 513, 1024, 2047, 2048) for kind in KINDS[1:]]
    cases += [Case(k, t, options=(*flags, ("output", t % 2))) for t in (5, 512, 2047) for k in KINDS[1:]]
    every = [(k, o) for k in KINDS for o in ((), flags) if k != "one_shot" or not o]
    for kind, options in every:
        cases += [Case(kind, tokens, special=True, options=options) for tokens in (2, 7, 40)]
        cases.append(Case(kind, 40, options=(*options, ("need_residual", False))))
    hidden = [(2880, FP16), (5376, BF16), (7168, BF16), (64, FP32), (5120, FP32)]
    hidden += [] if args.quick else [(4096, BF16), (2688, BF16), (16384, BF16), (16384, FP32), (8, FP16)]
    for (width, dtype), (kind, options) in itertools.product(hidden, every):
        for tokens in (1, 9, 130) if args.quick else (1, 3, 9, 33, 130, 256):
            cases.append(Case(kind, tokens, width, dtype, dtype, options=options))
    variants = [{"residual": False}, {"weight": None}, {"weight": FP32, "bias": 1.0}, {"form": ROUND}]
    variants += [{"weight": FP16, "form": ROUND, "bias": 1.0}, {"weight": torch.float64}]
    variants += [{"form": WIDE_ROUND}, {"form": WIDE_SCALE, "bias": 1.0}]
    for kind, options in every:
        cases += [Case(kind, 37, 2880, BF16, options=options, **variant) for variant in variants]
        cases.append(Case(kind, 37, 2880, FP32, BF16, options=options))
        cases += [Case(kind, t, form=WIDE_ROUND, options=options) for t in (1, 9, 130)]
    cases += [Case(k, t, form=WIDE_ROUND, options=(*flags, ("output", t % 2))) for t in (5, 2047) for k in KINDS[1:]]
    return cases + sandwiches(args, every)


def sandwiches(args: argparse.Namespace, every: list) -> list[Case]:
    """Norms before and after the residual is added, as in Gemma (5376) and GLM-4 (4096)."""
    gemma, cases = (BF16, 1.0, SCALE), []
    tokens = (1, 9, 130) if args.quick else (1, 2, 3, 9, 33, 130, 256)
    for kind, options in every:
        cases += [Case(kind, t, 5376, bias=1.0, inner=gemma, options=options) for t in tokens]
        cases += [Case(kind, t, 8192, inner=(BF16, 0.0, ROUND), form=ROUND, options=options) for t in tokens]
        cases += [Case(kind, t, 5120, FP32, FP32, inner=(BF16, 1.0, SCALE), options=options) for t in tokens]
        cases += [Case(kind, t, special=True, inner=gemma, options=options) for t in (2, 7, 40)]
        cases.append(Case(kind, 40, inner=gemma, options=(*options, ("need_residual", False))))
        for inner in ((None, 0.0, SCALE), (FP32, 1.0, ROUND), (FP16, 0.0, SCALE), (torch.float64, 1.0, SCALE)):
            cases.append(Case(kind, 37, 2880, FP16, FP16, inner=inner, options=options))
        for width, dtype in ((16384, BF16), (16384, FP32), (8, FP16)):
            cases += [Case(kind, t, width, dtype, dtype, inner=(dtype, 0.0, SCALE), options=options) for t in (1, 9)]
    flags = ("protocol", "flags")
    cases += [Case(k, t, 5376, bias=1.0, inner=gemma, options=(flags,)) for t in (513, 2048) for k in KINDS[1:]]
    cases += [Case(k, 2047, inner=gemma, options=(flags, ("output", 1))) for k in KINDS[1:]]
    return cases


def precompile(run: Run, calls: list) -> None:
    """Compile what the calls launch, each kernel on one rank, into Triton's cache on disk."""
    found, original = {}, symm_mem.run

    def find(ws, launch) -> None:
        found.setdefault((launch.kernel, launch.config.warps, *launch.arguments[-16:]), launch)  # the constants

    symm_mem.run = find
    try:
        for work in calls:
            work()
    finally:
        symm_mem.run = original
    start = time.monotonic()
    errors = []
    for launch in list(found.values())[run.rank :: run.world]:
        config, arguments = launch.config, (*launch.tensors, *launch.arguments)
        try:
            symm_mem.kernel(launch.kernel).warmup(*arguments, grid=(config.programs,), **launch.options)
        except Exception as error:
            run.log.write(traceback.format_exc())
            errors.append(f"{launch.kernel} {config}: {' '.join(str(error).split())[:150]}")
    run.gather(None)
    run.say(f"compiled {len(found)} kernels in {time.monotonic() - start:.0f} s")
    if errors:
        raise RuntimeError(f"{len(errors)} kernels do not compile: {errors[0]}")


def correctness(run: Run) -> None:
    cases = matrix(run.args, run.world)
    cases.sort(key=lambda c: (c.hidden != 8192, c.hidden, c.dtype.itemsize, str(c.dtype)))
    for (hidden, dtype), group in itertools.groupby(cases, key=lambda c: (c.hidden, c.dtype)):
        several(run, hidden, dtype, list(group))
    for kind, tokens, output in QUANTISED:
        run.step("FP8", f"{kind} {tokens}", lambda call=(kind, tokens, output): quantised(run, *call))
    for phase in (graphs, stress, missing_rank):
        run.step("several calls", phase.__name__, lambda phase=phase: phase(run))


def several(run: Run, hidden: int, dtype: torch.dtype, cases: list[Case]) -> None:
    """All cases of a workspace."""
    if not run.step("workspace", f"{hidden} {dtype}", lambda: run.workspace(hidden, dtype).rank * 0):
        return
    run.step("compile", f"{hidden} {dtype}", lambda: precompile(run, [lambda c=c: dry(run, c) for c in cases]))
    for case in cases:

        def work(case: Case = case) -> tuple:
            ws, prints, wrong = run.workspace(hidden, dtype), [], []
            for seed in (1, 2):  # what the first leaves behind must not pass for the second
                data = draw(run, case, seed)
                norm, kept = call(run, ws, case, data)
                ws.check(synchronize=True)
                try:
                    prints.append(compare(run, case, data, norm, kept))
                except AssertionError as error:  # the peers go on, so this rank must too
                    wrong.append(f"input {seed}: {error}")
            if wrong:
                raise AssertionError("; ".join(wrong))
            return tuple(prints)

        run.step("one call", str(case), work)
    run.step("left behind", f"{hidden} {dtype}", lambda: packets_left(run))


def dry(run: Run, case: Case) -> None:
    """The call without inputs worth the name, for `precompile`."""
    x = torch.empty(case.tokens, case.hidden, dtype=case.dtype, device=run.device)
    rows = rows_per_rank(case.tokens, run.world) if case.kind == "two_shot_sharded" else case.tokens
    weight = None if case.weight is None else torch.empty(case.hidden, device=run.device).to(case.weight)
    residual = x.new_empty(rows, case.hidden) if case.residual else None
    inner = None
    if case.inner is not None:
        inner_dtype, bias, form = case.inner
        scale = None if inner_dtype is None else torch.empty(case.hidden, dtype=inner_dtype, device=run.device)
        inner = NormSpec(scale, INNER_EPS, bias, form)
    function = getattr(symm_mem, case.kind)
    function(run.ws, x, residual, NormSpec(weight, EPS, case.bias, case.form), inner=inner, **dict(case.options))


def packets_left(run: Run) -> None:
    """Where data is its own flag, every packet that arrived has been taken and reset."""
    if run.ws is None:
        return
    torch.cuda.synchronize()
    for name in run.ws.layout.ones:
        start = run.ws.layout.offsets[name]
        area = run.ws._buffer[start : start + run.ws.layout.sizes[name]].view(torch.int64)
        if (area != -1).any():
            raise AssertionError(f"{name}: {int((area != -1).sum())} words left")


MIX = [
    Case("one_shot", 3, 2880),
    Case("two_shot", 20, 2880),
    Case("two_shot_sharded", 65, 2880, options=(("protocol", "flags"),)),
    Case("one_shot", 40, 2880),
    Case("two_shot_sharded", 130, 2880),
    Case("two_shot", 300, 2880, options=(("protocol", "flags"),)),
    Case("one_shot", 1, 2880),
    Case("two_shot", 2, 2880),
    Case("one_shot", 5, 2880, inner=(BF16, 1.0, SCALE)),
    Case("two_shot", 30, 2880, inner=(BF16, 1.0, SCALE)),
    Case("two_shot", 200, 2880, inner=(BF16, 1.0, SCALE), options=(("protocol", "flags"),)),
]


def graphs(run: Run) -> tuple:
    """A CUDA graph of all kernels, replayed on new inputs."""
    ws = run.workspace(2880, BF16)
    precompile(run, [lambda case=case: dry(run, case) for case in MIX])
    inputs = [draw(run, case, 1) for case in MIX]
    for case, data in zip(MIX, inputs, strict=True):
        call(run, ws, case, data)
    torch.cuda.synchronize()
    graph, results = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for case, data in zip(MIX, inputs, strict=True):
            results.append(call(run, ws, case, data))
    prints, wrong = [], []
    for seed in range(2, 8):
        fresh = [draw(run, case, seed) for case in MIX]
        for data, new in zip(inputs, fresh, strict=True):
            for name in ("x", "residual", "weight"):
                data[name].copy_(new[name])
            if data["inner"] is not None:
                data["inner"].weight.copy_(new["inner"].weight)
        graph.replay()
        graph.replay()
        ws.check(synchronize=True)
        for case, data, (norm, kept) in zip(MIX, fresh, results, strict=True):
            try:
                prints.append(compare(run, case, data, norm, kept))
            except AssertionError as error:
                wrong.append(f"replay {seed}: {case}: {error}")
    if wrong:
        raise AssertionError("; ".join(wrong[:3]))
    return tuple(prints)


def stress(run: Run, calls: int = 400) -> tuple:
    """Calls in random order, the ranks out of step by up to 0.2 ms, all results compared bit for bit."""
    ws = run.workspace(2880, BF16)
    precompile(run, [lambda case=case: dry(run, case) for case in MIX])
    inputs = [draw(run, case, 3) for case in MIX]
    first = [call(run, ws, case, data) for case, data in zip(MIX, inputs, strict=True)]
    ws.check(synchronize=True)
    prints = [compare(run, c, d, *r) for c, d, r in zip(MIX, inputs, first, strict=True)]
    order, delay = random.Random(1), random.Random(run.rank)
    bad = torch.zeros((), dtype=torch.int64, device=run.device)
    for _ in range(calls):
        i = order.randrange(len(MIX))
        torch.cuda._sleep(delay.randrange(400_000) if delay.random() < 0.5 else 0)
        norm, kept = call(run, ws, MIX[i], inputs[i])
        owned = owned_rows(MIX[i].tokens, run.world, run.rank)
        rows = slice(owned if MIX[i].kind == "two_shot_sharded" else None)
        bad += (norm != first[i][0]).sum() + (kept[rows] != first[i][1][rows]).sum()
    ws.check(synchronize=True)
    if int(bad):
        raise AssertionError(f"{int(bad)} elements differ from the first time")
    return tuple(prints)


QUANTS = (
    ("token scale_floor=4.359654017857143e-06", None),
    ("group amax_floor=1e-10 layout=columns", None),
    ("tensor apply=reciprocal", 0.0123),
)


QUANTISED = [("one_shot", 1, None), ("one_shot", 64, None)]
QUANTISED += [(kind, tokens, output) for kind in KINDS[1:] for tokens, output in ((7, None), (1024, 1), (2047, None))]


def quantised(run: Run, kind: str, tokens: int, output: int | None, turns: int = 40) -> tuple:
    """FP8 results, the ranks out of step, against native's quantisation of the norm of the same
    kernel without.
    """
    ws, prints, delay = run.workspace(8192, BF16), [], random.Random(run.rank)
    case = Case(kind, tokens, options=() if kind == "one_shot" else (("protocol", "flags"),))
    precompile(run, [lambda: dry(run, case)])
    inputs = [draw(run, case, seed) for seed in (1, 2)]
    norms = [call(run, ws, case, data)[0] for data in inputs]
    rows = slice(None) if kind != "two_shot_sharded" else slice(*shard_of(run, tokens))
    for (text, number), with_norm in itertools.product(QUANTS, (False, True)):
        scale = None if number is None else torch.tensor([number], device=run.device)
        wanted = [quantize(norm, scale, text) for norm in norms]
        made = PreparedCall(ws, getattr(symm_mem, f"{kind}_launch"), output)
        quantization = Quantization(text, scale, with_norm)

        def one(turn: int, made: PreparedCall = made, quantization: Quantization = quantization) -> tuple:
            data = inputs[turn % 2]
            residual = data["residual"][rows]
            return made(data["x"], residual, NormSpec(data["weight"], EPS, case.bias, case.form), None, quantization)

        with symm_mem.compiling_only():
            one(0)
        run.gather(None)
        bad = torch.zeros((), dtype=torch.int64, device=run.device)
        for turn in range(turns):
            torch.cuda._sleep(delay.randrange(400_000) if delay.random() < 0.5 else 0)
            _, _, got, scales = one(turn)
            bad += (got.view(torch.uint8) != wanted[turn % 2][0].view(torch.uint8)).sum()
            bad += 0 if scales is None else (scales != wanted[turn % 2][1]).sum()
        ws.check(synchronize=True)
        if int(bad):
            raise AssertionError(f"{text}, with_norm {with_norm}: {int(bad)} numbers are not native's")
        prints.append(int(wanted[0][0].view(torch.uint8).sum()))
    return tuple(prints)


def shard_of(run: Run, tokens: int) -> tuple[int, int]:
    """The rows that this rank owns."""
    start = run.rank * rows_per_rank(tokens, run.world)
    return start, start + owned_rows(tokens, run.world, run.rank)


def missing_rank(run: Run) -> None:
    """A rank that does not come: the others raise in time, name it, and go on with a new workspace."""
    missing = run.world - 1
    for case in (Case("one_shot", 4, 2880), Case("two_shot", 40, 2880), MIX[2]):
        run.drop()
        ws, data = run.workspace(2880, BF16, timeout_s=1.0), draw(run, case, 1)
        run.gather(None)
        precompile(run, [lambda case=case: dry(run, case)])
        call(run, ws, case, data)
        ws.check(synchronize=True)
        run.gather(None)
        if run.rank != missing:
            start = time.monotonic()
            norm, _ = call(run, ws, case, data)
            try:
                ws.check(synchronize=True)
            except PeerTimeoutError as error:
                if f"rank {missing} " not in str(error):
                    raise AssertionError(f"blames another rank: {error}") from None
            else:
                raise AssertionError("no error")
            took = time.monotonic() - start
            if not 0.9 < took < 4:
                raise AssertionError(f"took {took:.1f} s to give up")
            if not norm.isnan().any():
                raise AssertionError("rows that did not arrive are not NaN")
        run.gather(None)
    run.drop()
    data = draw(run, MIX[0], 5)
    norm, kept = call(run, run.workspace(2880, BF16), MIX[0], data)
    run.ws.check(synchronize=True)
    compare(run, MIX[0], data, norm, kept)


# --- Timing -------------------------------------------------------------------------------------------------


def timed(run: Run, function, calls: int, replays: int) -> float:
    """Microseconds a call: a CUDA graph of `calls` calls, median over replays, largest over ranks."""
    for i in range(2):
        function(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for i in range(calls):
            function(i)
    times = []
    run.gather(None)
    for _ in range(replays + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / calls)
    return max(run.gather(statistics.median(times[2:])))


def power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def sweep_configs(kind: str, tokens: int, ws: SymmMemWorkspace, world: int) -> list[LaunchConfig]:
    """Launch parameters worth a try."""
    packets, sms = ws.layout.packets, ws.multiprocessors
    rows = tokens if kind == "one_shot" else rows_per_rank(tokens, world)
    configs = []
    if kind in ("one_shot", "data"):
        for slices, halve, unroll in itertools.product((1, 2, 4, 8), (1, 2), (1, 2, 4, 8)):
            block = max(32, power_of_two(-(-packets // slices)))
            warps = max(1, min(32, block // 32) // halve)
            groups = max(1, min(rows, sms // slices))
            if kind == "one_shot" and unroll == 1:
                configs.append(LaunchConfig(groups * slices, warps, block, slices))
            elif kind == "data" and halve == 1:
                configs.append(LaunchConfig(sms, min(16, warps), block, slices, unroll))
    else:
        base = launch_config_two_shot_flags(rows, packets, world, sms, True)
        for warps, per in ((4, 4), (8, 2), (16, 1), (32, 1)):
            strides = -(-rows // (sms * per))
            for lookahead, result_lag in ((1, 0), (1, 1), (2, 1)):
                programs = -(-rows // strides)
                new = {"programs": programs, "warps": warps, "lookahead": max(1, min(lookahead, strides))}
                new["result_lag"] = result_lag
                configs.append(dataclasses.replace(base, block=max(base.block, 32 * warps), **new))
    rest = 2 if kind == "data" else 1
    kernel = ONE_SHOT_KERNEL if kind == "one_shot" else ""
    configs = [p for p in dict.fromkeys(configs) if check_launch_config(p, packets, sms, kernel) is None]
    return [p for p in configs if p.slices * rows <= rest * sms or p.slices == 1]


def candidates(run: Run, ws: SymmMemWorkspace, tokens: int, sets: list[dict]) -> dict:
    """Functions to time, by (name, config or None)."""
    found = {}
    shard = rows_per_rank(tokens, run.world)
    own = slice(run.rank * shard, (run.rank + 1) * shard)

    def add(name: str, kind: str, configs: list, **options) -> None:
        for config in [None, *configs]:

            def function(i: int, config=config) -> None:
                s = sets[i % len(sets)]
                outs = {"norm_out": s["norm"], "residual_out": s["kept"]}
                residual = s["residual"]
                if kind == "two_shot_sharded":
                    residual, outs["residual_out"] = residual[own], s["kept"][:shard]
                if "output" in options:
                    outs.pop("norm_out" if kind == "two_shot_sharded" else "residual_out")
                getattr(symm_mem, kind)(
                    ws, s["x"], residual, NormSpec(s["weight"], EPS, 0.0, SCALE), **outs, **options, config=config
                )

            found[(name, config)] = function

    configs = {kind: [] for kind in ("one_shot", "data", "flags")}
    if run.args.sweep:
        configs |= {kind: sweep_configs(kind, tokens, ws, run.world) for kind in run.args.sweep}
    if tokens <= ws.layout.one_shot_tokens:
        add("one_shot", "one_shot", configs["one_shot"])
    if tokens <= ws.layout.data_tokens:
        add("data sharded", "two_shot_sharded", configs["data"], protocol="data")
        add("data full", "two_shot", configs["data"], protocol="data")
    add("flags sharded", "two_shot_sharded", configs["flags"], protocol="flags", output=0)
    add("flags full", "two_shot", configs["flags"], protocol="flags", output=0)
    inner = NormSpec(sets[0]["weight"], EPS, 0.0, SCALE)
    if tokens <= ws.layout.one_shot_tokens:
        add("one_shot inner", "one_shot", [], inner=inner)
    if tokens <= ws.layout.data_tokens:
        add("data full inner", "two_shot", [], protocol="data", inner=inner)
    add("flags full inner", "two_shot", [], protocol="flags", output=0, inner=inner)
    add("flags sharded copy", "two_shot_sharded", [], protocol="flags")
    add("flags full copy", "two_shot", [], protocol="flags")
    return found


def peer_copies(run: Run, ws: SymmMemWorkspace, tokens: int, sets: list[dict]):
    """As many bytes as a two-shot pushes, copied to all peers at once."""
    rows = max(1, 2 * tokens // run.world)
    at = ws.layout.offsets["inbox"] // ws.dtype.itemsize
    peers = [r for r in range(run.world) if r != run.rank]
    streams = [torch.cuda.Stream() for _ in peers]

    def function(i: int) -> None:
        current = torch.cuda.current_stream()
        for stream, peer in zip(streams, peers, strict=True):
            target = ws._handle.get_buffer(peer, (rows, ws.hidden), ws.dtype, at)
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                target.copy_(sets[i % len(sets)]["x"][:rows])
        for stream in streams:
            current.wait_stream(stream)

    return function


def peer_pushes(run: Run, ws: SymmMemWorkspace, tokens: int, sets: list[dict]):
    """The same bytes by a kernel's stores."""
    from fusewire.custom_ops.providers.symm_mem.kernels.peer_copy import push_to_peers

    rows = max(1, 2 * tokens // run.world)
    parts = [s["x"][:rows].view(torch.uint8).reshape(-1) for s in sets]
    return lambda i: push_to_peers(ws, parts[i % len(parts)], ws.layout.offsets["inbox"])


def bench(run: Run) -> None:
    def tail(total, residual, weight):
        kept = total + residual
        wide = kept.float()
        norm = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        return (norm * weight.float()).to(kept.dtype), kept

    fused_tail = torch.compile(tail, dynamic=True)
    rows = []
    for hidden, tokens in itertools.product(run.args.hidden, run.args.tokens):
        made = run.step(
            "workspace",
            f"{tokens}x{hidden}",
            lambda h=hidden: (
                run.workspace(h, BF16, max_tokens=max(run.args.tokens), data_tokens=run.args.data_tokens).rank * 0
            ),
        )
        if made:
            rows += bench_one(run, hidden, tokens, fused_tail)
    if run.rank == 0:
        with (run.out / "bench.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["world", "hidden", "tokens", "name", "config", "us"])
            writer.writerows(rows)


def bench_one(run: Run, hidden: int, tokens: int, fused_tail) -> list[tuple]:
    ws = run.ws
    size = tokens * hidden * 2
    # x, residual and two outputs a set; the L2 (50 MB) must not hold what the next call reads.
    count = min(128, max(2, -(-(200 << 20) // (4 * size))))
    calls, replays = max(8, count), 9
    sets = []
    for _ in range(count):
        x = torch.randn(tokens, hidden, device=run.device).to(BF16)
        sets.append({"x": x, "residual": x * 0.5, "norm": torch.empty_like(x), "kept": torch.empty_like(x)})
        sets[-1]["weight"] = torch.ones(hidden, device=run.device, dtype=BF16)
    found = candidates(run, ws, tokens, sets)
    run.step(
        "compile",
        f"{tokens}x{hidden}",
        lambda: precompile(run, [lambda f=f: f(0) for f in found.values()]),
    )

    def reduce(i: int) -> torch.Tensor:
        x = sets[i % count]["x"]
        dist.all_reduce(x, op=dist.ReduceOp.AVG)  # an average, so that repetition does not overflow
        return x

    def compiled(i: int) -> None:
        s = sets[i % count]
        fused_tail(reduce(i), s["residual"], s["weight"])

    everything = {("NCCL", None): reduce, ("compiled", None): compiled, **found}
    everything["p2p copy", None] = peer_copies(run, ws, tokens, sets)
    everything["p2p kernel", None] = peer_pushes(run, ws, tokens, sets)
    rows, best = [], {}
    for (name, config), function in everything.items():

        def work(name: str = name, config: LaunchConfig | None = config, function=function) -> None:
            us = timed(run, function, calls, replays)
            ws.check()
            rows.append((run.world, hidden, tokens, name, str(config or ""), f"{us:.2f}"))
            best.setdefault(name, []).append((us, config))

        if not run.step("timing", f"{tokens}x{hidden} {name} {config or ''}", work):
            break
        run.log.write(f"{rows[-1]}\n")
    floor = 2 * (run.world - 1) / run.world * size / 450e9 * 1e6
    texts = [f"{name} {times[0][0]:.1f}" + best_of(times) for name, times in best.items()]
    run.say(f"{tokens:5d} x {hidden}  floor {floor:.1f} | " + " | ".join(texts))
    return rows


def best_of(found: list) -> str:
    us, config = min(found, key=lambda pair: pair[0])
    if config is None or us > 0.98 * found[0][0]:
        return ""
    parts = [f"{k}{v}" for k, v in dataclasses.asdict(config).items() if k != "block"]
    return f" (best {us:.1f}: {' '.join(parts)})"


def host_overhead(run: Run) -> None:
    """Host time of a prepared call outside CUDA graphs, queue empty before."""
    case = Case("one_shot", 1)
    ws, data = run.workspace(8192, BF16), draw(run, case, 1)
    norm = NormSpec(data["weight"], EPS, 0.0, SCALE)
    for kind in KINDS[:2]:
        precompile(run, [lambda kind=kind: dry(run, dataclasses.replace(case, kind=kind))])
        prepared = PreparedCall(ws, getattr(symm_mem, f"{kind}_launch"))
        for _ in range(2):
            prepared(data["x"], data["residual"], norm)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(200):
            prepared(data["x"], data["residual"], norm)
        took = (time.perf_counter() - start) / 200 * 1e6
        ws.check(synchronize=True)
        run.say(f"host time of {kind}: {max(run.gather(took)):.1f} us a call")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    numbers = {"type": lambda text: [int(n) for n in text.split(",")]}
    parser.add_argument("--out", default="symm_mem_check", help="folder for the logs and the CSV files")
    parser.add_argument("--bench", action="store_true", help="time instead of checking")
    kinds = ("one_shot", "data", "flags")
    parser.add_argument(
        "--sweep", nargs="*", choices=kinds, help="with --bench: launch parameters of these kernels too"
    )
    parser.add_argument("--quick", action="store_true", help="fewer hidden sizes")
    parser.add_argument("--limit", type=float, default=180.0, help="seconds that one step may take")
    parser.add_argument("--hidden", default=[8192], **numbers)
    parser.add_argument("--data-tokens", type=int, default=1024, help="with --bench: most tokens for data as flag")
    parser.add_argument("--tokens", default=[2**i for i in range(14)], **numbers)
    args = parser.parse_args()
    join(2 * args.limit)
    args.cpu_group = dist.new_group(backend="gloo", timeout=timedelta(seconds=2 * args.limit))
    run, start = Run(args), time.monotonic()
    if args.bench:
        bench(run)
        run.step("host", "overhead", lambda: host_overhead(run))
    else:
        correctness(run)
    run.report()
    run.say(f"{time.monotonic() - start:.0f} s")
    if run.dead:
        os._exit(1)
    run.drop()
    dist.destroy_process_group()
    return int(not all(ok for _, _, ok, _ in run.results))


if __name__ == "__main__":
    sys.exit(main())
