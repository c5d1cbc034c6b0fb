"""Threads that compile at the same time: each compilation keeps its own reports."""

from __future__ import annotations

import threading

from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fusewire
from fusewire.fusion_passes.backend import FusewirePass
from fusewire.fusion_passes.report.cache import ReportCache, reports_kept

from support.blocks import NORMS, reduce_functional, tensors


def graph_of(count):
    def block(x, r, w):
        for _ in range(count):
            x = NORMS["L"](r + reduce_functional(x), w, 1e-5)
        return x

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return make_fx(block)(*map(mode.from_tensor, tensors())).graph


def test_compilations_at_the_same_time_keep_their_own_reports(fake_world, tmp_path, monkeypatch):
    """What another thread's compilation found would come back with a graph that it is not about."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    both, one_by_one, kept = threading.Barrier(2, timeout=60), threading.Lock(), {}

    def compile_one(name, graph):
        with reports_kept(name) as cache:
            both.wait()
            with one_by_one:  # tracing is not thread-safe in torch
                FusewirePass()(graph)
            both.wait()
        kept[name] = [len(report.entries) for report in cache.made]

    graphs = (("one", graph_of(1)), ("two", graph_of(2)))
    threads = [threading.Thread(target=compile_one, args=arguments) for arguments in graphs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert kept == {"one": [1], "two": [2]}
    assert sorted(graph.number for graph in fusewire.report().graphs) == [0, 1]
    again = {name: [len(report.entries) for report in ReportCache(name).kept] for name in kept}
    assert again == kept
