"""Triton's cache on disk, in which a rank finds what another has compiled."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from fusewire.custom_ops.environment import scoped_variable

_DIRECTORY = "TRITON_CACHE_DIR"


def settle_keys(namespace: Mapping[str, Any]) -> None:
    """Have Triton compute the keys of a module's functions now, in their order; call it at the module's end.

    Triton up to 3.6 takes a constant that a function uses by way of another into its key only if it has the other's key
    already. So what a kernel is called in the cache on disk depended on which kernel a process compiled first, and a
    rank did not find what its peers had compiled. Callees first, as modules define them, it does not.
    """
    for function in list(namespace.values()):
        getattr(function, "cache_key", None)


def shared_cache() -> AbstractContextManager[None]:
    """Inside, ranks that share a host's disk share Triton's cache. For the whole process; thread-safe.

    The first kernel that Inductor compiles points Triton at a cache for this GPU alone, .../triton/<number of the GPU>; the
    folder above serves all.
    """
    return scoped_variable(_DIRECTORY, _folder_of_all_gpus)


def _folder_of_all_gpus(directory: str | None) -> str | None:
    path = Path(directory or "")
    return str(path.parent) if path.name.isdecimal() and path.parent.name == "triton" else None
