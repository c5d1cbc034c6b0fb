"""The rules that hold the layers apart: who imports whom, who touches PyTorch's compiler, what importing
costs, how long files are, and that what is public is documented."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import fusewire
from fusewire import custom_ops, fusion_passes, patterns

# Each may import those before it; fusewire.errors is for all.
LAYERS = ("custom_ops", "patterns", "fusion_passes", "fusewire")
FOLDERS = {
    "custom_ops": Path(custom_ops.__path__[0]),
    "patterns": Path(patterns.__path__[0]),
    "fusion_passes": Path(fusion_passes.__path__[0]),
    "fusewire": Path(fusewire.__path__[0]),
}
COMPILER = (
    "torch._inductor",
    "torch._dynamo",
    "torch._guards",
    "torch._functorch",
    "torch._subclasses",
    "torch.fx.experimental",
)
MAY_TOUCH_THE_COMPILER = {"fusion_passes/matcher.py", "fusion_passes/backend.py", "fusion_passes/warm_cache.py"}
# Breaks that rule and should go through backend.py instead.
TOUCHES_IT_TOO = {"fusewire/explain.py"}
LONGEST = 400
# Longer than that, with what each may have at most: to be split, not to be added to.
LONG = {
    "custom_ops/dispatch.py": 480,
    "custom_ops/ir.py": 500,
    "custom_ops/providers/flashinfer.py": 480,
    "custom_ops/workspace.py": 560,
}


@cache
def sources():
    """Every source file by its place in the repository, with its syntax tree."""
    found = {}
    for layer, folder in FOLDERS.items():
        for file in sorted(folder.rglob("*.py")):
            inside = file.relative_to(folder)
            if layer != "fusewire" or inside.parts[0] not in FOLDERS:
                found[f"{layer}/{inside.as_posix()}"] = ast.parse(file.read_text())
    return found


def layer_of(module):
    """The layer that a module of ours belongs to, or None for fusewire.errors and everything that is not
    ours."""
    parts = module.split(".")
    if parts[0] != "fusewire" or parts[1:2] == ["errors"]:
        return None
    return parts[1] if len(parts) > 1 and parts[1] in LAYERS else "fusewire"


def imports(tree):
    """(line, module) of every import, wherever in the file it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            module = node.module or ""
            yield node.lineno, module
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def upward_imports(place, tree):
    """The imports of a file that go to a later layer."""
    own = LAYERS.index(place.split("/", 1)[0])
    for line, module in imports(tree):
        layer = layer_of(module)
        if layer is not None and LAYERS.index(layer) > own:
            yield f"{place}:{line} imports {module}"


def test_every_layer_is_read():
    assert {place.split("/", 1)[0] for place in sources()} == set(LAYERS)
    assert {
        "custom_ops/ir.py",
        "patterns/norms.py",
        "fusion_passes/manager.py",
        "fusewire/__init__.py",
    } <= set(sources())


def test_imports_run_one_way():
    # The passes hash the sources of the whole package, for which they look where `fusewire` itself lies.
    allowed = {
        "fusion_passes/manager.py": {
            "fusewire",
            "fusewire.custom_ops",
            "fusewire.fusion_passes",
            "fusewire.patterns",
        }
    }
    found = [
        text
        for place, tree in sources().items()
        for text in upward_imports(place, tree)
        if text.rsplit(" ", 1)[-1] not in allowed.get(place, set())
    ]
    assert found == []


def test_errors_is_a_leaf():
    assert [module for _, module in imports(sources()["fusewire/errors.py"]) if module.startswith("fusewire")] == []


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("custom_ops/x.py", "from fusewire.patterns.norms import TAILS"),
        ("custom_ops/x.py", "def f():\n    import fusewire.fusion_passes.config"),
        ("patterns/x.py", "from fusewire.fusion_passes import config"),
        ("fusion_passes/x.py", "from fusewire import report"),
    ],
)
def test_the_rule_catches(place, text):
    assert list(upward_imports(place, ast.parse(text))) != []


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("custom_ops/x.py", "from fusewire.errors import ConfigError"),
        ("patterns/x.py", "from fusewire.custom_ops.norms import rms_norm"),
        ("fusewire/x.py", "from fusewire.fusion_passes import config"),
    ],
)
def test_the_rule_lets_pass(place, text):
    assert list(upward_imports(place, ast.parse(text))) == []


def compiler_uses(tree):
    """Lines on which a file reaches for a private module of PyTorch's compiler, by import or by attribute."""
    for line, module in imports(tree):
        if module.startswith(COMPILER):
            yield line, module
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if name.startswith(COMPILER):
                yield node.lineno, name


def test_the_compilers_private_parts_are_touched_in_two_files():
    found = {place for place, tree in sources().items() if any(compiler_uses(tree))}
    assert found == MAY_TOUCH_THE_COMPILER | (TOUCHES_IT_TOO & set(sources()))


@pytest.mark.parametrize(
    "text",
    [
        "import torch._inductor.config",
        "from torch._dynamo import config",
        "x = torch._guards.detect_fake_mode()",
    ],
)
def test_every_way_to_the_compiler_is_seen(text):
    assert list(compiler_uses(ast.parse(text))) != []


def test_importing_loads_no_optional_package():
    """In a new process. What torch's own modules load (triton, where it is) is not fusewire's doing."""
    lines = {
        ast.unparse(node)
        for tree in sources().values()
        for node in tree.body
        if isinstance(node, (ast.Import, ast.ImportFrom)) and "torch" in ast.unparse(node).split()[1].split(".")
    }
    first = "\n".join(sorted(lines))
    assert "import torch" in lines
    code = f"import sys\n{first}\nold = set(sys.modules)\nimport fusewire\nprint(*(set(sys.modules) - old))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    loaded = {name.split(".")[0] for name in ran.stdout.split()}
    assert "fusewire" in loaded
    assert loaded & {"flashinfer", "triton", "transformers", "gguf", "matplotlib", "cuda"} == set()


@pytest.mark.parametrize("name", fusewire.__all__)
def test_public_names_are_documented(name):
    value = getattr(fusewire, name)
    text = value.__doc__ if inspect.isclass(value) or callable(value) else None
    if hasattr(value, "native"):  # an operator: what it means stands on its native function
        text = value.native.__doc__
    assert text
    assert len(text.split()) > 3
    assert text.strip()[0].isupper() or text.strip()[0] == "`"


def test_public_names_are_sorted_and_of_the_package():
    assert list(fusewire.__all__) == sorted(set(fusewire.__all__))
    modules = {inspect.getmodule(getattr(fusewire, name)).__name__.split(".")[0] for name in fusewire.__all__}
    assert modules == {"fusewire"}


@pytest.mark.parametrize(
    "error", [e for e in vars(fusewire.errors).values() if inspect.isclass(e)], ids=lambda e: e.__name__
)
def test_errors_are_documented_and_of_one_family(error):
    assert error.__doc__
    assert issubclass(error, fusewire.errors.FusewireError)


def test_every_module_says_what_it_is():
    empty = {place for place, tree in sources().items() if not tree.body}
    assert {place for place, tree in sources().items() if tree.body and not ast.get_docstring(tree)} == set()
    assert all(place.endswith("/__init__.py") for place in empty)


def test_files_are_short():
    def length(place):
        layer, inside = place.split("/", 1)
        return len((FOLDERS[layer] / inside).read_text().splitlines())

    lengths = {place: length(place) for place in sources()}
    assert {place: lines for place, lines in lengths.items() if lines > LONG.get(place, LONGEST)} == {}
    assert {place for place in LONG if lengths.get(place, 0) <= LONGEST} == set()  # split, so no longer to be listed


def test_every_function_is_annotated():
    missing = [
        f"{place}:{node.lineno} {node.name}"
        for place, tree in sources().items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and not any("triton" in ast.unparse(decorator) for decorator in node.decorator_list)
        and (node.returns is None or any(a.annotation is None and a.arg not in ("self", "cls") for a in node.args.args))
    ]
    assert missing == []
