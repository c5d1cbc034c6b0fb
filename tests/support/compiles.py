"""Compilations that cost the tests less."""

from __future__ import annotations

import gc
import logging
from typing import Any

# Inductor calls eager kernels instead of generating C++, and fusewire's passes run as ever. For
# tests of graphs, of collectives and of what they add up, rather than of generated code.
WITHOUT_CODE: dict[str, Any] = {"fallback_by_default": True}


def leave_out_measurements() -> None:
    """Stop what torch logs and measures of each compilation in this process; no test reads it.
    Collect garbage more rarely: Python looks through a compilation's objects hundreds of times,
    and seldom finds any garbage.

    torch must have been imported. Calls are cheap, and may be repeated.
    """
    import torch.distributed  # noqa: F401, before Dynamo lists the functions that it knows
    from torch._dynamo import guards, trace_rules

    gc.set_threshold(50_000, 20, 10)
    # pytest adds a handler to each logger that does not propagate. With one, torch writes every
    # graph as text.
    traces = logging.getLogger("torch.__trace")
    traces.handlers.clear()
    traces.propagate = True
    # It empties the processor's caches to time the guards of each graph: 40 ms.
    guards.profile_guard_manager = lambda *_: 0.0
    # init_process_group() forgets Dynamo's list of 2,800 functions, should it be older than
    # torch.distributed: 50 ms.
    trace_rules.clear_lru_cache = lambda: None
