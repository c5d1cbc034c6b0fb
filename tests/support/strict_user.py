"""What a user writes with the public names; `make lint` checks it with mypy --strict."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

import fusewire
from fusewire import PassConfig, PeerTimeoutError, Report, Support, rms_norm


def fits(x: Tensor, weight: Tensor | None, eps: float, weight_bias: float, form: str) -> Support:
    return Support.all_of((x.shape[-1] <= 8192, "hidden sizes above 8192 are not supported"))


@rms_norm.register_impl("mine", supports_args=fits, version="1")
def my_rms_norm(x: Tensor, weight: Tensor | None, eps: float, weight_bias: float, form: str) -> Tensor:
    return x


def my_pass(graph: torch.fx.Graph, config: PassConfig) -> bool:
    return config.shard_residual


def main(model: torch.nn.Module, group: dist.ProcessGroup) -> str:
    fusewire.register_pass("mine", my_pass, after="raise_ops")
    fusewire.name_group("tp:0", group)
    sizes: list[int] = [info.nbytes for info in fusewire.prepare(group, 4096, torch.bfloat16, max_tokens=8)]
    remove = fusewire.on_fault(lambda error: print(error))
    try:
        with fusewire.enable(PassConfig(expect_fused="all", ir_op_priority={"rms_norm": ("mine", "native")})):
            torch.compile(model)(torch.ones(1))
        fusewire.check()
    except PeerTimeoutError as error:
        return str(error)
    finally:
        remove()
    report: Report = fusewire.report()
    return f"{fusewire.__version__}: {report.fused} of {report.found} fused, {sum(sizes)} bytes; {report.summary}"
