"""Draw the packages of fusewire and who imports whom, for docs/architecture.md.

    python -m tests.support.layers                                  # print it
    python -m tests.support.layers --write docs/architecture.md     # refresh the documentation

It reads the sources and imports nothing of fusewire. Imports inside functions count.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Each may import those before it; fusewire.errors is for all.
LAYERS = ("custom_ops", "patterns", "fusion_passes", "fusewire")
ERRORS = "fusewire/errors"  # imported by nearly all, so left out
BEGIN, END = "<!-- written by python -m tests.support.layers -->\n", "<!-- end -->\n"


@cache
def sources() -> dict[str, ast.Module]:
    """Return the syntax tree of every source file, by its place in the repository."""
    files = (file for layer in LAYERS for file in sorted((ROOT / layer).rglob("*.py")))
    return {file.relative_to(ROOT).as_posix(): ast.parse(file.read_text()) for file in files}


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, module) of every import, wherever in the file it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            module = node.module or ""
            yield node.lineno, module
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def module_of(place: str) -> str:
    """Return the import path of a source file."""
    parts = place.removesuffix(".py").removesuffix("/__init__").split("/")
    return ".".join(parts if parts[0] == "fusewire" else ["fusewire", *parts])


def part_of(module: str) -> str:
    """Return the part of a layer that a module of fusewire's belongs to, such as `custom_ops/ops`."""
    names = module.split(".")
    layer, *rest = names[1:] if names[1:2] and names[1] in LAYERS else names
    return "/".join([layer, *(rest[:1] or ["__init__"])])


def part_imports() -> dict[str, set[str]]:
    """Return for each part the parts that it imports, in the order of the layers."""
    modules = {module_of(place): tree for place, tree in sources().items()}
    found: dict[str, set[str]] = {}
    for module, tree in modules.items():
        own = found.setdefault(part_of(module), set())
        for _, name in imports(tree):
            while name and name not in modules:  # a name inside a module
                name = name.rpartition(".")[0]
            own |= {part_of(name)} if name else set()
        own.discard(part_of(module))
    # A package is imported wherever a part of it is. The passes import fusewire itself to hash its sources.
    left_out = {f"{layer}/__init__" for layer in LAYERS}
    return {part: others - left_out for part, others in found.items() if part not in left_out or "fusewire" in part}


def reachable(graph: dict[str, set[str]], part: str) -> set[str]:
    """Return everything that a part imports, also by way of others."""
    found, todo = set(), list(graph[part])
    while todo:
        other = todo.pop()
        if other not in found:
            found.add(other)
            todo += graph[other]
    return found


def reduced(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return the graph without the edges that follow from others. In a cycle no edge is dropped."""
    beyond = {part: reachable(graph, part) for part in graph}

    def follows(part: str, other: str) -> bool:
        return any(other in beyond[third] and part not in beyond[third] for third in graph[part] - {other})

    return {part: {other for other in others if not follows(part, other)} for part, others in graph.items()}


def summary(part: str) -> str:
    """Return the first sentence of a part's docstring."""
    file = ROOT / part / "__init__.py" if (ROOT / part).is_dir() else ROOT / f"{part}.py"
    text = (ast.get_docstring(sources()[file.relative_to(ROOT).as_posix()]) or "").split("\n\n")[0]
    return " ".join(text.split()).replace("|", r"\|")


def in_order(graph: dict[str, set[str]]) -> list[str]:
    """Return the parts by layer and, inside a layer, each after those that it imports."""
    depth = {part: len(reachable(graph, part)) for part in graph}
    return sorted(graph, key=lambda p: (LAYERS.index(p.split("/")[0]), depth[p], p))


def name_of(part: str) -> str:
    """Return a part's name in the picture. Names are unique: a test fails where two parts have one name."""
    return part.split("/")[1].strip("_")


def picture(graph: dict[str, set[str]]) -> str:
    """Return a Mermaid graph: an arrow goes from a part to each that it imports."""
    few, parts = reduced(graph), in_order(graph)
    lines = ["```mermaid", "flowchart TB"]
    for layer in reversed(LAYERS):
        names = "; ".join(name_of(part) for part in parts if part.split("/")[0] == layer)
        lines += [f'  subgraph {layer}_["{layer}/"]', f"    {names}", "  end"]
    for part in reversed(parts):
        targets = [name_of(other) for other in parts if other in few[part] and other != ERRORS]
        lines += [f"  {name_of(part)} --> {' & '.join(targets)}"] if targets else []
    return "\n".join([*lines, "```"])


def table(graph: dict[str, set[str]]) -> str:
    """Return a Markdown table: each part, what it is, and the parts that it imports."""
    lines = ["| part | what it is | imports |", "|---|---|---|"]
    for part in in_order(graph):
        layer = part.split("/")[0]
        others = [other for other in in_order(graph) if other in graph[part] and other != ERRORS]
        names = ", ".join(other.removeprefix(f"{layer}/") for other in others)
        lines.append(f"| `{part}` | {summary(part)} | {names} |")
    return "\n".join(lines)


def text() -> str:
    """Return what stands in the documentation."""
    graph = part_imports()
    return f"{picture(graph)}\n\n{table(graph)}\n"


def refreshed(page: str) -> str:
    """Return a page with the text between its two marks written anew. Raises ValueError without the marks."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the page needs the lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}{text()}{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write it between the marks of this page")
    page = parser.parse_args().write
    if page is None:
        print(text(), end="")
    else:
        page.write_text(refreshed(page.read_text()))


if __name__ == "__main__":
    main()
