"""Test the `symm_mem` kernels with known answers, before a program uses them.

Two steps, each followed by a vote: compile (on each rank alone, since peers that wait in a kernel
for a rank that compiles may time out), then execute (a collective).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusewire.custom_ops.coordination.busy import busy
from fusewire.custom_ops.ops.norms import NormSpec, add_normalize, forms_of, normalize
from fusewire.custom_ops.ops.quantization import quantize
from fusewire.custom_ops.ops.sharded_norm import own_rows
from fusewire.custom_ops.providers.batch_invariant.torch_norm import normalize_batch_invariant
from fusewire.custom_ops.providers.symm_mem import launcher as symm_mem
from fusewire.custom_ops.providers.symm_mem.arguments import Quantization
from fusewire.custom_ops.providers.symm_mem.launch_config import Launch
from fusewire.custom_ops.providers.symm_mem.prepared_launch import PreparedCall
from fusewire.custom_ops.providers.symm_mem.workspace import SymmMemWorkspace
from fusewire.custom_ops.workspaces.known_answer import eighths
from fusewire.errors import WorkspaceError

# Kinds of calls.
PLAIN, SANDWICH, SHARDED, SHARDED_SANDWICH = "plain", "sandwich", "sharded", "sharded sandwich"
_BATCH_INVARIANT = "batch-invariant "  # before the kind

# (call, x, residual, weight, eps, weight_bias, form, inner) -> (norm, sum), in the workspace; with
# a quantization as the last argument (norm or None, sum, quantised norm, scales or None).
Run = Callable[..., tuple[Any, ...]]

_SCALE = 0.25  # of a static quantisation; also a bound that is reached
_LEAST_STEP = 2.0**-9  # between neighbours in FP8
_TURNS = 2  # the first call prepares the launch of the second


def kind_of(sandwich: bool, sharded: bool, batch_invariant: bool = False) -> str:
    """Return the kind of calls with an inner norm or a sharded residual."""
    kind = (SHARDED_SANDWICH if sharded else SANDWICH) if sandwich else SHARDED if sharded else PLAIN
    return f"{_BATCH_INVARIANT}{kind}" if batch_invariant else kind


class QuantKind(NamedTuple):
    """What the kernels of quantised calls are compiled for, besides the kind of call.

    Attributes:
        form: the norm's form.
        quant: the text of the QuantSpec.
        given: whether a scale, or a bound of the largest values, is given.
        with_norm: whether the norm is a result too.
    """

    form: str
    quant: str
    given: bool
    with_norm: bool


def name_of(kind: str, quant: QuantKind | None) -> str:
    """Return the name of a tested kind of calls."""
    return kind if quant is None else f"{kind} FP8 ({', '.join(map(str, quant))})"


class _Probe(NamedTuple):
    call: PreparedCall
    tokens: int
    form: str


def compile_probes(run: Run, ws: SymmMemWorkspace, kind: str, quant: QuantKind | None = None) -> None:
    """Compile the kernels that `execute_probes` launches. Not a collective."""
    with symm_mem.compiling_only(), busy():
        for probe in _probes(ws, kind, quant):
            _make(run, ws, kind, probe, quant=quant)


def execute_probes(run: Run, ws: SymmMemWorkspace, kind: str, quant: QuantKind | None = None) -> None:
    """Make the calls of a kind, each with and without a prepared launch. A collective.

    Raises:
        WorkspaceError: an answer is wrong on this rank.
        PeerTimeoutError: a rank did not take part in time.
    """
    probes = _probes(ws, kind, quant)
    wrong = [_make(run, ws, kind, probe, turn, quant) for turn in range(_TURNS) for probe in probes]
    ws.check(synchronize=True)
    if any(bool(flag) for flag in wrong):
        raise WorkspaceError(
            f"a {kind} call with a known answer came out wrong; leave symm_mem out of the priority list, and report it"
        )


def _probes(ws: SymmMemWorkspace, kind: str, quant: QuantKind | None = None) -> list[_Probe]:
    """Return a probe per protocol and form, with token counts that ranks share evenly and not."""
    forms = forms_of(ws.dtype) if quant is None else (quant.form,)
    sharded = kind.endswith((SHARDED, SHARDED_SANDWICH))
    two_shot: Callable[..., Launch] = symm_mem.two_shot_sharded_launch if sharded else symm_mem.two_shot_launch
    calls: list[tuple[Callable[..., Launch], int]] = [] if sharded else [(symm_mem.one_shot_launch, 1)]
    calls += [(two_shot, ws.world_size + 1), (two_shot, ws.layout.data_tokens + 1)]
    if kind.startswith(_BATCH_INVARIANT):
        calls = [(functools.partial(make, batch_invariant=True), tokens) for make, tokens in calls]
    return [
        _Probe(PreparedCall(ws, make), tokens, form)
        for make, tokens in calls
        if tokens <= ws.layout.max_tokens
        for form in forms
    ]


def _make(
    run: Run, ws: SymmMemWorkspace, kind: str, probe: _Probe, turn: int = 0, quant: QuantKind | None = None
) -> Tensor:
    """Make one call whose sums are exact in every dtype; return a bool tensor, true if wrong.

    Each turn has other numbers, so that an earlier turn's results do not pass for its own.
    """
    tokens, hidden, dtype = probe.tokens, ws.hidden, ws.dtype

    exact = kind.startswith(_BATCH_INVARIANT)  # so are the sums of squares of any numbers
    size = torch.exp2(torch.arange(hidden, device=ws.device) % 11 - 5.0).to(dtype) if exact else 1
    norm_of = normalize_batch_invariant if exact else normalize

    def draw(seed: int) -> Tensor:
        return eighths(tokens, hidden, seed + turn, dtype, ws.device) * size

    parts = [draw(3 * rank + 1) for rank in range(ws.world_size)]
    residual, weight = draw(50), draw(51)[0]
    total = torch.stack(parts).float().sum(0).to(dtype)
    inner = None
    if kind.endswith(SANDWICH):
        inner = NormSpec(draw(52)[0], 0.5, 1.0, probe.form)
        total = norm_of(total, inner)
    outer = NormSpec(weight, 0.25, 1.0, probe.form)
    expected, total = add_normalize(total, residual, outer, norm_of)
    given = residual
    if kind.endswith((SHARDED, SHARDED_SANDWICH)):
        given = own_rows(residual, ws.rank, ws.world_size)
        total = own_rows(total, ws.rank, ws.world_size)
    args = (probe.call, parts[ws.rank], given, outer, inner)
    wrong: Tensor
    if quant is None:
        norm, summed = run(*args)
    else:
        scale = torch.tensor([_SCALE], device=ws.device) if quant.given else None
        quantization = Quantization(quant.quant, scale, quant.with_norm)
        norm, summed, got, scales = run(*args, quantization)
        wanted, wanted_scales = quantize(expected, scale, quant.quant)
        wrong = _far_quantized(got, wanted) | _far(summed, total, total.abs().amax())
        if scales is not None:
            wrong |= (scales / wanted_scales - 1.0).abs().gt(0.02).any()
        return wrong if norm is None else wrong | _far(norm, expected, expected.abs().amax())
    wrong = (summed != total).any()
    if exact:
        wrong |= (norm != expected).any()
    elif inner is not None:
        # The inner norm rounds; its last bit's effect is bounded by the row's largest number.
        wrong = _far(norm, expected, expected.abs().amax(-1, keepdim=True)) | _far(summed, total, total.abs().amax())
    else:
        wrong |= _far(norm, expected, expected.abs())
    return wrong


def _far_quantized(got: Tensor, expected: Tensor) -> Tensor:
    """Compare quantised norms: the norm's last bit may turn a rounding to FP8 the other way."""
    wanted = expected.float()
    return ((got.float() - wanted).abs() > wanted.abs() * 0.13 + _LEAST_STEP).any()


def _far(got: Tensor, expected: Tensor, size: Tensor) -> Tensor:
    bound = size.float() * 4 * torch.finfo(got.dtype).eps + 1e-30
    return ((got.float() - expected.float()).abs() > bound).any()
