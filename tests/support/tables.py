"""Tables of measured times, and ranks that measure with the fake FlashInfer."""

from __future__ import annotations

import contextlib
import os
from unittest import mock

import torch
import torch.distributed as dist

from fusewire.custom_ops.dispatch import cost_tables, dispatcher, table_store, table_vote
from fusewire.custom_ops.dispatch.table_store import Table, TableKey
from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm as op
from fusewire.custom_ops.tuning import timers

from support.fake_flashinfer import args_of, fake_flashinfer

BF16 = torch.bfloat16
HIDDEN = 64
KEY = TableKey("cuda", "NVIDIA H200", "580.1", "NVLink 5 x 18, NVSwitch", 2, HIDDEN, "bfloat16", {"torch": "2.13.0"})
TIMES = {"native": ((1, 10.0), (64, 40.5)), cost_tables.ONE_SHOT: ((1, 2.5), (8, 50.0))}
TABLE = Table(KEY, TIMES, "2026-11-20 08:00 UTC", 12.5, {"x/y": "wrong"}, {"symm_mem": "no"}, 4e11, ("a note",))


@contextlib.contextmanager
def on_rank(cache, made_up=None, **environment):
    """A rank with the fake FlashInfer and a cache folder; made_up(label, tokens, rank) gives the times, if given."""
    folder = cache[dist.get_rank()] if isinstance(cache, (list, tuple)) else cache
    changes = {table_store.CACHE_VARIABLE: str(folder), table_vote.TUNE_VARIABLE: "", **environment}

    def timed(self, call, calls):
        candidate, inputs = call.args
        call(0)
        return made_up(candidate.label, inputs[0].x.shape[0], dist.get_rank())

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, changes))
        if made_up is not None:
            stack.enter_context(mock.patch.object(timers.CpuTimer, "time", timed))
        yield stack.enter_context(fake_flashinfer())


def chosen(tokens):
    """The variants that serve these numbers of tokens, as the dispatcher decides for real calls."""
    found = []
    for n in tokens:
        x = torch.ones(n, HIDDEN, dtype=BF16)
        decision = dispatcher.decide(op, args_of(x, x, x[0].clone(), dist.group.WORLD.group_name), "flashinfer,native")
        found.append(decision.bound[2] if decision.bound else decision.provider.name)
    return found


def times_of(label, tokens, rank):
    """Native is the best at 1, one-shot up to 4, two-shot from 8 on; rank 1 is slower."""
    best = {"native": tokens < 2, cost_tables.ONE_SHOT: 2 <= tokens <= 4, cost_tables.TWO_SHOT: tokens > 4}
    return (10.0 if best[label] else 20.0) + rank
