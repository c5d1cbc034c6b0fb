"""Fuse tensor-parallel all-reduces into the RMSNorm after them, inside torch.compile.

torch.compile(model, backend="fusewire")
print(fusewire.report())

Importing this registers the operators and their providers. Whatever needs PyTorch's compiler is
imported at its first use: the compiler takes longer to import than torch itself.
"""

import importlib as _importlib
import importlib.util as _importlib_util
from typing import TYPE_CHECKING
from typing import Any as _Any

# Python started in a clone finds this folder before an installed fusewire, but no other package.
if _importlib_util.find_spec("fusewire.custom_ops") is None:
    raise ImportError(
        f"{__file__} belongs to a clone of fusewire that is not installed; run `pip install -e .` "
        "in the clone, or start Python in another folder"
    )

import fusewire.fusion_passes.compiler.cache_artifact  # noqa: F401 (registers a kind of artifact)
from fusewire.custom_ops.api import check, close, on_fault, prepare, workspaces
from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm
from fusewire.custom_ops.ops.group_names import name_group
from fusewire.custom_ops.ops.norms import fused_add_rms_norm, rms_norm
from fusewire.custom_ops.ops.registration import register_op
from fusewire.custom_ops.ops.registry import YES, Support, ir_op_priority
from fusewire.errors import (
    ArgumentError,
    CaptureError,
    ConfigError,
    ExpectationError,
    FusewireError,
    NoProviderError,
    PeerTimeoutError,
    ProcessGroupError,
    RankMismatchError,
    SchemaError,
    TrainingError,
    WorkspaceError,
)

if TYPE_CHECKING:
    from fusewire.fusion_passes.backend import enable
    from fusewire.fusion_passes.config import PassConfig
    from fusewire.fusion_passes.pipeline import run_passes
    from fusewire.fusion_passes.registry import register_pass
    from fusewire.fusion_passes.report.cache import load_report, save_report
    from fusewire.fusion_passes.report.store import Report, clear_report, report

__version__ = "0.1.0"  # pyproject.toml reads it from here

__all__ = [
    "YES",
    "ArgumentError",
    "CaptureError",
    "ConfigError",
    "ExpectationError",
    "FusewireError",
    "NoProviderError",
    "PassConfig",
    "PeerTimeoutError",
    "ProcessGroupError",
    "RankMismatchError",
    "Report",
    "SchemaError",
    "Support",
    "TrainingError",
    "WorkspaceError",
    "all_reduce_rms_norm",
    "check",
    "clear_report",
    "close",
    "enable",
    "fused_add_rms_norm",
    "ir_op_priority",
    "load_report",
    "name_group",
    "on_fault",
    "prepare",
    "register_op",
    "register_pass",
    "report",
    "rms_norm",
    "run_passes",
    "save_report",
    "workspaces",
]

# The modules of the names that are imported at their first use.
_LAZY = {
    "PassConfig": "fusion_passes.config",
    "Report": "fusion_passes.report.store",
    "clear_report": "fusion_passes.report.store",
    "enable": "fusion_passes.backend",
    "load_report": "fusion_passes.report.cache",
    "register_pass": "fusion_passes.registry",
    "report": "fusion_passes.report.store",
    "run_passes": "fusion_passes.pipeline",
    "save_report": "fusion_passes.report.cache",
}


if not TYPE_CHECKING:  # a type checker would accept any name

    def __getattr__(name: str) -> _Any:
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(_importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
