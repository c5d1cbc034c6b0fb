"""Keys of Triton functions that are the same in every process, whatever it compiled before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def settle_keys(namespace: Mapping[str, Any]) -> None:
    """Have Triton compute the keys of a module's functions now, in their order; call it at the module's end.

    Triton up to 3.6 takes a constant that a function uses by way of another into its key only if it has the other's key
    already. So what a kernel is called in the cache on disk depended on which kernel a process compiled first, and a
    rank did not find what its peers had compiled. Callees first, as modules define them, it does not.
    """
    for function in list(namespace.values()):
        getattr(function, "cache_key", None)
