"""Calls of `symm_mem` that are like an earlier one are launched as that prepared it, and launch the same."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from fusewire.custom_ops.ops.norms import NormSpec
from fusewire.custom_ops.ops.sharded_norm import own_rows
from fusewire.custom_ops.providers.symm_mem import launcher as symm_mem
from fusewire.custom_ops.providers.symm_mem import prepared_launch
from fusewire.custom_ops.providers.symm_mem.arguments import Quantization
from fusewire.custom_ops.providers.symm_mem.prepared_launch import PreparedCall
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
    """A workspace, the kernel, and the launches that were checked."""
    ws = CpuWorkspace(1, 4, HIDDEN, BF16, tokens=(16, 64, 256), outputs=2)
    ws.use(torch.empty(ws.layout.nbytes, dtype=torch.uint8))
    kernel, checked = Kernel(), []

    def run(ws, launch):
        checked.append(launch)
        return None if symm_mem.compiles_only() else kernel

    monkeypatch.setattr(symm_mem, "run", run)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(prepared_launch, "current_raw_stream", lambda device: STREAM)
    return SimpleNamespace(ws=ws, kernel=kernel, checked=checked)


def bound(machine, kind="one_shot", output=None):
    return PreparedCall(machine.ws, getattr(symm_mem, f"{kind}_launch"), output)


def tensors(tokens, residual=True, weight=BF16):
    x = torch.randn(tokens, HIDDEN).to(BF16)
    return x, x.clone() if residual else None, None if weight is None else torch.ones(HIDDEN, dtype=weight)


def arguments(x, residual, *norm):
    return x, residual, NormSpec(*norm)


def place(value):
    return value.data_ptr() if isinstance(value, torch.Tensor) else value


def check_second_call(machine, call, first, second):
    """The second call is launched without a check, as a check of it would have had it launched."""
    call(*first)
    assert len(machine.checked) == 1
    norm, summed, *quantized = results = call(*second)
    assert len(machine.checked) == 1
    ((programs, args),) = machine.kernel.seen
    PreparedCall(call.ws, call.make, call._output)(*second)
    wanted = machine.checked[1]
    assert programs == wanted.config.programs
    assert args[:5] == tuple(map(place, wanted.tensors[:5]))
    assert args[5:7] == (place(norm), place(summed))
    assert args[7:10] == (place(wanted.tensors.scale), *map(place, quantized or (None, None)))
    assert args[10:] == wanted.arguments
    for made, result in zip(results, wanted.results, strict=True):
        assert (made is None) == (result is None)
        if made is not None:
            assert made.shape == result.shape
            assert made.dtype == result.dtype
            assert made.stride() == result.stride()
    assert norm is None or norm.dtype == summed.dtype == BF16
    return norm, summed, wanted


@pytest.mark.parametrize("form", [SCALE, ROUND])
@pytest.mark.parametrize("weight", [BF16, FP32, None])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(("kind", "tokens"), [("one_shot", 3), ("two_shot", 40), ("two_shot", 200)])
def test_the_second_call_launches_what_a_checked_one_would(machine, kind, tokens, residual, weight, form):
    first, second = (arguments(*tensors(tokens, residual, weight), 1e-5, 1.0, form) for _ in range(2))
    check_second_call(machine, bound(machine, kind), first, second)


@pytest.mark.parametrize("inner", [None, (BF16, SCALE), (FP32, ROUND), (None, SCALE)])
@pytest.mark.parametrize("output", [None, 1])
@pytest.mark.parametrize(("kind", "tokens"), [("one_shot", 1), ("two_shot", 40), ("two_shot", 201)])
@pytest.mark.parametrize("sharded", [True, False])
def test_derived_calls_and_results_in_place_too(machine, kind, tokens, sharded, output, inner):
    """Each call with a new inner weight; a result in an output buffer is there again."""
    if kind == "one_shot" and output is not None:
        return
    kind = "two_shot_sharded" if sharded else kind

    def args():
        x, residual, weight = tensors(tokens)
        given = own_rows(residual, 1, 4) if sharded else residual
        norm = None if inner is None else NormSpec(
            None if inner[0] is None else torch.ones(HIDDEN, dtype=inner[0]), 1e-3, 1.0, inner[1]
        )  # fmt: skip
        return x, given, NormSpec(weight, 1e-5, 0.0, SCALE), norm

    norm, summed, wanted = check_second_call(machine, bound(machine, kind, output), args(), args())
    in_place = output is not None and tokens > 64
    assert wanted.outputs == ((output, None) if in_place and sharded else (None, output) if in_place else (None, None))
    for result, slot in zip((norm, summed), wanted.outputs, strict=True):
        assert (result.data_ptr() == machine.ws.output(1, tokens).data_ptr()) == (slot is not None)


@pytest.mark.parametrize("output", [None, 1])
@pytest.mark.parametrize("with_norm", [True, False])
@pytest.mark.parametrize("quant", ["tensor", "token", "group layout=aligned_columns"])
@pytest.mark.parametrize(("kind", "tokens"), [("one_shot", 1), ("two_shot", 40), ("two_shot_sharded", 201)])
def test_quantised_calls_too(machine, kind, tokens, quant, with_norm, output):
    """Each call with another scale, which need not be aligned as rows are."""
    if kind == "one_shot" and output is not None:
        return
    scales = iter(torch.ones(9)[1:])

    def args():
        x, residual, weight = tensors(tokens)
        given = own_rows(residual, 1, 4) if kind == "two_shot_sharded" else residual
        scale = next(scales) if quant == "tensor" else None
        return x, given, NormSpec(weight, 1e-5, 0.0, SCALE), None, Quantization(quant, scale, with_norm)

    first, second = args(), args()
    norm, _, wanted = check_second_call(machine, bound(machine, kind, output), first, second)
    assert (norm is None) == (not with_norm)
    place = 0 if with_norm and kind == "two_shot_sharded" else 2 if kind == "two_shot_sharded" else 1
    slots = [output if index == place and tokens > 64 else None for index in range(4)]
    assert wanted.outputs == tuple(slots)


def test_other_numbers_are_other_calls(machine):
    x, residual, weight = tensors(4)
    inner = NormSpec(None, 1e-3, 0.0, SCALE)
    usual = arguments(x, residual, weight, 1e-5, 0.0, SCALE)
    others = [
        arguments(x, residual, weight, 1e-6, 0.0, SCALE),
        arguments(x, residual, weight, 1e-5, 1.0, SCALE),
        arguments(x, residual, weight, 1e-5, 0.0, ROUND),
        arguments(x, None, weight, 1e-5, 0.0, SCALE),
        arguments(x, residual, None, 1e-5, 0.0, SCALE),
        arguments(x, residual, weight.float(), 1e-5, 0.0, SCALE),
        arguments(*tensors(5)[:2], weight, 1e-5, 0.0, SCALE),
        arguments(x.view(2, 2, HIDDEN), residual.view(2, 2, HIDDEN), weight, 1e-5, 0.0, SCALE),
        (*usual, inner),
        (*usual, NormSpec(None, 1e-4, 0.0, SCALE)),
        (*usual, NormSpec(None, 1e-3, 1.0, SCALE)),
        (*usual, NormSpec(None, 1e-3, 0.0, ROUND)),
        (*usual, NormSpec(weight, 1e-3, 0.0, SCALE)),
        (*usual, None, Quantization("token", None, True)),
        (*usual, None, Quantization("token", None, False)),
        (*usual, None, Quantization("token", torch.ones(1), True)),
        (*usual, None, Quantization("tensor", torch.ones(1), True)),
        (*usual, None, Quantization("group", None, True)),
    ]
    call = bound(machine)
    call(*usual)
    for args in others:
        for prepared, other in ((usual, args), (args, usual)):
            call(*prepared)
            before, launched = len(machine.checked), len(machine.kernel.seen)
            call(*other)
            assert (len(machine.checked), len(machine.kernel.seen)) == (before + 1, launched)
            call(*other)
            assert (len(machine.checked), len(machine.kernel.seen)) == (before + 1, launched + 1)


def test_tensors_that_need_a_copy_are_checked(machine):
    x, residual, weight = tensors(4)
    call = bound(machine)
    call(*arguments(x, residual, weight, 1e-5, 0.0, SCALE))
    wide = torch.zeros(4, 2 * HIDDEN, dtype=BF16)[:, ::2]
    shifted = torch.zeros(4 * HIDDEN + 1, dtype=BF16)[1:].view(4, HIDDEN)
    strided, moved = torch.ones(2 * HIDDEN, dtype=BF16)[::2], torch.ones(HIDDEN + 1, dtype=BF16)[1:]
    for changed in (
        *((wide, residual, weight), (shifted, residual, weight), (x, wide, weight), (x, shifted, weight)),
        *((x, residual, strided), (x, residual, moved)),
    ):
        before = len(machine.checked)
        call(*arguments(*changed, 1e-5, 0.0, SCALE))
        assert len(machine.checked) == before + 1
        given = [t for t in machine.checked[-1].tensors if t is not None]
        assert all(t.data_ptr() % 16 == 0 and t.is_contiguous() for t in given)
    assert machine.kernel.seen == []


def test_wrong_tensors_are_named_as_the_first_time(machine):
    x, residual, weight = tensors(4)
    call = bound(machine)
    call(*arguments(x, residual, weight, 1e-5, 0.0, SCALE))
    for changed, said in (
        ((x, residual[:3], weight), "the residual is"),
        ((x, residual.half(), weight), "the residual is"),
        ((x, residual, weight[:1]), "weight has shape"),
        ((x, residual, weight.view(1, -1)), "weight has shape"),
        ((x.half(), residual.half(), weight), "but the workspace is for"),
    ):
        with pytest.raises(ArgumentError, match=said):
            call(*arguments(*changed, 1e-5, 0.0, SCALE))
    assert machine.kernel.seen == []


def test_a_weight_that_is_converted_is_converted_each_time(machine):
    x, residual, weight = tensors(4)
    call, double = bound(machine), torch.ones(HIDDEN, dtype=torch.float64)
    for _ in range(3):
        call(*arguments(x, residual, double, 1e-5, 0.0, SCALE))
        call(*arguments(x, residual, weight, 1e-5, 0.0, SCALE), NormSpec(double, 1e-5, 0.0, SCALE))
    assert len(machine.checked) == 6
    assert machine.kernel.seen == []


def test_calls_without_tokens_prepare_nothing(machine, monkeypatch):
    monkeypatch.undo()
    call = bound(machine, "two_shot_sharded")
    for _ in range(2):
        norm, summed = call(torch.empty(0, HIDDEN, dtype=BF16), None, NormSpec(None, 1e-5, 0.0, SCALE))
        assert norm.shape == summed.shape == (0, HIDDEN)


def test_compiling_only_launches_nothing(machine):
    prepared = bound(machine)
    call = lambda: prepared(*arguments(*tensors(4), 1e-5, 0.0, SCALE))  # noqa: E731
    call()
    with symm_mem.compiling_only():
        call()
    assert machine.kernel.seen == []
    call()
    assert len(machine.kernel.seen) == 1


def test_a_wait_in_vain_and_a_closed_workspace_raise(machine, monkeypatch):
    prepared = bound(machine)
    call = lambda: prepared(*arguments(*tensors(4), 1e-5, 0.0, SCALE))  # noqa: E731
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


def test_a_launch_from_another_device_makes_its_own_current(machine, monkeypatch):
    prepared, entered = bound(machine), []
    call = lambda: prepared(*arguments(*tensors(4), 1e-5, 0.0, SCALE))  # noqa: E731
    call()

    @contextlib.contextmanager
    def device(wanted):
        before = len(machine.kernel.seen)
        yield
        entered.append((wanted, len(machine.kernel.seen) - before))

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    call()
    assert entered == [(machine.ws.device, 1)]
    assert len(machine.checked) == 1


def test_a_profiler_is_called_at_a_launch(machine):
    from triton import knobs

    prepared = bound(machine)
    call = lambda: prepared(*arguments(*tensors(4), 1e-5, 0.0, SCALE))  # noqa: E731
    call()
    hook = lambda *args: None  # noqa: E731
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        call()
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert machine.kernel.seen[0][0] == "by hooks"
    assert machine.kernel.seen[0][1] == (machine.checked[0].config.programs, 1, 1)
