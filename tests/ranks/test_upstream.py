"""The cases of vLLM's and FlashInfer's own tests of this fusion, on gloo ranks.

docs/reliability.md says beside each what upstream demands.
"""

from __future__ import annotations

import torch
import torch.distributed._functional_collectives as functional

import fusewire
from fusewire.custom_ops.ops.norms import SCALE_THEN_ROUND, WIDE_SUM_SCALE_THEN_ROUND

from support import upstream, vllm_norms, vllm_quantizers
from support.compiles import WITHOUT_CODE
from support.distributed import shared_pool
from support.quantizers import assert_same, vllm_static
from support.rank_programs import Ranks

TOKENS, HIDDEN, EPS = 64, 64, 1e-6


def _quantized(quant, y, w, scale):
    """The product of a matrix and activations, both in FP8 or neither."""
    if quant == "none":
        return torch.mm(y, w)
    q = vllm_quantizers.static(y, scale) if quant == "operator" else vllm_static(y, scale)
    return _product(q, w, scale)


def _product(q, w, scale):
    return (torch.mm(q.float(), w.to(vllm_quantizers.FP8).float()) * scale).to(torch.bfloat16)


def _joined(reduced, residual, weight, scale):
    q = torch.empty(reduced.shape, dtype=vllm_quantizers.FP8)
    if residual is None:
        torch.ops._C.rms_norm_static_fp8_quant(q, reduced, weight, scale, EPS)
    else:
        torch.ops._C.fused_add_rms_norm_static_fp8_quant(q, reduced, residual, weight, scale, EPS)
    return q


def _model(ops, quant, reduce):
    """relu, all_reduce, norm, and three times a product, all_reduce, add and norm."""

    def run(x, norms, matrices, scale):
        y = residual = reduce(torch.relu(x))
        if quant == "joined":
            q = _joined(y, None, norms[0], scale)
            residual = residual * 1  # which the operator may write to
            for weight, matrix in zip(norms[1:], matrices, strict=True):
                y = reduce(_product(q, matrix, scale))
                q = _joined(y, residual, weight, scale)
            return q, residual
        y = ops.rms_norm(y, norms[0], EPS)
        for weight, matrix in zip(norms[1:], matrices, strict=True):
            y, residual = ops.fused_add_rms_norm(reduce(_quantized(quant, y, matrix, scale)), residual, weight, EPS)
        return y

    return run


def _fused(cases):
    """How each model's all-reduces were fused; its results are checked for eager's bits."""
    ranks, found = Ranks(), []
    generator = torch.Generator().manual_seed(0)
    norms = [torch.rand(HIDDEN, generator=generator).bfloat16() + 0.5 for _ in range(4)]
    # Small, so that sums of products stay inside FP8's range.
    matrices = [torch.rand(HIDDEN, HIDDEN, generator=generator).bfloat16() / 8 for _ in range(3)]
    x = (torch.randn(TOKENS, HIDDEN, generator=generator) * (1 + ranks.rank)).bfloat16()
    libraries = [*vllm_norms.operators(), *vllm_quantizers.operators()]

    def reduce(y):
        return functional.wait_tensor(functional.all_reduce(y, "sum", ranks.group))

    for norm, quant in cases:
        model = _model(torch.ops.vllm_ir if norm == "operator" else vllm_norms, quant, reduce)
        fusewire.clear_report()
        torch._dynamo.reset()
        given = x, norms, matrices, torch.tensor([0.05])
        with torch.no_grad():
            wanted = model(*given)
            got = torch.compile(model, backend="fusewire", dynamic=False, options=WITHOUT_CODE)(*given)
        assert_same(got, wanted)
        found.append([entry.fusion or entry.reason for entry in fusewire.report().entries])
    for library in libraries:
        library._destroy()
    return found


CASES = [(norm, quant) for norm in ("operator", "PyTorch") for quant in ("none", "operator", "PyTorch")]


def test_vllms_counts():
    """4 of 4 in each of vLLM's models, with the norm's bits and FP8 where it is quantised.

    The last model is not vLLM's: its operators are the norm and its quantisation in one.
    """
    for found in shared_pool(2).run(_fused, [*CASES, ("operator", "joined")]):
        for (_, quant), fusions in zip([*CASES, ("operator", "joined")], found, strict=True):
            assert len(fusions) == 4
            assert all(fusion.startswith("all_reduce") for fusion in fusions), fusions
            assert sum("static FP8" in fusion for fusion in fusions) == {"none": 0, "joined": 4}.get(quant, 3)


def _flashinfer():
    """What differs in FlashInfer's cases on this rank, and how many cases with groups there are."""
    place = upstream.Place()
    return (
        upstream.gemma(place),
        dict(upstream.dynamic_fp8(place)),
        [upstream.group_fp8(place, dtype) for dtype in (torch.bfloat16, torch.float16)],
    )


def test_flashinfers_cases():
    """Closer than FlashInfer asks: exactly PyTorch's values, but for one rounding of the sum."""
    for gemma, dynamic, groups in shared_pool(2).run(_flashinfer):
        assert gemma[WIDE_SUM_SCALE_THEN_ROUND] == [0, 0, 0]
        residual, norm, alone = gemma[SCALE_THEN_ROUND]
        assert (residual, alone) == (0, 0)
        assert norm > 0
        assert len(dynamic) == 8
        assert {name: differ for name, differ in dynamic.items() if any(differ)} == {}
        assert groups == [16, 16]
