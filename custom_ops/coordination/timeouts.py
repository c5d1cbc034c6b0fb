"""The time limits of coordination between ranks, all in seconds.

A limit only ever ends in an error. No limit decides what a rank runs.
"""

from __future__ import annotations

import os

import torch.distributed as dist

from fusewire.custom_ops._torch_private import collective_timeouts_s
from fusewire.errors import ConfigError

TIMEOUT_VARIABLE = "FUSEWIRE_TIMEOUT_S"
DEFAULT_TIMEOUT_S = 600.0
# A wait that takes longer is announced on stderr, once.
ANNOUNCE_AFTER_S = 15.0
# Compiling kernels ahead is announced on stderr if it takes longer.
ANNOUNCE_COMPILING_AFTER_S = 3.0
# How long a provider may take to find out whether it can serve on this machine, unless it says
# otherwise.
MACHINE_CHECK_S = 120.0
# How long a kernel waits for a peer: long enough for a peer that compiles its kernels first.
KERNEL_WAIT_S = 120.0
# How long a rank waits for the outcome once the first rank has taken its vote: the first rank
# writes it next.
PUBLISH_S = 10.0
# How long a rank that raises waits for the others' side of the story, for its message.
EXPLANATION_S = 3.0


def timeout_s() -> float:
    """Return how long a rank waits for its peers: FUSEWIRE_TIMEOUT_S, 600 s by default.

    Raises:
        ConfigError: the variable is not a positive number.
    """
    text = os.environ.get(TIMEOUT_VARIABLE, "")
    try:
        value = float(text) if text else DEFAULT_TIMEOUT_S
    except ValueError:
        value = -1.0
    if not value > 0:
        raise ConfigError(f"{TIMEOUT_VARIABLE}={text!r} is not a positive number of seconds")
    return value


def outcome_timeout_s(wait_s: float) -> float:
    """Return how long a rank waits for the outcome of a vote for which the first rank waits
    `wait_s` for each vote.

    It is longer, so that a rank that comes before the first one still hears from it who was
    missing.
    """
    return wait_s * 1.25 + PUBLISH_S


def group_timeout_s(group: dist.ProcessGroup) -> float:
    """Return the shorter of `timeout_s()` and the time after which the group's own collectives
    fail.

    A peer that this rank waits for may itself be inside such a collective, waiting for this rank.
    """
    return min([timeout_s(), *collective_timeouts_s(group)])
