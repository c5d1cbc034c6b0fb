"""Run a script and explain, for every all-reduce that torch.compile saw, whether it was fused.

    python -m fusewire explain [options] script.py [arguments of the script]
    torchrun --nproc-per-node 2 -m fusewire explain [options] script.py [arguments of the script]

All that the script compiles goes through fusewire's passes, as within `fusewire.enable()`. Rank 0
prints the report when the script has ended or failed. The exit status is the script's own.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import datetime
import json
import os
import platform
import runpy
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TextIO

import torch
import torch.distributed as dist

import fusewire
from fusewire.custom_ops.coordination.timeouts import timeout_s
from fusewire.custom_ops.ops.registry import parse_priorities
from fusewire.errors import ConfigError
from fusewire.fusion_passes.compiler import compile_cache
from fusewire.fusion_passes.compiler.dynamo import forget_graph_breaks, graph_breaks
from fusewire.fusion_passes.config import PassConfig, disabled_by_environment
from fusewire.rendering.page import page
from fusewire.rendering.pictures import pictures_recorded

INTERRUPTED, STOPPED = 128 + signal.SIGINT, 128 + signal.SIGTERM


class _Stopped(BaseException):
    """Raised by SIGTERM while the script runs; torchrun sends it when another rank has failed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--html", metavar="FILE", help="write the report as one self-contained page too")
    add("--json", action="store_true", help="print one JSON object to stdout, and all else to stderr")
    add("--json-file", metavar="FILE", help="write the JSON object to a file")
    add("--expect-fused", action="store_true", help="fail unless there are all-reduces and every one of them was fused")
    text = (
        "an option of fusewire.PassConfig, for example -o merge_allreduces=False or -o "
        "ir_op_priority=rms_norm=native; may be given several times. A "
        "torch.compile(backend='fusewire') of the script's own keeps its options"
    )
    add("-o", "--option", action="append", default=[], metavar="NAME=VALUE", help=text)
    add("-m", dest="module", action="store_true", help="SCRIPT is a module's name, as in python -m")
    add("--nproc-per-node", metavar="N", type=int, help="start N ranks on this machine, as torchrun does")
    add("script", metavar="SCRIPT", help="the script to run")
    add("arguments", metavar="...", nargs=argparse.REMAINDER, help="its arguments: all that follows it")


def run(arguments: argparse.Namespace) -> int:
    config = PassConfig.from_options(parse_options(arguments.option))
    if not arguments.module and not Path(arguments.script).is_file():
        raise ConfigError(f"there is no script {arguments.script!r} (a module's name goes with -m)")
    for file in filter(None, (arguments.html, arguments.json_file) if _rank() == 0 else ()):
        _check_writable(file)
    if arguments.nproc_per_node is not None and "TORCHELASTIC_RUN_ID" not in os.environ:
        _start_ranks(arguments.nproc_per_node)
    with _stdout_for_json(arguments.json) as output, _sigterm_restored():
        status, error = _run_script(arguments, config)
        if _rank() == 0:
            unmet = _show(arguments, error, status, output)
            return status or unmet
        print(error, file=sys.stderr, end="")
        return status


def parse_options(texts: Sequence[str]) -> dict[str, Any]:
    """Return options of PassConfig from "name=value" texts.

    Raises:
        ConfigError: a text has no "=", or an ir_op_priority is not OPERATOR=PROVIDER[,PROVIDER...].
    """
    options: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"-o {text}: an option is given as NAME=VALUE; they are:\n{PassConfig.describe()}")
        name = name.strip().replace("-", "_")
        if name == "ir_op_priority":
            options[name] = {**options.get(name, {}), **parse_priorities([value])}
        elif name == "disabled_passes":
            options[name] = (*options.get(name, ()), *filter(None, value.split(",")))
        else:
            options[name] = _value(value)
    return options


def _value(text: str) -> Any:
    constants = {"true": True, "false": False, "none": None}
    if text.lower() in constants:
        return constants[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _check_writable(file: str) -> None:
    """Raise ConfigError if a report cannot be written to this file."""
    path = Path(file).absolute()
    place = path if path.exists() else path.parent
    if path.is_dir() or not place.exists() or not os.access(place, os.W_OK):
        raise ConfigError(f"{file} cannot be written: name a file in a directory that exists and may be written to")


def _start_ranks(count: int) -> None:
    """Replace this process by torchrun, which runs this command on every rank."""
    if count < 1:
        raise ConfigError(f"--nproc-per-node is {count}; it must be at least 1")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    sys.stdout.flush()
    os.execv(sys.executable, [*launcher, "-m", "fusewire", *sys.argv[1:]])


def _rank() -> int:
    launchers = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
    return int(next((os.environ[name] for name in launchers if name in os.environ), "0"))


@contextlib.contextmanager
def _stdout_for_json(wanted: bool) -> Iterator[TextIO]:
    """Yield the stream for the report. For JSON, send all other output of stdout to stderr."""
    sys.stdout.flush()
    if not wanted:
        yield sys.stdout
        return
    with os.fdopen(os.dup(1), "w") as output:
        os.dup2(2, 1)
        try:
            with contextlib.redirect_stdout(sys.stderr):
                yield output
        finally:
            sys.stdout.flush()
            os.dup2(output.fileno(), 1)


# --- The script -----------------------------------------------------------------------------------


def _run_script(arguments: argparse.Namespace, config: PassConfig) -> tuple[int, str]:
    """Run the script with the passes; return its exit status and its error as text ("" if none)."""
    sys.argv = [arguments.script, *arguments.arguments]
    if not getattr(sys.flags, "safe_path", False):  # python -P has no such first entry
        sys.path[0] = os.getcwd() if arguments.module else str(Path(arguments.script).absolute().parent)
    forget_graph_breaks()
    if _rank() != 0:  # before SIGTERM is handled in Python, which this wait in C++ would delay
        _rank_0_ready(wait=True)
    try:
        # A graph that a cache holds is not compiled again, and there would be nothing to report.
        with compile_cache.switched_off(), pictures_recorded(), fusewire.enable(config), _stoppable():
            if _rank() == 0:
                _rank_0_ready(wait=False)
            if arguments.module:
                runpy.run_module(arguments.script, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(arguments.script, run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0, ""
        return 1, f"{end.code}\n"
    except _Stopped:
        return STOPPED, "The script was stopped (SIGTERM); under torchrun that follows when another rank fails.\n"
    except KeyboardInterrupt:
        return INTERRUPTED, "The script was interrupted.\n"
    except BaseException as error:
        return 1, "".join(traceback.format_exception(type(error), error, _users_part(error.__traceback__)))
    return 0, ""


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """End the script by an exception on SIGTERM; after the block SIGTERM is ignored."""
    owner = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:
            raise _Stopped
        signal.signal(number, signal.SIG_DFL)  # a process that the script forked
        os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextlib.contextmanager
def _sigterm_restored() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN if before is None else before)


def _rank_0_ready(*, wait: bool) -> None:
    """Publish that rank 0 can be stopped without losing its report, or wait until it can.

    Otherwise a rank that fails early would make torchrun end rank 0 while it starts. The ranks go
    on after the time limit, or if the launcher offers no store.
    """
    try:
        store = _launchers_store()
        key = f"fusewire/explain/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        if store is not None and wait:
            store.wait([key])
        elif store is not None:
            store.set(key, "ready")
    except dist.DistError as error:
        print(f"fusewire: rank {_rank()} cannot coordinate its start with rank 0: {error}", file=sys.stderr)


def _launchers_store() -> Any:
    """Return a client of torchrun's store for its ranks, or None under other launchers."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    limit = datetime.timedelta(seconds=timeout_s())
    return dist.TCPStore(*place, is_master=False, timeout=limit)  # type: ignore[attr-defined]


def _users_part(trace: TracebackType | None) -> TracebackType | None:
    """Return a traceback without the frames of this command and of runpy at its start."""
    ours = (__file__, runpy.__file__)
    while trace is not None and (
        trace.tb_frame.f_code.co_filename in ours or trace.tb_frame.f_code.co_filename.startswith("<frozen runpy")
    ):
        trace = trace.tb_next
    return trace


# --- The report -----------------------------------------------------------------------------------


def _show(arguments: argparse.Namespace, error: str, status: int, output: TextIO) -> int:
    """Print and write the report; return 1 if an expectation is not met, else 0."""
    report = fusewire.report()
    breaks = graph_breaks()
    notices = [advice] if (advice := advise()) else []
    unmet = _unmet(arguments.expect_fused, report)
    facts = _facts(arguments, status)
    outcome = {"exit_status": status, "error": error, "advice": advice, "graph_breaks": breaks}
    data = json.dumps({**report.to_dict(), **dict(facts), **outcome}, indent=2)
    sys.stdout.flush()
    print(data if arguments.json else _as_text(report, breaks, notices), file=output)
    output.flush()
    if arguments.json_file:
        Path(arguments.json_file).write_text(data + "\n", encoding="utf-8")
    if arguments.html:
        failed = [f"The script failed (exit status {status}).\n{error}".strip()] if status else []
        title = " ".join([arguments.script, *arguments.arguments])
        html = page(report, title, facts, [*failed, *notices, *filter(None, [unmet])], breaks)
        Path(arguments.html).write_text(html, encoding="utf-8")
        print(f"fusewire: wrote {arguments.html}", file=sys.stderr)
    for text in filter(None, (error, unmet)):
        print(text.rstrip("\n"), file=sys.stderr)
    return 1 if unmet else 0


def _as_text(report: fusewire.Report, breaks: dict[str, int], notices: list[str]) -> str:
    lines = [str(report)]
    if breaks:
        lines.append(f"graph breaks: {sum(breaks.values())}; nothing fuses across them")
        lines += [f"  {count:4d} x {' '.join(reason.split())}" for reason, count in breaks.items()]
    return "\n".join([*lines, *notices])


def _unmet(expected: bool, report: fusewire.Report) -> str:
    if not expected or (report.found and not report.refused and not report.unread):
        return ""
    if report.refused:
        return f"--expect-fused: {report.refused} of {report.found} all-reduces were not fused"
    if report.unread:
        return f"--expect-fused: {report.unread} all-reduces are operators of their own, which are not fused"
    return "--expect-fused: no all-reduce was found"


def _facts(arguments: argparse.Namespace, status: int) -> list[tuple[str, str]]:
    versions = f"fusewire {fusewire.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    return [
        ("command", " ".join([*(["-m"] if arguments.module else []), arguments.script, *arguments.arguments])),
        ("options", " ".join(arguments.option) or "defaults"),
        ("rank", f"{_rank()} of {_world_size()}"),
        ("versions", versions),
        ("time", datetime.datetime.now().astimezone().isoformat(" ", "seconds")),
        ("exit status", str(status)),
    ]


def _world_size() -> int:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def advise() -> str:
    """Return what to do if the report is empty, else ""."""
    report = fusewire.report()
    if disabled_by_environment():
        return "FUSEWIRE_DISABLE in the environment switches fusewire off; unset it to see what it would do."
    if not report.graphs:
        return (
            "Nothing was compiled in this process, so there is nothing to explain. fusewire works on what "
            "torch.compile compiles with Inductor, its default backend:\n"
            "  - compile the model, model = torch.compile(model), and call it in the script;\n"
            "  - if the script starts its ranks itself (torch.multiprocessing.spawn), start them with torchrun or "
            "--nproc-per-node, so that each one runs under this command."
        )
    if report.found or report.unread:
        return ""
    if _world_size() == 1:
        return (
            "There was one rank, and the compiled graphs hold no all-reduce. Tensor parallelism "
            "needs several: python -m fusewire explain --nproc-per-node 2 SCRIPT, or torchrun "
            "--nproc-per-node 2 -m fusewire explain SCRIPT."
        )
    return (
        "The compiled graphs hold no all-reduce and no reduce-scatter. Either the model is not "
        "split over the ranks (transformers: tp_plan='auto'; PyTorch: parallelize_module), or its "
        "all-reduces are issued outside the compiled part: compile the whole model, with "
        "fullgraph=True to see what breaks the graph."
    )
