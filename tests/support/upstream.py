"""The cases of FlashInfer's tests of its fused all-reduce, for fusewire's operators.

Shapes, dtypes, epsilons and tolerances are those of FlashInfer's tests/comm/ (August 2026):
test_gemma_ar_fusion, test_trtllm_allreduce_dynamic_fp8_quant and
test_trtllm_allreduce_fusion_group_fp8_quant. Each function is called on every rank of a group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm, sum_in_rank_order
from fusewire.custom_ops.ops.norms import SCALE_THEN_ROUND, WIDE_SUM_SCALE_THEN_ROUND, fused_add_rms_norm
from fusewire.custom_ops.ops.quantization import FP8_MAX
from fusewire.custom_ops.ops.quantized_norm import all_reduce_rms_norm_quantized

# (tokens, hidden, dtype) of the dynamic FP8 test on 2 ranks, and on 4.
DYNAMIC = {
    2: (
        (1, 4096, torch.bfloat16),
        (16, 4096, torch.bfloat16),
        (128, 8192, torch.float16),
        (1024, 4096, torch.float16),
    ),
    4: ((16, 4096, torch.bfloat16),),
}
# (hidden, tokens) of the test of groups, as far as the groups have 128 values.
GROUPS = (
    *((7168, tokens) for tokens in (1, 3, 4, 64, 127, 512)),
    *((768, tokens) for tokens in (1, 3, 4)),
    *((640, tokens) for tokens in (3, 4, 253)),
    *((hidden, tokens) for hidden in (384, 256) for tokens in (1, 4)),
)
_FLOOR = 2.0**-9 / FP8_MAX


@dataclass(frozen=True)
class Place:
    """Where the cases run.

    Attributes:
        device: "cpu" or "cuda".
        policy: the providers that may serve; "" for the process's own.
        own: whether each rank has its own residual and weight, as in FlashInfer's tests. Kernels
            of fusewire need equal ones.
    """

    device: str = "cpu"
    policy: str = "native"
    own: bool = True


def _inputs(place: Place, tokens: int, hidden: int, dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, ...]:
    """Return x, which differs between the ranks, a residual and a weight."""
    rank = dist.get_rank()
    own = torch.Generator().manual_seed(1234 + rank)
    other = own if place.own else torch.Generator().manual_seed(99)
    x = torch.randn(tokens, hidden, generator=own) * scale
    residual = torch.randn(tokens, hidden, generator=other) * scale
    weight = torch.randn(hidden, generator=other)
    return tuple(tensor.to(dtype).to(place.device) for tensor in (x, residual, weight))


def _reduced(place: Place, x: Tensor) -> Tensor:
    """Return the sum over the ranks as the providers of a place round it."""
    if place.policy != "native":  # on the CPU, since gloo gathers no GPU tensors
        return sum_in_rank_order(x.cpu(), dist.group.WORLD.group_name).to(x.device)
    total = x.clone()
    dist.all_reduce(total)
    return total


def _differing(one: Tensor, other: Tensor) -> int:
    return int((one.float() != other.float()).sum())


def gemma(place: Place) -> dict[str, list[int]]:
    """Run the Gemma worker: 8 tokens of 2048, bf16, weight_bias 1.

    Returns:
        By form, how many values differ in the residual and the norm from the sum and its norm in
        fp32, rounded once, and in the norm from the operator without an all-reduce.
    """
    group = dist.group.WORLD.group_name
    x, residual, weight = _inputs(place, 8, 2048, torch.bfloat16)
    reduced = _reduced(place, x)
    wide = reduced.float() + residual.float()
    norm = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + weight.float())
    differ = {}
    for form in (SCALE_THEN_ROUND, WIDE_SUM_SCALE_THEN_ROUND):
        if form != SCALE_THEN_ROUND and "flashinfer" in place.policy:
            continue  # it refuses that form
        options = weight, 1e-6, 1.0, form
        got, summed = all_reduce_rms_norm(x, residual, *options, group, policy=place.policy)
        alone, _ = fused_add_rms_norm(reduced, residual, *options)
        pairs = ((summed, wide.bfloat16()), (got, norm.bfloat16()), (got, alone))
        for one, other in pairs:
            torch.testing.assert_close(one.float(), other.float(), atol=2e-2, rtol=1e-2)
        differ[form] = [_differing(*pair) for pair in pairs]
    return differ


def dynamic_fp8(place: Place) -> Iterator[tuple[str, list[int]]]:
    """Run the cases of FP8 with a scale for each token.

    FlashInfer allows 5% in a dequantised value, less than one step of FP8, so a norm that differs
    in its last bit may exceed it. Without a residual the norm is there too, and the FP8 values must
    be exactly its own.

    Yields:
        The case; how many values differ from PyTorch's in the residual (or without one the norm),
        the scales and the FP8 values; and how many dequantised values differ by more than 5%.
    """
    group = dist.group.WORLD.group_name
    quant = f"token scale_floor={_FLOOR}"
    for tokens, hidden, dtype in DYNAMIC[dist.get_world_size()]:
        x, residual, weight = _inputs(place, tokens, hidden, dtype)
        reduced = _reduced(place, x)
        for added in (residual, None):
            norm, summed, quantized, scale = all_reduce_rms_norm_quantized(
                x, added, weight, 1e-6, quant=quant, with_norm=added is None, group_name=group, policy=place.policy
            )
            total = reduced if added is None else reduced + added
            wanted = torch.nn.functional.rms_norm(total, (hidden,), weight, 1e-6)
            pair = (norm, wanted) if added is None else (summed, total)
            torch.testing.assert_close(*(tensor.float() for tensor in pair), atol=8e-1, rtol=1e-2)
            if added is None:
                assert _differing(quantized, _by_tokens(norm)[0]) == 0
            rounded, scales = _by_tokens(wanted)
            torch.testing.assert_close(scale, scales, atol=1e-3, rtol=1e-3)
            values, limit = rounded.float() * scales, float(scales.max()) * 0.05
            far = (quantized.float() * scale - values).abs() > limit + 0.05 * values.abs()
            pairs = (pair, (scale, scales), (quantized, rounded))
            name = f"{tokens}x{hidden} {dtype} {'without' if added is None else 'with'} a residual"
            yield name, [*(_differing(*pair) for pair in pairs), int(far.sum())]


def _by_tokens(norm: Tensor) -> tuple[Tensor, Tensor]:
    """Return a norm in FP8 and its scales, one for each token, in PyTorch."""
    # By a tensor: on GPUs PyTorch multiplies by the reciprocal of a number.
    limit = torch.full((), FP8_MAX, device=norm.device)
    scales = (norm.float().abs().amax(-1, keepdim=True) / limit).clamp(min=_FLOOR)
    return (norm.float() / scales).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scales


def group_fp8(place: Place, dtype: torch.dtype) -> int:
    """Run the cases of FP8 with a power of two for each 128 values; return how many there are.

    Values and scales must be exactly those of quantising the operator's own norm. FlashInfer's
    operator packs the exponents of four scales into an int32; fusewire's returns fp32.
    """
    group = dist.group.WORLD.group_name
    for hidden, tokens in GROUPS:
        x, residual, weight = _inputs(place, tokens, hidden, dtype, 8.0)
        norm, _, quantized, scale = all_reduce_rms_norm_quantized(
            x,
            residual,
            weight,
            1e-5,
            quant="group scale_floor=1e-10 power_of_two=True",
            group_name=group,
            policy=place.policy,
        )
        groups = norm.float().view(tokens, -1, 128)
        amax = groups.abs().amax(-1) / torch.full((), FP8_MAX, device=norm.device)
        scales = torch.exp2(torch.ceil(torch.log2(amax.clamp(min=1e-10))))
        wanted = (groups / scales[..., None]).clamp(-FP8_MAX, FP8_MAX).view(norm.shape).to(quantized.dtype)
        assert torch.equal(scale, scales), (hidden, tokens)
        assert torch.equal(quantized.view(torch.uint8), wanted.view(torch.uint8)), (hidden, tokens)
    return len(GROUPS)
