"""What `fusewire_test_platform` puts in the place of vLLM's own classes."""

from __future__ import annotations

from vllm.compilation.passes.pass_manager import PostGradPassManager
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator


class OutOfPlaceCommunicator(CpuCommunicator):
    def all_reduce(self, x):
        return super().all_reduce(x.clone())


class PassManager(PostGradPassManager):
    def configure(self, config) -> None:
        super().configure(config)
        # It names operators of the CUDA build; Inductor writes these calls out by itself.
        self.fix_functionalization = lambda graph: None
        self.fix_functionalization.uuid = lambda: "none"
