"""Two threads at once: compiling, environment variables, decisions, the order of calls, and workspaces that come and go."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from fusewire.custom_ops import _triton_private, api
from fusewire.custom_ops.dispatch import dispatcher as dispatch
from fusewire.custom_ops.dispatch.decisions import Decision, Decisions
from fusewire.custom_ops.dispatch.served import ServedCounter
from fusewire.custom_ops.environment import scoped_variable
from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm as op
from fusewire.custom_ops.ops.norms import NormSpec
from fusewire.custom_ops.providers.flashinfer import provider as flashinfer
from fusewire.custom_ops.providers.symm_mem import launcher as symm_mem
from fusewire.custom_ops.providers.symm_mem import provider as symm_mem_provider
from fusewire.custom_ops.providers.symm_mem import workspace as spaces
from fusewire.custom_ops.providers.symm_mem.launch_config import KernelTensors, Launch, LaunchConfig
from fusewire.custom_ops.workspaces import provider as interface
from fusewire.custom_ops.workspaces import registry as workspace
from fusewire.errors import WorkspaceError

from support.distributed import fake_group, shared_pool
from support.fake_flashinfer import args_of
from support.plain_provider import PlainProvider

CPU, BF16 = torch.device("cpu"), torch.bfloat16
VARIABLE = "FUSEWIRE_TEST_VARIABLE"
LIMIT_S = 20.0


class Thread(threading.Thread):
    """A thread whose result, or error, `join` gives."""

    def __init__(self, work, *args):
        super().__init__(daemon=True)
        self.work, self.args, self.found, self.error = work, args, None, None
        self.start()

    def run(self):
        try:
            self.found = self.work(*self.args)
        except BaseException as error:
            self.error = error

    def result(self):
        self.join(LIMIT_S)
        assert not self.is_alive(), "the thread waits for ever"
        if self.error is not None:
            raise self.error
        return self.found


def wait(event):
    assert event.wait(LIMIT_S)


# --- Compiling ----------------------------------------------------------------------------------------------


def test_calls_of_other_threads_are_launched_while_one_compiles(monkeypatch):
    done = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: done.append(("launched", threading.current_thread())) or "compiled"

        def warmup(self, *args, **options):
            done.append(("compiled", threading.current_thread()))

    monkeypatch.setattr(symm_mem, "kernel", lambda name: Kernel())
    ws = SimpleNamespace(device=CPU, layout=SimpleNamespace(packets=32), multiprocessors=1)
    tensors = KernelTensors(*[torch.zeros(1)] * len(KernelTensors._fields))
    launch = Launch("one_shot_kernel", LaunchConfig(1, 1, 32), tensors, ())
    with symm_mem.compiling_only():
        other = Thread(symm_mem.run, ws, launch)
        assert other.result() == "compiled"
        assert symm_mem.run(ws, launch) is None
    assert symm_mem.run(ws, launch) == "compiled"
    own = threading.current_thread()
    assert done == [("launched", other), ("compiled", own), ("launched", own)]


def test_compiling_ends_where_it_began():
    for error in (None, ValueError):
        with contextlib.suppress(ValueError), symm_mem.compiling_only():
            with symm_mem.compiling_only():
                assert symm_mem.compiles_only()
            assert symm_mem.compiles_only()
            if error is not None:
                raise error
        assert not symm_mem.compiles_only()


# --- Environment variables ----------------------------------------------------------------------------------


def overlapping(first, second, look):
    """Begin `first`, begin `second` in another thread, end `first`, end `second`: what `look` says after each step."""
    seen, begun, end = [], threading.Event(), threading.Event()

    def other():
        with second():
            begun.set()
            wait(end)

    with first():
        seen.append(look())
        thread = Thread(other)
        wait(begun)
        seen.append(look())
    seen.append(look())
    end.set()
    thread.result()
    return [*seen, look()]


@pytest.mark.parametrize("before", [None, "old"])
def test_a_variable_is_restored_by_the_last(monkeypatch, before):
    monkeypatch.delenv(VARIABLE, raising=False)
    if before is not None:
        monkeypatch.setenv(VARIABLE, before)
    block = lambda: scoped_variable(VARIABLE, lambda found: f"{found} and new")  # noqa: E731
    inside = f"{before} and new"
    assert overlapping(block, block, lambda: os.environ.get(VARIABLE)) == [inside, inside, inside, before]


def test_a_variable_may_be_left_alone_or_set_by_others(monkeypatch):
    monkeypatch.setenv(VARIABLE, "old")
    with scoped_variable(VARIABLE, lambda found: None):
        assert os.environ[VARIABLE] == "old"
    with scoped_variable(VARIABLE, lambda found: "new"):
        os.environ[VARIABLE] = "another's"
    assert os.environ[VARIABLE] == "another's"
    with pytest.raises(ValueError, match="planted"), scoped_variable(VARIABLE, lambda found: "new"):
        raise ValueError("planted")
    assert os.environ[VARIABLE] == "another's"


def test_no_multicast_as_long_as_anyone_makes_a_workspace(monkeypatch):
    name = "TORCH_SYMM_MEM_DISABLE_MULTICAST"
    monkeypatch.delenv(name, raising=False)
    seen = overlapping(spaces._without_multicast, spaces._without_multicast, lambda: os.environ.get(name))
    assert seen == ["1", "1", "1", None]


def test_the_cache_is_shared_as_long_as_anyone_compiles(monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "/tmp/someone/triton/3")
    seen = overlapping(
        _triton_private.shared_cache, _triton_private.shared_cache, lambda: os.environ["TRITON_CACHE_DIR"]
    )
    assert seen == [*["/tmp/someone/triton"] * 3, "/tmp/someone/triton/3"]


# --- Decisions ----------------------------------------------------------------------------------------------


def decision(name):
    return Decision(SimpleNamespace(name=name), (), None, None, {}, ServedCounter(False))


def test_decisions_are_of_one_version():
    kept, old, new = Decisions(2), decision("old"), decision("new")
    kept.keep("a", old, 1)
    assert kept.get("a", 1) is old
    assert kept.get("a", 2) is None
    kept.keep("b", new, 2)
    kept.keep("c", old, 1)  # of a thread that began before
    assert (kept.get("a", 2), kept.get("b", 2), kept.get("c", 2)) == (None, new, None)
    assert kept.get("c", 1) is None
    kept.keep("d", new, 2)
    kept.keep("e", new, 2)
    assert [kept.get(key, 2) is new for key in "bde"] == [False, False, True]


def test_what_was_decided_by_what_has_changed_is_decided_again():
    x = torch.zeros(3, 64, dtype=BF16)
    made = []

    def decide(*args):
        made.append((decision(f"of version {workspace.REGISTRY.version}"), True))
        if len(made) == 1:
            workspace.REGISTRY.changed()
        return made[-1]

    with (
        fake_group(2) as group,
        mock.patch.object(dispatch, "_decide", decide),
        mock.patch.object(dispatch, "_decisions", Decisions(8)),
    ):
        args = args_of(x, None, None, group.group_name)
        first = dispatch.decide(op, args, "native")
        assert first.provider.name == f"of version {workspace.REGISTRY.version}"
        assert dispatch.decide(op, args, "native") is first
        assert len(made) == 2
        workspace.REGISTRY.changed()
        assert dispatch.decide(op, args, "native") is not first


def test_a_slow_thread_does_not_bring_back_what_is_void():
    """It decides, the registry changes, and only then it keeps what it decided."""
    x = torch.zeros(3, 64, dtype=BF16)
    void, current = decision("void"), decision("current")
    keep = Decisions.keep

    def late(self, key, found, version):
        if found is void:
            workspace.REGISTRY.changed()
            keep(self, key, current, workspace.REGISTRY.version)
        keep(self, key, found, version)

    with (
        fake_group(2) as group,
        mock.patch.object(dispatch, "_decide", return_value=(void, True)),
        mock.patch.object(Decisions, "keep", late),
        mock.patch.object(dispatch, "_decisions", Decisions(8)),
    ):
        args = args_of(x, None, None, group.group_name)
        assert dispatch.decide(op, args, "native") is void
        assert dispatch.decide(op, args, "native") is current


def test_no_change_is_lost():
    registry, interval = workspace.WorkspaceRegistry(), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [Thread(lambda: [registry.changed() for _ in range(2000)]) for _ in range(4)]
        for thread in threads:
            thread.result()
    finally:
        sys.setswitchinterval(interval)
    assert registry.version == 8000


# --- The order of calls -------------------------------------------------------------------------------------


class Order:
    """As interface.StreamOrder, without streams; says who entered."""

    def __init__(self, log):
        self.lock, self.log = threading.RLock(), log

    def enter(self, device_index):
        self.log.append(("enters", threading.current_thread()))
        time.sleep(0.002)


def held(log):
    key = interface.WorkspaceKey("symm_mem", "group", torch.float32, 16)
    made = SimpleNamespace(nbytes=0, rank=0, world_size=2, fault=lambda: None, close=lambda: log.append("freed"))
    with mock.patch.object(interface.StreamOrder, "of", return_value=Order(log)):
        return symm_mem_provider.HeldWorkspace(interface.Request(key, None, CPU, 64), made)


def flashinfer_workspace(log, launch):
    made = object.__new__(flashinfer.FlashInferWorkspace)
    key = interface.WorkspaceKey("flashinfer", "group", torch.float32, 16)
    with mock.patch.object(interface.StreamOrder, "of", return_value=Order(log)):
        interface.Workspace.__init__(made, key, 64, 0, CPU)
    made.device, made.handle, made._no_weight = torch.device("cuda", 0), None, torch.zeros(16)
    made._no_residual, made._fused, made._with_pdl = torch.zeros(64, 16), launch, False
    made.check_call = lambda tokens, device: None
    return made


@pytest.mark.parametrize("kind", ["symm_mem", "flashinfer"])
def test_calls_are_launched_in_the_order_in_which_they_entered(kind):
    log, x = [], torch.zeros(2, 16)

    def launch(*args, **options):
        log.append(("launches", threading.current_thread()))
        return x, x

    if kind == "symm_mem":
        made = held(log)
        call = lambda: made.run(launch, x, None, NormSpec(None, 0.0, 0.0, ""))  # noqa: E731
    else:
        made = flashinfer_workspace(log, launch)
        call = lambda: made.run(True, x, None, NormSpec(None, 0.0, 0.0, ""))  # noqa: E731
    threads = [Thread(lambda: [call() for _ in range(10)]) for _ in range(3)]
    for thread in threads:
        thread.result()
    assert len(log) == 60
    for (first, who), (second, also) in zip(log[::2], log[1::2], strict=True):
        assert (first, second) == ("enters", "launches")
        assert who is also


def test_a_thread_that_compiles_holds_nobody_up():
    log, x, compiles, end = [], torch.zeros(2, 16), threading.Event(), threading.Event()
    made = held(log)

    def slow(*args):
        compiles.set()
        wait(end)
        return x, x

    def compiling():
        with symm_mem.compiling_only():
            made.run(slow, x, None, NormSpec(None, 0.0, 0.0, ""))

    thread = Thread(compiling)
    wait(compiles)
    Thread(made.run, lambda *args: (x, x), x, None, NormSpec(None, 0.0, 0.0, "")).result()
    end.set()
    thread.result()
    assert [what for what, _ in log] == ["enters"]


def test_a_workspace_is_not_freed_under_a_call_of_another_thread():
    log, x, inside, end = [], torch.zeros(2, 16), threading.Event(), threading.Event()
    made = held(log)

    def launch(*args):
        inside.set()
        wait(end)
        log.append("launched")
        return x, x

    caller = Thread(made.run, launch, x, None, NormSpec(None, 0.0, 0.0, ""))
    wait(inside)
    closer = Thread(made.close)
    time.sleep(0.1)
    end.set()
    caller.result()
    closer.result()
    assert log[1:] == ["launched", "freed"]
    with pytest.raises(WorkspaceError, match="closed"):
        made.run(launch, x, None, NormSpec(None, 0.0, 0.0, ""))
    made.close()
    assert log.count("freed") == 1


def test_kernels_are_tried_once():
    made, tried = held([]), []

    def self_test(self, kind, quant):
        tried.append(kind)
        time.sleep(0.05)
        return ""

    with mock.patch.object(symm_mem_provider.HeldWorkspace, "_self_test", self_test):
        assert [thread.result() for thread in [Thread(made.passes, "sandwich") for _ in range(6)]] == [True] * 6
    assert tried == ["sandwich"]


# --- Workspaces of real ranks -------------------------------------------------------------------------------


class Provider(PlainProvider):
    """Counts the votes on machines and the workspaces that are made."""

    def __init__(self):
        self.machines, self.made = 0, 0

    def machine(self, group, device):
        self.machines += 1
        time.sleep(0.1)
        return {}

    def create(self, request, channel):
        self.made += 1
        time.sleep(0.1)
        return super().create(request, channel)


def job_two_threads():
    provider, group = Provider(), dist.group.WORLD

    def open_one():
        return workspace.REGISTRY.open(provider, group, BF16, 64, CPU, lambda machine: 8)

    found = [thread.result() for thread in [Thread(open_one) for _ in range(2)]]
    same = found[0] is found[1] and not found[0].workspace.closed
    api.close()
    machines = [Thread(workspace.REGISTRY.machine, provider, group, CPU) for _ in range(2)]
    return same, len({id(thread.result()) for thread in machines}), provider.machines, provider.made


def test_threads_that_need_the_same_workspace_make_one():
    assert shared_pool(2).run(job_two_threads, timeout_s=60) == [(True, 1, 2, 1)] * 2
