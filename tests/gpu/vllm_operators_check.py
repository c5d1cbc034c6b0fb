"""vLLM's FP8 operators for GPUs against the ones of tests/support/vllm_quantizers.py, which CPU
tests use in their place.

    PYTHONPATH=tests python tests/gpu/vllm_operators_check.py              # one GPU; vLLM installed
    PYTHONPATH=tests python tests/gpu/vllm_operators_check.py --library FILE   # of vLLM's operators

Operators that only quantise must give the same bytes and scales. Those that join a norm to it add
the squares in an order of their own, so that a few numbers of the norm differ by one rounding: the
residual must be equal, scales within 1%, and at most one in 200 FP8 numbers may differ, by one step.
Prints a line for each case; exits with 1 if one failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import sys
from pathlib import Path

import torch

from support import vllm_quantizers as written

FP8, DTYPES = torch.float8_e4m3fn, (torch.bfloat16, torch.float16)
SHAPES = ((1, 4096), (16, 4096), (200, 4096), (64, 1536), (7, 7168))
FUNCTIONS = {schema.partition("(")[0]: function for schema, function in written._OPERATORS}
EPS = 1e-6


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
    """Yield (operator, label, function that makes its arguments and names of those it writes)."""
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
    yield "dynamic_scaled_fp8_quant", "", lambda: {"result": q(), "input": x, "scale": empty(1)}
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


def compare(name: str, make) -> dict:
    """Call vLLM's operator and the one written for the tests; return what differs, and "problem"."""
    got, wanted = make(), make()
    op = getattr(torch.ops._C, name)
    known = {argument.name for argument in op.default._schema.arguments}
    op(**{key: value for key, value in got.items() if key in known})
    FUNCTIONS[name](**wanted)
    quantized, joined = ("output_q" if "output_q" in got else "result"), "rms_norm" in name
    apart, scale = steps(got[quantized], wanted[quantized]), "output_s" if "output_s" in got else "scale"
    found = {"numbers": apart.numel(), "differ": int((apart > 0).sum()), "steps": int(apart.max())}
    off = (got[scale] - wanted[scale]).abs() / wanted[scale].abs()
    found["scales"] = float(off.max())
    residual = got.get("residual")
    found["residual"] = 0 if residual is None else int((residual != wanted["residual"]).sum())
    few = found["steps"] <= 1 and found["differ"] * 200 <= found["numbers"] and found["scales"] < 0.01
    fine = few if joined else not found["differ"] and not found["scales"]
    return {**found, "problem": "" if fine and not found["residual"] else "FAIL"}


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
