"""Run fusewire's passes in vLLM: the plugin that vLLM loads in each of its processes.

vLLM finds `register` by the entry point `vllm.general_plugins`, so an installed fusewire needs no
import. It stays out unless it is switched on, by FUSEWIRE_VLLM=1 or by
`--additional-config '{"fusewire": {}}'`. Both take fields of `fusewire.PassConfig`, as JSON.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

from fusewire.custom_ops.ops.group_names import name_group
from fusewire.integrations.vllm_options import KEY, OPTIONS, VARIABLE, read_options

_OLDEST, _NEWEST = (0, 26), (0, 33)
_PASS_MANAGER = "fusewire.integrations.vllm_passes.FusewirePassManager"
log = logging.getLogger("vllm.fusewire")  # vLLM shows its own loggers only


def register() -> None:
    """Install fusewire in this process of vLLM. Safe to call more than once.

    It changes nothing in vLLM but: new process groups are also named in torch.distributed,
    configurations that ask for fusewire get its pass manager, and workers look for failed calls
    after each step. A version of vLLM that is not known stays as it is, with a warning if fusewire
    is switched on.
    """
    import vllm

    if not _is_known(vllm.__version__):
        level = logging.WARNING if os.environ.get(VARIABLE) else logging.INFO
        known = " to ".join(".".join(map(str, version)) for version in (_OLDEST, _NEWEST))
        log.log(level, "fusewire stays out: it knows vLLM %s, and this is %s", known, vllm.__version__)
        return
    from vllm.distributed import parallel_state
    from vllm.platforms import current_platform
    from vllm.v1.worker.worker_base import WorkerBase

    from fusewire.integrations.vllm_faults import check_each_step

    platform: Any = type(current_platform)
    if getattr(platform.check_and_update_config, "fusewire", False):
        return
    _show_messages()
    parallel_state.GroupCoordinator.__init__ = _then(parallel_state.GroupCoordinator.__init__, _name_group)
    # The platform's own pass manager is what fusewire's extends.
    platform.fusewire_extends = platform.get_pass_manager_cls()
    platform.get_pass_manager_cls = staticmethod(lambda: _PASS_MANAGER)
    platform.check_and_update_config = staticmethod(_then(platform.check_and_update_config, configure))
    WorkerBase.fusewire_report = _report
    check_each_step()


def _is_known(version: str) -> bool:
    try:
        found = tuple(int(part) for part in version.split(".")[:2])
    except ValueError:
        return False
    return _OLDEST <= found <= _NEWEST


def _show_messages() -> None:
    """Let vLLM's handlers show what fusewire logs, unless the program shows it already."""
    ours, engines = logging.getLogger("fusewire"), logging.getLogger("vllm")
    if not ours.handlers and ours.level == logging.NOTSET:
        ours.setLevel(engines.level)
        ours.propagate = engines.propagate
        for handler in engines.handlers:
            ours.addHandler(handler)


def _then(function: Callable[..., Any], step: Callable[[Any], None]) -> Callable[..., Any]:
    """Return a function that calls `function`, then `step` with the first argument."""

    @functools.wraps(function)
    def both(first: Any, *args: Any, **kwargs: Any) -> Any:
        result = function(first, *args, **kwargs)
        step(first)
        return result

    both.fusewire = True  # type: ignore[attr-defined]
    return both


def _name_group(coordinator: Any) -> None:
    """Name a group as vLLM's graphs do, and reduce with vLLM's own all-reduce."""
    import torch

    if coordinator.world_size > 1:
        name = coordinator.unique_name
        name_group(name, coordinator.device_group, lambda x: torch.ops.vllm.all_reduce(x, group_name=name))


def configure(config: Any) -> None:
    """Put fusewire into a VllmConfig if it is switched on, or say why it stays out.

    Args:
        config: vLLM's configuration, after its platform has completed it.

    Raises:
        ConfigError: the options are no fields of PassConfig, or have values that cannot be used.
    """
    from vllm.config import CompilationMode

    options = read_options(config)
    if options is None:
        return
    compilation = config.compilation_config
    if config.parallel_config.tensor_parallel_size == 1:
        _say_once("fusewire stays out: tensor_parallel_size is 1, so there is no all-reduce")
        return
    if compilation.mode != CompilationMode.VLLM_COMPILE:
        log.warning(
            "fusewire stays out, and nothing is fused: vLLM compiles nothing (--enforce-eager), "
            "or not with its own backend. The compilation mode is %s and must be VLLM_COMPILE",
            getattr(compilation.mode, "name", compilation.mode),
        )
        return
    if compilation.pass_config.fuse_allreduce_rms:
        compilation.pass_config.fuse_allreduce_rms = False
        _say_once("fusewire replaces vLLM's own fusion of all-reduces with norms: fuse_allreduce_rms is off")
    from fusewire.fusion_passes.cache_key import static_key
    from fusewire.fusion_passes.config import PassConfig

    # vLLM keeps compiled models by a hash of its configuration. This makes fusewire a part of it.
    config.additional_config[OPTIONS] = options
    config.additional_config[KEY] = static_key(PassConfig.from_options(options))
    _say_once(f"fusewire is on{f' with {options}' if options else ''}")


@functools.cache
def _say_once(text: str) -> None:
    """Log a line once in this process: vLLM completes several copies of its configuration."""
    log.info(text)


def _report(worker: Any) -> str:
    """Return the report of a worker, for `collective_rpc("fusewire_report")`."""
    from fusewire.integrations.vllm_passes import report_text

    return report_text()
