"""Make, list and free workspaces. Importing this module registers every operator and provider."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from fusewire.custom_ops.coordination import rendezvous
from fusewire.custom_ops.coordination.watchdog import WATCHDOG
from fusewire.custom_ops.dispatch import derived_ops, dispatcher
from fusewire.custom_ops.dispatch.table_vote import tuned_cost_model
from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm, resolve_group
from fusewire.custom_ops.ops.registry import NATIVE
from fusewire.custom_ops.providers import fp8_rows
from fusewire.custom_ops.providers.batch_invariant import provider as batch_invariant
from fusewire.custom_ops.providers.batch_invariant import torch_norm, triton_norm
from fusewire.custom_ops.providers.flashinfer import provider as flashinfer
from fusewire.custom_ops.providers.symm_mem import invariant
from fusewire.custom_ops.providers.symm_mem import provider as symm_mem
from fusewire.custom_ops.tuning import tuner
from fusewire.custom_ops.workspaces.precompile import compile_ahead
from fusewire.custom_ops.workspaces.provider import OUTPUTS, PROVIDERS, WorkspaceKey, WorkspaceProvider
from fusewire.custom_ops.workspaces.registry import REGISTRY, WorkspaceEntry
from fusewire.errors import ConfigError, FusewireError, WorkspaceError

# Importing these registers operators and providers. They import Triton and FlashInfer at their
# first use.
REGISTERED = (
    *(torch_norm, triton_norm, batch_invariant, flashinfer, symm_mem, invariant, fp8_rows),
    *(dispatcher, derived_ops, tuner, rendezvous),
)
# The providers of `all_reduce_rms_norm`, by priority, unless a policy says otherwise.
DEFAULT_PRIORITY = (symm_mem.PROVIDER, flashinfer.PROVIDER, NATIVE)
all_reduce_rms_norm.set_default_priority(DEFAULT_PRIORITY)


@dataclass(frozen=True)
class WorkspaceInfo:
    """A workspace of this process, or why there is none.

    Attributes:
        max_tokens: the largest number of tokens of a call that it takes.
        nbytes: the GPU memory that it takes on this rank, in bytes.
        reason: why there is no workspace; empty if there is one.
        table: the tuned table that decides its use, as text; empty for the shipped costs.
    """

    provider: str
    group_name: str
    dtype: torch.dtype
    hidden: int
    max_tokens: int
    nbytes: int
    reason: str = ""
    table: str = ""


def _info(entry: WorkspaceEntry) -> WorkspaceInfo:
    made, key = entry.workspace, entry.key
    agreed = REGISTRY.tables.get((key.group_name, key.hidden, key.dtype))
    size = (made.max_tokens, made.nbytes) if made else (0, 0)
    return WorkspaceInfo(*key, *size, entry.refusal, agreed.text if agreed else "")


def check() -> None:
    """Raise the error of a failed fused call on this rank, if there is one.

    A kernel whose wait for a peer times out writes NaN and an error that the next call on its
    workspace raises. This raises it without a call: after replays of CUDA graphs, before results
    leave the GPU. It covers the calls that have ended. Not a collective; does not wait; takes
    microseconds; thread-safe.

    Raises:
        PeerTimeoutError: a rank did not take part in a call; the message names the rank, the
            operation and the call's number.
        RankMismatchError: a rank made another call.
    """
    for workspace in REGISTRY.made():
        error = workspace.fault()
        if error is not None:
            raise error


def on_fault(handler: Callable[[FusewireError], object]) -> Callable[[], None]:
    """Call a handler with the error of each fused call that fails on this rank from now on.

    A thread looks for failed calls every FUSEWIRE_WATCHDOG_INTERVAL_S seconds, so this needs no
    call and covers replays of CUDA graphs. The handler runs in that thread, once for each
    workspace. It must not wait for the GPU: kernels may still wait for a peer. `check` and the next
    call raise the same error. An exception of the handler is logged.

    Returns:
        A function that removes the handler.
    """
    return WATCHDOG.on_fault(handler)


def workspaces() -> list[WorkspaceInfo]:
    """Return this process's workspaces, and the failures to make one, with the reasons.

    Not a collective. Thread-safe.
    """
    return [_info(entry) for entry in list(REGISTRY.entries.values())]


def prepare(
    group: dist.ProcessGroup | str | None,
    hidden: int,
    dtype: torch.dtype,
    *,
    max_tokens: int,
    tune: bool = False,
    output_in_place: bool = False,
) -> list[WorkspaceInfo]:
    """Make the workspaces for one hidden size and compile their kernels. A collective.

    Needed before capturing a CUDA graph by hand, and to choose the size: a workspace made at the
    first call is sized by the costs on this GPU. Earlier failures are tried again.

    Args:
        group: the process group or its name; None means the default group.
        hidden: the hidden size, in elements.
        dtype: of the activations.
        max_tokens: the largest number of tokens (rows) of a call to serve; at most what the
            provider can hold.
        tune: measure a table (under a minute) and save it if this machine has none; FUSEWIRE_TUNE=1
            asks for the same. Only if all ranks ask.
        output_in_place: also make the two output buffers of max_tokens rows that
            PassConfig.output_in_place needs.

    Returns:
        For each provider with workspaces, its workspace on this rank or why there is none.

    Raises:
        WorkspaceError: a smaller workspace exists; growing it would break captured CUDA graphs.
        ProcessGroupError: there is no such group.
        PeerTimeoutError: a rank did not take part in time.
    """
    _check_counts(hidden, dtype, max_tokens)
    found = dist.group.WORLD if group is None and dist.is_initialized() else group
    pg = found if isinstance(found, dist.ProcessGroup) else resolve_group(found or "the default group")
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    outputs = OUTPUTS if output_in_place else 0
    if any(provider.limits(hidden, dtype, pg.size()) for provider in PROVIDERS.values()):
        # Before the workspaces are made: the tuner makes larger ones for itself.
        tuned_cost_model(pg, hidden, dtype, device, tune=tune, fresh=True, max_tokens=max_tokens)
    owners = [provider for provider in PROVIDERS.values() if provider.workspace_name == provider.name]
    return [_prepare_one(provider, pg, hidden, dtype, device, max_tokens, outputs) for provider in owners]


def _check_counts(hidden: int, dtype: torch.dtype, max_tokens: int) -> None:
    counts = all(isinstance(number, int) and not isinstance(number, bool) for number in (hidden, max_tokens))
    if not counts or not isinstance(dtype, torch.dtype):
        raise ConfigError(
            f"prepare(hidden={hidden!r}, dtype={dtype!r}, max_tokens={max_tokens!r}): hidden and "
            "max_tokens are whole numbers, dtype a torch.dtype"
        )
    if max_tokens < 1 or hidden < 1:
        raise ConfigError(f"prepare(hidden={hidden}, max_tokens={max_tokens}): both must be at least 1")


def _prepare_one(
    provider: WorkspaceProvider,
    group: dist.ProcessGroup,
    hidden: int,
    dtype: torch.dtype,
    device: torch.device,
    max_tokens: int,
    outputs: int,
) -> WorkspaceInfo:
    key = WorkspaceKey(provider.workspace_name, group.group_name, dtype, hidden)
    static = provider.limits(hidden, dtype, group.size())
    if not static:
        return WorkspaceInfo(*key, 0, 0, static.reason)
    wanted = min(max_tokens, provider.max_tokens(hidden, dtype, group.size()))
    existing = REGISTRY.entries.get(key)
    if existing is not None and existing.serves(group):
        if existing.workspace is None:
            REGISTRY.forget(key)
        elif existing.workspace.max_tokens < wanted:
            raise WorkspaceError(
                f"the workspace ({key}) holds {existing.workspace.max_tokens} tokens, {wanted} "
                "are asked for; fusewire.close() it first on every rank (CUDA graphs captured "
                "with it become invalid: captured=True)"
            )
    entry = REGISTRY.open(provider, group, dtype, hidden, device, lambda machine: wanted, outputs)
    compile_ahead(provider, entry, group)
    REGISTRY.changed()  # calls that lacked a workspace are decided again
    return _info(entry)


def close(group: dist.ProcessGroup | str | None = None, *, captured: bool = False) -> None:
    """Free all workspaces, or those of one group. Idempotent; runs at exit. Every rank calls it.

    The next call makes a new workspace.

    Args:
        group: the process group or its name; None means all groups.
        captured: free also workspaces that CUDA graphs have captured. Delete these graphs before:
            a replay would read and write freed memory, here and on the peers.

    Raises:
        WorkspaceError: CUDA graphs have captured a workspace, and `captured` is false. Nothing was
            freed.
    """
    REGISTRY.close(group.group_name if isinstance(group, dist.ProcessGroup) else group, captured=captured)
