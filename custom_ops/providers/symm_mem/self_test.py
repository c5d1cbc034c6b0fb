"""Calls of `symm_mem`'s kernels whose answers are known, made before the kernels are trusted with a program's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusewire.custom_ops.ops.norms import FORMS, add_residual, normalize
from fusewire.custom_ops.ops.sharded_norm import own_rows
from fusewire.custom_ops.providers.symm_mem import launcher as symm_mem
from fusewire.custom_ops.providers.symm_mem.arguments import InnerNorm
from fusewire.custom_ops.providers.symm_mem.workspace import SymmMemWorkspace
from fusewire.custom_ops.workspaces.known_answer import eighths
from fusewire.errors import WorkspaceError

# Kinds of calls.
PLAIN, SANDWICH, SHARDED, SHARDED_SANDWICH = "plain", "sandwich", "sharded", "sharded sandwich"

Run = Callable[..., tuple[Tensor, Tensor]]

# A plain call's third time is the first to go straight to the launch (symm_mem_again).
_TURNS = {PLAIN: 3}


class _Probe(NamedTuple):
    call: Callable[..., Any]
    tokens: int
    form: str


def prove(run: Run, made: SymmMemWorkspace, kind: str, stage: str) -> None:
    """Make the calls of a kind. Stage "alone": compile them, without other ranks; "together": a true collective.

    Args:
        run: (call, x, residual, weight, eps, weight_bias, form, **options) -> (norm, sum), in the workspace.

    Raises:
        WorkspaceError: an answer is wrong on this rank.
    """
    probes = _probes(made, kind)
    if stage == "alone":
        # Ranks that compile while others wait in a kernel would use up those others' time limit.
        with symm_mem.compiling_only():
            for probe in probes:
                _make(run, made, kind, probe)
        return
    wrong = [_make(run, made, kind, probe, turn) for turn in range(_TURNS.get(kind, 1)) for probe in probes]
    made.check(synchronize=True)
    if any(bool(flag) for flag in wrong):
        raise WorkspaceError(
            f"a {kind} call with a known answer came out wrong; leave symm_mem out of the priority list, and report it"
        )


def _probes(made: SymmMemWorkspace, kind: str) -> list[_Probe]:
    """For each protocol, and for tokens that ranks do and do not share evenly."""
    layout = made.layout
    shared = symm_mem.two_shot_sharded if kind in (SHARDED, SHARDED_SANDWICH) else symm_mem.two_shot
    calls = [] if shared is symm_mem.two_shot_sharded else [(symm_mem.one_shot, 1)]
    calls += [(shared, made.world_size + 1), (shared, layout.data_tokens + 1)]
    return [_Probe(c, tokens, form) for c, tokens in calls if tokens <= layout.max_tokens for form in FORMS]


def _make(run: Run, made: SymmMemWorkspace, kind: str, probe: _Probe, turn: int = 0) -> Tensor:
    """Make one call whose sums are exact in every dtype; a tensor that says whether it came out wrong.

    Each turn has other numbers, so that what an earlier one left does not pass for its result.
    """
    tokens, hidden, dtype = probe.tokens, made.hidden, made.dtype

    def draw(seed: int) -> Tensor:
        return eighths(tokens, hidden, seed + turn, dtype, made.device)

    parts = [draw(3 * rank + 1) for rank in range(made.world_size)]
    residual, weight = draw(50), draw(51)[0]
    total = torch.stack(parts).float().sum(0).to(dtype)
    options: dict[str, Any] = {}
    if kind in (SANDWICH, SHARDED_SANDWICH):
        options["inner"] = InnerNorm(draw(52)[0], 0.5, 1.0, probe.form)
        total = normalize(total, options["inner"].weight, 0.5, 1.0, probe.form)
    total = add_residual(total, residual)
    expected = normalize(total, weight, 0.25, 1.0, probe.form)
    given = residual
    if kind in (SHARDED, SHARDED_SANDWICH):
        given = own_rows(residual, made.rank, made.world_size)
        total = own_rows(total, made.rank, made.world_size)
    norm, summed = run(probe.call, parts[made.rank], given, weight, 0.25, 1.0, probe.form, **options)
    if options:
        # The inner norm rounds; what its last bit changes is bounded by the largest number of a row.
        return _far(norm, expected, expected.abs().amax(-1, keepdim=True)) | _far(summed, total, total.abs().amax())
    return _far(norm, expected, expected.abs()) | (summed != total).any()


def _far(got: Tensor, expected: Tensor, size: Tensor) -> Tensor:
    bound = size.float() * 4 * torch.finfo(got.dtype).eps + 1e-30
    return ((got.float() - expected.float()).abs() > bound).any()
