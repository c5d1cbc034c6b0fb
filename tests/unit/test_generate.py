"""transformers' generate(): prefill and decode, with static and dynamic caches, compiled by
"inductor" and by "fusewire".

Of each pair the tokens must be the same and the logits equal bit for bit (bf16,
`emulate_precision_casts`; native sums with the group's own all-reduce) or, where merged all-reduces
move a rounding, close; every all-reduce that may fuse must be fused in every graph; and "fusewire"
must compile exactly as often as "inductor" does: at the first call, at one of other lengths, and,
not at all, when the first lengths come again.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config

import fusewire

from support.compiles import WITHOUT_CODE
from support.distributed import shared_pool
from support.zoo import MODELS

BATCH = 2
CALLS = ((8, 5), (11, 4), (8, 5))  # (tokens of the prompt, tokens to generate)
GREEDY = {"do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True, "output_logits": True}
TIMEOUT_S = 570


def _settings(model, way, backend):
    """Compile the model the `way` users do; the arguments of generate() that belong to it."""
    from transformers import CompileConfig

    if way.startswith("auto"):
        # What transformers does by itself on a GPU with a static cache: decode is compiled, prefill
        # is not.
        compiling = CompileConfig(backend=backend)
        compiling._compile_all_devices = True
        return {"cache_implementation": "static", "compile_config": compiling}
    if way.endswith("forward"):
        model.forward = torch.compile(model.forward, backend=backend)
    elif way.endswith("module"):
        model.compile(backend=backend)
    cache = {} if way.startswith("dynamic") else {"cache_implementation": "static"}
    return {**cache, "disable_compile": True}


def _generate(name, way, backend, code):
    """Return (tokens, logits) of each call, and what had been compiled after each: graphs, and
    frames that Dynamo looked at."""
    torch._dynamo.reset()
    counters.clear()
    fusewire.clear_report()
    spec = MODELS[name]
    model = spec.build(torch.bfloat16)
    enabled = fusewire.enable() if way == "auto enabled" and backend == "fusewire" else contextlib.nullcontext()
    chosen = "inductor" if way == "auto enabled" and backend == "fusewire" else backend
    settings = _settings(model, "eager" if backend == "eager" else way, chosen)
    results, compiled = [], []
    options = {"emulate_precision_casts": True, "fx_graph_cache": False, **({} if code else WITHOUT_CODE)}
    with enabled, inductor_config.patch(options):
        for tokens, new in CALLS:
            made = model.generate(
                spec.inputs(BATCH, tokens), max_new_tokens=new, min_new_tokens=new, **GREEDY, **settings
            )
            results.append((made.sequences, torch.stack(made.logits)))
            compiled.append((counters["stats"]["unique_graphs"], counters["frames"]["total"]))
    return results, compiled


def _difference(one, other):
    """The largest difference of logits; None if a token differs."""
    if not all(torch.equal(a, b) for (a, _), (b, _) in zip(one, other, strict=True)):
        return None
    return max(float((a.float() - b.float()).abs().max()) for (_, a), (_, b) in zip(one, other, strict=True))


def compare(name, way, with_eager, code):
    """On each rank: differences from inductor's and (or 0) eager's results, how often each
    compiled, and the report.
    """
    plain, plain_compiled = _generate(name, way, "inductor", code)
    fused, fused_compiled = _generate(name, way, "fusewire", code)
    report = fusewire.report()
    refused = [f"{entry.module}: {entry.reason}" for entry in report.entries if entry.status != "fused"]
    counts = (len(report.graphs), report.found, report.fused)
    breaks = dict(counters["graph_break"])
    from_eager = _difference(_generate(name, way, "eager", code)[0], fused) if with_eager else 0.0
    return _difference(plain, fused), from_eager, plain_compiled, fused_compiled, counts, refused, breaks


def check(name, way, with_eager=False, code=True):
    spec = MODELS[name]
    if spec.skip_reason or not spec.counted:
        pytest.skip(spec.skip_reason or "the zoo's numbers are of another version of transformers")
    for answer in shared_pool(2).run(compare, name, way, with_eager, code, timeout_s=TIMEOUT_S):
        from_inductor, from_eager, plain_compiled, fused_compiled, (graphs, found, fused), refused, breaks = answer
        assert from_inductor is not None, "a token differs"
        assert from_inductor <= (0.05 if spec.merges else 0.0)
        assert from_eager == 0.0
        assert not breaks
        assert fused_compiled == plain_compiled
        assert fused_compiled[0][0] >= 1
        assert fused_compiled[2] == fused_compiled[1]
        assert graphs == fused_compiled[-1][0]
        assert (found, fused) == (spec.all_reduces * graphs, spec.fusible * graphs), refused


def test_decode_as_transformers_compiles_it_itself():
    check("llama", "auto", with_eager=True, code=False)


@pytest.mark.nightly
@pytest.mark.parametrize("way", ["auto", "auto enabled", "static forward", "dynamic forward", "dynamic module"])
def test_every_way_to_compile(way):
    check("llama", way, with_eager=way == "auto")


@pytest.mark.nightly
@pytest.mark.parametrize("way", ["auto", "dynamic forward"])
@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gemma3", "qwen3_moe", "deepseek_v3"])
def test_other_models(name, way):
    check(name, way, with_eager=way == "auto" and name in ("qwen3", "qwen3_moe"))
