"""What may stand between an all-reduce and its norm, and how it moves out of the way.

Views move before the all-reduce (it works elementwise). A bias joins the residual; a scale moves before the
all-reduce (a sum of multiples is the multiple of the sum): both round elsewhere than the source did, so they are
carried only with PassConfig.allow_reassociation.

A scale may move only if it is the same on every rank. A number in the program is; of a tensor the graph does not say.
A one-element parameter, buffer or input (Gemma's embedding scale, a layer scale) is taken to be replicated, as all of
a tensor-parallel model's unsharded parameters are, unless PassConfig.assume_replicated_scales is off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fusewire.fusion_passes.config import PassConfig
from fusewire.fusion_passes.graph_tools import (
    VIEWS,
    cast_source,
    dtype_of,
    is_number,
    is_vector,
    last_size,
    plain_add,
    plain_mul,
    same_size,
    value_of,
)
from fusewire.patterns.all_reduce import AllReduce, read_all_reduce


@dataclass(frozen=True)
class Path:
    """The way from an all-reduce's value to the value that is added or normalised.

    Attributes:
        all_reduce: where it starts.
        steps: the nodes on the way, first the one that reads the all-reduce's value.
        end: its last node (the all-reduce's value itself if nothing stands between).
        views, scales, biases: of the steps, those that move before the all-reduce, or join the residual.
        problem: why the way cannot be cleared, or "".
    """

    all_reduce: AllReduce
    steps: tuple[Node, ...]
    end: Node
    views: tuple[Node, ...] = ()
    scales: tuple[Any, ...] = ()
    biases: tuple[Node, ...] = ()
    problem: str = ""


class PathFinder:
    """Finds the way back from a node to the all-reduce that it comes from."""

    def __init__(self, by_value: dict[Node, Node], config: PassConfig) -> None:
        self.by_value = by_value
        self.allow_reassociation = config.allow_reassociation
        self.assume_replicated_scales = config.assume_replicated_scales

    def find(self, node: Any, limit: int = 12) -> Path | None:
        """The way from an all-reduce to this node through steps that can be carried, or None."""
        steps: list[Node] = []
        views: list[Node] = []
        scales: list[Any] = []
        biases: list[Node] = []
        problem = ""
        current = node
        while isinstance(current, Node) and current not in self.by_value and len(steps) < limit:
            hidden = last_size(current)
            following: Any = None
            if current.target in VIEWS:
                following = current.args[0]
                views.append(current)
                if not same_size(hidden, last_size(following)):
                    problem = "a view between the all-reduce and the norm changes the last dimension"
            elif (source := cast_source(current)) is not None:
                following = source
                if dtype_of(source) != dtype_of(current):
                    problem = (
                        f"a cast from {dtype_of(source)} to {dtype_of(current)} stands between the all-reduce and the "
                        "norm; reduce in the dtype that the norm takes"
                    )
            elif (scaled := self._scaled(current)) is not None:
                following, factor = scaled
                scales.append(factor)
            elif (biased := self._biased(current, hidden)) is not None:
                following, bias = biased
                biases.append(bias)
                if scales:
                    problem = "a scale after a bias stands between the all-reduce and the norm"
            else:
                return None
            steps.append(current)
            current = following
        reduce = self.by_value.get(current) if isinstance(current, Node) else None
        found = None if reduce is None else read_all_reduce(reduce)
        if found is None:
            return None
        if (scales or biases) and not self.allow_reassociation:
            problem = problem or (
                "a scale or a bias stands between the all-reduce and the norm; moving it rounds elsewhere, which "
                "allow_reassociation=False forbids"
            )
        return Path(
            found,
            tuple(reversed(steps)),
            node,
            tuple(reversed(views)),
            tuple(reversed(scales)),
            tuple(reversed(biases)),
            problem,
        )

    def _scaled(self, node: Node) -> tuple[Any, Any] | None:
        factors = plain_mul(node)
        if factors is None:
            return None
        for value, factor in (factors, factors[::-1]):
            if isinstance(value, Node) and (is_number(factor) or self._is_replicated_scale(factor, value)):
                return value, factor
        return None

    def _is_replicated_scale(self, factor: Any, value: Node) -> bool:
        tensor, scaled = value_of(factor), value_of(value)
        return (
            self.assume_replicated_scales
            and tensor is not None
            and scaled is not None
            and factor.op in ("placeholder", "get_attr")
            and tuple(tensor.shape) in ((), (1,))
            and scaled.dim() > 0
            and torch.result_type(scaled, tensor) == scaled.dtype
        )

    def _biased(self, node: Node, hidden: Any) -> tuple[Any, Node] | None:
        operands = plain_add(node)
        if operands is None:
            return None
        a, b = operands
        for value, bias in ((a, b), (b, a)):
            if is_vector(bias, hidden) and not is_vector(value, hidden) and dtype_of(bias) == dtype_of(node):
                return value, bias
        return None
