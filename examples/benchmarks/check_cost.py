"""Time what the in-band checks of the `symm_mem` kernels cost, on one GPU.

    python examples/benchmarks/check_cost.py
    python examples/benchmarks/check_cost.py --world 4 --hidden 8192 --tokens 1 64 512

The checks are: every kernel reads the error word when it starts, and a flag has the call's tokens
and options beside its number. The kernels are timed against copies of themselves without both. All
ranks are in this process and are timed as in batch_invariant.py. Prints medians in microseconds per
call, and the ratio with / without.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from batch_invariant import compare, graph_of

from fusewire.custom_ops.providers.symm_mem import kernels, launcher

PLACES = {"one_shot": (1, 4, 16, 64), "two_shot": (64, 256, 512, 1024, 2048)}
COPY = "kernels_without_checks"
TAKEN_OUT = {  # file, and a line of it with what replaces it
    "counters.py": ("return read_counter(ctl + 8 * CTL_ERROR) != 0", "return ctl == 0"),
    "packets.py": ("return (alike << FLAG_CALL_BITS) | (call & ((1 << FLAG_CALL_BITS) - 1))", "return call"),
}


def copy_without_checks(folder: Path) -> None:
    """Write the kernels' package without the checks into a folder, and let Python find it there."""
    (folder / COPY).mkdir()
    for path in Path(kernels.__file__).parent.glob("*.py"):
        text = path.read_text().replace(kernels.__name__, COPY)
        if path.name in TAKEN_OUT:
            line, other = TAKEN_OUT[path.name]
            if text.count(line) != 1:
                raise RuntimeError(f"{path.name} has {text.count(line)} lines {line!r}, not one: repair this script")
            text = text.replace(line, other)
        (folder / COPY / path.name).write_text(text)
    sys.path.insert(0, str(folder))


def kernel_without_checks(name: str) -> Any:
    return getattr(importlib.import_module(f"{COPY}.{name.removesuffix('_kernel')}"), name)


def main() -> int:
    def graphs_of(ranks: Sequence[Any], kind: str, tokens: int) -> list[tuple[Any, Any]]:
        with mock.patch.object(launcher, "kernel", kernel_without_checks):
            plain = graph_of(ranks, kind, tokens, False)
        return [plain, graph_of(ranks, kind, tokens, False)]

    with tempfile.TemporaryDirectory() as folder:
        copy_without_checks(Path(folder))
        return compare(__doc__, PLACES, ("without checks", "with"), [2], [4096], graphs_of)


if __name__ == "__main__":
    sys.exit(main())
