"""RMSNorms whose squares are a product of each row with itself, as of einsum and matmul."""

from __future__ import annotations

import pytest
import torch
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fusewire.fusion_passes.config import PassConfig
from fusewire.fusion_passes.pipeline import run_passes

from support.blocks import HIDDEN, reduce_functional, tensors
from support.graphs import capture
from support.spellings import TAILS, WAYS, blocks

PRODUCTS = ["einsum", "a row times itself", "a row times itself, transposed", "rows in a list"]
BMM = torch.ops.aten.bmm.default
SHAPES = [(5,), (2, 3), (1,), (2, 1)]
pytestmark = pytest.mark.usefixtures("fake_world")


def block(way):
    def norm(x, w, eps):
        return TAILS["M'"](x, WAYS[way].normed(x.float(), eps), w)

    return blocks(norm)


def without_sums(function, inputs):
    """Return the post-grad graph as for GPUs: for CPUs Inductor makes sums of these products."""
    table = {op: function for op, function in select_decomp_table().items() if op is not BMM}
    with FakeTensorMode() as mode:
        return make_fx(function, table)(*[mode.from_tensor(tensor) for tensor in inputs])


def close(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("way", PRODUCTS)
def test_as_for_gpus(way, shape):
    inputs = tensors(torch.float32, shape)
    module = without_sums(block(way), inputs)
    assert len(module.graph.find_nodes(op="call_function", target=BMM)) == 2
    report = run_passes(module.graph, PassConfig())
    assert [entry.status for entry in report.entries] == ["fused"] * 2, report
    module.recompile()
    close(module(*inputs), block(way)(*inputs))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("way", PRODUCTS)
def test_rows_of_several_dimensions(way, dynamic):
    inputs = tensors(torch.float32, (2, 3))
    captured = capture(block(way), *inputs, dynamic=dynamic)
    assert captured.verdicts() == [("fused", "")] * 2, captured.reasons()
    close(captured.result, block(way)(*inputs))


def numbers(left, right):
    """The products of the rows of two tensors, each with one of the other."""
    return torch.bmm(left.reshape(-1, 1, HIDDEN), right.reshape(-1, HIDDEN, 1))


# x has this shape. The numbers are no squares of a row, or those of another. No root is of less
# than 0.
OTHERS = {
    "all rows with all": ((4, 4), lambda x: x / torch.sqrt((x @ x.mT).sum(-1, keepdim=True) / HIDDEN + 10)),
    "other rows": ((4, 4), lambda x: x / torch.sqrt((x * x.transpose(0, 1)).sum(-1, keepdim=True) / HIDDEN + 10)),
    "rows in pairs": (
        (4,),
        lambda x: (
            x / torch.sqrt(torch.bmm(x.view(1, 2, 2 * HIDDEN), x.view(1, 2 * HIDDEN, 2)).view(4, 1) / HIDDEN + 10)
        ),
    ),
    "halves of rows": (
        (2,),
        lambda x: x / torch.sqrt(torch.linalg.vecdot(x.view(4, 32), x.view(4, 32)).view(2, 2).sum(-1, True) / 64 + 10),
    ),
    "each with each": ((4, 4), lambda x: x / torch.sqrt((x.unsqueeze(-2) * x.unsqueeze(-1)).sum(-1) / HIDDEN + 10)),
    "the numbers turned": ((4, 4), lambda x: x / torch.sqrt(numbers(x, x).view(4, 4, 1).transpose(0, 1) + 10)),
    "another tensor's": ((4, 4), lambda x: x / torch.sqrt(numbers(x, x.abs()).view(4, 4, 1) / HIDDEN + 10)),
    "the numbers across": ((1, 4), lambda x: x / torch.sqrt(numbers(x, x).view(4, 1, 1) / HIDDEN + 10)),
}


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("name", OTHERS)
def test_other_products_stay(name, decomposed):
    def run(x, r, w):
        return function(reduce_functional(x) + r) * w

    shape, function = OTHERS[name]
    inputs = tensors(torch.float32, shape)
    if decomposed:
        captured = capture(run, *inputs)
        assert captured.verdicts() == [("refused", "match")]
        torch.testing.assert_close(captured.result, run(*inputs))
        return
    module = without_sums(run, inputs)
    report = run_passes(module.graph, PassConfig())
    assert [(entry.status, entry.gate) for entry in report.entries] == [("refused", "match")]
    module.recompile()
    torch.testing.assert_close(module(*inputs), run(*inputs))
