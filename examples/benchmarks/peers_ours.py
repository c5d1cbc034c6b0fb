"""Define fusewire's candidates for peers.py: each provider in each form, and the dispatcher's choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from peers_candidates import (
    Arena,
    Bench,
    Call,
    Candidate,
    Family,
    Result,
    flashinfer_family,
    norm_family,
    plain_family,
    torch_family,
)
from peers_report import CHOSEN, COPY, FUSEWIRE, SHARDED
from peers_vllm import vllm_family

import fusewire
from fusewire.custom_ops.dispatch import dispatcher as dispatch
from fusewire.custom_ops.dispatch.cost_tables import ONE_SHOT, SYMM_ONE_SHOT, SYMM_TWO_SHOT, TWO_SHOT
from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm as op
from fusewire.custom_ops.ops.norms import SCALE_THEN_ROUND, NormSpec
from fusewire.custom_ops.ops.sharded_norm import own_rows
from fusewire.custom_ops.providers.flashinfer import provider as flashinfer
from fusewire.custom_ops.providers.symm_mem import launcher as symm_mem
from fusewire.custom_ops.providers.symm_mem.prepared_launch import PreparedCall
from fusewire.custom_ops.providers.symm_mem.provider import PROVIDER as SYMM_MEM
from fusewire.custom_ops.providers.symm_mem.provider import data_tokens
from fusewire.custom_ops.tuning.timers import EPS, Timer, peer_copies
from fusewire.custom_ops.workspaces.provider import PROVIDERS
from fusewire.errors import WorkspaceError

OURS = (
    ("symm_mem one-shot", "`symm_mem` one-shot", FUSEWIRE),
    ("symm_mem two-shot", "`symm_mem` two-shot", FUSEWIRE),
    ("symm_mem two-shot, in place", "two-shot in place", FUSEWIRE),
    ("symm_mem sharded residual", "sharded residual", SHARDED),
    ("symm_mem sharded residual, in place", "sharded in place", SHARDED),
    ("plain copy to all peers, copy engines", "", COPY),
    ("plain copy to all peers, kernel", "", COPY),
)
COPIES = tuple(label for label, _, kind in OURS if kind == COPY)
PROVIDED = tuple(
    (f"flashinfer {shot}, as a provider", f"`flashinfer` {shot}", FUSEWIRE) for shot in ("one-shot", "two-shot")
)
CHOICE = (("fusewire's own choice", "fusewire chooses", CHOSEN),)


def _functional(call: Callable[..., Result], group_name: str) -> Callable[[Arena], Call]:
    """Return a provider's call, with the operator's parameters, for set i."""

    def at(arena: Arena) -> Call:
        return lambda i: call(*arena.inputs[i], EPS, 0.0, SCALE_THEN_ROUND, group_name)

    return at


def symm_mem_family() -> Family:
    """Return fusewire's kernels in each form."""

    def together(bench: Bench) -> list[Candidate]:
        fusewire.prepare(bench.group, bench.hidden, bench.dtype, max_tokens=bench.most_tokens, output_in_place=True)
        workspace_provider, made = PROVIDERS[SYMM_MEM], bench.workspace(SYMM_MEM)
        most, ways = made.max_tokens, {"exact": True, "compiles": True}
        few = workspace_provider.token_limit(SYMM_ONE_SHOT, bench.hidden, bench.dtype, bench.world_size, most)
        each, large = range(1, most + 1), range(data_tokens(bench.world_size) + 1, most + 1)
        size = f"its workspace takes {most} tokens"
        in_place = f"only its protocol with flags, above {large.start - 1} tokens, works in place, and {size}"
        two_shots = [workspace_provider.bind(made, SYMM_TWO_SHOT, output) for output in (0, 1)]

        def rotating(arena: Arena) -> Call:
            calls = [_functional(call, bench.name)(arena) for call in two_shots]
            return lambda i: calls[i % 2](i)

        def sharded(placed: bool) -> Callable[[Arena], Call]:
            def at(arena: Arena) -> Call:
                shards = [own_rows(one.residual, bench.rank, bench.world_size) for one in arena.inputs]
                outputs = (0, 1) if placed else (None, None)
                calls = [PreparedCall(made.made, symm_mem.two_shot_sharded_launch, output) for output in outputs]

                def call(i: int) -> Result:
                    x, _, weight = arena.inputs[i]
                    return made.run(calls[i % 2], x, shards[i], NormSpec(weight, EPS, 0.0, SCALE_THEN_ROUND))

                return call

            return at

        one_shot, two_shot = (
            _functional(workspace_provider.bind(made, v), bench.name) for v in (SYMM_ONE_SHOT, SYMM_TWO_SHOT)
        )
        found = [
            Candidate(*OURS[0], one_shot, few, f"it takes at most {few.stop - 1} tokens", **ways),
            Candidate(*OURS[1], two_shot, each, size, **ways),
            Candidate(*OURS[2], rotating, large, in_place, **ways),
            Candidate(*OURS[3], sharded(False), each, size, **ways),
            Candidate(*OURS[4], sharded(True), large, in_place, **ways),
        ]
        try:
            copies, sent = peer_copies(made.made, bench.device)
            for names, copy in zip(OURS[5:], copies.values(), strict=True):
                found.append(Candidate(*names, lambda arena, copy=copy: copy, sent=sent))
        except WorkspaceError as error:
            bench.missing.update(dict.fromkeys(COPIES, str(error)))
        return found

    return Family("fusewire's symm_mem", OURS, together, together_s=900.0)


def provider_family() -> Family:
    """Return FlashInfer's kernels as fusewire calls them."""

    def together(bench: Bench) -> list[Candidate]:
        workspace_provider, made = PROVIDERS[flashinfer.PROVIDER], bench.workspace(flashinfer.PROVIDER)
        found = []
        for variant, names in zip((ONE_SHOT, TWO_SHOT), PROVIDED, strict=True):
            limit = workspace_provider.token_limit(
                variant, bench.hidden, bench.dtype, bench.world_size, made.max_tokens
            )
            why = f"it takes {limit.start} to {limit.stop - 1} tokens in a workspace of {made.max_tokens}"
            call = _functional(workspace_provider.bind(made, variant), bench.name)
            found.append(Candidate(*names, call, limit, why, exact=True))
        return found

    return Family("fusewire's flashinfer", PROVIDED, together)


def choice_family() -> Family:
    """Return fusewire::all_reduce_rms_norm with the default policy."""

    def together(bench: Bench) -> list[Candidate]:
        return [Candidate(*CHOICE[0], _functional(op, bench.name))]

    return Family("fusewire", CHOICE, together)


def chosen(arena: Arena, group_name: str) -> str:
    """What the dispatcher chose for a size, by its name in the plan."""
    decision = dispatch.decide(op, (*arena.inputs[0], EPS, 0.0, SCALE_THEN_ROUND, group_name), "")
    return decision.bound[2] if decision.bound else decision.provider.name


CPU = (("fusewire native", "native", FUSEWIRE), ("fusewire rank_ordered", "rank_ordered", FUSEWIRE))


def cpu_family() -> Family:
    """Return the operator's providers that need no GPU."""

    def together(bench: Bench) -> list[Candidate]:
        calls = (op.native, op.providers["rank_ordered"].fn)
        pairs = zip(CPU, calls, (False, True), strict=True)
        return [Candidate(*names, _functional(call, bench.name), exact=exact) for names, call, exact in pairs]

    return Family("fusewire on CPUs", CPU, together)


def families(device: torch.device) -> list[Family]:
    """Return the families in the order of their set-up: later ones use what earlier ones made."""
    if device.type == "cpu":
        return [plain_family("gloo"), cpu_family(), choice_family()]
    peers = [plain_family("NCCL"), norm_family(), torch_family()]
    return [*peers, symm_mem_family(), flashinfer_family(), vllm_family(), provider_family(), choice_family()]


def most_bytes(timer: Timer, grid: Sequence[int], row_bytes: int) -> int:
    """Return the most memory, in bytes, that all sets of x of a size take."""
    return max(timer.sets(tokens * row_bytes) * tokens * row_bytes for tokens in grid)
