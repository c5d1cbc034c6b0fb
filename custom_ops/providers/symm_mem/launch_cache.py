"""A call of `symm_mem` that differs from an earlier one only in where its tensors lie, at half the host time."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusewire.custom_ops._torch_private import current_raw_stream
from fusewire.custom_ops.providers.symm_mem.arguments import KINDS
from fusewire.custom_ops.providers.symm_mem.workspace import SymmMemWorkspace

_MAX_KNOWN = 4096  # token counts of a process that never repeats one


@dataclass(frozen=True)
class Known:
    """A launch.

    Attributes:
        compiled: Triton's compiled kernel.
        programs: blocks in the grid.
        arguments: those from the number of tokens on.
        hooks: Triton's settings, with what a profiler wants called at launches.
    """

    compiled: Any
    programs: int
    arguments: tuple[Any, ...]
    hooks: Any

    def launch(self, device_index: int, *pointers: int | None) -> None:
        """Launch on the device's current stream.

        As `compiled[grid](...)` does, without asking for the device and the stream through Triton's driver.
        """
        compiled, grid = self.compiled, (self.programs, 1, 1)
        enter, leave = self.hooks.launch_enter_hook, self.hooks.launch_exit_hook
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
            compiled[grid](*pointers, *self.arguments)
            return
        stream = current_raw_stream(device_index)
        function, metadata = compiled.function, compiled.packed_metadata
        compiled.run(*grid, stream, function, metadata, None, None, None, *pointers, *self.arguments)


def key_of(
    call: Callable[..., Any], x: Tensor, residual: Tensor | None, weight: Tensor | None, *numbers: Hashable
) -> Hashable:
    """What a launch depends on besides the places of the tensors, if these are as they should be; None if each call
    converts its weight.
    """
    kind = None if weight is None else weight.dtype
    return None if kind is not None and kind not in KINDS else (call, x.shape, x.dtype, residual is None, kind, numbers)


def remember(ws: SymmMemWorkspace, key: Hashable, compiled: Any, programs: int, arguments: tuple[Any, ...]) -> None:
    """Keep a launch (see `Known`) for `repeated`, until the workspace is closed. Thread-safe."""
    from triton import knobs

    known = ws.known
    if ws.closed:  # by another thread meanwhile; what is kept in `known` from here on, nobody will find
        return
    if len(known) >= _MAX_KNOWN:
        known.clear()
    known[key] = Known(compiled, programs, arguments, knobs.runtime)


def repeated(
    ws: SymmMemWorkspace, key: Hashable, x: Tensor, residual: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """The results of the launch known by that key, on these tensors; None if there is none, or if a tensor is not as it
    should be: the long way says what is wrong with it, or copies it.

    Raises:
        PeerTimeoutError: an earlier call waited for a peer in vain.
    """
    known = None if key is None else ws.known.get(key)
    device = ws.device
    if known is None or not _ready(x, device) or torch.cuda.current_device() != device.index:
        return None
    if residual is not None and not (
        residual.shape == x.shape and residual.dtype == x.dtype and _ready(residual, device)
    ):
        return None
    if weight is not None and not (weight.dim() == 1 and weight.shape[0] == ws.hidden and _ready(weight, device)):
        return None
    ws.check()
    norm, summed = torch.empty_like(x), torch.empty_like(x)
    known.launch(
        device.index,
        ws.ctl.data_ptr(),
        x.data_ptr(),
        None if residual is None else residual.data_ptr(),
        None if weight is None else weight.data_ptr(),
        norm.data_ptr(),
        summed.data_ptr(),
    )
    return norm, summed


def _ready(t: Tensor, device: torch.device) -> bool:
    return t.is_contiguous() and not t.data_ptr() % 16 and t.device == device
