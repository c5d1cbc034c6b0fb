"""Learn where vLLM's operators that are a norm and its quantisation round, by trying them.

Versions of vLLM differ: static scales quantise a norm that is rounded once, after the product with
the weight, in 0.26 to 0.33, and rounded before it too in vLLM's sources since. A graph does not say
which version it will run with.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fusewire.custom_ops.ops.norms import FORMS, NormSpec, add_normalize
from fusewire.custom_ops.ops.quantization import FP8
from fusewire.fusion_passes.compiler.eager import call_now
from fusewire.patterns.quantizations import NormQuantOp

_ROWS, _HIDDEN, _EPS = 16, 1024, 1e-5
# Share of the FP8 numbers that may differ: the operator adds the squares in an order of its own. A
# rounding more or less changes one in 60.
_MOST_DIFFERENT = 1 / 250


@functools.lru_cache(maxsize=32)
def form_of(
    op: torch._ops.OpOverload, quant: torch._ops.OpOverload, entry: NormQuantOp, with_residual: bool, device: str
) -> tuple[str, str]:
    """Return the form of an operator's norm and "", or "" and why it is not known.

    The operator is called once, and its results are compared with those of the norm in each form,
    quantised by `quant`. The form does not depend on the dtype; it is tried in bf16.

    Args:
        quant: the operator that quantises alike.
        with_residual: whether a residual is given.
        device: the device's type, such as "cuda".
    """
    try:
        differing = call_now(lambda: _differing(op, quant, entry, with_residual, device))
    except Exception as error:
        return "", f"it could not be tried on {device}: {type(error).__name__}: {error}"
    best, second = sorted(differing, key=differing.__getitem__)[:2]
    if differing[best] <= _MOST_DIFFERENT < differing[second]:
        return best, ""
    return "", f"on {device} its results are not those of one of the norms that fusewire computes"


def _differing(
    op: torch._ops.OpOverload, quant: torch._ops.OpOverload, entry: NormQuantOp, with_residual: bool, device: str
) -> dict[str, float]:
    """Return by form the share of the operator's FP8 numbers that are others than in this form."""
    generator = torch.Generator("cpu").manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(device, torch.bfloat16)

    x, weight = random(_ROWS, _HIDDEN), random(_HIDDEN)
    residual = random(_ROWS, _HIDDEN) if with_residual else None
    dynamic = any(argument.name == "scale" and argument.is_write for argument in op._schema.arguments)
    groups = _HIDDEN // 128 if "group_size" in entry.renamed else 1
    options = {"epsilon": _EPS, "group_size": 128, "is_scale_transposed": False}

    def buffers() -> dict[str, Any]:
        # One number for a static scale; for computed ones, memory of the size that they need.
        size = (_ROWS, groups) if dynamic else (1,)
        scale = torch.full(size, 1 / 32, dtype=torch.float32, device=device)
        return {"result": torch.empty((_ROWS, _HIDDEN), dtype=FP8, device=device), "scale": scale}

    given: dict[str, Any] = {**buffers(), **options, "input": x, "weight": weight, "scale_ub": None}
    given["residual"] = None if residual is None else residual.clone()
    _call(op, given)
    found = {}
    for form in FORMS if with_residual else FORMS[:2]:
        norm, summed = add_normalize(x, residual, NormSpec(weight, _EPS, 0.0, form))
        wanted = {**given, **buffers()}
        _call(quant, {"input": norm, **{new: wanted[old] for new, old in entry.renamed.items()}, **entry.constants})
        differs = given["result"].view(torch.uint8) != wanted["result"].view(torch.uint8)
        same_scales = torch.allclose(given["scale"], wanted["scale"], rtol=0.01, atol=0.0)
        same_sum = residual is None or torch.equal(given["residual"], summed)
        found[form] = float(differs.float().mean()) if same_scales and same_sum else 1.0
    return found


def _call(op: torch._ops.OpOverload, arguments: Mapping[str, Any]) -> None:
    names = {argument.name for argument in op._schema.arguments}
    op(**{name: value for name, value in arguments.items() if name in names})
