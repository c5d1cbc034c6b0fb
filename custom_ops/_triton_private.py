"""What fusewire uses of Triton beyond its public interface, and Triton's cache on disk.

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
    """Have Triton compute the keys of a module's functions now, in their order.

    Call it at the module's end. Triton up to 3.6 takes a constant that a function uses by way of
    another into its key only if it has the other's key already. Without this, a kernel's key in the
    cache on disk depends on which kernel a process compiled first, and a rank does not find what
    its peers compiled. Modules define callees first, so in their order the keys are always alike.
    """
    for function in list(namespace.values()):
        getattr(function, "cache_key", None)


def can_be_launched(compiled: Any) -> bool:
    """Return whether what `kernel[grid](...)` returned is a compiled kernel for `launch`."""
    return hasattr(compiled, "__getitem__")


def runtime_hooks() -> Any:
    """Return Triton's settings, in which a profiler sets what is called at launches."""
    from triton import knobs

    return knobs.runtime


def launch(compiled: Any, programs: int, stream: int, hooks: Any, arguments: tuple[Any, ...]) -> None:
    """Launch a compiled kernel on a CUDA stream of the current device.

    As `compiled[(programs,)](...)`, but without asking Triton's driver for device and stream. With
    hooks set it is launched that way, so that they are called.

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
    """Have the ranks of one host share Triton's cache inside. For the whole process; thread-safe.

    The first kernel that Inductor compiles points Triton at a cache for this GPU alone,
    .../triton/<number of the GPU>. Inside, it is the folder above, which serves all.
    """
    return scoped_variable(_DIRECTORY, _folder_of_all_gpus)


def _folder_of_all_gpus(directory: str | None) -> str | None:
    path = Path(directory or "")
    return str(path.parent) if path.name.isdecimal() and path.parent.name == "triton" else None
