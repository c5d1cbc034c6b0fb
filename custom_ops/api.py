"""Registers the providers that come with fusewire, and who chooses among them."""

from __future__ import annotations

import importlib

_PACKAGE = "fusewire.custom_ops"
# Importing one registers what it provides. What they need (Triton, FlashInfer) they import at their first use.
_REGISTERING = (
    "providers.batch_invariant.torch_norm",
    "providers.batch_invariant.triton_norm",
    "providers.batch_invariant.provider",
    "providers.flashinfer.provider",
    "providers.symm_mem.provider",
    "dispatch.dispatcher",
    "dispatch.derived_ops",
)


def load_providers() -> None:
    """Register every provider. Calling it again changes nothing."""
    for name in _REGISTERING:
        importlib.import_module(f"{_PACKAGE}.{name}")
