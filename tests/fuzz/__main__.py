"""Random tensor-parallel programs, and what must hold of each one after fusewire's passes.

    python -m tests.fuzz --graphs 10000 --gloo 500 --differ 200     what runs every night
    python -m tests.fuzz --seed 1234 --show                         one program again, with its source and its graphs
    python -m tests.fuzz --seed 1234 --differ 1                     one program on ranks that differ, and what came of it

A seed makes a program: Python source of one to five layers, each an all-reduce, or a reduce-scatter and an all-gather,
with what follows. There are three kinds: layers of any form, layers of sequence parallelism, and chains of decoder-like
layers that hand one residual on. About half of the layers hold a *miss*, one thing that keeps the collective from being
fused or that must at least not change the result; the others must fuse. `check` compiles a program once, up to the
post-grad graph, runs the passes with several configurations over copies of that graph, and executes every copy operator
by operator: the results must be the same bit for bit. Where results stay in buffers, every call overwrites its buffer
with NaN first, and the graph is executed once more with everything computed as late as possible.

In one process the process groups are torch's fake ones, and two threads are their ranks (see ranks.py).

    program.py         what a program is, and every miss        ranks.py           process groups and their collectives
    text.py            source text of norms                     execute.py         compiles once, executes copies
    layers.py          layers around an all-reduce              check.py           configurations, and what must hold
    sequence.py        layers of sequence parallelism           compiled.py        code that Inductor has generated
    chains.py          decoder-like chains                      generate.py        from a seed to a program
    differ.py          ranks that differ
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # ranks and workers import this file as `fuzz`, and so must what is sent to them
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from fuzz.__main__ import main

    sys.exit(main())

import torch

from fuzz import differ as fuzz_differ
from fuzz.check import check, compare, configurations
from fuzz.execute import FUSED_OP, Compiled, Executor, Outcome, copy_of, module_of
from fuzz.generate import generate
from fuzz.program import EITHER, FUSED, MISSES, REFUSED, SEQUENCE_MISSES, Program, make_arguments
from fuzz.ranks import Ranks, groups
from support.distributed import RankPool, fake_group


@dataclass(frozen=True)
class Failure:
    """A program that failed, reduced to as few of its layers as still fail."""

    program: Program
    problems: tuple[str, ...]
    where: str

    def __str__(self) -> str:
        again = f"python -m tests.fuzz --seed {self.program.seed} --show{' --gloo 1' * (self.where == 'gloo')}"
        return "\n".join([f"seed {self.program.seed} fails ({again})", *self.problems, str(self.program)])


def run_in_process(seeds: Iterable[int]) -> tuple[list[Failure], Counter[str]]:
    """Check the programs of these seeds over fake process groups; returns the failures and a count of what was seen."""
    failures: list[Failure] = []
    seen: Counter[str] = Counter()
    with fake_group(2), groups() as ranks:
        for seed in seeds:
            program = generate(seed)
            for site in program.sites:
                seen[f"sites that are {site.expect}" if site.expect != EITHER else "sites that may be either"] += 1
                seen[f"miss: {site.miss}" if site.miss else "no miss"] += 1
            seen[f"programs: {program.kind}"] += 1
            if problems := check(program, ranks, seen):
                failures.append(_smallest(program, problems, ranks))
    return failures, seen


def _smallest(program: Program, problems: list[str], ranks: Ranks) -> Failure:
    """Leave out layers for as long as the program still fails."""
    layers = program.layers
    for index in program.layers:
        rest = tuple(i for i in layers if i != index)
        if rest and (fewer := check(generate(program.seed, rest), ranks)):
            layers, problems = rest, fewer
    return Failure(generate(program.seed, layers), tuple(problems), "fake group")


def run_on_rank(seeds: Sequence[int]) -> list[Failure]:
    """Check the programs of these seeds within the process group that this rank belongs to."""
    failures = []
    with groups() as ranks:
        for program in map(generate, seeds):
            if program.runs_on_ranks and (problems := check(program, ranks)):
                failures.append(Failure(program, tuple(problems), "gloo"))
    return failures


def run_on_gloo(pool: RankPool, seeds: Sequence[int], timeout_s: float = 300.0) -> list[Failure]:
    """Check the programs of these seeds on the pool's ranks."""
    return [failure for rank in pool.run(run_on_rank, list(seeds), timeout_s=timeout_s) for failure in rank]


def _work(seeds: Sequence[int]) -> tuple[list[Failure], Counter[str]]:
    torch.set_num_threads(1)
    return run_in_process(seeds)


def _in_chunks(seeds: Sequence[int], size: int) -> list[Sequence[int]]:
    return [seeds[i : i + size] for i in range(0, len(seeds), size)]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the number of failing programs, at most 1 as an exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz fusewire's passes.")
    parser.add_argument("--graphs", type=int, help="programs over fake process groups (default 1; 0 with --differ)")
    parser.add_argument("--gloo", type=int, default=0, help="programs executed on 2 gloo processes (default 0)")
    parser.add_argument("--differ", type=int, default=0, help="programs on 2 gloo processes that differ (default 0)")
    parser.add_argument("--seed", type=int, default=0, help="the first program's seed (default 0)")
    parser.add_argument("--jobs", type=int, default=1, help="processes for the fake groups (default 1)")
    parser.add_argument("--show", action="store_true", help="print each program, its graph and the rewritten graph")
    options = parser.parse_args(argv)
    start = time.perf_counter()
    graphs = options.graphs if options.graphs is not None else int(not options.differ)
    seeds = range(options.seed, options.seed + graphs)
    failures: list[Failure | fuzz_differ.Result] = []
    seen: Counter[str] = Counter()
    if options.show:
        _show(seeds)
    with multiprocessing.get_context("spawn").Pool(options.jobs) as workers:
        for done, (failed, counts) in enumerate(workers.imap_unordered(_work, _in_chunks(seeds, 50))):
            for failure in failed:
                print(f"{failure}\n", flush=True)
            failures += failed
            seen += counts
            print(f"{min(len(seeds), (done + 1) * 50)} of {len(seeds)} graphs, {len(failures)} failed", flush=True)
    if options.gloo:
        with RankPool(2) as pool:
            for chunk in _in_chunks(range(options.seed, options.seed + options.gloo), 20):
                failed = run_on_gloo(pool, chunk)
                for failure in failed:
                    print(f"{failure}\n", flush=True)
                failures += failed
                print(f"gloo: seeds up to {chunk[-1]}, {len(failures)} failed", flush=True)
    if options.differ:
        failed, counts = _differ(
            range(options.seed, options.seed + options.differ), options.show or options.differ == 1
        )
        failures += failed
        seen += counts
    for key in sorted(seen):
        print(f"{seen[key]:7d} {key}")
    print(f"{len(failures)} failures in {time.perf_counter() - start:.0f} s; seeds from {options.seed}")
    return int(bool(failures))


def _differ(seeds: Sequence[int], show: bool) -> tuple[list[fuzz_differ.Result], Counter[str]]:
    """Run programs on ranks that differ; prints those that fail, or all of them."""

    def tell(result: fuzz_differ.Result) -> None:
        print(f"{result}\n" if show or result.problems else f"seed {result.plan.seed}", flush=True)

    with RankPool(2) as pool:
        return fuzz_differ.run_seeds(pool, seeds, tell=tell)


def _show(seeds: Iterable[int]) -> None:
    with fake_group(2), groups() as ranks:
        for seed in seeds:
            program = generate(seed)
            print(program)
            compiled = Compiled(program, configurations(program), ranks)
            compiled.execute("before")
            for name in ("before", "operator", "default"):
                print(f"--- {name}\n{compiled.variants[name].text}")
            for entry in compiled.variants["default"].report.entries:
                print(entry)


__all__ = (
    "FUSED",
    "FUSED_OP",
    "MISSES",
    "REFUSED",
    "SEQUENCE_MISSES",
    "Compiled",
    "Executor",
    "Failure",
    "Outcome",
    "Program",
    "check",
    "compare",
    "copy_of",
    "fake_group",
    "generate",
    "groups",
    "main",
    "make_arguments",
    "module_of",
    "run_in_process",
    "run_on_gloo",
    "run_on_rank",
)
