"""Votes of real ranks with short waits, and a check that they leave no key in the group's store."""

from __future__ import annotations

import os
import time
from unittest import mock

import torch.distributed as dist

from fusewire.custom_ops.coordination.processes import announce
from fusewire.custom_ops.coordination.store import default_store
from fusewire.custom_ops.coordination.timeouts import Limit
from fusewire.custom_ops.coordination.vote import Channel, vote
from fusewire.errors import PeerTimeoutError

from support.distributed import shared_pool

WAIT_S = 1.0
PUBLISH_S = 0.5  # instead of 10 seconds
OUTCOME_S = 1.25 * WAIT_S + PUBLISH_S


def on_ranks(size, job, *args):
    """What a job returns on each rank; the store must hold no more keys after it than before."""
    for kept, found in (results := shared_pool(size).run(_counted, job, args, timeout_s=120)):
        assert kept == 0, found
    return [found for _, found in results]


def _counted(job, args):
    announce(default_store())  # otherwise some job's first wait would
    before = _keys()
    with short_limits():
        found = job(dist.get_rank(), *args)
    return _keys() - before, found


def short_limits(publication_s=PUBLISH_S):
    """Shorter limits than the defaults, in this process."""
    limits = {Limit.PUBLICATION.variable: str(publication_s), Limit.BUSY_INTERVAL.variable: str(WAIT_S / 4)}
    return mock.patch.dict(os.environ, limits)


def _keys():
    dist.barrier()
    count = dist.distributed_c10d._get_process_group_store(dist.group.WORLD).num_keys()
    dist.barrier()
    return count


def channel(label="label", wait_s=WAIT_S):
    return Channel(dist.group.WORLD, label, wait_s)


def ask(on=None, topic="topic", fact=None, **options):
    """The facts of all ranks by a vote, or the error."""
    start = time.monotonic()
    try:
        result = vote(on or channel(), topic, lambda: {"fact": fact}, **options)
    except PeerTimeoutError as error:
        return str(error), time.monotonic() - start
    return [each["fact"] for each in result.facts]
