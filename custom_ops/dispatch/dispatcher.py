"""Which provider serves a call of `all_reduce_rms_norm`, by its number of tokens, at run time.

A policy such as "flashinfer,native;max_size_mb=4" names the providers that may serve, by priority, and
options:

- providers after `native` are never reached, since native serves everything;
- of those before it that are in the plan (fusewire.custom_ops.dispatch.cost_model), the fastest at this size serves; one
  that is not in the plan serves wherever it comes first;
- `output` is the number of the workspace's output buffer in which a result may stay, without a copy (see
  fusewire.fusion_passes.passes.place_outputs); -1 is none, of a workspace that has such buffers for other calls;
- `max_size_mb` replaces the plan's word on FlashInfer: it serves inputs up to so many MiB and none above;
- a policy of one provider forces it.

Ranks that chose differently would wait for each other for ever. So a choice follows from nothing but the
shapes and dtypes of the call, the policy, and what the ranks voted on once (fusewire.custom_ops.workspaces.registry);
never from a pointer or from one rank's memory. It is made once for each shape and then looked up.
"""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from fusewire.custom_ops.dispatch.cost_model import Plan, find_plan
from fusewire.custom_ops.dispatch.decisions import Decision, Decisions
from fusewire.custom_ops.dispatch.provider_vote import agree_on_providers
from fusewire.custom_ops.dispatch.table_vote import agreed_plan, tuned_plan
from fusewire.custom_ops.ops.all_reduce_norm import (
    all_reduce_rms_norm,
    all_reduce_sum,
    resolve_group,
)
from fusewire.custom_ops.ops.norms import TRITON_NORM, fused_add_rms_norm, rms_norm
from fusewire.custom_ops.ops.registry import (
    NATIVE,
    IrOp,
    Provider,
    Refusal,
    Support,
    parse_policy,
    unknown_provider,
)
from fusewire.custom_ops.workspaces.provider import OUTPUTS, PROVIDERS, WorkspaceKey, WorkspaceProvider
from fusewire.custom_ops.workspaces.registry import REGISTRY, Entry
from fusewire.errors import ConfigError, NoProviderError

# Memory that a workspace may take on each GPU where nobody said how many tokens it is for.
DEFAULT_WORKSPACE_BYTES = 512 << 20
_LIMITED_BY_SIZE = "flashinfer"
_MAX_DECISIONS = 1 << 15
_TRIES = 3  # to decide while nothing changes
_OPTIONS: dict[str, Callable[[str], float]] = {"max_size_mb": float, "output": int}


class Shape(NamedTuple):
    """What a choice depends on, beside the policy."""

    tokens: int
    hidden: int
    dtype: torch.dtype
    world_size: int

    @property
    def nbytes(self) -> int:
        return self.tokens * self.hidden * self.dtype.itemsize


@dataclass(frozen=True)
class Policy:
    """A policy, read. `names` ends where nothing after it could be reached."""

    names: tuple[str, ...]
    max_size_mb: float | None = None
    output: int | None = None

    @property
    def slot(self) -> int | None:
        """The output buffer for the call's result, if it may stay in one."""
        return None if self.output is None or self.output < 0 else self.output

    @property
    def forced(self) -> bool:
        return len(self.names) == 1


@dataclass(frozen=True)
class Candidate:
    """One way to compute a call: a provider, or one variant of it. `label` is its name in the plan."""

    name: str
    label: str


@dataclass(frozen=True)
class Pick:
    """The outcome for one shape. `candidate` is None where nothing can serve."""

    candidate: Candidate | None
    reason: str
    refusals: tuple[Refusal, ...] = ()


def read_policy(op: IrOp, policy: str) -> Policy:
    """The policy's providers and options.

    Raises:
        ConfigError: an option is unknown or not a number.
    """
    names = parse_policy(op, policy)
    if NATIVE in names:
        names = names[: names.index(NATIVE) + 1]
    options: dict[str, float] = {}
    for option in policy.split(";")[1:]:
        key, _, value = option.strip().partition("=")
        if key not in _OPTIONS:
            known = ", ".join(_OPTIONS)
            raise ConfigError(f"the policy {policy!r} has an unknown option {key!r}; there are {known}")
        try:
            options[key] = _OPTIONS[key](value)
        except ValueError:
            raise ConfigError(f"the policy {policy!r}: {key}={value!r} is not a number") from None
    return Policy(names, **options)  # type: ignore[arg-type]


# --- The choice, free of side effects -----------------------------------------------------------------------


@dataclass(frozen=True)
class Room:
    """What the ranks agreed on for one provider: how many tokens its workspace takes, or why it has none."""

    max_tokens: int = 0
    reason: str = ""


def pick(shape: Shape, policy: Policy, plan: Plan, rooms: Mapping[str, Room], reasons: Mapping[str, str]) -> Pick:
    """The choice for one shape.

    Args:
        rooms: for each provider with a workspace, what was agreed.
        reasons: for each provider that cannot serve such a call, why.
    """
    refusals: list[Refusal] = []
    known: list[Candidate] = []
    for name in policy.names:
        if name in reasons:
            refusals.append(Refusal(name, reasons[name]))
            continue
        found = _candidates(name, shape, policy, plan, rooms, refusals)
        sized = policy.max_size_mb is not None and name == _LIMITED_BY_SIZE
        planned = name == NATIVE or name in PROVIDERS or any(c.label in plan.costs for c in found)
        if found and not known and (sized or not planned):
            known = found
            break
        known += found
    if not known:
        return Pick(None, "nothing can serve", tuple(refusals))
    return _fastest(known, shape, plan, policy, refusals)


def _candidates(
    name: str, shape: Shape, policy: Policy, plan: Plan, rooms: Mapping[str, Room], refusals: list[Refusal]
) -> list[Candidate]:
    keeper = PROVIDERS.get(name)
    if keeper is None:
        return [Candidate(name, name)]
    room = rooms[name]
    if room.reason:
        refusals.append(Refusal(name, room.reason))
        return []
    if policy.max_size_mb is not None and name == _LIMITED_BY_SIZE and shape.nbytes > policy.max_size_mb * 2**20:
        refusals.append(Refusal(name, f"the input is larger than max_size_mb={policy.max_size_mb:g}"))
        return []
    found = _variants(keeper, shape, room.max_tokens)
    if not found:
        refusals.append(Refusal(name, _too_small(keeper, shape, policy, plan, room)))
    return found


def _variants(keeper: WorkspaceProvider, shape: Shape, max_tokens: int) -> list[Candidate]:
    return [
        Candidate(keeper.name, label)
        for label in keeper.variants
        if shape.tokens in keeper.token_limit(label, shape.hidden, shape.dtype, shape.world_size, max_tokens)
    ]


def _too_small(keeper: WorkspaceProvider, shape: Shape, policy: Policy, plan: Plan, room: Room) -> str:
    """Why a workspace does not take a call: not meant to, made too small, or beyond what there can be."""
    cap = keeper.max_tokens(shape.hidden, shape.dtype, shape.world_size)
    larger = _variants(keeper, shape, cap)
    if not larger:
        return f"{shape.tokens} tokens; it takes at most {cap} at this hidden size"
    native = plan.cost(NATIVE, shape.nbytes)
    costs = [cost for c in larger if (cost := plan.cost(c.label, shape.nbytes)) is not None]
    if not policy.forced and not (native and costs and min(costs) < native):
        return f"not the fastest for {shape.tokens} tokens"
    return (
        f"{shape.tokens} tokens; its workspace takes up to {room.max_tokens} (fusewire.prepare(..., "
        "max_tokens=...) on "
        "every rank, before the first call, makes a larger one)"
    )


def _fastest(found: Sequence[Candidate], shape: Shape, plan: Plan, policy: Policy, refusals: Sequence[Refusal]) -> Pick:
    costs = {c.label: plan.cost(c.label, shape.nbytes) for c in found}
    timed = {label: cost for label, cost in costs.items() if cost is not None}
    if timed:
        best = min((c for c in found if c.label in timed), key=lambda c: timed[c.label])
        rest = ", ".join(f"{label} {cost:.1f}" for label, cost in timed.items() if label != best.label)
        why = f"{timed[best.label]:.1f} us" + (f" ({rest})" if rest else "") + f"; {plan.source}"
        return Pick(best, why, tuple(refusals))
    within = [c for c in found if shape.nbytes <= plan.limits.get(c.label, 0)]
    others = [c for c in found if c.name not in PROVIDERS]
    if others and not within:
        return Pick(others[0], plan.source if len(found) > 1 else "first by priority", tuple(refusals))
    if policy.forced or policy.max_size_mb is not None:
        return Pick((within or found[-1:])[0], "asked for by the policy", tuple(refusals))
    return Pick((within or found)[0], plan.source, tuple(refusals))


def wanted_tokens(keeper: WorkspaceProvider, shape: Shape, policy: Policy, plan: Plan) -> int:
    """How many tokens a workspace made at the first call should take: all that calls will bring, or 0."""
    hidden, dtype, world_size = shape.hidden, shape.dtype, shape.world_size
    cap = keeper.max_tokens(hidden, dtype, world_size)
    if policy.max_size_mb is not None and keeper.name == _LIMITED_BY_SIZE:
        return min(cap, int(policy.max_size_mb * 2**20) // (hidden * dtype.itemsize))
    budget = _last(lambda t: keeper.nbytes(hidden, dtype, world_size, t) <= DEFAULT_WORKSPACE_BYTES, cap)
    if policy.forced:
        return min(cap, max(budget, shape.tokens))
    rooms = {name: Room(cap if name == keeper.name else 0) for name in policy.names if name in PROVIDERS}

    def wins(tokens: int) -> bool:
        candidate = pick(shape._replace(tokens=tokens), policy, plan, rooms, {}).candidate
        return candidate is not None and candidate.name == keeper.name

    return max((_last(wins, end, start) for start, end in _octaves(budget)), default=0)


def _last(holds: Callable[[int], bool], end: int, start: int = 0) -> int:
    """The last number in (start, end] for which `holds`, which holds up to somewhere; 0 if for none."""
    low, high = start, end
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low if low > start else 0


def _octaves(end: int) -> list[tuple[int, int]]:
    edges = [0, *(1 << power for power in range(end.bit_length())), end]
    return [(low, high) for low, high in itertools.pairwise(edges) if low < high]


# --- The selector -------------------------------------------------------------------------------------------


_decisions = Decisions(_MAX_DECISIONS)
_resolve: Callable[[str], Any] = dist.distributed_c10d._resolve_process_group  # type: ignore[attr-defined,assignment]


def select(op: IrOp, args: tuple[Any, ...], policy: str) -> Provider:
    """The provider for a call, its `fn` bound to the workspace and the variant. Installed as the op's
    selector.

    Raises: as `decide`.
    """
    return decide(op, args, policy).provider


def decide(op: IrOp, args: tuple[Any, ...], policy: str) -> Decision:
    """The decision for a call: made once, then looked up. Thread-safe. A collective the first time, as far as the ranks
    have to vote: every rank of the group makes the same calls, in the same order.

    Raises:
        NoProviderError: the policy names nothing that can serve; the message has each one's reason.
        ConfigError: the policy names an unknown provider or option.
        CaptureError: the ranks have not yet agreed on a workspace and a CUDA graph is being captured.
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
        # What it follows from has changed meanwhile, by the votes that it took or by another thread. What was voted
        # on is known by now, so to decide again asks nobody.
    return decision


def _holds(decision: Decision, op: IrOp, group_name: str) -> bool:
    for name, provider in decision.snapshot:
        if op.providers.get(name) is not provider:
            return False
    try:
        return decision.group is None or decision.group() is _resolve(group_name)
    except (RuntimeError, ValueError):  # the group is gone; deciding again says so
        return False


def _decide(op: IrOp, args: tuple[Any, ...], policy: str) -> tuple[Decision, bool]:
    """The decision, and whether it may be kept."""
    read = read_policy(op, policy)
    agreed = agree_on_providers(op, read.names, args)
    for name in read.names:
        if name not in op.providers:
            raise ConfigError(unknown_provider(op, name))
    snapshot = tuple((name, op.providers[name]) for name in read.names)
    x = args[0]
    if not _on_gpu(x):
        chosen = op.choose(*args, policy=",".join(read.names), known=agreed.support).provider
        voters = None if agreed.group is None else weakref.ref(agreed.group)
        return Decision(chosen, snapshot, voters, None, {}), True
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
    held = None
    if name in PROVIDERS:
        workspace = entries[name].workspace
        assert workspace is not None
        held = (name, workspace, label, read.slot)
        provider = dataclasses.replace(provider, fn=PROVIDERS[name].bind(workspace, label, read.slot))
    elif name == NATIVE and _norm_kernel_serves(args):
        provider = dataclasses.replace(provider, fn=_native_with_norm_kernel)
    return Decision(provider, snapshot, weakref.ref(group), held, {}), keep


def _on_gpu(x: torch.Tensor) -> bool:
    return x.is_cuda


def _norm_kernel_serves(args: tuple[Any, ...]) -> bool:
    x, residual, weight, eps, weight_bias, form, _ = args
    fitting = x if residual is None else residual
    kernel = fused_add_rms_norm.providers[TRITON_NORM]
    return bool(kernel.check(x, fitting, weight, eps, weight_bias, form))


def _native_with_norm_kernel(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    weight_bias: float,
    form: str,
    group_name: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Native's all-reduce, then one kernel for the rest: native called operator by operator would take ten.

    Whether a rank does this is its own affair: the collective is the same.
    """
    summed = all_reduce_sum(x, group_name)
    if residual is None:
        norm = rms_norm.providers[TRITON_NORM].fn(summed, weight, eps, weight_bias, form)
        return norm, summed
    both: tuple[torch.Tensor, torch.Tensor] = fused_add_rms_norm.providers[TRITON_NORM].fn(
        summed, residual, weight, eps, weight_bias, form
    )
    return both


def _look(
    op: IrOp,
    args: tuple[Any, ...],
    policy: Policy,
    shape: Shape,
    group: dist.ProcessGroup,
    agreed: Mapping[str, Support],
) -> tuple[Pick, dict[str, Entry], bool]:
    """Ask every provider that the ranks have not agreed on, with the votes this takes, and choose."""
    reasons: dict[str, str] = {}
    rooms: dict[str, Room] = {}
    entries: dict[str, Entry] = {}
    gpu, keep = "", True
    for name in policy.names:
        provider = op.providers[name]
        # A provider with a workspace is not asked about this machine here: that is for the ranks to vote on.
        check = provider.supports_args if name in PROVIDERS else provider.check
        support = agreed[name] if name in agreed else check(*args)
        if not support:
            reasons[name] = support.reason
        elif name in PROVIDERS:
            if capturing() and not provider.check_static(*args):
                # This rank will vote "no" outside capture; ranks that could serve raise CaptureError here.
                reasons[name], keep = provider.check_static(*args).reason, False
                continue
            entry = _open(PROVIDERS[name], policy, shape, group, args[0].device)
            entries[name] = entry
            gpu = gpu or common_gpu(entry.facts)
            rooms[name] = Room(entry.workspace.max_tokens if entry.workspace else 0, entry.reason)
    tuned = agreed_plan(group, shape.hidden, shape.dtype)
    plan = find_plan(gpu or "these GPUs", shape.world_size, shape.hidden, shape.dtype, tuned)
    return pick(shape, policy, plan, rooms, reasons), entries, keep


def _open(
    keeper: WorkspaceProvider, policy: Policy, shape: Shape, group: dist.ProcessGroup, device: torch.device
) -> Entry:
    key = WorkspaceKey(keeper.name, group.group_name, shape.dtype, shape.hidden)
    existing = REGISTRY.entries.get(key)
    if existing is not None and existing.serves(group):
        return existing
    machine = REGISTRY.machine(keeper, group, device)
    if machine.reason:
        return machine
    tuned = tuned_plan(group, shape.hidden, shape.dtype, device)
    plan = find_plan(common_gpu(machine.facts), shape.world_size, shape.hidden, shape.dtype, tuned)
    tokens = wanted_tokens(keeper, shape, policy, plan)
    if tokens < 1:
        return dataclasses.replace(machine, reason=_no_use(policy, plan))
    outputs = 0 if policy.output is None else OUTPUTS
    return REGISTRY.open(keeper, group, shape.dtype, shape.hidden, device, lambda _: tokens, outputs)


def _no_use(policy: Policy, plan: Plan) -> str:
    if policy.max_size_mb is not None:
        return f"max_size_mb={policy.max_size_mb:g} is less than one token"
    return f"not the fastest at any size ({plan.source})"


def capturing() -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def common_gpu(facts: Sequence[Mapping[str, Any]]) -> str:
    """The GPUs' name if all ranks have the same, else a name that no plan is for."""
    names = sorted({str(fact.get("gpu")) for fact in facts})
    return names[0] if len(names) == 1 else " + ".join(names)


all_reduce_rms_norm.selector = select
