"""The watchdog: faults that no call notices, each reported once, by a thread that ends with the
last workspace."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import fusewire
from fusewire.custom_ops.coordination import watchdog as module
from fusewire.custom_ops.coordination.watchdog import ABORT, ACTION_VARIABLE, WATCHDOG, Watchdog
from fusewire.custom_ops.providers.symm_mem.layout import OTHER_CALL, WAIT_RESULT_FLAG
from fusewire.custom_ops.workspaces.registry import REGISTRY
from fusewire.errors import ConfigError, PeerTimeoutError, RankMismatchError

from support.words import held, register

PATIENCE_S = 60.0  # of a test that would fail
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def lines(monkeypatch):
    """What was logged, and an event for each line."""
    found = []
    monkeypatch.setattr(module, "log_line", found.append)
    return found


@pytest.fixture
def dog(monkeypatch, lines):
    """A watchdog of this test's own that looks every hundredth of a second."""
    monkeypatch.setenv("FUSEWIRE_WATCHDOG_INTERVAL_S", "0.01")
    monkeypatch.delenv(ACTION_VARIABLE, raising=False)
    found = Watchdog()
    yield found
    for workspace in [*found._watched, held()]:  # at least one: all may have been reported
        found.unwatch(workspace)
    assert found._thread is None


class Heard:
    """A handler that remembers the errors and lets a test wait for them."""

    def __init__(self):
        self.errors, self.threads, self.one = [], [], threading.Semaphore(0)

    def __call__(self, error):
        self.errors.append(error)
        self.threads.append(threading.current_thread().name)
        self.one.release()

    def wait(self):
        assert self.one.acquire(timeout=PATIENCE_S)


def test_a_fault_is_noticed_without_a_call(dog, lines):
    heard, workspace, fine = Heard(), held(), held()
    dog.on_fault(heard)
    dog.watch(fine)
    dog.watch(workspace)
    workspace.made.give_up(kind=WAIT_RESULT_FLAG, rank=1, call=1 << 33)
    heard.wait()
    (error,) = heard.errors
    assert isinstance(error, PeerTimeoutError)
    assert re.match(r"rank 1 of group 'group' did not take part in time: rank 0 waited over 2 s", str(error))
    assert f"two-shot all-reduce + norm (flags): its finished rows, call {1 << 33} of the workspace" in str(error)
    assert lines == [f"a fused call failed: PeerTimeoutError: {error}"]
    assert heard.threads == ["fusewire watchdog"]
    with pytest.raises(PeerTimeoutError, match="did not take part"):
        workspace.made.check()
    assert fine.fault() is None


def test_another_call_of_a_peer_is_a_mismatch(dog):
    heard, workspace = Heard(), held()
    dog.on_fault(heard)
    workspace.made.give_up(kind=OTHER_CALL, rank=1, call=5)
    dog.watch(workspace)
    heard.wait()
    assert isinstance(heard.errors[0], RankMismatchError)
    assert "rank 1 makes another call than rank 0" in str(heard.errors[0])
    assert "makes call 5 of the workspace" in str(heard.errors[0])


def test_a_fault_is_reported_once_whoever_looks(dog, lines):
    heard, workspaces = Heard(), [held() for _ in range(8)]
    dog.on_fault(heard)
    for workspace in workspaces:
        dog.watch(workspace)
    for call, workspace in enumerate(workspaces):
        workspace.made.give_up(call=call)
    looks = [threading.Thread(target=dog._look, args=(workspace,)) for workspace in workspaces * 4]
    for thread in looks:
        thread.start()
    for thread in looks:
        thread.join()
    for workspace in workspaces:
        heard.wait()
        dog.unwatch(workspace)
    assert len(lines) == len(heard.errors) == 8
    assert sorted(int(re.search(r"call (\d)", str(error))[1]) for error in heard.errors) == list(range(8))


def test_the_last_look_is_at_the_end(dog, monkeypatch):
    """A fault just before a workspace is closed is reported too."""
    monkeypatch.setenv("FUSEWIRE_WATCHDOG_INTERVAL_S", "1000")
    heard, workspace = Heard(), held()
    dog.on_fault(heard)
    dog.watch(workspace)
    workspace.made.give_up()
    dog.unwatch(workspace)
    assert len(heard.errors) == 1


def test_one_thread_for_all_and_none_without_workspaces(dog):
    def threads():
        return [thread for thread in threading.enumerate() if thread.name == "fusewire watchdog"]

    before = len(threads())
    for _ in range(3):
        first, second = held(), held()
        dog.watch(first)
        dog.watch(second)
        assert len(threads()) == before + 1
        assert dog._thread.daemon
        dog.unwatch(first)
        assert dog._thread.is_alive()
        dog.unwatch(second)
        dog.unwatch(second)
        assert len(threads()) == before


def test_handlers_can_be_removed_and_their_exceptions_stop_nothing(dog, lines):
    heard, gone, workspace = Heard(), Heard(), held()

    def bad(error):
        raise ValueError("odd")

    dog.on_fault(bad)
    remove = dog.on_fault(gone)
    dog.on_fault(heard)
    remove()
    remove()
    workspace.made.give_up()
    dog.watch(workspace)
    heard.wait()
    assert gone.errors == []
    assert lines[1:] == ["a handler of fusewire.on_fault raised ValueError: odd"]
    other = held()
    other.made.give_up()
    dog.watch(other)
    heard.wait()  # the thread is still there


def test_a_handler_may_close_the_workspace(dog):
    workspace, ended = held(), threading.Event()

    def close(error):
        dog.unwatch(workspace)
        ended.set()

    dog.on_fault(close)
    dog.watch(workspace)
    workspace.made.give_up()
    assert ended.wait(PATIENCE_S)


@pytest.mark.parametrize("text", ["explode", "0"])
def test_an_unknown_action_is_an_error(text, monkeypatch):
    monkeypatch.setenv(ACTION_VARIABLE, text)
    with pytest.raises(ConfigError, match=f"{ACTION_VARIABLE}='{text}' is none of raise, abort"):
        module.action()


def test_a_forked_child_watches_nothing():
    workspace = held()
    WATCHDOG.watch(workspace)
    try:
        pid = os.fork()
        if pid == 0:  # the child has no thread, and may watch something of its own
            state = not WATCHDOG._watched and WATCHDOG._thread is None
            other = held()
            WATCHDOG.watch(other)
            alive = WATCHDOG._thread.is_alive()
            WATCHDOG.unwatch(other)
            os._exit(0 if state and alive else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert WATCHDOG._thread.is_alive()
    finally:
        WATCHDOG.unwatch(workspace)


# --- In a process of its own
# ------------------------------------------------------------------------------------


PROGRAM = """
import sys, threading
sys.path.insert(0, {tests!r})
import fusewire
from support.words import held, register
from fusewire.custom_ops.coordination.watchdog import WATCHDOG
workspace, heard = held(), threading.Event()
register(workspace)
WATCHDOG.watch(workspace)
fusewire.on_fault(lambda error: (print("heard", type(error).__name__, flush=True), heard.set()))
{body}
"""


def program(body, **environment):
    text = PROGRAM.format(tests=str(ROOT / "tests"), body=body)
    environment = {**os.environ, "FUSEWIRE_WATCHDOG_INTERVAL_S": "0.01", **environment}
    return subprocess.run([sys.executable, "-c", text], env=environment, capture_output=True, text=True, timeout=120)


def test_a_process_that_is_to_abort_is_gone():
    run = program("workspace.made.give_up()\nthreading.Event().wait()", **{ACTION_VARIABLE: ABORT})
    assert run.returncode == -signal.SIGABRT
    assert run.stdout == "heard PeerTimeoutError\n"  # handlers come first
    assert "a fused call failed: PeerTimeoutError: rank 1" in run.stderr
    assert f"{ACTION_VARIABLE}=abort: this process ends" in run.stderr


def test_a_process_ends_as_always_with_a_watchdog():
    run = program("print('end')")
    assert (run.returncode, run.stdout, run.stderr) == (0, "end\n", "")


def test_a_fault_at_the_end_of_a_process_is_reported():
    run = program("workspace.made.give_up()\nprint('end', flush=True)", FUSEWIRE_WATCHDOG_INTERVAL_S="1000")
    assert (run.returncode, run.stdout) == (0, "end\nheard PeerTimeoutError\n")
    assert run.stderr.count("a fused call failed") == 1


# --- The public names
# -------------------------------------------------------------------------------------------


def test_the_process_goes_on_by_default_and_check_raises(monkeypatch, lines):
    monkeypatch.setattr(REGISTRY, "entries", {})
    heard, workspace = Heard(), held()
    register(workspace)
    remove = fusewire.on_fault(heard)
    monkeypatch.setenv("FUSEWIRE_WATCHDOG_INTERVAL_S", "0.01")
    WATCHDOG.watch(workspace)
    try:
        fusewire.check()
        workspace.made.give_up()
        heard.wait()
        for _ in range(2):
            with pytest.raises(PeerTimeoutError, match="rank 1 of group"):
                fusewire.check()
        workspace.close()
        REGISTRY.entries.clear()
        fusewire.check()
    finally:
        remove()
        WATCHDOG.unwatch(workspace)
    assert len(lines) == 1
