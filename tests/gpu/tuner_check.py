"""The tuner on real GPUs: measure, load in new processes, and choose by the table. Run with torchrun:

    torchrun --nproc-per-node 4 tests/gpu/tuner_check.py
    torchrun --nproc-per-node 4 tests/gpu/tuner_check.py --hidden 8192 --picture tuned.png

In two runs of itself on the same GPUs, with one cache folder: the first measures a table and says how many seconds it
took, and how far its times are from the shipped ones; the second finds it on disk, and holds every choice of the
dispatcher, its results (against the provider rank_ordered) and fusewire.workspaces() against it. Between them one rank's
table is damaged, which must change nothing. Last, tuning at first use: prepare(..., tune=True), inside a process that
then captures the calls in a CUDA graph. Exits with 1 if a check failed. Nothing waits for ever.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import harness
import torch
import torch.distributed as dist

import fusewire
from fusewire.cli import tune as command
from fusewire.custom_ops.dispatch import cost_model, cost_tables, table_store, table_vote
from fusewire.custom_ops.dispatch import dispatcher as dispatch
from fusewire.custom_ops.dispatch.decisions import Decision
from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm as op
from fusewire.custom_ops.ops.norms import NormSpec, normalize
from fusewire.custom_ops.tuning import tuner

EPS = 1e-5
BF16 = torch.bfloat16
COUNTS: Counter[str] = Counter()


def verdict(name: str, ok: bool, detail: str = "") -> None:
    """Count a case on all ranks together, and say what failed."""
    flag = torch.tensor(int(not ok), device="cuda")
    dist.all_reduce(flag)
    COUNTS["failed" if int(flag) else "passed"] += 1
    if not ok:
        print(f"FAIL rank {dist.get_rank()} {name} {detail}", flush=True)


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def join(args: argparse.Namespace) -> dist.ProcessGroup:
    harness.join(args.limit)
    group = dist.group.WORLD
    assert group is not None
    return group


def measure(group: dist.ProcessGroup, args: argparse.Namespace) -> None:
    """Twice: what providers and Triton compile at their first use is not the tuner's time, but is the user's."""
    for attempt in ("first", "again"):
        start = time.monotonic()
        tuned = tuner.tune(group, args.hidden, BF16, max_tokens=args.max_tokens)
        took = time.monotonic() - start
        say(f"{attempt}: {took:.1f} s in all, {tuned.table.seconds:.1f} s by the table")
        if attempt == "again":
            verdict("under 30 seconds", took < 30, f"{took:.1f} s")
    table = tuned.table
    say(command.as_text(tuned))
    verdict("saved", not tuned.problem and table_store.load(table.key).table == table, tuned.problem)
    verdict("nothing was left out", not table.rejected, str(table.rejected))
    verdict("own kernels were measured", {cost_tables.SYMM_ONE_SHOT, cost_tables.SYMM_TWO_SHOT} <= set(table.times))
    verdict("every size was measured", not table.notes, str(table.notes))
    verdict("links were measured", table.link_rate is not None)
    verdict("driver and links are known", "unknown" not in (table.key.driver, table.key.links), str(table.key))
    verdict("workspaces are gone", fusewire.workspaces() == [])
    free = torch.cuda.mem_get_info()[0]
    tuner.tune(group, args.hidden, BF16, tokens=(1, 64), save=False)
    torch.cuda.empty_cache()
    lost = (free - torch.cuda.mem_get_info()[0]) >> 20
    verdict("memory comes back", lost < 256, f"{lost} MiB are missing")
    if args.picture and dist.get_rank() == 0:
        command.draw([table], args.picture)
    compare(table)


def compare(table: table_store.Table) -> None:
    """How far from the shipped table, where there is one for this machine: for people, not a check."""
    shipped = cost_model.find_cost_model(table.key.gpu, table.key.world_size, table.key.hidden, BF16)
    for label, points in table.times.items():
        ratios = [us / cost for tokens, us in points if (cost := shipped.cost(label, tokens))]
        if ratios:
            say(f"{label}: {min(ratios):.2f} to {max(ratios):.2f} times the shipped table's ({shipped.source})")


def damage(table_file: Path) -> None:
    table_file.write_text("not a table")


def use(group: dist.ProcessGroup, args: argparse.Namespace) -> None:
    """A new process: one rank's disk holds garbage, which the others make up for."""
    key = table_store.local_key(group.size(), args.hidden, BF16)
    assert key is not None
    known = table_store.load(key).table
    verdict("the table is found", known is not None)
    dist.barrier()
    own = Path(args.folder) / f"rank{dist.get_rank()}"
    os.environ[table_store.CACHE_VARIABLE] = str(own)
    assert known is not None
    path = table_store.save(known)
    if dist.get_rank() == group.size() - 1:
        damage(path)
    limits: dict[str, int] = {}
    for tokens in tuner.token_grid(args.max_tokens):
        decided = call_and_check(group, args, tokens)
        label = decided.bound[2] if decided.bound else decided.provider.name
        for info in fusewire.workspaces():
            limits[info.provider] = info.max_tokens
        times = {name: dict(points).get(tokens) for name, points in known.times.items()}
        able = {
            name: us
            for name, us in times.items()
            if us is not None and (name == "native" or tokens <= limits.get(name.partition("/")[0], 0))
        }
        cost = known.cost_model().cost(label, tokens)
        best = min(able.values())
        verdict(f"{tokens} tokens: {label}", cost is not None and cost <= best * 1.0001, f"{cost} us, best {able}")
    told = [info.table for info in fusewire.workspaces()]
    verdict("the table is named", all("tuned on this machine" in text for text in told), str(told))
    verdict(
        "the damaged file is named", any(f"rank(s) {group.size() - 1} had none" in text for text in told), str(told)
    )


def call_and_check(group: dist.ProcessGroup, args: argparse.Namespace, tokens: int) -> Decision:
    """One call through the dispatcher, held against the reference; how it was decided."""
    own = torch.Generator("cuda").manual_seed(dist.get_rank())
    shared = torch.Generator("cuda").manual_seed(99)
    x = torch.randn(tokens, args.hidden, generator=own, device="cuda").to(BF16)
    residual = torch.randn(tokens, args.hidden, generator=shared, device="cuda").to(BF16)
    weight = torch.randn(args.hidden, generator=shared, device="cuda").to(BF16)
    call = (x, residual, weight, EPS, 0.0, "scale_then_round", group.group_name)
    norm, summed = op(*call)
    _, exact = op(*call, policy="rank_ordered")
    close = torch.allclose(summed.float(), exact.float(), atol=0.1, rtol=0.02)
    wanted = normalize(summed.double(), NormSpec(weight.double(), EPS, 0.0, "scale_then_round"))
    ulps = (norm.double() - wanted).abs() / (wanted.abs() * torch.finfo(BF16).eps + 1e-6)
    verdict(f"{tokens} tokens: result", close and float(ulps.max()) < 3, f"{float(ulps.max()):.2f} ulps")
    return dispatch.decide(op, call, "")


def first_use(group: dist.ProcessGroup, args: argparse.Namespace) -> None:
    """Tuning in prepare, then calls in a CUDA graph; and a rank that does not ask."""
    os.environ[table_store.CACHE_VARIABLE] = f"{args.folder}/first use"
    hidden = 1024
    infos = fusewire.prepare(None, hidden, BF16, max_tokens=64, tune=dist.get_rank() == 0)
    verdict("nobody tunes", all("nobody tunes" in info.table for info in infos if info.max_tokens), str(infos))
    start = time.monotonic()
    infos = fusewire.prepare(None, hidden, BF16, max_tokens=64, tune=True)
    say(f"prepare(..., max_tokens=64, tune=True): {time.monotonic() - start:.1f} s")
    verdict(
        "prepare tunes", all("tuned on this machine" in info.table for info in infos if info.max_tokens), str(infos)
    )
    verdict("workspaces stay", any(info.max_tokens >= 64 for info in infos))
    x = torch.ones(16, hidden, device="cuda", dtype=BF16)
    call = (x, x, x[0].clone(), EPS, 0.0, "scale_then_round", group.group_name)
    eager = [tensor.clone() for tensor in op(*call)]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        captured = op(*call)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    verdict("a graph after tuning", all(map(torch.equal, eager, captured)))
    again = fusewire.prepare(None, hidden, BF16, max_tokens=64, tune=True)
    verdict("not twice", [info.table for info in again] == [info.table for info in infos])
    agreed = table_vote.agreed_cost_model(group, hidden, BF16)
    verdict("one plan", agreed is not None)
    del graph, captured


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--max-tokens", type=int, default=8192)
    parser.add_argument("--limit", type=float, default=400.0, help="seconds that one part may take")
    parser.add_argument("--picture", help="draw the table to this file")
    parser.add_argument("--part", choices=("measure", "use", "first_use"), help="one part, in this process")
    parser.add_argument("--folder", help="for the tables")
    args = parser.parse_args()
    if torch.cuda.device_count() < 2 or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        print("skipped: needs two GPUs or more, and torchrun with a rank for each")
        return 0
    if args.part is None:
        return parts(args)
    faulthandler.dump_traceback_later(args.limit, exit=True)  # never hang: say where, and end
    os.environ[table_store.CACHE_VARIABLE] = f"{args.folder}/tuned"
    group = join(args)
    {"measure": measure, "use": use, "first_use": first_use}[args.part](group, args)
    say(f"{args.part}, {group.size()} GPUs: {dict(COUNTS)}")
    fusewire.close(captured=True)
    dist.destroy_process_group()
    return int(bool(COUNTS["failed"]))


def parts(args: argparse.Namespace) -> int:
    """Each part in a process of its own, on this rank's GPU: torchrun's variables pass on to it."""
    port, rank = int(os.environ["MASTER_PORT"]), os.environ["RANK"]
    folder = Path(tempfile.gettempdir()) / f"fusewire-tuner-check-{os.environ.get('TORCHELASTIC_RUN_ID', '')}-{port}"
    failed = []
    for number, part in enumerate(("measure", "use", "first_use")):
        # Rank 0 of the part keeps the store itself: the agent's has the keys of the part before.
        environment = {
            **os.environ,
            "MASTER_PORT": str(port + 101 + number),
            "TORCHELASTIC_USE_AGENT_STORE": "False",
        }
        command_line = [sys.executable, __file__, "--part", part, "--folder", str(folder), "--hidden", str(args.hidden)]
        command_line += ["--max-tokens", str(args.max_tokens), "--limit", str(args.limit)]
        command_line += [] if args.picture is None else ["--picture", args.picture]
        done = subprocess.run(command_line, env=environment, timeout=args.limit + 60)
        if done.returncode:
            failed.append(f"{part} (exit status {done.returncode})")
    if rank == "0":
        print("FAILED: " + ", ".join(failed) if failed else "all parts passed", flush=True)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
