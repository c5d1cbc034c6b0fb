"""The fused operator end to end on GPUs: every provider through the dispatcher, and through torch.compile.

    torchrun --nproc-per-node 2 tests/gpu/provider_check.py

Results are held against a sum in rank order: the residual bit for bit (native, whose sum is NCCL's,
within rounding), the norm within one unit in the last place, and all ranks against each other bit
for bit.
"""

from __future__ import annotations

import faulthandler
import itertools
import sys
from collections import Counter

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from harness import join

import fusewire
import fusewire.errors
from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm
from fusewire.custom_ops.ops.norms import FORMS, NormSpec, normalize

EPS = 1e-5
COUNTS: Counter[str] = Counter()


def verdict(name: str, ok: bool, detail: str = "") -> None:
    """Count a case on all ranks together, and say what failed."""
    flag = torch.tensor(int(not ok), device="cuda")
    dist.all_reduce(flag)
    COUNTS["failed" if int(flag) else "passed"] += 1
    if int(flag) and dist.get_rank() == 0:
        print(f"FAIL {name} {detail}", flush=True)


def same_on_all_ranks(tensor: torch.Tensor) -> bool:
    bits = tensor.contiguous().view(torch.int16 if tensor.dtype.itemsize == 2 else torch.int32)
    high, low = bits.clone().to(torch.int32), bits.clone().to(torch.int32)
    dist.all_reduce(high, op=dist.ReduceOp.MAX)
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    return bool((high == low).all())


def exact_residual(x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    """Sum x over the ranks in their order, in fp32, and add the residual; both are rounded."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    total = sum(part.float() for part in parts).to(x.dtype)
    return total if residual is None else (total.float() + residual.float()).to(x.dtype)


def operators(policy: str, hidden: int, dtype: torch.dtype) -> None:
    """One provider over token counts, forms, residual or none, weight or none."""
    group = dist.group.WORLD.group_name
    generator = torch.Generator("cuda").manual_seed(dist.get_rank())
    shared = torch.Generator("cuda").manual_seed(99)
    for tokens, form, has_residual, has_weight in itertools.product(
        (1, 3, 17, 64, 129, 513, 2048), FORMS, (True, False), (True, False)
    ):
        if has_residual and form.startswith("wide_sum") and "flashinfer" in policy:
            continue  # it refuses these
        x = torch.randn(tokens, hidden, generator=generator, device="cuda").to(dtype)
        residual = torch.randn(tokens, hidden, generator=shared, device="cuda").to(dtype) if has_residual else None
        weight = torch.randn(hidden, generator=shared, device="cuda").to(dtype) if has_weight else None
        name = f"{policy} {tokens}x{hidden} {dtype} {form} residual={has_residual} weight={has_weight}"
        norm, summed = all_reduce_rms_norm(x, residual, weight, EPS, 1.0, form, group, policy=policy)
        exact = exact_residual(x, residual)
        if policy.endswith("native"):
            ok = torch.allclose(summed.float(), exact.float(), atol=0.1, rtol=0.02)
        else:
            ok = torch.equal(summed, exact)
        verdict(f"{name}: residual", ok)
        wanted = normalize(summed.double(), NormSpec(None if weight is None else weight.double(), EPS, 1.0, form))
        ulps = (norm.double() - wanted).abs() / (wanted.abs() * torch.finfo(dtype).eps + 1e-6)
        verdict(f"{name}: norm", float(ulps.max()) < 3, f"{float(ulps.max()):.2f} ulps")
        verdict(f"{name}: ranks", same_on_all_ranks(norm) and same_on_all_ranks(summed))


class Block(torch.nn.Module):
    """Two layers as a tensor-parallel decoder has them."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        options = {"device": "cuda", "dtype": torch.bfloat16}
        self.mix = torch.nn.ModuleList(torch.nn.Linear(hidden, hidden, bias=False, **options) for _ in range(2))
        self.norms = torch.nn.ParameterList(torch.ones(hidden, **options) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residual = x
        for mix, weight in zip(self.mix, self.norms, strict=True):
            reduced = functional.all_reduce(mix(x), "sum", dist.group.WORLD)
            residual = residual + reduced
            wide = residual.float()
            x = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)
        return x


def compiled(options: dict[str, object]) -> None:
    """The block through torch.compile, with fresh inputs each time, against eager."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    block = Block(1024)
    fusewire.clear_report()
    run = torch.compile(block, backend="fusewire", options={"expect_fused": "all", **options})
    shared = torch.Generator("cuda").manual_seed(5)
    with torch.no_grad():
        for step in range(5):
            x = torch.randn(8, 1024, generator=shared, device="cuda", dtype=torch.bfloat16)
            got, want = run(x).float().clone(), block(x).float()
            error = float((got - want).norm() / want.norm())
            verdict(f"compiled {options} step {step}", error < 0.02, f"relative error {error:.4f}")
    providers = {entry.provider for entry in fusewire.report().entries}
    verdict(f"compiled {options}: provider", bool(providers) and "native" not in providers, str(providers))


def main() -> int:
    faulthandler.dump_traceback_later(150, exit=True)  # never hang: say where, and end
    join(120)
    for policy in ("symm_mem", "flashinfer", "symm_mem,flashinfer,native", "native"):
        for hidden, dtype in ((4096, torch.bfloat16), (2880, torch.float16)):
            try:
                operators(policy, hidden, dtype)
            except fusewire.errors.NoProviderError as error:
                if dist.get_rank() == 0:
                    print(f"SKIP {policy} hidden {hidden}: {error}", flush=True)
    compiled({})
    compiled({"triton.cudagraphs": True})
    compiled({"ir_op_priority": {"all_reduce_rms_norm": ("symm_mem", "native")}, "triton.cudagraphs": True})
    if dist.get_rank() == 0:
        for info in fusewire.workspaces():
            print(info)
        print(f"{dist.get_world_size()} GPUs: {dict(COUNTS)}", flush=True)
    fusewire.close(captured=True)
    dist.destroy_process_group()
    return 1 if COUNTS["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
