"""Compare every fused call with the other ranks' before it is launched: a debug mode.

With FUSEWIRE_DEBUG_CALLS=1 on every rank, a rank that makes one call fewer, or comes with another
shape, dtype, option or provider, is named at once by all ranks, instead of after a time limit or
not at all. Each call then takes two votes in the group's store (milliseconds). Captures of CUDA
graphs are compared too, replays are not.
"""

from __future__ import annotations

import functools
import threading
import weakref
from typing import Any

import torch
import torch.distributed as dist

from fusewire.custom_ops.coordination.vote import Channel, vote
from fusewire.custom_ops.dispatch.decisions import Decision
from fusewire.custom_ops.environment import env_flag
from fusewire.custom_ops.ops.all_reduce_norm import resolve_group
from fusewire.custom_ops.ops.registry import IrOp
from fusewire.errors import RankMismatchError

VARIABLE = "FUSEWIRE_DEBUG_CALLS"
_lock = threading.Lock()
_counts: dict[str, tuple[weakref.ref[dist.ProcessGroup], int]] = {}  # calls so far, by group name


@functools.cache
def comparing() -> bool:
    """Return whether calls are compared. The variable is read once in a process."""
    return env_flag(VARIABLE)


def compare_call(op: IrOp, args: tuple[Any, ...], policy: str) -> None:
    """Compare a call's number, operator, shapes, dtypes and options. A collective.

    Raises:
        RankMismatchError: the ranks make different calls; on every rank, which then runs nothing.
        PeerTimeoutError: a rank makes no call.
    """
    group = resolve_group(args[-1])
    options = ", ".join(
        f"{name} {_described(value)}" for name, value in zip(op.signature.parameters, args[:-1], strict=False)
    )
    _compare(group, f"call {_next(group)}, {op.name}: {options}, providers {policy or op.priority}")


def compare_provider(op: IrOp, args: tuple[Any, ...], decision: Decision) -> None:
    """Compare the provider, the variant and the output buffer of a call. As `compare_call`."""
    chosen = decision.provider.name
    if decision.bound is not None:
        _, workspace, variant, output = decision.bound
        chosen = f"{variant} on a workspace of {workspace.max_tokens} tokens, output buffer {output}"
    _compare(resolve_group(args[-1]), f"{op.name} by {chosen}")


def _compare(group: dist.ProcessGroup, text: str) -> None:
    result = vote(Channel(group, VARIABLE), "call", lambda: {"text": text})
    texts = [fact["text"] for fact in result.facts]
    if len(set(texts)) > 1:
        listed = "; ".join(f"rank {rank}: {text}" for rank, text in zip(result.ranks, texts, strict=True))
        raise RankMismatchError(
            f"the ranks of group {group.group_name!r} make different calls, and nothing was "
            f"launched. {listed}. Make every rank make the same calls in the same order, on equal "
            "shapes"
        )


def _next(group: dist.ProcessGroup) -> int:
    """Return the number of the group's next call, from 1 on. Thread-safe."""
    with _lock:
        known, count = _counts.get(group.group_name, (None, 0))
        if known is None or known() is not group:
            count = 0
        _counts[group.group_name] = (weakref.ref(group), count + 1)
        return count + 1


def _described(value: Any) -> str:
    return f"{str(value.dtype)[6:]} {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
