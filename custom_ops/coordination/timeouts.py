"""The time limits of coordination between ranks, all in seconds.

A limit only ends in an error. No limit decides which code a rank runs.
"""

from __future__ import annotations

import os

import torch.distributed as dist

from fusewire.custom_ops._torch_private import collective_timeouts_s
from fusewire.errors import ConfigError

TIMEOUT_VARIABLE = "FUSEWIRE_TIMEOUT_S"
DEFAULT_TIMEOUT_S = 600.0
# Waits that take longer are logged on stderr, once.
ANNOUNCE_AFTER_S = 15.0
# Ahead-of-time compilation that takes longer is logged on stderr.
ANNOUNCE_COMPILING_AFTER_S = 3.0
# Limit of a provider's check of the machine, unless the provider sets another.
MACHINE_CHECK_S = 120.0
# Limit of a kernel's wait for a peer: long enough for a peer that still compiles its kernels.
KERNEL_WAIT_S = 120.0
# Limit of the wait for an outcome after the first rank has taken the ballot: it writes it next.
PUBLISH_S = 10.0
# Limit of the wait for other ranks' explanations, for an error message.
EXPLANATION_S = 3.0


def timeout_s() -> float:
    """Return the limit of a wait for peers in seconds: FUSEWIRE_TIMEOUT_S, 600 by default.

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
    """Return the limit of a wait for a vote's outcome, if the first rank waits `wait_s` per ballot.

    It is longer, so that a rank that votes before the first one still learns which rank is missing.
    """
    return wait_s * 1.25 + PUBLISH_S


def group_timeout_s(group: dist.ProcessGroup) -> float:
    """Return the shorter of `timeout_s()` and the timeout of the group's own collectives.

    The awaited peer may be inside such a collective, waiting for this rank.
    """
    return min([timeout_s(), *collective_timeouts_s(group)])
