"""The report of a model that vLLM compiles in pieces: counts, caches and expectations, without a
server.

Runs where vLLM is installed: `make test-serving`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parent / "plugin"))  # before vLLM looks for platforms
pytest.importorskip("vllm", reason="vLLM is not installed here: make test-serving")

from vllm.plugins import load_general_plugins

import fusewire
from fusewire import PassConfig
from fusewire.errors import ExpectationError
from fusewire.fusion_passes.report.model import FUSED, Entry, GraphReport
from fusewire.fusion_passes.report.store import add_graph_report


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    load_general_plugins()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))


class Manager:
    """Compiles pieces as vLLM does: `new` runs fusewire's pass, `cached` does not; equal pieces are
    one object.
    """

    def __init__(self, expect_fused=None):
        from fusewire.integrations import vllm_passes

        self.passes = vllm_passes
        ours = vllm_passes.FusewirePass(PassConfig(expect_fused=expect_fused))
        manager = vllm_passes.FusewirePassManager()
        manager.passes = [ours]
        self.inductor = {"post_grad_custom_post_pass": manager}
        self.compiled = {}
        self.compile = vllm_passes._reporting(Manager._compile)

    def _compile(self, graph, inputs, inductor, compilation, compile_range, graph_index, num_graphs):
        how, name = graph
        if name not in self.compiled:
            self.compiled[name] = object()
            if how == "new":
                entries = (Entry(-1, "all_reduce", status=FUSED),) * 2
                self.passes._piece.get().append(add_graph_report(GraphReport(-1, "inference", entries)))
        return self.compiled[name]

    def model(self, *pieces):
        compilation = SimpleNamespace(local_cache_dir="/cache/rank_0_0/backbone")
        for i, piece in enumerate(pieces):
            self.compile(
                self, piece, [], self.inductor, compilation, compile_range="1-64", graph_index=i, num_graphs=len(pieces)
            )
        return fusewire.report()


NEW = [("new", "first"), ("new", "layer"), ("new", "layer"), ("new", "layer")]
CACHED = [("cached", name) for _, name in NEW]


def test_equal_pieces_count_as_often_as_the_model_has_them():
    found = Manager(expect_fused=8).model(*NEW)
    assert (found.fused, found.found, len(found.graphs)) == (8, 8, 2)


def test_pieces_from_a_cache_have_the_report_of_the_start_that_compiled_them():
    Manager().model(*NEW)
    fusewire.clear_report()
    found = Manager(expect_fused=8).model(*CACHED)
    assert (found.fused, found.found) == (8, 8)


def test_a_second_start_does_not_meet_what_the_first_did_not():
    for pieces in (NEW, CACHED):
        fusewire.clear_report()
        with pytest.raises(ExpectationError, match="expect_fused=3, but 8 of 8"):
            Manager(expect_fused=3).model(*pieces)


@pytest.mark.parametrize("pieces", [CACHED, [NEW[0], *CACHED[1:]]])
def test_pieces_without_a_report_are_no_met_expectation(pieces):
    with pytest.raises(ExpectationError, match=r"cannot be checked: . pieces of the model .* without a report"):
        Manager(expect_fused="all").model(*pieces)
    fusewire.clear_report()
    assert "without a report; the counts leave them out" in str(Manager().model(*pieces))


def test_a_new_compilation_replaces_the_kept_report():
    Manager().model(*NEW)
    Manager().model(*NEW[:2])
    fusewire.clear_report()
    assert Manager().model(*CACHED[:2]).fused == 4
