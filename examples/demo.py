"""Run a trained model, tensor-parallel, compiled by plain Inductor and then with fusewire.

    python examples/demo.py --prompt "Why is the sky blue?"

SmolLM2-135M-Instruct runs on three ranks: on GPUs (NCCL) where there are three, else as CPU
processes (gloo). Each compiler gets fresh processes and an empty compile cache. Exit status: 0 if
every all-reduce was fused and texts and perplexities agree, 1 if not or if a rank failed, 2 if
something is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import smollm2

HERE = Path(__file__).resolve().parent
DEFAULT_PROMPT = "Why is the sky blue?"
DEFAULT_TEXT = HERE / "data" / "pride_and_prejudice.txt"
WINDOW_TOKENS, TEXT_TOKENS = 512, 4096
# Relative difference of the two perplexities that rounding explains.
PERPLEXITY_TOLERANCE = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 2e-2}
GRACE_SECONDS = 2.0


class RankError(Exception):
    """A rank failed; the message names it and has its error."""


# On a rank


def send(**event: Any) -> None:
    """Send an event to the parent. It has its own pipe, since libraries write to stdout and stderr."""
    line = json.dumps(event).encode() + b"\n"
    while line:
        line = line[os.write(int(os.environ["FUSEWIRE_DEMO_PIPE"]), line) :]


def rank_main(job: dict[str, Any]) -> None:
    """Run one job in this process, and send its result to the parent."""
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    try:
        send(result=_with_large_frame_stack(lambda: JOBS[job["name"]](job)))
        status = 0
    except smollm2.SetupError as error:
        send(setup_error=str(error))
        status = 2
    except BaseException:
        send(error=traceback.format_exc(), at=time.time())
        status = 1
    # Not sys.exit: a process group that has lost a rank can hang in its destructor, and freeing all
    # objects of a compilation takes seconds.
    os._exit(status)


def _leave_with_parent() -> None:
    sys.stdin.read()  # ends when the parent does, however it dies
    os._exit(1)


def _with_large_frame_stack(function: Callable[[], Any]) -> Any:
    """Call a function with a large chunk of CPython's frame stack.

    Since Python 3.11 frames lie in chunks of 16 KiB. A chunk is mapped when a call needs it and
    unmapped on return. Compilation does so over a million times here, which is a quarter of its
    time. A frame that declares a large stack gets a large chunk.
    """

    def call() -> Any:
        return function()

    if sys.implementation.name == "cpython" and sys.version_info >= (3, 11):
        call.__code__ = call.__code__.replace(co_stacksize=70_000)
    return call()


def prepare_job(job: dict[str, Any]) -> str:
    """Convert the model, once for each machine."""
    return str(smollm2.prepare(lambda stage: send(stage=stage)))


def model_job(job: dict[str, Any]) -> dict[str, Any]:
    """Load this rank's part of the model, compile it, generate text, and measure the perplexity."""
    send(stage="starting the ranks")
    import torch
    import torch.distributed as dist

    cuda = job["device"] == "cuda"
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    limit = timedelta(seconds=job["timeout"])
    store = dist.TCPStore("127.0.0.1", job["port"], is_master=False, timeout=limit)
    bound = {"device_id": device} if cuda else {}
    dist.init_process_group(
        "nccl" if cuda else "gloo", store=store, rank=rank, world_size=ranks, timeout=limit, **bound
    )
    send(stage="loading the model")
    model, tokenizer = smollm2.load(Path(job["model"]), getattr(torch, job["dtype"]), device)
    with torch.no_grad():
        result = _measure(job, model, tokenizer, device)
    dist.barrier()
    dist.destroy_process_group()
    return result


def _measure(job: dict[str, Any], model: Any, tokenizer: Any, device: Any) -> dict[str, Any]:
    import torch

    prompt = smollm2.chat_tokens(tokenizer, job["prompt"])
    text = list(tokenizer(Path(job["text_file"]).read_text(encoding="utf-8"))["input_ids"])
    limit = model.config.max_position_embeddings
    if len(prompt) + job["max_new_tokens"] > limit:
        raise smollm2.SetupError(
            f"{len(prompt)} tokens of prompt and {job['max_new_tokens']} new ones exceed the "
            f"model's {limit}; shorten the prompt or lower --max-new-tokens"
        )
    if len(text) < 2:
        raise smollm2.SetupError(f"{job['text_file']} has too little text for a perplexity: {len(text)} tokens")

    send(stage="compiling")
    # Only the length is dynamic. dynamic=True would make the norms' epsilons inputs of the graph too.
    compiled = torch.compile(model, backend=job["backend"], fullgraph=True)

    def forward(ids: torch.Tensor) -> torch.Tensor:
        return compiled(input_ids=ids, use_cache=False).logits

    ids = torch.tensor([prompt], device=device)
    torch._dynamo.mark_dynamic(ids, 1)
    cold, warm = _cost(lambda: forward(ids)), _cost(lambda: forward(ids))

    send(stage="generating")
    greedy = smollm2.greedy(
        forward, prompt, job["max_new_tokens"], tokenizer.eos_token_id, device, lambda at: send(detail=at)
    )
    send(stage="measuring perplexity")
    read = text[:TEXT_TOKENS]
    perplexity = smollm2.perplexity(forward, read, WINDOW_TOKENS, device, lambda at: send(detail=at))
    return {
        "tokens": greedy.tokens,
        "margins": greedy.margins,
        "words": [tokenizer.decode([token]) for token in greedy.tokens],
        "text": tokenizer.decode(greedy.tokens),
        "perplexity": perplexity,
        "text_tokens": [len(read), len(text)],
        "compile_seconds": cold[0] - warm[0],
        "compile_cpu_seconds": cold[1] - warm[1],
        "expected": smollm2.count_all_reduces(model) if int(os.environ["WORLD_SIZE"]) > 1 else 0,
        "report": _report() if job["backend"] == "fusewire" else None,
    }


def _cost(call: Callable[[], Any]) -> tuple[float, float]:
    """Return seconds by the clock, and seconds of CPU time with that of compilers started."""
    started, used = time.perf_counter(), sum(os.times()[:4])
    float(call()[0, -1, 0])  # reading a number back waits for the GPU
    return time.perf_counter() - started, sum(os.times()[:4]) - used


def _report() -> dict[str, Any]:
    import fusewire

    report = fusewire.report()
    fields = ("graph", "status", "spelling", "provider", "gate", "reason", "module", "location")
    entries = [{name: getattr(entry, name) for name in fields} for entry in report.entries]
    times = ("pass_seconds", "pass_processor_seconds", "waited_seconds")
    return {"entries": entries, **{name: sum(getattr(graph, name) for graph in report.graphs) for name in times}}


JOBS: dict[str, Callable[[dict[str, Any]], Any]] = {"prepare": prepare_job, "model": model_job}


# In the parent: start the ranks, show their progress, end them


class Progress:
    """A progress display: one line on a terminal; elsewhere a line for each stage and every 15 seconds."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.terminal = sys.stderr.isatty()
        self.stage, self.stage_start, self.printed = "", self.start, 0.0

    def show(self, stage: str, detail: str = "") -> None:
        """Show the stage, unless something was shown just before."""
        now = time.monotonic()
        new = stage != self.stage
        if new:
            self.stage, self.stage_start = stage, now
        if not new and now - self.printed < (0.2 if self.terminal else 15.0):
            return
        self.printed = now
        spent = f", {now - self.stage_start:.0f} s" if now - self.stage_start >= 1 else ""
        line = f"[{now - self.start:4.0f} s] {stage}{': ' + detail if detail else ''}{spent}"
        if self.terminal:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{line[:width]}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Clear the line for other output."""
        if self.terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


class Rank:
    """A process, and the events it has sent."""

    def __init__(self, number: int, job: dict[str, Any], environment: dict[str, str]) -> None:
        self.number = number
        self.stage, self.detail = "starting", ""
        self.result: Any = None
        self.error, self.setup_error, self.error_at = "", "", float("inf")
        self.tail: deque[str] = deque(maxlen=25)
        events, pipe = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--rank-job", json.dumps(job)],
            env={**environment, "FUSEWIRE_DEMO_PIPE": str(pipe)},
            pass_fds=(pipe,),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # so that the compilers it starts can be ended with it
        )
        os.close(pipe)
        self.readers = [threading.Thread(target=read, daemon=True) for read in (self._read_output, self._read_events)]
        self.events = os.fdopen(events, encoding="utf-8")
        for reader in self.readers:
            reader.start()

    def _read_output(self) -> None:
        assert self.process.stdout is not None
        self.tail.extend(line.rstrip() for line in self.process.stdout)

    def _read_events(self) -> None:
        for line in self.events:
            event = json.loads(line)
            if "stage" in event:
                self.stage, self.detail = event["stage"], ""
            self.detail = event.get("detail", self.detail)
            self.result = event.get("result", self.result)
            self.setup_error = event.get("setup_error", self.setup_error)
            self.error, self.error_at = event.get("error", self.error), event.get("at", self.error_at)

    def kill(self) -> None:
        """End the process and what it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for reader in self.readers:
            reader.join(timeout=5)

    def failure(self, lines: int) -> str:
        """Return how the process ended, and the last lines of its error or output."""
        status = self.process.returncode
        if status < 0:
            how = f"was killed by {signal.Signals(-status).name}"
            how += " (out of memory?)" if -status == signal.SIGKILL else ""
        else:
            how = f"ended with status {status}"
        last = (self.error.rstrip().splitlines() or list(self.tail))[-lines:]
        return "\n".join([f"rank {self.number} {how}, while {self.stage}", *(f"    {line}" for line in last)])


def launch(title: str, job: dict[str, Any], ranks: int, threads: int, cache: str, progress: Progress) -> list[Any]:
    """Run a job on every rank and return the results. If one fails or the time is over, end all.

    Raises:
        RankError: a rank failed, or the time limit passed.
        SetupError: something that the job needs is missing.
    """
    environment = {**os.environ, **_rank_environment(job["device"], threads), "WORLD_SIZE": str(ranks)}
    if cache:
        environment.update(TORCHINDUCTOR_CACHE_DIR=cache, TRITON_CACHE_DIR=f"{cache}/triton")
    started: list[Rank] = []
    deadline = time.monotonic() + job["timeout"]
    try:
        for number in range(ranks):
            own = {"RANK": str(number), "LOCAL_RANK": str(number)}
            started.append(Rank(number, job, {**environment, **own}))
        while any(rank.process.poll() is None for rank in started):
            progress.show(f"{title}: {started[0].stage}", started[0].detail)
            if any(rank.process.poll() for rank in started):
                time.sleep(GRACE_SECONDS)  # let the other ranks send their errors
                break
            if time.monotonic() > deadline:
                at = "; ".join(f"rank {rank.number} was {rank.stage} {rank.detail}".rstrip() for rank in started)
                raise RankError(f"{title}: not finished after {job['timeout']:.0f} s (--timeout). {at}")
            time.sleep(0.1)
        failed = [rank for rank in started if rank.process.poll()]
    finally:
        for rank in started:
            rank.kill()
        progress.clear()
    for rank in started:
        if rank.setup_error:
            raise smollm2.SetupError(rank.setup_error)
    failed = failed or [rank for rank in started if rank.result is None]
    if failed:
        # A rank that crashed sends no error, and the other ranks then fail too: show it first.
        failed.sort(key=lambda rank: (not (rank.process.returncode or 0) < 0, rank.error_at))
        texts = [rank.failure(25 if rank is failed[0] else 1) for rank in failed]
        raise RankError("\n".join([f"{title} failed.", *texts]))
    return [rank.result for rank in started]


def _rank_environment(device: str, threads: int) -> dict[str, str]:
    settings = {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",  # everything is on this disk
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        # A failure of NVLink multicast can take a host's GPUs out of service, and three ranks do not need it.
        "NCCL_NVLS_ENABLE": os.environ.get("NCCL_NVLS_ENABLE", "0"),
    }
    if device == "cpu":
        settings["CUDA_VISIBLE_DEVICES"] = ""  # transformers puts the model on any GPU it sees
        if sys.platform == "linux":
            settings["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    return settings


# What to run, and on what


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the ranks run: device, how many, CPU threads each, and why."""

    device: str
    ranks: int
    threads: int
    why: str


def choose_placement(ranks: int, device: str, gpus: int, cores: int) -> Placement:
    """Choose the device and the number of ranks.

    Raises:
        SetupError: the model or this machine does not allow the choice.
    """
    possible = smollm2.world_sizes()
    if ranks not in possible:
        sizes = ", ".join(f"{what}: {size}" for what, size in smollm2.SPLITS.items())
        raise smollm2.SetupError(
            f"the model cannot be split over {ranks} ranks, which would have to divide all of "
            f"{sizes}; use one of {possible} as --world-size"
        )
    if device == "cuda" and gpus < ranks:
        raise smollm2.SetupError(f"--device cuda needs {ranks} GPUs, PyTorch sees {gpus}; use --device cpu")
    threads = max(1, cores // ranks)
    if device != "cpu" and gpus >= ranks:
        return Placement("cuda", ranks, threads, f"{ranks} of {gpus} GPU{'s' * (gpus != 1)} over NCCL")
    why = f"{ranks} CPU processes over gloo, on {cores} cores"
    if device == "auto" and gpus:
        why += f": {ranks} ranks need as many GPUs, and there {'is 1' if gpus == 1 else f'are {gpus}'}"
    return Placement("cpu", ranks, threads, why)


def check_compiler(device: str) -> None:
    """Check that there is a compiler (torch.compile writes C++ on CPUs, C around Triton's kernels on GPUs).

    Raises:
        SetupError: no compiler, or no Python headers.
    """
    variable, names = ("CC", ["gcc", "clang"]) if device == "cuda" else ("CXX", ["g++"])
    if sys.platform == "darwin":
        names = ["clang++"]
    names = [os.environ[variable]] if os.environ.get(variable) else names
    if not any(shutil.which(name) for name in names):
        raise smollm2.SetupError(
            f"torch.compile needs a compiler, and {' or '.join(names)} is not found; install it "
            f"(Debian, Ubuntu: apt install g++) or name another in {variable}"
        )
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        raise smollm2.SetupError(
            f"{header} is missing, and torch.compile needs it; install Python's headers "
            f"(Debian, Ubuntu: apt install python{sys.version_info[0]}.{sys.version_info[1]}-dev)"
        )


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """A formatter that keeps the description's lines and shows defaults."""


def check_backend(name: str) -> None:
    """Check that fusewire is installed, before the first run of minutes.

    Raises:
        SetupError: torch.compile does not know the backend "fusewire".
    """
    if name == "fusewire" and name not in metadata.entry_points(group="torch_dynamo_backends").names:
        raise smollm2.SetupError(
            "fusewire is not installed for this Python, so torch.compile does not know the "
            "backend; install it: pip install -e ."
        )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_HelpFormatter)
    add = parser.add_argument
    add("--prompt", default=DEFAULT_PROMPT, help="what the model is asked")
    add("--text-file", type=Path, default=DEFAULT_TEXT, help="text to measure perplexity on")
    add("--max-new-tokens", type=int, default=32, help="length of the answer")
    add("--world-size", type=int, default=3, help="number of ranks")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the ranks run")
    add("--dtype", choices=tuple(PERPLEXITY_TOLERANCE), default="float32", help="of the model")
    add("--backend", default="fusewire", help="compiler of the second run")
    add("--timeout", type=float, default=900.0, help="seconds for each of the two runs")
    args = parser.parse_args(arguments)
    if args.max_new_tokens < 1 or args.timeout <= 0:
        parser.error("--max-new-tokens and --timeout must be positive")
    if not args.prompt.strip():
        parser.error("--prompt is empty")
    try:
        args.text_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"--text-file {args.text_file} cannot be read as UTF-8 text: {error}")
    return args


# Output


def show_run(title: str, results: list[dict[str, Any]], prompt: str) -> None:
    """Print the text and the perplexity of one run."""
    mine = results[0]
    print(f"\n== {title}")
    print(textwrap.indent(f"> {prompt}\n{mine['text']}", "   "))
    read, all_tokens = mine["text_tokens"]
    cut = f", the first of {all_tokens}" if read < all_tokens else ""
    print(f"   perplexity {mine['perplexity']:.4f} ({read} tokens{cut})", flush=True)


def show_all_reduces(entries: list[dict[str, Any]]) -> None:
    """Print the table of all-reduces: like ones in one row, layer numbers as *, reasons below."""
    if not entries:
        print("   none found")
        return
    rows: Counter[tuple[str, ...]] = Counter()
    reasons: dict[str, str] = {"": ""}
    for entry in entries:
        module = re.sub(r"\.\d+(?=\.|$)", ".*", entry["module"])
        why = f"{entry['gate']}: {entry['reason']}" if entry["gate"] else entry["reason"]
        note = reasons.setdefault(why, f"[{len(reasons)}]")
        cells = (entry["status"], entry["spelling"], entry["provider"], module, entry["location"], note)
        rows[(str(entry["graph"]), *(cell or "-" for cell in cells))] += 1
    head = ("graph", "count", "status", "norm", "provider", "module", "source", "reason")
    table = [head] + [(key[0], str(count), *key[1:]) for key, count in rows.items()]
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    for row in table:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("   " + line.rstrip())
    for why, note in list(reasons.items())[1:]:
        print(textwrap.fill(f"{note} {why}", 110, initial_indent="   ", subsequent_indent="       "))


def show_times(plain: list[dict[str, Any]], fused: list[dict[str, Any]], name: str) -> None:
    """Print compile times by the clock (slowest rank) and in CPU time, which a busy machine disturbs less."""
    print("\n== compile time (empty caches and fresh processes for each)")
    rows = {"plain torch.compile": plain, f'backend="{name}"': fused}
    for title, results in rows.items():
        clock = max(result["compile_seconds"] for result in results)
        cpu = sum(result["compile_cpu_seconds"] for result in results)
        times = f"{clock:8.2f} s on the clock {cpu:8.2f} s of CPU time"
        print(f"   {title:20s} {times}{', all ranks together' if len(results) > 1 else ''}")
    if fused[0]["report"]:
        # The share by the clock is of the rank on which it is largest; of more ranks than cores each also waits for a core.
        slowest = max(fused, key=lambda result: result["report"]["pass_seconds"] / result["compile_seconds"])
        passes, share = (
            slowest["report"]["pass_seconds"],
            slowest["report"]["pass_seconds"] / slowest["compile_seconds"],
        )
        busy = sum(result["report"]["pass_processor_seconds"] for result in fused)
        waited = max(result["report"]["waited_seconds"] for result in fused)
        print(f"   of that, the passes  {passes:8.2f} s on the clock {busy:8.2f} s of CPU time", end="")
        print(f" ({100 * share:.1f}% and {100 * busy / cpu:.1f}%)")
        print(f"   waiting for ranks    {waited:8.2f} s on the clock")


def find_faults(plain: list[dict[str, Any]], fused: list[dict[str, Any]], dtype: str) -> list[str]:
    """Return a sentence for each thing that is not as it should be."""
    faults = []
    one, two = plain[0], fused[0]
    if one["tokens"] != two["tokens"]:
        pairs = zip(one["tokens"], two["tokens"], strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if at is None:
            faults.append(f"the texts differ in length: {len(one['tokens'])} and {len(two['tokens'])} tokens")
        else:
            faults.append(
                f"the texts differ from token {at + 1} on: {one['words'][at]!r} and "
                f"{two['words'][at]!r}, whose logits beat the next best by "
                f"{one['margins'][at]:.3g} and {two['margins'][at]:.3g}"
            )
    difference = abs(two["perplexity"] / one["perplexity"] - 1)
    if not difference <= PERPLEXITY_TOLERANCE[dtype]:
        faults.append(f"the perplexities differ by {100 * difference:.3g}%, more than {dtype} rounding does")
    unfused: dict[str, list[str]] = {}
    for rank, result in enumerate(fused):
        if result["report"] is None:
            continue
        found = Counter(entry["graph"] for entry in result["report"]["entries"])
        done = Counter(entry["graph"] for entry in result["report"]["entries"] if entry["status"] == "fused")
        for graph in found or {0: 0}:
            if not done[graph] == found[graph] == result["expected"]:
                counts = f"{done[graph]} fused of {found[graph]} found and {result['expected']} in the model"
                unfused.setdefault(f"graph {graph}: all-reduces: {counts}", []).append(str(rank))
    for fault, ranks in unfused.items():
        faults.append(f"{fault} ({'every rank' if len(ranks) == len(fused) else 'rank ' + ', '.join(ranks)})")
    return faults


def show_outcome(plain: list[dict[str, Any]], fused: list[dict[str, Any]], args: Any, seconds: float) -> int:
    """Print the tables and the final line; return the exit status."""
    mine = fused[0]
    if mine["report"]:
        print("\n== all-reduces, as fusewire reports them (rank 0)")
        show_all_reduces(mine["report"]["entries"])
    show_times(plain, fused, args.backend)
    faults = find_faults(plain, fused, args.dtype)
    print()
    if faults:
        print("\n".join(f"FAILED: {fault}" for fault in faults))
        return 1
    if mine["report"] is None:
        counts = f"--backend {args.backend} reports no all-reduces"
    elif mine["expected"] == 0:
        counts = "one rank: there is no all-reduce to fuse"
    else:
        counts = f"{mine['expected']} of {mine['expected']} all-reduces fused on each of {len(fused)} ranks"
    texts = f"the texts agree ({len(mine['tokens'])} tokens)"
    perplexities = f"perplexity {plain[0]['perplexity']:.4f} and {mine['perplexity']:.4f}"
    print(f"OK: {counts}; {texts}, {perplexities}; {seconds:.0f} s in all")
    return 0


def run(args: argparse.Namespace) -> int:
    """Do both runs and the comparison; return the exit status."""
    progress = Progress()
    prepared = smollm2.is_prepared()
    progress.show("starting PyTorch")
    try:
        import torch
        import torch.distributed as dist
    except ImportError as error:
        raise smollm2.SetupError(f'{error}; install what the demo needs: pip install -e ".[demo]"') from error
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    placement = choose_placement(args.world_size, args.device, torch.cuda.device_count(), cores)
    check_compiler(placement.device)
    check_backend(args.backend)
    progress.clear()
    print(f"SmolLM2-135M-Instruct in {args.dtype}, torch {torch.__version__}, {placement.why}", flush=True)

    base = {"device": "cpu", "timeout": args.timeout}
    if not prepared:
        launch("converting the model", {**base, "name": "prepare"}, 1, cores, "", progress)
    job = {
        "name": "model",
        "device": placement.device,
        "timeout": args.timeout,
        "model": str(smollm2.model_directory()),
        "text_file": str(args.text_file.resolve()),
        **{name: getattr(args, name) for name in ("prompt", "max_new_tokens", "dtype")},
    }
    results = []
    for title, backend in (("plain torch.compile", "inductor"), (f'backend="{args.backend}"', args.backend)):
        # The parent holds the store, on a port that the system chooses, so no other program has it.
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        with tempfile.TemporaryDirectory(prefix="fusewire-demo-", ignore_cleanup_errors=True) as cache:
            own = {**job, "backend": backend, "port": store.port}
            results.append(launch(title, own, placement.ranks, placement.threads, cache, progress))
        show_run(title, results[-1], args.prompt)
    return show_outcome(results[0], results[1], args, time.monotonic() - progress.start)


def main(arguments: list[str] | None = None) -> int:
    """Run the demo and return the exit status."""
    args = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds the stack, which ends the ranks
    try:
        return run(args)
    except smollm2.SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RankError as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank-job"]:
        rank_main(json.loads(sys.argv[2]))
    else:
        sys.exit(main())
