"""Time `symm_mem` with FP8 results against its bf16 kernels followed by a quantisation.

    torchrun --nproc-per-node 2 examples/benchmarks/quantized_norm.py
    torchrun --nproc-per-node 2 examples/benchmarks/quantized_norm.py --hidden 4096 --tokens 1 64

For each quantisation and number of tokens, side by side: the bf16 kernel alone, the bf16 kernel and
then a quantisation that Inductor has fused, and the kernel that quantises. Up to 128 tokens the
one-shot, above the two-shots with the residual replicated and sharded, results in place. All calls
are replayed from CUDA graphs; the times are medians in microseconds, of the slowest rank. FP8
results are first compared, bit for bit, with native's quantisation of the norm of the bf16 kernel.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

# A failure of NVLink multicast can take a machine's GPUs out of service.
os.environ["NCCL_NVLS_ENABLE"] = "0"
os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"

import torch
import torch.distributed as dist
from torch import Tensor

from fusewire.custom_ops.ops.norms import SCALE_THEN_ROUND, NormSpec
from fusewire.custom_ops.ops.quantization import quantize
from fusewire.custom_ops.ops.sharded_norm import own_rows
from fusewire.custom_ops.providers.symm_mem import launcher
from fusewire.custom_ops.providers.symm_mem.arguments import Quantization
from fusewire.custom_ops.providers.symm_mem.prepared_launch import PreparedCall
from fusewire.custom_ops.providers.symm_mem.workspace import SymmMemWorkspace
from fusewire.custom_ops.tuning.timers import EPS, GpuTimer, Inputs, draw

ONE_SHOT_TOKENS, DATA_TOKENS = 128, 512
QUANTS = {
    "token": ("token scale_floor=4.359654017857143e-06", None),
    "group": ("group amax_floor=1e-10", None),
    "tensor": ("tensor apply=reciprocal", 0.0123),
}
KINDS = {"one_shot": "one-shot", "two_shot": "two-shot", "two_shot_sharded": "sharded residual"}
Call = Callable[[int], Any]


class Bench:
    """A workspace and the calls on it, for one number of tokens and one quantisation."""

    def __init__(self, ws: SymmMemWorkspace, timer: GpuTimer, tokens: int, quant: str) -> None:
        self.ws, self.timer, self.tokens = ws, timer, tokens
        nbytes = tokens * ws.hidden * ws.dtype.itemsize
        self.calls = timer.calls(nbytes)
        self.inputs = draw(ws.rank, tokens, ws.hidden, ws.dtype, ws.device, timer.sets(nbytes))
        text, scale = QUANTS[quant]
        self.scale = None if scale is None else torch.tensor([scale], device=ws.device)
        self.quantization = Quantization(text, self.scale, with_norm=False)
        torch._dynamo.reset()  # else later sizes would exceed the limit of recompilations, and run eagerly
        self.compiled = torch.compile(lambda norm: quantize(norm, self.scale, text), dynamic=False)

    def residuals(self, kind: str) -> list[Tensor]:
        found = [one.residual for one in self.inputs]
        return [own_rows(r, self.ws.rank, self.ws.world_size) for r in found] if kind == "two_shot_sharded" else found

    def call(self, kind: str, *quantization: Quantization) -> Call:
        """Return a call on set i, with results in two buffers by turns where the kernel can."""
        outputs = (None, None) if kind == "one_shot" else (0, 1)
        make = getattr(launcher, f"{kind}_launch")
        calls = [PreparedCall(self.ws, make, output) for output in outputs]
        residuals = self.residuals(kind)

        def at(i: int) -> Any:
            i %= len(self.inputs)
            x, _, weight = self.inputs[i]
            return calls[i % 2](x, residuals[i], NormSpec(weight, EPS, 0.0, SCALE_THEN_ROUND), None, *quantization)

        return at

    def problem(self, kind: str) -> str:
        """Compare with the same protocol's norm, quantised by native. A collective."""
        one: Inputs = self.inputs[0]
        args = (one.x, self.residuals(kind)[0], NormSpec(one.weight, EPS, 0.0, SCALE_THEN_ROUND))
        options = {} if kind == "one_shot" else {"protocol": "flags"}
        norm, *_ = getattr(launcher, kind)(self.ws, *args, **options)
        wanted, wanted_scales = quantize(norm, self.scale, self.quantization.quant)
        _, _, got, scales = self.call(kind, self.quantization)(0)
        self.ws.check(synchronize=True)
        wrong = int((got.view(torch.uint8) != wanted.view(torch.uint8)).sum())
        wrong += 0 if scales is None else int((scales != wanted_scales).sum())
        return f"{wrong} numbers are not native's" if wrong else ""

    def time(self, call: Call) -> float:
        """Return microseconds per call on the slowest rank. A collective."""
        dist.barrier()
        found = torch.tensor(self.timer.time(call, self.calls), device=self.ws.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return float(found)

    def measure(self, kind: str) -> tuple[float, float, float]:
        """Return the times of the bf16 kernel, of it with a quantisation, and of the FP8 kernel."""
        plain, quantizing = self.call(kind), self.call(kind, self.quantization)

        def both(i: int) -> Any:
            return self.compiled(plain(i)[0])

        return self.time(plain), self.time(both), self.time(quantizing)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=8192)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 64, 128, 512, 2048, 4096, 8192])
    parser.add_argument("--quant", choices=QUANTS, nargs="+", default=list(QUANTS))
    options = parser.parse_args()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    sizes = {"one_shot_tokens": ONE_SHOT_TOKENS, "data_tokens": DATA_TOKENS, "outputs": 2}
    ws = SymmMemWorkspace(dist.group.WORLD.group_name, options.hidden, torch.bfloat16, max(options.tokens), **sizes)
    timer, failed = GpuTimer(device), False
    say = print if ws.rank == 0 else lambda *_, **__: None
    say(
        f"{ws.world_size} x {torch.cuda.get_device_name(device)}, hidden {options.hidden}, bf16; us, medians of replays"
    )
    say("quantisation | kernel | tokens | bf16 | bf16, then FP8 | FP8 | FP8 / bf16 | FP8 / bf16, then FP8")
    for quant in options.quant:
        for tokens in options.tokens:
            bench = Bench(ws, timer, tokens, quant)
            for kind, name in KINDS.items():
                if (kind == "one_shot") != (tokens <= ONE_SHOT_TOKENS):
                    continue
                problem = bench.problem(kind)
                failed |= bool(problem)
                plain, both, fp8 = bench.measure(kind)
                row = (quant, name, tokens, f"{plain:.1f}", f"{both:.1f}", f"{fp8:.1f}")
                say(*row, f"{fp8 / plain:.3f}", f"{fp8 / both:.3f}", problem, sep=" | ", flush=True)
            del bench
    ws.close()
    dist.destroy_process_group()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
