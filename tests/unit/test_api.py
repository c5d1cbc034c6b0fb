"""`fusewire.check()`: the error of a call that failed, without another call."""

from __future__ import annotations

import pytest

import fusewire
from fusewire.custom_ops.workspaces.provider import WorkspaceKey
from fusewire.custom_ops.workspaces.registry import REGISTRY, WorkspaceEntry
from fusewire.errors import PeerTimeoutError

from support.words import held, register


@pytest.fixture(autouse=True)
def entries(monkeypatch):
    """An empty registry of this test's own."""
    monkeypatch.setattr(REGISTRY, "entries", {})
    return REGISTRY.entries


def test_nothing_is_wrong_without_workspaces(entries):
    assert fusewire.check() is None
    key = WorkspaceKey("refused", "group", None, 16)
    entries[key] = WorkspaceEntry(key, lambda: None, None, "no memory")
    assert fusewire.check() is None


def test_the_error_of_any_workspace_is_raised():
    fine, failed = held("fine"), held("failed")
    register(fine)
    register(failed)
    assert fusewire.check() is None
    failed.made.give_up()
    for _ in range(2):  # it stays wrong
        with pytest.raises(PeerTimeoutError, match="rank 1 of group 'group' did not take part"):
            fusewire.check()


def test_a_closed_workspace_is_not_asked():
    workspace = held()
    register(workspace)
    workspace.made.give_up()
    fusewire.close()
    assert fusewire.check() is None
