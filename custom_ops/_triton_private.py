"""Private names of Triton that fusewire uses, and Triton's cache on disk.

tests/unit/test_canaries.py has a canary for each private name here. Triton is imported at the
first use.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from fusewire.custom_ops.environment import scoped_variable

_DIRECTORY = "TRITON_CACHE_DIR"


def compute_cache_keys(namespace: Mapping[str, Any]) -> None:
    """Compute Triton's cache keys of a module's functions now, in the module's order.

    Call it at the module's end. Triton up to 3.6 includes a constant that a function uses through
    another function in its key only if the other's key exists. Without this, its key depends on
    which kernel a process compiled first, and ranks do not find each other's compiled kernels.
    """
    for function in list(namespace.values()):
        getattr(function, "cache_key", None)


def can_be_launched(compiled: Any) -> bool:
    """Return whether the result of `kernel[grid](...)` is a compiled kernel for `launch`."""
    return hasattr(compiled, "__getitem__")


def runtime_hooks() -> Any:
    """Return Triton's settings object, where profilers set their launch hooks."""
    from triton import knobs

    return knobs.runtime


def launch(compiled: Any, programs: int, stream: int, hooks: Any, arguments: tuple[Any, ...]) -> None:
    """Launch a compiled kernel on a CUDA stream of the current device.

    Like `compiled[(programs,)](...)`, but without querying Triton's driver for device and stream.
    If hooks are set it launches like that all the same, so that they are called.

    Args:
        stream: the raw stream.
        hooks: from `runtime_hooks`.
        arguments: all of the kernel's arguments; addresses for tensors.
    """
    enter, leave = hooks.launch_enter_hook, hooks.launch_exit_hook
    if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
        compiled[programs, 1, 1](*arguments)
        return
    function, metadata = compiled.function, compiled.packed_metadata
    compiled.run(programs, 1, 1, stream, function, metadata, None, None, None, *arguments)


def shared_cache() -> AbstractContextManager[None]:
    """Make the ranks of one host share Triton's cache inside. For the whole process; thread-safe.

    Inductor's first kernel sets Triton's cache to a folder for this GPU alone, .../triton/<GPU
    number>. Inside, the folder above it is used.
    """
    return scoped_variable(_DIRECTORY, _folder_of_all_gpus)


def _folder_of_all_gpus(directory: str | None) -> str | None:
    path = Path(directory or "")
    return str(path.parent) if path.name.isdecimal() and path.parent.name == "triton" else None
