"""Compile FlashInfer's all-reduce kernels before the first run, here or for other GPUs.

FlashInfer compiles them at their first use, which takes minutes; this does the same, into the same
cache. Without a GPU, name the architecture: 9.0a (H100, H200), 10.0a (B200), 12.0f (RTX 50). Then
copy the cache it prints to the same place on the other machine, for the same FlashInfer version.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fusewire.custom_ops.coordination.log import log_line
from fusewire.custom_ops.environment import scoped_variable
from fusewire.custom_ops.providers.flashinfer import library as flashinfer
from fusewire.errors import ConfigError, WorkspaceError

ARCHITECTURES = "FLASHINFER_CUDA_ARCH_LIST"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    text = "an architecture to compile for, instead of this machine's; may be given several times"
    parser.add_argument("--arch", action="append", default=[], metavar="MAJOR.MINOR[a|f]", help=text)


def run(arguments: argparse.Namespace) -> int:
    choose_architectures(arguments.arch)
    found = flashinfer.library()
    if found.reason:
        raise WorkspaceError(found.reason)
    before = flashinfer.kernels()
    if before.state == "prebuilt":
        print(f"nothing to do: FlashInfer {found.version} loads the all-reduce kernels beside it, {before.path}")
        return 0
    start = time.monotonic()
    known_s = 5.0 if before.state == "cached" else 0.0
    with flashinfer.toolkit(), cuda_library(), flashinfer.announcement(before, known_s, hint=""):
        build()
    after = flashinfer.kernels()
    if after.state == "missing":
        raise WorkspaceError(f"FlashInfer compiled without an error, but there is no {after.path}")
    target = os.environ.get(ARCHITECTURES, "this machine's GPUs")
    print(f"compiled for {target} in {time.monotonic() - start:.0f} s")
    print(f"kernels: {after.path}")
    print(f"cache:   {cache_folder()} (its place can be set by FLASHINFER_WORKSPACE_BASE)")
    return 0


def choose_architectures(named: Sequence[str]) -> None:
    """Set what FlashInfer compiles for. Must come before FlashInfer is imported.

    Raises:
        ConfigError: nothing is named and there is no GPU, or there are no kernels for a named one.
    """
    for arch in named:
        match = re.fullmatch(r"(\d+)\.(\d)[af]?", arch)
        if match is None or int(match.group(1)) not in flashinfer.CAPABILITIES:
            raise ConfigError(
                f"--arch {arch}: name a compute capability that FlashInfer has all-reduce kernels "
                "for, such as 9.0a (H100, H200), 10.0a (B200) or 12.0f"
            )
    if named:
        os.environ[ARCHITECTURES] = " ".join(named)
    elif not os.environ.get(ARCHITECTURES) and not torch.cuda.is_available():
        raise ConfigError(
            "there is no GPU here to compile for; name an architecture, for example --arch 9.0a (H100, H200)"
        )


def build() -> None:
    """Compile and link the kernels as FlashInfer does.

    Raises:
        WorkspaceError: the compiler failed; the message ends with the last lines of its output.
    """
    from flashinfer.jit.comm import gen_trtllm_comm_module

    try:
        spec: Any = gen_trtllm_comm_module()
        spec.build(verbose=False, need_lock=True)
    except Exception as error:
        last = "\n".join(str(error).splitlines()[-25:])
        raise WorkspaceError(f"FlashInfer's kernels could not be compiled: {type(error).__name__}: {last}") from error


def cache_folder() -> Path:
    from flashinfer.jit import env

    return Path(env.FLASHINFER_CACHE_DIR)


@contextlib.contextmanager
def cuda_library() -> Iterator[None]:
    """If the driver's libcuda is missing, have the linker find an empty one within the block.

    The kernels need libcuda only when they run, on a machine that has the driver.
    """
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        raise WorkspaceError("there is no C++ compiler on PATH: install one (the package g++ or clang), or set CXX")
    if _links_cuda(compiler):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="fusewire-stub-") as folder:
        source, library = Path(folder) / "empty.cpp", Path(folder) / "libcuda.so"
        source.write_text("")
        command = [compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(library), str(source)]
        made = subprocess.run(command, capture_output=True, text=True)
        if made.returncode:
            raise WorkspaceError(f"{' '.join(command)} failed: {made.stderr.strip()[-500:]}")
        log_line("there is no CUDA driver here: linking against an empty libcuda.so.1 in its place")
        with scoped_variable("LIBRARY_PATH", lambda before: f"{folder}{os.pathsep}{before}" if before else folder):
            yield


def _links_cuda(compiler: str) -> bool:
    """Return whether -lcuda links when the linker is called as by FlashInfer."""
    home = Path(os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda")
    folders = [f"-L{home}/lib64", f"-L{home}/lib64/stubs"]
    with tempfile.TemporaryDirectory(prefix="fusewire-link-") as folder:
        command = [compiler, "-shared", *folders, "-Wl,--no-as-needed", "-lcuda", "-o", f"{folder}/probe.so"]
        return subprocess.run(command, capture_output=True).returncode == 0
