"""Where tests and their helpers lie, and how long a file of them may be."""

from __future__ import annotations

import ast
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
FILES = sorted(TESTS.rglob("*.py"))
FOLDERS = {"unit", "ranks", "kernels", "fuzz", "gpu", "serving", "support"}
LONGEST = 500
# The files that are longer, and why.
LONG = {
    "fuzz/differ.py": "plans for ranks that differ, how a rank follows one, and what must come of it",
    "gpu/batch_invariant_check.py": "a program of its own, carried to a machine with GPUs",
    "gpu/flashinfer_check.py": "a program of its own, carried to a machine with GPUs",
    "gpu/symm_mem_check.py": "a program of its own, carried to a machine with GPUs",
    "support/zoo.py": "one table of models, with what is known of each",
    "unit/test_backend.py": "the ways in share the fixtures that see which passes ran, over one compile cache",
    "unit/test_cache.py": "what must hit and what must miss share one cached graph",
    "unit/test_canaries.py": "one canary for each private name of torch",
    "unit/test_flashinfer_provider.py": "one provider, from its limits to its calls",
    "unit/test_report.py": "the records, their texts and what is kept of them",
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


def test_no_file_imports_from_a_file_of_tests():
    """What several of them need belongs into tests/support."""
    found = {}
    for path in FILES:
        tests = {name for name in imported(path) if name.rpartition(".")[2].startswith("test_")} - {path.stem}
        if tests:
            found[str(path.relative_to(TESTS))] = tests
    assert not found


def test_no_file_is_long_without_a_reason():
    lengths = {str(path.relative_to(TESTS)): len(path.read_text().splitlines()) for path in FILES}
    assert {name for name, lines in lengths.items() if lines > LONGEST} <= set(LONG) <= set(lengths)
