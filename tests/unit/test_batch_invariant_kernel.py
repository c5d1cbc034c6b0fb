"""The Triton kernel of batch-invariant norms without a GPU: interpreted, compiled, and refused."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu.batch_invariant_check import (
    Case,
    Instance,
    batch_invariance_faults,
    check_edges,
    check_variants,
    same_bits,
    special_rows,
    ulps,
)

from fusewire.custom_ops.ops.norms import (
    ROUND_THEN_SCALE,
    WIDE_SUM_ROUND_THEN_SCALE,
    WIDE_SUM_SCALE_THEN_ROUND,
    add_residual,
    keeps_wide_sum,
    rms_norm,
    rounds_first,
)
from fusewire.custom_ops.providers.batch_invariant import torch_norm as torch_batch_invariant
from fusewire.custom_ops.providers.batch_invariant import triton_norm
from fusewire.custom_ops.providers.batch_invariant.triton_norm import rms_norm_batch_invariant
from fusewire.errors import TrainingError

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
TESTS = Path(__file__).parents[1]


# The Triton kernel without a GPU


def interpreted_checks() -> None:
    """What the subprocess below runs with TRITON_INTERPRET=1: the kernel against PyTorch, on the CPU."""
    assert triton_norm.availability(), triton_norm.availability().reason
    cases = [
        Case(hidden, dtype, weight, residual, bias, form)
        for hidden in (1, 65, 576, 2880, 20000)
        for dtype, weight, residual, bias, form in (
            (torch.float32, None, None, 0.0, "scale_then_round"),
            (torch.float32, torch.float16, torch.float32, 1.0, "round_then_scale"),
            (torch.float16, torch.float32, torch.float32, 1.0, "scale_then_round"),
            (torch.float16, torch.float16, torch.bfloat16, 0.0, "round_then_scale"),
            (torch.float16, torch.float16, torch.float16, 0.0, "wide_sum_round_then_scale"),
            (torch.float16, torch.float32, torch.float16, 1.0, "wide_sum_scale_then_round"),
        )
    ]
    for case in cases:
        instance = Instance(case, "cpu")
        for kind in ("normal", "spread"):
            x, residual = instance.make(kind)(5)
            assert same_bits(instance.kernel(x, residual), instance.plain(x, residual)), (case, kind)
    # The interpreter truncates to bfloat16 instead of rounding, so bits cannot agree there.
    for residual_dtype in (None, torch.bfloat16, torch.float32):
        instance = Instance(Case(300, torch.bfloat16, torch.bfloat16, residual_dtype), "cpu")
        x, residual = instance.make("normal")(5)
        for got, want in zip(instance.kernel(x, residual), instance.plain(x, residual), strict=True):
            assert ulps(got, want.double()) <= 3
    sharp = Instance(Case(576, torch.float16, torch.float32, torch.float16), "cpu", sharp=1)
    assert batch_invariance_faults(sharp.kernel, sharp.make("normal"), (3, 17)) == []
    _check_interpreted_edges()


def _check_interpreted_edges() -> None:
    instance = Instance(Case(72, torch.float32, torch.float32, torch.float16), "cpu")
    x, residual = instance.make("normal")(24)
    assert residual is not None
    want = instance.plain(x, residual)
    strided = torch.full((24, 100), torch.nan)
    strided[:, :72] = x
    unaligned = torch.zeros(24 * 72 + 1, dtype=torch.float16)[1:].view(24, 72).copy_(residual)
    assert same_bits(instance.kernel(strided[:, :72], unaligned), want)
    assert same_bits(instance.kernel(x.t().contiguous().t(), residual), want)
    four = instance.kernel(x.view(2, 3, 4, 72), residual.view(2, 3, 4, 72))
    assert same_bits(tuple(t.reshape(24, 72) for t in four), want)
    assert [t.shape for t in instance.kernel(x[:0], residual[:0])] == [(0, 72), (0, 72)]
    assert same_bits(instance.kernel(x[:1].expand(24, 72), residual)[1:], (add_residual(x[:1], residual),))
    special = special_rows(72, torch.float32, "cpu")
    assert same_bits(instance.kernel(special, None), instance.plain(special, None))
    by_operator = rms_norm(x, policy=triton_norm.PROVIDER)
    assert torch.equal(by_operator, rms_norm(x, policy=torch_batch_invariant.PROVIDER))
    needs_grad = x.clone().requires_grad_()
    with pytest.raises(TrainingError, match="for inference"):
        rms_norm_batch_invariant(needs_grad)
    rms_norm(needs_grad, policy=triton_norm.PROVIDER).sum().backward()
    assert needs_grad.grad is not None


@needs_triton
def test_kernel_interpreted() -> None:
    """The kernel's arithmetic, masks, strides and chunks, bit for bit those of the PyTorch provider."""
    command = [sys.executable, "-c", "import test_batch_invariant_kernel as t; t.interpreted_checks()"]
    path = os.pathsep.join([str(TESTS), *sys.path])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]


def compiled(case: Case, aligned: bool = True) -> str:
    """PTX of the kernel as a call of this case launches it on an H100 or H200."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
    kernel, plan = triton_norm.kernel(), triton_norm._plan(case.hidden)
    pointers = {"x_ptr": case.dtype, "norm_ptr": case.dtype, "weight_ptr": case.weight}
    pointers |= {"residual_ptr": case.residual, "summed_ptr": case.residual and case.dtype}
    signature = dict.fromkeys(kernel.arg_names, "constexpr")
    signature |= {name: names[dtype] for name, dtype in pointers.items() if dtype is not None}
    signature |= dict.fromkeys(("x_stride", "residual_stride", "n_rows"), "i32")
    signature |= dict.fromkeys(("eps", "weight_bias"), "fp32")
    constants: dict[str, Any] = {
        **dict.fromkeys(name for name, dtype in pointers.items() if dtype is None),
        "HIDDEN": case.hidden,
        "TILE": plan.tile,
        "ROWS": plan.rows,
        "STRIDE_UNIT": 8 if aligned else 1,
        "ADD_BIAS": bool(case.weight_bias),
        "ROUND_FIRST": rounds_first(case.form),
        "WIDE_SUM": keeps_wide_sum(case.form, case.dtype),
    }
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if aligned and signature[name].startswith("*")
    }
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": plan.warps, **triton_norm.COMPILE_OPTIONS}
    program = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return str(program.asm["ptx"])


@needs_triton
@pytest.mark.parametrize(
    "case",
    [
        Case(64, torch.bfloat16, torch.bfloat16, torch.bfloat16),
        Case(2688, torch.float16, torch.float16, torch.float16, 1.0),
        Case(2880, torch.bfloat16, torch.float32, torch.float32),
        Case(4096, torch.float32),
        Case(8192, torch.bfloat16, torch.bfloat16, torch.bfloat16, 0.0, ROUND_THEN_SCALE),
        Case(16384, torch.bfloat16, torch.float32),
        Case(20480, torch.bfloat16, torch.bfloat16, torch.bfloat16),
        Case(8192, torch.bfloat16, torch.bfloat16, torch.bfloat16, 0.0, WIDE_SUM_ROUND_THEN_SCALE),
        Case(20480, torch.float16, torch.float16, torch.float16, 1.0, WIDE_SUM_SCALE_THEN_ROUND),
    ],
    ids=str,
)
def test_kernel_compiles_to_wide_accesses(case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every access of global memory is 16 bytes wide, the arithmetic exact, and warps meet once a chunk."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    ptx = compiled(case)
    accesses = re.findall(r"(?:ld|st)\.global\S*", ptx)
    assert accesses
    assert all(".v4.b32" in access for access in accesses), set(accesses)
    assert "sqrt.rn.f32" in ptx
    assert "div.rn.f32" in ptx
    assert not re.search(r"\bfma\.|\.ftz|\.approx|div\.full", ptx)
    assert not re.search(r"\b(add|mul)\.f32", ptx)  # without .rn the assembler may fuse them
    assert ptx.count("bar.sync") <= (1 if case.hidden <= 16384 else 2)


@needs_triton
def test_kernel_compiles_for_rows_without_alignment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No wide access where a row need not begin at 16 bytes."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    ptx = compiled(Case(4097, torch.bfloat16, torch.float16, torch.float32), aligned=False)
    accesses = re.findall(r"(?:ld|st)\.global\S*", ptx)
    assert accesses
    assert not any(".v" in access for access in accesses), set(accesses)


# The Triton kernel on a GPU: tests/gpu/batch_invariant_check.py does more


@pytest.mark.gpu
def test_kernel_on_this_gpu() -> None:
    """Edges and variants; skipped where the kernel cannot run."""
    from gpu.batch_invariant_check import Log

    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA GPU")
    support = triton_norm.availability()
    if not support:
        pytest.skip(support.reason)
    log = Log()
    check_variants(log, "cuda")
    check_edges(log, "cuda")
    assert log.failures == []
