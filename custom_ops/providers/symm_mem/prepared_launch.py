"""Reuse the launch of a bound operator's first call, which halves the host time of later calls.

A bound operator repeats the same call with other tensors: same shapes, dtypes and numbers. The
first call is checked and launched through Triton; its compiled kernel, grid and arguments (except
addresses) launch the later ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusewire.custom_ops import _triton_private
from fusewire.custom_ops._torch_private import current_raw_stream
from fusewire.custom_ops.ops.norms import NormSpec
from fusewire.custom_ops.providers.symm_mem import launcher
from fusewire.custom_ops.providers.symm_mem.arguments import Quantization, new_scales
from fusewire.custom_ops.providers.symm_mem.launch_config import Launch
from fusewire.custom_ops.providers.symm_mem.launcher import compiles_only
from fusewire.custom_ops.providers.symm_mem.workspace import SymmMemWorkspace


class PreparedLaunch:
    """A launch for calls that differ from an earlier call only in tensors' addresses.

    Args:
        ws: the workspace.
        launch: the earlier call's launch.
        numbers: the earlier call's other inputs on which the launch depends.
        compiled: Triton's compiled kernel.
    """

    def __init__(self, ws: SymmMemWorkspace, launch: Launch, numbers: tuple[Any, ...], compiled: Any) -> None:
        tensors = launch.tensors
        # The tensors that the kernel gets: a call whose weight must be converted never matches.
        given = (tensors.x, tensors.residual, tensors.weight, tensors.inner_weight, tensors.scale)
        self._like = [None if tensor is None else (tensor.shape, tensor.dtype) for tensor in given]
        self._ws, self._numbers, self._compiled = ws, numbers, compiled
        self._programs, self._arguments = launch.config.programs, launch.arguments
        self._results = [
            None if result is None else (result.shape, result.dtype, slot)
            for result, slot in zip(launch.results, launch.outputs, strict=True)
        ]
        self._results_like_x = self._results == [(tensors.x.shape, tensors.x.dtype, None)] * 2
        self._hooks = _triton_private.runtime_hooks()

    def __call__(
        self,
        numbers: tuple[Any, ...],
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        inner_weight: Tensor | None,
        quantization: Quantization | None,
    ) -> tuple[Tensor | None, ...] | None:
        """Launch if the call matches; return its results, or None if it does not.

        Raises:
            PeerTimeoutError: a peer did not take part in an earlier call.
        """
        ws, (like_x, like_residual, like_weight, like_inner, like_scale) = self._ws, self._like
        device = ws.device
        if numbers != self._numbers or ws.closed:
            return None
        addresses = (
            _address(x, like_x, device),
            _address(residual, like_residual, device),
            _address(weight, like_weight, device),
            _address(inner_weight, like_inner, device),
        )
        scale = None if quantization is None else _address(quantization.scale, like_scale, device, 4)
        if _UNFIT in addresses or scale == _UNFIT:
            return None
        ws.check()
        results: tuple[Tensor | None, ...]
        if quantization is None:
            results = (torch.empty_like(x), torch.empty_like(x)) if self._results_like_x else self._new_results(x)
            written = (*map(_address_of, results), None, None, None)
        else:
            results = (*self._new_results(x), new_scales(x, quantization.quant))
            norm, summed, quantized, scales = map(_address_of, results)
            written = (norm, summed, scale, quantized, scales)
        arguments = (ws.ctl.data_ptr(), *addresses, *written, *self._arguments)
        if torch.cuda.current_device() == device.index:
            self._launch(device, arguments)
        else:
            with torch.cuda.device(device):
                self._launch(device, arguments)
        return results

    def _launch(self, device: torch.device, arguments: tuple[Any, ...]) -> None:
        stream = current_raw_stream(device.index)
        _triton_private.launch(self._compiled, self._programs, stream, self._hooks, arguments)

    def _new_results(self, x: Tensor) -> tuple[Tensor | None, ...]:
        """Return memory for the first three results, or two of them."""
        ws = self._ws
        return tuple(
            None
            if like is None
            else x.new_empty(like[0], dtype=like[1])
            if like[2] is None
            else ws.output(like[2], x.numel() // ws.hidden, like[1]).view(like[0])
            for like in self._results[:3]
        )


_UNFIT = -1


def _address_of(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _address(
    tensor: Tensor | None, like: tuple[torch.Size, torch.dtype] | None, device: torch.device, alignment: int = 16
) -> int | None:
    """Return a tensor's address, None for no tensor, or _UNFIT if the kernel needs a copy."""
    if tensor is None or like is None:
        return None if tensor is None and like is None else _UNFIT
    address = tensor.data_ptr()
    fits = tensor.shape == like[0] and tensor.dtype == like[1] and not address % alignment
    return address if fits and tensor.is_contiguous() and tensor.device == device else _UNFIT


class PreparedCall:
    """Calls of one kind on one workspace, with the launch that the last full call prepared.

    A call that does not match it, or whose tensors need a copy, is checked in full and prepares a
    new launch. Thread-safe: two threads may prepare the same launch, and one of them is kept.

    Args:
        ws: the workspace.
        make: `one_shot_launch`, `two_shot_launch` or `two_shot_sharded_launch`.
        output: the output buffer for the result; used by the protocol with flags only.
    """

    def __init__(self, ws: SymmMemWorkspace, make: Callable[..., Launch], output: int | None = None) -> None:
        self.ws, self.make = ws, make
        self._output = output if output is not None and output < ws.layout.outputs else None
        self._prepared: PreparedLaunch | None = None

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None,
        norm: NormSpec,
        inner: NormSpec | None = None,
        quantization: Quantization | None = None,
    ) -> tuple[Tensor | None, ...]:
        """Make the call. A collective. Arguments, results and errors are those of `make`."""
        numbers: tuple[Any, ...] = norm[1:]
        if inner is not None:
            numbers += inner[1:]
        if quantization is not None:
            numbers += (quantization.quant, quantization.with_norm)
        prepared = self._prepared
        if prepared is not None and not compiles_only():
            results = prepared(numbers, x, residual, norm.weight, inner.weight if inner else None, quantization)
            if results is not None:
                return results
        placed = self._output is not None and x.numel() // self.ws.hidden > self.ws.layout.data_tokens
        options: dict[str, Any] = {"output": self._output} if placed else {}
        if quantization is not None:
            options["quantization"] = quantization
        launch = self.make(self.ws, x, residual, norm, inner=inner, **options)
        compiled = launcher.run(self.ws, launch)
        if compiled is not None and _triton_private.can_be_launched(compiled):
            self._prepared = PreparedLaunch(self.ws, launch, numbers, compiled)
        return launch.results
