"""Calls of `symm_mem` that are like an earlier one are launched without its preparations, and launch the same."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from fusewire.custom_ops.providers.symm_mem import launch_cache as again
from fusewire.custom_ops.providers.symm_mem import launcher as symm_mem
from fusewire.errors import ArgumentError, PeerTimeoutError, WorkspaceError

from support.launches import CpuWorkspace

BF16, FP32 = torch.bfloat16, torch.float32
SCALE, ROUND = "scale_then_round", "round_then_scale"
HIDDEN, STREAM = 512, 7


class Kernel:
    """A compiled kernel that remembers its launches."""

    function, packed_metadata = "function", "metadata"

    def __init__(self):
        self.seen = []

    def run(self, x, y, z, stream, function, metadata, details, enter, leave, *args):
        assert (y, z, stream, function, metadata) == (1, 1, STREAM, "function", "metadata")
        assert details is enter is leave is None
        self.seen.append((x, args))

    def __getitem__(self, grid):
        return lambda *args: self.seen.append(("by hooks", grid, args))


@pytest.fixture
def machine(monkeypatch):
    """A workspace, the kernel, and what went the long way: (grid, arguments)."""
    ws = CpuWorkspace(1, 4, HIDDEN, BF16, tokens=(16, 64, 256))
    ws.use(torch.empty(ws.layout.nbytes, dtype=torch.uint8))
    kernel, long = Kernel(), []

    def run(key, name, ws, plan, args):
        long.append((plan.programs, args))
        return None if symm_mem.compiles_only() else kernel

    monkeypatch.setattr(symm_mem, "_run", run)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(again, "current_raw_stream", lambda device: STREAM)
    return SimpleNamespace(ws=ws, kernel=kernel, long=long)


def tensors(tokens, residual=True, weight=BF16):
    x = torch.randn(tokens, HIDDEN).to(BF16)
    return x, x.clone() if residual else None, None if weight is None else torch.ones(HIDDEN, dtype=weight)


def place(value):
    return value.data_ptr() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("form", [SCALE, ROUND])
@pytest.mark.parametrize("weight", [BF16, FP32, None])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(("call", "tokens"), [("one_shot", 3), ("two_shot", 40), ("two_shot", 200)])
def test_the_second_call_launches_what_the_long_way_would(machine, call, tokens, residual, weight, form):
    function = getattr(symm_mem, call)
    function(machine.ws, *tensors(tokens, residual, weight), 1e-5, 1.0, form)
    assert len(machine.long) == 1
    fresh = tensors(tokens, residual, weight)
    norm, summed = function(machine.ws, *fresh, 1e-5, 1.0, form)
    assert len(machine.long) == 1
    ((programs, args),) = machine.kernel.seen
    machine.ws.known.clear()
    function(machine.ws, *fresh, 1e-5, 1.0, form)
    wanted, long = machine.long[1]
    assert programs == wanted
    assert args[:4] == tuple(map(place, long[:4]))
    assert args[4:6] == (norm.data_ptr(), summed.data_ptr())
    assert args[6:] == long[6:]
    assert norm.shape == summed.shape == (tokens, HIDDEN)
    assert norm.dtype == summed.dtype == BF16


def test_other_numbers_are_other_calls(machine):
    x, residual, weight = tensors(4)
    usual = (machine.ws, x, residual, weight, 1e-5, 0.0, SCALE)
    others = [
        (*usual[:4], 1e-6, 0.0, SCALE),
        (*usual[:4], 1e-5, 1.0, SCALE),
        (*usual[:4], 1e-5, 0.0, ROUND),
        (*usual[:2], None, weight, 1e-5, 0.0, SCALE),
        (*usual[:3], None, 1e-5, 0.0, SCALE),
        (*usual[:3], weight.float(), 1e-5, 0.0, SCALE),
        (machine.ws, *tensors(5)[:2], weight, 1e-5, 0.0, SCALE),
    ]
    symm_mem.one_shot(*usual)
    for args in others:
        before = len(machine.long)
        symm_mem.one_shot(*args)
        assert len(machine.long) == before + 1
        symm_mem.one_shot(*args)
        assert len(machine.long) == before + 1
    symm_mem.two_shot(*usual)
    assert len(machine.long) == len(others) + 2
    assert len(machine.ws.known) == len(others) + 2


def test_tensors_that_need_a_copy_go_the_long_way(machine):
    x, residual, weight = tensors(4)
    symm_mem.one_shot(machine.ws, x, residual, weight, 1e-5, 0.0, SCALE)
    wide = torch.zeros(4, 2 * HIDDEN, dtype=BF16)[:, ::2]
    shifted = torch.zeros(4 * HIDDEN + 1, dtype=BF16)[1:].view(4, HIDDEN)
    strided, moved = torch.ones(2 * HIDDEN, dtype=BF16)[::2], torch.ones(HIDDEN + 1, dtype=BF16)[1:]
    for changed in (
        *((wide, residual, weight), (shifted, residual, weight), (x, wide, weight), (x, shifted, weight)),
        *((x, residual, strided), (x, residual, moved)),
    ):
        before = len(machine.long)
        symm_mem.one_shot(machine.ws, *changed, 1e-5, 0.0, SCALE)
        assert len(machine.long) == before + 1
        assert all(place(t) % 16 == 0 and t.is_contiguous() for t in machine.long[-1][1][:6])
    assert machine.kernel.seen == []


def test_wrong_tensors_are_named_as_the_first_time(machine):
    x, residual, weight = tensors(4)
    symm_mem.one_shot(machine.ws, x, residual, weight, 1e-5, 0.0, SCALE)
    for changed, said in (
        ((x, residual[:3], weight), "the residual is"),
        ((x, residual.half(), weight), "the residual is"),
        ((x, residual, weight[:1]), "weight has shape"),
        ((x, residual, weight.view(1, -1)), "weight has shape"),
    ):
        with pytest.raises(ArgumentError, match=said):
            symm_mem.one_shot(machine.ws, *changed, 1e-5, 0.0, SCALE)
    assert machine.kernel.seen == []


def test_results_that_the_caller_brings_and_rare_options_go_the_long_way(machine):
    x, residual, weight = tensors(4)
    usual = (machine.ws, x, residual, weight, 1e-5, 0.0, SCALE)
    for options in ({"norm_out": x.clone()}, {"residual_out": x.clone()}, {"need_residual": False}):
        for call in (symm_mem.one_shot, symm_mem.two_shot):
            call(*usual)
            for _ in range(2):
                call(*usual, **options)
    for _ in range(2):
        symm_mem.two_shot(*usual, protocol="flags")
    assert len(machine.long) == 2 + 3 * 2 * 2 + 2
    assert len(machine.kernel.seen) == 4  # the usual ones after the first


def test_a_weight_that_is_converted_is_not_remembered(machine):
    x, residual, _ = tensors(4)
    for _ in range(3):
        symm_mem.one_shot(machine.ws, x, residual, torch.ones(HIDDEN, dtype=torch.float64), 1e-5, 0.0, SCALE)
    assert len(machine.long) == 3
    assert not machine.ws.known


def test_compiling_only_launches_nothing(machine):
    call = lambda: symm_mem.one_shot(machine.ws, *tensors(4), 1e-5, 0.0, SCALE)  # noqa: E731
    call()
    with symm_mem.compiling_only():
        call()
    assert machine.kernel.seen == []
    call()
    assert len(machine.kernel.seen) == 1


def test_a_wait_in_vain_and_a_closed_workspace_raise(machine, monkeypatch):
    call = lambda: symm_mem.one_shot(machine.ws, *tensors(4), 1e-5, 0.0, SCALE)  # noqa: E731
    call()

    def check(synchronize=False):
        raise PeerTimeoutError("rank 3 did not take part in time")

    with monkeypatch.context() as patched:
        patched.setattr(machine.ws, "check", check)
        with pytest.raises(PeerTimeoutError):
            call()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    machine.ws.close()
    with pytest.raises(WorkspaceError):
        call()
    assert machine.kernel.seen == []


def test_a_call_from_another_device_goes_the_long_way(machine, monkeypatch):
    call = lambda: symm_mem.one_shot(machine.ws, *tensors(4), 1e-5, 0.0, SCALE)  # noqa: E731
    call()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    call()
    assert len(machine.long) == 2


def test_a_profiler_hears_of_the_launch(machine):
    from triton import knobs

    call = lambda: symm_mem.one_shot(machine.ws, *tensors(4), 1e-5, 0.0, SCALE)  # noqa: E731
    call()
    hook = lambda *args: None  # noqa: E731
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        call()
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert machine.kernel.seen[0][0] == "by hooks"
    assert machine.kernel.seen[0][1] == (machine.long[0][0], 1, 1)


def test_what_is_known_is_bounded(machine, monkeypatch):
    monkeypatch.setattr(again, "_MAX_KNOWN", 4)
    for tokens in range(1, 12):
        symm_mem.one_shot(machine.ws, *tensors(tokens), 1e-5, 0.0, SCALE)
        assert len(machine.ws.known) <= 4
