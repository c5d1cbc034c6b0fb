"""What `import fusewire` loads, and what it leaves to the first use."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import fusewire

OPTIONAL = {"flashinfer", "triton", "transformers", "gguf", "matplotlib", "cuda"}
COMPILER = {"torch._inductor", "torch._dynamo", "torch._functorch.aot_autograd", "triton", "sympy", "networkx"}


def loaded_by(*statements, after="import torch"):
    """The modules that a new process loads for these statements, beyond those of the statements before."""
    code = ["import sys", after, "old = set(sys.modules)", *statements, "print(*(set(sys.modules) - old))"]
    ran = subprocess.run([sys.executable, "-c", "\n".join(code)], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return set(ran.stdout.split())


def test_importing_loads_no_compiler():
    loaded = loaded_by("import fusewire", "fusewire.rms_norm, fusewire.errors, fusewire.PassConfig", "dir(fusewire)")
    assert "fusewire.custom_ops.ops.norms" in loaded
    assert loaded & (COMPILER | OPTIONAL) == set()


def test_the_whole_package_loads_no_optional_package():
    """What torch's own modules load (triton, where it is) is not fusewire's doing."""
    loaded = loaded_by("from fusewire import *", after="import torch._inductor.compile_fx")
    assert "fusewire.fusion_passes.backend" in loaded
    assert {name.split(".")[0] for name in loaded} & OPTIONAL == set()


def test_operators_and_artifacts_are_known_at_once():
    """A graph of an earlier process may name both before anything is compiled in this one."""
    loaded_by(
        "import fusewire",
        "[getattr(torch.ops.fusewire, name).default for name in ('all_reduce_rms_norm', 'rendezvous')]",
        "from torch.compiler._cache import CacheArtifactFactory",
        "CacheArtifactFactory.create('fusewire', 'name', b'')",
    )


def test_every_public_name_can_be_had():
    assert set(fusewire.__all__) <= set(dir(fusewire))
    names: dict[str, object] = {}
    exec("from fusewire import *", names)
    assert set(fusewire.__all__) <= set(names)
    assert fusewire.run_passes is fusewire.fusion_passes.pipeline.run_passes
    assert set(fusewire._LAZY) <= set(fusewire.__all__)


def test_other_names_are_missing_as_in_any_module():
    with pytest.raises(AttributeError, match="module 'fusewire' has no attribute 'nothing'"):
        fusewire.nothing  # noqa: B018
    assert not hasattr(fusewire, "nothing")


def test_the_backend_is_found_without_an_import():
    assert "fusewire" in torch._dynamo.list_backends()
