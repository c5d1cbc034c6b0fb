"""Python floats that dynamic=True makes inputs of the graph, between an all-reduce and its norm."""

from __future__ import annotations

import pytest
import torch

import fusewire

from support.blocks import NORMS, reduce_functional
from support.carried import inputs, norm
from support.compiles import WITHOUT_CODE
from support.graphs import capture

# `y` is the all-reduced value, `c` the float.
ADDED = {
    "y + c": lambda y, r, c: y + c,
    "r + (y + c)": lambda y, r, c: r + (y + c),
    "(r + y) - c": lambda y, r, c: (r + y) - c,
    "c - y": lambda y, r, c: c - y,
    "add_": lambda y, r, c: r + y.clone().add_(c),
    "r + (y - c) / 2": lambda y, r, c: r + (y - c) / 2,
}


class Shifted(torch.nn.Module):
    """Calls a function with a float attribute, which is a norm's input with the all-reduce's result."""

    def __init__(self, function, value):
        super().__init__()
        self.function, self.value = function, value

    def forward(self, x, r, w):
        return norm(self.function(reduce_functional(x), r, self.value), w)


@pytest.fixture(autouse=True)
def _world(fake_world):
    return fake_world


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ADDED)
def test_an_attribute_that_is_added_is_a_number(name, dtype):
    block, given = Shifted(ADDED[name], 0.5), inputs(dtype)[:3]
    captured = capture(block, *given, dynamic=True)
    assert captured.verdicts() == [("fused", "")], captured.reasons()
    assert torch.equal(captured.result, block(*given))


@pytest.mark.parametrize("name", ADDED)
def test_an_attribute_that_the_dtype_does_not_hold(name):
    """PyTorch adds 0.3 in fp32 and rounds the sum."""
    captured = capture(Shifted(ADDED[name], 0.3), *inputs(torch.bfloat16)[:3], dynamic=True)
    (reason,) = captured.reasons()
    assert "adds 0.3 between the all-reduce and the norm, which torch.bfloat16 would round to 0.30078125" in reason


ELEMENTS = {
    "float": (0.5, "keep it as a Python float in the module"),
    "fp32": (torch.tensor(0.5), "store it in that dtype"),
    "fp64": (torch.tensor(0.5, dtype=torch.float64), "store it in that dtype"),
}


@pytest.mark.parametrize("name", ["y + c", "r + (y + c)", "c - y"])
@pytest.mark.parametrize("kind", ELEMENTS)
def test_an_argument_that_is_added_stays(kind, name):
    """Its value is not known, and PyTorch adds it in fp32."""

    def block(x, r, w, c):
        return norm(ADDED[name](reduce_functional(x), r, c), w)

    value, remedy = ELEMENTS[kind]
    given = *inputs(torch.bfloat16)[:3], value
    captured = capture(block, *given, dynamic=True)
    assert captured.verdicts() == [("refused", "match")]
    (reason,) = captured.reasons()
    assert "adds one element in torch.float" in reason
    assert f"which torch.bfloat16 would round before it is added; {remedy}" in reason
    assert torch.equal(captured.result, block(*given))


def test_an_argument_in_the_sums_dtype_fuses():
    captured = capture(Shifted(ADDED["y + c"], torch.tensor([[0.5]])), *inputs()[:3], dynamic=True)
    assert captured.verdicts() == [("fused", "")]


def test_a_fp32_sum_takes_an_element_of_fewer_bits_as_it_is():
    captured = capture(Shifted(ADDED["y + c"], torch.tensor([0.5], dtype=torch.bfloat16)), *inputs()[:3], dynamic=True)
    assert "adds a tensor in torch.bfloat16 to the all-reduce's result in torch.float32" in captured.reasons()[0]


def _compiled(function):
    torch._dynamo.reset()
    fusewire.clear_report()
    return torch.compile(function, backend="fusewire", fullgraph=True, dynamic=True, options=WITHOUT_CODE)


@torch.no_grad()
def test_an_attribute_that_changes_at_each_call_becomes_an_input():
    """Dynamo would give up after 8 numbers, and raise with fullgraph=True."""

    class Scaled(torch.nn.Module):
        def forward(self, x, r, w):
            return norm((r + reduce_functional(x)) * self.value, w)

    block, given = Scaled(), inputs()[:3]
    run = _compiled(block)
    for call in range(12):
        block.value = 0.5 + call
        torch.testing.assert_close(run(*given), block(*given), rtol=1e-6, atol=1e-6)
    assumed = ("taken to be equal on all ranks: 1 scale (assume_replicated_scales)",)
    assert [graph.notes for graph in fusewire.report().graphs] == [(), (), (), (), assumed]
    torch._dynamo.reset()  # the values are forgotten with it
    fusewire.clear_report()
    run(*given)
    assert [graph.notes for graph in fusewire.report().graphs] == [()]


@torch.no_grad()
@pytest.mark.parametrize("both", [False, True], ids=["in turn", "in pairs"])
def test_two_attributes_that_change_become_inputs(both):
    """A third that never changes stays a number."""

    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = self.second = self.steady = 0.5

        def forward(self, x, r, w):
            return norm(((r + reduce_functional(x)) * self.first - r) * self.second * self.steady, w)

    block, given = Scaled(), inputs()[:3]
    run = _compiled(block)
    for call in range(12):
        values = range(3) if both else [0.5 + call]
        for value in values:
            if both:
                block.first, block.second = call % 4 + 0.5, value + 0.5
            elif call % 2:
                block.first = value
            else:
                block.second = value
            torch.testing.assert_close(run(*given), block(*given), rtol=1e-5, atol=1e-5)
    notes = [note for graph in fusewire.report().graphs for note in graph.notes]
    assert len(fusewire.report().graphs) <= 6
    assert notes[-1] == "taken to be equal on all ranks: 2 scales (assume_replicated_scales)"


@torch.no_grad()
def test_a_number_in_one_graph_is_no_number_in_the_next():
    """A symbol's name is made of the attribute's, and Dynamo keeps those that are to be numbers."""

    class Norm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.eps = 1e-5

        def forward(self, x, r, w):
            return NORMS["L"](r + reduce_functional(x), w, self.eps)

    class Other:
        def scaled(self, x):
            return x * self.eps

    given, other = inputs()[:3], Other()
    _compiled(Norm())(*given)
    fusewire.clear_report()
    run = torch.compile(other.scaled, backend="fusewire", dynamic=True, options=WITHOUT_CODE)
    for call in range(3):
        other.eps = 0.5 + call
        run(given[0])
    assert len(fusewire.report().graphs) == 1
