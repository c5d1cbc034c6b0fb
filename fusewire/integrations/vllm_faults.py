"""Fail vLLM's worker if a fused call has failed, before the step's result leaves it."""

from __future__ import annotations

import functools
from typing import Any

from vllm.v1.outputs import AsyncModelRunnerOutput
from vllm.v1.worker.worker_base import WorkerWrapperBase

from fusewire.custom_ops import api


class CheckedOutput(AsyncModelRunnerOutput):  # type: ignore[misc]
    """The output of a step that may still run; its error is known when the output has arrived."""

    def __init__(self, output: Any) -> None:
        self._output = output

    def get_output(self) -> Any:
        """Wait for the step and return its output. Raises the error of a fused call in it."""
        output = self._output.get_output()
        api.check()
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._output, name)


def check_each_step() -> None:
    """Check for failed calls after each step of vLLM's workers. vLLM fails with what they raise."""
    WorkerWrapperBase.execute_model = _checked(WorkerWrapperBase.execute_model)
    # The wrapper hands all other methods on to its worker.
    WorkerWrapperBase.sample_tokens = _checked(lambda self, *args, **kw: self.worker.sample_tokens(*args, **kw))


def _checked(step: Any) -> Any:
    @functools.wraps(step)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = step(self, *args, **kwargs)
        if isinstance(output, AsyncModelRunnerOutput):
            return CheckedOutput(output)
        api.check()
        return output

    return checked
