"""Private names of torch that custom_ops uses, each tested in tests/unit/test_canaries.py.

Names that every call uses are bound directly: a wrapper function would cost host time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._library.autograd import make_autograd_impl

_collectives = torch.ops._c10d_functional

# The process group of a name; raises RuntimeError or ValueError if there is none.
process_group: Callable[[str], dist.ProcessGroup] = dist.distributed_c10d._resolve_process_group  # type: ignore[assignment,attr-defined]


def register_group_name(name: str, group: dist.ProcessGroup) -> None:
    """Let `process_group` resolve a name to a group; a group that had the name before loses it."""
    from torch._C._distributed_c10d import _register_process_group, _unregister_process_group

    try:
        process_group(name)
    except (RuntimeError, ValueError):
        pass
    else:
        _unregister_process_group(name)  # type: ignore[arg-type]
    _register_process_group(name, group)  # type: ignore[arg-type]


# The dispatch keys after autograd's; `keyset & AFTER_AUTOGRAD` is what is left to dispatch to.
AFTER_AUTOGRAD: Any = torch._C._after_autograd_keyset  # type: ignore[attr-defined]
# The keys of kernels for plain tensors.
BACKEND_KEYS = frozenset({torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA})


def _no_stream(device_index: int) -> int:
    raise RuntimeError(f"this build of torch has no CUDA, so there is no stream of device {device_index}")


# The handle of a device's current stream. Absent from a torch that is built without CUDA.
current_raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _no_stream)
# Whether a CUDA graph captures the current stream; `torch.cuda`'s function, without its checks.
is_capturing: Callable[[], bool] = getattr(torch._C, "_cuda_isCurrentStreamCapturing", bool)


def process_groups() -> list[dist.ProcessGroup]:
    """Return the process groups that this rank belongs to; none without torch.distributed."""
    if not dist.is_available() or not dist.is_initialized():
        return []
    return list(dist.distributed_c10d._world.pg_map)


def store_of(group: dist.ProcessGroup) -> dist.distributed_c10d.Store:
    """Return the store that torch.distributed made a group with; KeyError if it did not."""
    return dist.distributed_c10d._get_process_group_store(group)


def collective_timeouts_s(group: dist.ProcessGroup) -> dict[str, float]:
    """Return the timeouts in seconds of a group's collectives, by device type."""
    found: dict[str, float] = {}
    for device in getattr(group, "_device_types", ()):
        with contextlib.suppress(AttributeError, RuntimeError):  # a backend without options
            options = group._get_backend(torch.device(device)).options  # type: ignore[attr-defined]
            found[torch.device(device).type] = options._timeout.total_seconds()
    return found


def all_reduce(x: Tensor, group_name: str) -> Tensor:
    """Return the sum of x over a group's ranks, as a new tensor. A collective."""
    reduced: Tensor = _collectives.wait_tensor(_collectives.all_reduce(x, "sum", group_name))
    return reduced


def all_gather(x: Tensor, world_size: int, group_name: str) -> Tensor:
    """Return the x of all ranks, one after another in the first dimension. A collective."""
    gathered: Tensor = _collectives.wait_tensor(_collectives.all_gather_into_tensor(x, world_size, group_name))
    return gathered


def reduce_scatter(x: Tensor, world_size: int, group_name: str) -> Tensor:
    """Return this rank's part (first dimension) of the sum of x over the ranks. A collective."""
    part: Tensor = _collectives.wait_tensor(_collectives.reduce_scatter_tensor(x, "sum", world_size, group_name))
    return part


def autograd_kernel(
    op: Any, backward: Callable[..., Any], setup_context: Callable[..., None] | None
) -> Callable[..., Any]:
    """Return the Autograd kernel (keyset, *args) that torch.library would register."""
    kernel: Callable[..., Any] = make_autograd_impl(
        op, SimpleNamespace(_backward_fn=backward, _setup_context_fn=setup_context)
    )
    return kernel


def operator_name(target: Any) -> str | None:
    """Return the name ("aten::add") of an operator that a graph node calls, else None."""
    return str(target._schema.name) if isinstance(target, torch._ops.OpOverload) else None


def symmetric_buffer(nbytes: int, device: torch.device) -> Tensor:
    """Allocate memory that peers can map, outside torch's own pool, which would keep it."""
    from torch.distributed import _symmetric_memory

    memory = _symmetric_memory._SymmetricMemory  # type: ignore[attr-defined]
    buffer: Tensor = memory.empty_strided_p2p((nbytes,), (1,), torch.uint8, device)
    return buffer


def map_peers(buffer: Tensor, group: dist.ProcessGroup) -> Any:
    """Map every rank's `symmetric_buffer`; return torch's handle of them. A collective."""
    from torch.distributed import _symmetric_memory

    return _symmetric_memory.rendezvous(buffer, group)
