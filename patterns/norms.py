"""The spellings of RMSNorm in a post-grad graph, as data.

A decomposed norm is `x32 = cast(x); n = x32 * rsqrt(mean(x32 ** 2) + eps)` and then a *tail*: where
the source rounds to x's dtype and how it multiplies by the weight. `steps` spells a tail in the
order of computation:

    round     cast to x's dtype
    n*K, K*n  multiply by the weight, written on the right or on the left, K being
              w (as it is), wide(w) (cast to fp32 first), (w+b) and (wide(w)+b) (a number is added,
              Gemma's `1 + w`)

*Variants* compute n by other operations. Every tail may follow them. x may be a sum in fp32,
`x32 = cast(a) + cast(b)`, which is rounded only where it is read as the residual (vLLM).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from fusewire.custom_ops.ops.norms import ROUND_THEN_SCALE, SCALE_THEN_ROUND

ROUND = "round"
# What the report adds to the name of a norm that reads a sum in fp32 before it is rounded.
WIDE_SUM = ", sum not rounded"


@dataclass(frozen=True)
class Tail:
    """One spelling of a tail: its name in reports, its steps, and the programs that write it so."""

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
    """Return a tail's name in reports, or its steps if it has no name."""
    return _NAMES.get(steps, " ".join(steps))


def tail_form(steps: tuple[str, ...]) -> str:
    """Return the rounding order (`form` of the IR operators) of a tail."""
    return ROUND_THEN_SCALE if len(steps) > 1 and steps[0] == ROUND else SCALE_THEN_ROUND


@dataclass(frozen=True)
class Variant:
    """Other operations that compute n, which differ by a unit in the last place of fp32.

    Attributes:
        name: what the report adds to the tail's name.
        does: what such a norm does, to follow "the norm".
    """

    name: str
    does: str


# Above each stands an example; `r` is `rsqrt(mean(x ** 2) + eps)`.
# x * rsqrt(sum(x ** 2) / size + eps)
SUMMED = Variant("sum over the size", "divides a sum by the hidden size instead of taking a mean")
# x * (sqrt(size) * rsqrt(sum(x ** 2) + size * eps))
SCALED = Variant("scaled root", "scales by numbers of its own, such as the square root of the hidden size")
# x * rsqrt(vector_norm(x) ** 2 / size + eps)
SQUARED_ROOT = Variant("squared root", "takes a power of a square root, such as a vector's length squared")
# x * (1 / sqrt(mean(x ** 2) + eps))
RECIPROCAL = Variant("reciprocal of the root", "takes the reciprocal of a square root instead of rsqrt")
# x / sqrt(mean(x ** 2) + eps)
DIVIDED = Variant("divided by the root", "divides by a square root instead of multiplying by rsqrt")
# x * (r * w)
WEIGHTED_ROOT = Variant("root weighted first", "multiplies the root by the weight before it multiplies the input")
# (x * w) * r
WEIGHTED_INPUT = Variant("input weighted first", "multiplies the input by the weight before it multiplies by the root")
# x * rsqrt(sum(x ** 2) + eps), RMSNorm with the weight 1 / sqrt(size) and the epsilon eps / size
LENGTH = Variant("L2", "divides by the row's length, which is a factor of the weight")
VARIANTS = (LENGTH, SUMMED, SCALED, SQUARED_ROOT, RECIPROCAL, DIVIDED, WEIGHTED_ROOT, WEIGHTED_INPUT)


def variant_names(variants: Collection[Variant]) -> str:
    """Return what these variants add to a tail's name in reports."""
    return "".join(f", {variant.name}" for variant in VARIANTS if variant in variants)


def describe_variants(variants: Collection[Variant]) -> str:
    """Return what a norm of these variants does, to follow "the norm"; "" without any."""
    return " and ".join(variant.does for variant in VARIANTS if variant in variants)


@dataclass(frozen=True)
class NormOp:
    """An operator that is a norm by itself.

    fusewire's has operands for weight_bias and form after eps. The others' are vLLM's: they
    normalise in fp32, round to the weight's dtype, multiply, and round to x's dtype. With a
    residual they normalise the sum before it is rounded.

    Attributes:
        op: its qualified name; an operator of that name need not be registered.
        operands: positions of (x, residual, weight, eps); None where it has no residual.
        must_be_none: positions of arguments that are None in a plain RMSNorm.
    """

    op: str
    operands: tuple[int, int | None, int, int]
    must_be_none: tuple[int, ...] = ()


NORM_OPS = (
    # fusewire's own, called by a program
    NormOp("fusewire::rms_norm", (0, None, 1, 2)),
    NormOp("fusewire::fused_add_rms_norm", (0, 1, 2, 3)),
    # vLLM's, in graphs that a serving engine hands over
    NormOp("vllm_ir::rms_norm", (0, None, 1, 2), (3,)),
    NormOp("vllm_ir::fused_add_rms_norm", (0, 1, 2, 3), (4,)),
)
