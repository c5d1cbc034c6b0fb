"""What ranks see when another is killed, stopped, skips a call, makes another one, or lacks
something while workspaces are made.

    python tests/gpu/fault_check.py                  # 2 GPUs; each case once, 4 minutes
    python tests/gpu/fault_check.py --times 20 --limit 5000
    python tests/gpu/fault_check.py --cpu            # 2 gloo ranks: the votes and the debug mode
    python tests/gpu/fault_check.py --one-gpu        # a late rank in replays; ranks are streams
    python tests/gpu/fault_check.py --case replay-kill --case stop
    FUSEWIRE_SHARED_GPU=1 python tests/gpu/fault_check.py   # ranks share one GPU (see harness)

The last rank misbehaves. Prints a line for each case as it ends. Every rank must end in time,
kernels give up after 2 s (where a rank is stopped for 5 s: 9 s; in the cases called "ended" after
600 s: there the end of the process has to be noticed), and every error must come from
fusewire, name the rank, and be one that `fusewire.check`, `fusewire.on_fault` and the next call
agree on. Exits with 1 if a case failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from harness import SHARED_GPU, all_reduce_norm, eighths, run_ranks, shorten_kernels

import fusewire
from fusewire.custom_ops.ops.norms import NormSpec
from fusewire.custom_ops.providers.symm_mem import launcher
from fusewire.custom_ops.workspaces import registry
from fusewire.custom_ops.workspaces.provider import PROVIDERS
from fusewire.errors import FusewireError

sys.path.append(str(Path(__file__).resolve().parents[1]))
from support.words import WordProvider

HIDDEN, TOKENS, CALLS_AFTER = 4096, {"one-shot": 4, "data": 200, "flags": 1200}, 4
DEBUG = {"FUSEWIRE_DEBUG_CALLS": "1"}


class Rank:
    """One rank of a case: its calls, what went wrong, and a file that the parent reads."""

    def __init__(self, rank, folder, tokens, gpu):
        self.rank, self.tokens, self.gpu = rank, tokens, gpu
        self.size, self.victim = dist.get_world_size(), rank == dist.get_world_size() - 1
        self.device, self.policy = ("cuda", "symm_mem") if gpu else ("cpu", "native")
        self.stop_s = 5.0 if gpu else 2.0
        self.dtype = torch.bfloat16 if gpu else torch.float32
        self.path = Path(folder) / f"rank{rank}"
        self.found: dict[str, Any] = {"wrong": 0, "lost": 0, "errors": [], "heard": []}
        self.weight = torch.ones(HIDDEN, device=self.device, dtype=self.dtype)
        self.graph, self.inputs, self.outputs = None, None, None
        fusewire.on_fault(lambda error: self.found["heard"].append(f"{type(error).__name__}: {error}"))

    def payload(self, call, rank, tokens=None, dtype=None):
        return eighths(tokens or self.tokens, HIDDEN, 3 * call + rank, dtype or self.dtype, self.device)

    def call(self, call, policy=None, **change):
        x = self.payload(call, self.rank, **change)
        weight = self.weight.to(x.dtype)
        return all_reduce_norm(x, None, weight, policy or self.policy)

    def check(self, call, results):
        """Count the rows that are neither right nor NaN, and those that are NaN."""
        if self.gpu:
            torch.cuda.synchronize()
        want = sum(self.payload(call, rank).float() for rank in range(self.size))
        got = results[1].float()
        nan = got.isnan().any(1) | results[0].isnan().any(1)
        self.found["lost"] += int(nan.sum())
        self.found["wrong"] += int(((got != want).any(1) & ~nan).sum())

    def warm_up(self, kernel_s):
        for call in range(3):
            self.check(call, self.call(call))
        if self.found["wrong"] or self.found["lost"]:
            raise RuntimeError(f"wrong before any fault: {self.found}")
        if self.gpu:
            shorten_kernels(kernel_s)
        dist.barrier()

    def capture(self):
        self.inputs = self.payload(0, self.rank)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = all_reduce_norm(self.inputs, None, self.weight, self.policy)
        for call in range(3):
            self.replay(call)
        dist.barrier()

    def replay(self, call):
        self.inputs.copy_(self.payload(call, self.rank))
        self.graph.replay()
        self.check(call, self.outputs)

    @contextlib.contextmanager
    def noted(self):
        """Note the error of the block."""
        try:
            yield
        except Exception as error:
            self.found["errors"].append(f"{type(error).__name__}: {error}"[:400])
            self.found["foreign"] = self.found.get("foreign", False) or not isinstance(error, FusewireError)

    def save(self):
        self.path.write_text(json.dumps(self.found))


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def stop(seconds):
    """Stop this process; another one continues it."""
    pid = os.getpid()
    if os.fork() == 0:
        time.sleep(seconds)
        os.kill(pid, signal.SIGCONT)
        os._exit(0)
    os.kill(pid, signal.SIGSTOP)


def job(rank, case, folder, tokens, gpu):
    me = Rank(rank, folder, tokens, gpu)
    me.warm_up(600.0 if case.endswith("ended") else me.stop_s + 4.0 if case in ("stop", "replay-stop") else 2.0)
    if case.startswith("replay"):
        me.capture()
    begin = getattr(Cases, case.replace("-", "_"))
    begin(me)
    refused = case in LACKS or (case in DIFFERS and os.environ.get("FUSEWIRE_DEBUG_CALLS") == "1")  # nothing launched
    if gpu and not me.victim and case not in ("none", "stop", "replay-stop") and not refused:
        wait_for(lambda: me.found["heard"], 5.0)  # a fault is noticed without a call
        with me.noted():
            fusewire.check()
    me.save()
    if (
        rank == 0 and "kill" not in case and "ended" not in case and case != "stop-for-good"
    ):  # the store lives in this process
        wait_for(lambda: all((Path(folder) / f"rank{other}").exists() for other in range(me.size)))


def wait_for(condition, seconds=8.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)


class Cases:
    """What the ranks do after the warm-up; the victim is the last rank."""

    @staticmethod
    def _go_on(me, first=10):
        for call in range(first, first + CALLS_AFTER):
            with me.noted():
                me.check(call, me.call(call))
            if me.found["errors"] and not me.gpu:
                return  # the next would wait again

    @staticmethod
    def none(me):
        Cases._go_on(me)

    @staticmethod
    def kill_before(me):
        if me.victim:
            die()
        Cases._go_on(me)

    @staticmethod
    def ended(me):
        Cases.kill_in(me)

    @staticmethod
    def kill_in(me):
        """The victim waits in the operation for the others when it is killed."""
        if me.victim:
            threading.Timer(0.5, die).start()
        else:
            time.sleep(1.0)
        Cases._go_on(me)

    @staticmethod
    def kill_after(me):
        with me.noted():
            me.check(10, me.call(10))
        if me.victim:
            die()
        Cases._go_on(me, 11)

    @staticmethod
    def stop(me):
        if me.victim:
            stop(me.stop_s)
        Cases._go_on(me)

    @staticmethod
    def stop_for_good(me):
        if me.victim:
            os.kill(os.getpid(), signal.SIGSTOP)
        Cases._go_on(me)

    @staticmethod
    def skip(me):
        """The victim leaves out a call. The next has other tokens, so the debug mode sees it."""
        if not me.victim:
            with me.noted():
                me.call(10)
        if not me.found["errors"]:
            with me.noted():
                me.call(11, tokens=2 * me.tokens)

    @staticmethod
    def count(me):
        with me.noted():
            me.call(10, tokens=2 * me.tokens if me.victim else None)
        Cases._end(me)

    @staticmethod
    def dtype(me):
        with me.noted():
            me.call(10, dtype=torch.float16 if me.victim else None)
        Cases._end(me)

    @staticmethod
    def path(me):
        other = "native" if me.gpu else "rank_ordered"
        with me.noted():
            me.call(10, policy=other if me.victim else None)
        Cases._end(me)

    @staticmethod
    def _end(me):
        """Make another call, which raises what the kernel of the one before found."""
        with me.noted():
            if me.gpu and not me.found["errors"]:
                me.call(11)
                torch.cuda.synchronize()

    @staticmethod
    def replay_kill(me):
        if me.victim:
            die()
        for call in range(10, 16):
            me.replay(call)
        with me.noted():
            me.call(16)

    @staticmethod
    def replay_ended(me):
        Cases.replay_kill(me)

    @staticmethod
    def replay_stop(me):
        if me.victim:
            stop(me.stop_s)
        for call in range(10, 16):
            me.replay(call)

    @staticmethod
    def _lacks(me, lack):
        """All ranks make a workspace anew, the victim with `lack`; then again without."""
        fusewire.close()
        device = torch.device("cuda", torch.cuda.current_device()) if me.gpu else torch.device("cpu")
        provider = PROVIDERS["symm_mem"] if me.gpu else WordProvider()

        def make():
            return registry.REGISTRY.open(provider, dist.group.WORLD, me.dtype, HIDDEN, device, lambda _: 2048)

        with lack(provider) if me.victim else contextlib.nullcontext():
            entry = make()
        me.found["errors"].append(entry.refusal)
        registry.REGISTRY.forget(entry.key)
        again = make()
        me.found["again"] = again.workspace is not None
        me.check(10, me.call(10))
        fusewire.close()

    @staticmethod
    def no_memory(me):
        @contextlib.contextmanager
        def lack(provider):
            if not me.gpu:
                with mock.patch.object(registry, "check_memory", side_effect=MemoryError("none is free")):
                    yield
                return
            torch.cuda.empty_cache()
            taken = torch.empty(torch.cuda.mem_get_info()[0] - (48 << 20), dtype=torch.uint8, device="cuda")
            yield
            del taken
            torch.cuda.empty_cache()

        Cases._lacks(me, lack)

    @staticmethod
    def no_import(me):
        def lack(provider):
            if me.gpu:
                return mock.patch.dict(sys.modules, {"triton": None})
            return mock.patch.object(provider, "machine", side_effect=ImportError("no module named triton"))

        Cases._lacks(me, lack)

    @staticmethod
    def no_compile(me):
        def lack(provider):
            target = (launcher, "kernel") if me.gpu else (provider, "self_test")
            return mock.patch.object(*target, side_effect=RuntimeError("the compiler failed"))

        Cases._lacks(me, lack)


KILLS = ("kill-before", "kill-in", "kill-after")
LACKS = ("no-memory", "no-import", "no-compile")
DIFFERS = ("skip", "count", "dtype", "path")


def judge(case, debug, gpu, found, statuses):
    """Return what is wrong with a case's outcome, or ""."""
    survivors = [found[rank] for rank in range(len(statuses) - 1)]
    victim = len(statuses) - 1
    if any(each is None for each in survivors):
        return f"a rank did not end: {statuses}"
    texts = [text for each in survivors for text in (*each["errors"], *each["heard"])]
    if any(each["wrong"] for each in survivors):
        return "wrong numbers"
    if case in ("none", "stop", "replay-stop"):
        lost = any(each["lost"] or each["errors"] for each in [*survivors, found[victim]] if each)
        return "an error although every rank came" if lost or statuses[victim] else ""
    if not texts:
        return "no error"
    if case in LACKS:
        every = [*survivors, found[victim]]
        alike = all(each and each.get("again") and len(set(each["errors"])) == 1 for each in every)
        alike = alike and len({each["errors"][0] for each in every}) == 1 and not any(each["lost"] for each in every)
        return "" if alike and f"rank {victim}" in texts[0] else "no refusal on every rank, or no workspace afterwards"
    if debug and case in DIFFERS:
        every = [*survivors, found[victim]]
        named = all(each and any("RankMismatchError" in text for text in each["errors"]) for each in every)
        return "" if named else "no RankMismatchError on every rank"
    if gpu and not any(f"rank {victim} " in text or "rank(s)" in text for text in texts):
        return "the error does not name the rank"
    if gpu and not debug and not all(each["heard"] for each in survivors):
        return "on_fault was not called"
    return ""


def plan(arguments):
    """(case, protocol, debug) in order."""
    if arguments.cpu:
        found = [(case, "data", True) for case in ("none", *KILLS, "stop", "stop-for-good", *LACKS, *DIFFERS)]
    else:
        found = [("none", "one-shot", False), ("kill-before", "flags", False), ("kill-after", "data", False)]
        found += [(case, protocol, False) for protocol in TOKENS for case in ("kill-in", "replay-kill")]
        found += [("ended", protocol, False) for protocol in TOKENS] + [("replay-ended", "one-shot", False)]
        found += [("stop", "data", False), ("replay-stop", "one-shot", False)]
        found += [("count", protocol, False) for protocol in ("one-shot", "flags")]
        found += [("stop-for-good", "one-shot", False), *((case, "data", False) for case in LACKS)]
        found += [(case, "data", debug) for case in DIFFERS for debug in (False, True)]
    if SHARED_GPU:  # the memory that a rank lacks would be missing on its peer as well
        found = [item for item in found if item[0] != "no-memory"]
    return [item for item in found if not arguments.case or item[0] in arguments.case]


def one_gpu():
    """Rank 0 replays a graph while rank 1 does not, which then comes late; return the number of
    failures."""
    import one_gpu_check as local

    from fusewire.custom_ops.coordination.watchdog import WATCHDOG
    from fusewire.custom_ops.providers.symm_mem import launcher
    from fusewire.custom_ops.providers.symm_mem.layout import CTL_LIMIT_NS
    from fusewire.custom_ops.providers.symm_mem.prepared_launch import PreparedCall

    torch.cuda.set_device(local.DEVICE)
    os.environ["FUSEWIRE_WATCHDOG_INTERVAL_S"] = "0.05"
    kinds = {4: launcher.one_shot_launch, 64: launcher.two_shot_launch, 600: launcher.two_shot_launch}
    failures, weight = 0, torch.ones(HIDDEN, device="cuda", dtype=torch.bfloat16)
    norm = NormSpec(weight, 1e-6, 0.0, "scale_then_round")

    def payload(tokens, call, rank):
        return eighths(tokens, HIDDEN, 3 * call + rank, torch.bfloat16, "cuda")

    def state(tokens, number, results):
        """Return whether the results are right, nan or wrong."""
        torch.cuda.synchronize()
        call = number % 8
        want = payload(tokens, call, 0).float() + payload(tokens, call, 1).float()
        nan = results[1].isnan() | results[0].isnan()
        if bool(nan.all()):
            return "nan"
        return "right" if bool(((results[1].float() == want) | nan).all()) else "wrong"

    for tokens, make in kinds.items():
        ranks, graphs, heard = local.make_ranks(2, HIDDEN, torch.bfloat16), [], threading.Event()
        # Made before: an allocation would wait for a kernel that waits for the other rank's launch.
        pool = [[payload(tokens, number, rank) for number in range(8)] for rank in range(2)]
        xs = [payload(tokens, 0, rank) for rank in range(2)]
        calls = [PreparedCall(ws, make) for ws, _ in ranks]
        with launcher.compiling_only():
            for call, x in zip(calls, xs, strict=True):
                call(x, None, norm)
        for (ws, stream), call, x in zip(ranks, calls, xs, strict=True):
            ws.ctl[CTL_LIMIT_NS], ws.timeout_s = int(1e9), 1.0
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                results = call(x, None, norm)
            graphs.append((graph, results))

        def replay(rank, number, pool=pool, ranks=ranks, graphs=graphs, xs=xs):
            with torch.cuda.stream(ranks[rank][1]):
                xs[rank].copy_(pool[rank][number % 8])
                graphs[rank][0].replay()

        remove = fusewire.on_fault(lambda error, heard=heard: heard.set())
        WATCHDOG.watch(ranks[0][0])
        found = []
        for number in range(3):
            for rank in range(2):
                replay(rank, number)
            found += [state(tokens, number, results) for _, results in graphs]
        replay(0, 3)  # rank 1 does not come
        noticed = heard.wait(8)
        found.append(state(tokens, 3, graphs[0][1]))
        begin = time.monotonic()
        for number in range(4, 104):
            replay(0, number)
        found.append(state(tokens, 103, graphs[0][1]))
        each_us = (time.monotonic() - begin) / 100 * 1e6
        late = []
        for number in range(3, 9):  # now rank 1 comes, for the same calls
            replay(1, number)
            late.append(state(tokens, number, graphs[1][1]))
        errors = [ws.fault() for ws, _ in ranks]
        ok = noticed and found[:6] == ["right"] * 6 and found[7] == "nan" and "wrong" not in found + late
        ok = ok and late[-1] == "nan" and all(errors) and each_us < 5000
        failures += not ok
        print(f"{'pass' if ok else 'FAIL'} {tokens} tokens: {found}, late rank {late}, {each_us:.0f} us a lost replay")
        print(f"     {[str(error)[:220] for error in errors]}", flush=True)
        remove()
        WATCHDOG.unwatch(ranks[0][0])
    return failures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="gloo ranks without GPUs")
    parser.add_argument("--one-gpu", action="store_true", help="both ranks as streams of one GPU")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--times", type=int, default=1, help="how often each case runs")
    parser.add_argument("--case", action="append", help="only these cases")
    parser.add_argument("--limit", type=float, default=290.0, help="seconds after which no further case begins")
    arguments = parser.parse_args()
    if arguments.one_gpu:
        return int(bool(one_gpu()))
    start, failed, passed, left = time.monotonic(), 0, 0, 0
    for time_number in range(arguments.times):
        for case, protocol, debug in plan(arguments):
            if time.monotonic() - start > arguments.limit - 18:
                left += 1
                continue
            begin = time.monotonic()
            with tempfile.TemporaryDirectory() as folder:
                environment = {**(DEBUG if debug else {}), "FUSEWIRE_TIMEOUT_S": "10"}
                environment["FUSEWIRE_WATCHDOG_INTERVAL_S"] = "0.1"
                given = (job, arguments.ranks, case, folder, TOKENS[protocol], not arguments.cpu)
                # After the end of a process kernels wait 5 s more, and some wait several times.
                limit_s = 50.0 if arguments.cpu or case.endswith("ended") else 18.0
                statuses = run_ranks(*given, gpu=not arguments.cpu, environment=environment, limit_s=limit_s)
                paths = [Path(folder) / f"rank{rank}" for rank in range(arguments.ranks)]
                found = [json.loads(path.read_text()) if path.exists() else None for path in paths]
            problem = judge(case, debug, not arguments.cpu, found, statuses)
            passed, failed = passed + (not problem), failed + bool(problem)
            print(
                f"{'pass' if not problem else 'FAIL'} {case}, "
                f"{protocol}{', debug' if debug else ''}, time {time_number + 1}, "
                f"{time.monotonic() - begin:.1f} s {problem}",
                flush=True,
            )
            for rank, each in enumerate(found):
                if each is not None:
                    first = (each["heard"] + each["errors"])[:1]
                    print(f"     rank {rank}: lost {each['lost']}, wrong {each['wrong']}, {first}", flush=True)
    print(f"{passed} passed, {failed} failed, {left} left out for want of time, {time.monotonic() - start:.0f} s")
    return int(bool(failed or left))


if __name__ == "__main__":
    sys.exit(main())
