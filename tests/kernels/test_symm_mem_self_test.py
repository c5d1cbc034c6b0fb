"""The calls of known answer that `symm_mem` makes before its kernels are trusted: they pass on the real kernels, in the
simulation of support/simulator.py, and they notice wrong results; and the ranks vote on them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import traceback
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm
from fusewire.custom_ops.ops.norms import normalize
from fusewire.custom_ops.ops.quantization import quantize
from fusewire.custom_ops.ops.quantized_norm import (
    all_reduce_rms_norm_quantized,
    all_reduce_rms_norm_quantized_sharded,
)
from fusewire.custom_ops.ops.sandwich_norm import all_reduce_sandwich_norm
from fusewire.custom_ops.ops.sharded_norm import all_reduce_rms_norm_sharded, own_rows
from fusewire.custom_ops.providers.symm_mem import invariant as symm_mem_invariant
from fusewire.custom_ops.providers.symm_mem import provider as symm_mem_provider
from fusewire.custom_ops.providers.symm_mem import self_test
from fusewire.custom_ops.providers.symm_mem.layout import Layout
from fusewire.custom_ops.providers.symm_mem.prepared_launch import PreparedCall
from fusewire.custom_ops.workspaces import provider as interface
from fusewire.errors import WorkspaceError

from support.distributed import shared_pool

KINDS = (
    self_test.PLAIN,
    self_test.SANDWICH,
    self_test.SHARDED,
    self_test.SHARDED_SANDWICH,
)


def simulate(kind, world, dtype, spoil=None, quant=None):
    """Make all probes of a kind on simulated ranks; for each probe, which ranks say it came out wrong."""
    from support import simulator as sim

    class Rank(sim.Rank):
        def begin(self, call):
            self.begun += 1
            self.blocks = self.machine.blocks_of(call[self.ws.rank])

        def end(self):
            for block in self.blocks:
                block.flush()
            self.blocks = []

    machine = sim.Machine(7)
    sim.install(machine)
    quant = quant and self_test.QuantKind(*quant)
    layout = Layout(
        world, 128 if quant else 64, dtype.itemsize, sim.ONE_SHOT_TOKENS, sim.DATA_TOKENS, sim.MAX_TOKENS, 0
    )
    buffers = [torch.zeros(layout.nbytes + 16, dtype=torch.uint8)[: layout.nbytes] for _ in range(world)]
    for buffer in buffers:
        machine.hold(buffer)
        for name in layout.ones:
            buffer[layout.offsets[name] : layout.offsets[name] + layout.sizes[name]] = 255
    spaces = [sim.CpuWorkspace(rank, buffers, layout, dtype, 3) for rank in range(world)]
    for ws in spaces:
        machine.hold(ws._host_error)
    verdicts = []
    for probe in self_test._probes(spaces[0], kind, quant):
        launches = []
        for ws in spaces:

            def first_half(call, *args, ws=ws, launched=launches):
                make = getattr(call.make, "func", call.make) if spoil == "plain" else call.make
                launched.append(make(ws, *args[:3], inner=args[3], quantization=(*args, None)[4]))
                return launched[-1].results

            self_test._make(first_half, ws, kind, probe, quant=quant)
        machine.ranks = [Rank(machine, ws, [launches], None) for ws in spaces]
        machine.run()
        outputs = [launch.results for launch in launches]
        if isinstance(spoil, int):
            spoilt = outputs[spoil][0 if quant is None else 2]
            spoilt[-1, 3] = spoilt[-1, 3].float() * -1.5 + 0.5
        wrong = [
            bool(self_test._make(lambda *_, found=found: found, ws, kind, probe, quant=quant))
            for ws, found in zip(spaces, outputs, strict=True)
        ]
        verdicts.append([str(probe.call.make), probe.tokens, wrong])
    return verdicts


def _simulated(*cases):
    """Verdicts by case, from a process in which Triton interprets."""
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    run = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(cases),
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("[")]


def test_probes_pass_on_the_kernels():
    cases = [(kind, world, "bfloat16", None) for kind in KINDS for world in (2, 3)]
    for case, verdicts in zip(cases, _simulated(*cases), strict=True):
        assert len(verdicts) >= 4, case
        assert not any(any(wrong) for _, _, wrong in verdicts), (case, verdicts)


INVARIANT = tuple(self_test.kind_of(sandwich, sharded, True) for sandwich in (False, True) for sharded in (False, True))


def test_probes_of_batch_invariant_calls_too():
    cases = [(kind, 2, "float32", 1) for kind in INVARIANT]
    for case, verdicts in zip(cases, _simulated(*cases), strict=True):
        assert len(verdicts) >= 4, case
        assert all(wrong == [False, True] for _, _, wrong in verdicts), (case, verdicts)  # rank 1's is spoilt


def test_kernels_that_are_not_batch_invariant_do_not_pass_for_it():
    (verdicts,) = _simulated((INVARIANT[0], 2, "float32", "plain"))
    assert any(any(wrong) for _, _, wrong in verdicts), verdicts


def test_probes_notice_one_wrong_number():
    cases = [(kind, 2, "float32", 1) for kind in KINDS]
    for case, verdicts in zip(cases, _simulated(*cases), strict=True):
        assert all(wrong == [False, True] for _, _, wrong in verdicts), (case, verdicts)


QUANTS = [
    [self_test.SHARDED, "token scale_floor=1e-06", False, False],
    [self_test.SHARDED, "group amax_by=multiply", False, True],
    [self_test.PLAIN, "tensor apply=reciprocal", True, True],
    [self_test.SANDWICH, "token", True, False],
]  # fmt: skip


def test_probes_of_quantised_calls_too():
    form = "round_then_scale"
    cases = [(kind, 2, "bfloat16", 1, (form, *quant)) for kind, *quant in QUANTS]
    for case, verdicts in zip(cases, _simulated(*cases), strict=True):
        assert len(verdicts) == 2 + (case[0] != self_test.SHARDED), case
        assert all(wrong == [False, True] for _, _, wrong in verdicts), (case, verdicts)  # rank 1's is spoilt


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("good", [1, 2])
def test_a_call_is_tested_with_its_prepared_launch_too(good, kind):
    """A call that is right the first time only does not pass."""
    layout = SimpleNamespace(data_tokens=8, max_tokens=64, outputs=0, one_shot_tokens=4)
    made = SimpleNamespace(rank=0, world_size=1, hidden=16, dtype=torch.float32, layout=layout)
    made.device, made.check = torch.device("cpu"), lambda synchronize=False: None
    times, inputs = {}, set()

    def run(call, x, residual, norm, inner):
        times[call] = times.get(call, 0) + 1
        inputs.add((call, *x.flatten().tolist()))
        total = x if inner is None else normalize(x, inner)
        summed = total + residual
        return normalize(summed, norm) + (times[call] > good), summed

    with pytest.raises(WorkspaceError, match="known answer") if good < 2 else contextlib.nullcontext():
        self_test.execute_probes(run, made, kind)
    assert set(times.values()) == {2}
    assert len(inputs) == 2 * len(times) == (12 if kind in (self_test.PLAIN, self_test.SANDWICH) else 8)


# --- The vote ---------------------------------------------------------------------------------------------------


def _held(outputs=0, dtype=torch.float32):
    """A workspace whose kernels are native, on the CPU."""
    group = dist.group.WORLD
    key = interface.WorkspaceKey("symm_mem", group.group_name, dtype, 16)
    layout = SimpleNamespace(data_tokens=8, max_tokens=64, outputs=outputs, one_shot_tokens=4)
    made = SimpleNamespace(nbytes=0, rank=group.rank(), world_size=group.size(), hidden=16, dtype=dtype, layout=layout)
    made.device, made.check, made.close = torch.device("cpu"), lambda synchronize=False: None, lambda: None
    order = SimpleNamespace(lock=threading.RLock(), enter=lambda _: None)
    with mock.patch.object(interface.StreamOrder, "of", return_value=order):
        return symm_mem_provider.HeldWorkspace(interface.Request(key, group, torch.device("cpu"), 64), made)


def _native(call, x, residual, norm, inner=None, quantization=None):
    """What a prepared call computes, by native."""
    if quantization is not None:
        normed, summed = _native(call, x, residual, norm, inner)
        quantized, scales = quantize(normed, quantization.scale, quantization.quant)
        scales = None if quantization.quant.startswith("tensor") else scales
        return normed if quantization.with_norm else None, summed, quantized, scales
    name = dist.group.WORLD.group_name
    tail = inner or (None, 0.0, 0.0, "")
    if call.make.__name__ == "two_shot_sharded_launch":
        return all_reduce_rms_norm_sharded.native(x, residual, *norm, *tail, name)
    if inner is not None:
        return all_reduce_sandwich_norm.native(x, residual, *norm, *tail, name)
    return all_reduce_rms_norm.native(x, residual, *norm, name)


def _broken(*args):
    norm, summed, *quantized = _native(*args)
    if dist.get_rank() == 1:
        norm = None if norm is None else norm + 1.0
        quantized[:1] = [part.float().neg().to(part.dtype) for part in quantized[:1]]
    return norm, summed, *quantized


def _votes(good):
    """Per kind: was it proven, how often were probes made, and did the bound call compute what native does."""
    function = _native if good else _broken
    made_calls = []

    def counted(*args):
        made_calls.append(1)
        return function(*args)

    held, provider, said = _held(dtype=torch.bfloat16), symm_mem_provider.SymmMemProvider(), []
    with mock.patch.object(PreparedCall, "__call__", counted):
        group = dist.group.WORLD
        x = torch.randn(5, 16, generator=torch.Generator().manual_seed(dist.get_rank())).bfloat16()
        residual, w = torch.ones(5, 16, dtype=torch.bfloat16), torch.ones(16, dtype=torch.bfloat16)
        for op, inner in (
            (all_reduce_sandwich_norm, (w, 1e-6, 0.0, "scale_then_round")),
            (all_reduce_rms_norm_sharded, (None, 0.0, 0.0, "")),
            (all_reduce_rms_norm_sharded, (w, 1e-6, 0.0, "scale_then_round")),
            (all_reduce_rms_norm_quantized, (None, 0.0, 0.0, "", torch.ones(1), "tensor", True)),
            (all_reduce_rms_norm_quantized_sharded, (None, 0.0, 0.0, "", None, "token", False)),
        ):
            sharded = "sharded" in op.name
            given = own_rows(residual, group.rank(), group.size()) if sharded else residual
            args = (x, given, w, 1e-6, 0.0, "scale_then_round", *inner, group.group_name)
            whole = provider.bind_derived(held, "symm_mem/twoshot", op.name, args)
            tried = len(made_calls)
            again = provider.bind_derived(held, "symm_mem/oneshot", op.name, args)
            right = None
            if whole is not None:
                right = all(
                    torch.equal(a.float(), b.float()) for a, b in zip(whole(*args), op.native(*args), strict=True)
                )
            said.append((whole is not None, (again is not None) == (whole is not None), len(made_calls) - tried, right))
        return said


@pytest.mark.parametrize("good", [True, False])
def test_ranks_vote_on_what_they_tried(good):
    """One rank's wrong result makes all of them do without the kernel; nothing is tried twice."""
    for said in shared_pool(2).run(_votes, good):
        if good:
            assert said == [(True, True, 1, True)] * 5
        else:
            assert said == [(False, True, 0, None)] * 5


def test_no_kernel_quantises_in_fp32():
    """Its norm would not have the bits of the kernel without FP8."""
    x, provider = torch.ones(5, 16), symm_mem_provider.SymmMemProvider()
    args = (x, x, None, 1e-6, 0.0, "scale_then_round", None, 0.0, 0.0, "", None, "token", False, "0")
    for op in (all_reduce_rms_norm_quantized, all_reduce_rms_norm_quantized_sharded):
        assert provider.bind_derived(object.__new__(symm_mem_provider.HeldWorkspace), "", op.name, args) is None


def _invariant_votes(good):
    """Per turn: why the batch-invariant kernels are refused; and how often probes were made."""
    made_calls = []

    def counted(call, x, residual, norm, inner=None):
        made_calls.append(call)
        fn = all_reduce_rms_norm.providers["rank_ordered_batch_invariant"].fn
        normed, summed = fn(x, residual, *norm, dist.group.WORLD.group_name)
        return normed + float(not good and dist.get_rank() == 1), summed

    held, provider = _held(), symm_mem_invariant.InvariantProvider()
    with mock.patch.object(PreparedCall, "__call__", counted):
        refusals = [provider.refusal(held) for _ in range(2)]
    assert all(call.make.keywords == {"batch_invariant": True} for call in made_calls)
    return refusals, len(made_calls)


def test_ranks_vote_on_batch_invariant_kernels():
    """One rank's wrong bits make all do without; nothing is tried twice."""
    for refusals, made in shared_pool(2).run(_invariant_votes, True):
        assert refusals == ["", ""]
        assert made > 0
    for refusals, _ in shared_pool(2).run(_invariant_votes, False):
        assert all("did not pass" in refusal for refusal in refusals)


def test_batch_invariant_calls_share_the_workspaces_of_symm_mem():
    plain, invariant = symm_mem_provider.SymmMemProvider(), symm_mem_invariant.InvariantProvider()
    assert invariant.workspace_name == plain.workspace_name == plain.name != invariant.name
    assert invariant.variants == plain.variants  # so the costs are those of symm_mem


def _during_capture():
    """What is bound during capture, and whether it is tried when the capture is over."""
    held = _held()
    provider, x = symm_mem_provider.SymmMemProvider(), torch.ones(5, 16)
    args = (x, x, None, 1e-6, 0.0, "scale_then_round", None, 1e-6, 0.0, "scale_then_round", dist.group.WORLD.group_name)
    bound = []
    with (
        mock.patch.object(PreparedCall, "__call__", _native),
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", side_effect=[True, False]),
    ):
        for _ in range(2):
            bound.append(provider.bind_derived(held, "symm_mem/twoshot", all_reduce_sandwich_norm.name, args))
    return [each is not None for each in bound]


def test_nothing_is_tried_during_capture():
    assert shared_pool(2).run(_during_capture) == [[False, True]] * 2


if __name__ == "__main__":
    torch.set_num_threads(1)
    for chosen, size, name, *rest in json.load(sys.stdin):
        try:
            print(json.dumps(simulate(chosen, size, getattr(torch, name), *rest)), flush=True)
        except Exception:
            traceback.print_exc()
            sys.exit(1)


@pytest.mark.parametrize(("ranks", "data"), [(2, 512), (4, 512), (5, 1024), (8, 1024)])
def test_a_workspace_is_made_as_it_was_counted(ranks, data):
    """What the ranks vote on is the memory that is then taken; more ranks use the low-latency protocol for longer."""
    made = []

    def record(group_name, hidden, dtype, max_tokens, *, timeout_s, device, multiprocessors, barrier, **sizes):
        assert multiprocessors == 78  # the least of the ranks
        assert timeout_s == 77
        sizes = {name: min(size, max_tokens) if name != "outputs" else size for name, size in sizes.items()}
        made.append(Layout(ranks, hidden, dtype.itemsize, max_tokens=max_tokens, **sizes))
        return SimpleNamespace(rank=0, world_size=ranks, nbytes=made[-1].nbytes)

    group = SimpleNamespace(size=lambda: ranks)
    for tokens in (100, 4096):
        key = interface.WorkspaceKey("symm_mem", "group", torch.bfloat16, 8192)
        facts = tuple({"multiprocessors": 78 + (rank + 1) % ranks, "kernel_timeout_s": 77.0} for rank in range(ranks))
        request = interface.Request(key, group, torch.device("cpu"), tokens, facts)
        with mock.patch.object(symm_mem_provider, "SymmMemWorkspace", record):
            symm_mem_provider.SymmMemProvider().create(request, SimpleNamespace(barrier=lambda: None))
        assert made[-1].nbytes == symm_mem_provider.SymmMemProvider().nbytes(8192, torch.bfloat16, ranks, tokens)
        assert made[-1].data_tokens == min(data, tokens)
