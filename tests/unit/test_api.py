"""`fusewire.check()`: the error of a call that failed, without another call."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import fusewire
from fusewire.custom_ops.providers.symm_mem.provider import HeldWorkspace
from fusewire.custom_ops.workspaces.provider import Request, WorkspaceKey
from fusewire.custom_ops.workspaces.registry import REGISTRY, Entry
from fusewire.errors import PeerTimeoutError

CPU = torch.device("cpu")


@pytest.fixture
def entries(monkeypatch):
    """An empty registry of this test's own."""
    monkeypatch.setattr(REGISTRY, "entries", {})
    return REGISTRY.entries


def workspace(provider, error_check):
    made = SimpleNamespace(nbytes=0, rank=0, world_size=2, check=error_check, close=lambda: None)
    key = WorkspaceKey(provider, "group", torch.float32, 16)
    return HeldWorkspace(Request(key, None, CPU, 64), made)


def add(entries, provider, made):
    key = WorkspaceKey(provider, "group", torch.float32, 16)
    entries[key] = Entry(key, lambda: None, made, "" if made else "no memory")


def test_nothing_is_wrong_without_workspaces(entries):
    assert fusewire.check() is None
    add(entries, "refused", None)
    assert fusewire.check() is None


def test_the_error_of_any_workspace_is_raised(entries):
    add(entries, "refused", None)
    add(entries, "fine", workspace("fine", lambda: None))
    assert fusewire.check() is None
    failed = mock.Mock(side_effect=PeerTimeoutError("rank 1 did not take part"))
    add(entries, "failed", workspace("failed", failed))
    for _ in range(2):  # it stays wrong
        with pytest.raises(PeerTimeoutError, match="rank 1 did not take part"):
            fusewire.check()
    failed.assert_called_with()  # without waiting for the GPU


def test_a_closed_workspace_is_not_asked(entries):
    made = workspace("closed", mock.Mock(side_effect=AssertionError))
    add(entries, "closed", made)
    made.close()
    assert fusewire.check() is None
