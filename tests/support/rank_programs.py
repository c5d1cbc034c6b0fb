"""Small tensor-parallel programs whose collectives the passes rewrite, and what came of running them."""

from __future__ import annotations

import contextlib
import os
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

import fusewire

from support.compiles import WITHOUT_CODE

HIDDEN = 64
# The time limit of every wait in these tests, in seconds: longer than any compilation on a loaded machine.
LIMIT_S = 90.0
# The same where a test knows that a rank does not come.
SHORT_S = 2.0


def norm(x, w):
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


class Ranks:
    """One rank of a test: compiles and runs programs over a group of its own, and records what came of each call."""

    def __init__(self, ranks=None, limit_s=LIMIT_S):
        self.groups = []
        self.limit(limit_s)
        torch._dynamo.reset()
        fusewire.clear_report()
        self.rank = dist.get_rank()
        self.seen = []
        self.group = self.new_group(ranks)

    def limit(self, seconds):
        """From now on fusewire waits so long at most, and the group's own collectives three times as long."""
        os.environ["FUSEWIRE_TIMEOUT_S"] = str(seconds)
        for group in self.groups:
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=3 * seconds), group)

    def new_group(self, ranks=None):
        group = dist.new_group(ranks, timeout=timedelta(seconds=LIMIT_S))
        if group != dist.GroupMember.NON_GROUP_MEMBER:
            self.groups.append(group)
        return group

    def reduce(self, x, group=None):
        return functional.all_reduce(x, "sum", self.group if group is None else group)

    def inputs(self, tokens=6):
        """x, which differs between the ranks; residual and weight, which do not."""
        generator = torch.Generator().manual_seed(tokens)
        x, r = (torch.randn(tokens, HIDDEN, generator=generator) for _ in range(2))
        return x * (1 + self.rank), r, torch.rand(HIDDEN, generator=generator) + 0.5

    def total(self, x, group=None):
        """What the sum of x over the group must be, from each rank's share of `inputs`."""
        members = dist.get_process_group_ranks(self.group if group is None else group)
        return x / (1 + self.rank) * sum(1 + rank for rank in members)

    def compile(self, fn, **options):
        return torch.compile(fn, backend="fusewire", dynamic=False, options={**WITHOUT_CODE, **options})

    def call(self, run, given, want, what=""):
        """Run and record; a rank that has raised runs nothing more."""
        if self.raised:
            return
        got = None
        with torch.no_grad():
            try:
                got = run(*given)
            except Exception as error:
                self.seen.append(f"{what} raised {type(error).__name__}: {error}")
        if self.raised:
            return
        got = got[0] if isinstance(got, tuple) else got
        wrong = (got - want).abs().max().item()
        self.seen.append(f"{what} right" if wrong < 1e-4 else f"{what} WRONG by {wrong:.2g}")

    @property
    def raised(self):
        return any(" raised " in line for line in self.seen)

    @property
    def merges(self):
        """How many all-reduces the passes merged into another: the rewriting that mixes with nothing else."""
        return sum(entry.fusion.startswith("merged") for entry in fusewire.report().entries)

    def merged(self, x, r, w, log=False):
        """Two sums that are added: one all-reduce after the passes, unless the first is read elsewhere too."""
        a, b = self.reduce(torch.tanh(x)), self.reduce(x * 0.5)
        return norm(r + (a + b), w), (a.abs().max() if log else None)

    def merged_want(self, x, r, w):
        tanh = sum(torch.tanh(x / (1 + self.rank) * (1 + rank)) for rank in dist.get_process_group_ranks(self.group))
        return norm(r + tanh + 0.5 * self.total(x), w)


@contextlib.contextmanager
def environment(**values):
    """Within the block, environment variables with these values."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


def check(seen, *, right=False):
    """Every result is right, or every rank has raised; with `right`, the first."""
    lines = [f"rank {rank}: {line}" for rank, of_rank in enumerate(seen) for line in of_rank]
    text = "\n".join(lines)
    assert all(seen), text
    assert not any("WRONG" in line for line in lines), text
    raised = [any(" raised " in line for line in of_rank) for of_rank in seen]
    assert not any(raised) or (all(raised) and not right), text
    return text
