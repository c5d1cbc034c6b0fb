"""Order the calls on one device across streams and threads."""

from __future__ import annotations

import threading

import torch

from fusewire.custom_ops._torch_private import current_raw_stream, is_capturing
from fusewire.errors import CaptureError


class StreamOrder:
    """The order of the calls on one device, one after another on all streams.

    Kernels that wait for their peers take the whole GPU. Two at once, in different order on two
    ranks, would wait for each other for ever. So a call on another stream than the last call's
    waits for that stream. In the capture of a CUDA graph likewise, so that the branches of one
    graph make their calls one after another. The caller orders replays: a graph is replayed on the
    stream of the calls beside it, or behind an event of that stream.

    Attributes:
        lock: held from `enter` until the launch. Otherwise two threads could enter in one order and
            launch in the other, and each stream would wait for the wrong call.
    """

    _by_device: dict[int, StreamOrder] = {}  # noqa: RUF012 - one per device for the process

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._last = _Last()
        self._last_captured = _Last()

    @classmethod
    def of(cls, device: torch.device) -> StreamOrder:
        """Return the order of a device. Thread-safe."""
        return cls._by_device.setdefault(-1 if device.index is None else device.index, cls())

    def enter(self, device_index: int) -> bool:
        """Order the next launch on the current stream after earlier calls. Needs `lock` held.

        Returns:
            Whether a CUDA graph is being captured.

        Raises:
            CaptureError: two CUDA graphs are being captured at the same time.
        """
        raw, captured = current_raw_stream(device_index), is_capturing()
        last = self._last_captured if captured else self._last
        if raw != last.raw:
            stream = torch.cuda.current_stream(device_index)
            if last.stream is not None and (not captured or _is_capturing(last.stream)):
                _wait(stream, last.stream, captured)
            last.raw, last.stream = raw, stream
        return captured


class _Last:
    """The stream of the last call, eager or captured."""

    def __init__(self) -> None:
        self.raw: int | None = None
        self.stream: torch.cuda.Stream | None = None


def _is_capturing(stream: torch.cuda.Stream) -> bool:
    with torch.cuda.stream(stream):
        return is_capturing()


def _wait(stream: torch.cuda.Stream, earlier: torch.cuda.Stream, captured: bool) -> None:
    try:
        stream.wait_event(earlier.record_event())
    except RuntimeError as error:
        if not captured:
            raise
        raise CaptureError(
            "two streams capture fused calls at the same time, and their calls cannot be "
            "ordered: capture one CUDA graph after the other, or fork both streams from one "
            f"capture ({error})"
        ) from error
