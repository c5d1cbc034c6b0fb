"""Compile once in the fork server of the ranks, which imports this module last.

Ranks forked later have what a process makes at its first compilation, among it the patterns of
Inductor's passes and a hash of Triton's files: three seconds for each. No thread may be started
here.
"""

import torch
from torch._inductor import config

import fusewire

from support.blocks import NORMS, reduce_functional, tensors
from support.compiles import leave_out_measurements
from support.distributed import fake_group


def block(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return NORMS["L"](residual + reduce_functional(x), weight, 1e-5)


def compile_once() -> None:
    torch.set_num_threads(1)
    torch.hub.tqdm.monitor_interval = 0
    leave_out_measurements()
    for cached in (True, False):  # what is found in the cache makes the cache's key, and what is not all the rest
        settings = config.patch(fx_graph_cache=cached, compile_threads=1)
        with fake_group(2), settings, torch.no_grad():
            torch.compile(block, backend="fusewire")(*tensors())
    fusewire.clear_report()


if not torch.version.cuda:  # which a fork cannot use once its parent has looked at the devices
    compile_once()
