"""The pictures around each all-reduce: what they show, and how they are drawn."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

import fusewire
from fusewire.fusion_passes.observer import observer_of
from fusewire.fusion_passes.report.model import graph_reports_from_json, graph_reports_to_json
from fusewire.fusion_passes.report.store import Report
from fusewire.rendering import pictures
from fusewire.rendering.drawing import Box, Drawing, draw
from fusewire.rendering.page import page
from fusewire.rendering.pictures import pictures_recorded

from support.blocks import NORMS, reduce_functional, tensors
from support.coverage import measure
from support.graphs import capture
from support.pages import fuses, gated, layer_norm, merged, mixed, recorded, two_layers


def roles(drawing, role):
    return sorted(box.label for box in drawing.boxes if box.role == role)


def test_picture_of_a_fused_site():
    report = recorded(fuses)
    (picture,) = report.pictures
    before, after = picture.before, picture.after
    assert roles(before, "collective") == ["all-reduce"]
    assert {"residual", "weight"} <= set(roles(before, "input"))
    assert roles(before, "norm") == sorted(
        ["to float32", "square", "mean", "+ epsilon", "1 / √", "multiply", "to bfloat16", "multiply"]
    )
    assert roles(before, "obstacle") == []
    assert roles(after, "fused") == ["all-reduce + add + RMSNorm"]
    assert roles(after, "collective") == roles(after, "norm") == []
    assert roles(after, "input") == roles(before, "input")
    assert {text for _, _, text in after.edges} == {"", "norm"}


def test_edges_follow_the_computation():
    (picture,) = recorded(fuses).pictures
    named = {(picture.before.boxes[a].label, picture.before.boxes[b].label) for a, b, _ in picture.before.edges}
    assert {("all-reduce", "add"), ("residual", "add"), ("square", "mean"), ("mean", "+ epsilon")} <= named
    assert all(a < b for a, b, _ in picture.before.edges)


def test_picture_of_a_sandwich_shows_both_norms_as_one():
    def sandwich(x, r, w):
        h = r + NORMS["G"](reduce_functional(x), w, 1e-6)
        return h, NORMS["G"](h, w, 1e-6)

    (picture,) = recorded(sandwich).pictures
    assert roles(picture.after, "fused") == ["all-reduce + RMSNorm + add + RMSNorm"]
    assert {"residual", "weight"} <= set(roles(picture.after, "input"))
    assert {text for _, _, text in picture.after.edges} == {"", "norm", "sum"}


def test_pictures_of_sequence_parallelism():
    with pictures_recorded():
        measure("native_sequence")
    (graph,) = fusewire.report().graphs
    assert len(graph.pictures) >= 3
    text = page(fusewire.report(), "title")
    assert "left as it is" not in text
    for picture in graph.pictures:
        assert "reduce-scatter" in roles(picture.before, "collective")
        (label,) = roles(picture.after, "fused")
        assert label.startswith("reduce-scatter")
        assert label.endswith("all-gather")


def test_picture_of_a_refused_site_marks_the_obstacle():
    (picture,) = recorded(gated).pictures
    assert picture.after is None
    assert roles(picture.before, "obstacle") == ["multiply"]


def test_picture_of_a_layer_norm():
    (picture,) = recorded(layer_norm, torch.float32).pictures
    assert [label for label in roles(picture.before, "obstacle") if "LayerNorm" in label or "mean" in label]


def test_picture_of_merged_all_reduces_is_shared():
    report = recorded(merged)
    (picture,) = report.pictures
    assert [entry.picture for entry in report.entries] == [0, 0]
    assert roles(picture.before, "collective") == ["all-reduce", "another all-reduce"]
    assert roles(picture.after, "collective") == []
    assert "add" in roles(picture.after, "step")


def test_an_all_reduce_that_stays_is_in_both_pictures():
    def experts(x, r, w):
        shared = reduce_functional(x.sin()) * torch.sigmoid(r)
        return NORMS["L"](r + (reduce_functional(x) + shared), w, 1e-5)

    report = recorded(experts)
    fused = next(entry for entry in report.entries if entry.status == "fused")
    picture = report.pictures[fused.picture]
    assert roles(picture.before, "collective") == ["all-reduce", "another all-reduce"]
    assert roles(picture.after, "collective") == ["another all-reduce"]


def test_the_same_site_in_every_layer_is_one_picture():
    report = recorded(two_layers)
    assert report.entries[1].picture == report.entries[0].picture
    assert len(report.entries) == 3
    assert len(report.pictures) == 2  # the last sum is read by the graph's result, the others by the next layer


def test_module_of_a_model_that_a_function_closes_over(fake_world):
    class Model(torch.nn.Module):
        def forward(self, x):
            return NORMS["L"](reduce_functional(x), x[0], 1e-5)

    model = torch.nn.Sequential(Model())
    (entry,) = capture(lambda x: model(x), tensors()[0]).report.entries
    assert entry.module == "model.0"


def test_pictures_are_kept_only_where_wanted(fake_world):
    report = capture(fuses, *tensors()).report
    assert report.pictures == ()
    assert [entry.picture for entry in report.entries] == [-1]


def test_reports_beside_the_compile_cache_hold_no_pictures():
    report = recorded(mixed)
    assert report.pictures
    entries = tuple(dataclasses.replace(entry, picture=-1) for entry in report.entries)
    (read,) = graph_reports_from_json(graph_reports_to_json([report]))
    assert read == dataclasses.replace(report, pictures=(), entries=entries)


def test_nothing_is_drawn_while_nobody_observes(fake_world, monkeypatch):
    """Not even the graph is copied for an observer."""
    monkeypatch.setattr(pictures.PictureRecorder, "__init__", lambda *arguments: pytest.fail("drawn"))
    capture(fuses, *tensors())
    assert observer_of(lambda: pytest.fail("copied")) is None


def test_a_picture_that_fails_costs_nothing(monkeypatch):
    def broken(*arguments):
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(pictures, "_Before", broken)
    report = recorded.__wrapped__(fuses)
    assert report.entries[0].status == "fused"
    assert report.entries[0].picture == -1
    assert report.notes == ("pictures for the HTML report are missing: ZeroDivisionError: planted",)
    assert "planted" in page(Report((report,)), "title")


# --- How they are drawn -------------------------------------------------------------------------------------

DIAMOND = Drawing(
    (Box("in", "input"), Box("left", "step"), Box("right with a long name", "norm", "detail"), Box("out", "reader")),
    ((0, 1, "norm"), (0, 2, "sum"), (1, 3, ""), (2, 3, ""), (0, 3, "")),
)


def rectangles(svg):
    found = re.findall(r'<rect x="([-\d.]+)" y="([-\d.]+)" width="([\d.]+)" height="([\d.]+)"', svg)
    return [tuple(map(float, each)) for each in found]


def overlap(a, b):
    return a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and a[1] < b[1] + b[3] and b[1] < a[1] + a[3]


def check_drawing(drawing):
    svg = draw(drawing, "label")
    boxes = rectangles(svg)
    assert len(boxes) == len(drawing.boxes)
    for start, end, _ in drawing.edges:
        assert boxes[start][1] + boxes[start][3] < boxes[end][1], "an edge does not point down"
    assert not any(overlap(a, b) for i, a in enumerate(boxes) for b in boxes[:i])
    width, height = map(float, re.search(r'viewBox="0 0 (\d+) (\d+)"', svg).groups())
    for x, y, w, h in boxes:
        assert min(x, y) >= 0
        assert x + w <= width
        assert y + h <= height
    return svg


def test_boxes_do_not_overlap_and_edges_point_down():
    assert check_drawing(DIAMOND).count('class="wire"') == len(DIAMOND.edges)


@pytest.mark.parametrize("block", [fuses, gated, merged, two_layers, mixed], ids=lambda block: block.__name__)
def test_real_pictures_are_drawn_well(block):
    for picture in recorded(block).pictures:
        for drawing in filter(None, (picture.before, picture.after)):
            check_drawing(drawing)


def test_text_of_a_box_is_escaped():
    svg = draw(Drawing((Box("<b>&", "step", '"x"'),), ()), "<label>")
    assert "<b>" not in svg
    assert "&lt;b&gt;&amp;" in svg
    assert "<label>" not in svg
