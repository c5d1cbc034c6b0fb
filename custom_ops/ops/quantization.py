"""Define quantisation to FP8 (float8_e4m3fn) of a norm's rows in plain PyTorch.

A value is divided by a scale, clamped to +-448 and rounded to nearest even. The scale is given
(*static*), or the largest absolute value of a token or of 128 neighbours divided by 448
(*dynamic*). Programs differ in where they round; a `QuantSpec` says how, so that the result equals
the program's own bit for bit. NaN stays NaN.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusewire.errors import ArgumentError

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
GROUP_SIZE = 128
# Whether PyTorch's cast makes 448 of larger numbers, so that a clamp changes nothing.
CAST_SATURATES = bool(torch.tensor(1e4).to(FP8).float() == FP8_MAX)
# kind
TENSOR = "tensor"
TOKEN = "token"
GROUP = "group"
# apply, amax_by
DIVIDE = "divide"
RECIPROCAL = "reciprocal"
MULTIPLY = "multiply"
# layout
ROWS = "rows"
COLUMNS = "columns"
ALIGNED_COLUMNS = "aligned_columns"
ALIGNED_ROWS = 4  # the multiple of tokens in each column of ALIGNED_COLUMNS
_CHOICES = {
    "kind": (TENSOR, TOKEN, GROUP),
    "apply": (DIVIDE, RECIPROCAL, MULTIPLY),
    "amax_by": (DIVIDE, MULTIPLY),
    "layout": (ROWS, COLUMNS, ALIGNED_COLUMNS),
}
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class QuantSpec:
    """The arithmetic of one quantisation. `str` gives the text that operators take.

    With n the norm in its dtype, all in fp32 and each operation rounded as IEEE 754 says:

        a = largest |n| of a token or group, at least amax_floor, at most the given bound
        s = a / 448, rounded to the norm's dtype if narrow_scale; at least scale_floor
        s = 2 ** ceil(log2(s)) if power_of_two
        q = n / s, rounded to the norm's dtype if narrow; clamped to +-448 if clamp

    Attributes:
        kind: "tensor": s is given. "token": a scale for each row. "group": for each 128 neighbours.
        apply: q is n / s ("divide"), n * (1 / s) with 1 / s rounded ("reciprocal"), or n * s
            ("multiply"; of "tensor" only, the given number is then the inverse of a scale).
        amax_by: s is a / 448 ("divide"), or a * (1 / 448) with 1 / 448 rounded to fp32
            ("multiply"): PyTorch's `a / 448.0` does the first on CPUs and the second on GPUs.
        amax_floor, scale_floor: 0.0 for none.
        narrow_scale: whether s is rounded to the norm's dtype. The scales returned are fp32.
        narrow: whether s (for q only), 1 / s and q are rounded to the norm's dtype.
        power_of_two: whether s is rounded up to a power of two (UE8M0), by torch.log2.
        clamp: whether q is clamped before the cast. True for dynamic scales, whose q is at most
            448 anyway, and where PyTorch's cast saturates (from 2.12 on). Without it the cast
            makes NaN of numbers above 464.
        layout: of a group's scales (T, H / 128) in memory: "rows"; "columns", strides (1, T);
            "aligned_columns", strides (1, T rounded up to a multiple of 4).
    """

    kind: str
    apply: str = DIVIDE
    amax_by: str = DIVIDE
    amax_floor: float = 0.0
    scale_floor: float = 0.0
    narrow_scale: bool = False
    narrow: bool = False
    power_of_two: bool = False
    clamp: bool = True
    layout: str = ROWS

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ArgumentError(
                    f"{name} of a quantisation is {getattr(self, name)!r}; it must be one of "
                    f"{', '.join(map(repr, choices))}"
                )
        for name in ("amax_floor", "scale_floor"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ArgumentError(f"{name} of a quantisation is {getattr(self, name)}; it must be zero or positive")
        if self.static:
            unused = QuantSpec(TOKEN, self.apply if self.apply != MULTIPLY else DIVIDE, narrow=self.narrow)
            if dataclasses.replace(self, kind=TOKEN, apply=unused.apply, clamp=True) != unused:
                raise ArgumentError(f"a static quantisation computes no scale, so these options say nothing: {self}")
        elif self.apply == MULTIPLY or not self.clamp:
            raise ArgumentError(f"a dynamic quantisation divides by its scale, and clamps: {self}")
        if self.layout != ROWS and self.kind != GROUP:
            raise ArgumentError(f"only the scales of groups have a layout, not of kind {self.kind!r}")

    @property
    def static(self) -> bool:
        """Whether the scale is given."""
        return self.kind == TENSOR

    def __str__(self) -> str:
        parts = [self.kind]
        for item in dataclasses.fields(self)[1:]:
            value = getattr(self, item.name)
            if value != item.default:
                parts.append(f"{item.name}={value}")
        return " ".join(parts)


_FIELDS = {item.name: str(item.type) for item in dataclasses.fields(QuantSpec)}
_READERS: dict[str, Callable[[str], Any]] = {
    "float": float,
    "bool": {"True": True, "False": False}.__getitem__,
    "str": str,
}


@functools.lru_cache(maxsize=256)
def parse_quant(text: str) -> QuantSpec:
    """Return the QuantSpec that a text describes.

    Raises:
        ArgumentError: the text is not what `str` of a QuantSpec gives.
    """
    kind, *parts = text.split(" ")
    values: dict[str, Any] = {}
    for part in parts:
        name, _, value = part.partition("=")
        try:
            values[name] = _READERS[_FIELDS[name]](value)
        except (KeyError, ValueError):
            raise ArgumentError(f"{text!r} describes no quantisation: {part!r}; pass str(QuantSpec(...))") from None
    spec = QuantSpec(kind, **values)
    if str(spec) != text:
        raise ArgumentError(f"{text!r} describes no quantisation; it would be {str(spec)!r}")
    return spec


def check_quant_args(x: Tensor, scale: Tensor | None, quant: str) -> None:
    """Raise ArgumentError if a norm of x cannot be quantised so."""
    spec = parse_quant(quant)
    if x.dtype not in _DTYPES:
        raise ArgumentError(f"x is {x.dtype}; norms in bfloat16, float16 and float32 can be quantised")
    if spec.kind == GROUP and x.shape[-1] % GROUP_SIZE:
        raise ArgumentError(f"the hidden size is {x.shape[-1]}; groups need a multiple of {GROUP_SIZE}")
    if spec.layout != ROWS and x.dim() != 2:
        raise ArgumentError(f"x has shape {list(x.shape)}; scales in columns need x of two dimensions")
    if scale is None:
        if spec.static:
            raise ArgumentError("a static quantisation needs its scale: a float32 tensor with one element")
        return
    if scale.numel() != 1 or scale.device != x.device or scale.dtype != torch.float32:
        raise ArgumentError(
            f"the scale must be a float32 tensor with one element on {x.device}, not {scale.dtype} "
            f"{list(scale.shape)} on {scale.device}"
        )


def scales_shape(x: Tensor, quant: str) -> tuple[Any, ...]:
    """Return the shape of the scales of x (..., hidden): (0,) for a static quantisation."""
    spec = parse_quant(quant)
    if spec.static:
        return (0,)
    return (*x.shape[:-1], 1 if spec.kind == TOKEN else x.shape[-1] // GROUP_SIZE)


def fake_quantized(x: Tensor, quant: str) -> tuple[Tensor, Tensor]:
    """Return fake results of `quantize`."""
    scales = torch.empty(scales_shape(x, quant), dtype=torch.float32, device=x.device)
    return torch.empty(x.shape, dtype=FP8, device=x.device), in_layout(scales, parse_quant(quant).layout)


def quantize(norm: Tensor, scale: Tensor | None, quant: str) -> tuple[Tensor, Tensor]:
    """Return the quantised norm and its scales.

    Args:
        norm: (..., hidden), contiguous, bf16, fp16 or fp32.
        scale: one fp32 number: a static quantisation's scale, else the upper bound of the largest
            absolute values, or None.
        quant: the text of a QuantSpec.

    Returns:
        (quantised, scales): float8_e4m3fn of norm's shape, contiguous; and fp32 (..., 1), or
        (..., hidden / 128) in the spec's layout, or (0,) of a static quantisation.
    """
    spec = parse_quant(quant)
    if spec.static:
        assert scale is not None
        return _scaled(norm, scale.reshape(()), spec), norm.new_empty((0,), dtype=torch.float32)
    parts = norm if spec.kind == TOKEN else norm.reshape(*norm.shape[:-1], norm.shape[-1] // GROUP_SIZE, GROUP_SIZE)
    scales = _dynamic_scales(parts, scale, spec)
    quantized = _scaled(parts, scales, spec).reshape(norm.shape)
    return quantized, in_layout(scales if spec.kind == TOKEN else scales.squeeze(-1), spec.layout)


# Functions of quantize's parameters, with its bits; None from those that cannot run. By providers.
KERNELS: list[Callable[[Tensor, Tensor | None, str], tuple[Tensor, Tensor] | None]] = []


def quantize_by_kernel(norm: Tensor, scale: Tensor | None, quant: str) -> tuple[Tensor, Tensor]:
    """Return `quantize(norm, scale, quant)`, from one kernel where there is one."""
    for kernel in KERNELS:
        found = kernel(norm, scale, quant)
        if found is not None:
            return found
    return quantize(norm, scale, quant)


def _dynamic_scales(parts: Tensor, bound: Tensor | None, spec: QuantSpec) -> Tensor:
    """Return the fp32 scales (..., 1) of parts (..., token or group)."""
    # In the operations of programs: Inductor does not round within an operation, but at a cast.
    amax = parts.abs().amax(-1, keepdim=True)
    if not spec.narrow_scale or bound is not None:
        amax = amax.float()
    if spec.amax_floor:
        amax = amax.clamp(min=spec.amax_floor)
    if bound is not None:
        amax = torch.minimum(amax, bound.reshape(()))
    # By a tensor: on GPUs, PyTorch multiplies by the reciprocal of a number instead of dividing.
    scales = amax * (1.0 / FP8_MAX) if spec.amax_by == MULTIPLY else amax / amax.new_full((), FP8_MAX)
    scales = scales.to(parts.dtype if spec.narrow_scale else torch.float32).float()
    if spec.scale_floor:
        scales = scales.clamp(min=spec.scale_floor)
    return torch.exp2(torch.ceil(torch.log2(scales))) if spec.power_of_two else scales


def _scaled(norm: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    """Return the norm divided by its scale, in FP8."""
    dtype = norm.dtype if spec.narrow else torch.float32
    value, scale = norm.to(dtype), scale.to(dtype)
    if spec.apply == MULTIPLY:
        quotient = value * scale
    elif spec.apply == RECIPROCAL:
        quotient = value * scale.reciprocal()
    else:
        quotient = value / scale
    return (quotient.clamp(-FP8_MAX, FP8_MAX) if spec.clamp else quotient).to(FP8)


def in_layout(scales: Tensor, layout: str) -> Tensor:
    """Return contiguous scales (T, G) in a layout: a copy, unless it is "rows"."""
    if layout == ROWS:
        return scales
    columns = scales.t()
    if layout == ALIGNED_COLUMNS:
        tokens = scales.shape[0]
        missing = -tokens % ALIGNED_ROWS
        return F.pad(columns.contiguous(), (0, missing))[:, :tokens].t()
    return columns.contiguous().t()
