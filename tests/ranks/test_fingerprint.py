"""What of a graph ranks must have alike: everything that would mix, and nothing else."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

from fusewire.custom_ops.coordination import rendezvous
from fusewire.custom_ops.coordination.rendezvous import RENDEZVOUS
from fusewire.fusion_passes import pipeline as manager
from fusewire.fusion_passes.spmd import fingerprint
from fusewire.patterns.collectives import op_name

from support.blocks import HIDDEN, NORMS, tensors
from support.graphs import capture


@pytest.fixture(autouse=True)
def peers(fake_world):
    """A group whose other rank is said to be a process of its own; it is asked nothing."""
    with (
        mock.patch.object(fingerprint, "has_peers", return_value=True),
        mock.patch.object(manager, "agree", return_value={}),
        mock.patch.object(rendezvous._Meetings, "meet"),
    ):
        yield


def norm(x, w, eps=1e-5):
    return NORMS["L"](x, w, eps)


def reduce(x):
    return functional.all_reduce(x, "sum", dist.group.WORLD)


def plain(x, r, w):
    return norm(r + reduce(torch.tanh(x)), w)


def merged(x, r, w):
    return norm(r + (reduce(torch.tanh(x)) + reduce(torch.sin(x))), w)


def scaled(x, r, w, scale=0.5):
    return norm(r + reduce(torch.tanh(x)) * scale, w)


def in_a_tensor(scale):
    return lambda x, r, w: norm(r + reduce(torch.tanh(x)) * x.new_full((1,), scale), w)


def layers(x, r, w):
    for _ in range(16):
        r = r + reduce(x)
        x = norm(r, w)
    return x


def printed(fn, *given, dtype=torch.float32, shape=(5,), **options):
    """The fingerprint of the one group, and what was captured."""
    captured = capture(fn, *tensors(dtype, shape), *given, **options)
    (found,) = captured.report.fingerprints
    return found, captured


@pytest.mark.parametrize(
    ("fn", "options"),
    [
        (plain, {}),
        (plain, {"fuse_allreduce_rms": False}),
        (merged, {"merge_allreduces": False}),
        (scaled, {"allow_reassociation": False}),
        (lambda x, r, w: reduce(x), {}),
        (lambda x, r, w: norm(r + (reduce(x) + 0.5), w), {}),
        (lambda x, r, w: norm(r + reduce(x).view(1, 5, HIDDEN).view(5, HIDDEN), w), {}),
        (lambda x, r, w: functional.all_gather_tensor(x, 0, dist.group.WORLD), {}),
    ],
)
def test_what_carries_the_programs_own_is_as_written(fn, options):
    """Fused or not: such graphs fit together, and with a rank that does not compile."""
    found, captured = printed(fn, **options)
    assert (found.rewritten, found.strict) == ("", False)
    assert "as written" in found.label
    (call,) = captured.graph.find_nodes(op="call_function", target=RENDEZVOUS)
    assert call.args[2:] == ("", found.label, False)


@pytest.mark.parametrize(
    ("fn", "options", "strict"),
    [
        (merged, {}, True),
        (scaled, {}, True),
        (plain, {"inline_native": False}, False),  # a kernel may serve: another transport, the same sum
        (plain, {"batch_invariant": True}, False),
        (layers, {"shard_residual": True, "inline_native": False}, True),
    ],
)
def test_what_would_mix_is_strict(fn, options, strict):
    found, captured = printed(fn, shape=(32,), **options)
    assert found.rewritten
    assert found.strict == strict
    (call,) = captured.graph.find_nodes(op="call_function", target=RENDEZVOUS)
    assert call.args[1:] == (found.group, found.rewritten, found.label, strict)


def test_the_same_program_has_the_same_fingerprint():
    first, _ = printed(merged)
    again, _ = printed(lambda x, r, w: merged(x, r, w))
    assert (first.program, first.rewritten) == (again.program, again.rewritten)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((merged, {}), (lambda x, r, w: norm(r + (reduce(torch.tanh(x)) + reduce(x) * 0.5), w), {})),
        ((in_a_tensor(0.5), {}), (in_a_tensor(0.25), {})),
        ((scaled, {}), (lambda x, r, w: scaled(x, r, w, 0.25), {})),
        ((scaled, {}), (lambda x, r, w: norm(r + -reduce(torch.tanh(x)), w), {})),
        ((scaled, {}), (lambda x, r, w: norm(r + reduce(torch.tanh(x)) / 0.5, w), {})),
        ((scaled, {}), (scaled, {"dtype": torch.bfloat16})),
        ((plain, {"inline_native": False}), (plain, {"batch_invariant": True})),
        (
            (plain, {"inline_native": False}),
            (plain, {"inline_native": False, "fi_allreduce_fusion_max_size_mb": 1.0}),
        ),
        (
            (plain, {"inline_native": False}),
            (lambda x, r, w: norm(r + reduce(torch.tanh(x)), w, 1e-6), {"inline_native": False}),
        ),
    ],
    ids=[
        "merged scale",
        "constant tensor",
        "scale",
        "sign",
        "divisor",
        "dtype",
        "provider",
        "policy",
        "epsilon of a kernel",
    ],
)
def test_what_moved_is_in_the_fingerprint(one, other):
    (first, first_options), (second, second_options) = one, other
    assert printed(first, **first_options)[0].rewritten != printed(second, **second_options)[0].rewritten


def test_constants_by_value_and_inputs_by_name():
    half = torch.tensor(0.5)
    inputs = printed(lambda x, r, w, s: norm(r + reduce(torch.tanh(x)) * s, w), half)[0]
    assert "times an input (float32" in inputs.label
    divided = printed(lambda x, r, w, s: norm(r + reduce(torch.tanh(x)) / s, w), half)[0]
    assert "over an input (float32" in divided.label
    assert "times 0.5" in printed(scaled)[0].label


def test_numbers_that_a_moved_scale_is_computed_with():
    def program(number):
        return lambda x, r, w, s: norm(r + reduce(torch.tanh(x)) * (s * number).sqrt(), w)

    one, other, again = (printed(program(number), torch.tensor(0.5))[0] for number in (2.0, 3.0, 2.0))
    assert one.rewritten == again.rewritten != other.rewritten
    assert "times aten::sqrt(aten::mul(an input (float32[]), 2.0) (float32[])) (float32[])" in one.label


def test_rows_are_no_difference():
    """A rank may have them as a symbol, and of an unevenly divided sequence its own number."""
    few, _ = printed(merged, shape=(5,))
    many, _ = printed(merged, shape=(7,))
    given = tensors(torch.float32, (7,))
    for tensor in given[:2]:
        torch._dynamo.mark_dynamic(tensor, 0)
    (symbolic,) = capture(merged, *given, dynamic=None).report.fingerprints
    assert few.rewritten == many.rewritten == symbolic.rewritten
    assert len({few.program, many.program, symbolic.program}) == 3

    def gathered(x, r, w):
        return functional.all_gather_tensor(torch.tanh(x), 0, dist.group.WORLD)

    assert printed(gathered, shape=(5,))[0].program == printed(gathered, shape=(7,))[0].program

    def exchanged(x, r, w, sizes):
        return functional.all_to_all_single(torch.tanh(x), sizes, sizes[::-1], dist.group.WORLD)

    one, _ = printed(exchanged, [2, 3])
    other, _ = printed(exchanged, [1, 4])
    assert (one.program, one.rewritten) == (other.program, other.rewritten)


def test_the_comparison_stands_before_the_first_collectives():
    def two_roots(x, r, w):
        first = norm(r + reduce(torch.tanh(x)) * 0.5, w)
        second = norm(r + reduce(torch.sin(x)) * 0.5, w)
        return norm(first + reduce(second), w)

    _, captured = printed(two_roots)
    names = [op_name(node) for node in captured.graph.nodes]
    kinds = ["rendezvous" if "rendezvous" in name else "sum" for name in names if "rendez" in name or "all_re" in name]
    # Before both that need no other collective, whatever order the compiler gives them; the third needs their results.
    assert kinds == ["rendezvous", "sum", "rendezvous", "sum", "sum"]
    order = [node for node in captured.graph.nodes if "rendez" in op_name(node) or "all_re" in op_name(node)]
    for call, collective in (order[:2], order[2:4]):
        assert call.args[0] is collective.args[0]


def test_passes_that_run_twice_keep_the_fingerprint():
    found, captured = printed(merged)
    again = manager.run_passes(captured.graph)
    assert [item.rewritten for item in again.fingerprints] == [""]
    (call,) = captured.graph.find_nodes(op="call_function", target=RENDEZVOUS)
    assert call.args[2] == found.rewritten


def test_training_graphs_are_left_alone():
    captured = capture(plain, *(tensor.requires_grad_() for tensor in tensors(torch.float32)), grad=True)
    for graph, report in zip(captured.graphs, captured.graph_reports, strict=True):
        assert not graph.find_nodes(op="call_function", target=RENDEZVOUS)
        assert report.kind == "training"


def test_a_group_without_peers_is_no_ones_business(fake_world):
    with mock.patch.object(fingerprint, "has_peers", return_value=False):
        captured = capture(merged, *tensors(torch.float32))
    assert captured.report.fingerprints == ()
    assert captured.count(RENDEZVOUS) == 0
