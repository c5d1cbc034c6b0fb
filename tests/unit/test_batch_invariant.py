"""Batch-invariant norms on a CPU: the PyTorch provider, and the Triton kernel interpreted and compiled."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from gpu.batch_invariant_check import (
    DTYPES,
    Case,
    Instance,
    batch_invariance_faults,
    caught,
    numerics_faults,
    position_variant,
    row_count_variant,
    rows,
    same_bits,
    special_rows,
    ulps,
)
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm, sum_in_rank_order
from fusewire.custom_ops.ops.norms import (
    ROUND_THEN_SCALE,
    WIDE_SUM_ROUND_THEN_SCALE,
    WIDE_SUM_SCALE_THEN_ROUND,
    add_residual,
    fused_add_rms_norm,
    rms_norm,
)
from fusewire.custom_ops.ops.registry import all_ops
from fusewire.custom_ops.providers.batch_invariant import provider as batch_invariant
from fusewire.custom_ops.providers.batch_invariant import torch_norm as torch_batch_invariant
from fusewire.custom_ops.providers.batch_invariant import triton_norm
from fusewire.custom_ops.providers.batch_invariant.triton_norm import chunk_of, rms_norm_batch_invariant
from fusewire.errors import ArgumentError, NoProviderError
from fusewire.fusion_passes.config import BATCH_INVARIANT_VARIABLE, PassConfig

from support.distributed import run_ranks

CASES = [
    Case(64, torch.bfloat16, torch.bfloat16),
    Case(576, torch.float32, None, torch.float32),
    Case(1000, torch.float16, torch.float32, torch.float16, 1.0),
    Case(2880, torch.bfloat16, torch.float32, torch.float32, 0.0, ROUND_THEN_SCALE),
    Case(4097, torch.bfloat16, torch.bfloat16, torch.bfloat16, 1.0, ROUND_THEN_SCALE),
    Case(16390, torch.float16),
    Case(576, torch.bfloat16, torch.bfloat16, torch.bfloat16, 0.0, WIDE_SUM_ROUND_THEN_SCALE),
    Case(2880, torch.float16, torch.float16, torch.float16, 1.0, WIDE_SUM_SCALE_THEN_ROUND),
]


# The checker itself


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", [row_count_variant, position_variant])
def test_checker_catches_variants(variant: Any, dtype: torch.dtype) -> None:
    """A reduction split by the number of rows, or ordered by the row's place, does not pass."""
    case = Case(2048, dtype, torch.float32, dtype)
    assert caught((Instance(case, "cpu", seed) for seed in range(3)), variant, (3, 299))


def test_checker_catches_a_variant_provider() -> None:
    """The same through an operator's provider, as the tests below ask the operators."""
    provider = "variant_on_purpose"

    @rms_norm.register_impl(provider, batch_invariant=True)
    def _(x: Tensor, weight: Tensor | None, eps: float, weight_bias: float, form: str) -> Tensor:
        return row_count_variant(weight)(x, None)[0]

    try:
        instance = Instance(Case(2048, torch.float32, torch.float32), "cpu")
        faults = batch_invariance_faults(
            lambda x, _: (rms_norm(x, instance.weight, policy=provider),), instance.make("normal"), (3, 299)
        )
        assert any("differs from the row alone" in fault for fault in faults)
    finally:
        rms_norm.unregister_impl(provider)


def test_same_bits_sees_what_equality_does_not() -> None:
    """-0.0 and 0.0 differ, NaNs do not, dtypes do."""
    zero, nan = torch.zeros(1), torch.tensor([torch.nan])
    assert not same_bits((zero,), (-zero,))
    assert same_bits((nan,), (-nan,))
    assert not same_bits((zero,), (zero.half(),))


# The provider in plain PyTorch


@pytest.mark.parametrize("kind", ["normal", "spread"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_do_not_depend_on_others(case: Case, kind: str) -> None:
    """One row alone has the bits of the same row among 3 and 299 others (40 if wide); values are right."""
    instance = Instance(case, "cpu")
    others = (3, 299) if case.hidden < 4000 else (3, 40)
    assert batch_invariance_faults(instance.plain, instance.make(kind), others) == []
    faults, _ = numerics_faults(instance, instance.plain, kind)
    assert faults == []


def test_rows_do_not_depend_on_two_thousand_others() -> None:
    """The largest batch of the issue, on the row and weight that are most sensitive."""
    instance = Instance(Case(576, torch.bfloat16, torch.float32, torch.bfloat16), "cpu", sharp=2)
    assert batch_invariance_faults(instance.plain, instance.make("spread"), (2047,)) == []


def test_threads_do_not_matter() -> None:
    """PyTorch cuts the work by threads; no row may notice."""
    x, before = rows(300, 2880, torch.float32, "normal", 0), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(rms_norm(x, policy=torch_batch_invariant.PROVIDER))
    finally:
        torch.set_num_threads(before)
    assert same_bits((results[0],) * 2, (results[1], results[2]))


def _tree_by_hand(squares: np.ndarray[Any, np.dtype[np.float32]], size: int) -> np.float32:
    """The documented tree, one addition at a time."""
    total = np.float32(0)
    for start in range(0, len(squares), size):
        part = list(squares[start : start + size])
        part += [np.float32(0)] * (size - len(part))
        while len(part) > 1:
            part = [part[2 * i] + part[2 * i + 1] for i in range(len(part) // 2)]
        total = total + part[0]
    return total


@pytest.mark.parametrize("hidden", [1, 2, 5, 64, 1500, 5000, 16384, 40000])
def test_sum_of_squares_follows_the_tree(hidden: int) -> None:
    """Addition by addition, in fp32."""
    x = rows(2, hidden, torch.float32, "spread", hidden)
    squares = np.square(x.numpy())
    want = [_tree_by_hand(row, chunk_of(hidden)) for row in squares]
    assert torch_batch_invariant.sum_of_squares(x).flatten().tolist() == want


def test_no_operation_reduces() -> None:
    """All the provider calls is elementwise, or moves data: nothing that a library may split by the batch."""
    arguments = (torch.randn(3, 3000), torch.randn(3, 3000).half(), torch.randn(3000))

    def call(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
        provider = fused_add_rms_norm.providers[torch_batch_invariant.PROVIDER]
        return provider.fn(x, residual, weight, 1e-6, 1.0, "round_then_scale")

    graph = make_fx(call)(*arguments).graph
    used = {node.target.overloadpacket.__name__ for node in graph.nodes if node.op == "call_function"}
    elementwise = {"add", "mul", "sqrt", "reciprocal", "_to_copy"}
    assert used - elementwise <= {"new_zeros", "slice", "constant_pad_nd", "alias"}
    assert elementwise <= used


def test_tree_is_a_function_of_the_hidden_size() -> None:
    """Chunks of a power of two, one if the row fits, and the whole plan has no other argument."""
    for hidden in (1, 3, 64, 1024, 1025, 8192, 16384, 16385, 10**6):
        size = chunk_of(hidden)
        assert size & (size - 1) == 0
        assert min(hidden, 16384) <= size <= 16384
        assert triton_norm._plan(hidden).rows * size >= 1024


def test_inverse_square_root_is_correctly_rounded() -> None:
    """Root and inverse each, against NumPy's, which IEEE 754 fixes; torch.sqrt alone would not do."""
    bits = torch.arange(0x3F800000, 0x40800000, 17, dtype=torch.int32)  # a sample of [1, 4)
    v = torch.cat([bits.view(torch.float32), torch.tensor([0.0, 1e-45, 1e-38, 3e38, torch.inf])])
    with np.errstate(divide="ignore"):
        want = np.float32(1) / np.sqrt(v.numpy())
    assert np.array_equal(torch_batch_invariant.inverse_square_root(v).numpy(), want)


@pytest.mark.parametrize("weight_bias", [0.0, 1.0])
@pytest.mark.parametrize("form", ["scale_then_round", "round_then_scale"])
@pytest.mark.parametrize("weight_dtype", [None, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_agrees_with_native(dtype: Any, weight_dtype: Any, form: str, weight_bias: float) -> None:
    """The residual sum bit for bit, the norm to a unit in the last place, for every mix of dtypes."""
    weight = None if weight_dtype is None else rows(1, 320, torch.float32, "normal", 1)[0].to(weight_dtype)
    for residual_dtype in (torch.bfloat16, torch.float32, torch.float64):
        x = rows(20, 320, dtype, "normal", 2)
        residual = rows(20, 320, residual_dtype, "normal", 3)
        arguments = (x, residual, weight, 1e-5, weight_bias, form)
        want = fused_add_rms_norm(*arguments, policy="native")
        got = fused_add_rms_norm(*arguments, policy=torch_batch_invariant.PROVIDER)
        assert same_bits(got[1:], want[1:])
        assert got[0].dtype == dtype
        assert ulps(got[0], want[0].double()) <= (2 if dtype in (torch.bfloat16, torch.float16) else 8)
        alone = rms_norm(want[1], *arguments[2:], policy=torch_batch_invariant.PROVIDER)
        assert same_bits((alone,), got[:1])


def test_float64_is_invariant_too() -> None:
    """Whatever dtype native takes, the provider takes."""
    x = rows(40, 777, torch.float64, "spread", 5)
    whole = rms_norm(x, policy=torch_batch_invariant.PROVIDER)
    alone = [rms_norm(x[i : i + 1], policy=torch_batch_invariant.PROVIDER) for i in range(40)]
    assert torch.equal(whole, torch.cat(alone))


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (3, 0), (64,), (2, 3, 4, 64)])
def test_shapes(shape: tuple[int, ...]) -> None:
    """Any leading dimensions, none, no rows, no columns."""
    x = torch.randn(shape, dtype=torch.bfloat16)
    norm, summed = fused_add_rms_norm(x, x, policy=torch_batch_invariant.PROVIDER)
    assert norm.shape == summed.shape == shape
    assert norm.is_contiguous()
    assert rms_norm(x, policy=torch_batch_invariant.PROVIDER).shape == shape


def test_special_values_stay_in_their_rows() -> None:
    """A NaN or an infinity spoils its own row only; zeros stay zeros."""
    x = special_rows(96, torch.bfloat16, "cpu")
    norm = rms_norm(x, policy=torch_batch_invariant.PROVIDER)
    assert norm[0].isnan().all()
    assert norm[1].isnan().sum() == 1  # inf / inf; the others are 0
    assert (norm[3] == 0).all()
    assert not norm[4:6].isnan().any()
    assert same_bits((norm,), (rms_norm(x, policy="native"),))


# The operators and the configuration


def test_batch_invariant_policies_name_only_such_providers() -> None:
    """Triton before PyTorch, and nothing that is not batch-invariant."""
    config = PassConfig(batch_invariant=True)
    norms = [triton_norm.PROVIDER, torch_batch_invariant.PROVIDER]
    assert config.policy("rms_norm").split(",") == norms
    assert config.policy("fused_add_rms_norm").split(",") == norms
    assert batch_invariant.PROVIDER in config.policy("all_reduce_rms_norm").split(",")
    for name, op in all_ops().items():
        providers = (op.derives_from or op).providers
        assert all(providers[p].batch_invariant for p in config.policy(name).split(",")), name


def test_environment_switches_the_mode_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """FUSEWIRE_BATCH_INVARIANT=1 is PassConfig(batch_invariant=True)."""
    monkeypatch.setenv(BATCH_INVARIANT_VARIABLE, "1")
    assert PassConfig().policy("rms_norm") == PassConfig(batch_invariant=True).policy("rms_norm")
    monkeypatch.setenv(BATCH_INVARIANT_VARIABLE, "0")
    assert PassConfig().policy("rms_norm") == "native"


def test_native_is_not_called_batch_invariant() -> None:
    """Native's mean is the library's, which may split by the shape of the batch."""
    for op in (rms_norm, fused_add_rms_norm, all_reduce_rms_norm):
        assert not op.providers["native"].batch_invariant


def test_the_mode_works_on_a_cpu() -> None:
    """The kernel refuses with a reason, PyTorch serves."""
    x = torch.randn(3, 64)
    policy = PassConfig(batch_invariant=True).policy("rms_norm")
    choice = rms_norm.choose(x, None, 1e-6, 0.0, "scale_then_round", policy=policy)
    assert choice.provider.name == torch_batch_invariant.PROVIDER
    (refusal,) = choice.refusals
    assert refusal.provider == triton_norm.PROVIDER
    assert re.search("triton cannot be used|no CUDA GPU|runs on CUDA GPUs|compute capab", refusal.reason)
    with torch.no_grad():
        want = rms_norm(x, policy=torch_batch_invariant.PROVIDER)
    assert torch.equal(rms_norm(x, policy=policy), want)


def test_gradients_flow_through_the_operator() -> None:
    """The provider computes forward, native's derivative backward."""
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, policy=torch_batch_invariant.PROVIDER), (x,))


def test_kernel_refuses_dtypes_it_does_not_have() -> None:
    """Each reason names the tensor; asked with fake tensors, as the passes do."""
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(2, 64, dtype=torch.bfloat16, device="cuda")
        double = torch.empty(2, 64, dtype=torch.float64, device="cuda")
        assert triton_norm._supports(x, x, None)
        assert "the x is torch.float64" in triton_norm._supports(double, None, None).reason
        assert "the residual is torch.float64" in triton_norm._supports(x, double, None).reason
        assert "the weight is torch.float64" in triton_norm._supports(x, None, double).reason


def test_function_says_why_it_cannot_run() -> None:
    """Bad arguments and a machine without a GPU are two errors."""
    with pytest.raises(ArgumentError, match="the weight has shape"):
        rms_norm_batch_invariant(torch.randn(2, 8), torch.randn(7))
    with pytest.raises(NoProviderError, match=r"cannot run: .+policy='torch_batch_invariant' run anywhere"):
        rms_norm_batch_invariant(torch.randn(2, 8))


def test_missing_triton_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """No import error escapes, whether or not Triton is installed here."""
    caches = (triton_norm.kernel, triton_norm._interpreted)
    monkeypatch.setitem(sys.modules, "triton", None)
    for cached in caches:
        cached.cache_clear()
    try:
        assert triton_norm.availability().reason.startswith("triton cannot be used: ModuleNotFoundError")
    finally:
        for cached in caches:
            cached.cache_clear()


def test_import_does_not_need_triton() -> None:
    """The providers register where Triton cannot be imported, and do not start it where it can."""
    code = (
        "import sys, torch\n"
        "sys.modules['triton'] = None\n"
        "from fusewire.custom_ops.providers.batch_invariant import torch_norm, triton_norm\n"
        "assert triton_norm.tl is None\n"
        "assert 'ModuleNotFoundError' in triton_norm.availability().reason\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# The fused operator


def _all_reduced_on_a_rank(dtype: torch.dtype) -> tuple[Tensor, ...]:
    rank, group = torch.distributed.get_rank(), torch.distributed.group.WORLD.group_name
    mode = {"group_name": group, "policy": PassConfig(batch_invariant=True).policy("all_reduce_rms_norm")}
    weight = rows(1, 200, torch.float32, "normal", 9)[0]
    residual = rows(300, 200, torch.float32, "normal", 8)
    x = rows(300, 200, dtype, "spread", rank)
    out: tuple[Tensor, Tensor] = all_reduce_rms_norm(x, residual, weight, 1e-6, 1.0, **mode)
    for part in (slice(0, 1), slice(7, 8), slice(299, 300), slice(3, 260), slice(0, 0)):
        alone = all_reduce_rms_norm(x[part], residual[part], weight, 1e-6, 1.0, **mode)
        assert same_bits(alone, tuple(t[part] for t in out)), part
    plain: tuple[Tensor, Tensor] = all_reduce_rms_norm(x, None, None, **mode)
    alone = all_reduce_rms_norm(x[5:6], None, None, **mode)
    assert same_bits(alone, tuple(t[5:6] for t in plain))
    assert same_bits(plain[1:], (sum_in_rank_order(x, group),))
    return (*out, *plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_all_reduce_rms_norm_is_batch_invariant(dtype: torch.dtype) -> None:
    """Three ranks: rows do not see each other, ranks agree, the sum is the one in rank order, in fp32."""
    results = run_ranks(_all_reduced_on_a_rank, 3, dtype, timeout_s=120)
    for result in results[1:]:
        assert same_bits(result, results[0])
    wide = torch.zeros(300, 200)
    for rank in range(3):
        wide = wide + rows(300, 200, dtype, "spread", rank).float()
    summed = wide.to(dtype)
    want = add_residual(summed, rows(300, 200, torch.float32, "normal", 8))
    assert same_bits((results[0][1], results[0][3]), (want, summed))
    weight = rows(1, 200, torch.float32, "normal", 9)[0]
    norm = rms_norm(want, weight, 1e-6, 1.0, policy=torch_batch_invariant.PROVIDER)
    assert same_bits((results[0][0],), (norm,))
