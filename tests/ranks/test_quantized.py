"""Quantised norms on 2 ranks, from torch.compile to the results: the bits of eager execution."""

from __future__ import annotations

import models
import pytest
import torch

import fusewire

from support.compiles import WITHOUT_CODE
from support.distributed import shared_pool
from support.quantizers import READ
from support.rank_programs import Ranks
from support.zoo import LAYERS, MODELS, forward_logits

TOKENS, HIDDEN = 17, 256


def _norm(x, w, bias):
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * (w.float() + bias)).to(x.dtype)


def _program(ranks, quantizer, bias, sandwich, with_norm):
    """Two layers; the second reads the first's residual only through its own operator."""

    def run(x, r, w, s):
        found = []
        for _ in range(2):
            y = ranks.reduce(x)
            y = _norm(y, w * 0.5, bias) if sandwich else y
            r = r + y
            n = _norm(r, w, bias)
            found.append(quantizer(n, s))
            q, scale = found[-1] if isinstance(found[-1], tuple) else (found[-1], s)
            x = (q.float().view(TOKENS, -1, 256 // scale.shape[-1]) * scale[..., None]).to(x.dtype).view(x.shape)
            if with_norm:
                x = x + n
        return found

    return run


def _on_a_rank(names: list[str], cases: list[tuple]) -> list[str]:
    """What differs from eager execution, or was not fused as it should."""
    ranks, failed = Ranks(), []
    generator = torch.Generator().manual_seed(9)
    x, r = (torch.randn(TOKENS, HIDDEN, generator=generator) for _ in range(2))
    # Sums of eighths are exact in every order.
    x = ((x * 8).round() / 8 * (1 + ranks.rank)).bfloat16()
    given = x, r.bfloat16(), (torch.rand(HIDDEN, generator=generator) + 0.5).bfloat16(), torch.tensor([0.0371])
    for name in names:
        for bias, sandwich, with_norm, options in cases:
            program = _program(ranks, READ[name][0], bias, sandwich, with_norm)
            fusewire.clear_report()
            with torch.no_grad():
                wanted = torch.utils._pytree.tree_leaves(program(*given))
                got = torch.utils._pytree.tree_leaves(ranks.compile(program, **options)(*given))
            what = f"{name} {bias} {sandwich} {with_norm} {options}"
            if any(
                not torch.equal(a.float(), b.float()) or a.dtype != b.dtype for a, b in zip(got, wanted, strict=True)
            ):
                failed.append(f"{what}: other bits")
            fusions = [entry.fusion or entry.reason for graph in fusewire.report().graphs for entry in graph.entries]
            sharded = ["residual sharded" in fusion for fusion in fusions]
            if len(fusions) != 2 or not all("FP8" in fusion for fusion in fusions):
                failed.append(f"{what}: {fusions}")
            if any(sharded) != ("shard_residual" in options) or all(sharded) != any(sharded):
                failed.append(f"{what}: sharded {fusions}")
    return failed


_SHARDED = {"shard_residual": True}
_OTHER = {"ir_op_priority": {"all_reduce_rms_norm": ("rank_ordered",)}}


@pytest.mark.parametrize(
    ("name", "cases"),
    [
        ("vLLM static", [(0.0, False, False, {}), (1.0, True, False, _SHARDED)]),
        ("torchao row", [(1.0, False, True, _SHARDED), (0.0, True, True, _OTHER)]),
        ("vLLM group", [(1.0, False, False, _SHARDED), (0.0, True, True, {})]),
    ],
)
def test_bits_equal_eager(name, cases):
    """With and without the norm, sharded, Gemma's weight, sandwich norms; native and another
    provider.
    """
    assert shared_pool(2).run(_on_a_rank, [name], cases) == [[], []]


def _peer_differs() -> bool:
    """Whether a rank with another scale for its static quantisation keeps its own."""
    ranks = Ranks()
    quantizer = READ["vLLM static"][0]
    x = torch.ones(TOKENS, HIDDEN).bfloat16()

    def run(x, r, w, s):
        return quantizer(_norm(ranks.reduce(x) + r, w, 0.0), s)

    given = x, x, torch.ones(HIDDEN).bfloat16(), torch.tensor([0.01 * (1 + ranks.rank)])
    with torch.no_grad():
        got = ranks.compile(run)(*given)
        return torch.equal(got.float(), run(*given).float())


def test_native_quantises_with_each_ranks_own_scale():
    """As the source does, whatever the option assumes."""
    assert shared_pool(2).run(_peer_differs) == [True, True]


def _model_in_fp8(name: str) -> tuple[bool, int, list[str]]:
    """Whether a model with FP8 projections has eager's logits, the FP8 norms, and what was not
    fused.
    """
    spec = MODELS[name]
    model, ids = models.to_fp8(spec.build(torch.bfloat16)), spec.inputs(2, 5)
    torch._dynamo.reset()
    fusewire.clear_report()
    with torch.no_grad():
        wanted = forward_logits(model, ids)
        got = forward_logits(torch.compile(model, backend="fusewire", dynamic=False, options=WITHOUT_CODE), ids)
    entries = [entry for graph in fusewire.report().graphs for entry in graph.entries]
    fp8 = sum("FP8 per token" in entry.fusion for entry in entries)
    return torch.equal(got, wanted), fp8, [entry.reason for entry in entries if not entry.fusion]


@pytest.mark.parametrize("name", ["llama", pytest.param("qwen3", marks=pytest.mark.nightly), "gemma3"])
def test_models_in_fp8(name):
    """Real models, whose norms feed FP8 projections (examples/benchmarks/models.py): all fuse."""
    assert shared_pool(2).run(_model_in_fp8, name) == [(True, 2 * LAYERS, [])] * 2
