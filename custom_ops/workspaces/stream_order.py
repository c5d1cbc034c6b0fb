"""Order the calls on one device across streams and threads."""

from __future__ import annotations

import threading

import torch

from fusewire.custom_ops._torch_private import current_raw_stream
from fusewire.custom_ops.workspaces.capture import capturing


class StreamOrder:
    """The order of the calls on one device, one after another on all streams.

    Kernels that wait for their peers take the whole GPU. Two at once, in different order on two
    ranks, would wait for each other for ever. So a call on another stream than the last call's
    waits for that stream. Captured calls are ordered by their graph; the caller orders replays on
    other streams.

    Attributes:
        lock: held from `enter` until the launch. Otherwise two threads could enter in one order and
            launch in the other, and each stream would wait for the wrong call.
    """

    _by_device: dict[int, StreamOrder] = {}  # noqa: RUF012 - one per device for the process

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._raw: int | None = None
        self._stream: torch.cuda.Stream | None = None

    @classmethod
    def of(cls, device: torch.device) -> StreamOrder:
        """Return the order of a device. Thread-safe."""
        return cls._by_device.setdefault(-1 if device.index is None else device.index, cls())

    def enter(self, device_index: int) -> None:
        """Order the next launch on the current stream after earlier calls. Needs `lock` held."""
        raw = current_raw_stream(device_index)
        if raw != self._raw and not capturing():
            stream = torch.cuda.current_stream(device_index)
            if self._stream is not None:
                stream.wait_event(self._stream.record_event())
            self._raw, self._stream = raw, stream
