"""vLLM's FP8 operators on a GPU, against the norm and the quantisation that fusewire has for each.

    PYTHONPATH=tests python tests/gpu/vllm_operators_check.py              # one GPU; vLLM installed
    PYTHONPATH=tests python tests/gpu/vllm_operators_check.py --library FILE   # of vLLM's operators

Operators that only quantise must give the same bytes and scales. Those that join a norm to it add
the squares in an order of their own, which turns a rounding of a few numbers: the residual must be
equal, scales within 1%, and at most one in 250 FP8 numbers may differ, by one step. The form of
their norm is found by trying the operator, as while a graph is compiled. Prints a line for each
case; exits with 1 if one failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import sys
from pathlib import Path

import torch

from fusewire.custom_ops.ops.norms import NormSpec, add_normalize
from fusewire.custom_ops.ops.quantization import quantize
from fusewire.fusion_passes.analysis.norm_quant_forms import form_of
from fusewire.patterns.quantizations import NORM_QUANT_OPS

FP8, DTYPES = torch.float8_e4m3fn, (torch.bfloat16, torch.float16)
SHAPES = ((1, 4096), (16, 4096), (200, 4096), (64, 1536), (7, 7168))
EPS = 1e-6
TOKEN = f"token scale_floor={1.0 / (448.0 * 512.0)}"
QUANTS = {  # as the passes read them; tests/unit/test_vllm_norm_quantization.py holds them to it
    "static_scaled_fp8_quant": "tensor apply=reciprocal",
    "dynamic_per_token_scaled_fp8_quant": TOKEN,
    "per_token_group_fp8_quant": "group amax_floor=1e-10",
    "rms_norm_static_fp8_quant": "tensor apply=reciprocal",
    "fused_add_rms_norm_static_fp8_quant": "tensor apply=reciprocal",
    "rms_norm_dynamic_per_token_quant": TOKEN,
    "rms_norm_per_block_quant": "group amax_floor=0.001953125",
}


def load(library: str | None) -> list[str]:
    """Load vLLM's operators; return the files."""
    if library is None:
        spec = importlib.util.find_spec("vllm")
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit("vLLM is not installed; install it, or name its library of operators with --library")
        (folder,) = spec.submodule_search_locations
        found = [str(path) for path in Path(folder).glob("_C*.abi3.so")]
    else:
        found = [library]
    for path in found:
        torch.ops.load_library(path)
    return found


def cases(tokens: int, hidden: int, dtype: torch.dtype):
    """Yield (operator, label, function that makes its arguments, by name)."""
    generator = torch.Generator("cuda").manual_seed(tokens + hidden)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    # A factor for each row, so that scales differ; rows of zeros where there are several.
    x = (random(tokens, hidden) * random(tokens, 1).exp()).to(dtype)
    if tokens > 8:
        x[3] = 0
    r, w = random(tokens, hidden).to(dtype), (random(hidden) * 0.1 + 1).to(dtype)
    scale = torch.tensor([0.0123], device="cuda")
    bound = torch.tensor(1.5, device="cuda")

    def empty(*shape: int, like: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=like, device="cuda")

    def q() -> torch.Tensor:
        return empty(tokens, hidden, like=FP8)

    groups = hidden // 128
    yield "static_scaled_fp8_quant", "", lambda: {"result": q(), "input": x, "scale": scale}
    for ub in (None, bound):
        yield (
            "dynamic_per_token_scaled_fp8_quant",
            f"bound {ub is not None}",
            lambda ub=ub: {"result": q(), "input": x, "scale": empty(tokens, 1), "scale_ub": ub},
        )
    yield (
        "per_token_group_fp8_quant",
        "",
        lambda: {
            "input": x,
            "output_q": q(),
            "output_s": empty(tokens, groups),
            "group_size": 128,
            "eps": 1e-10,
            "fp8_min": -448.0,
            "fp8_max": 448.0,
            "scale_ue8m0": False,
            "dummy_is_scale_transposed": False,
            "dummy_is_tma_aligned": False,  # not in every version
        },
    )
    norm = {"input": x, "weight": w, "epsilon": EPS}
    yield "rms_norm_static_fp8_quant", "", lambda: {"result": q(), "scale": scale, **norm}
    yield (
        "fused_add_rms_norm_static_fp8_quant",
        "",
        lambda: {"result": q(), "scale": scale, "residual": r.clone(), **norm},
    )
    for ub, residual in itertools.product((None, bound), (None, r)):
        label = f"bound {ub is not None}, residual {residual is not None}"
        more = {"scale_ub": ub, "residual": residual}
        yield (
            "rms_norm_dynamic_per_token_quant",
            label,
            lambda more=more: {"result": q(), "scale": empty(tokens, 1), **norm, **fresh(more)},
        )
        if ub is None:
            yield (
                "rms_norm_per_block_quant",
                label,
                lambda more=more: {
                    "result": q(),
                    "scale": empty(tokens, groups),
                    **norm,
                    **fresh(more),
                    "group_size": 128,
                    "is_scale_transposed": False,
                },
            )


def fresh(arguments: dict) -> dict:
    """Return arguments whose residual is a copy, since the operator writes it."""
    return {**arguments, "residual": None if arguments["residual"] is None else arguments["residual"].clone()}


def steps(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """How many FP8 steps lie between numbers: their bytes count up from 0 on either side."""
    whole = [t.view(torch.uint8).to(torch.int32) for t in (a, b)]
    signed = [torch.where(t > 127, 128 - t, t) for t in whole]
    return (signed[0] - signed[1]).abs()


def form_and_refusal(name: str, residual: torch.Tensor | None) -> tuple[str, str]:
    """Return the form of an operator's norm, as the passes find it."""
    entry = NORM_QUANT_OPS[f"_C::{name}"]
    op, quant = (getattr(torch.ops._C, each.removeprefix("_C::")).default for each in (name, entry.quant))
    return form_of(op, quant, entry, residual is not None, "cuda")


def compare(name: str, make) -> dict:
    """Call vLLM's operator and fusewire's definitions; return what differs, and "problem"."""
    got, given, found = make(), make(), {}
    joined, norm, summed = "rms_norm" in name, given["input"], None
    if joined:
        found["form"], refusal = form_and_refusal(name, given.get("residual"))
        if refusal:
            return {"problem": f"FAIL {refusal}"}
        spec = NormSpec(given["weight"], given["epsilon"], 0.0, found["form"])
        norm, summed = add_normalize(norm, given.get("residual"), spec)
    static = "static" in name
    wanted, scales = quantize(norm, given["scale"] if static else given.get("scale_ub"), QUANTS[name])
    op = getattr(torch.ops._C, name)
    known = {argument.name for argument in op.default._schema.arguments}
    op(**{key: value for key, value in got.items() if key in known})
    apart = steps(got["output_q" if "output_q" in got else "result"], wanted)
    found |= {"numbers": apart.numel(), "differ": int((apart > 0).sum()), "steps": int(apart.max())}
    if not static:
        scale = got["output_s" if "output_s" in got else "scale"]
        found["scales"] = float(((scale - scales).abs() / scales).max())
    residual = got.get("residual")
    if residual is not None:
        found["residual"] = int((residual != summed).sum())
    few = found["steps"] <= 1 and found["differ"] * 250 <= found["numbers"] and found.get("scales", 0.0) < 0.01
    fine = few if joined else not found["differ"] and not found.get("scales")
    return {**found, "problem": "" if fine and not found.get("residual") else "FAIL"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", help="file with vLLM's operators, if vLLM is not installed")
    libraries = load(parser.parse_args().library)
    failed, made, missing = 0, 0, set()
    for dtype, (tokens, hidden) in itertools.product(DTYPES, SHAPES):
        for name, label, make in cases(tokens, hidden, dtype):
            if not hasattr(torch.ops._C, name):
                missing.add(name)
                continue
            try:
                outcome = compare(name, make)
            except (RuntimeError, TypeError) as error:
                outcome = {"problem": f"FAIL {str(error)[:300]}"}
            made, failed = made + 1, failed + bool(outcome["problem"])
            print(json.dumps({"op": name, "case": label, "dtype": str(dtype), "shape": (tokens, hidden), **outcome}))
            sys.stdout.flush()
    for name in sorted(missing):
        print(f"this vLLM has no {name}")
    print(json.dumps({"cases": made, "failed": failed, "files": [Path(each).name for each in libraries]}))
    return int(failed > 0 or not made)


if __name__ == "__main__":
    sys.exit(main())
