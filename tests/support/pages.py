"""Reports with pictures, for tests of pictures and pages, and a reader of pages."""

from __future__ import annotations

import functools
import html.parser

import torch

from fusewire.fusion_passes.report.model import GraphReport
from fusewire.rendering.pictures import pictures_recorded

from support.blocks import NORMS, reduce_functional, tensors
from support.distributed import fake_group
from support.graphs import capture


def fuses(x, r, w):
    return NORMS["L"](r + reduce_functional(x), w, 1e-5)


def gated(x, r, w):
    return NORMS["L"](r + reduce_functional(x) * torch.sigmoid(r), w, 1e-5)


def layer_norm(x, r, w):
    return torch.nn.functional.layer_norm(r + reduce_functional(x), (x.shape[-1],), w)


def two_layers(x, r, w):
    h = r + reduce_functional(x.relu())
    h = h + reduce_functional(NORMS["L"](h, w, 1e-5).relu())
    h = h + reduce_functional(NORMS["L"](h, w, 1e-5).relu())
    return NORMS["L"](h, w, 1e-5)


def merged(x, r, w):
    return NORMS["L"](r + (reduce_functional(x) + reduce_functional(x.sin())), w, 1e-5)


def mixed(x, r, w):
    return fuses(x, r, w), gated(x.cos(), r, w), torch.relu(reduce_functional(x.sin()))


@functools.cache
def recorded(block, dtype=torch.bfloat16) -> GraphReport:
    """The report with pictures of one function's graph, on rank 0 of two."""
    with fake_group(2), pictures_recorded():
        return capture(block, *tensors(dtype)).report


class Reader(html.parser.HTMLParser):
    """Checks that tags are balanced, and collects what the page would load and its table rows."""

    EMPTY = frozenset({"meta", "link", "input", "br", "wbr", "path", "rect"})

    def __init__(self, text):
        super().__init__()
        self.open, self.loads, self.rows = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("src", "href", "action", "data", "srcset") and not value.startswith(("#", "data:,")):
                self.loads.append(value)
        if tag == "tr":
            self.rows.append(dict(attributes).get("data-status"))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
