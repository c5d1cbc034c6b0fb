"""Timers, the inputs that they time with, the check of results before timing, and the progress bar.

The GPU is a fake; real kernels and CUDA graphs are the business of gpu/tuner_check.py.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import types
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm as op
from fusewire.custom_ops.ops.norms import NormSpec, add_residual, normalize
from fusewire.custom_ops.tuning import timers, tuner
from fusewire.errors import PeerTimeoutError, WorkspaceError

from support.distributed import shared_pool
from support.tables import BF16


def test_rotating_inputs_exceed_the_cache():
    timer = timers.GpuTimer(torch.device("cuda"))
    for nbytes in (128, 1 << 14, 1 << 20, 1 << 27):
        sets = timer.sets(nbytes)
        assert 2 <= sets <= 128 == timer.sets(1)
        assert sets == 128 or sets * 2 * nbytes >= timer.COLD_BYTES
        assert timer.calls(nbytes) >= sets


def test_the_wall_clocks_median():
    lengths = iter([9.0, 4.0, 5.0, 4.0, 0.1])  # seconds; what is slow or fast but once does not count
    clock = itertools.accumulate(itertools.chain.from_iterable((0.0, next(lengths)) for _ in range(5)))
    calls = []
    with mock.patch.object(timers, "time", types.SimpleNamespace(perf_counter=lambda: next(clock))):
        assert timers.CpuTimer(torch.device("cpu")).time(calls.append, 4) == pytest.approx(4e6 / 4)
    assert calls == [0, *[0, 1, 2, 3] * 5]


class FakeGpu:
    """What GpuTimer and peer_copies use of torch.cuda: a clock that advances with each replay, streams that are none."""

    def __init__(self, milliseconds):
        self.now, self.milliseconds, self.replays, self.ended = 0.0, iter(milliseconds), 0, True
        self.capturing = False

    def event(self, enable_timing=False):
        made = types.SimpleNamespace(at=None, query=lambda: self.ended)
        made.record = lambda: setattr(made, "at", self.now)
        made.elapsed_time = lambda other: other.at - made.at
        return made

    def replay(self):
        self.replays += 1
        self.now += next(self.milliseconds)

    @contextlib.contextmanager
    def graph(self, graph, capture_error_mode):
        assert capture_error_mode == "thread_local"  # NCCL's watchdog calls into CUDA from a thread of its own
        self.capturing = True
        yield
        self.capturing = False

    def patched(self):
        stream = types.SimpleNamespace(wait_stream=lambda other: None)
        return mock.patch.multiple(
            torch.cuda, Event=self.event, CUDAGraph=lambda: types.SimpleNamespace(replay=self.replay), graph=self.graph,
            Stream=lambda device: stream, current_stream=lambda device: stream, stream=lambda s: contextlib.nullcontext(),
        )  # fmt: skip


def test_a_gpus_time_is_the_median_replay_by_call():
    warm_up, replays = [50.0, 40.0], [4.0, 4.0, 99.0, 4.0, 4.0, 4.0, 0.1, 4.0, 4.0]
    gpu, calls = FakeGpu([*warm_up, *replays]), []
    with gpu.patched():
        us = timers.GpuTimer(torch.device("cuda")).time(lambda i: calls.append((i, gpu.capturing)), 16)
    assert us == pytest.approx(4000 / 16)
    assert gpu.replays == 11
    assert calls == [(0, False), (1, False), *((i, True) for i in range(16))]


def test_a_call_that_never_ends_on_the_gpu_ends_the_wait(monkeypatch):
    gpu = FakeGpu([])
    gpu.ended = False
    monkeypatch.setenv("FUSEWIRE_TIMED_CALL_TIMEOUT_S", "0.1")
    with gpu.patched(), pytest.raises(PeerTimeoutError, match="cannot go on"):
        timers.GpuTimer(torch.device("cuda")).wait()


def test_copies_go_to_every_peers_inbox():
    nbytes = 5 << 20
    buffers = {rank: torch.ones(nbytes, dtype=torch.uint8) for rank in range(4)}
    asked = []

    def get_buffer(rank, shape, dtype, at):
        asked.append((rank, shape, dtype, at))
        return buffers[rank]

    made = types.SimpleNamespace(
        layout=types.SimpleNamespace(sizes={"inbox": nbytes}, offsets={"inbox": 256}),
        _handle=types.SimpleNamespace(get_buffer=get_buffer), world_size=4, rank=1,
    )  # fmt: skip
    pushed = []
    module = types.SimpleNamespace(push_to_peers=lambda ws, source, at: pushed.append((ws, len(source), at)))
    with (
        FakeGpu([]).patched(),
        mock.patch.dict(sys.modules, {"fusewire.custom_ops.providers.symm_mem.kernels.peer_copy": module}),
    ):
        ways, sent = timers.peer_copies(made, torch.device("cpu"))
        ways["copy engines"](0)
        ways["kernel"](0)
        assert sent == 3 * nbytes
        assert asked == [(rank, (nbytes,), torch.uint8, 256) for rank in (0, 2, 3)]
        assert [int(buffers[rank].max()) for rank in range(4)] == [0, 1, 0, 0]
        assert pushed == [(made, nbytes, 256)]
        made.layout.sizes["inbox"] = 1000
        with pytest.raises(WorkspaceError, match="too small"):
            timers.peer_copies(made, torch.device("cpu"))


def right(dtype=BF16, tokens=5, hidden=256):
    """Inputs of rank 0 of 1, and what they are to give."""
    inputs = timers.draw(0, tokens, hidden, dtype, torch.device("cpu"), 4)
    total = add_residual(inputs[0].x, inputs[0].residual)
    wanted = timers.Wanted(total, torch.full_like(total, 0.01, dtype=torch.float32))
    return inputs[0], wanted, normalize(total, NormSpec(inputs[0].weight, timers.EPS, 0.0, "scale_then_round"))


def test_inputs_differ_where_they_should():
    own, other = (timers.draw(rank, 3, 8, BF16, torch.device("cpu"), 4) for rank in (0, 1))
    assert not torch.equal(own[0].x, own[1].x)
    assert not torch.equal(own[0].x, other[0].x)
    assert torch.equal(own[0].residual, other[0].residual)
    assert torch.equal(own[0].weight, other[0].weight)
    assert len(own) == 4
    assert len({inputs.x.data_ptr() for inputs in own}) == 4


@pytest.mark.parametrize("dtype", tuner.DTYPES)
def test_a_right_result_passes(dtype):
    inputs, wanted, norm = right(dtype)
    assert timers.wrong(norm, wanted.total, inputs, wanted, True) == ""
    assert timers.wrong(norm, wanted.total, inputs, wanted, False) == ""


def test_wrong_results_are_told_apart():
    inputs, wanted, norm = right()
    total = wanted.total

    def said(norm=norm, total=total, exact=True):
        return timers.wrong(norm, total, inputs, wanted, exact)

    for value in (float("nan"), float("inf"), 0.0):
        broken = norm.clone()
        broken[3, 7] = value
        assert "the norm is off in 1 of" in said(norm=broken)
    assert "the norm is off" in said(norm=norm * 1.1)
    assert "the norm is off" in said(norm=torch.roll(norm, 1, 0))
    near = total.clone()
    near[0, 0] += near[0, 0].abs() * 2**-7 + 1e-3
    assert "the residual is off in 1 of" in said(total=near)
    far = total.clone()
    far[0, 0] += 1
    for exact in (True, False):
        assert "the residual is off in 1 of" in said(total=far, exact=exact)
        assert "the residual is off" in said(total=total * float("nan"), exact=exact)
    assert "float32" in said(norm=norm.float())
    assert "[2, 256]" in said(total=total[:2])


def test_a_sum_in_another_order_may_be_off_by_its_roundings():
    inputs, wanted, norm = right()
    off = wanted.total + 0.009
    norm = normalize(off, NormSpec(inputs.weight, timers.EPS, 0.0, "scale_then_round"))
    assert (off != wanted.total).any()
    assert timers.wrong(norm, off, inputs, with_slack(wanted, slack=0.05), False) == ""
    assert "residual" in timers.wrong(norm, off, inputs, with_slack(wanted, slack=0.001), False)


def with_slack(wanted, slack):
    return wanted._replace(slack=torch.full_like(wanted.slack, slack))


def test_fingerprints_see_one_bit_and_the_order():
    tensor = torch.randn(3, 100).to(BF16)
    other = tensor.clone()
    other.view(torch.int16)[2, 99] ^= 1
    assert timers.fingerprint(tensor) == timers.fingerprint(tensor.clone())
    assert len({timers.fingerprint(t) for t in (tensor, other, tensor.flip(1))}) == 3
    assert timers.fingerprint(torch.ones(4)) != timers.fingerprint(torch.zeros(4))


def job_reference():
    group, rank = dist.group.WORLD, dist.get_rank()
    with mock.patch.object(timers, "ROWS_AT_ONCE", 2):
        inputs = timers.draw(rank, 5, 16, BF16, torch.device("cpu"), 2)
        found = [timers.reference(each, 2, group.group_name) for each in inputs]
    exact = [op(*each, timers.EPS, 0.0, "scale_then_round", group.group_name, policy="rank_ordered") for each in inputs]
    native = [op(*each, timers.EPS, 0.0, "scale_then_round", group.group_name, policy="native") for each in inputs]
    return [
        (torch.equal(f.total, e[1]), timers.wrong(*e, i, f, True), timers.wrong(*n, i, f, False))
        for f, e, n, i in zip(found, exact, native, inputs, strict=True)
    ]


def test_the_reference_is_the_sum_in_rank_order_and_native_is_within_its_bounds():
    assert shared_pool(2).run(job_reference) == [[(True, "", "")] * 2] * 2


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(capsys):
    for terminal in (True, False):
        with mock.patch.object(sys.stderr, "isatty", return_value=terminal, create=True):
            loud, silent = timers.Progress("t", 4, True), timers.Progress("t", 4, False)
            for progress in (loud, silent):
                progress.step("first")
                progress.end()
        said = capsys.readouterr().err
        assert ("\r" in said) == terminal
        assert ("[######..................] 1/4 first" in said) == terminal
        assert ("tuning t: 1/4 first\n" in said) == (not terminal)
