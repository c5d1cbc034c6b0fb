"""Detect the capture of a CUDA graph, during which ranks cannot vote."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from fusewire.errors import CaptureError

_PREPARE = "call fusewire.prepare(..., max_tokens=...) on every rank, or run the model once, before capture"


_temporary: ContextVar[bool] = ContextVar("fusewire_temporary_graph", default=False)
graph_is_temporary: Callable[[], bool] = _temporary.get


@contextmanager
def temporary_graph() -> Iterator[None]:
    """Make captures inside mark no workspace as captured, so that it can be closed afterwards.

    Only for graphs that fusewire itself makes, replays and drops. Applies to this thread only.
    """
    token = _temporary.set(True)
    try:
        yield
    finally:
        _temporary.reset(token)


def capturing() -> bool:
    """Return whether a CUDA graph is being captured on the current stream."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def refuse_capture(who: str, what: str, lacks: str = "has no workspace yet", remedy: str = _PREPARE) -> None:
    """Raise CaptureError if a CUDA graph is being captured, since ranks cannot vote then."""
    if capturing():
        raise CaptureError(f"{who} {lacks} ({what}), and ranks cannot vote while a CUDA graph is captured; {remedy}")
