"""The time limits: one variable scales them, each can be set, and they keep their order."""

from __future__ import annotations

import math
import re
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from fusewire.custom_ops.coordination import busy as busy_messages
from fusewire.custom_ops.coordination.busy import busy, poll_ranks
from fusewire.custom_ops.coordination.store import GroupStore, poll
from fusewire.custom_ops.coordination.timeouts import (
    TIMEOUT_VARIABLE,
    Limit,
    group_timeout_s,
    limit_s,
    outcome_timeout_s,
)
from fusewire.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
ORDER = (Limit.KERNEL, Limit.VOTE, Limit.AGREEMENT, Limit.ANNOUNCEMENT)


@pytest.fixture(autouse=True)
def _unset(monkeypatch):
    for name in (TIMEOUT_VARIABLE, *(limit.variable for limit in Limit)):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("base", ["", "600", "1", "3.3", "86400"])
def test_one_variable_scales_the_waits_and_keeps_their_order(base, monkeypatch):
    monkeypatch.setenv(TIMEOUT_VARIABLE, base)
    factor = float(base or 600) / 600
    for limit in Limit:
        assert math.isclose(limit_s(limit), limit.default_s * (factor if limit.scales else 1)), limit
    kernel, vote, agreement, announcement = map(limit_s, ORDER)
    assert kernel > outcome_timeout_s(vote) > vote > agreement > announcement


@pytest.mark.parametrize("limit", Limit)
def test_each_limit_has_a_variable_of_its_own(limit, monkeypatch):
    wanted = {limit: limit.default_s * 1.01}
    monkeypatch.setenv(limit.variable, str(wanted[limit]))
    for other in Limit:
        assert limit_s(other) == wanted.get(other, other.default_s)
    monkeypatch.delenv(limit.variable)
    assert limit_s(limit) == limit.default_s


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "soon", "5s"])
@pytest.mark.parametrize("name", [TIMEOUT_VARIABLE, Limit.KERNEL.variable, Limit.PUBLICATION.variable])
def test_a_bad_value_is_an_error_that_names_the_variable(name, text, monkeypatch):
    monkeypatch.setenv(name, text)
    with pytest.raises(ConfigError, match=f"{name}='{text}' is not a positive number of seconds"):
        limit_s(Limit.KERNEL)


@pytest.mark.parametrize(
    ("limit", "value"),
    [
        (Limit.KERNEL, 800.0),  # shorter than a vote with its outcome
        (Limit.VOTE, 599.0),
        (Limit.VOTE, 900.0),
        (Limit.AGREEMENT, 661.0),
        (Limit.ANNOUNCEMENT, 600.0),
        (Limit.PUBLICATION, 100.0),
    ],
)
def test_limits_out_of_order_are_an_error(limit, value, monkeypatch):
    monkeypatch.setenv(limit.variable, str(value))
    for each in ORDER:
        with pytest.raises(ConfigError, match=r"out of order: FUSEWIRE_KERNEL_TIMEOUT_S .* FUSEWIRE_TIMEOUT_S \(600\)"):
            limit_s(each)


def test_every_variable_is_documented():
    text = (ROOT / "docs" / "reliability.md").read_text()
    for limit in Limit:
        assert f"| `{limit.variable}` | {limit.default_s:g} |" in text, limit
    assert TIMEOUT_VARIABLE in text


def test_no_other_module_has_a_limit_of_its_own():
    """Constants in seconds."""
    paths = [path for folder in ("custom_ops", "fusion_passes", "fusewire") for path in (ROOT / folder).rglob("*.py")]
    found = {
        name: value
        for path in paths
        for name, value in re.findall(r"^(\w+_S|\w+_S, \w+_S) = (.*)$", path.read_text(), re.MULTILINE)
    }
    assert found == {
        "DEFAULT_TIMEOUT_S": "600.0",
        "BUDGET_S": "30.0",  # what the tuner aims at
        "_EVERY_S": "30.0  # between two lines of progress",
        "_SPIN_S": "0.001",  # pauses between two looks
        "_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S": "0.0005, 0.05",
    }


# --- Busy ranks
# -----------------------------------------------------------------------------------------------


@pytest.fixture
def world(monkeypatch):
    monkeypatch.setenv(Limit.BUSY_INTERVAL.variable, "0.01")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield GroupStore(dist.group.WORLD)
    dist.destroy_process_group()


def changes(store, count=3):
    """Whether the message of this rank changes."""
    seen = set()
    for _ in range(2000):
        seen.add(store.get("busy/0"))
        if len(seen - {None}) >= count:
            return True
        time.sleep(0.001)
    return False


def test_a_busy_rank_says_so_until_the_outermost_block_ends(world):
    with busy():
        with busy():
            assert changes(world)
        assert changes(world)
    assert world.get("busy/0") is None
    assert busy_messages._thread is None


def test_a_block_that_raises_ends_the_messages(world):
    with pytest.raises(ValueError, match="odd"), busy():
        int("odd")
    assert busy_messages._thread is None


def test_the_messages_of_a_compilation_without_end_stop(world, monkeypatch):
    monkeypatch.setenv(Limit.COMPILATION.variable, "0.05")
    with busy():
        busy_messages._thread.join(20)
        assert not busy_messages._thread.is_alive()
        assert world.get("busy/0") is None


def test_a_busy_rank_that_waits_itself_is_silent(world):
    """Otherwise two ranks that compile different graphs would wait for each other until their
    compilers' limit."""
    with busy():
        found = poll_ranks(lambda: [0], lambda: None, 0.3)  # for itself
        assert found is None


def test_another_threads_wait_does_not_silence_a_busy_rank(world):
    ended = []
    with busy():
        thread = threading.Thread(target=lambda: ended.append(poll_ranks(list, lambda: bool(ended) or None, 0.3)))
        thread.start()
        assert changes(world)
        thread.join()


def test_messages_restart_a_wait(world):
    """The awaited rank is this process, busy in another thread."""
    started, stop = threading.Event(), threading.Event()

    def work():
        with busy():
            started.set()
            stop.wait(20)

    worker = threading.Thread(target=work)
    worker.start()
    assert started.wait(20)
    begun = time.monotonic()
    look = lambda: True if time.monotonic() - begun > 1.0 else None  # noqa: E731
    try:
        assert poll_ranks(lambda: [0], look, 0.2)
        begun = time.monotonic()
        assert poll_ranks(lambda: [1], look, 0.2) is None  # another rank's wait goes on without messages
    finally:
        stop.set()
        worker.join()


def test_without_ranks_nothing_is_sent():
    with busy():
        assert busy_messages._thread is None
    assert poll_ranks(lambda: [0], lambda: 1, 0.1) == 1


def test_a_wait_counts_from_its_begin_if_the_awaited_has_sent_before():
    """The first message that a wait reads is no news."""
    begun = time.monotonic()
    assert poll(lambda: None, 0.2, progress=lambda: "always the same") is None
    assert time.monotonic() - begun < 5


def test_the_groups_own_timeout_bounds_the_agreement(world, monkeypatch):
    assert group_timeout_s(dist.group.WORLD) == 600
    monkeypatch.setenv(TIMEOUT_VARIABLE, "7200")
    assert group_timeout_s(dist.group.WORLD) == 1800  # of gloo
