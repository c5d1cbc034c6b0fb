"""Choose the provider of each call of `all_reduce_rms_norm`, by its number of tokens, at run time.

If ranks chose differently, they would wait for each other for ever. So a choice depends only on the
call's shapes and dtypes, the policy, and the ranks' votes (see `workspaces.registry`); never on a
pointer or on one rank's memory. It is made once per shape and then looked up.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusewire.custom_ops._torch_private import is_capturing, process_group
from fusewire.custom_ops.dispatch.compare_calls import compare_call, compare_provider, comparing
from fusewire.custom_ops.dispatch.cost_model import find_cost_model
from fusewire.custom_ops.dispatch.decisions import Decision, Decisions
from fusewire.custom_ops.dispatch.pick import Capacity, Pick, Shape, pick, wanted_tokens, why_no_workspace
from fusewire.custom_ops.dispatch.policy import Policy, read_policy
from fusewire.custom_ops.dispatch.provider_vote import agree_on_providers
from fusewire.custom_ops.dispatch.served import counter_of
from fusewire.custom_ops.dispatch.table_vote import agreed_cost_model, tuned_cost_model
from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm, all_reduce_sum, resolve_group
from fusewire.custom_ops.ops.norms import TRITON_NORM, fused_add_rms_norm, rms_norm
from fusewire.custom_ops.ops.registry import NATIVE, IrOp, Provider, Support, unknown_provider
from fusewire.custom_ops.workspaces.capture import capturing
from fusewire.custom_ops.workspaces.provider import OUTPUTS, PROVIDERS, WorkspaceKey, WorkspaceProvider
from fusewire.custom_ops.workspaces.registry import REGISTRY, WorkspaceEntry
from fusewire.errors import ConfigError, NoProviderError

_MAX_DECISIONS = 1 << 15
_TRIES = 3  # attempts to decide without a concurrent change
_decisions = Decisions(_MAX_DECISIONS)


def select(op: IrOp, args: tuple[Any, ...], policy: str) -> Provider:
    """Return the provider for a call, its `fn` bound to workspace and variant (a selector).

    Raises: as `decide`, and RankMismatchError in the debug mode of `compare_calls`.
    """
    if comparing():
        compare_call(op, args, policy)
        decision = decide(op, args, policy)
        compare_provider(op, args, decision)
    else:
        decision = decide(op, args, policy)
    served = decision.served
    if served.on_gpu and is_capturing():
        served.captured += 1
    else:
        served.calls += 1
    return decision.provider


def served_by(policy: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return an implementation of `all_reduce_rms_norm` that this policy serves. A collective."""

    def run(*args: Any) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = select(all_reduce_rms_norm, args, policy).fn(*args)
        return result

    return run


def decide(op: IrOp, args: tuple[Any, ...], policy: str) -> Decision:
    """Return the decision for a call: made once, then looked up. Thread-safe.

    The first call is a collective if the ranks must vote: every rank of the group makes the same
    calls in the same order.

    Raises:
        NoProviderError: no provider of the policy can serve; the message has each one's reason.
        ConfigError: the policy names an unknown provider or option.
        CaptureError: the ranks must still vote, and a CUDA graph is being captured.
        PeerTimeoutError: a rank did not take part in the vote.
    """
    x, residual, weight, eps, weight_bias, form, group_name = args
    key = (
        x.shape,
        x.dtype,
        x.get_device(),
        group_name,
        policy or op.priority,
        None if weight is None else weight.dtype,
        None if residual is None else residual.dtype,
        weight_bias,
        form,
        eps,
    )
    found = _decisions.get(key, REGISTRY.version)
    if found is not None and _holds(found, op, group_name):
        return found
    for _ in range(_TRIES):
        version = REGISTRY.version
        decision, keep = _decide(op, args, policy)
        if not keep:
            break
        if REGISTRY.version == version:
            _decisions.keep(key, decision, version)
            break
        # Votes or another thread changed the registry meanwhile. Deciding again needs no new vote,
        # because the outcomes are known now.
    return decision


def _holds(decision: Decision, op: IrOp, group_name: str) -> bool:
    for name, provider in decision.snapshot:
        if op.providers.get(name) is not provider:
            return False
    try:
        return decision.group is None or decision.group() is process_group(group_name)
    except (RuntimeError, ValueError):  # the group is gone; deciding again raises the right error
        return False


def _decide(op: IrOp, args: tuple[Any, ...], policy: str) -> tuple[Decision, bool]:
    """Return the decision, and whether it may be stored."""
    read = read_policy(op, policy)
    agreed = agree_on_providers(op, read.names, args)
    for name in read.names:
        if name not in op.providers:
            raise ConfigError(unknown_provider(op, name))
    snapshot = tuple((name, op.providers[name]) for name in read.names)
    x = args[0]
    if not on_gpu(x):
        chosen = op.choose(*args, policy=",".join(read.names), known=agreed.support).provider
        voters = None if agreed.group is None else weakref.ref(agreed.group)
        counter = counter_of(op.name, x, args[6], chosen.name, "")
        return Decision(chosen, snapshot, voters, None, {}, counter), True
    group = resolve_group(args[6])
    shape = Shape(x.numel() // x.shape[-1] if x.shape[-1] else 0, x.shape[-1], x.dtype, group.size())
    found, entries, keep = _look(op, args, read, shape, group, agreed.support)
    if found.candidate is None:
        listed = "\n".join(f"  - {refusal}" for refusal in found.refusals)
        raise NoProviderError(
            f"no provider of fusewire::{op.name} can serve {shape.tokens} tokens of hidden size "
            f"{shape.hidden}; tried:\n"
            f"{listed}\nAdd {NATIVE!r} to the priority list to fall back to plain PyTorch."
        )
    name, label = found.candidate.name, found.candidate.label
    provider = op.providers[name]
    bound = None
    if name in PROVIDERS:
        workspace = entries[name].workspace
        assert workspace is not None
        bound = (name, workspace, label, read.slot)
        provider = dataclasses.replace(provider, fn=PROVIDERS[name].bind(workspace, label, read.slot))
    elif name == NATIVE and norm_kernel_serves(args):
        provider = dataclasses.replace(provider, fn=native_with_norm_kernel)
    counter = counter_of(op.name, x, args[6], name, "" if bound is None else label, _why_without(entries))
    return Decision(provider, snapshot, weakref.ref(group), bound, {}, counter), keep


def _why_without(entries: Mapping[str, WorkspaceEntry]) -> str:
    """Return why providers have no workspace, or ""."""
    return "; ".join(f"{name}: {entry.refusal}" for name, entry in entries.items() if entry.refusal)


def on_gpu(x: torch.Tensor) -> bool:
    return x.is_cuda


def norm_kernel_serves(args: tuple[Any, ...]) -> bool:
    x, residual, *norm, _ = args
    kernel = fused_add_rms_norm.providers[TRITON_NORM]
    return bool(kernel.check(x, x if residual is None else residual, *norm))


def native_with_norm_kernel(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    """Compute native's all-reduce, then add + norm in one kernel instead of native's ten.

    Ranks need not agree on this: the collective is the same.
    """
    *norm, group_name = rest
    summed = all_reduce_sum(x, group_name)
    if residual is None:
        return rms_norm.providers[TRITON_NORM].fn(summed, *norm), summed
    both: tuple[Tensor, Tensor] = fused_add_rms_norm.providers[TRITON_NORM].fn(summed, residual, *norm)
    return both


def _look(
    op: IrOp,
    args: tuple[Any, ...],
    policy: Policy,
    shape: Shape,
    group: dist.ProcessGroup,
    agreed: Mapping[str, Support],
) -> tuple[Pick, dict[str, WorkspaceEntry], bool]:
    """Pick a provider, after any votes; return pick, workspaces, and whether to store the pick."""
    reasons: dict[str, str] = {}
    capacities: dict[str, Capacity] = {}
    entries: dict[str, WorkspaceEntry] = {}
    gpu, keep = "", True
    for name in policy.names:
        provider = op.providers[name]
        # The ranks vote on the machine of a provider with workspaces, so it is not checked here.
        check = provider.supports_args if name in PROVIDERS else provider.check
        support = agreed[name] if name in agreed else check(*args)
        if not support:
            reasons[name] = support.reason
        elif name in PROVIDERS:
            if capturing() and not provider.check_static(*args):
                # Outside capture this rank will vote "no"; ranks that could serve raise
                # CaptureError.
                reasons[name], keep = provider.check_static(*args).reason, False
                continue
            entry = _open(PROVIDERS[name], policy, shape, group, args[0].device)
            entries[name] = entry
            gpu = gpu or common_gpu(entry.facts)
            refusal = PROVIDERS[name].refusal(entry.workspace) if entry.workspace else entry.refusal
            capacities[name] = Capacity(entry.workspace.max_tokens if entry.workspace else 0, refusal)
            keep = keep and not (refusal and entry.workspace and capturing())
    tuned = agreed_cost_model(group, shape.hidden, shape.dtype)
    costs = find_cost_model(gpu or "these GPUs", shape.world_size, shape.hidden, shape.dtype, tuned)
    return pick(shape, policy, costs, capacities, reasons), entries, keep


def _open(
    provider: WorkspaceProvider, policy: Policy, shape: Shape, group: dist.ProcessGroup, device: torch.device
) -> WorkspaceEntry:
    key = WorkspaceKey(provider.workspace_name, group.group_name, shape.dtype, shape.hidden)
    existing = REGISTRY.entries.get(key)
    if existing is not None and existing.serves(group):
        return existing
    machine = REGISTRY.machine(provider, group, device)
    if machine.refusal:
        return machine
    tuned = tuned_cost_model(group, shape.hidden, shape.dtype, device)
    costs = find_cost_model(common_gpu(machine.facts), shape.world_size, shape.hidden, shape.dtype, tuned)
    tokens = wanted_tokens(provider, shape, policy, costs)
    if tokens < 1:
        return dataclasses.replace(machine, refusal=why_no_workspace(policy, costs))
    outputs = 0 if policy.output is None else OUTPUTS
    return REGISTRY.open(provider, group, shape.dtype, shape.hidden, device, lambda _: tokens, outputs)


def common_gpu(facts: Sequence[Mapping[str, Any]]) -> str:
    """Return the GPUs' common name, or a name without a table if the ranks' GPUs differ."""
    names = sorted({str(fact.get("gpu")) for fact in facts})
    return names[0] if len(names) == 1 else " + ".join(names)


all_reduce_rms_norm.selector = select
