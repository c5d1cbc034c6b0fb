"""Define what peers.py times: candidates, and the peers. peers_ours.py has fusewire's own.

A family is set up by all ranks together in two steps: `alone` (import, compile) and `together` (what communicates),
each followed by a vote, so that all ranks leave out the same and say why.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from peers_report import PEER, SPARED
from torch import Tensor

from fusewire.custom_ops.dispatch.cost_tables import ONE_SHOT, TWO_SHOT
from fusewire.custom_ops.providers.flashinfer import library as flashinfer_library
from fusewire.custom_ops.providers.flashinfer import provider as flashinfer
from fusewire.custom_ops.tuning.timers import EPS, Inputs
from fusewire.custom_ops.workspaces.provider import WorkspaceKey
from fusewire.custom_ops.workspaces.registry import REGISTRY
from fusewire.errors import WorkspaceError

Result = tuple[Tensor, Tensor]
Call = Callable[[int], Any]


class Arena:
    """The inputs of one size, and copies of them that a candidate may overwrite.

    Attributes:
        inputs: the sets, which nobody writes to.
        x, residual: copies for candidates that work in place.
        symmetric: copies of x in torch's symmetric memory, if there is any.
    """

    def __init__(self, drawn: Sequence[Inputs], symmetric: Tensor | None) -> None:
        self._x = torch.stack([one.x for one in drawn])
        self._residual = torch.stack([one.residual for one in drawn])
        self._own_x, self._own_residual = torch.empty_like(self._x), torch.empty_like(self._residual)
        self._symmetric = None if symmetric is None else symmetric[: self._x.numel()].view(self._x.shape)
        weight = drawn[0].weight
        self.inputs = [Inputs(x, r, weight) for x, r in zip(self._x, self._residual, strict=True)]
        self.x, self.residual = list(self._own_x), list(self._own_residual)
        self.symmetric = [] if self._symmetric is None else list(self._symmetric)
        self.also: list[Tensor] = []  # more copies of all x, stacked
        self.restore()

    def restore(self) -> None:
        """Restore the inputs that candidates changed in place."""
        self._own_x.copy_(self._x)
        self._own_residual.copy_(self._residual)
        for stacked in [*self.also, *([] if self._symmetric is None else [self._symmetric])]:
            stacked.copy_(self._x)


@dataclass(frozen=True)
class Candidate:
    """One way to compute all-reduce + residual add + RMSNorm.

    Attributes:
        bind: given a size's inputs, a function that computes set i and returns the norm and the new residual.
        tokens: the numbers of tokens that it takes; `limit` says why not more.
        exact: its sum is in rank order, in fp32, rounded once, so the residual must be right bit for bit.
        in_place: it overwrites inputs, which are restored before each measurement.
        compiles: its kernels are compiled ahead (symm_mem's).
        sent: of a plain copy, the bytes that a call sends; it has no result.
        before_replay: to be called, by all ranks together, between a capture of it and the first replay.
    """

    label: str
    column: str
    kind: str
    bind: Callable[[Arena], Call]
    tokens: range = range(1, 1 << 30)
    limit: str = ""
    exact: bool = False
    in_place: bool = False
    compiles: bool = False
    sent: int = 0
    before_replay: Callable[[], None] | None = None


@dataclass
class Bench:
    """The tensors and objects that all candidates of one hidden size share."""

    group: dist.ProcessGroup
    cpu_group: dist.ProcessGroup | None
    hidden: int
    dtype: torch.dtype
    device: torch.device
    most_tokens: int
    most_bytes: int  # of all sets of x of the largest size
    weight: Tensor
    tail: Any = None
    norm: Callable[[Tensor, Tensor, Tensor], None] | None = None
    symmetric: Tensor | None = None
    missing: dict[str, str] = field(default_factory=dict)  # why a candidate is missing though its family is set up
    closers: list[Callable[[], None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.world_size, self.rank, self.name = self.group.size(), self.group.rank(), self.group.group_name
        self.tail = torch.compile(Tail(self.weight), dynamic=True)

    def workspace(self, provider: str) -> Any:
        """Return a provider's workspace. Raises WorkspaceError with the reason if there is none."""
        entry = REGISTRY.entries.get(WorkspaceKey(provider, self.name, self.dtype, self.hidden))
        if entry is None or entry.workspace is None:
            raise WorkspaceError(entry.refusal if entry else f"{provider} takes no such calls")
        return entry.workspace


class Tail(torch.nn.Module):
    """The residual add and the RMSNorm as models write them; the weight belongs to the module, as in a model."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor, residual: Tensor) -> Result:
        total = x + residual
        wide = total.float()
        norm = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        return (norm * self.weight.float()).to(x.dtype), total


# --- Families -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """Candidates that are set up together; `labels` has their names, columns and kinds if that fails."""

    name: str
    labels: tuple[tuple[str, str, str], ...]
    together: Callable[[Bench], list[Candidate]]
    alone: Callable[[Bench], None] | None = None
    alone_s: float = 60.0
    together_s: float = 120.0


def plain_family(name: str) -> Family:
    """Return the backend's all-reduce (`name`: NCCL or gloo), in place as Inductor does it, then add and norm."""
    labels = tuple((f"{name} + {how}",) * 2 + (PEER,) for how in ("Inductor", "eager"))

    def alone(bench: Bench) -> None:
        for rows in (2, 1):
            x, residual = torch.zeros(2, rows, bench.hidden, dtype=bench.dtype, device=bench.device)
            bench.tail(x, residual)

    def together(bench: Bench) -> list[Candidate]:
        eager = Tail(bench.weight)

        def bind(tail: Callable[..., Result]) -> Callable[[Arena], Call]:
            def at(arena: Arena) -> Call:
                def call(i: int) -> Result:
                    dist.all_reduce(arena.x[i], group=bench.group)
                    return tail(arena.x[i], arena.inputs[i].residual)

                return call

            return at

        tails = (bench.tail, eager)
        return [Candidate(*names, bind(tail), in_place=True) for names, tail in zip(labels, tails, strict=True)]

    return Family(name, labels, together, alone, alone_s=240.0)


def with_norms(
    bench: Bench, labels: Sequence[tuple[str, str, str]], reduce: Callable[[Arena], Call], **options: Any
) -> list[Candidate]:
    """An all-reduce (`reduce` gives set i's sum) with Inductor's add and norm, and with FlashInfer's, if it is there."""

    def inductor(arena: Arena) -> Call:
        summed = reduce(arena)
        return lambda i: bench.tail(summed(i), arena.inputs[i].residual)

    def fused(arena: Arena) -> Call:
        summed, weight, norm = reduce(arena), arena.inputs[0].weight, bench.norm
        assert norm is not None

        def call(i: int) -> Result:
            total = summed(i)
            norm(total, arena.residual[i], weight)  # the norm takes the sum's place, the sum the residual's
            return total, arena.residual[i]

        return call

    found = [Candidate(*labels[0], inductor, **options)]
    if bench.norm is not None:
        found.append(Candidate(*labels[1], fused, **{**options, "in_place": True}))
    else:
        bench.missing[labels[1][0]] = bench.missing.get(NORM, "FlashInfer's norm is not there")
    return found


NORM = "FlashInfer's fused_add_rmsnorm"


def norm_family() -> Family:
    """Return FlashInfer's fused add + RMSNorm, which peers call after their all-reduce. No candidate by itself."""

    def alone(bench: Bench) -> None:
        found = flashinfer_library.library()
        if found.reason:
            raise WorkspaceError(found.reason)
        norm = importlib.import_module("flashinfer.norm").fused_add_rmsnorm
        with flashinfer_library.toolkit() if flashinfer_library.find_nvcc() else contextlib.nullcontext():
            for rows in (1, 2):
                x = torch.ones(rows, bench.hidden, dtype=bench.dtype, device=bench.device)
                norm(x, torch.ones_like(x), bench.weight, EPS)
        torch.cuda.synchronize()

    def together(bench: Bench) -> list[Candidate]:
        norm = importlib.import_module("flashinfer.norm").fused_add_rmsnorm
        bench.norm = lambda x, residual, weight: norm(x, residual, weight, EPS)
        return []

    return Family(NORM, (), together, alone, alone_s=400.0)


def both_norms(name: str, column: str, kind: str) -> tuple[tuple[str, str, str], ...]:
    return tuple((f"{name} + {norm}", column, kind) for norm in ("Inductor", "FlashInfer norm"))


TORCH = (
    *both_norms("torch one-shot", "torch one-shot", PEER),
    *both_norms("torch two-shot", "torch two-shot", PEER),
    *both_norms("torch one-shot, no copy", "torch one-shot, no copy", SPARED),
    *both_norms("torch two-shot, no copy", "torch two-shot, no copy", SPARED),
)


def torch_family() -> Family:
    """Return torch's symmetric-memory all-reduces, peer to peer.

    They read a symmetric buffer. The copy of x into it counts, except in candidates named "no copy".
    One-shot copies inside its kernel; two-shot works in place in the buffer.
    """

    def together(bench: Bench) -> list[Candidate]:
        from torch.distributed import _symmetric_memory as memory

        elements = bench.most_bytes // bench.dtype.itemsize
        buffer = memory._SymmetricMemory.empty_strided_p2p((elements,), (1,), bench.dtype, bench.device)
        memory.rendezvous(buffer, bench.group)
        bench.symmetric = buffer
        ops, name = torch.ops.symm_mem, bench.name

        def one_shot(arena: Arena) -> Call:
            return lambda i: ops.one_shot_all_reduce_copy(arena.symmetric[i], arena.inputs[i].x, "sum", name)

        def one_shot_spared(arena: Arena) -> Call:
            return lambda i: ops.one_shot_all_reduce(arena.symmetric[i], "sum", name)

        def two_shot(arena: Arena) -> Call:
            return lambda i: ops.two_shot_all_reduce_(arena.symmetric[i].copy_(arena.inputs[i].x), "sum", name)

        def two_shot_spared(arena: Arena) -> Call:
            return lambda i: ops.two_shot_all_reduce_(arena.symmetric[i], "sum", name)

        # Without a copy, x must be restored first: all of these overwrite it.
        ways = ((one_shot, False), (two_shot, False), (one_shot_spared, True), (two_shot_spared, True))
        pairs = [with_norms(bench, TORCH[2 * n : 2 * n + 2], r, in_place=s) for n, (r, s) in enumerate(ways)]
        return [candidate for pair in pairs for candidate in pair]

    return Family("torch symmetric memory", TORCH, together)


DIRECT = tuple(
    (f"FlashInfer {shot}{how}", f"FlashInfer {shot}", PEER)
    for how in ("", ", PDL")
    for shot in ("one-shot", "two-shot")
)


def flashinfer_family() -> Family:
    """Return FlashInfer's own call, trtllm backend, with and without programmatic dependent launch."""

    def together(bench: Bench) -> list[Candidate]:
        made, comm = bench.workspace(flashinfer.PROVIDER), flashinfer_library.library().comm
        pattern = comm.AllReduceFusionPattern.kARResidualRMSNorm

        def bind(one_shot: bool, pdl: bool) -> Callable[[Arena], Call]:
            def at(arena: Arena) -> Call:
                def call(i: int) -> Result:
                    x, residual, weight = arena.inputs[i]
                    norm, total = torch.empty_like(x), torch.empty_like(x)
                    comm.allreduce_fusion(
                        input=x,
                        workspace=made.handle,
                        pattern=pattern,
                        launch_with_pdl=pdl,
                        trigger_completion_at_end=True,
                        output=norm,  # not written by this pattern, but allocated if left out
                        residual_out=total,
                        norm_out=norm,
                        residual_in=residual,
                        rms_gamma=weight,
                        rms_eps=EPS,
                        use_oneshot=one_shot,
                        fp32_acc=True,
                    )
                    return norm, total

                return call

            return at

        found = []
        for number, names in enumerate(DIRECT):
            variant = (ONE_SHOT, TWO_SHOT)[number % 2]
            limit = flashinfer.token_limit(variant, bench.hidden, bench.dtype, bench.world_size, made.max_tokens)
            why = f"it takes {limit.start} to {limit.stop - 1} tokens in a workspace of {made.max_tokens}"
            bound = bind(variant == ONE_SHOT, number >= 2)
            found.append(Candidate(*names, bound, limit, why, exact=True))
        return found

    return Family("FlashInfer", DIRECT, together)
