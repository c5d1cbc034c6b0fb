"""Ways to write an RMSNorm, what the report calls them, and blocks that use them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from support.blocks import HIDDEN, reduce_functional


def mean(x: Tensor) -> Tensor:
    return x.pow(2).mean(-1, keepdim=True)


def total(x: Tensor) -> Tensor:
    return x.pow(2).sum(-1, keepdim=True)


def length(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True)


@dataclass(frozen=True)
class Way:
    """A way to normalise x, which is fp32; `name` is what the report adds to the tail's name.

    `fixed_eps`: the epsilon that it has whatever it is given.
    """

    normed: Callable[[Tensor, float], Tensor]
    name: str = ""
    fixed_eps: float | None = None


ROOT = HIDDEN**0.5
WAYS = {
    # Bit for bit what the operators compute
    "eps on the left": Way(lambda x, e: x * torch.rsqrt(e + mean(x))),
    "no eps": Way(lambda x, e: x * torch.rsqrt(mean(x)), "", 0.0),
    "mean put back": Way(lambda x, e: x * torch.rsqrt(x.pow(2).mean(-1) + e)[..., None]),
    "mean put back at once": Way(lambda x, e: torch.rsqrt(x.square().mean(-1).unsqueeze(-1) + e) * x),
    "mean put back by a view": Way(lambda x, e: x * torch.rsqrt(x.pow(2).mean(-1) + e).view(*x.shape[:-1], 1)),
    "root expanded": Way(lambda x, e: x * torch.rsqrt(mean(x) + e).expand_as(x)),
    # To a unit in the last place of fp32
    "divided": Way(lambda x, e: x / torch.sqrt(mean(x) + e), ", divided by the root"),
    "divided by a power": Way(lambda x, e: x / (e + mean(x)) ** 0.5, ", divided by the root"),
    "one over": Way(lambda x, e: x * (1 / torch.sqrt(mean(x) + e)), ", reciprocal of the root"),
    "reciprocal": Way(lambda x, e: torch.sqrt(mean(x) + e).reciprocal() * x, ", reciprocal of the root"),
    "root of one over": Way(lambda x, e: x * torch.sqrt(1 / (mean(x) + e)), ", reciprocal of the root"),
    "divided by one over rsqrt": Way(
        lambda x, e: x / torch.rsqrt(mean(x) + e).reciprocal(), ", reciprocal of the root, divided by the root"
    ),
    "sum": Way(lambda x, e: x * torch.rsqrt(total(x) / x.shape[-1] + e), ", sum over the size"),
    "sum times": Way(lambda x, e: x * torch.rsqrt(total(x) * (1 / HIDDEN) + e), ", sum over the size"),
    "sum over a float": Way(
        lambda x, e: torch.rsqrt(x.pow(2).sum(-1, True) / float(HIDDEN) + e) * x, ", sum over the size"
    ),
    "sum put back": Way(lambda x, e: x * ((x * x).sum(-1) / HIDDEN + e).pow(-0.5)[..., None], ", sum over the size"),
    "scalar product": Way(
        lambda x, e: x * torch.rsqrt(torch.linalg.vecdot(x, x).unsqueeze(-1) / HIDDEN + e), ", sum over the size"
    ),
    "einsum": Way(
        lambda x, e: x * torch.rsqrt(torch.einsum("...d,...d->...", x, x)[..., None] / x.shape[-1] + e),
        ", sum over the size",
    ),
    "a row times itself": Way(
        lambda x, e: x * torch.rsqrt((x[..., None, :] @ x[..., None]).squeeze(-1) / x.shape[-1] + e),
        ", sum over the size",
    ),
    "a row times itself, transposed": Way(
        lambda x, e: x / ((x.unsqueeze(-2) @ x.unsqueeze(-2).mT).view(*x.shape[:-1], 1) / x.shape[-1] + e).sqrt(),
        ", sum over the size, divided by the root",
    ),
    "rows in a list": Way(
        lambda x, e: (
            x
            * torch.rsqrt(
                torch.bmm(x.view(-1, 1, HIDDEN), x.view(-1, HIDDEN, 1)).view(*x.shape[:-1], 1) / x.shape[-1] + e
            )
        ),
        ", sum over the size",
    ),
    "sum, divided": Way(
        lambda x, e: x / torch.sqrt(total(x).div(HIDDEN) + e), ", sum over the size, divided by the root"
    ),
    "eps times the size": Way(
        lambda x, e: x * (ROOT * torch.rsqrt(total(x) + HIDDEN * e)), ", sum over the size, scaled root"
    ),
    "length squared": Way(
        lambda x, e: x * torch.rsqrt(length(x) ** 2 / HIDDEN + e), ", sum over the size, squared root"
    ),
    "length": Way(
        lambda x, e: x / length(x) * ROOT, ", sum over the size, scaled root, divided by the root", fixed_eps=0.0
    ),
    "length over root": Way(
        lambda x, e: x / (x.norm(dim=-1, keepdim=True) * HIDDEN**-0.5),
        ", sum over the size, scaled root, divided by the root",
        fixed_eps=0.0,
    ),
    "root over length": Way(
        lambda x, e: x * (ROOT / length(x)), ", sum over the size, scaled root, reciprocal of the root", fixed_eps=0.0
    ),
}
TAILS = {
    "L": lambda x, n, w: w * n.to(x.dtype),
    "M'": lambda x, n, w: (n * w).to(x.dtype),
    "G": lambda x, n, w: (n * (1.0 + w.float())).to(x.dtype),
}
IN_FP32 = {"L": "L or M in fp32", "M'": "L' or M' in fp32", "G": "G in fp32"}
# Where the weight is not the last that is multiplied by: the tail is a part of the spelling.
WEIGHTED = {
    "root * w": (lambda x, w, e: x * (torch.rsqrt(mean(x) + e) * w), "M'", ", root weighted first"),
    "w * root": (
        lambda x, w, e: (w.float() * torch.rsqrt(mean(x) + e)) * x,
        "wide(w)*n round",
        ", root weighted first",
    ),
    "w / root": (
        lambda x, w, e: x * (w / torch.sqrt(mean(x) + e)),
        "M",
        ", divided by the root, root weighted first",
    ),
    "x * w": (lambda x, w, e: (x * w) * torch.rsqrt(mean(x) + e), "M'", ", input weighted first"),
    "w * x": (lambda x, w, e: torch.rsqrt(mean(x) + e) * (w * x), "M", ", input weighted first"),
    "x * (1 + w)": (lambda x, w, e: x * (1 + w.float()) * torch.rsqrt(mean(x) + e), "G", ", input weighted first"),
    "x * w / root": (
        lambda x, w, e: x * w / torch.sqrt(total(x) / HIDDEN + e),
        "M'",
        ", sum over the size, divided by the root, input weighted first",
    ),
    "x * w / length": (
        lambda x, w, e: x * w / length(x) * ROOT,
        "M'",
        ", sum over the size, scaled root, divided by the root, input weighted first",
    ),
}


def blocks(norm):
    """An all-reduce and the norm; an all-reduce, the residual and the norm."""

    def block(x, residual, w):
        alone, summed = reduce_functional(x), reduce_functional(x * 0.5) + residual
        return norm(alone, w, 0.125), norm(summed, w, 1e-5), alone, summed

    return block


def ulps(got: Tensor, want: Tensor) -> int:
    """The largest distance in units of the last place, of bf16 of the same sign."""
    assert torch.equal(got.sign(), want.sign())
    return int((got.view(torch.int16).int() - want.view(torch.int16).int()).abs().max())
