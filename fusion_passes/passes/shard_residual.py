"""Keep the residual sharded by rows between fused operators.

If only the next fused operator of a decoder reads the residual, it need not be complete on every
rank: each rank adds and normalises its own rows, and only normalised rows are sent.
Where something else reads a residual (the last hidden state, an auxiliary head), it is gathered,
which costs about half an all-reduce. A chain of operators is sharded only if it is long enough to
pay for its gathers.

The rank that owns a row adds its own residual and multiplies by its own weight, for all ranks. So
both must be equal on every rank; where the graph does not prove that,
PassConfig.assume_replicated_residuals decides.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch.fx import Graph, Node

from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm
from fusewire.custom_ops.ops.quantized_norm import (
    all_reduce_rms_norm_quantized,
    all_reduce_rms_norm_quantized_sharded,
)
from fusewire.custom_ops.ops.sandwich_norm import all_reduce_sandwich_norm
from fusewire.custom_ops.ops.sharded_norm import NO_INNER, all_reduce_rms_norm_sharded, gather_rows, shard_rows
from fusewire.fusion_passes.analysis.graph import (
    copy_origin,
    getitem,
    getitem_users,
    is_unbacked,
    new_call,
    same_shape,
    sort_topologically,
    value_of,
)
from fusewire.fusion_passes.analysis.replication import ASSUMPTION_COUNTED, PROVED, Replication
from fusewire.fusion_passes.compiler.inductor import fresh_fake
from fusewire.fusion_passes.context import RunContext
from fusewire.patterns.collectives import positional

# With fewer tokens a one-shot kernel, in which every rank has the whole residual, is faster.
MIN_TOKENS = 16
# A gather moves (R - 1) / R of the rows on R ranks, half of what the operator moves. A sharded
# operator takes 2% to 6% less time (docs/benchmarks.md).
OPS_PER_GATHER = 16

_QUANTIZED = all_reduce_rms_norm_quantized.torch_op
_FUSED = (all_reduce_rms_norm.torch_op, all_reduce_sandwich_norm.torch_op, _QUANTIZED)


def shard_residual(graph: Graph, context: RunContext) -> bool:
    """Shard every chain that allows it and is worth it; return whether the graph changed."""
    changed = False
    replication = Replication()
    for chain in _chains(graph):
        verdicts = [verdict for op in chain.ops if (verdict := replication.judge_call(op)).kind != PROVED]
        refusal = chain.refusal()
        if not refusal and verdicts and not context.config.assume_replicated_residuals:
            refusal = f"{verdicts[0].reason} and may differ between ranks (assume_replicated_residuals=False)"
        if refusal:
            context.notes.append(f"shard_residual: {len(chain.ops)} operators stay as they are: {refusal}")
            continue
        context.assumed["assume_replicated_residuals"] += len(verdicts)
        _Sharder(graph, context).run(chain)
        changed = True
    if changed:
        sort_topologically(graph)
    return changed


@dataclass
class _Chain:
    """Fused operators in the graph's order; each takes the residual of the one before.

    Attributes:
        gathered: those whose residual something else reads too.
    """

    ops: list[Node]
    gathered: list[Node] = field(default_factory=list)

    def refusal(self) -> str:
        """Return why this chain is not to be sharded, or ""."""
        value = value_of(self.ops[0].args[0])
        assert value is not None
        tokens = value.numel() // value.shape[-1] if value.shape[-1] else 0
        if len(self.ops) < 2:
            return "no other fused operator takes its residual"
        if is_unbacked(tokens):
            return "the number of tokens depends on data"
        if isinstance(tokens, int) and tokens < MIN_TOKENS:
            return f"{tokens} tokens; from {MIN_TOKENS} on it is worth it"
        if len(self.gathered) * OPS_PER_GATHER > len(self.ops):
            names = ", ".join(_residual_of(op).name for op in self.gathered[:3])  # type: ignore[union-attr]
            return (
                f"{len(self.gathered)} residuals are read outside of fused operators too "
                f"({names}), and to gather one pays from {OPS_PER_GATHER} operators on"
            )
        return ""


def _residual_of(op: Node) -> Node | None:
    """Return the node of a fused operator's second result, or None if nothing reads it."""
    return next((item for index, item in getitem_users(op) if index == 1), None)


def _chains(graph: Graph) -> list[_Chain]:
    ops = [node for node in graph.nodes if node.op == "call_function" and node.target in _FUSED]
    chain_of: dict[Node, _Chain] = {}
    chains: list[_Chain] = []
    for op in ops:
        source = _handed_over(op)
        chain = chain_of.get(source) if source is not None else None
        if chain is None:
            chain = _Chain([])
            chains.append(chain)
        chain.ops.append(op)
        chain_of[op] = chain
    for chain in chains:
        chain.gathered = [op for op in chain.ops if any(_other_readers(op))]
    return chains


def _handed_over(op: Node) -> Node | None:
    """Return the fused operator whose residual this one takes, or None."""
    residual = op.args[1]
    if not isinstance(residual, Node) or residual.target is not operator.getitem or residual.args[1] != 1:
        return None
    source = residual.args[0]
    if not isinstance(source, Node) or source.target not in _FUSED or _group(source) != _group(op):
        return None
    return source if same_shape(source.args[0], op.args[0]) else None


def _group(op: Node) -> object:
    return positional(op)[-2]  # the last argument is the policy


def _other_readers(op: Node) -> Iterator[Node]:
    """Yield the readers of an operator's residual, except fused operators that take it over."""
    residual = _residual_of(op)
    for user in residual.users if residual is not None else ():
        fused = user.target in _FUSED and user.args[1] is residual and _handed_over(user) is op
        if not fused or sum(argument is residual for argument in user.args) > 1:
            yield user


class _Sharder:
    def __init__(self, graph: Graph, context: RunContext) -> None:
        self.graph = graph
        self.context = context

    def run(self, chain: _Chain) -> None:
        shards: dict[Node, Node] = {}  # by the complete residual that each stands for
        for op in chain.ops:
            others = list(_other_readers(op))
            old = _residual_of(op)
            new = self._sharded(op, shards)
            if old is None:
                continue
            with self.graph.inserting_after(new):
                shard = shards[old] = getitem(self.graph, new, 1)
            if others:
                with self.graph.inserting_before(shard.next):
                    gathered = new_call(self.graph, gather_rows.torch_op, (shard, op.args[0], _group(op)), {}, op)
                for user in others:
                    user.replace_input_with(old, gathered)
        for op in reversed(chain.ops):
            for _, item in getitem_users(op):
                self.graph.erase_node(item)
            self.graph.erase_node(op)

    def _sharded(self, op: Node, shards: dict[Node, Node]) -> Node:
        """Return a new sharded operator for a fused one, and use its complete results instead."""
        x, residual, weight, eps, weight_bias, form, *rest, policy = positional(op)
        others, group = (rest[:-1] or [None, 0.0, 0.0, NO_INNER]), rest[-1]
        with self.graph.inserting_before(op):
            if residual is not None and residual not in shards:
                shards[residual] = new_call(self.graph, shard_rows.torch_op, (residual, group), {}, op)
            shard = None if residual is None else shards[residual]
            arguments = (x, shard, weight, eps, weight_bias, form, *others, group, *([policy] if policy else []))
            quantizes = op.target is _QUANTIZED
            target = all_reduce_rms_norm_quantized_sharded if quantizes else all_reduce_rms_norm_sharded
            new = self.graph.call_function(target.torch_op, arguments)
            copy_origin(op, new)
            new.meta["val"] = self._values(op, shard)
            name: str = op.meta.get("fusewire_all_reduce", "")  # "" for the program's own calls
            if name:
                new.meta["fusewire_all_reduce"] = name
            new.meta[ASSUMPTION_COUNTED] = True
        for index, item in getitem_users(op):
            if index != 1:
                with self.graph.inserting_before(item):
                    result = getitem(self.graph, new, index)
                item.replace_all_uses_with(result)
        fused = self.context.fused.get(name)
        if fused is not None:
            self.context.fused[name] = dataclasses.replace(fused, fusion=f"{fused.fusion}, residual sharded")
        return new

    def _values(self, op: Node, shard: Node | None) -> tuple[torch.Tensor, ...]:
        norm, full, *quantized = map(fresh_fake, op.meta["val"])
        if shard is not None:
            return norm, fresh_fake(shard.meta["val"]), *quantized
        with full.fake_mode:
            part = shard_rows.torch_op(full, _group(op))
        return norm, fresh_fake(part), *quantized
