"""Implementations of the operators beside native. Importing this package registers all of them.

The modules named here register providers when they are imported and import what those need (Triton,
FlashInfer) at their first use, so that nothing here costs more than reading it, or fails where a package or a
GPU is missing.
"""

from __future__ import annotations

import importlib

_MODULES = ("torch_batch_invariant", "triton_norm", "batch_invariant", "flashinfer", "symm_mem_provider")


def load_providers() -> None:
    """Register every provider. Safe to call twice."""
    for name in _MODULES:
        importlib.import_module(f"{__name__}.{name}")
    importlib.import_module("fusewire.custom_ops.dispatch")
    importlib.import_module("fusewire.custom_ops.extended")


load_providers()
