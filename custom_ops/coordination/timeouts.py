"""Every time limit: its default, its environment variable, what it counts, and their order.

A limit only ends in an error. No limit decides which code a rank runs.

Limits of waits for other ranks hold for FUSEWIRE_TIMEOUT_S=600 and scale with that variable. Limits
of this rank's own work do not scale: they say how long a compiler or a program may take. Each limit
can also be set by a variable of its own. All ranks need the same values. A wait for a rank whose
process has ended does not last until its limit (see `processes`).

The order of the waits for other ranks is

    kernel > vote > agreement > announcement

The rank that a kernel waits for may be in a vote, and the rank that a vote waits for may be in an
agreement. So the longer wait is always the outer one, and the error that comes first is the one
nearest to the cause. A wait that is announced on stderr has time left.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from enum import Enum

import torch.distributed as dist

from fusewire.custom_ops._torch_private import collective_timeouts_s
from fusewire.custom_ops.environment import parse_seconds
from fusewire.errors import ConfigError

TIMEOUT_VARIABLE = "FUSEWIRE_TIMEOUT_S"
DEFAULT_TIMEOUT_S = 600.0


class Limit(Enum):
    """A time limit: its variable, its default in seconds, and whether it scales."""

    # Of one wait inside a kernel, from its first fruitless polls on. Nothing restarts it.
    KERNEL = ("FUSEWIRE_KERNEL_TIMEOUT_S", 900.0, True)
    # Of the same once a rank's process has ended: what it has sent has arrived long before.
    ENDED_PEER = ("FUSEWIRE_ENDED_PEER_TIMEOUT_S", 5.0, False)
    # Of a vote's wait for ballots. A message of an awaited rank that it is busy restarts it.
    VOTE = ("FUSEWIRE_VOTE_TIMEOUT_S", 660.0, True)
    # Of the waits before a graph is compiled or run: the agreement and the rendezvous. The group's
    # own timeout bounds it. A message of an awaited rank that it is busy restarts it.
    AGREEMENT = ("FUSEWIRE_AGREEMENT_TIMEOUT_S", 600.0, True)
    # Of silence: a longer wait is logged on stderr, once.
    ANNOUNCEMENT = ("FUSEWIRE_ANNOUNCEMENT_S", 15.0, True)
    # Of the wait for a vote's outcome after the first rank has taken the ballot: it writes it next.
    PUBLICATION = ("FUSEWIRE_PUBLICATION_TIMEOUT_S", 10.0, True)
    # Of the wait for other ranks' explanations, for an error message.
    EXPLANATION = ("FUSEWIRE_EXPLANATION_TIMEOUT_S", 3.0, True)
    # Between two messages of a rank that it is busy.
    BUSY_INTERVAL = ("FUSEWIRE_BUSY_INTERVAL_S", 5.0, True)
    # Between two looks of the watchdog at the error words.
    WATCHDOG_INTERVAL = ("FUSEWIRE_WATCHDOG_INTERVAL_S", 1.0, True)
    # Of FlashInfer's first calls on a new workspace, which wait for every rank.
    FIRST_CALL = ("FUSEWIRE_FIRST_CALL_TIMEOUT_S", 60.0, True)
    # Of a call that the tuner times. All ranks have voted just before.
    TIMED_CALL = ("FUSEWIRE_TIMED_CALL_TIMEOUT_S", 130.0, True)
    # Of a compilation: a rank that compiles says for at most this long that it is busy.
    # FlashInfer's kernels must be compiled within it.
    COMPILATION = ("FUSEWIRE_COMPILATION_TIMEOUT_S", 1800.0, False)
    # Of silence: a longer ahead-of-time compilation is logged on stderr.
    COMPILING_ANNOUNCEMENT = ("FUSEWIRE_COMPILING_ANNOUNCEMENT_S", 3.0, False)
    # Of a provider's check of the machine, unless the provider sets another.
    MACHINE_CHECK = ("FUSEWIRE_MACHINE_CHECK_TIMEOUT_S", 120.0, False)
    # Of the tuner's measurements of one hidden size, beside ten times its budget.
    TUNING = ("FUSEWIRE_TUNING_TIMEOUT_S", 120.0, False)
    # Of an external program that is asked something (nvcc, nvidia-smi).
    PROGRAM = ("FUSEWIRE_PROGRAM_TIMEOUT_S", 30.0, False)

    def __init__(self, variable: str, default_s: float, scales: bool) -> None:
        self.variable, self.default_s, self.scales = variable, default_s, scales


_ORDER = (Limit.KERNEL, Limit.VOTE, Limit.AGREEMENT, Limit.ANNOUNCEMENT)


def timeout_s() -> float:
    """Return FUSEWIRE_TIMEOUT_S in seconds, 600 by default.

    Raises:
        ConfigError: the variable is not a positive number.
    """
    return parse_seconds(TIMEOUT_VARIABLE, os.environ.get(TIMEOUT_VARIABLE, "")) or DEFAULT_TIMEOUT_S


def limit_s(limit: Limit) -> float:
    """Return a time limit in seconds.

    Raises:
        ConfigError: a variable is not a positive number, or the limits are out of order.
    """
    if limit in _ORDER:
        texts = (os.environ.get(each.variable, "") for each in (*_ORDER, Limit.PUBLICATION))
        return _ordered(os.environ.get(TIMEOUT_VARIABLE, ""), *texts)[_ORDER.index(limit)]
    return _one(limit, os.environ.get(limit.variable, ""), timeout_s() if limit.scales else DEFAULT_TIMEOUT_S)


def _one(limit: Limit, text: str, base_s: float) -> float:
    return parse_seconds(limit.variable, text) or limit.default_s * base_s / DEFAULT_TIMEOUT_S


@functools.lru_cache(maxsize=16)
def _ordered(base: str, *texts: str) -> tuple[float, ...]:
    """Return the ordered limits, and that of a publication, given their variables' texts."""
    base_s = parse_seconds(TIMEOUT_VARIABLE, base) or DEFAULT_TIMEOUT_S
    names = (*_ORDER, Limit.PUBLICATION)
    values = tuple(_one(limit, text, base_s) for limit, text in zip(names, texts, strict=True))
    kernel_s, vote_s, agreement_s, announcement_s, publication_s = values
    outcome_s = _outcome_s(vote_s, publication_s)
    if not kernel_s > outcome_s > vote_s > agreement_s > announcement_s:
        listed = ", ".join(f"{limit.variable} {value:g}" for limit, value in zip(_ORDER, values, strict=False))
        raise ConfigError(
            f"the time limits are out of order: {listed} (seconds). Each must be longer than the "
            f"next, and a kernel's longer than a vote with its outcome ({outcome_s:g} s), because "
            f"the awaited rank may be in the shorter wait. {TIMEOUT_VARIABLE} ({base_s:g}) scales "
            "all of them in order"
        )
    return values


def outcome_timeout_s(wait_s: float) -> float:
    """Return the limit of a wait for a vote's outcome, if the first rank waits `wait_s` per ballot.

    It is longer, so that a rank that votes before the first one still learns which rank is missing.
    """
    return _outcome_s(wait_s, limit_s(Limit.PUBLICATION))


def _outcome_s(wait_s: float, publication_s: float) -> float:
    return wait_s * 1.25 + publication_s


def group_timeout_s(group: dist.ProcessGroup) -> float:
    """Return the shorter of the agreement's limit and the timeouts of the group's own collectives.

    The awaited peer may be inside such a collective, waiting for this rank.
    """
    return min([limit_s(Limit.AGREEMENT), *collective_timeouts_s(group).values()])


def kernel_timeout_s(group: dist.ProcessGroup) -> float:
    """Return the longer of a kernel's limit and the timeout of the group's collectives on GPUs.

    So a kernel gives up on no rank for which NCCL would still wait.
    """
    return max(limit_s(Limit.KERNEL), collective_timeouts_s(group).get("cuda", 0.0))


def check_kernel_timeouts(by_rank: Mapping[int, float]) -> None:
    """Raise ConfigError if the ranks' kernels would give up after different times."""
    if len(set(by_rank.values())) > 1:
        listed = ", ".join(f"rank {rank} {value:g} s" for rank, value in sorted(by_rank.items()))
        raise ConfigError(
            f"the ranks' kernels would give up after different times: {listed}. Set "
            f"{TIMEOUT_VARIABLE}, {Limit.KERNEL.variable} and the process group's timeout alike "
            "on every rank"
        )
