"""FlashInfer as a provider, without a GPU: each limit's reason, each guard, the calls it makes, the votes.

A fake `flashinfer` takes the real one's place in sys.modules. It computes over gloo what the kernels compute,
insists on what they insist on, and records its calls; the real kernels' numbers are the business of
gpu/flashinfer_check.py.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import types
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from fusewire.custom_ops import api
from fusewire.custom_ops.dispatch import dispatcher as dispatch
from fusewire.custom_ops.dispatch.cost_tables import ONE_SHOT, TWO_SHOT
from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm
from fusewire.custom_ops.ops.norms import NormSpec
from fusewire.custom_ops.providers.alignment import aligned
from fusewire.custom_ops.providers.flashinfer import library as flashinfer_library
from fusewire.custom_ops.providers.flashinfer import provider
from fusewire.custom_ops.providers.flashinfer import workspace as flashinfer_workspace
from fusewire.custom_ops.workspaces import provider as interface
from fusewire.custom_ops.workspaces import registry as workspace
from fusewire.custom_ops.workspaces import stream_order
from fusewire.errors import CaptureError, NoProviderError, PeerTimeoutError, WorkspaceError

from support.distributed import fake_group, shared_pool
from support.fake_flashinfer import args_of, fake_flashinfer

HIDDEN = 64
BF16 = torch.bfloat16


# --- Is it there? -------------------------------------------------------------------------------------------


def test_a_torch_without_cuda_is_named_before_flashinfer_is_imported(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    flashinfer_library.library.cache_clear()
    assert "built without CUDA" in provider.supported().reason
    assert flashinfer_library.library.cache_info().currsize == 0
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "finds no CUDA GPU" in provider.supported().reason


@pytest.mark.parametrize(("value", "refused"), [("1", True), ("on", True), ("0", False), ("", False)])
def test_batch_invariant_mode_refuses(monkeypatch, value, refused):
    monkeypatch.setenv("FUSEWIRE_BATCH_INVARIANT", value)
    assert ("changes with the number of tokens" in provider.supported().reason) == refused


@pytest.mark.parametrize(("capability", "ok"), [((8, 0), False), ((9, 0), True), ((10, 3), True), ((11, 0), False)])
def test_compute_capability(monkeypatch, capability, ok):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    with fake_flashinfer():
        found = provider.supported()
    assert bool(found) == ok
    if not ok:
        assert f"compute capability {capability[0]}.{capability[1]}" in found.reason


@pytest.mark.parametrize(
    ("version", "ok"),
    [
        ("0.6.15", True),
        ("0.6.18.post1", True),
        ("0.7.0", True),
        ("0.6.16rc1", True),
        ("1.0", True),
        ("0.6.14", False),
        ("0.6.15rc2", False),
        ("0.6.15.dev20260101", False),
        ("0.0.0+unknown", False),
        ("unknown", False),
    ],
)
def test_versions(version, ok):
    with fake_flashinfer(version):
        reason = flashinfer_library.library().reason
    assert (not reason) == ok
    if not ok:
        assert version in reason
        assert "pip install" in reason


def test_not_installed(monkeypatch):
    flashinfer_library.library.cache_clear()
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    monkeypatch.setattr(
        flashinfer_library.importlib,
        "import_module",
        mock.Mock(side_effect=ModuleNotFoundError("no", name="flashinfer")),
    )
    assert "pip install 'fusewire[flashinfer]'" in flashinfer_library.library().reason
    flashinfer_library.library.cache_clear()


@pytest.mark.parametrize(
    "error",
    [
        AssertionError("Torch not compiled with CUDA enabled"),
        OSError("no libcuda"),
        ModuleNotFoundError("No module named 'tvm_ffi'", name="tvm_ffi"),
    ],
)
def test_whatever_the_import_raises_becomes_the_reason(error):
    with fake_flashinfer():
        real = flashinfer_library.importlib.import_module

        def failing(name):
            if name == "flashinfer.comm":
                raise error
            return real(name)

        with mock.patch.object(flashinfer_library.importlib, "import_module", failing):
            reason = flashinfer_library.library().reason
    assert type(error).__name__ in reason
    assert str(error) in reason


def test_an_api_that_lacks_something_is_named():
    with fake_flashinfer() as fake:
        fake.modules["flashinfer.comm"].allreduce_fusion = lambda input, workspace, pattern: None
        flashinfer_library.library.cache_clear()
        assert "weight_bias" in flashinfer_library.library().reason
        del fake.modules["flashinfer.comm"].allreduce_fusion
        flashinfer_library.library.cache_clear()
        assert "no flashinfer.comm.allreduce_fusion" in flashinfer_library.library().reason


# --- What it can compute ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hidden", "dtype", "ranks", "said"),
    [
        (8192, BF16, 3, "3 ranks"),
        (8192, BF16, 1, "1 ranks"),
        (8192, torch.float64, 2, "float64"),
        (100, BF16, 2, "not a multiple of 8"),
        (0, BF16, 2, "not a multiple of 8"),
        (6, torch.float32, 2, "not a multiple of 4"),
        (8 * 1031, BF16, 2, "1031 threads"),
        (1 << 26, BF16, 16, "threads"),
    ],
)
def test_limits(hidden, dtype, ranks, said):
    found = provider.limits(hidden, dtype, ranks)
    assert not found
    assert said in found.reason


@pytest.mark.parametrize("hidden", [64, 576, 2048, 2688, 2880, 4096, 5120, 5376, 7168, 8192, 16384])
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
def test_every_hidden_size_of_the_issue_is_within_the_limits(hidden, dtype, ranks):
    assert provider.limits(hidden, dtype, ranks)
    tokens = provider.max_tokens(hidden, dtype, ranks)
    assert ranks * tokens * hidden * dtype.itemsize < 1 << 30 <= ranks * (tokens + 1) * hidden * dtype.itemsize


def test_the_size_that_hung_is_out_and_the_one_below_is_in():
    assert provider.max_tokens(8192, BF16, 8) == 8191
    assert 8192 not in provider.token_limit(ONE_SHOT, 8192, BF16, 8, provider.max_tokens(8192, BF16, 8))


def test_two_shot_wants_more_tokens_than_ranks():
    span = provider.token_limit(TWO_SHOT, 8192, BF16, 4, 1024)
    assert 4 not in span
    assert 5 in span
    assert 1024 in span
    assert 1025 not in span


def test_two_shot_in_fp32_on_two_ranks_stops_at_half_the_workspace():
    span = provider.token_limit(TWO_SHOT, 4096, torch.float32, 2, 1000)
    assert 500 in span
    assert 501 not in span
    assert 1000 in provider.token_limit(TWO_SHOT, 4096, torch.float32, 4, 1000)


@pytest.mark.parametrize(
    ("version", "ok"),
    [("0.6.18.post1", False), ("0.7.1", False), ("0.7.2.dev3", False), ("0.7.2", True), ("0.7.2.post1", True)],
)
def test_two_shot_waits_for_the_version_whose_barrier_is_right(monkeypatch, version, ok):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    workspace_provider = interface.PROVIDERS["flashinfer"]
    with fake_flashinfer(version):
        assert bool(workspace_provider.token_limit(TWO_SHOT, 8192, BF16, 4, 1024)) == ok
        assert 1024 in workspace_provider.token_limit(ONE_SHOT, 8192, BF16, 4, 1024)
        reason = flashinfer_library.two_shot().reason
        assert reason == "" if ok else f"FlashInfer {version}'s two-shot barrier can let a rank pass early" in reason


def test_two_shot_needs_a_thread_for_each_rank():
    assert not provider.token_limit(TWO_SHOT, 32, BF16, 8, 1000)
    assert provider.token_limit(TWO_SHOT, 64, BF16, 8, 1000)


def test_no_tokens_are_served_without_a_launch():
    assert 0 in provider.token_limit(ONE_SHOT, 64, BF16, 2, 10)


def test_memory_is_what_the_formula_says():
    exact = 4 * (4 * 2048 * 8192 * 2)
    found = provider.workspace_bytes(8192, BF16, 4, 2048)
    assert 0 <= found - exact - 2049 * 8192 * 2 <= 4 * (2 << 20)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weight": torch.float32}, "the weight is float32 and x is bfloat16"),
        ({"residual": torch.float32}, "the residual is float32 and x is bfloat16"),
        ({"x": torch.float64}, "x is float64"),
        ({"hidden": 100}, "not a multiple of 8"),
        ({"group": "nobody"}, "no process group named 'nobody'"),
        ({"device": "cpu"}, "x is on cpu"),
        ({}, ""),
    ],
)
def test_supports_args(change, said, monkeypatch):
    hidden, dtype = change.get("hidden", 64), change.get("x", BF16)
    monkeypatch.setattr(provider, "_on_gpu", lambda x: "device" not in change)
    x = torch.zeros(2, 3, hidden, dtype=dtype)
    args = args_of(
        x,
        torch.zeros(2, 3, hidden, dtype=change.get("residual", dtype)),
        torch.zeros(hidden, dtype=change.get("weight", dtype)),
    )
    with fake_group(4) as group:
        found = provider.supports_args(*args[:-1], change.get("group", group.group_name))
    assert bool(found) == (not said)
    assert said in found.reason


def test_supports_args_takes_fake_tensors_and_a_symbolic_number_of_tokens(monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    monkeypatch.setattr(provider, "_on_gpu", lambda x: True)
    with fake_group(2) as group, FakeTensorMode(shape_env=ShapeEnv()) as mode:
        x = mode.from_tensor(torch.zeros(6, 64, dtype=BF16))
        assert provider.supports_args(*args_of(x, x, None, group.group_name))


def test_without_a_process_group():
    assert "not initialised" in provider.supports_args(*args_of(torch.zeros(2, 64))).reason


# --- Kernels ------------------------------------------------------------------------------------------------


def test_missing_kernels_without_a_compiler_are_a_reason(monkeypatch):
    monkeypatch.setattr(flashinfer_library, "find_nvcc", lambda: None)
    monkeypatch.setenv("CUDA_HOME", "/no/such/cuda")
    with (
        fake_flashinfer(kernels="missing") as fake,
        pytest.raises(WorkspaceError, match=r"nvcc in CUDA_HOME=/no/such"),
    ):
        flashinfer_library.load_kernels(is_logging_rank=True)
    assert fake.loads == 0


def test_compiling_says_what_since_when_and_where(monkeypatch, capsys):
    monkeypatch.setattr(flashinfer_library, "find_nvcc", lambda: "/usr/bin/nvcc")
    with fake_flashinfer(kernels="missing"):
        flashinfer_library.load_kernels(is_logging_rank=True)
        said = capsys.readouterr().err
        flashinfer_library.load_kernels(is_logging_rank=False)
        assert capsys.readouterr().err == ""
    assert "compiles its all-reduce kernels (trtllm_comm) into /nowhere/trtllm_comm" in said
    assert f", since {time.strftime('%H:')}" in said
    assert "ended after" in said
    assert "0 of 3 objects" in said


def test_compiled_kernels_are_loaded_in_silence(capsys):
    with fake_flashinfer(kernels="cached") as fake:
        flashinfer_library.load_kernels(is_logging_rank=True)
    assert fake.loads == 1
    assert capsys.readouterr().err == ""


def test_a_call_copies_what_is_strided_or_unaligned():
    storage = torch.arange(129, dtype=BF16)
    assert aligned(storage[:128]).data_ptr() == storage.data_ptr()
    moved = aligned(storage[1:])
    assert moved.data_ptr() % 16 == 0
    assert torch.equal(moved, storage[1:])
    assert aligned(torch.zeros(4, 8).t()).is_contiguous()


# --- Two ranks over gloo ------------------------------------------------------------------------------------


def on_two_ranks(job, *args, **kwargs):
    return shared_pool(2).run(job, *args, **kwargs)


def reference(*call):
    return all_reduce_rms_norm(*call, group_name=dist.group.WORLD.group_name, policy="rank_ordered")


def job_calls(policy, plan_gpu):
    """Call in many shapes; return what the fake saw, and how far the results are from the reference."""
    group, rank = dist.group.WORLD.group_name, dist.get_rank()
    torch.manual_seed(rank)
    seen, errors = [], []
    facts = lambda device: {"gpu": plan_gpu, "host": "here", "uuid": f"gpu {rank}"}  # noqa: E731
    with fake_flashinfer() as fake, mock.patch.object(provider, "device_facts", facts):
        api.prepare(None, HIDDEN, BF16, max_tokens=64)
        proofs = len(fake.calls)
        kinds = [(1, 1, 0.0), (1, 1, 1.0), (0, 1, 1.0), (1, 0, 0.0), (0, 0, 0.5)]
        for shape in [(1,), (2,), (3,), (2, 4), (1, 40), (64,), (0,)]:
            for with_residual, with_weight, weight_bias in kinds:
                x = torch.randn(*shape, HIDDEN).to(BF16)
                residual = torch.ones(*shape, HIDDEN).to(BF16) if with_residual else None
                weight = torch.linspace(-1, 1, HIDDEN).to(BF16) if with_weight else None
                before = len(fake.calls)
                call = (x, residual, weight, 1e-5, weight_bias)
                norm, total = all_reduce_rms_norm(*call, group_name=group, policy=policy)
                seen.append((shape, [call[:3] for call in fake.calls[before:]]))
                want_norm, want_total = reference(*call)
                assert norm.shape == x.shape
                error = float((norm - want_norm).abs().max()) if x.numel() else 0.0
                errors.append((error, torch.equal(total, want_total)))
        return seen, errors, proofs, fake.created


def test_calls_are_marshalled_and_give_natives_results():
    for seen, errors, proofs, created in on_two_ranks(job_calls, "flashinfer", "NVIDIA H200"):
        assert proofs == 2
        assert [c["backend"] for c in created] == ["trtllm"]
        assert created[0]["tokens"] == 64
        assert all(error <= 2**-6 and same for error, same in errors)
        for shape, calls in seen:
            tokens = torch.Size(shape).numel()
            assert [c[0] for c in calls] == ([tokens] if tokens else [])
        # Without a weight: zeros and a bias of one.
        assert {bias for _, calls in seen for _, _, bias in calls} == {0.0, 1.0}


def job_strided():
    group, rank = dist.group.WORLD.group_name, dist.get_rank()
    with fake_flashinfer() as fake:
        base = torch.randn(5, HIDDEN * 2).to(BF16)
        unaligned = torch.randn(5 * HIDDEN + 1).to(BF16)[1:].view(5, HIDDEN)
        weight = torch.randn(HIDDEN * 2).to(BF16)[::2]
        # Rank 1 alone is unaligned: both must still take the same way.
        x = unaligned if rank else base[:, :HIDDEN]
        norm, total = all_reduce_rms_norm(x, base[:, HIDDEN:], weight, group_name=group, policy="flashinfer,native")
        want = reference(x, base[:, HIDDEN:], weight)
        return len(fake.calls), torch.equal(total, want[1]), float((norm - want[0]).abs().max())


def test_strided_and_unaligned_inputs_are_copied_and_change_no_choice():
    for calls, same, error in on_two_ranks(job_strided):
        assert calls == 3
        assert same
        assert error <= 2**-5


def job_minus_zero():
    group = dist.group.WORLD.group_name
    with fake_flashinfer() as fake:
        x = torch.full((1, HIDDEN), -0.0, dtype=BF16)
        _, total = all_reduce_rms_norm(x, None, None, group_name=group, policy="flashinfer")
        residual = fake.calls[-1].residual
        all_reduce_rms_norm(x, None, None, group_name=group, policy="flashinfer")
        again = fake.calls[-1].residual
        return (
            bool(torch.signbit(total).all()),
            bool((residual == 0).all()),
            residual.data_ptr() == again.data_ptr(),
        )


def test_no_residual_costs_no_memset_and_adds_nothing():
    for kept_sign, zero, same_buffer in on_two_ranks(job_minus_zero):
        assert kept_sign
        assert zero
        assert same_buffer


def job_fault(fault, rank_with_fault, policy):
    """One rank is broken. Returns how the call ended, the reasons and what was made and destroyed."""
    group, rank = dist.group.WORLD.group_name, dist.get_rank()
    os.environ["FUSEWIRE_TIMEOUT_S"] = "20"
    here = rank == rank_with_fault
    version = "0.6.12" if here and fault == "version" else "0.6.17" if here and fault == "other version" else "0.6.18"
    with contextlib.ExitStack() as stack:
        fake = stack.enter_context(fake_flashinfer(version, fault if here else ""))
        if here and fault == "no memory":
            full = mock.Mock(side_effect=WorkspaceError("cuda:0 has 1 MiB of 2 free"))
            stack.enter_context(mock.patch.object(workspace, "check_memory", full))
        x = torch.ones(2, HIDDEN, dtype=BF16)
        start = time.monotonic()
        try:
            _, total = all_reduce_rms_norm(x, x, None, group_name=group, policy=policy)
            ended = "right" if torch.equal(total, torch.full_like(x, 3)) else "wrong"
        except NoProviderError as error:
            ended = str(error)
        took = time.monotonic() - start
        all_reduce_rms_norm(x, x, None, group_name=group, policy="flashinfer,native")
        voted = (*workspace.REGISTRY.entries.values(), *workspace.REGISTRY.machines.values())
        reasons = {entry.refusal for entry in voted}
        del os.environ["FUSEWIRE_TIMEOUT_S"]
        return ended, max(reasons, key=len), len(fake.created), fake.destroyed, took


FAULTS = [
    ("version", "0.6.12 is too old", 0),
    ("other version", "different versions of FlashInfer: 0.6.17, 0.6.18", 0),
    ("no compiler", "Ninja build failed", 0),
    ("no memory", "1 MiB of 2 free", 0),
    ("out of memory", "CUDA_ERROR_OUT_OF_MEMORY", 1),
    ("abi", "do not fit together", 1),
    ("wrong norm", "came out wrong (flashinfer/oneshot norm", 1),
    ("wrong sum", "came out wrong (flashinfer/oneshot sum", 1),
]


@pytest.mark.parametrize(("fault", "said", "created"), FAULTS)
@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_that_cannot_makes_both_fall_back(fault, said, created, rank):
    results = on_two_ranks(job_fault, fault, rank, "flashinfer,native", timeout_s=60)
    assert [r[0] for r in results] == ["right", "right"]
    assert results[0][1] == results[1][1]
    assert said in results[0][1]
    if fault != "other version":
        assert f"on rank {rank}:" in results[0][1]
    for _, _, made, destroyed, took in results:
        assert made == created
        assert destroyed == (0 if fault == "out of memory" else created)  # that one never came to be on either
        assert took < 45


def test_a_forced_provider_that_cannot_is_an_error_with_the_reason():
    for ended, *_ in on_two_ranks(job_fault, "abi", 1, "flashinfer"):
        assert "no provider of fusewire::all_reduce_rms_norm can serve" in ended
        assert "on rank 1" in ended
        assert "do not fit together" in ended


def job_one_absent():
    os.environ["FUSEWIRE_TIMEOUT_S"] = "1"
    try:
        with fake_flashinfer():
            x = torch.ones(2, HIDDEN, dtype=BF16)
            start = time.monotonic()
            if dist.get_rank() == 1:
                return "", 0.0
            try:
                all_reduce_rms_norm(x, x, None, group_name=dist.group.WORLD.group_name, policy="flashinfer,native")
            except PeerTimeoutError as error:
                return str(error), time.monotonic() - start
            return "nothing was raised", 0.0
    finally:
        del os.environ["FUSEWIRE_TIMEOUT_S"]


def test_a_rank_that_never_votes_is_an_error_in_bounded_time():
    said, took = on_two_ranks(job_one_absent, timeout_s=60)[0]
    assert "no vote on 'machine' from rank(s) 1" in said
    assert "FUSEWIRE_TIMEOUT_S" in said
    assert took < 45


def job_slow():
    os.environ["FUSEWIRE_TIMEOUT_S"] = "1"
    try:
        with fake_flashinfer(fault="compiles for long" if dist.get_rank() == 1 else ""):
            made = api.prepare(None, HIDDEN, BF16, max_tokens=4)[0]
            return made.max_tokens, made.reason
    finally:
        del os.environ["FUSEWIRE_TIMEOUT_S"]


def test_a_rank_at_work_is_waited_for_beyond_the_time_limit():
    assert on_two_ranks(job_slow, timeout_s=60) == [(4, ""), (4, "")]


def job_stuck_exchange():
    """Rank 1 hangs inside FlashInfer's own creation: given up after the time limit, by both."""
    os.environ["FUSEWIRE_TIMEOUT_S"] = "2"
    try:
        with fake_flashinfer(fault="never exchanges" if dist.get_rank() == 1 else ""):
            x = torch.ones(2, HIDDEN, dtype=BF16)
            start = time.monotonic()
            group = dist.group.WORLD.group_name
            _, total = all_reduce_rms_norm(x, x, None, group_name=group, policy="flashinfer,native")
            reason = max((entry.refusal for entry in workspace.REGISTRY.entries.values()), key=len)
            return float(total[0, 0]), reason, time.monotonic() - start
    finally:
        del os.environ["FUSEWIRE_TIMEOUT_S"]


def test_a_creation_that_hangs_is_given_up_together():
    results = on_two_ranks(job_stuck_exchange, timeout_s=60)
    assert results[0][1] == results[1][1]
    assert "create did not end within 2 s" in results[0][1]
    assert all(total == 3.0 and took < 45 for total, _, took in results)


def job_lifecycle():
    """Sizes, growing, closing twice, using a closed one, other groups, captures."""
    group = dist.group.WORLD
    name, said = group.group_name, {}
    x = torch.ones(3, HIDDEN, dtype=BF16)
    with fake_flashinfer() as fake:
        first = api.prepare(group, HIDDEN, BF16, max_tokens=16)[0]
        said["size"] = (first.max_tokens, first.nbytes, first.reason)
        said["again"] = api.prepare(name, HIDDEN, BF16, max_tokens=8)[0].max_tokens
        try:
            api.prepare(group, HIDDEN, BF16, max_tokens=32)
        except WorkspaceError as error:
            said["grow"] = str(error)
        bound = dispatch.select(all_reduce_rms_norm, args_of(x, x, None, name), "flashinfer").fn
        entry = next(iter(workspace.REGISTRY.entries.values()))
        said["too many"] = ""
        try:
            entry.workspace.run(
                True, torch.ones(17, HIDDEN, dtype=BF16), None, NormSpec(None, 1e-6, 0.0, "scale_then_round")
            )
        except WorkspaceError as error:
            said["too many"] = str(error)
        one_more = torch.ones(17, HIDDEN, dtype=BF16)
        args = args_of(one_more, None, None, name)
        said["one more"] = dispatch.select(all_reduce_rms_norm, args, "flashinfer,native").name
        api.close()
        api.close()
        said["freed"] = (fake.destroyed, list(fake.freed), dict(fake.trtllm._symm_workspace_refs))
        try:
            bound(*args_of(x, x, None, name))
        except WorkspaceError as error:
            said["closed"] = str(error)
        with (
            mock.patch.object(torch.cuda, "is_available", return_value=True),
            mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=True),
        ):
            try:
                all_reduce_rms_norm(x, x, None, group_name=name, policy="flashinfer,native")
            except CaptureError as error:
                said["capture"] = str(error)
        # A new workspace after close, at the first call.
        all_reduce_rms_norm(x, x, None, group_name=name, policy="flashinfer")
        said["made"] = len(fake.created)
    return said


def test_lifecycle():
    for said in on_two_ranks(job_lifecycle):
        tokens, nbytes, reason = said["size"]
        assert (tokens, reason) == (16, "")
        assert nbytes == provider.workspace_bytes(HIDDEN, BF16, 2, 16)
        assert said["again"] == 16
        assert "holds 16 tokens, 32 are asked for" in said["grow"]
        assert "17 tokens do not fit" in said["too many"]
        assert said["one more"] == "native"
        assert said["freed"] == (1, [4096], {})
        assert "is closed" in said["closed"]
        assert "fusewire.prepare" in said["capture"]
        assert said["made"] == 2


def job_subgroups():
    """Two groups of one name per half, group ranks unlike global ranks."""
    halves = [dist.new_group([2, 0]), dist.new_group([1, 3])]
    rank = dist.get_rank()
    mine = halves[rank % 2]
    with fake_flashinfer() as fake:
        x = torch.full((2, HIDDEN), float(rank), dtype=BF16)
        _, total = all_reduce_rms_norm(x, None, None, group_name=mine.group_name, policy="flashinfer")
        return float(total[0, 0]), fake.created[0]["rank"], mine.rank(), len(fake.created), rank


def test_subgroups_vote_apart():
    for total, rank, group_rank, made, global_rank in shared_pool(4).run(job_subgroups):
        assert total == (2.0 if global_rank % 2 == 0 else 4.0)
        assert rank == group_rank
        assert made == 1


def job_streams():
    """A call on another stream waits for what the last stream holds. Captures are ordered among
    themselves."""
    log = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def record_event(self):
            return f"event on {self.name}"

        def wait_event(self, event):
            log.append(f"{self.name} waits for {event}")

    streams = {1: Stream("first"), 2: Stream("second"), 3: Stream("captured"), 4: Stream("branch")}
    now, captured = {"raw": 1}, {3, 4}

    @contextlib.contextmanager
    def switch(stream):
        before, now["raw"] = now["raw"], next(raw for raw, known in streams.items() if known is stream)
        yield
        now["raw"] = before

    order = interface.StreamOrder()
    with (
        mock.patch.object(stream_order, "current_raw_stream") as raw,
        mock.patch.object(stream_order, "is_capturing") as capturing,
        mock.patch.object(torch.cuda, "current_stream") as stream,
        mock.patch.object(torch.cuda, "stream", switch),
    ):
        raw.side_effect = lambda index: now["raw"]
        capturing.side_effect = lambda: now["raw"] in captured
        stream.side_effect = lambda index: streams[now["raw"]]
        for now["raw"] in (1, 1, 2, 2, 3, 3, 4, 3, 1):
            assert order.enter(0) == (now["raw"] in captured)
        log.append("another graph")
        captured.remove(3)  # the first capture has ended
        now["raw"] = 4
        order.enter(0)
    return log


def test_one_call_in_flight():
    assert job_streams() == [
        "second waits for event on first",
        "branch waits for event on captured",  # a branch of the same graph
        "captured waits for event on branch",
        "first waits for event on second",  # not for what was only captured
        "another graph",
    ]


def test_two_captures_at_once_are_refused():
    class Stream:
        def record_event(self):
            return None

        def wait_event(self, event):
            raise RuntimeError("operation would make the legacy stream depend on a capturing one")

    with pytest.raises(CaptureError, match="capture one CUDA graph after the other"):
        stream_order._wait(Stream(), Stream(), captured=True)
    with pytest.raises(RuntimeError, match="operation would make"):
        stream_order._wait(Stream(), Stream(), captured=False)


def test_waiting_for_a_call_that_never_ends_raises(monkeypatch):
    never = types.SimpleNamespace(record=lambda: None, query=lambda: False)
    monkeypatch.setattr(torch.cuda, "Event", lambda: never, raising=False)
    with pytest.raises(PeerTimeoutError, match="did not return within"):
        flashinfer_workspace._wait(0.05)


def job_pdl():
    group, seen = dist.group.WORLD.group_name, {}
    for version in ("0.6.18", "0.7.2.dev3", "0.7.2"):
        with fake_flashinfer(version) as fake:
            all_reduce_rms_norm(torch.ones(1, HIDDEN, dtype=BF16), None, None, group_name=group, policy="flashinfer")
            seen[version] = {call.pdl for call in fake.calls}
    return seen


def test_kernels_that_read_too_early_are_launched_without_pdl():
    for seen in on_two_ranks(job_pdl):
        assert seen == {"0.6.18": {False}, "0.7.2.dev3": {False}, "0.7.2": {True}}
