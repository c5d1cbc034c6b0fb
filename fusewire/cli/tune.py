"""Measure which provider is fastest for how many tokens on this machine; keep a table of it.

Alone it starts one process for each GPU. Under torchrun it measures on torchrun's ranks, also on
several machines. Results are checked before they are timed. `python -m fusewire doctor` lists the
tables.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fusewire.custom_ops.coordination.log import log_line
from fusewire.custom_ops.coordination.timeouts import timeout_s
from fusewire.custom_ops.coordination.vote import describe
from fusewire.custom_ops.dispatch import table_store
from fusewire.custom_ops.dispatch.table_store import Table
from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm
from fusewire.custom_ops.ops.registry import machine_support
from fusewire.custom_ops.tuning import tuner
from fusewire.custom_ops.workspaces.provider import PROVIDERS
from fusewire.errors import ConfigError, FusewireError, PeerTimeoutError, WorkspaceError

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in tuner.DTYPES}
CPU_PROVIDERS = ("native", "rank_ordered")
_ON_CPU = "by the wall clock on CPU ranks: this table never serves GPUs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--hidden", type=int, nargs="+", required=True, metavar="N", help="the models' hidden sizes")
    add("--dtype", choices=DTYPES, default="bfloat16", help="dtype of the activations (default: %(default)s)")
    add("--tokens", type=int, nargs="+", default=[], metavar="N", help="measure exactly these numbers of tokens")
    text = "without --tokens: measure powers of two up to this number of tokens (default: %(default)s)"
    add("--max-tokens", type=int, default=tuner.DEFAULT_MAX_TOKENS, metavar="N", help=text)
    add("--world-size", type=int, metavar="N", help="start this many ranks (default: one for each GPU)")
    add(
        "--seconds",
        type=float,
        default=tuner.BUDGET_S,
        metavar="S",
        help="time for a hidden size (default: %(default)g)",
    )
    add("--plot", metavar="FILE.png", help="draw time against tokens into this file (needs matplotlib)")
    add("--json", action="store_true", help="print one JSON object instead of text")
    add("--cpu", action="store_true", help="time gloo ranks on the CPU: to try the command without GPUs")
    add("--dry-run", action="store_true", help="print what would be measured, and the table's path")


def run(arguments: argparse.Namespace) -> int:
    under_torchrun = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    world_size = _world_size(arguments, under_torchrun)
    tuner.token_grid(arguments.max_tokens, arguments.tokens)
    if arguments.plot:
        check_plot(arguments.plot)
    if arguments.dry_run:
        print(dry_run(arguments, world_size))
        return 0
    if under_torchrun:
        try:
            found = _as_rank(arguments, None)
        except PeerTimeoutError as error:
            print(f"fusewire: {error}", file=sys.stderr, flush=True)
            os._exit(1)  # a kernel that never ends would keep the process
        if dist.get_rank() == 0:
            _show(arguments, found)
        dist.destroy_process_group()
    else:
        _show(arguments, _start_ranks(arguments, world_size))
    return 0


def _world_size(arguments: argparse.Namespace, under_torchrun: bool) -> int:
    if not arguments.cpu and not torch.cuda.is_available():
        raise ConfigError("there is no GPU here to measure on; --cpu tries the command on CPU ranks")
    gpus = 0 if arguments.cpu else torch.cuda.device_count()
    if under_torchrun:
        size = int(os.environ["WORLD_SIZE"])
        if arguments.world_size not in (None, size):
            raise ConfigError(f"--world-size {arguments.world_size}, but torchrun started {size} ranks; leave it out")
        return size
    size = arguments.world_size or gpus or 2
    if size < 2:
        raise ConfigError(f"{size} rank: all-reduces need at least two; --world-size says how many to start")
    if gpus and size > gpus:
        raise ConfigError(
            f"--world-size {size}, but there are {gpus} GPUs here; under torchrun it can be several hosts'"
        )
    return size


# --- The ranks ------------------------------------------------------------------------------------


def _as_rank(arguments: argparse.Namespace, place: tuple[str, int, int] | None) -> list[tuner.Tuned]:
    """Join the group and measure. A collective of all ranks.

    Args:
        place: a file for the group's store, rank and world size; None under torchrun.
    """
    options: dict[str, Any] = {"timeout": timedelta(seconds=timeout_s())}
    if place is not None:
        store, rank, world_size = place
        options.update(store=dist.FileStore(store, world_size), rank=rank, world_size=world_size)  # type: ignore[attr-defined]
    if arguments.cpu:
        device = torch.device("cpu")
        dist.init_process_group("gloo", **options)
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // dist.get_world_size()))
    else:
        local = place[1] if place is not None else int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(local)
        device = torch.device("cuda", local)
        dist.init_process_group("nccl", device_id=device, **options)
    group = dist.group.WORLD
    assert group is not None
    if arguments.cpu and group.rank() == 0:
        log_line(f"measuring {_ON_CPU}")
    return [
        tuner.tune(
            group,
            hidden,
            DTYPES[arguments.dtype],
            device,
            max_tokens=arguments.max_tokens,
            tokens=arguments.tokens,
            providers=CPU_PROVIDERS if arguments.cpu else (),
            budget_s=arguments.seconds,
        )
        for hidden in arguments.hidden
    ]


def _child(rank: int, arguments: argparse.Namespace, world_size: int, folder: str) -> None:
    """Run one process of `_start_ranks`; write its result, or its error, into the folder."""
    try:
        found: Any = _as_rank(arguments, (f"{folder}/store", rank, world_size))
    except FusewireError as error:
        found = error
    path = Path(folder) / f"rank{rank}"
    path.with_suffix(".part").write_bytes(pickle.dumps(found))
    path.with_suffix(".part").rename(path)
    if isinstance(found, FusewireError):
        os._exit(1)  # a kernel that never ends would keep the process
    dist.destroy_process_group()


def _start_ranks(arguments: argparse.Namespace, world_size: int) -> list[tuner.Tuned]:
    """Start the ranks, wait for them, and return rank 0's result. Raise what a rank raised."""
    with tempfile.TemporaryDirectory(prefix="fusewire-tune-") as folder:
        context = mp.start_processes(  # type: ignore[attr-defined]
            _child, (arguments, world_size, folder), nprocs=world_size, join=False, start_method="spawn"
        )
        try:
            while not context.join(timeout=1.0):
                pass
        except (mp.ProcessExitedException, mp.ProcessRaisedException) as failure:  # type: ignore[attr-defined]
            time.sleep(0.5)
            for found in _answers(folder, world_size):
                if isinstance(found, FusewireError):
                    raise found from None
            raise WorkspaceError(f"a rank ended early: {failure}") from None
        answers = _answers(folder, world_size)
    if len(answers) < world_size:
        raise WorkspaceError("a rank ended without an answer")
    first: list[tuner.Tuned] = answers[0]
    return first


def _answers(folder: str, world_size: int) -> list[Any]:
    paths = [Path(folder) / f"rank{rank}" for rank in range(world_size)]
    return [pickle.loads(path.read_bytes()) for path in paths if path.exists()]


# --- What is printed ------------------------------------------------------------------------------


def dry_run(arguments: argparse.Namespace, world_size: int) -> str:
    """Return what would be measured, as text."""
    grid = tuner.token_grid(arguments.max_tokens, arguments.tokens)
    dtype = DTYPES[arguments.dtype]
    lines = []
    for hidden in arguments.hidden:
        lines += [f"{world_size} ranks, hidden size {hidden}, {arguments.dtype}", f"  tokens: {_listed(grid)}"]
        for name in CPU_PROVIDERS if arguments.cpu else all_reduce_rms_norm.priority:
            lines += [f"  {text}" for text in _would_time(name, hidden, dtype, world_size, grid)]
        key = None if arguments.cpu else table_store.local_key(world_size, hidden, dtype)
        lines.append(f"  table: {table_store.folder() / key.file_name if key else table_store.folder()}")
        if key is not None:
            found = table_store.load(key)
            lines.append(f"  now there: {found.reason or (found.table.measured if found.table else 'nothing')}")
    return "\n".join(lines + ([f"times are taken {_ON_CPU}"] if arguments.cpu else []))


def _would_time(name: str, hidden: int, dtype: torch.dtype, world_size: int, grid: Sequence[int]) -> list[str]:
    provider, machine = PROVIDERS.get(name), machine_support(all_reduce_rms_norm.providers[name])
    static = machine and provider.limits(hidden, dtype, world_size) if provider else machine
    if not static:
        return [f"not {name}: {static.reason}"]
    if provider is None:
        return [f"{name}: all of them"]
    cap = min(grid[-1], provider.max_tokens(hidden, dtype, world_size))
    lines = []
    for label in provider.variants:
        limit = provider.token_limit(label, hidden, dtype, world_size, cap)
        times = _listed([t for t in grid if t in limit]) or "none"
        reason = provider.left_out(label)
        lines.append(f"not {label}: {reason}" if reason else f"{label}: {times}")
    return lines


def _listed(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))


def _show(arguments: argparse.Namespace, found: Sequence[tuner.Tuned]) -> None:
    if arguments.json:
        tables = [{**tuned.table.as_json(), "path": tuned.path, "problem": tuned.problem} for tuned in found]
        print(json.dumps({"tables": tables}, indent=2))
    else:
        print("\n\n".join(as_text(tuned) for tuned in found))
    if arguments.plot:
        draw([tuned.table for tuned in found], arguments.plot)
        log_line(f"drawn: {arguments.plot}")


def as_text(tuned: tuner.Tuned) -> str:
    """Return a table of microseconds by tokens, with the fastest marked."""
    table = tuned.table
    key, labels = table.key, list(table.times)
    by_label = {label: dict(points) for label, points in table.times.items()}
    lines = [f"{title(table)}; microseconds per call, the slowest rank", ""]
    lines.append(f"{'tokens':>7}  " + "  ".join(f"{label:>{max(9, len(label))}} " for label in labels))
    for tokens in sorted({tokens for points in by_label.values() for tokens in points}):
        found = {label: points[tokens] for label, points in by_label.items() if tokens in points}
        best = min(found.values())
        cells = [_cell(found.get(label), best).rjust(max(10, len(label) + 1)) for label in labels]
        lines.append(f"{tokens:7d}  " + "  ".join(cells))
    lines.append("")
    if key.device == "cpu":
        lines.append(f"Taken {_ON_CPU}.")
    if table.link_rate:
        lines.append(f"Links: {table.link_rate / 1e9:.0f} GB/s out of each GPU, to all peers at once.")
    lines += [f"LEFT OUT: {label}: {reason}" for label, reason in table.rejected.items()]
    lines += [f"Not available: {name}: {reason}" for name, reason in table.absent.items()]
    lines += [f"Note: {note}" for note in table.notes]
    lines.append(f"Took {table.seconds:.1f} s. {tuned.problem or f'The table: {tuned.path}'}")
    return "\n".join(lines)


def title(table: Table) -> str:
    key = table.key
    return f"{key.world_size} x {key.gpu}, hidden size {key.hidden}, {key.dtype}"


def _cell(us: float | None, best: float) -> str:
    return "" if us is None else f"{us:.1f}" + ("*" if us == best else " ")


# --- The picture ----------------------------------------------------------------------------------

# One hue for each provider, one-shot light and two-shot dark. A variant keeps its style.
_STYLES: Mapping[str, tuple[str, str]] = {
    "native": ("#6b6b6b", "o"),
    "flashinfer/oneshot": ("#e8a33d", "^"),
    "flashinfer/twoshot": ("#a85b00", "v"),
    "symm_mem/oneshot": ("#6fb1e8", "s"),
    "symm_mem/twoshot": ("#0b559f", "D"),
}
_OTHERS = (("#2f8f5b", "P"), ("#8a4fae", "X"), ("#b03a4a", "*"), ("#7a7a00", "h"))


def check_plot(path: str) -> None:
    """Raise ConfigError if the picture could not be drawn at the end."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib, which is not installed: pip install matplotlib")
    folder = Path(path).absolute().parent
    if Path(path).suffix.lower() != ".png" or not folder.is_dir():
        raise ConfigError(f"--plot {path}: give a file name that ends in .png, in a folder that exists")


def draw(tables: Sequence[Table], path: str) -> None:
    """Plot time against tokens: a panel for each table, a line for each variant, the links' floor.

    The floor is the time to send 2(R-1)/R of x's bytes from each of R GPUs, as two-shot must do.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2 * len(tables), 5.6), dpi=150, layout="constrained")
    for panel, table in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables, strict=True):
        _draw_one(panel, table)
    try:
        figure.savefig(path)
    except OSError as error:
        raise ConfigError(f"--plot {path}: {describe(error)}") from error


def _draw_one(panel: Any, table: Table) -> None:
    from matplotlib.ticker import LogLocator

    others = iter(_OTHERS * len(table.times))
    for label, points in table.times.items():
        colour, marker = _STYLES.get(label) or next(others)
        tokens, us = zip(*points, strict=True)
        panel.plot(tokens, us, color=colour, marker=marker, markersize=4.5, linewidth=1.8, label=label)
    grid = sorted({tokens for points in table.times.values() for tokens, _ in points})
    least = min(us for points in table.times.values() for _, us in points)
    if table.link_rate:
        floor = [table.floor(tokens) for tokens in grid]
        name = f"link floor of two-shot ({table.link_rate / 1e9:.0f} GB/s)"
        panel.plot(grid, floor, color="black", linestyle=(0, (4, 3)), linewidth=1.1, label=name)
    else:
        panel.plot([], [], " ", label="no link floor: the rate was not measured")
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_ylim(bottom=least / 2)
    panel.set_xticks(grid, [str(tokens) for tokens in grid], rotation=45 if len(grid) > 8 else 0)
    panel.minorticks_off()
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.set_xlabel("tokens")
    panel.set_ylabel("microseconds per call (slowest rank)")
    subtitle = "\nCPU ranks, by the wall clock" if table.key.device == "cpu" else ""
    panel.set_title(f"all-reduce + add + RMSNorm: {title(table)}{subtitle}", fontsize=10, loc="left")
    panel.grid(True, which="major", color="#e3e3e3", linewidth=0.7)
    panel.set_axisbelow(True)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    panel.legend(frameon=False, fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)
