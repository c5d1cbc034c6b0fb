"""Candidates of the comparison with others that need a GPU, with stand-ins for their libraries."""

from __future__ import annotations

import peers_candidates
import peers_report as report
import peers_vllm
import pytest
import torch
import torch.distributed as dist

from fusewire.custom_ops.tuning.timers import Inputs
from fusewire.errors import WorkspaceError

# --- Candidates that need a GPU, with stand-ins for its libraries -------------------------------------------


def bench_of(**more):
    """A Bench without a group and a compiler."""
    bench = object.__new__(peers_candidates.Bench)
    bench.__dict__.update(norm=None, missing={}, world_size=2, rank=0, cpu_group=None, dtype=torch.bfloat16, **more)
    return bench


def arena_of(sets=4, symmetric=None):
    drawn = [Inputs(torch.full((2, 8), i + 1.0), torch.full((2, 8), 10.0), torch.ones(8)) for i in range(sets)]
    return peers_candidates.Arena(drawn, symmetric)


def test_the_arena_restores_what_was_overwritten():
    arena = arena_of(symmetric=torch.zeros(100))
    arena.also.append(torch.zeros(4, 2, 8))
    for tensor in (arena.x[1], arena.residual[2], arena.symmetric[3]):
        tensor.fill_(77.0)
    arena.restore()
    assert arena.x[1].eq(2).all()
    assert arena.residual[2].eq(10).all()
    assert arena.symmetric[3].eq(4).all()
    assert arena.also[0][2].eq(3).all()
    assert arena.inputs[1].x.data_ptr() != arena.x[1].data_ptr()


def test_norms_after_an_all_reduce():
    labels = peers_candidates.both_norms("reduce", "reduce", report.PEER)
    bench = bench_of(tail=lambda total, residual: ("tail", total + residual))
    reduce = lambda arena: lambda i: arena.inputs[i].x * 2  # noqa: E731
    (alone,) = peers_candidates.with_norms(bench, labels, reduce)
    assert "FlashInfer" in bench.missing["reduce + FlashInfer norm"]
    assert alone.bind(arena_of())(1)[1].eq(14).all()

    def norm(x, residual, weight):
        residual += x
        x.copy_(residual * 100)

    bench.norm = norm
    inductor, fused = peers_candidates.with_norms(bench, labels, reduce)
    arena = arena_of()
    normed, total = fused.bind(arena)(1)
    assert (total.eq(14).all(), normed.eq(1400).all()) == (True, True)
    assert arena.inputs[1].residual.eq(10).all()
    assert (inductor.in_place, fused.in_place) == (False, True)


class FakeVllm:
    """Stands in for flashinfer.comm: remembers calls, and reduces by doubling."""

    def __init__(self, fails=False):
        self.calls, self.fails, self.captured = [], fails, []

    def create_shared_buffer(self, nbytes, group):
        self.calls.append(("buffer", nbytes))
        return [1 << 20, 2 << 20]

    def vllm_meta_size(self):
        return 64

    def vllm_init_custom_ar(self, pointers, table, rank, full_nvlink):
        return 5

    def vllm_register_buffer(self, handle, pointers):
        self.calls.append(("register", pointers))

    def vllm_all_reduce(self, handle, x, out, buffer, size, blocks):
        assert (handle, buffer, size) == (5, 0, 0)
        out.copy_(x * 2)

    def vllm_get_graph_buffer_ipc_meta(self, handle):
        if self.fails:
            raise RuntimeError("no handles")
        return [1, 2], [3]

    def vllm_register_graph_buffers(self, handle, handles, offsets):
        self.calls.append(("graph", handles, offsets))


@pytest.fixture
def vllm(monkeypatch):
    """Makes a Vllm on the CPU, whose peer always answers as this rank does, or as it is told to."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(dist, "barrier", lambda group=None: None)
    monkeypatch.setattr(peers_vllm.Vllm, "_view", lambda self, pointers, nbytes: torch.zeros(nbytes, dtype=torch.uint8))

    def make(fails=False, peer=None):
        def gather(into, value, group=None):
            into[:] = [value, value if peer is None else peer]

        monkeypatch.setattr(dist, "all_gather_object", gather)
        comm = FakeVllm(fails)
        bench = bench_of(device=torch.device("cpu"), most_bytes=1024, tail=None)
        bench.dtype = torch.float32
        return peers_vllm.Vllm(comm, bench), comm

    return make


def test_vllm_registers_each_set_once(vllm):
    made, comm = vllm()
    arena = arena_of(sets=3)
    first, second = made.reduce(arena), made.reduce(arena)
    arena.restore()
    nbytes = 2 * 8 * 4
    wanted = [("register", [(1 << 20) + i * nbytes, (2 << 20) + i * nbytes]) for i in range(3)]
    assert [call for call in comm.calls if call[0] == "register"] == wanted
    assert first(2).eq(6).all()
    assert second(0).eq(2).all()


def test_vllm_registers_what_was_captured_before_a_replay(vllm, monkeypatch):
    made, comm = vllm(peer=(([7, 8], [9]), ""))
    call = made.reduce(arena_of())
    call(0)
    made.before_replay()
    assert not [c for c in comm.calls if c[0] == "graph"]  # nothing was captured
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    call(0)
    made.before_replay()
    made.before_replay()
    assert [c for c in comm.calls if c[0] == "graph"] == [("graph", [[1, 2], [7, 8]], [[3], [9]])]


def test_vllm_refuses_unequal_captures(vllm, monkeypatch):
    made, _ = vllm(peer=(([7, 8], [9, 10]), ""))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    made.reduce(arena_of())(0)
    with pytest.raises(WorkspaceError, match="different numbers"):
        made.before_replay()


def test_vllm_fails_on_all_ranks_if_on_one(vllm, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for made, _ in (vllm(fails=True), vllm(peer=([], "no handles"))):
        made.reduce(arena_of())(0)
        with pytest.raises(WorkspaceError, match="no handles"):
            made.before_replay()
