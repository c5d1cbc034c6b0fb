"""Read and change post-grad graphs: helpers that the passes share."""

from __future__ import annotations

import contextlib
import functools
import operator
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node, map_arg

from fusewire.custom_ops.ops.norms import fused_add_rms_norm, rms_norm
from fusewire.fusion_passes.compiler.inductor import fresh_fake, known_equal

aten = torch.ops.aten
prims = torch.ops.prims

ADDS = frozenset({aten.add.Tensor, aten.add.Scalar})
SUMS = ADDS | {aten.sub.Tensor}
MULS = frozenset({aten.mul.Tensor, aten.mul.Scalar})
DIVS = frozenset({aten.div.Tensor, aten.div.Scalar})
CASTS = frozenset({prims.convert_element_type.default, aten._to_copy.default})
VIEWS = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
    }
)

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')
# Frames of libraries that issue the collective; users look for the call in the model.
_MACHINERY = re.compile(
    r"[/\\](torch|accelerate)[/\\]|(integrations|distributed)[/\\](tensor_parallel|parallel_utils)"
    r"|<eval_with_key>|<string>"
)


def first_refusal(cases: Iterable[tuple[Any, str]]) -> str:
    """Return the refusal of the first of (condition, refusal) whose condition holds, or ""."""
    return next((refusal for holds, refusal in cases if holds), "")


def value_of(node: Any) -> Tensor | None:
    """Return the fake tensor that a node computes, or None."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value if isinstance(value, Tensor) else None


def is_number(value: Any) -> bool:
    """Return whether a graph argument is a plain number (not a symbol, not a tensor)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def dtype_of(node: Any) -> torch.dtype | None:
    """Return the dtype of a node's tensor, or None."""
    value = value_of(node)
    return None if value is None else value.dtype


def last_size(node: Any) -> Any:
    """Return the size of a node's last dimension, or None."""
    value = value_of(node)
    return value.shape[-1] if value is not None and value.dim() > 0 else None


def is_vector(node: Any, size: Any) -> bool:
    """Return whether a node is a one-dimensional tensor of this length."""
    value = value_of(node)
    return value is not None and value.dim() == 1 and same_size(value.shape[0], size)


def is_row(node: Any, size: Any) -> bool:
    """Return whether a node is a vector of this length, or one with dimensions of 1 before it."""
    value = value_of(node)
    if value is None or value.dim() == 0:
        return False
    leading = all(isinstance(length, int) and length == 1 for length in value.shape[:-1])
    return leading and same_size(value.shape[-1], size)


def same_size(a: Any, b: Any) -> bool:
    """Return whether two sizes are known to be equal, without adding a guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    if isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt) and a.node.expr == b.node.expr:
        return True
    symbolic = isinstance(a, torch.SymInt) or isinstance(b, torch.SymInt)
    return symbolic and isinstance(a, (int, torch.SymInt)) and isinstance(b, (int, torch.SymInt)) and known_equal(a, b)


def is_unbacked(size: Any) -> bool:
    """Return whether a size depends on data and is known only when the graph runs."""
    return isinstance(size, torch.SymInt) and not size.node.has_hint()


def same_shape(a: Any, b: Any) -> bool:
    """Return whether two nodes' tensors are known to have one shape, without adding a guard."""
    va, vb = value_of(a), value_of(b)
    return (
        va is not None
        and vb is not None
        and va.dim() == vb.dim()
        and all(same_size(x, y) for x, y in zip(va.shape, vb.shape, strict=True))
    )


def viewed_by_both(a: Any, b: Any) -> Node | None:
    """Return the tensor that two nodes are views of, with its elements in order, or None."""
    sources = _viewed(a)
    return next((node for node in _viewed(b) if node in sources), None)


def _viewed(node: Any) -> list[Node]:
    """Return a node and the nodes that it views, the nearest first."""
    if not isinstance(node, Node):
        return []
    return [node, *(_viewed(node.args[0]) if node.target in VIEWS or _moves_ones(node) else ())]


def _moves_ones(node: Node) -> bool:
    """Return whether a node permutes dimensions of 1 only, which keeps the order of elements."""
    if node.target is not aten.permute.default:
        return False
    source: Any = node.args[0]
    dims: Any = node.args[1]
    kept = [dim for dim in dims if not same_size(source.meta["val"].shape[dim], 1)]
    return kept == sorted(kept)


def is_row_major(node: Any) -> bool:
    """Return whether a node's tensor is known to be contiguous, without adding a guard."""
    value = value_of(node)
    if value is None:
        return False
    expected: Any = 1
    bounded: Any = 1  # torch writes a stride of sizes that could be 0 as a product of Max(1, size)
    for size, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        known = same_size(stride, expected) or same_size(stride, bounded)
        if not known and not (isinstance(size, int) and size <= 1):
            return False
        expected = expected * (max(size, 1) if isinstance(size, int) else size)
        bounded = bounded * torch.sym_max(size, 1)
    return True


def cast_source(node: Any) -> Node | None:
    """Return the input of a plain cast, or None for any other node."""
    if not isinstance(node, Node) or node.target not in CASTS:
        return None
    if set(node.kwargs) - {"dtype"}:
        return None
    source = node.args[0]
    return source if isinstance(source, Node) else None


def plain_add(node: Any) -> tuple[Any, Any] | None:
    """Return the operands of an add with alpha 1, or None."""
    terms = terms_of(node)
    return terms[:2] if terms is not None and terms[2] == 1 else None


def terms_of(node: Any) -> tuple[Any, Any, int | float] | None:
    """Return (a, b, alpha) of an add or a subtraction, which computes `a + alpha * b`, or None."""
    if not isinstance(node, Node) or node.target not in SUMS or len(node.args) != 2 or set(node.kwargs) - {"alpha"}:
        return None
    alpha: Any = node.kwargs.get("alpha", 1)
    if not is_number(alpha):
        return None
    return node.args[0], node.args[1], alpha if node.target in ADDS else -alpha


def wide_terms(total: Any) -> tuple[Node, Node, int | float] | None:
    """Return `terms_of` a sum in fp32 of two 16-bit tensors, before their casts, or None.

    Both have one dtype and the node's shape. The add may leave one of the casts to type promotion.
    """
    wide = dtype_of(total)
    left, right, alpha = terms_of(total) or (None, None, 0)
    a, b = _before_cast(left, wide), _before_cast(right, wide)
    dtype = dtype_of(a)
    if dtype not in (torch.bfloat16, torch.float16) or dtype_of(b) != dtype or wide != torch.float32:
        return None
    return (a, b, alpha) if same_shape(a, total) and same_shape(b, total) else None


def wide_addends(total: Any) -> tuple[Node, Node] | None:
    """Return the two 16-bit tensors whose sum in fp32 a node is (alpha 1), or None."""
    terms = wide_terms(total)
    return terms[:2] if terms is not None and terms[2] == 1 else None


def _before_cast(operand: Any, dtype: torch.dtype | None) -> Any:
    """Return the source of a cast to this dtype; of anything else itself."""
    source = cast_source(operand) if dtype_of(operand) == dtype else None
    return operand if source is None else source


def addends_of(summed: Any) -> tuple[Any, Any] | None:
    """Return a sum's operands, before a cast to fp32 that the sum's rounding undoes."""
    operands = plain_add(summed)
    if operands is not None:
        return operands
    wide = wide_addends(cast_source(summed))
    return wide if wide is not None and dtype_of(wide[0]) == dtype_of(summed) else None


def plain_mul(node: Any) -> tuple[Any, Any] | None:
    """Return the operands of a multiplication, or None."""
    return _operands(node, MULS)


def plain_div(node: Any) -> tuple[Any, Any] | None:
    """Return the operands of a true division, or None."""
    return _operands(node, DIVS)


def sums_rows(node: Any) -> bool:
    """Return whether a node adds up rows: over dimensions before the last, in its input's dtype."""
    if not isinstance(node, Node) or node.target is not aten.sum.dim_IntList:
        return False
    value, dims = value_of(node.args[0]), node.args[1]
    if value is None or not value.dim() or not isinstance(dims, (list, tuple)) or dtype_of(node) != value.dtype:
        return False
    return bool(dims) and all(isinstance(dim, int) and dim % value.dim() != value.dim() - 1 for dim in dims)


def _operands(node: Any, targets: frozenset[Any]) -> tuple[Any, Any] | None:
    if not isinstance(node, Node) or node.target not in targets or len(node.args) != 2 or node.kwargs:
        return None
    return node.args[0], node.args[1]


def other_factor(product: Any, value: Node) -> Any:
    """Return the factor that multiplies `value` in `product`; None if it is `value` or missing."""
    left, right = plain_mul(product) or (None, None)
    if left is right:
        return None
    return right if left is value else left if right is value else None


def writes_in_place(node: Node) -> bool:
    """Return whether a node changes one of its inputs."""
    return node.op == "call_function" and _target_writes(node.target)


@functools.cache
def _target_writes(target: Any) -> bool:
    if isinstance(target, torch._ops.HigherOrderOperator):
        return str(target.name()) == "triton_kernel_wrapper_mutation"  # a user's Triton kernel
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def mutation_regions(graph: Graph) -> dict[Node, int]:
    """Return the number of in-place writes up to each node; no node may move past one."""
    regions, count = {}, 0
    for node in graph.nodes:
        if writes_in_place(node):
            count += 1
        regions[node] = count
    return regions


def sort_topologically(graph: Graph) -> None:
    """Move nodes after their inputs, and keep the order otherwise.

    No node moves past an in-place write, which could change what it reads. The output stays last.

    Raises:
        RuntimeError: a node would have to move past an in-place write, or the graph has a cycle.
    """
    placed: set[Node] = set()
    waiting: dict[Node, list[Node]] = {}
    last: Node | None = None
    for next_node in list(graph.nodes):
        if waiting and (writes_in_place(next_node) or next_node.op == "output"):
            late = next(iter(waiting.values()))[0]
            raise RuntimeError(f"{late.name} would have to change places with {next_node.name}, which writes in place")
        pending = [next_node]
        while pending:
            node = pending.pop()
            missing = [source for source in node.all_input_nodes if source not in placed]
            if missing:
                waiting.setdefault(missing[-1], []).append(node)
                continue
            placed.add(node)
            if last is not None and last.next is not node:
                last.append(node)
            last = node
            pending.extend(reversed(waiting.pop(node, ())))
    if waiting:
        raise RuntimeError("the graph has a cycle")


def erase_unused(node: Node) -> None:
    """Erase a node if it has no users, and then the inputs that have no other user."""
    pending = [node]
    while pending:
        current = pending.pop()
        if current.users or current._erased or current.op != "call_function" or current.is_impure():
            continue
        inputs = list(current.all_input_nodes)
        current.graph.erase_node(current)
        pending.extend(inputs)


def depends_on(node: Any, ancestor: Node, order: dict[Node, int]) -> bool:
    """Return whether `node` is computed from `ancestor`; `order`: the nodes' positions."""
    if not isinstance(node, Node):
        return False
    floor = order.get(ancestor, -1)
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        if current is ancestor:
            return True
        for source in current.all_input_nodes:
            # A node that stands before the ancestor cannot be computed from it.
            if source not in seen and order.get(source, floor) >= floor:
                seen.add(source)
                pending.append(source)
    return False


def getitem(graph: Graph, node: Node, index: int) -> Node:
    """Return a new node for one output of a call that returns a tuple, with its fake value."""
    item = graph.call_function(operator.getitem, (node, index))
    item.meta["val"] = node.meta["val"][index]
    return item


def getitem_users(node: Node) -> Iterator[tuple[int, Node]]:
    """Yield (index, node) for each node that takes one output of a call that returns a tuple."""
    for user in list(node.users):
        if user.target is operator.getitem:
            yield user.args[1], user  # type: ignore[misc]


def copy_origin(source: Node, new: Node) -> None:
    """Copy the metadata on a node's place in the user's program."""
    for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "original_aten", "from_node", "custom"):
        if key in source.meta:
            new.meta[key] = source.meta[key]


def source_location(node: Node) -> str:
    """Return where in the user's source a node comes from, as "folder/file:line", or ""."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    own = [frame for frame in frames if not _MACHINERY.search(frame[0])]
    for path, line, _ in reversed(own or frames):
        return f"{os.path.basename(os.path.dirname(path))}/{os.path.basename(path)}:{line}"
    return ""


def new_call(graph: Graph, target: Any, args: tuple[Any, ...], kwargs: Any, origin: Node) -> Node:
    """Return a new call with its fake value and the place of `origin` in the user's program."""
    node = graph.call_function(target, args, dict(kwargs))
    copy_origin(origin, node)
    node.meta["val"] = _infer(node)
    return node


def constant_vector(size: Any, number: float, like: Node) -> Node:
    """Return a new vector that holds one number, in the dtype and on the device of a node.

    Args:
        size: its length, or a node that computes it.
        like: a node of the graph.
    """
    value = like.meta["val"]
    vector = like.graph.call_function(
        aten.full.default, ([size], number), {"dtype": value.dtype, "device": value.device}
    )
    vector.meta["val"] = value.new_full((size.meta["val"] if isinstance(size, Node) else size,), number)
    return vector


def _infer(node: Node) -> Any:
    """Return the fake value of a new node, computed from those of its inputs."""
    args = map_arg(node.args, lambda n: n.meta["val"])
    kwargs = map_arg(node.kwargs, lambda n: n.meta["val"])
    target: Any = node.target
    mode = next((m for n in node.all_input_nodes if (m := getattr(value_of(n), "fake_mode", None)) is not None), None)
    if target in (rms_norm.torch_op, fused_add_rms_norm.torch_op):
        # These keep x's metadata. (An epsilon may be a tensor, which a later check refuses.)
        outputs = [fresh_fake(args[0], contiguous=True) for _ in range(1 + (target is fused_add_rms_norm.torch_op))]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)
    with mode if mode is not None else contextlib.nullcontext():
        return target(*args, **kwargs)
