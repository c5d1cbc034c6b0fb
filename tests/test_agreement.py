"""Ranks whose graphs differ: what fits together in the program must fit together after the passes too."""

from __future__ import annotations

import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

import fusewire
from fusewire.fusion_passes import agreement
from fusewire.fusion_passes.backend import fusewire_backend

from blocks import HIDDEN, NORMS, tensors
from distributed import fake_group, shared_pool

DIFFER = "the ranks' graphs differ, and ranks must run the same collectives"


def reduce(x):
    return functional.all_reduce(x, "sum", dist.group.WORLD)


def inputs(tokens=6):
    x, r, w = (tensor[..., :HIDDEN] for tensor in tensors(torch.float32))
    return x[:tokens] * (1 + dist.get_rank()), r[:tokens], w


def compiled(fn, *given, way="backend", **options):
    torch._dynamo.reset()
    fusewire.clear_report()
    with torch.no_grad():
        if way == "backend":
            return torch.compile(fn, backend="fusewire", options=options)(*given)
        with fusewire.enable(**options):
            return torch.compile(fn)(*given)


def reasons():
    return [entry.reason for entry in fusewire.report().entries]


def alike(x, r, w):
    return NORMS["L"](r + reduce(x), w, 1e-5)


def logging(x, r, w):
    """The first rank reads the sum once more."""
    total = reduce(x)
    seen = total.abs().max() if dist.get_rank() == 0 else None
    return NORMS["L"](r + total, w, 1e-5), seen


def two_sums(x, r, w):
    first, second = reduce(x), reduce(x * 0.5)
    seen = first.abs().max() if dist.get_rank() == 0 else None
    return NORMS["L"](r + (first + second), w, 1e-5), seen


def _divergent(name, way, options):
    fn, given = globals()[name], inputs()
    results = [compiled(fn, *given, way=way, **options)[0] for _ in range(2)]  # the second from the compile cache
    want = fn(*given)[0]
    return [bool(torch.equal(got, results[0])) and (got - want).abs().max().item() for got in results], reasons()


_MESH = {}


def mesh(x, r, w):
    """Sums over the rows of a mesh of 2 x 2 ranks, then over its columns; the first rank reads the first sum."""
    total = functional.all_reduce(x, "sum", _MESH["row"])
    seen = total.abs().max() if dist.get_rank() == 0 else None
    again = functional.all_reduce(NORMS["L"](r + total, w, 1e-5) * 0.5, "sum", _MESH["column"])
    return NORMS["L"](r + again, w, 1e-5), seen


def _on_a_mesh(options):
    for axis, groups in {"row": ([0, 1], [2, 3]), "column": ([0, 2], [1, 3])}.items():
        for ranks in groups:
            group = dist.new_group(ranks)
            if dist.get_rank() in ranks:
                _MESH[axis] = group
    given = inputs()
    got = compiled(mesh, *given, **options)[0]
    entries = fusewire.report().entries
    return (got - mesh(*given)[0]).abs().max().item(), [(entry.status, entry.reason) for entry in entries]


def test_ranks_of_other_groups_learn_of_it():
    """Ranks 2 and 3 agree with all that they share a group with, but those run plain collectives."""
    for rank, (error, said) in enumerate(shared_pool(4).run(_on_a_mesh, {"batch_invariant": True})):
        assert error < 1e-5
        assert [status for status, _ in said] == ["refused"] * 2, said
        assert all(DIFFER in reason for _, reason in said), said
        heard = rank >= 2
        assert all((f"rank {rank - 2} of group" in reason) == heard for _, reason in said), said


@pytest.mark.parametrize("way", ["backend", "enable"])
@pytest.mark.parametrize(
    ("name", "options"),
    [("two_sums", {}), ("logging", {"batch_invariant": True}), ("logging", {"inline_native": False})],
    ids=["merged on one rank", "another collective on one rank", "fused on one rank"],
)
def test_graphs_that_differ_are_left_alone_on_every_rank(name, options, way):
    both = shared_pool(2).run(_divergent, name, way, options)
    for rank, (errors, said) in enumerate(both):
        assert max(errors) < 1e-6
        assert len(said) == (2 if name == "two_sums" else 1)
        if rank == 1:
            assert all(reason.startswith(DIFFER) for reason in said), said
            assert f"rank 0 would fuse {int(name == 'two_sums')} of" in said[0]


def _same():
    start = time.monotonic()
    given = inputs()
    result = compiled(alike, *given, expect_fused="all")
    return (result - alike(*given)).abs().max().item(), fusewire.report().fused, time.monotonic() - start


def test_equal_graphs_fuse():
    for error, fused, _ in shared_pool(2).run(_same):
        assert error < 1e-6
        assert fused == 1


def _lone(last, digest):
    """What a rank hears of a peer that does not begin to compile, by the peer's last word on the place."""
    group = dist.group.WORLD
    with mock.patch.multiple(agreement, SAME_BEFORE_S=0.2, OTHER_BEFORE_S=0.3, NEVER_BEFORE_S=0.4):
        meeting = agreement._Meeting(group, f"place of {last} {digest}")
        if dist.get_rank() == 1:
            if last:
                meeting.settle(last)
            dist.barrier()
            dist.barrier()
            return None
        dist.barrier()
        # The second compilation of this place, which the other rank never begins.
        meeting = agreement._Meeting(group, meeting.place)
        start = time.monotonic()
        meeting.digest = digest
        found = meeting.collect()
        waited = time.monotonic() - start
        said = agreement._compare(meeting)
        dist.barrier()
        return found[1]["digest"], waited, said


@pytest.mark.parametrize(
    ("last", "own", "hears", "least", "differs"),
    [
        ("mine", "mine", "mine", 0.2, False),
        ("plain", "mine", "plain", 0.3, True),
        ("", "mine", None, 0.4, True),
        ("", "plain", None, 0.3, False),
        ("mine", "plain", "mine", 0.3, True),
    ],
)
def test_a_rank_that_compiles_alone_takes_the_others_last_word(last, own, hears, least, differs):
    (digest, waited, said), _ = shared_pool(2).run(_lone, last, own)
    assert digest == hears
    assert least <= waited < 5
    assert (DIFFER in said) == differs


def _compiling(fn, options):
    """Compile without running: this rank's error, and how long it took."""

    def backend(model, example_inputs):
        fusewire_backend(model, example_inputs, options=options)
        return lambda *_: (torch.zeros(()), torch.zeros(()))

    torch._dynamo.reset()
    fusewire.clear_report()
    start, error = time.monotonic(), ""
    with torch.no_grad():
        try:
            torch.compile(fn, backend=backend)(*inputs())
        except Exception as raised:
            error = str(raised)
    return error, reasons(), time.monotonic() - start


def _one_fails():
    def broken(graph):
        raise ValueError("planted")

    hook = {"post_grad_custom_pre_pass": broken} if dist.get_rank() == 0 else {}
    return _compiling(alike, {**hook, "inline_native": False})


def test_a_rank_whose_compilation_fails_keeps_nobody_waiting():
    (error, _, _), (second, said, seconds) = shared_pool(2).run(_one_fails)
    assert "planted" in error
    assert second == ""
    assert seconds < 60
    (reason,) = said
    assert reason.startswith(DIFFER)
    assert "rank 0 could not compile it" in reason


def without(x, r, w):
    """Only the first rank's graph has the collective; both begin at the same line."""
    x = x * 2
    total = reduce(x) if dist.get_rank() == 0 else x
    return NORMS["L"](r + total, w, 1e-5), x


def _one_has_none():
    return _compiling(without, {"inline_native": False})


def test_a_rank_whose_graph_has_no_collective_keeps_nobody_waiting():
    (error, said, seconds), _ = shared_pool(2).run(_one_has_none)
    assert error == ""
    assert seconds < 60
    assert "rank 1 would fuse 0 of 0" in said[0]


def _one_expects():
    expected = {"expect_fused": "all"} if dist.get_rank() == 1 else {}
    return _compiling(logging, {**expected, "inline_native": False})


def test_an_expectation_that_the_ranks_defeat_says_so():
    (first, _, _), (second, _, _) = shared_pool(2).run(_one_expects)
    assert first == ""
    assert "expect_fused='all', but 0 of 1" in second
    assert DIFFER in second


def test_one_process_has_nobody_to_ask():
    with fake_group(2):
        assert agreement._groups() == []
    assert agreement._groups() == []


def test_the_place_is_the_line_a_graph_begins_at():
    seen = []

    def backend(model, given):
        seen.append((agreement._place(model), agreement._place(agreement._copied(model))))
        return model.forward

    torch.compile(lambda x: x * 2, backend=backend)(torch.ones(3))
    ((place, again),) = seen
    assert place == again
    assert place.startswith("test_agreement.py:")


def test_a_copy_is_the_same_graph_over_the_same_tensors():
    module = torch.nn.Linear(4, 4)
    model = torch.fx.symbolic_trace(module)
    copied = agreement._copied(model)
    x = torch.ones(2, 4)
    assert torch.equal(copied(x), model(x))
    assert str(copied.graph) == str(model.graph)
    assert copied.weight is model.weight
    next(iter(copied.graph.nodes)).meta["mark"] = True
    assert "mark" not in next(iter(model.graph.nodes)).meta
