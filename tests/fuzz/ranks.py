"""The process groups that programs use, and what their collectives do.

In one process the groups are torch's fake ones, which communicate with nobody. Here their collectives get kernels of
their own: each rank is a thread, the threads meet at every collective, and each gets what it would get from real ranks.
Outside of `Ranks.run` there is one rank, to which the other gives the double of what it gives itself. Two groups hold the
same ranks. So that one taken for the other shows, OTHER has the ranks in reversed order and its sums come out half as large
again. Ranks that meet at different collectives are an error.

On real process groups the collectives are the groups' own, and are not noted.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

import fusewire
from fusewire.custom_ops.dispatch import derived_ops as extended
from fusewire.custom_ops.ops import sharded_norm
from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm, resolve_group
from fusewire.custom_ops.ops.norms import fused_add_rms_norm, rms_norm
from fusewire.custom_ops.ops.registry import Support
from fusewire.fusion_passes.passes import shard_residual

from support import vllm_norms

GROUPS: dict[str, Any] = {}
ELSEWHERE = "fuzz_elsewhere"  # a provider that never serves: it makes the passes raise norms without an all-reduce
BUFFERED = "fuzz_buffered"  # native by another name, so that its calls stay calls and may be given buffers
_SIZE = 2
_PATIENCE_S = 60.0
_KERNELS = ("all_reduce", "all_reduce_coalesced", "reduce_scatter_tensor", "all_gather_into_tensor")
_IN_PLACE = ("all_reduce_", "all_reduce_coalesced_")  # what Inductor makes of the first two
Collective = tuple[str, str, float]  # group, reduction (or "gather"), sum of the input, to tell them apart


class Ranks:
    """Where programs run: on two threads of this process (`simulated`), or as this rank of real process groups.

    Attributes:
        log: the collectives of the running thread since `run` began, on simulated ranks.
    """

    def __init__(self, simulated: bool) -> None:
        self.simulated = simulated
        self.local = threading.local()
        self.threads = ThreadPoolExecutor(_SIZE) if simulated else None
        self.meeting = _Meeting()

    @property
    def rank(self) -> int:
        """The rank that the running thread is; 0 outside of `run`."""
        return getattr(self.local, "rank", 0) if self.simulated else dist.get_rank()

    @property
    def log(self) -> list[Collective]:
        if not hasattr(self.local, "log"):
            self.local.log = []
        found: list[Collective] = self.local.log
        return found

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """What `work(rank)` returns on each rank of this process."""
        if self.threads is None:
            self.local.log = []
            return [work(self.rank)]
        self.meeting = _Meeting()
        # In this thread's context: from torch 2.15 on what is compiled depends on settings that are kept there.
        contexts = [contextvars.copy_context() for _ in range(_SIZE)]
        futures = [self.threads.submit(c.run, self._as_rank, rank, work) for rank, c in enumerate(contexts)]
        errors = [error for error in (future.exception() for future in futures) if error is not None]
        for error in sorted(errors, key=lambda e: isinstance(e, _LeftAlone)):
            raise error  # the other rank's own error rather than that this one waited in vain
        return [future.result() for future in futures]

    def _as_rank(self, rank: int, work: Callable[[int], Any]) -> Any:
        self.local.rank, self.local.log = rank, []
        try:
            return work(rank)
        finally:
            self.meeting.end(rank)

    def meet(self, group: str, what: Any, given: Any) -> list[Any]:
        """What each of a group's ranks gives, in the group's order."""
        if group == GROUPS["ALONE"].group_name:
            return [given]
        # A copy: this rank may overwrite its tensor before the other one comes to read it.
        if hasattr(self.local, "rank"):
            found = self.meeting.exchange(self.rank, what, given.clone())
        else:
            found = [given.clone(), given * 2]
        return found[::-1] if group == GROUPS["OTHER_NAME"] else found

    def rank_in(self, group: str) -> int:
        """This rank's number in a group."""
        if group == GROUPS["ALONE"].group_name:
            return 0
        return _SIZE - 1 - self.rank if group == GROUPS["OTHER_NAME"] else self.rank


class _LeftAlone(RuntimeError):
    pass


class _Meeting:
    """Where the ranks of one run exchange what they give to each collective."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.given: list[list[Any]] = [[] for _ in range(_SIZE)]
        self.ended: set[int] = set()

    def end(self, rank: int) -> None:
        with self.changed:
            self.ended.add(rank)
            self.changed.notify_all()

    def exchange(self, rank: int, what: Any, given: Any) -> list[Any]:
        with self.changed:
            self.given[rank].append((what, given))
            turn = len(self.given[rank])
            self.changed.notify_all()
            here = functools.partial(self._all_at, turn)
            self.changed.wait_for(lambda: here() or self.ended, _PATIENCE_S)
            if not here():
                raise _LeftAlone(f"rank {rank} waits in {what}, and the other rank does not come")
            found = [given[turn - 1] for given in self.given]
        if any(other != what for other, _ in found):
            raise RuntimeError(f"the ranks meet at different collectives: {[what for what, _ in found]}")
        return [value for _, value in found]

    def _all_at(self, turn: int) -> bool:
        return all(len(given) >= turn for given in self.given)


# --- Kernels --------------------------------------------------------------------------------------------------------


def _total(x: Tensor) -> float:
    return float(x.double().flatten().sum())


def _describe(x: Tensor) -> tuple[Any, ...]:
    return x.dtype, tuple(x.shape)


class _Simulated:
    """The kernels of fake groups."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def _reduced(self, x: Tensor, reduction: str, group: str, what: Any) -> Tensor:
        parts = self.ranks.meet(group, (*what, reduction.lower(), group, _describe(x)), x)
        kinds: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "sum": torch.add,
            "avg": lambda a, b: (a + b) / 2,
            "max": torch.maximum,
            "min": torch.minimum,
            "product": torch.mul,
        }
        total = functools.reduce(kinds[reduction.lower()], parts)
        if group == GROUPS["OTHER_NAME"] and reduction.lower() in ("sum", "avg"):
            return total * 1.5
        return total.clone() if total is x else total

    def all_reduce(self, x: Tensor, reduction: str, group: str) -> Tensor:
        self.ranks.log.append((group, reduction.lower(), _total(x)))
        return self._reduced(x, reduction, group, ("all_reduce",))

    def all_reduce_coalesced(self, xs: list[Tensor], reduction: str, group: str) -> list[Tensor]:
        return [self.all_reduce(x, reduction, group) for x in xs]

    def all_reduce_(self, x: Tensor, reduction: str, group: str) -> Tensor:
        return x.copy_(self.all_reduce(x, reduction, group))

    def all_reduce_coalesced_(self, xs: list[Tensor], reduction: str, group: str) -> list[Tensor]:
        return [self.all_reduce_(x, reduction, group) for x in xs]

    def reduce_scatter_tensor(self, x: Tensor, reduction: str, size: int, group: str) -> Tensor:
        self.ranks.log.append((group, reduction.lower(), _total(x)))
        total = self._reduced(x, reduction, group, ("reduce_scatter", size))
        return total.chunk(size)[self.ranks.rank_in(group) % size].clone() if total.numel() else total[:0].clone()

    def all_gather_into_tensor(self, x: Tensor, size: int, group: str) -> Tensor:
        self.ranks.log.append((group, "gather", _total(x)))
        parts = self.ranks.meet(group, ("all_gather", size, group, _describe(x)), x)
        return torch.cat((parts * size)[:size] if size != 1 else [x])


class _Group:
    """A fake group, of which each thread has its own rank."""

    def __init__(self, group: dist.ProcessGroup, ranks: Ranks) -> None:
        self.group, self.ranks = group, ranks

    def size(self) -> int:
        return self.group.size()

    def rank(self) -> int:
        return self.ranks.rank_in(self.group.group_name)


# --- Groups ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def groups() -> Iterator[Ranks]:
    """Name the process groups that programs use, and give the collectives of fake ones kernels; yields the ranks."""
    world = dist.group.WORLD
    rank, size = dist.get_rank(), dist.get_world_size()
    other = dist.new_group(list(range(size)))
    alone = [dist.new_group([r]) for r in range(size)][rank]
    names = {"WORLD_NAME": world.group_name, "OTHER_NAME": other.group_name, "ALONE_NAME": alone.group_name}
    GROUPS.update(WORLD=world, OTHER=other, ALONE=alone, **names)
    ranks = Ranks(dist.get_backend() == "fake")
    with contextlib.ExitStack() as stack:
        for library in _opaque_operators():
            stack.callback(library._destroy)
        for op, native in (
            (fusewire.rms_norm, rms_norm.native),
            (fusewire.fused_add_rms_norm, fused_add_rms_norm.native),
        ):
            op.register_impl(ELSEWHERE, supported=_nowhere)(native)
            stack.callback(op.unregister_impl, ELSEWHERE)
        all_reduce_rms_norm.register_impl(BUFFERED)(all_reduce_rms_norm.native)
        stack.callback(all_reduce_rms_norm.unregister_impl, BUFFERED)
        if ranks.simulated:
            stack.callback(ranks.threads.shutdown)
            stack.callback(_replace_kernels(_Simulated(ranks))._destroy)
            for module in (sharded_norm, extended):
                replacement = functools.partial(_resolve, ranks)
                stack.enter_context(mock.patch.object(module, "resolve_group", replacement))
        # So that chains as short as these are sharded, and a residual that is read elsewhere is gathered.
        stack.enter_context(mock.patch.object(shard_residual, "MIN_TOKENS", 1))
        stack.enter_context(mock.patch.object(shard_residual, "OPS_PER_GATHER", 1))
        stack.callback(GROUPS.clear)
        yield ranks


def _resolve(ranks: Ranks, name: str) -> _Group:
    return _Group(resolve_group(name), ranks)


def _replace_kernels(kernels: Any) -> torch.library.Library:
    library = torch.library.Library("_c10d_functional", "IMPL")
    for name in (*_KERNELS, *_IN_PLACE):
        library.impl(name, getattr(kernels, name), "CPU")
    return library


def _opaque_operators() -> list[torch.library.Library]:
    """Operators as serving engines have them in their graphs, which fusewire knows by name."""
    engine, ir = torch.library.Library("vllm", "FRAGMENT"), torch.library.Library("vllm_ir", "FRAGMENT")
    engine.define("all_reduce(Tensor tensor, str group_name) -> Tensor")
    ir.define("rms_norm(Tensor x, Tensor? weight, float epsilon, int? variance_size=None) -> Tensor")

    def all_reduce(tensor: Tensor, group_name: str) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return torch.empty_like(tensor)
        ops = torch.ops._c10d_functional
        return ops.wait_tensor(ops.all_reduce(tensor, "sum", group_name))

    engine.impl("all_reduce", all_reduce, "CompositeExplicitAutograd")
    ir.impl("rms_norm", vllm_norms.rms_norm, "CompositeExplicitAutograd")
    return [engine, ir]


def _nowhere() -> Support:
    return Support.no("it is there to make the passes raise every norm")
