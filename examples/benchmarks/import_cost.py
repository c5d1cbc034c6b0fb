"""What importing fusewire costs beyond importing torch.

    python examples/benchmarks/import_cost.py --rounds 10

Each round starts two fresh processes, one that imports torch and one that imports torch and fusewire.
Prints the medians in seconds and their ratio, in processor time and by the clock.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

TIMED = """
from time import perf_counter, process_time
clock, processor = perf_counter(), process_time()
{}
print(perf_counter() - clock, process_time() - processor)
"""
STATEMENTS = ("import torch", "import torch, fusewire")


def measure(statement: str) -> tuple[float, float]:
    """Seconds by the clock and of processor time that a new process needs for a statement."""
    command = [sys.executable, "-c", TIMED.format(statement)]
    clock, processor = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    return float(clock), float(processor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="how often (default: %(default)s)")
    rounds = parser.parse_args().rounds
    for statement in STATEMENTS:  # the first import compiles bytecode and fills the disk's cache
        measure(statement)
    times = [[measure(statement) for statement in STATEMENTS] for _ in range(rounds)]
    for kind, name in ((1, "processor time"), (0, "clock")):
        torch, both = (statistics.median(each[i][kind] for each in times) for i in range(2))
        print(f"{name}: import torch {torch:.2f} s, with fusewire {both:.2f} s, ratio {both / torch:.3f}")


if __name__ == "__main__":
    main()
