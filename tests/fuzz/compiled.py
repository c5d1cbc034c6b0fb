"""Programs as Inductor generates code for them, on real ranks, with results that stay in buffers.

A provider on the CPU works as the kernels do: a call overwrites its buffer with NaN, and leaves its result there. Inductor
schedules the graph anew, computes cheap values where they are used, and plans memory; results must still be those of
the same graph without buffers, bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from fusewire.custom_ops import api
from fusewire.custom_ops.dispatch import dispatcher as dispatch
from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm
from fusewire.custom_ops.ops.registry import YES, get_op
from fusewire.custom_ops.workspaces import provider as interface
from fusewire.custom_ops.workspaces import registry as workspace

from fuzz.execute import LEFT_IN_BUFFER, Buffers, module_of
from fuzz.generate import generate
from fuzz.program import CHAIN, Program, make_arguments
from fuzz.ranks import groups

NAME = "fuzz_workspace"


class _Workspace(interface.Workspace):
    def __init__(self, request: Any) -> None:
        super().__init__(request.key, request.max_tokens, 0, request.device)
        self.buffers = Buffers()
        self.left = 0

    def call(self, op: Any, slot: int, args: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """What `op` gives, with one of its results in a buffer, which is overwritten before anything is read."""
        self.left += 1
        self.buffers.clear(slot, args[0])
        results = list(op.native(*args))
        left = LEFT_IN_BUFFER[op.torch_op]
        results[left] = self.buffers.leave(slot, results[left])
        return results[0], results[1]

    def release(self) -> None:
        self.buffers = Buffers()


class _Provider(interface.WorkspaceProvider):
    name = NAME
    variants = (f"{NAME}/only",)

    def machine(self, group: Any, device: Any) -> Any:
        return interface.device_facts(device)

    def limits(self, hidden: int, dtype: Any, world_size: int) -> Any:
        return YES

    def token_limit(self, variant: str, hidden: int, dtype: Any, world_size: int, max_tokens: int) -> range:
        return range(max_tokens + 1)

    def max_tokens(self, hidden: int, dtype: Any, world_size: int) -> int:
        return 1024

    def nbytes(self, hidden: int, dtype: Any, world_size: int, max_tokens: int) -> int:
        return 0

    def create(self, request: Any, channel: Any) -> _Workspace:
        return _Workspace(request)

    def self_test(self, workspace: Any, stage: Any) -> None:
        pass

    def bind(self, workspace: Any, variant: str, output: int | None = None) -> Any:
        return self._bound(workspace, all_reduce_rms_norm, output)

    def bind_derived(self, workspace: Any, variant: str, op_name: str, args: Any, output: int | None = None) -> Any:
        return self._bound(workspace, get_op(op_name), output)

    def _bound(self, workspace: Any, op: Any, output: int | None) -> Any:
        return op.native if output is None else lambda *args: workspace.call(op, output, args)


@contextlib.contextmanager
def _provided() -> Iterator[None]:
    all_reduce_rms_norm.register_impl(NAME)(all_reduce_rms_norm.native)
    with (
        mock.patch.dict(interface.PROVIDERS, {NAME: _Provider()}),
        mock.patch.object(dispatch, "on_gpu", return_value=True),
        mock.patch.object(workspace, "check_memory"),
        # As on GPUs: of memory that it takes to be unaligned, as all of a CPU's is, Inductor reuses none.
        mock.patch("torch._inductor.graph.should_assume_input_aligned", return_value=True),
    ):
        try:
            yield
        finally:
            api.close()
            all_reduce_rms_norm.unregister_impl(NAME)


@dataclasses.dataclass(frozen=True)
class Difference:
    """A program whose results in buffers are others."""

    program: Program
    problem: str

    def __str__(self) -> str:
        return f"seed {self.program.seed}, compiled with output_in_place: {self.problem}\n{self.program}"


def fits(program: Program) -> bool:
    """Whether a program is a chain that real ranks may run compiled; an opaque operator's result is Inductor's to plan."""
    return program.kind == CHAIN and program.runs_on_ranks and program.replicated


def compiled_on_rank(seeds: Sequence[int]) -> tuple[list[Difference], int]:
    """The programs of these seeds that differ on this rank, and how many results stayed in buffers."""
    found, left = [], 0
    with groups(), _provided():
        for program in map(generate, seeds):
            counts: Counter[bool] = Counter()
            plain, placed = (_results(program, in_place, counts) for in_place in (False, True))
            left += counts[True]
            if counts[False]:
                found.append(Difference(program, "results stay in buffers unasked"))
            for index, (want, got) in enumerate(zip(plain, placed, strict=True)):
                if not torch.equal(want.nan_to_num(), got.nan_to_num()) or not torch.equal(want.isnan(), got.isnan()):
                    found.append(Difference(program, f"result {index} is another"))
    return found, left


def _results(program: Program, in_place: bool, counts: Counter[bool]) -> list[Tensor]:
    """What a program returns and leaves of its arguments, the second time: buffers hold what the first has left."""
    torch._dynamo.reset()
    api.close()
    options = {
        "output_in_place": in_place,
        "shard_residual": program.seed % 2 == 0,
        "ir_op_priority": {"all_reduce_rms_norm": (NAME,)},
        "fx_graph_cache": False,
        "compile_threads": 1,
    }
    function = torch.compile(
        module_of(program), backend="fusewire", options=options, dynamic=program.dynamic, fullgraph=True
    )
    with torch.no_grad():
        for _ in range(2):
            arguments = make_arguments(program, dist.get_rank())
            results = list(function(*arguments))
    results = [result.clone() for result in results]
    counts[in_place] += sum(entry.workspace.left for entry in workspace.REGISTRY.entries.values() if entry.workspace)
    return [*results, *arguments]
