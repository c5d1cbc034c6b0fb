"""Compile a workspace's kernels before the calls that need them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.distributed as dist

from fusewire.custom_ops.coordination.busy import busy
from fusewire.custom_ops.coordination.log import log_progress
from fusewire.custom_ops.coordination.timeouts import Limit, limit_s
from fusewire.custom_ops.coordination.vote import Channel, vote
from fusewire.custom_ops.workspaces.provider import WorkspaceProvider
from fusewire.custom_ops.workspaces.registry import REGISTRY, WorkspaceEntry


def compile_ahead(provider: WorkspaceProvider, entry: WorkspaceEntry, group: dist.ProcessGroup) -> None:
    """Compile a provider's kernels for later calls, each on one rank first to fill a disk cache.

    A collective. If one kernel fails on any rank, no rank uses the provider; the entry says why.

    Raises:
        PeerTimeoutError: a rank did not take part in time.
    """
    pieces = provider.kernels_to_compile(entry.workspace) if entry.workspace is not None else ()
    if not pieces:
        return
    channel = Channel(group, f"{entry.key} ahead")
    for topic, share in (("own share", pieces[group.rank() :: group.size()]), ("all", pieces)):
        text = f"compiling {len(pieces)} kernels of {provider.name} ahead (once: they are kept on disk)"
        with log_progress(text, after_s=limit_s(Limit.COMPILING_ANNOUNCEMENT)):
            result = vote(channel, f"compile ahead, {topic}", lambda share=share: _run(share))  # type: ignore[misc]
        if not result.ok:
            REGISTRY.refuse(entry, f"compiling ahead: {result.reason}")
            return


def _run(pieces: Sequence[Callable[[], object]]) -> None:
    with busy():
        for piece in pieces:
            piece()
