"""A platform plugin for vLLM: its CPU build, compiling as its CUDA build does.

vLLM's own CPU platform compiles without its pass manager, writes norms out, and reduces in place.
This one uses vLLM's backend, its IR operators, its compile caches and its opaque all-reduce, so
that all of them are tested without a GPU. What a GPU adds are CUDA graphs and kernels.
"""

from __future__ import annotations

from vllm.platforms.cpu import CpuPlatform

_COMPILED = "fusewire_test_compilation"  # imports what needs the platform


def register() -> str:
    return f"{__name__}.Platform"


class Platform(CpuPlatform):
    @classmethod
    def check_and_update_config(cls, config) -> None:
        from vllm.config import CompilationMode

        compilation = config.compilation_config
        asked = compilation.mode
        super().check_and_update_config(config)
        if asked == CompilationMode.VLLM_COMPILE:
            compilation.mode, compilation.backend, compilation.ir_enable_torch_wrap = asked, "inductor", True
            compilation.compile_sizes = compilation.compile_sizes or []
            # They name operators of the CUDA build.
            for name in ("fuse_norm_quant", "fuse_act_quant", "fuse_attn_quant"):
                setattr(compilation.pass_config, name, False)

    @classmethod
    def use_custom_op_collectives(cls) -> bool:
        return True

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        return f"{_COMPILED}.OutOfPlaceCommunicator"

    @classmethod
    def get_pass_manager_cls(cls) -> str:
        return f"{_COMPILED}.PassManager"
