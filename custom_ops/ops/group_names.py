"""Give process groups the names that an engine's graphs call them by."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor

from fusewire.custom_ops._torch_private import register_group_name
from fusewire.errors import ArgumentError

# The all-reduce (x -> sum) of a group whose engine has one of its own, by the group's name.
ENGINE_ALL_REDUCES: dict[str, Callable[[Tensor], Tensor]] = {}


def name_group(name: str, group: dist.ProcessGroup, all_reduce: Callable[[Tensor], Tensor] | None = None) -> None:
    """Let graphs call a process group by another name, on this rank.

    Serving engines name groups themselves and pass those names to operators of their own
    ("tp:0" in `vllm.all_reduce`). Call this on every rank of the group, after the group is made and
    before a graph that holds the name is compiled or loaded. Not a collective. A name that exists
    belongs to the new group from then on.

    Args:
        name: the name in the graphs.
        group: the group whose backend moves the tensors, made by torch.distributed.
        all_reduce: takes a contiguous tensor on the group's devices and returns the sum over the
            group as a new tensor of the same shape and dtype. Wherever the provider is native,
            fusewire sums with it. It may be traced, so it calls operators only. None: the group's
            own all-reduce.

    Raises:
        ArgumentError: the name is empty, or `group` is no process group of this rank.
    """
    if not isinstance(name, str) or not name:
        raise ArgumentError(f"the group's name is {name!r}; it must be a text of at least one character")
    if not isinstance(group, dist.ProcessGroup):
        raise ArgumentError(
            f"name_group({name!r}) takes a torch.distributed process group that this rank belongs "
            f"to, not {type(group).__name__}"
        )
    if all_reduce is not None and not callable(all_reduce):
        raise ArgumentError(f"name_group({name!r}): all_reduce is a {type(all_reduce).__name__}; it must be a function")
    register_group_name(name, group)
    if all_reduce is None:
        ENGINE_ALL_REDUCES.pop(name, None)
    else:
        ENGINE_ALL_REDUCES[name] = all_reduce
