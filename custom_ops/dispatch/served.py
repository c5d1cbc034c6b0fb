"""Count the calls that each provider serves, by operator, group, dtype, hidden size and tokens.

A decision holds its counter, so a call costs one addition. A replay of a CUDA graph runs no host
code and is not counted; its calls were counted once, as captured.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch


class ServedCalls(NamedTuple):
    """The calls of one kind that one provider has served.

    Attributes:
        op: the operator's name.
        group: the process group's name, as the calls gave it.
        hidden: the hidden size.
        dtype: of x, as "bfloat16".
        tokens: rows of x.
        provider: the provider's name.
        variant: which of the provider's kernels, as cost tables name it, or "".
        calls: how many calls ran, those of CUDA graphs left out.
        captured: how many calls were captured into CUDA graphs, however often these are replayed.
        reason: why providers of higher priority have no workspace for such calls, or "".
    """

    op: str
    group: str
    hidden: int
    dtype: str
    tokens: int
    provider: str
    variant: str
    calls: int
    captured: int
    reason: str = ""


class ServedCounter:
    """Counts calls of one kind.

    `counter.calls += 1` needs no lock: CPython switches threads at calls and at jumps only. The
    dispatcher does it in place, since a method would double the time.

    Attributes:
        on_gpu: whether a CUDA graph may capture these calls.
        reason: as in `ServedCalls`; of the latest decision.
    """

    __slots__ = ("calls", "captured", "on_gpu", "reason")

    def __init__(self, on_gpu: bool) -> None:
        self.calls = self.captured = 0
        self.on_gpu = on_gpu
        self.reason = ""


_counters: dict[tuple[tuple[Any, ...], bool], ServedCounter] = {}
_lock = threading.Lock()


def counter_of(op: str, x: torch.Tensor, group: str, provider: str, variant: str, reason: str = "") -> ServedCounter:
    """Return the counter for calls like this one, and give it the reason. Thread-safe."""
    hidden = x.shape[-1]
    dtype = str(x.dtype).removeprefix("torch.")
    tokens = x.numel() // hidden if hidden else 0
    key = (op, group, hidden, dtype, tokens, provider, variant)
    with _lock:
        counter = _counters.setdefault((key, x.is_cuda), ServedCounter(x.is_cuda))
        counter.reason = reason
        return counter


def served_calls() -> list[ServedCalls]:
    """Return the calls served since the start, or since `forget_served`. Thread-safe."""
    with _lock:
        found = [
            ServedCalls(*(*key, counter.calls, counter.captured, counter.reason))
            for (key, _), counter in _counters.items()
        ]
    return sorted(row for row in found if row.calls or row.captured)


def forget_served() -> None:
    """Set every count to zero. Thread-safe."""
    with _lock:
        for counter in _counters.values():
            counter.calls = counter.captured = 0
