"""Split operators that are a norm and its quantisation into the two, after an all-reduce.

    wait_tensor(all_reduce(x)) -> _C.fused_add_rms_norm_static_fp8_quant
 -> wait_tensor(all_reduce(x)) -> fusewire::fused_add_rms_norm -> _C.static_scaled_fp8_quant

The passes after it fuse both with the all-reduce. If one of them refuses the norm, the split is
taken back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Graph, Node

from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm
from fusewire.custom_ops.ops.norms import fused_add_rms_norm, rms_norm
from fusewire.fusion_passes.analysis.graph import getitem, new_call
from fusewire.fusion_passes.analysis.norm_quant_ops import NormQuant, is_norm_quant, read_norm_quant
from fusewire.fusion_passes.analysis.norm_reader import SPELLING, Norm
from fusewire.fusion_passes.analysis.sites import Site
from fusewire.fusion_passes.compiler.mutating_calls import insert_call
from fusewire.fusion_passes.config import PassConfig
from fusewire.fusion_passes.context import MATCH, RunContext
from fusewire.fusion_passes.passes.fuse_quantization import ONLY_NATIVE, only_native


def split_norm_quants(
    graph: Graph, context: RunContext, order: dict[Node, int], site_of: Callable[[Norm], Site | None]
) -> bool:
    """Split these operators in place; return whether the graph changed.

    Args:
        order: the nodes' positions in the graph.
        site_of: returns the all-reduce that a norm can be fused with, and the path to it.
    """
    changed = False
    for node in list(graph.nodes):
        if not is_norm_quant(node):
            continue
        found = read_norm_quant(node, order)
        site = site_of(found.norm)
        if site is None:
            continue
        name = context.origin.get(site.path.all_reduce.name, site.path.all_reduce.name)
        if name in context.excluded or name in context.spelling:
            continue
        refusal = found.refusal or _refusal(found, site, context.config)
        if refusal:
            context.refuse(name, MATCH, found.because(refusal))
            continue
        context.spelling[name] = found.norm.spelling  # a later refusal then restores the graph
        _split(graph, found, order)
        changed = True
    return changed


def _refusal(found: NormQuant, site: Site, config: PassConfig) -> str:
    """Return why the program's operator is better left as it is, or ""."""
    if not config.fuse_quantization or "fuse_quantization" in config.disabled_passes:
        return "fuse_quantization is switched off"
    arguments = (found.norm.source, found.norm.residual, *_options(found.norm), site.path.all_reduce.group)
    if only_native(all_reduce_rms_norm, arguments, config.policy(all_reduce_rms_norm.name)):
        return ONLY_NATIVE
    return ""


def _split(graph: Graph, found: NormQuant, order: dict[Node, int]) -> None:
    """Replace one operator by the two."""
    norm, call, old = found.norm, found.quant, found.norm.out
    assert call is not None
    with graph.inserting_before(old):
        if norm.residual is None:
            root = normed = new_call(graph, rms_norm.torch_op, (norm.source, *_options(norm)), {}, old)
        else:
            arguments = (norm.source, norm.residual, *_options(norm))
            root = new_call(graph, fused_add_rms_norm.torch_op, arguments, {}, old)
            normed, summed = getitem(graph, root, 0), getitem(graph, root, 1)
        root.meta[SPELLING] = norm.spelling
        insert_call(graph, call, {"input": normed})
    added = old.prev
    while added not in order:
        order[added] = order[old]
        added = added.prev
    for value in found.sums:  # in place it is the residual, which may be read before too
        for user in [user for user in value.users if order[user] > order[old]]:
            user.replace_input_with(value, summed)
    for item in list(old.users):
        graph.erase_node(item)
    graph.erase_node(old)


def _options(norm: Norm) -> tuple[Any, ...]:
    return norm.weight, norm.eps, norm.weight_bias, norm.form
