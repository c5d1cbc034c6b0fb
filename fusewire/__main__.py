"""The command line: `python -m fusewire COMMAND`, or `fusewire COMMAND`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

from fusewire.errors import FusewireError


class Command(NamedTuple):
    """A command. Its module has `add_arguments(parser)` and `run(arguments) -> exit status`."""

    module: str
    help: str


COMMANDS = {
    "doctor": Command("fusewire.cli.doctor", "print what this machine offers, and which provider serves what"),
    "prebuild": Command("fusewire.cli.prebuild", "compile FlashInfer's all-reduce kernels ahead of time"),
    "tune": Command("fusewire.cli.tune", "time every provider on this machine's GPUs, and choose by that from then on"),
    "explain": Command("fusewire.cli.explain", "run a script and explain what became of every all-reduce"),
}


def parser(chosen: str = "") -> argparse.ArgumentParser:
    """Return the parser of all commands; only the chosen command's module is imported."""
    top = argparse.ArgumentParser(prog="fusewire", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.help)
        if name == chosen:
            module = importlib.import_module(command.module)
            sub.description = module.__doc__
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status, or 1 after an error of fusewire's or of the system."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    for name in ("stdout", "stderr"):  # None where the shell closed them
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (for the life of the process)
    parsed = parser(given[0] if given else "").parse_args(given)
    try:
        status: int = parsed.run(parsed)
        sys.stdout.flush()
    except FusewireError as error:
        print(f"fusewire: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `... | head`: the reader has ended
        _drop_output()
        return 0
    except OSError as error:
        print(f"fusewire: {error}", file=sys.stderr)
        _drop_output()
        return 1
    return status


def _drop_output() -> None:
    """Discard what is left in stdout's buffer, at which the interpreter would fail as it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
