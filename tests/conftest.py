"""Shared fixtures."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def fake_world():
    """torch's fake process group of two ranks, in this process."""
    from distributed import fake_group

    with fake_group(2) as group:
        yield group


@pytest.fixture(autouse=True)
def _fresh_report():
    import fusewire

    fusewire.clear_report()
    yield
    fusewire.clear_report()
