"""Shared fixtures."""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

# Before torch is imported, here and in every process that a test starts: with CI set, torch raises where it would
# otherwise only warn (a custom operator whose result is its input), so a test must not pass here and fail there.
os.environ.setdefault("CI", "true")
# Inductor's C++ kernels without line tables compile a tenth faster.
os.environ.setdefault("AOT_INDUCTOR_ENABLE_LINE_TABLES", "0")
# Processes for Inductor to compile in would import torch, again for each process of tests that
# compiles.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# Tables that this machine's user has tuned would change which provider a test gets. The folder of a
# process of pytest-xdist lies in that of the process that started it, which removes both: xdist's
# processes end without atexit.
_OUTER = os.environ.get("FUSEWIRE_CACHE_DIR") if "PYTEST_XDIST_WORKER" in os.environ else None
os.environ["FUSEWIRE_CACHE_DIR"] = _TABLES = tempfile.mkdtemp(prefix="fusewire-tests-", dir=_OUTER)
atexit.register(shutil.rmtree, _TABLES, ignore_errors=True)

sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(Path(__file__).resolve().parents[1] / "examples" / "benchmarks"))


_TRY_VECTORS = """
from torch._inductor import cpu_vec_isa as isa
known = isa.x86_isa_checker()
wanted = [each for each in isa.supported_vec_isa_list if all(flag in known for flag in str(each).split())]
print(bool(wanted) and all(map(bool, wanted)))
"""


def pytest_sessionstart(session):
    """Try once whether the compiler knows this CPU's vector instructions.

    Inductor tries by compiling programs, again for each new cache folder, and many tests have one
    of their own. Where all work, every process is told so. Anything else is left to Inductor.
    """
    if hasattr(session.config, "workerinput") or session.config.option.collectonly:
        return
    tried = subprocess.run([sys.executable, "-c", _TRY_VECTORS], capture_output=True, text=True)
    if tried.stdout.split()[-1:] == ["True"]:
        os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")


def pytest_collection_finish(session):
    from support.compiles import leave_out_measurements

    leave_out_measurements()


@pytest.fixture
def fake_world():
    """torch's fake process group of two ranks, in this process."""
    from support.distributed import fake_group

    with fake_group(2) as group:
        yield group


@pytest.fixture(autouse=True)
def _fresh_report():
    import fusewire

    fusewire.clear_report()
    yield
    fusewire.clear_report()


@pytest.fixture(autouse=True)
def _own_variables():
    """What a test sets of fusewire's variables ends with it."""
    before = {name: value for name, value in os.environ.items() if name.startswith("FUSEWIRE_")}
    yield
    for name in [name for name in os.environ if name.startswith("FUSEWIRE_") and name not in before]:
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of this test's own for tables of measured times, empty, in this process and in those it starts."""
    from fusewire.custom_ops.dispatch import table_store, table_vote

    monkeypatch.setenv(table_store.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.delenv(table_vote.TUNE_VARIABLE, raising=False)
    return tmp_path
