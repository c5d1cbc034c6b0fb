"""Compile a model that torch's `parallelize_module` has made tensor-parallel.

torchrun --nproc-per-node 2 examples/dtensor.py
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fusewire

HIDDEN = 64


class Layer(nn.Module):
    """Two projections and a norm; with the residual: all-reduce, add, RMSNorm."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(HIDDEN, 4 * HIDDEN, bias=False)
        self.down = nn.Linear(4 * HIDDEN, HIDDEN, bias=False)
        self.norm = nn.RMSNorm(HIDDEN)

    def forward(self, x, residual):
        residual = residual + self.down(torch.relu(self.up(x)))
        return self.norm(residual), residual


class Model(nn.Module):
    def __init__(self, layers=2):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, x):
        residual = x
        for layer in self.layers:
            x, residual = layer(x, residual)
        return x


@torch.inference_mode()
def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    torch.manual_seed(0)  # all ranks start from the same weights and the same input
    model, x = Model().to(device), torch.randn(8, HIDDEN, device=device)
    parallelize_module(model, mesh, {"layers.*.up": ColwiseParallel(), "layers.*.down": RowwiseParallel()})
    compiled = torch.compile(model, backend="fusewire")
    largest = (compiled(x) - model(x)).abs().max().item()
    if dist.get_rank() == 0:
        print(f"largest difference to the model without torch.compile: {largest:.1e}")
        print(fusewire.report())


if __name__ == "__main__":
    dist.init_process_group()
    main()
    dist.destroy_process_group()
