"""Fit the cost formula to the shipped tables: `custom_ops/dispatch/cost_parameters.py` is what this
command wrote.

    python -m tests.support.costs                                                      # print it
    python -m tests.support.costs --write custom_ops/dispatch/cost_parameters.py

Least squares of relative errors, all world sizes together. It also says how well the formula
chooses at the points that are left out of the fit.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from fusewire.custom_ops.dispatch.cost_formula import (
    LATENCY,
    OVERLAPPING,
    THROUGHPUT,
    CostFormula,
    Size,
    combine,
    data_tokens,
    link_us,
    parts,
)
from fusewire.custom_ops.dispatch.cost_model import CostModel
from fusewire.custom_ops.dispatch.cost_parameters import Parameters
from fusewire.custom_ops.dispatch.cost_tables import (
    NATIVE,
    ONE_SHOT,
    SYMM_ONE_SHOT,
    SYMM_TWO_SHOT,
    TABLES,
    TWO_SHOT,
    ShippedTable,
)

# The terms of each variant's protocols; `symm_mem`'s two-shot has one for few tokens and one for
# more.
PROTOCOLS = {
    SYMM_ONE_SHOT: (("call", "row_to_peers", "fourth_root"),),
    SYMM_TWO_SHOT: (("call", "row_to_peers", "fourth_root"), ("call", "own_rows")),
    ONE_SHOT: (("call", "row_to_peers", "fourth_root", "rows", "all_x"),),
    TWO_SHOT: (("call", "row_to_peers", "x"),),
    NATIVE: (("call", "row_to_peers", "root"),),
}
_STEPS = 10
POLICIES = (("symm_mem", "flashinfer", "native"), ("symm_mem", "native"), ("flashinfer", "native"))


def fit(tables: Sequence[ShippedTable] = TABLES) -> Parameters:
    """Return the parameters that fit the tables best."""
    return {
        variant: tuple(
            _fit_protocol(variant, terms, list(_points(tables, variant, number if len(protocols) > 1 else None)))
            for number, terms in enumerate(protocols)
        )
        for variant, protocols in PROTOCOLS.items()
    }


def _points(tables: Sequence[ShippedTable], variant: str, protocol: int | None) -> Iterator[tuple[Size, float]]:
    for table in tables:
        for tokens, us in table.times.get(variant, ()):
            if protocol in (None, int(tokens > data_tokens(table.world_size))):
                yield Size(tokens, table.row_bytes, table.world_size), us


def _fit_protocol(variant: str, terms: Sequence[str], points: Sequence[tuple[Size, float]]) -> dict[str, float]:
    """Return the coefficients with the least squares of relative errors, by repeated linear fits."""
    found = dict.fromkeys(terms, 1.0)
    for _ in range(_STEPS if variant in OVERLAPPING else 1):
        rows, wanted = [], []
        for size, us in points:
            latency, throughput = parts(variant, size, found)
            total = combine(variant, latency, throughput)
            # The time's derivatives by latency and throughput, with which it is their sum.
            by = (latency / total, throughput / total) if variant in OVERLAPPING else (1.0, 1.0)
            rows.append([_derivative(term, size, by) / us for term in terms])
            wanted.append([1 - by[1] * link_us(variant, size) / us])
        solved = torch.linalg.lstsq(torch.tensor(rows, dtype=torch.float64), torch.tensor(wanted, dtype=torch.float64))
        found = dict(zip(terms, solved.solution.flatten().tolist(), strict=True))
        least = min(found, key=found.__getitem__)
        if found[least] < 0:  # a term costs time or nothing
            return _fit_protocol(variant, [term for term in terms if term != least], points)
    return {term: float(f"{value:.4g}") for term, value in found.items()}


def _derivative(term: str, size: Size, by: tuple[float, float]) -> float:
    return by[0] * LATENCY[term](size) if term in LATENCY else by[1] * THROUGHPUT[term](size)


# --- Leaving points out ---------------------------------------------------------------------------


class Choice(NamedTuple):
    """A choice at a point that was left out; `ratio` is its measured time divided by the measured
    best.
    """

    ratio: float
    policy: tuple[str, ...]
    world_size: int
    hidden: int
    tokens: int
    chosen: str
    best: str


def without_hidden_size(table: ShippedTable, tokens: int) -> CostModel:
    """Return the costs at a table's hidden size from a fit without that table."""
    fitted = _fit_without(TABLES.index(table))
    return CostModel("", formula=CostFormula(table.row_bytes, table.world_size, fitted))


@functools.cache
def _fit_without(number: int) -> Parameters:
    return fit([*TABLES[:number], *TABLES[number + 1 :]])


def without_tokens(table: ShippedTable, tokens: int) -> CostModel:
    """Return the costs at a table's hidden size from the table and a fit, both without these
    tokens.
    """
    times = {label: tuple(point for point in points if point[0] != tokens) for label, points in table.times.items()}
    rest = replace(table, times=times)
    fitted = fit([rest if other is table else other for other in TABLES])
    return CostModel("", times, CostFormula(table.row_bytes, table.world_size, fitted))


def choices(leave_out, tables: Sequence[ShippedTable] = TABLES) -> Iterator[Choice]:
    """Yield the choice at every point of the tables, by the costs that `leave_out(table, tokens)`
    returns.
    """
    for table in tables:
        measured = {label: dict(points) for label, points in table.times.items()}
        for tokens in sorted({tokens for points in measured.values() for tokens in points}):
            costs = leave_out(table, tokens)
            for policy in POLICIES:
                times = {
                    label: points[tokens]
                    for label, points in measured.items()
                    if tokens in points and label.partition("/")[0] in policy
                }
                estimates = {label: cost for label in times if (cost := costs.cost(label, tokens)) is not None}
                chosen, best = min(estimates, key=estimates.__getitem__), min(times, key=times.__getitem__)
                ratio = times[chosen] / times[best]
                yield Choice(ratio, policy, table.world_size, table.hidden, tokens, chosen, best)


def distribution(found: Sequence[Choice]) -> str:
    """Return a text of the choices' ratios."""
    ratios = [choice.ratio for choice in found]
    within = ", ".join(f"{sum(ratio <= bound for ratio in ratios)} at most {bound:.2f}" for bound in (1.0, 1.02, 1.05))
    return f"{len(ratios)} choices: {within}; the worst {max(ratios):.3f}"


# --- The file -------------------------------------------------------------------------------------

_HEAD = '''"""The coefficients of the cost formula: microseconds for each term, by variant and protocol.

Written by `python -m tests.support.costs` from the shipped tables; do not edit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Parameters = Mapping[str, Sequence[Mapping[str, float]]]

'''


def as_source(parameters: Parameters) -> str:
    """Return the text of `cost_parameters.py`, formatted as ruff formats it."""
    lines = ["PARAMETERS: Parameters = {"]
    for variant, protocols in parameters.items():
        inner = ["{" + ", ".join(f'"{term}": {value!r}' for term, value in p.items()) + "}" for p in protocols]
        short = f'    "{variant}": ({inner[0]},),'
        if len(inner) == 1 and len(short) <= 120:
            lines.append(short)
        else:
            lines += [f'    "{variant}": (', *(f"        {text}," for text in inner), "    ),"]
    return _HEAD + "\n".join([*lines, "}"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="the file to write")
    write = parser.parse_args().write
    text = as_source(fit())
    if write:
        write.write_text(text)
    else:
        print(text)
    for name, leave_out in (("hidden sizes", without_hidden_size), ("numbers of tokens", without_tokens)):
        found = list(choices(leave_out))
        print(f"{name} left out: {distribution(found)}")
        for choice in found:
            if choice.ratio > 1.05:
                print(f"  {choice}")


if __name__ == "__main__":
    main()
