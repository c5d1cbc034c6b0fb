"""Golden graphs: what the passes make of representative blocks, as text that people read and reviews compare.

`FUSEWIRE_UPDATE_GOLDEN=1 pytest tests/unit/test_golden.py` writes the files under tests/unit/golden anew. Names of
nodes and of symbolic sizes are numbered, so that the texts are the same under every version of torch.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

import pytest
import torch
from torch.fx.node import map_arg

from fusewire.custom_ops.ops.registry import NATIVE

from support import vllm_norms
from support.blocks import HIDDEN, NORMS, pow_half, reduce_functional, reduce_in_place, tensors
from support.graphs import capture

FOLDER = Path(__file__).parent / "golden"
UPDATE = "FUSEWIRE_UPDATE_GOLDEN"
# The same text on every machine, whatever providers it has.
FIXED = {"ir_op_priority": {name: [NATIVE] for name in ("rms_norm", "fused_add_rms_norm", "all_reduce_rms_norm")}}
pytestmark = pytest.mark.usefixtures("fake_world")


def _weights(*shapes, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def llama_layer(x, residual, w, o_proj, up, down):
    """Attention's output projection and the MLP, each followed by add and norm in Llama's spelling."""
    residual = residual + reduce_functional(x @ o_proj)
    hidden = torch.relu(NORMS["L"](residual, w, 1e-5) @ up) @ down
    residual = residual + reduce_functional(hidden)
    return NORMS["L"](residual, w, 1e-5), residual


def gemma2_layer(x, residual, w):
    """A norm after the all-reduce, then the add, then a second norm; `1 + weight`."""
    residual = residual + NORMS["G"](reduce_in_place(x), w, 1e-6)
    return NORMS["G"](residual, w, 1e-6), residual


def embedding(x, residual, w, scale):
    """A vocabulary-parallel embedding, scaled: norm and residual stream both read the sum."""
    embedded = reduce_functional(x) * scale
    return NORMS["G"](embedded, w, 1e-6), embedded


def mixtral_moe(x, residual, w):
    """The experts' output is two-dimensional; it is viewed in the residual's shape before the add."""
    total = residual + reduce_functional(x.reshape(-1, HIDDEN)).reshape(residual.shape)
    return NORMS["L"](total, w, 1e-5), total


def deepseek_moe(x, residual, w):
    """Routed and shared experts: two all-reduces that become one."""
    total = residual + (reduce_functional(x) + reduce_functional(x * residual))
    return NORMS["L"](total, w, 1e-5), total


def biased_projection(x, residual, w, bias):
    """A scale and a bias between the all-reduce and the add, as Granite and attention_bias have them."""
    total = residual + (reduce_functional(x) * 0.22 + bias)
    return NORMS["L'"](total, w, 1e-5), total


def torch_rms_norm(x, residual, w):
    """torch.nn.functional.rms_norm, inlined again as native arithmetic."""
    total = residual + reduce_functional(x)
    return NORMS["M'"](total, w, 1e-5), total


def weightless_and_pow(x, residual, w):
    """No weight, and the newer Gemmas' pow(-0.5)."""
    first = NORMS["weightless"](reduce_functional(x), w, 1e-6)
    return pow_half(reduce_functional(first) + residual, w, 1e-6)


def vllm_layer(x, residual, w, matrix):
    """vLLM's norms, lowered: sums normalised before rounding, 1 added to the weight."""
    hidden, residual = vllm_norms.fused_add_rms_norm(reduce_functional(x), residual, w, 1e-5)
    return vllm_norms.fused_add_rms_norm(reduce_functional(hidden @ matrix), residual, w.float() + 1.0, 1e-6)


def gated(x, residual, w, gate):
    """Refused: a gate multiplies the all-reduced value, and the graph stays as it was."""
    return NORMS["L"](residual + reduce_functional(x) * torch.sigmoid(gate), w, 1e-5)


def _cases():
    flat, deep = tensors(), tensors(shape=(2, 3))
    yield llama_layer, [*flat, *_weights((HIDDEN, HIDDEN), (HIDDEN, 2 * HIDDEN), (2 * HIDDEN, HIDDEN))], {}
    yield gemma2_layer, deep, {}
    yield embedding, [*deep, torch.tensor(8.0, dtype=torch.bfloat16)], {}
    yield mixtral_moe, deep, {"dynamic": True}
    yield deepseek_moe, flat, {}
    yield biased_projection, [*flat, *_weights((HIDDEN,))], {}
    yield torch_rms_norm, tensors(torch.float32), {"inline_native": True}
    yield weightless_and_pow, flat, {}
    yield vllm_layer, [*flat, *_weights((HIDDEN, HIDDEN))], {}
    yield gated, [*flat, *_weights((5, HIDDEN))], {}


CASES = {fn.__name__: (fn, inputs, options) for fn, inputs, options in _cases()}


def text_of(graph):
    """A graph as lines of `name = target(arguments) -> dtype[shape]`."""
    names, symbols, lines = {}, {}, []
    for node in graph.nodes:
        names[node] = f"in{len(names)}" if node.op == "placeholder" else f"n{len(names)}"
        value = node.meta.get("val")
        if node.op == "placeholder":
            lines.append(f"{names[node]} -> {_shape(value, symbols)}")
        elif node.op == "output":
            lines.append(f"return {_arguments((node.args[0],), names)}")
        else:
            arguments = _arguments(node.args, names)
            keywords = "".join(f", {key}={_arguments((arg,), names)}" for key, arg in sorted(node.kwargs.items()))
            lines.append(f"{names[node]} = {_target(node.target)}({arguments}{keywords}) -> {_shape(value, symbols)}")
    return "\n".join(lines)


def _target(target):
    return str(target) if isinstance(target, torch._ops.OpOverload) else target.__name__


def _arguments(args, names):
    class Name:
        def __init__(self, node):
            self.node = node

        def __repr__(self):
            return names[self.node]

    return ", ".join(map(repr, map_arg(args, Name)))


def _shape(value, symbols):
    if isinstance(value, (tuple, list)):
        return f"({', '.join(_shape(item, symbols) for item in value)})"
    if isinstance(value, torch.Tensor):
        sizes = ",".join(str(size) for size in value.shape)
        return f"{str(value.dtype).removeprefix('torch.')}[{_numbered(sizes, symbols)}]"
    return _numbered(str(value), symbols)


def _numbered(text, symbols):
    text = re.sub(r"\b[su]\d+\b", lambda found: symbols.setdefault(found[0], f"s{len(symbols)}"), text)
    return re.sub(r"s\d+(\*s\d+)+", lambda found: "*".join(sorted(found[0].split("*"))), text)


def without_lines(reason):
    return re.sub(r"\.py:\d+", ".py", reason)


def _made(name):
    fn, inputs, options = CASES[name]
    options = {"inline_native": False, **FIXED, **options}
    captured = capture(fn, *inputs, **options)
    verdicts = [
        f"# {entry.status}: {entry.fusion or without_lines(entry.reason)}, {entry.spelling or 'no norm'}"
        for entry in captured.report.entries
    ]
    return "\n".join([f"# {fn.__doc__}", *verdicts, text_of(captured.graph), ""])


@pytest.mark.parametrize("name", CASES)
def test_golden(name):
    file = FOLDER / f"{name}.txt"
    made = _made(name)
    if os.environ.get(UPDATE) == "1":
        FOLDER.mkdir(exist_ok=True)
        file.write_text(made)
        return
    kept = file.read_text() if file.exists() else ""
    difference = "\n".join(
        difflib.unified_diff(kept.splitlines(), made.splitlines(), f"golden/{name}.txt", "now", lineterm="")
    )
    assert made == kept, f"{difference}\nIf this is meant: {UPDATE}=1 pytest tests/unit/test_golden.py"


def test_every_golden_file_has_a_block():
    assert {file.stem for file in FOLDER.glob("*")} == set(CASES)


def test_texts_are_free_of_names_that_versions_choose():
    text = "".join(file.read_text() for file in FOLDER.glob("*.txt"))
    assert not re.search(r"arg\d+_\d+|\bs[1-9]\d+\b|primals|0x[0-9a-f]{6}", text)
