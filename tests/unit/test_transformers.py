"""What docs/transformers.md says of continuous batching and of accelerate.

Of generate(), tests/unit/test_generate.py holds it.
"""

from __future__ import annotations

import pytest
import torch
from torch._inductor import config as inductor_config

import fusewire

from support.compiles import WITHOUT_CODE
from support.distributed import shared_pool
from support.rank_programs import environment
from support.zoo import MODELS

PROMPTS = [list(range(10)), list(range(20, 36))]


def job_batches(nested):
    """The tokens without a compiler and with fusewire, and the counts of all-reduces."""
    from transformers import CompileConfig, ContinuousBatchingConfig, GenerationConfig

    model = MODELS["llama"].build(torch.float32)
    wanted = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    made = []
    with torch._dynamo.config.patch(nested_graph_breaks=nested), inductor_config.patch(WITHOUT_CODE), torch.no_grad():
        for compiling in (None, CompileConfig(backend="fusewire", mode="default", dynamic=True)):
            batching = ContinuousBatchingConfig(
                num_blocks=8, page_size=32, max_batch_tokens=64, varlen_compile_config=compiling
            )
            found = model.generate_batch(
                inputs=PROMPTS, generation_config=wanted, progress_bar=False, continuous_batching_config=batching
            )
            made.append([found[name].generated_tokens for name in sorted(found)])
    reasons = {entry.reason for entry in fusewire.report().entries if entry.status != "fused"}
    return made, fusewire.report().fused, reasons


@pytest.mark.nightly
@pytest.mark.parametrize(("nested", "fused"), [(False, 0), (True, 1)])
def test_continuous_batching_breaks_the_graph_in_each_layer(nested, fused):
    pytest.importorskip("transformers", minversion="5.24", reason="earlier ones were not tried")
    for (plain, compiled), count, reasons in shared_pool(2).run(job_batches, nested):
        assert plain == compiled
        assert count == fused
        assert any("the norm lies beyond a graph break" in reason for reason in reasons)


def test_accelerate_takes_listed_backends_only():
    utils = pytest.importorskip("accelerate.utils")
    with pytest.raises(ValueError, match="not a valid DynamoBackend"):
        utils.TorchDynamoPlugin(backend="fusewire")


def job_accelerate():
    from accelerate import Accelerator

    spec = MODELS["llama"]
    model = spec.build(torch.float32)
    address = environment(MASTER_ADDR="localhost", MASTER_PORT="29500")  # it asks, and uses the group that exists
    with address, fusewire.enable(), inductor_config.patch(WITHOUT_CODE), torch.no_grad():
        compiled = Accelerator(cpu=True, dynamo_backend="inductor").prepare_model(model, evaluation_mode=True)
        compiled(spec.inputs(1, 8))
    return fusewire.report().found, fusewire.report().fused


@pytest.mark.nightly
def test_accelerate_with_inductor_within_enable():
    pytest.importorskip("accelerate")
    spec = MODELS["llama"]
    assert shared_pool(2).run(job_accelerate) == [(spec.all_reduces, spec.fusible)] * 2
