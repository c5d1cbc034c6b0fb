"""Graphs of fused operators and collectives, written by hand."""

from __future__ import annotations

import operator

import torch

from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm
from fusewire.custom_ops.ops.sandwich_norm import all_reduce_sandwich_norm
from fusewire.custom_ops.ops.sharded_norm import all_reduce_rms_norm_sharded
from fusewire.patterns.collectives import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, WAIT

PLAIN, SANDWICH = all_reduce_rms_norm.torch_op, all_reduce_sandwich_norm.torch_op
SHARDED = all_reduce_rms_norm_sharded.torch_op
GROUP = "ranks"
NORM = (1e-6, 0.0, "scale_then_round")


class Build:
    """A graph by hand: `x`, `r` and `w` are its inputs, the methods its operations."""

    def __init__(self):
        self.graph = torch.fx.Graph()
        self.x, self.r, self.w = (self.graph.placeholder(name) for name in ("x", "r", "w"))

    def call(self, target, *args, **kwargs):
        return self.graph.call_function(target, args, kwargs)

    def reduced(self, x=None, group=GROUP):
        return self.call(WAIT, self.call(ALL_REDUCE, self.x if x is None else x, "sum", group))

    def gathered(self, x=None, group=GROUP):
        return self.call(WAIT, self.call(ALL_GATHER, self.x if x is None else x, 2, group))

    def scattered(self, group=GROUP):
        return self.call(WAIT, self.call(REDUCE_SCATTER, self.x, "sum", 2, group))

    def item(self, call, index):
        return self.call(operator.getitem, call, index)

    def fused(self, residual=None, weight=None, group=GROUP):
        return self.call(PLAIN, self.x, residual, weight, *NORM, group)

    def sandwich(self, residual, weight=None, inner_weight=None):
        return self.call(SANDWICH, self.x, residual, weight, *NORM, inner_weight, *NORM, GROUP)

    def sharded(self, residual=None, weight=None):
        return self.call(SHARDED, self.x, residual, weight, *NORM, None, 0.0, 0.0, "", GROUP)
