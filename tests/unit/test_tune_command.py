"""The picture and the text of `fusewire tune`."""

from __future__ import annotations

import dataclasses

import pytest

from fusewire.cli import tune as command
from fusewire.custom_ops.dispatch import cost_tables
from fusewire.custom_ops.dispatch.table_store import Table
from fusewire.custom_ops.tuning import tuner

from support.tables import KEY, TABLE

SHIPPED = Table(
    dataclasses.replace(KEY, hidden=8192, world_size=4),
    {
        "native": ((1, 15.1), (64, 24.2), (1024, 124.7), (8192, 811.7)),
        cost_tables.ONE_SHOT: ((1, 6.6), (64, 15.9), (1024, 189.6)),
        cost_tables.TWO_SHOT: ((64, 27.0), (1024, 119.5), (8192, 858.1)),
        cost_tables.SYMM_ONE_SHOT: ((1, 3.3), (64, 15.1)),
        cost_tables.SYMM_TWO_SHOT: ((1, 4.5), (64, 10.8), (1024, 87.6), (8192, 601.7)),
    },
    measured="then",
    seconds=20.0,
    link_rate=400e9,
)


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    command.draw([SHIPPED], str(one))
    command.draw([SHIPPED, dataclasses.replace(TABLE, link_rate=None)], str(two))
    for path in (one, two):
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    from matplotlib.figure import Figure

    panel = Figure().subplots()
    command._draw_one(panel, SHIPPED)
    lines = {line.get_label(): line for line in panel.get_lines()}
    assert set(lines) == {*SHIPPED.times, "link floor of two-shot (400 GB/s)"}
    assert list(lines["native"].get_xydata()[-1]) == [8192, 811.7]
    floor = lines["link floor of two-shot (400 GB/s)"].get_xydata()
    assert list(floor[-1]) == [8192, SHIPPED.floor(8192)]
    assert (panel.get_xscale(), panel.get_yscale()) == ("log", "log")
    panel = Figure().subplots()
    command._draw_one(panel, dataclasses.replace(SHIPPED, link_rate=None))
    assert "no link floor: the rate was not measured" in [text.get_text() for text in panel.get_legend().get_texts()]


def test_the_text_marks_the_fastest():
    text = command.as_text(tuner.Tuned(SHIPPED, "/path", ""))
    row = next(line for line in text.splitlines() if line.strip().startswith("8192"))
    assert row.split() == ["8192", "811.7", "858.1", "601.7*"]
    assert "Links: 400 GB/s" in text
    assert "The table: /path" in text
    text = command.as_text(tuner.Tuned(TABLE, "/path", "not saved"))
    assert "LEFT OUT: x/y: wrong" in text
    assert "Not available: symm_mem: no" in text
    assert "Note: a note" in text
    assert "not saved" in text
    assert "The table:" not in text
