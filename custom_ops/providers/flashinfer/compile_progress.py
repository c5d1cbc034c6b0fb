"""Say how far the compilation of FlashInfer's kernels is, for its progress lines.

FlashInfer runs ninja, whose file names the objects, and ninja runs a compiler for each. They are
looked up in /proc, so what runs is known on Linux only. It may be another process that compiles.
"""

from __future__ import annotations

import contextlib
import os
import re
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

_OBJECTS = 3  # before ninja's file is there


class CompileProgress:
    """The progress of a compilation in FlashInfer's folder, since this object was made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._before = self._objects()

    def __str__(self) -> str:
        """Return how many objects are done, and what the compilers compile and have used."""
        processes = _processes_of_ninja(self.folder)
        outputs = {Path(path).name for p in processes for option, path in pairwise(p.arguments) if option == "-o"}
        compiled = sorted(name for name in outputs if name.endswith(".o"))
        done = {name for name, _ in self._objects() - self._before}.difference(compiled)
        text = f"; {len(done)} of {len(self._named()) or _OBJECTS} objects done"
        if compiled:
            text += f", compiling {', '.join(compiled)}"
        if processes:
            text += f"; the compilers have used {sum(p.cpu_s for p in processes):.0f} s of processor time"
        return text

    def _objects(self) -> set[tuple[str, int]]:
        found = set()
        for path in self.folder.glob("*.o"):
            with contextlib.suppress(OSError):  # it has just been removed
                found.add((path.name, path.stat().st_mtime_ns))
        return found

    def _named(self) -> list[str]:
        """Return the objects that ninja's file names."""
        try:
            text = (self.folder / "build.ninja").read_text()
        except OSError:
            return []
        return re.findall(r"^build (\S+\.o):", text, re.MULTILINE)


class _Process(NamedTuple):
    """A running process; `cpu_s` is of it and its children that have ended."""

    parent: int
    arguments: list[str]
    cpu_s: float


def _processes_of_ninja(folder: Path) -> list[_Process]:
    """Return every ninja with a file in `folder`, and the processes below it."""
    found: dict[int, _Process] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            arguments = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            ticks = sum(map(int, fields[11:15]))
            found[int(entry.name)] = _Process(int(fields[1]), arguments, ticks / os.sysconf("SC_CLK_TCK"))

    def belongs(process: _Process | None) -> bool:
        while process is not None:
            name, *rest = process.arguments
            if Path(name).name == "ninja" and any(Path(a).is_relative_to(folder.resolve()) for a in rest):
                return True
            process = found.get(process.parent)
        return False

    return [process for process in found.values() if belongs(process)]
