"""Time all-reduce + residual add + RMSNorm by fusewire and every peer that is installed, at every size.

    torchrun --nproc-per-node 4 examples/benchmarks/peers.py --out results
    ... --hidden 8192 --tokens 1,512,8192 --rounds 7 --seconds 200
    torchrun --nproc-per-node 2 examples/benchmarks/peers.py --cpu --tokens 1,64 --hidden 256  # without a GPU
    python examples/benchmarks/peers.py --from results/peers.csv --out results  # tables and pictures again
    python examples/benchmarks/peers.py --from results/peers.csv --cost-tables  # as fusewire ships them

Prints markdown tables, and whether fusewire meets its limits. Writes peers.csv, peers.json, peers.md
and a picture for each hidden size.

Every candidate is compared with the sum in rank order and RMSNorm in float64, before it is timed and,
as captured, after. A candidate that is wrong or cannot be set up is listed with its reason. Times are
of CUDA graph replays. At each size all candidates take turns, round after round. Inputs and outputs
rotate through more memory than the L2 cache holds. The median of the rounds counts on each rank,
and the slowest rank. Every wait has a limit. NVLink multicast stays off, for NCCL too.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

# A failure of NVLink multicast can take a machine's GPUs out of service.
os.environ["NCCL_NVLS_ENABLE"] = "0"
os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
os.environ.setdefault("FUSEWIRE_TIMEOUT_S", "180")

import peers_report
import torch
import torch.distributed as dist
from peers_measuring import Run
from peers_report import Row

from fusewire.custom_ops.coordination.vote import describe
from fusewire.custom_ops.dispatch import table_store

TOKENS = tuple(1 << power for power in range(14))
HIDDEN = (4096, 5120, 7168, 8192)


# --- The command --------------------------------------------------------------------------------------------


def facts_of(run: Run, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a reader needs for a comparison: versions, devices, date, options."""
    machine = table_store.machine_facts(run.device)
    known = {name: machine[name] for name in ("gpu", "driver", "links", "versions")}
    date = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return {**known, "date": date, "world_size": run.group.size(), "options": dict(options), "notes": run.notes}


def numbers(text: str) -> list[int]:
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise argparse.ArgumentTypeError("numbers must be positive")
    return found


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tokens", type=numbers, default=list(TOKENS), metavar="1,2,...", help="default: 1, 2, 4, ..., 8192")
    add("--hidden", type=numbers, default=list(HIDDEN), metavar="4096,...", help="default: 4096,5120,7168,8192")
    add("--rounds", type=int, default=5, help="turns of each candidate at each size (default %(default)s)")
    add("--seconds", type=float, default=900.0, help="begin no size that would end later (default %(default)s)")
    add("--limit", type=float, default=1000.0, help="end the process if one step takes so many seconds")
    add(
        "--without",
        type=lambda text: text.split(","),
        default=[],
        metavar="TEXT,...",
        help="leave out candidates so named",
    )
    add("--out", type=Path, metavar="DIR", help=f"where to write at most {peers_report.MOST_FILES} files")
    add("--no-pictures", action="store_true", help="write no PNG files")
    add("--cpu", action="store_true", help="on gloo ranks, by the wall clock: says nothing about GPUs")
    add("--from", nargs="+", type=Path, dest="files", metavar="CSV", help="measure nothing: report on these files")
    add("--cost-tables", action="store_true", help="with --from: print entries for fusewire's cost_tables.py")
    options = parser.parse_args(argv)
    if options.cost_tables and not options.files:
        parser.error("--cost-tables needs --from")
    if options.rounds < 1 or options.seconds <= 0:
        parser.error("--rounds and --seconds must be positive")
    bad = [h for h in options.hidden if h % 8]
    if bad:
        parser.error(f"--hidden {bad[0]}: kernels take multiples of 8")
    # The order of hidden sizes matters if the time runs out.
    options.tokens, options.hidden = sorted(set(options.tokens)), list(dict.fromkeys(options.hidden))
    if options.out and not options.no_pictures and not options.files:
        try:
            peers_report.check_files(1, len(options.hidden))
        except ValueError as error:
            parser.error(str(error))
    return options


def report_on(options: argparse.Namespace) -> int:
    """Write the report again from files that were measured before."""
    try:
        rows = [row for file in options.files for row in peers_report.read_csv(file)]
        found = {(row.world_size, row.hidden) for row in rows}
        if not options.no_pictures:
            peers_report.check_files(1, len(found))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    facts: dict[str, Any] = {"gpu": "as in the files", "notes": [f"from {', '.join(map(str, options.files))}"]}
    beside = options.files[0].with_suffix(".json")
    if len(options.files) == 1 and beside.exists():
        facts = {k: v for k, v in peers_report.json.loads(beside.read_text()).items() if k not in ("rows", "bars")}
    print(peers_report.cost_tables(rows, facts) if options.cost_tables else peers_report.report(rows, facts))
    if options.out:
        for problem in peers_report.save(rows, facts, options.out, not options.no_pictures):
            print(problem, file=sys.stderr)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if options.files:
        return report_on(options)
    if "RANK" not in os.environ:
        print("start it with torchrun, e.g. torchrun --nproc-per-node 4 examples/benchmarks/peers.py", file=sys.stderr)
        return 2
    if not options.cpu and not torch.cuda.is_available():
        print("no CUDA GPU here; --cpu runs the logic on gloo ranks", file=sys.stderr)
        return 2
    limit = timedelta(seconds=options.limit)
    if options.cpu:
        device, cpu_group = torch.device("cpu"), None
        torch.set_num_threads(1)
        dist.init_process_group("gloo", timeout=limit)
    else:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        device = torch.device("cuda", torch.cuda.current_device())
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=limit)
        cpu_group = dist.new_group(backend="gloo", timeout=timedelta(seconds=60))
        dist.all_reduce(torch.zeros(1, device=device))
    asked = {name: str(value) for name, value in vars(options).items() if value is not None}

    def make(save: Callable[..., None], alive: Callable[[], None]) -> Run:
        settings = {"rounds": options.rounds, "seconds": options.seconds, "without": options.without}
        return Run(dist.group.WORLD, cpu_group, device, **settings, save=save, alive=alive)

    return bounded(options, make, asked)


def bounded(options: argparse.Namespace, make: Callable[..., Run], asked: Mapping[str, Any]) -> int:
    """Measure, and end in time in every case."""
    loud = dist.get_rank() == 0

    def save(rows: Sequence[Row], last: bool = False) -> None:
        if loud and options.out and rows:
            pictures = last and not options.no_pictures
            for problem in peers_report.save(rows, facts, options.out, pictures):
                run.note(problem)

    def alive() -> None:
        faulthandler.dump_traceback_later(options.limit, exit=True)

    run = make(save, alive)
    facts = facts_of(run, asked)
    failure = ""
    try:
        run.measure(options.hidden, options.tokens)
    except Exception as error:
        failure = f"the run ended early: {describe(error)}"
        run.note(failure)
    save(run.rows, last=True)
    if loud and run.rows:
        print(peers_report.report(run.rows, facts), flush=True)
    if failure:
        print(f"rank {dist.get_rank()}: {failure}", file=sys.stderr, flush=True)
        os._exit(3)  # kernels may wait for a peer, and an orderly end would wait for them
    with contextlib.suppress(Exception):
        dist.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()
    return 0 if run.rows else 1


if __name__ == "__main__":
    sys.exit(main())
