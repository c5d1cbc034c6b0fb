"""Fuse the quantisation of a norm to FP8 into the fused operator before it.

If the norm is quantised differently, the first quantisation in the graph is fused, and the others
read the norm, which the operator then returns too. Equal quantisations, as of each of a layer's
projections, become one.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm
from fusewire.custom_ops.ops.quantization import GROUP, GROUP_SIZE, ROWS
from fusewire.custom_ops.ops.quantized_norm import (
    all_reduce_rms_norm_quantized,
    all_reduce_rms_norm_quantized_sharded,
)
from fusewire.custom_ops.ops.registry import NATIVE, IrOp, op_of_target
from fusewire.custom_ops.ops.sandwich_norm import all_reduce_sandwich_norm
from fusewire.custom_ops.ops.sharded_norm import NO_INNER, all_reduce_rms_norm_sharded
from fusewire.errors import NoProviderError, ProcessGroupError
from fusewire.fusion_passes.analysis.graph import (
    aten,
    cast_source,
    copy_origin,
    dtype_of,
    erase_unused,
    getitem,
    getitem_users,
    last_size,
    mutation_regions,
    new_call,
    prims,
    same_shape,
    same_size,
    sort_topologically,
    value_of,
)
from fusewire.fusion_passes.analysis.quantizations import quantizations_from, read_quantization
from fusewire.fusion_passes.analysis.quantizing_ops import Quantization
from fusewire.fusion_passes.analysis.replication import PROVED, Replication
from fusewire.fusion_passes.context import RunContext
from fusewire.patterns.collectives import positional

_PLAIN, _SANDWICH = all_reduce_rms_norm.torch_op, all_reduce_sandwich_norm.torch_op
_SHARDED, _QUANTIZED_SHARDED = all_reduce_rms_norm_sharded.torch_op, all_reduce_rms_norm_quantized_sharded.torch_op
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_NORM, _QUANTIZED, _SCALES = 0, 2, 3  # results of the quantised operators
_WITH_NORM = 12  # the position of their argument
ONLY_NATIVE = "only native can serve, and the program's own kernel is faster than its arithmetic"
_KINDS = {"tensor": "static FP8", "token": "FP8 per token", "group": "FP8 per group of 128"}


def fuse_quantization(graph: Graph, context: RunContext) -> bool:
    """Fuse the quantisations that the checks let through; return whether the graph changed."""
    return _QuantizationFuser(graph, context).run()


class _QuantizationFuser:
    """Fuses quantisations. If it refuses, the operator before stays as it is."""

    def __init__(self, graph: Graph, context: RunContext) -> None:
        self.graph = graph
        self.context = context
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.replication = Replication()
        self.regions: dict[Node, int] = {}
        self.refused = Counter[str]()
        self.unsorted = False

    def run(self) -> bool:
        changed = False
        for op in [node for node in self.graph.nodes if node.target in (_PLAIN, _SANDWICH, _SHARDED)]:
            for index, norm in list(getitem_users(op)):
                if index == _NORM:
                    changed = self._fuse(op, norm) or changed
        if self.unsorted:
            sort_topologically(self.graph)
        self.context.notes += [
            f"fuse_quantization: {count} quantisation{'s' * (count > 1)} not fused: {reason}"
            for reason, count in self.refused.items()
        ]
        return changed

    def _fuse(self, op: Node, norm: Node) -> bool:
        """Fuse a norm's quantisations of one kind; return whether there is one."""
        chosen: list[Quantization] = []
        for node in sorted(quantizations_from(norm), key=self.order.__getitem__):
            found = read_quantization(node, norm, self.order)
            if isinstance(found, Quantization) and not chosen:
                reason = self._refusal(op, found)
            elif isinstance(found, Quantization):
                same = (found.spec, found.scale) == (chosen[0].spec, chosen[0].scale)
                reason = "" if same else "the norm is quantised in another way too, which is fused"
            else:
                reason = found
            if reason:
                self.refused[reason] += 1
            else:
                assert isinstance(found, Quantization)
                chosen.append(found)
        if chosen:
            self._replace(op, norm, chosen)
        return bool(chosen)

    def _refusal(self, op: Node, found: Quantization) -> str:
        """Return why a quantisation that is read cannot be fused, or ""."""
        x: Node = op.args[0]  # type: ignore[assignment]
        if dtype_of(x) not in _DTYPES:
            return f"the norm is in {dtype_of(x)}; the operators quantise bfloat16, float16 and float32"
        if found.spec.kind == GROUP and not _divides(last_size(x)):
            return f"the hidden size {last_size(x)} is no multiple of {GROUP_SIZE}"
        if found.spec.layout != ROWS and value_of(x).dim() != 2:  # type: ignore[union-attr]
            return "its scales are in columns, and the norm has more than two dimensions"
        if any(_sizes_of(old, x) is None for old in (*found.quantized, *found.scales)):
            return "it has several dynamic sizes that the all-reduce's input does not have"
        if found.call is not None and self._only_native(op):
            return ONLY_NATIVE
        if found.scale is None:
            return ""
        verdict = self.replication.judge(found.scale, positional(op)[-2])
        if op.target is _SHARDED and verdict.kind != PROVED and not self.context.config.assume_replicated_residuals:
            return f"the scale {verdict.reason} and may differ between ranks (assume_replicated_residuals=False)"
        return self._why_not_after(op, found.scale)

    def _only_native(self, op: Node) -> bool:
        """Return whether no provider but native can serve a fused operator on a GPU."""
        *arguments, policy = positional(op)
        ir_op = op_of_target(op.target)
        assert ir_op is not None
        return only_native(ir_op, arguments, policy or self.context.config.policy(all_reduce_rms_norm.name))

    def _why_not_after(self, op: Node, scale: Node) -> str:
        """Return why the operator cannot stand after its scale, or ""."""
        if self.order[scale] < self.order[op]:
            return ""
        self.regions = self.regions or mutation_regions(self.graph)
        if self.regions[scale] != self.regions[op]:
            return "its scale is computed after something that is written in place"
        group, node = positional(op)[-2], op
        while node is not scale:
            node = node.next
            if node.op == "call_function" and group in (*node.args, *node.kwargs.values()):
                return f"its scale is computed after the group's next collective ({node.name})"
        return ""

    def _replace(self, op: Node, norm: Node, chosen: Sequence[Quantization]) -> None:
        """Replace an operator by its quantised form, and what the quantisations compute."""
        first = chosen[0]
        scale = first.scale
        last = op if scale is None or self.order[scale] < self.order[op] else scale
        self.unsorted |= last is not op
        with self.graph.inserting_before(last.next):
            if scale is not None and dtype_of(scale) is not torch.float32:
                scale = self._call(prims.convert_element_type.default, (scale, torch.float32), op)
            new = self._quantized(op, scale, str(first.spec))
            items = {index: getitem(self.graph, new, index) for index in (_QUANTIZED, _SCALES)}
        for index, item in list(getitem_users(op)):
            with self.graph.inserting_before(items[_QUANTIZED]):
                item.replace_all_uses_with(getitem(self.graph, new, index))
            self.graph.erase_node(item)
        self.graph.erase_node(op)
        for found in chosen:
            if found.call is not None and not found.call.functional:
                self.graph.erase_node(found.call.node)
            for index, olds in ((_QUANTIZED, found.quantized), (_SCALES, found.scales)):
                for old in olds:
                    self._hand_over(old, items[index], new)
            if found.call is not None and found.call.functional:
                erase_unused(found.call.node)
        self._drop_unused(new)

    def _call(self, target: object, arguments: tuple[object, ...], origin: Node) -> Node:
        return new_call(self.graph, target, arguments, {}, origin)

    def _quantized(self, op: Node, scale: Node | None, quant: str) -> Node:
        """Return a new quantised operator for a fused one, which it replaces in the report too."""
        *norms, group, policy = positional(op)
        inner = norms[6:] or [None, 0.0, 0.0, NO_INNER]
        target = _QUANTIZED_SHARDED if op.target is _SHARDED else all_reduce_rms_norm_quantized.torch_op
        arguments = (*norms[:6], *inner, scale, quant, True, group, *([policy] if policy else []))
        new = self._call(target, arguments, op)
        copy_origin(op, new)
        new.meta.update({key: value for key, value in op.meta.items() if key.startswith("fusewire_")})
        name: str = op.meta.get("fusewire_all_reduce", "")
        fused = self.context.fused.get(name)
        if fused is not None:
            kind = _KINDS[quant.split(" ")[0]]
            self.context.fused[name] = dataclasses.replace(fused, fusion=f"{fused.fusion} + {kind}")
        return new

    def _hand_over(self, old: Node, result: Node, op: Node) -> None:
        """Use a result in place of a node of the same values, in its shape and dtype."""
        if old._erased:  # read by a quantisation before
            return
        value, new = value_of(old), result
        assert value is not None
        if value.dtype != dtype_of(result):  # a narrow scale, which its readers cast to fp32
            for user in list(old.users):
                if cast_source(user) is old and dtype_of(user) == dtype_of(result):
                    self._hand_over(user, result, op)
            if old._erased:
                return
        with self.graph.inserting_before(result.next):
            if not same_shape(old, result):
                new = self._call(aten.reshape.default, (new, self._sizes(old, op)), old)
            if dtype_of(new) != dtype_of(old):
                new = self._call(prims.convert_element_type.default, (new, value.dtype), old)
        old.replace_all_uses_with(new)
        erase_unused(old)

    def _sizes(self, old: Node, op: Node) -> list[int | Node]:
        """Return a node's sizes as arguments of a call; symbolic ones are those of op's input."""
        x: Node = op.args[0]  # type: ignore[assignment]
        sizes, given = _sizes_of(old, x), value_of(x)
        assert sizes is not None
        assert given is not None
        found: list[int | Node] = []
        for size in sizes:
            if isinstance(size, int):
                found.append(size)
                continue
            dim = next(i for i, other in enumerate(given.shape) if same_size(size, other))
            found.append(self._call(aten.sym_size.int, (x, dim), old))
        return found

    def _drop_unused(self, new: Node) -> None:
        """Erase results that nothing reads; if the norm is one, the operator need not return it."""
        for _, item in list(getitem_users(new)):
            if not item.users:
                self.graph.erase_node(item)
        if any(index == _NORM for index, _ in getitem_users(new)):
            return
        new.args = (*new.args[:_WITH_NORM], False, *new.args[_WITH_NORM + 1 :])
        norm, *others = new.meta["val"]
        with norm.fake_mode:
            new.meta["val"] = (norm.new_empty((0,)), *others)


def only_native(op: IrOp, arguments: Sequence[Any], policy: str) -> bool:
    """Return whether no provider but native can serve a fused operator on a GPU.

    Args:
        op: an operator with the providers of all_reduce_rms_norm.
        arguments: a call's arguments; tensors are nodes.
    """
    values = tuple(value_of(a) if isinstance(a, Node) else a for a in arguments)
    if not _on_gpu(values[0]):
        return False
    judged = values if op.derives_from is None else op.base_args(values)
    try:
        choice = all_reduce_rms_norm.choose(*judged, policy=policy, static=True, machine=False)
    except (NoProviderError, ProcessGroupError):
        return False
    return choice.provider.name == NATIVE


def _sizes_of(node: Node, x: Node) -> list[int | torch.SymInt] | None:
    """Return a node's sizes, -1 for a symbolic one if it is the only one.

    Several must be sizes of x, which the graph can ask for; else return None.
    """
    value, given = value_of(node), value_of(x)
    assert value is not None
    assert given is not None
    symbolic = [size for size in value.shape if not isinstance(size, int)]
    if len(symbolic) <= 1:
        return [size if isinstance(size, int) else -1 for size in value.shape]
    known = all(any(same_size(size, other) for other in given.shape) for size in symbolic)
    return list(value.shape) if known else None


def _on_gpu(x: Any) -> bool:
    return bool(x.is_cuda)


def _divides(hidden: object) -> bool:
    return isinstance(hidden, int) and hidden % GROUP_SIZE == 0
