"""The rules that hold the layers apart: who imports whom, who touches PyTorch's compiler, how long
files and how complex functions are, and that what is public is documented."""

from __future__ import annotations

import ast
import graphlib
import inspect
import re

import pytest

import fusewire

from support.layers import LAYERS, ROOT, imports, module_of, sources

# The order inside the packages, by the first part of a module's name: each may import those before it.
INNER_LAYERS = {
    "custom_ops": (
        "environment",
        "_torch_private",
        "_triton_private",
        "ops",
        "coordination",
        "workspaces",
        "dispatch",
        "providers",
        "tuning",
        "api",
    ),
    "fusion_passes": (
        "config",
        "context",
        "compiler",
        "analysis",
        "spmd",
        "report",
        "observer",
        "passes",
        "registry",
        "cache_key",
        "pipeline",
        "backend",
    ),
}
COMPILER = (
    "torch._inductor",
    "torch._dynamo",
    "torch._guards",
    "torch._functorch",
    "torch._subclasses",
    "torch.fx.experimental",
)
LONGEST = 400
# The most cyclomatic complexity of a function. Kernels are exempt.
MOST_COMPLEX = 15


def layer_of(module):
    """The layer that a module of ours belongs to, or None for fusewire.errors and everything that is not
    ours."""
    parts = module.split(".")
    if parts[0] != "fusewire" or parts[1:2] == ["errors"]:
        return None
    return parts[1] if len(parts) > 1 and parts[1] in LAYERS else "fusewire"


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
        "custom_ops/ops/registry.py",
        "patterns/norms.py",
        "fusion_passes/pipeline.py",
        "fusewire/__init__.py",
    } <= set(sources())


def test_imports_run_one_way():
    # The passes hash the sources of the whole package, for which they look where `fusewire` itself lies.
    allowed = {
        "fusion_passes/cache_key.py": {
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


def inner_layer(place):
    """The part of its package that a file belongs to, and that package's order; None for a package's own __init__."""
    package, inside = place.split("/", 1)
    part = inside.split("/", 1)[0].removesuffix(".py")
    return (part, INNER_LAYERS[package]) if package in INNER_LAYERS and part != "__init__" else None


def upward_inside(place, tree):
    """(line, part) of the imports of a file that go to a later part of its own package, lazy imports too."""
    known = inner_layer(place)
    if known is None:
        return
    part, order = known
    prefix = f"fusewire.{place.split('/', 1)[0]}."
    for line, module in imports(tree):
        other = module.removeprefix(prefix).split(".")[0]
        if module.startswith(prefix) and other in order[order.index(part) + 1 :]:
            yield line, other


def test_every_part_of_a_package_has_its_place():
    parts = {(place.split("/")[0], known[0]) for place in sources() if (known := inner_layer(place))}
    assert parts == {(package, part) for package, order in INNER_LAYERS.items() for part in order}


def test_imports_run_one_way_inside_packages():
    found = {(place, part) for place, tree in sources().items() for _, part in upward_inside(place, tree)}
    assert found == set()


def test_no_module_imports_itself_by_way_of_others():
    """Lazy imports count. A package's __init__ is no module of its own here."""
    modules = {module_of(place): tree for place, tree in sources().items() if not place.endswith("/__init__.py")}
    graph = {name: {module for _, module in imports(tree) if module in modules} for name, tree in modules.items()}
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("custom_ops/ops/x.py", "from fusewire.custom_ops.dispatch import dispatcher"),
        ("custom_ops/workspaces/x.py", "def f():\n    from fusewire.custom_ops.api import prepare"),
        ("fusion_passes/compiler/x.py", "import fusewire.fusion_passes.pipeline"),
    ],
)
def test_the_rule_inside_packages_catches(place, text):
    assert list(upward_inside(place, ast.parse(text))) != []


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
        ("patterns/x.py", "from fusewire.custom_ops.ops.norms import rms_norm"),
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


def test_only_one_package_touches_the_compilers_private_parts():
    found = {place for place, tree in sources().items() if any(compiler_uses(tree))}
    outside = {place for place in found if not place.startswith("fusion_passes/compiler/")}
    assert outside == set()
    assert found - outside


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


@pytest.mark.parametrize("name", fusewire.__all__)
def test_public_names_are_documented(name):
    value = getattr(fusewire, name)
    text = value.__doc__ if inspect.isclass(value) or callable(value) or value is fusewire.YES else None
    if hasattr(value, "native"):  # an operator: what it means stands on its native function
        text = value.native.__doc__
    assert text
    assert len(text.split()) > 3
    assert text.strip()[0].isupper() or text.strip()[0] == "`"


def test_public_names_are_sorted_and_of_the_package():
    # Constants come first, as ruff sorts them.
    assert list(fusewire.__all__) == sorted(set(fusewire.__all__), key=lambda name: (not name.isupper(), name))
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


# Packages with one pass or command a file, which say so.
ONE_EACH = {"fusion_passes/passes", "fusewire/cli"}


def test_every_package_says_what_its_modules_are():
    lacking = {}
    for place, tree in sources().items():
        folder = place.removesuffix("/__init__.py")
        if folder != place and folder not in {*ONE_EACH, "fusewire"}:
            parts = {
                other.removeprefix(f"{folder}/").split("/")[0] for other in sources() if other.startswith(f"{folder}/")
            }
            names = {part.removesuffix(".py") for part in parts if not part.startswith("_")}
            text = ast.get_docstring(tree)
            lacking[folder] = {name for name in names if not re.search(rf"\b{name}\b", text)}
    assert {folder: names for folder, names in lacking.items() if names} == {}


def test_files_are_short():
    lengths = {place: len((ROOT / place).read_text().splitlines()) for place in sources()}
    assert {place: lines for place, lines in lengths.items() if lines > LONGEST} == {}


_BRANCHES = (ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.Assert, ast.match_case)


def complexity(function):
    """Cyclomatic complexity as radon counts it: one, and one for each branch, condition and comprehension; functions
    inside count as functions of their own."""
    count, todo = 1, list(ast.iter_child_nodes(function))
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        todo += ast.iter_child_nodes(node)
        if isinstance(node, _BRANCHES):
            count += 1
        elif isinstance(node, ast.BoolOp):
            count += len(node.values) - 1
        elif isinstance(node, ast.comprehension):
            count += 1 + len(node.ifs)
    return count


def is_kernel(function):
    return any("triton" in ast.unparse(decorator) for decorator in function.decorator_list)


def test_functions_are_simple():
    found = {}
    for place, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not is_kernel(node):
                name = f"{place} {node.name}"  # several classes have an __init__
                found[name] = max(complexity(node), found.get(name, 0))
    assert {name: value for name, value in found.items() if value > MOST_COMPLEX} == {}


def test_complexity_is_counted():
    text = "def f(x):\n    if x and y or z:\n        return [a for a in x if a]\n    return 1 if x else 2"
    assert complexity(ast.parse(text).body[0]) == 7


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
