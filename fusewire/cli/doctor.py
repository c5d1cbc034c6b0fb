"""Print what this machine has (torch, GPUs, links, FlashInfer) and which provider serves what."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from typing import Any

import torch

import fusewire
from fusewire.custom_ops.coordination.timeouts import Limit, limit_s
from fusewire.custom_ops.coordination.vote import describe
from fusewire.custom_ops.dispatch import table_store
from fusewire.custom_ops.dispatch.overview import explain_choices
from fusewire.custom_ops.ops.registry import all_ops, ir_op_priority, machine_support, parse_priorities
from fusewire.custom_ops.providers.flashinfer import library as flashinfer

PLAN_HIDDEN_SIZES = (2048, 4096, 5120, 8192)
_VARIABLES = ("FUSEWIRE_", "FLASHINFER_", "NCCL_", "TORCH_SYMM_MEM", "CUDA_", "TORCH_NCCL_")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--json", action="store_true", help="print one JSON object instead of text")
    text = "show the plan with these providers, in this order; may be given several times"
    add("--ir-op-priority", action="append", default=[], metavar="OP=PROVIDER[,PROVIDER...]", help=text)


def run(arguments: argparse.Namespace) -> int:
    with ir_op_priority(parse_priorities(arguments.ir_op_priority)):
        found = examine()
    print(json.dumps(found, indent=2) if arguments.json else as_text(found))
    return 0


def examine() -> dict[str, Any]:
    """Return all that the command prints, as JSON types. Neither communicates nor compiles."""
    return {
        "versions": _versions(),
        "environment": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(_VARIABLES)},
        "gpus": _gpus(),
        "peer_access": _peer_access(),
        "links": _ask("nvidia-smi", "topo", "-m"),
        "flashinfer": _flashinfer(),
        "operators": _operators(),
        "tuned_tables": _tuned_tables(),
        "plans": _plans(),
    }


def _versions() -> dict[str, str]:
    found = {
        "fusewire": fusewire.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "torch": torch.__version__,
        "torch's CUDA": torch.version.cuda or "none: this torch is built without CUDA",
        "CUDA driver": _driver(),
    }
    if torch.cuda.is_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    for package in ("triton", "transformers"):
        found[package] = _package_version(package)
    return found


def _package_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    answer = _ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return answer.splitlines()[0].strip() if answer else "none found (nvidia-smi did not answer)"


def _ask(*command: str) -> str:
    """Return the output of a program; "" if it is missing, fails, or runs too long."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=limit_s(Limit.PROGRAM))
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def _gpus() -> list[dict[str, Any]]:
    gpus = map(torch.cuda.get_device_properties, range(_gpu_count()))
    return [
        {
            "index": index,
            "name": gpu.name,
            "compute_capability": f"{gpu.major}.{gpu.minor}",
            "memory_gib": round(gpu.total_memory / 2**30, 1),
            "multiprocessors": gpu.multi_processor_count,
        }
        for index, gpu in enumerate(gpus)
    ]


def _gpu_count() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _peer_access() -> list[list[bool]]:
    count = _gpu_count()
    return [[a == b or torch.cuda.can_device_access_peer(a, b) for b in range(count)] for a in range(count)]


def _flashinfer() -> dict[str, str]:
    library = flashinfer.library()
    found = {
        "version": library.version or _package_version("flashinfer-python"),
        "usable": library.reason or "yes",
    }
    if not library.reason:
        found["two-shot"] = flashinfer.two_shot().reason or "yes"
    try:
        kernels = flashinfer.kernels()
        found["kernels"] = f"{kernels.state}: {kernels.path}"
        if kernels.state == "missing":
            found["kernels"] += " (compiled at first use, minutes; `python -m fusewire prebuild` does it ahead)"
    except Exception as error:
        found["kernels"] = f"unknown: {describe(error)}"
    found["compiler"] = flashinfer.find_nvcc() or flashinfer.no_nvcc()
    return found


def _operators() -> dict[str, dict[str, Any]]:
    found = {}
    for name, op in sorted(all_ops().items()):
        answers = {key: machine_support(each) for key, each in op.providers.items()}
        found[name] = {
            "priority": list((op.derives_from or op).priority),
            "computed_with": op.derives_from.name if op.derives_from else "",
            "providers": {
                key: {
                    "available": bool(answer),
                    "reason": answer.reason,
                    "batch_invariant": op.providers[key].batch_invariant,
                }
                for key, answer in answers.items()
            },
        }
    return found


def _tuned_tables() -> dict[str, Any]:
    """Return the tables of `python -m fusewire tune`, and which of them serve on this machine."""
    tables = []
    for found in table_store.all_files():
        entry: dict[str, Any] = {"path": str(found.path), "serves": False, "reason": found.reason}
        if found.table is not None:
            key = found.table.key
            entry.update(world_size=key.world_size, hidden=key.hidden, dtype=key.dtype, measured=found.table.measured)
            entry["reason"] = why = _why_not(key)
            entry["serves"] = not why
            entry["left_out"] = dict(found.table.rejected)
            entry["not_measured"] = dict(found.table.absent)
        tables.append(entry)
    return {"folder": str(table_store.folder()), "tables": tables}


def _why_not(key: table_store.TableKey) -> str:
    if key.device == "cpu":
        return "times of CPU ranks, which serve nobody"
    here = table_store.local_key(key.world_size, key.hidden, getattr(torch, key.dtype))
    return "there is no GPU here" if here is None else key.differences(here)


def _plans() -> list[dict[str, Any]]:
    count = _gpu_count()
    # Without GPUs all world sizes have one plan; with them, each group that fits has its own.
    sizes = [size for size in (2, 4, 8, 16) if size <= count] or [2]
    tuned = [found.table.key.hidden for found in table_store.all_files() if found.table is not None]
    return [
        {
            "world_size": size,
            "hidden": hidden,
            "dtype": "bfloat16",
            "rows": [row._asdict() for row in explain_choices(size, hidden, torch.bfloat16)],
        }
        for size in sizes
        for hidden in sorted({*PLAN_HIDDEN_SIZES, *(tuned if count else ())})
    ]


# --- As text --------------------------------------------------------------------------------------


def as_text(found: Mapping[str, Any]) -> str:
    """Return what `examine` found as text for people."""
    lines = [*_pairs("Versions", found["versions"]), *_pairs("Environment", found["environment"])]
    lines += [*_gpu_lines(found), *_pairs("FlashInfer", found["flashinfer"]), *_operator_lines(found["operators"])]
    lines += ["", f"Tuned tables, in {found['tuned_tables']['folder']}"]
    lines += _table(_tuned_row(table) for table in found["tuned_tables"]["tables"]) or [
        "  none (`python -m fusewire tune --hidden N` measures one; until then the plan is the shipped one)"
    ]
    for plan in found["plans"]:
        lines += ["", f"Plan for {plan['world_size']} ranks, hidden size {plan['hidden']}, {plan['dtype']}"]
        lines += _table((_span(row), row["provider"], row["reason"]) for row in plan["rows"])
    return "\n".join(lines).strip()


def _gpu_lines(found: Mapping[str, Any]) -> list[str]:
    lines = ["", "GPUs"]
    lines += [
        f"  {gpu['index']}: {gpu['name']}, compute capability {gpu['compute_capability']}, "
        f"{gpu['memory_gib']} GiB, {gpu['multiprocessors']} multiprocessors"
        for gpu in found["gpus"]
    ] or ["  none"]
    if len(found["gpus"]) > 1:
        lines += ["", "Peer access (row reads column)"]
        lines += ["  " + " ".join("yes" if cell else " no" for cell in row) for row in found["peer_access"]]
    if found["links"]:
        lines += ["", "Links", *("  " + line for line in found["links"].splitlines())]
    return lines


def _operator_lines(operators: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, op in operators.items():
        if op["computed_with"]:
            lines += ["", f"Operator {name}, computed with the providers of {op['computed_with']}"]
            continue
        lines += ["", f"Operator {name}, tried in the order {', '.join(op['priority'])}"]
        lines += _table(
            (key, "batch-invariant" * each["batch_invariant"], "yes" if each["available"] else f"no: {each['reason']}")
            for key, each in op["providers"].items()
        )
    return lines


def _tuned_row(table: Mapping[str, Any]) -> tuple[str, ...]:
    if "hidden" not in table:
        return ("", "", "not used", table["reason"])
    what = f"{table['world_size']} ranks, hidden size {table['hidden']}, {table['dtype']}"
    left_out = "".join(f"; {label} is left out: {why}" for label, why in table["left_out"].items())
    left_out += "".join(f"; {name} could not be measured: {why}" for name, why in table["not_measured"].items())
    name = os.path.basename(table["path"])
    if table["serves"]:
        return (what, table["measured"], "serves", f"{name}{left_out}")
    return (what, table["measured"], "not used", f"{name}: {table['reason']}")


def _span(row: Mapping[str, Any]) -> str:
    if row["last"] is None:
        return f"{row['first']} tokens and more"
    return f"{row['first']} to {row['last']} tokens"


def _pairs(title: str, pairs: Mapping[str, str]) -> list[str]:
    return ["", title, *(_table(pairs.items()) or ["  none"])]


def _table(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Return rows as aligned columns, the last one of any width."""
    kept = list(rows)
    widths = [max(map(len, column)) for column in list(zip(*kept, strict=True))[:-1]]
    return [
        ("  " + "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]])).rstrip() for row in kept
    ]
