"""Where tests and their helpers lie, and how long a file of them may be."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
FILES = sorted(TESTS.rglob("*.py"))
FOLDERS = {"unit", "ranks", "kernels", "fuzz", "gpu", "support"}
LONGEST = 500
# Longer, and why: what is in the file is one thing.
LONG = {
}


def imported(path: Path) -> set[str]:
    """The modules that a file imports, at its top or within a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_every_file_is_in_one_of_the_folders():
    assert {path.relative_to(TESTS).parts[0] for path in FILES} == {*FOLDERS, "conftest.py"}


def test_files_of_tests_have_names_of_their_own():
    """pytest imports them by these names."""
    names = [path.name for path in FILES if path.name.startswith("test_")]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("path", [pytest.param(path, id=str(path.relative_to(TESTS))) for path in FILES])
def test_no_file_imports_from_a_file_of_tests(path):
    own = {path.stem}  # a process that a test starts
    tests = {name for name in imported(path) if name.rpartition(".")[2].startswith("test_")} - own
    assert not tests, f"what {path.name} takes from {', '.join(tests)} belongs into tests/support"


def test_no_file_is_long_without_a_reason():
    lengths = {str(path.relative_to(TESTS)): len(path.read_text().splitlines()) for path in FILES}
    assert {name for name, lines in lengths.items() if lines > LONGEST} == set(LONG)
