"""Generate text with a tensor-parallel Hugging Face model compiled by fusewire, on CPUs or GPUs.

    torchrun --nproc-per-node 2 examples/quickstart.py

It needs transformers 5.17 or newer. The model is a small Llama with random weights: nothing is
downloaded, and its text is noise. For a real model, put its name in place of None, and leave out
`config` and `state_dict`.
"""

import torch
import torch.distributed as dist
import transformers
from transformers.distributed import DistributedConfig

import fusewire


def build_model():
    torch.manual_seed(0)  # all ranks start from the same weights
    config = transformers.LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    weights = transformers.LlamaForCausalLM(config).state_dict()
    parallel = DistributedConfig(tp_plan="auto")
    return transformers.LlamaForCausalLM.from_pretrained(
        None, config=config, state_dict=weights, distributed_config=parallel
    ).eval()


@torch.inference_mode()
def main():
    model = build_model()
    compiled = torch.compile(model, backend="fusewire", dynamic=True)
    tokens = torch.tensor([list(b"All ranks ")], device=model.device)  # a token is a byte
    for _ in range(16):
        best = compiled(tokens, use_cache=False).logits[:, -1:].argmax(-1)
        tokens = torch.cat([tokens, best], dim=1)
    if dist.get_rank() == 0:
        print(bytes(tokens[0].tolist()).decode(errors="replace"))
        print(fusewire.report())


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    main()
    dist.destroy_process_group()
