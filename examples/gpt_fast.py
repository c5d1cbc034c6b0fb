"""Compile a model with hand-written tensor parallelism, as gpt-fast has it.

    torchrun --nproc-per-node 2 examples/gpt_fast.py

Each rank holds its part of the weights, and the forward pass calls `all_reduce` itself.
"""

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import nn

import fusewire

HIDDEN = 64


class RMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(HIDDEN))

    def forward(self, x):
        wide = x.float()
        return (wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + 1e-5)).type_as(x) * self.weight


class FeedForward(nn.Module):
    """A rank's part of the MLP: the sum over the ranks is the whole MLP's result."""

    def __init__(self, ranks):
        super().__init__()
        self.w1 = nn.Linear(HIDDEN, 4 * HIDDEN // ranks, bias=False)
        self.w2 = nn.Linear(4 * HIDDEN // ranks, HIDDEN, bias=False)

    def forward(self, x):
        return funcol.all_reduce(self.w2(torch.relu(self.w1(x))), "sum", dist.group.WORLD)


class Model(nn.Module):
    def __init__(self, ranks, layers=2):
        super().__init__()
        self.layers = nn.ModuleList(FeedForward(ranks) for _ in range(layers))
        self.norms = nn.ModuleList(RMSNorm() for _ in range(layers + 1))

    def forward(self, x):
        for norm, layer in zip(self.norms[:-1], self.layers, strict=True):
            x = x + layer(norm(x))
        return self.norms[-1](x)


@torch.inference_mode()
def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(dist.get_node_local_rank())
    torch.manual_seed(0)  # all ranks get the same input ...
    x = torch.randn(8, HIDDEN, device=device)
    torch.manual_seed(dist.get_rank())  # ... and each its own part of the weights
    model = Model(dist.get_world_size()).to(device)
    compiled = torch.compile(model, backend="fusewire")
    largest = (compiled(x) - model(x)).abs().max().item()
    if dist.get_rank() == 0:
        print(f"largest difference to the model without torch.compile: {largest:.1e}")
        print(fusewire.report())


if __name__ == "__main__":
    dist.init_process_group()
    main()
    dist.destroy_process_group()
