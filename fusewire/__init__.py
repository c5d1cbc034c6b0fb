"""fusewire: torch.compile with tensor-parallel all-reduces fused into the RMSNorm after them.

torch.compile(model, backend="fusewire")
print(fusewire.report())
"""

from fusewire.custom_ops.api import close, prepare, workspaces
from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm
from fusewire.custom_ops.ops.norms import fused_add_rms_norm, rms_norm
from fusewire.custom_ops.ops.registry import ir_op_priority, register_op
from fusewire.fusion_passes.backend import enable
from fusewire.fusion_passes.config import PassConfig
from fusewire.fusion_passes.pipeline import run_passes
from fusewire.fusion_passes.registry import register_pass
from fusewire.fusion_passes.report.model import Report, clear_report, report

__version__ = "0.1.0"

__all__ = [
    "PassConfig",
    "Report",
    "all_reduce_rms_norm",
    "clear_report",
    "close",
    "enable",
    "fused_add_rms_norm",
    "ir_op_priority",
    "prepare",
    "register_op",
    "register_pass",
    "report",
    "rms_norm",
    "run_passes",
    "workspaces",
]
