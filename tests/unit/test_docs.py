"""What the documentation says of the code: paths, options, errors, public names and the map of packages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fusewire
from fusewire import errors

from support import layers

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("custom_ops", "docs", "examples", "fusewire", "fusion_passes", "patterns", "tests")


def test_the_map_of_packages_is_up_to_date():
    """After a change of imports run `python -m tests.support.layers --write docs/architecture.md`."""
    page = (ROOT / "docs/architecture.md").read_text()
    assert page == layers.refreshed(page)


def test_parts_have_one_name_each_in_the_map():
    parts = layers.part_imports()
    assert len({layers.name_of(part) for part in parts}) == len(parts)


def test_the_map_leaves_out_only_what_follows():
    graph = {"a": {"b", "c"}, "b": {"c"}, "c": set()}
    assert layers.reduced(graph) == {"a": {"b"}, "b": {"c"}, "c": set()}
    cycle = {"a": {"b", "c"}, "b": {"a"}, "c": set()}
    assert layers.reduced(cycle) == cycle


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_exist(page):
    text = page.read_text()
    links = {match for match in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text) if not match.startswith("http")}
    paths = set(re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w/.]*)`", text))
    assert {link for link in links if not (page.parent / link).exists()} == set()
    assert {path for path in paths if not (ROOT / path).exists() and not (ROOT / f"{path}.py").exists()} == set()


def test_the_readme_lists_every_option_with_its_default():
    rows = re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    config = fusewire.PassConfig()
    assert dict(rows) == {name: repr(getattr(config, name)) for name in config.field_names()}
    assert len(rows) == len(config.field_names())


def test_every_error_has_its_row():
    rows = re.findall(r"^\| `(\w+Error)` \|", (ROOT / "docs/errors.md").read_text(), re.MULTILINE)
    classes = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert classes - {"FusewireError"} == set(rows)
    assert classes <= set(fusewire.__all__)


@pytest.mark.parametrize("name", fusewire.__all__)
def test_public_names_are_in_the_documentation(name):
    assert any(re.search(rf"\b{name}\b", page.read_text()) for page in PAGES)
