"""Workspaces made and closed many times, and those that CUDA graphs have captured."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import tracemalloc
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import fusewire
from fusewire.custom_ops.coordination.watchdog import WATCHDOG
from fusewire.custom_ops.tuning.timers import GpuTimer
from fusewire.custom_ops.workspaces import provider as interface
from fusewire.custom_ops.workspaces.registry import REGISTRY
from fusewire.errors import PeerTimeoutError, WorkspaceError

from support.distributed import shared_pool
from support.words import CPU, WordProvider, held, register

ROUNDS = 200


def _open(tokens=64):
    made = REGISTRY.open(WordProvider(), dist.group.WORLD, torch.bfloat16, 16, CPU, lambda machine: tokens)
    assert made.workspace is not None, made.refusal
    return made.workspace


def _left():
    """What this process and the group's store hold."""
    gc.collect()
    dist.barrier()
    keys = dist.distributed_c10d._get_process_group_store(dist.group.WORLD).num_keys()
    dist.barrier()
    return threading.active_count(), len(os.listdir("/proc/self/fd")), keys


def job_rounds():
    for _ in range(20):
        _open()
        fusewire.close()
    before = _left()
    tracemalloc.start()
    grown = []
    for _ in range(2):
        first = tracemalloc.get_traced_memory()[0]
        for _ in range(ROUNDS // 2):
            _open()
            assert WATCHDOG._thread.is_alive()
            fusewire.close()
            assert WATCHDOG._thread is None
        gc.collect()
        grown.append(tracemalloc.get_traced_memory()[0] - first)
    tracemalloc.stop()
    return before, _left(), grown


def test_rounds_of_making_and_closing_leave_nothing():
    for before, after, (_, grown) in shared_pool(2).run(job_rounds):
        assert after == before
        assert grown < 64 << 10, f"{grown} bytes in {ROUNDS // 2} rounds"


def job_use_after_close():
    workspace, x = _open(), torch.zeros(2, 16, dtype=torch.bfloat16)
    fusewire.close()
    fusewire.close()  # again: nothing
    with pytest.raises(WorkspaceError, match=r"is closed; call fusewire\.prepare"):
        workspace.run(lambda *args: None, x, None, None, 0.0, 0.0, "")
    assert workspace.made.freed
    again = _open()
    assert again is not workspace
    fusewire.close()
    return True


def test_a_call_after_close_raises_and_a_new_workspace_can_be_made():
    assert shared_pool(2).run(job_use_after_close) == [True, True]


# --- Captured workspaces
# ----------------------------------------------------------------------------------------


@pytest.fixture
def workspace(monkeypatch):
    """A workspace of whose stream a CUDA graph is captured or not, as `capturing` says."""
    monkeypatch.setattr(REGISTRY, "entries", {})
    monkeypatch.setattr(REGISTRY, "retired", [])
    order = SimpleNamespace(lock=threading.RLock(), enter=lambda _: order.capturing, capturing=False)
    with mock.patch.object(interface.StreamOrder, "of", return_value=order):
        made = held()
    made.capturing = lambda value: setattr(order, "capturing", value)
    register(made)
    return made


def call(made):
    x = torch.zeros(2, 16)
    return made.run(lambda *args: (x, x), x, None, None, 0.0, 0.0, "")


def test_a_workspace_is_freed_as_long_as_no_graph_has_captured_it(workspace):
    call(workspace)
    fusewire.close()
    assert workspace.made.freed


def test_a_captured_workspace_is_not_closed_but_on_demand(workspace):
    workspace.capturing(True)
    call(workspace)
    workspace.capturing(False)
    call(workspace)
    other = held("other", hidden=32)
    register(other)
    for _ in range(2):
        with pytest.raises(WorkspaceError, match=r"CUDA graphs have captured .*symm_mem group group.*captured=True"):
            fusewire.close()
    assert not workspace.made.freed
    assert not other.made.freed  # all or none
    call(workspace)  # still serves
    fusewire.close("another group")
    fusewire.close(captured=True)
    assert workspace.made.freed
    assert other.made.freed
    with pytest.raises(WorkspaceError, match="is closed"):
        call(workspace)


def test_the_tuners_graphs_leave_a_workspace_closable(workspace, monkeypatch):
    """They are dropped with the measurement; a graph of the program's own still counts."""

    @contextlib.contextmanager
    def graph(made, capture_error_mode):
        workspace.capturing(True)
        yield
        workspace.capturing(False)

    def event(enable_timing=False):
        return SimpleNamespace(record=lambda: None, query=lambda: True, elapsed_time=lambda other: 1.0)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "Event", event)
    seen = []

    def timed(_):
        call(workspace)
        seen.append(workspace.order.capturing)

    GpuTimer(torch.device("cuda")).time(timed, 8)
    assert seen.count(True) == 8
    fusewire.close()
    assert workspace.made.freed

    again = held("again")
    again.order = workspace.order
    register(again)
    GpuTimer(torch.device("cuda")).time(lambda _: call(again), 8)
    workspace.capturing(True)
    call(again)
    with pytest.raises(WorkspaceError, match="CUDA graphs have captured"):
        fusewire.close()
    fusewire.close(captured=True)


def test_a_captured_workspace_whose_entry_goes_keeps_its_buffers(workspace):
    """Its group is gone, or its kernels could not be compiled ahead: replays still use the
    buffers."""
    workspace.capturing(True)
    call(workspace)
    REGISTRY.drop(workspace.key)
    assert not workspace.made.freed
    with pytest.raises(WorkspaceError, match="is closed"):
        call(workspace)
    workspace.made.give_up()
    with pytest.raises(PeerTimeoutError):  # a replay's fault is still found
        fusewire.check()
    with pytest.raises(WorkspaceError, match="CUDA graphs have captured"):
        fusewire.close()
    fusewire.close(captured=True)
    assert workspace.made.freed
    fusewire.check()


def test_a_captured_workspace_is_freed_at_exit(workspace):
    from fusewire.custom_ops.workspaces import registry

    workspace.capturing(True)
    call(workspace)
    registry._close_at_exit()
    assert workspace.made.freed
