"""Find out whether a CUDA graph is being captured: ranks cannot vote meanwhile."""

from __future__ import annotations

import torch

from fusewire.errors import CaptureError

_PREPARE = "call fusewire.prepare(..., max_tokens=...) on every rank, or run the model once, before capture"


def capturing() -> bool:
    """Return whether a CUDA graph is being captured on the current stream."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def refuse_capture(who: str, what: str, lacks: str = "has no workspace yet", remedy: str = _PREPARE) -> None:
    """Raise CaptureError during the capture of a CUDA graph, where ranks cannot vote."""
    if capturing():
        raise CaptureError(f"{who} {lacks} ({what}), and ranks cannot vote while a CUDA graph is captured; {remedy}")
