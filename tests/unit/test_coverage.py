"""The zoo of models: what fuses in each, the table in the documentation, and what the passes cost."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from support.coverage import Coverage, as_markdown, measure
from support.zoo import MODELS

TESTS = Path(__file__).parents[1]
QUICK = ("llama", "gemma2", "deepseek_v3", "qwen3_next", "native")


def _model(name):
    return pytest.param(name, marks=[] if name in QUICK else [pytest.mark.nightly])


@pytest.mark.parametrize("name", [_model(name) for name in MODELS])
def test_every_fusible_all_reduce_is_fused(name):
    spec = MODELS[name]
    if spec.skip_reason or not spec.counted:
        pytest.skip(spec.skip_reason or "the zoo's numbers are of another version of transformers")
    found = measure(name)
    assert not found.notes
    assert not found.graph_breaks
    assert (found.all_reduces, found.reduce_scatters) == (spec.all_reduces, spec.reduce_scatters)
    assert (found.reported, found.fused, found.merged) == (found.sums, spec.fusible, spec.merges)
    assert sum(found.reasons.values()) == found.sums - spec.fusible


def test_documentation_has_a_line_for_every_model():
    text = (TESTS.parent / "docs" / "coverage.md").read_text()
    assert set(re.findall(r"^(?:\| |- )(\w+)(?: \||: )", text, re.MULTILINE)) - {"model"} >= set(MODELS)


def test_table_tells_what_is_missing():
    spec = dataclasses.replace(MODELS["native"], name="some", fusible=3, note="odd", has_cache=False)
    row = Coverage(spec, all_reduces=4, reported=3, fused=2, merged=1, graphs=2)
    row.reasons["because"] = 1
    row.graph_breaks["print() breaks\nmore"] = 2
    text = as_markdown([row, Coverage(spec, failed="not installed")])
    for said in (
        "| some | 4 | 3 | 2 (1) | 2 | odd; fusewire's report knows 3 of the 4 only; **1 fusible",
        "- 1 x because: some 1",
        "- some: 2 x print() breaks\n",
        "- some: not installed",
        "1 models have 4 all-reduces, of which 2 fused.\nFor 1 models",
        "which are fusible: 3, of which 2 fused.\n0 of these models fuse all",
    ):
        assert said in text, said


def test_table_of_versions_that_the_zoo_does_not_know():
    spec = dataclasses.replace(MODELS["llama"], check=str)
    layer_norms = dataclasses.replace(MODELS["olmo"], check=str)
    with mock.patch.object(type(spec), "counted", False):
        assert Coverage(spec, all_reduces=4, reported=4, fused=4).fusible == 4
        assert Coverage(spec, all_reduces=4, reported=4, fused=3).fusible is None
        assert Coverage(layer_norms, all_reduces=4, reported=4).fusible == 0
        text = as_markdown([Coverage(spec, all_reduces=4, reported=4, fused=3)], ["## other versions\n"])
    assert "| llama | 4 | ? | 3 | 0 |  |" in text
    assert "The zoo's numbers are of transformers" in text
    assert text.endswith("## other versions\n")
    assert "--also DIRECTORY" in text


def test_a_model_that_fails_without_fusewire_is_told_as_such(monkeypatch):
    def broken(dtype, device, sharded):
        raise TypeError("planted\nmore")

    monkeypatch.setitem(MODELS, "broken", dataclasses.replace(MODELS["native"], make=broken))
    assert measure("broken").failed == "fails as it is, without fusewire: TypeError: planted"


@pytest.mark.nightly
def test_passes_cost_little(tmp_path):
    """The benchmark at small sizes: it runs, everything fuses, and the time grows as the layers do."""
    file = TESTS.parent / "examples" / "benchmarks" / "compile_cost.py"
    command = [sys.executable, str(file), "--layers", "4", "16", "--full", "4", "--out", str(tmp_path / "cost.json")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=400, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "cost.json").read_text())
    for shapes in ("static", "dynamic"):
        small, large = [row for row in rows if row["shapes"] == shapes]
        assert (small["fused"], large["fused"]) == (8, 32)
        assert large["pass_seconds"] < 8 * small["pass_seconds"]
        assert large["peak_megabytes"] < 20
        assert small["clock_share"] > 0
