"""Find FlashInfer on this machine: its module, version and compiled kernels.

FlashInfer is imported at the first use, and only on machines with CUDA.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusewire.custom_ops.coordination.log import log_progress
from fusewire.custom_ops.coordination.timeouts import Limit, limit_s
from fusewire.custom_ops.coordination.vote import describe
from fusewire.custom_ops.environment import scoped_variable
from fusewire.custom_ops.ops.registry import Support
from fusewire.custom_ops.providers.flashinfer.compile_progress import CompileProgress
from fusewire.errors import WorkspaceError

MIN_VERSION = (0, 6, 15)
TWO_SHOT_VERSION = (0, 7, 2)
PDL_VERSION = (0, 7, 2)
CAPABILITIES = (9, 10, 12)
MODULE = "trtllm_comm"
_NEEDED = {
    "create_allreduce_fusion_workspace": (
        *("backend", "world_size", "rank", "max_token_num", "hidden_dim", "dtype", "group", "comm_backend"),
    ),
    "allreduce_fusion": (
        *("input", "workspace", "pattern", "output", "residual_in", "rms_gamma", "rms_eps", "residual_out"),
        *(
            "norm_out",
            "use_oneshot",
            "fp32_acc",
            "launch_with_pdl",
            "trigger_completion_at_end",
            "weight_bias",
        ),
    ),
}
INSTALL = "pip install 'fusewire[flashinfer]'"


# --- Is it there? ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Library:
    """FlashInfer's communication module, or the reason why it cannot be used."""

    comm: Any
    version: str
    reason: str = ""


@functools.lru_cache(maxsize=1)
def library() -> Library:
    """Import FlashInfer, once; any exception becomes the reason (AssertionError without CUDA)."""
    try:
        package = importlib.import_module("flashinfer")
        version = str(getattr(package, "__version__", "unknown"))
    except ModuleNotFoundError as error:
        if error.name == "flashinfer":
            return Library(None, "", f"FlashInfer is not installed: {INSTALL}")
        return Library(None, "", f"importing FlashInfer failed: {describe(error)}")
    except Exception as error:
        return Library(None, "", f"importing FlashInfer failed: {describe(error)}")
    if not version_ok(version):
        wanted = ".".join(map(str, MIN_VERSION))
        return Library(None, version, f"FlashInfer {version} is too old, {wanted} is needed: {INSTALL} --upgrade")
    try:
        comm = importlib.import_module("flashinfer.comm")
    except Exception as error:
        return Library(None, version, f"importing flashinfer.comm {version} failed: {describe(error)}")
    return Library(comm, version, _missing_api(comm, version))


def version_ok(version: str, wanted: tuple[int, int, int] = MIN_VERSION) -> bool:
    """Return whether a version is at least `wanted`; older norms are wrong at hidden size 2688."""
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?((?:\.?dev|a|b|rc)\d*)?", version)
    if match is None:
        return False
    found = tuple(int(part or 0) for part in match.groups()[:3])
    return found > wanted or (found == wanted and not match.group(4))


def with_pdl() -> bool:
    """Return whether calls may use programmatic dependent launch (PDL) in this version.

    With PDL a kernel starts while the kernel before it ends. From 0.7.2 on FlashInfer's kernels
    read no memory before they have waited for that end; older ones read weight and residual.
    """
    return version_ok(library().version, PDL_VERSION)


def two_shot() -> Support:
    """Return whether two-shot's results are correct in this version.

    Before 0.7.2 the barrier set the flags of thread blocks that a launch lacks too late. A launch
    with more blocks could see an old flag and read rows that had not arrived: silently wrong.
    """
    version = library().version
    wanted = ".".join(map(str, TWO_SHOT_VERSION))
    return Support.all_of(
        (
            version_ok(version, TWO_SHOT_VERSION),
            f"FlashInfer {version}'s two-shot barrier can let a rank pass early when a call has "
            f"more thread blocks than the one before; {wanted} corrects it ({INSTALL} --upgrade), "
            "until then one-shot serves alone",
        )
    )


def _missing_api(comm: Any, version: str) -> str:
    for name, wanted in _NEEDED.items():
        function = getattr(comm, name, None)
        if function is None:
            return f"FlashInfer {version} has no flashinfer.comm.{name}; install another version"
        missing = [p for p in wanted if p not in inspect.signature(function).parameters]
        if missing:
            lacking = ", ".join(missing)
            return f"FlashInfer {version}: flashinfer.comm.{name} takes no {lacking}; install another version"
    return ""


# --- The kernels ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernels:
    """The state of the compiled all-reduce kernels: "prebuilt", "cached" or "missing"."""

    state: str
    path: Path


def kernels() -> Kernels:
    """Locate the kernels for this machine's GPU architectures. Imports FlashInfer."""
    env = importlib.import_module("flashinfer.jit").env
    find = getattr(env, "get_aot_path", None)  # since 0.7, which has packages per architecture
    ahead = Path(find(MODULE)) if find else Path(env.FLASHINFER_AOT_DIR) / MODULE / f"{MODULE}.so"
    cached = Path(env.FLASHINFER_JIT_DIR) / MODULE / f"{MODULE}.so"
    if ahead.exists():
        return Kernels("prebuilt", ahead)
    return Kernels("cached" if cached.exists() else "missing", cached)


def find_nvcc() -> str | None:
    """Return the path of the CUDA compiler that FlashInfer would call, or None."""
    if os.environ.get("FLASHINFER_NVCC"):
        return shutil.which(os.environ["FLASHINFER_NVCC"])
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which(str(Path(home) / "bin" / "nvcc"))
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def no_nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    where = f"in CUDA_HOME={home}" if home else "on PATH or in /usr/local/cuda"
    return (
        f"there is no nvcc {where}: install the CUDA toolkit (or set CUDA_HOME), or install the "
        "compiled kernels (package flashinfer-jit-cache of the same version)"
    )


def cuda_home(nvcc: str) -> Path | None:
    """Return the CUDA toolkit of a compiler, even if `nvcc` is a script that calls the compiler."""
    nearby = [Path(nvcc).parent.parent, Path(os.path.realpath(nvcc)).parent.parent]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        dry = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, timeout=limit_s(Limit.PROGRAM)
        )
        nearby += [Path(top).resolve() for top in re.findall(r"^#\$ TOP=(.+)$", dry.stderr, re.MULTILINE)]
    return next((home for home in nearby if (home / "bin/nvcc").exists() and (home / "include/cuda.h").exists()), None)


@contextlib.contextmanager
def toolkit() -> Iterator[None]:
    """Set CUDA_HOME inside, unless it is set: FlashInfer would use the folder above `which nvcc`.

    Raises:
        WorkspaceError: there is no CUDA compiler.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise WorkspaceError(no_nvcc())
    home = None if os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") else cuda_home(nvcc)
    if home is None:
        yield
        return
    extension = sys.modules.get("flashinfer.jit.cpp_ext")
    if extension is not None:
        extension.get_cuda_path.cache_clear()
    with scoped_variable("CUDA_HOME", lambda _: str(home)):
        yield


def load_kernels(is_logging_rank: bool) -> None:
    """Load FlashInfer's module; compile it if needed (minutes) and log the progress on one rank.

    Raises:
        WorkspaceError: the module must be compiled and there is no CUDA compiler.
    """
    state = kernels()
    load = importlib.import_module("flashinfer.comm.trtllm_ar").get_trtllm_comm_module
    compiled = state.state != "missing"
    if state.state == "prebuilt" or (compiled and find_nvcc() is None):
        load()
        return
    if not compiled and find_nvcc() is None:
        raise WorkspaceError(f"FlashInfer's all-reduce kernels are not compiled and {no_nvcc()}")
    # A cached module is compiled again if its flags changed, which takes just as long.
    with toolkit(), announcement(state, 5.0 if compiled else 0.0) if is_logging_rank else contextlib.nullcontext():
        load()


_HINT = " (`python -m fusewire prebuild` does it ahead)"


def announcement(state: Kernels, after_s: float = 0.0, hint: str = _HINT) -> contextlib.AbstractContextManager[None]:
    """Return a context that logs the compilation's progress and where its result goes."""
    return log_progress(
        f"FlashInfer compiles its all-reduce kernels ({MODULE}) into {state.path.parent}: minutes, "
        f"once for each version and GPU architecture{hint}",
        after_s=after_s,
        detail=CompileProgress(state.path.parent).__str__,
    )
