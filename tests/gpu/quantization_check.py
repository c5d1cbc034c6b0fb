"""Quantisations to FP8 on one GPU: what programs write, and the operator that replaces it.

    PYTHONPATH=tests python tests/gpu/quantization_check.py  # one GPU, two minutes

Each spelling of tests/support/quantizers.py runs behind an all-reduce that changes nothing:

- eager: the rewritten graph, with native's operator called, must have the bits of the graph whose
  quantisation is left as the program has it;
- compiled by Inductor: how many values differ between the two, and from eager execution, is printed
  only. Inductor does not round between the operations that it joins, and joins other ones in each.

Exits with 1 if a case failed.
"""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed._functional_collectives as functional

import fusewire

from support.distributed import fake_group
from support.graphs import capture
from support.quantizers import READ, inputs

NATIVE = {"ir_op_priority": {"all_reduce_rms_norm": ("native",)}}  # the fake group cannot vote on others
SHAPES = ((64, 4096), (3, 7, 256))


def program(group, quantizer):
    def run(x, r, w, s):
        y = functional.wait_tensor(functional.all_reduce(x, "sum", group)) + r
        wide = y.float()
        n = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * w
        return quantizer(n, s), y

    return run


def differences(got, wanted) -> list[int]:
    """How many values differ in each tensor of two results; NaN equals NaN."""
    pairs = zip(torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(wanted), strict=True)
    return [int((~torch.isclose(a.float(), b.float(), 0, 0, equal_nan=True)).sum()) for a, b in pairs]


def main() -> int:
    failed = 0
    with fake_group(2) as group, torch.no_grad():
        for name, (quantizer, _) in READ.items():
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                for shape in SHAPES if "vLLM group" not in name else SHAPES[:1]:
                    given = [tensor.cuda() for tensor in inputs(*shape, dtype=dtype)]
                    model = program(group, quantizer)
                    wanted = model(*given)
                    captured = capture(model, *given, inline_native=False, **NATIVE)
                    unfused = capture(model, *given, inline_native=False, fuse_quantization=False, **NATIVE)
                    fused = [n.args[11] for n in captured.graph.nodes if "rms_norm_quantized" in str(n.target)]
                    found = {"eager": differences(captured.result, unfused.result)}
                    if shape == SHAPES[0] and dtype is torch.bfloat16:
                        compiled = []
                        for on in (True, False):
                            torch._dynamo.reset()
                            options = {"fuse_quantization": on, **NATIVE}
                            with fusewire.enable(**options):
                                compiled.append(torch.compile(model)(*given))
                        found["compiled, fused or not"] = differences(*compiled)
                        found["compiled and eager"] = differences(compiled[1], wanted)
                    failed += any(found["eager"]) or len(fused) != 1
                    print(json.dumps({"case": name, "dtype": str(dtype), "shape": shape, "quant": fused, **found}))
                    sys.stdout.flush()
    print(json.dumps({"failed": failed, "torch": torch.__version__, "fusewire": fusewire.__version__}))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
