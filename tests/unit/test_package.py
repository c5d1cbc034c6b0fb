"""The wheel: it holds every source file under its import path, with the metadata that pip needs."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import fusewire

tomllib = pytest.importorskip("tomllib")  # Python 3.11
ROOT = Path(__file__).parents[2]
BUILD = "import setuptools.build_meta as build, sys; build.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def project():
    with (ROOT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)


@pytest.fixture(scope="module")
def wheel(project, tmp_path_factory):
    """A wheel built from a copy of the sources, so that nothing is left in the working tree."""
    copy = tmp_path_factory.mktemp("sources")
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in project["tool"]["setuptools"]["package-dir"].values():
        shutil.copytree(ROOT / folder, copy / folder, ignore=skip)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-W", "error::DeprecationWarning", "-c", BUILD, str(copy)]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (file,) = copy.glob("*.whl")
    return zipfile.ZipFile(file)


def test_the_wheel_holds_every_source_file(project, wheel):
    mapping = project["tool"]["setuptools"]["package-dir"]
    expected = {
        f"{package.replace('.', '/')}/{file.relative_to(ROOT / folder).as_posix()}"
        for package, folder in mapping.items()
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert "fusewire/py.typed" in expected
    assert found == expected


def test_the_version_stands_in_one_place(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    metadata = message_from_bytes(wheel.read(name))
    assert metadata["Version"] == fusewire.__version__
    assert "Typing :: Typed" in metadata.get_all("Classifier")


def test_torch_has_a_lower_and_an_upper_bound(project):
    """docs/stability.md says how the upper one moves."""
    (torch,) = (Requirement(text) for text in project["project"]["dependencies"])
    assert torch.name == "torch"
    assert sorted(bound.operator for bound in torch.specifier) == ["<", ">="]
