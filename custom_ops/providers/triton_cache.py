"""Triton's cache on disk, in which a rank finds what another has compiled."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_DIRECTORY = "TRITON_CACHE_DIR"


def settle_keys(namespace: Mapping[str, Any]) -> None:
    """Have Triton compute the keys of a module's functions now, in their order; call it at the module's end.

    Triton up to 3.6 takes a constant that a function uses by way of another into its key only if it has the other's key
    already. So what a kernel is called in the cache on disk depended on which kernel a process compiled first, and a
    rank did not find what its peers had compiled. Callees first, as modules define them, it does not.
    """
    for function in list(namespace.values()):
        getattr(function, "cache_key", None)


@contextmanager
def shared_cache() -> Iterator[None]:
    """Inside, ranks that share a host's disk share Triton's cache. For the whole process: not thread-safe.

    The first kernel that Inductor compiles points Triton at a cache for this GPU alone, .../triton/<number of the GPU>; the
    folder above serves all.
    """
    directory = os.environ.get(_DIRECTORY)
    if directory is None or not Path(directory).name.isdecimal() or Path(directory).parent.name != "triton":
        yield
        return
    os.environ[_DIRECTORY] = str(Path(directory).parent)
    try:
        yield
    finally:
        os.environ[_DIRECTORY] = directory
