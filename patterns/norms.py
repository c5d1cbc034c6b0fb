"""The spellings of RMSNorm in a post-grad graph, as data.

A decomposed norm is `x32 = cast(x); n = x32 * rsqrt(mean(x32 ** 2) + eps)` and then a *tail*: where the source rounds
to x's dtype and how it multiplies by the weight. `steps` spells a tail in the order of computation:

    round     cast to x's dtype
    n*K, K*n  multiply by the weight, written on the right or on the left, K being
              w (as it is), wide(w) (cast to fp32 first), w+b and wide(w)+b (a number added, Gemma's `1 + w`)

Programs that compute the same with other operations take *detours*, which every tail may follow.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from fusewire.custom_ops.ops.norms import ROUND_THEN_SCALE, SCALE_THEN_ROUND

ROUND = "round"


@dataclass(frozen=True)
class Tail:
    """One spelling, with the name it has in reports and the models it was seen in."""

    name: str
    steps: tuple[str, ...]
    who: str


TAILS = (
    Tail("L", (ROUND, "w*n"), "Llama, Mistral, Qwen2/3, Phi-3, GLM-4, Mixtral, DeepSeek, Granite"),
    Tail("L'", (ROUND, "n*w"), "gpt-fast and Meta's reference code"),
    Tail("G", ("n*(wide(w)+b)", ROUND), "Gemma 1/2/3, Qwen3-Next, Qwen3.5"),
    Tail("M", ("w*n", ROUND), "OLMo 2/3, gpt-oss"),
    Tail("M'", ("n*w", ROUND), "torch.nn.RMSNorm"),
    Tail("F", ("n*wide(w)", ROUND), "Gemma 3n/4, F.rms_norm on fp32 copies"),
    Tail("weightless", (ROUND,), "norms without a weight"),
    Tail("L or M in fp32", ("w*n",), "fp32 models, where nothing is rounded"),
    Tail("L' or M' in fp32", ("n*w",), "fp32 models, where nothing is rounded"),
    Tail("G in fp32", ("n*(w+b)",), "fp32 models, where nothing is rounded"),
    Tail("weightless in fp32", (), "fp32 models, where nothing is rounded"),
)
_NAMES = {tail.steps: tail.name for tail in TAILS}


def tail_name(steps: tuple[str, ...]) -> str:
    """The tail's name in reports; the steps themselves for a spelling that has none."""
    return _NAMES.get(steps, " ".join(steps))


def tail_form(steps: tuple[str, ...]) -> str:
    """The rounding order (`form` of the IR operators) that these steps have."""
    return ROUND_THEN_SCALE if len(steps) > 1 and steps[0] == ROUND else SCALE_THEN_ROUND


SUMMED, SCALED, SQUARED_ROOT, RECIPROCAL = "summed", "scaled", "squared root", "reciprocal"
DIVIDED, WEIGHTED_ROOT, WEIGHTED_INPUT = "divided", "weighted root", "weighted input"


@dataclass(frozen=True)
class Detour:
    """A way to compute a norm by other operations, which round otherwise by a unit in the last place of fp32.

    Attributes:
        key: what the reader calls it.
        name: what the report adds to the tail's name.
        does: what such a norm does, in a sentence that begins with "the norm".
    """

    key: str
    name: str
    does: str


DETOURS = (
    Detour(SUMMED, "sum over the size", "divides a sum by the hidden size instead of taking a mean"),
    Detour(SCALED, "scaled root", "scales by numbers of its own, such as the square root of the hidden size"),
    Detour(SQUARED_ROOT, "squared root", "takes a power of a square root, such as a vector's length squared"),
    Detour(RECIPROCAL, "reciprocal of the root", "takes the reciprocal of a square root instead of rsqrt"),
    Detour(DIVIDED, "divided by the root", "divides by a square root instead of multiplying by rsqrt"),
    Detour(WEIGHTED_ROOT, "root weighted first", "multiplies the root by the weight before it multiplies the input"),
    Detour(
        WEIGHTED_INPUT, "input weighted first", "multiplies the input by the weight before it multiplies by the root"
    ),
)


def detour_names(keys: Collection[str]) -> str:
    """What these detours add to a tail's name in reports."""
    return "".join(f", {detour.name}" for detour in DETOURS if detour.key in keys)


def detour_moves(keys: Collection[str]) -> str:
    """What a norm with these detours does, as the end of a sentence; "" without any."""
    return " and ".join(detour.does for detour in DETOURS if detour.key in keys)


@dataclass(frozen=True)
class NormOp:
    """An operator that is a norm by itself.

    Attributes:
        op: its qualified name, matched when it is registered.
        operands: positions of (x, residual, weight, eps) among its arguments; None where it has no such argument.
        must_be_none: positions of arguments that must be None for the operator to mean a plain RMSNorm.
    """

    op: str
    operands: tuple[int, int | None, int, int]
    must_be_none: tuple[int, ...] = ()


NORM_OPS = (
    NormOp("fusewire::rms_norm", (0, None, 1, 2)),
    NormOp("fusewire::fused_add_rms_norm", (0, 1, 2, 3)),
    NormOp("vllm_ir::rms_norm", (0, None, 1, 2), (3,)),
    NormOp("vllm_ir::fused_add_rms_norm", (0, 1, 2, 3), (4,)),
)
