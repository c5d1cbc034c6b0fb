"""The tuner without a GPU: tables on disk, the check before timing, votes of real ranks, choices by the table.

Times are the wall clock's, or made up where a test is about what follows from them; FlashInfer is the fake one of
test_flashinfer_provider. CUDA graphs and real kernels are the business of gpu/tuner_check.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from test_flashinfer_provider import args_of, fake_flashinfer

from fusewire.cli import tune as command
from fusewire.custom_ops import api
from fusewire.custom_ops.dispatch import cost_model as plans
from fusewire.custom_ops.dispatch import dispatcher as dispatch
from fusewire.custom_ops.dispatch import table_store as plan_store
from fusewire.custom_ops.dispatch import table_vote as plan_vote
from fusewire.custom_ops.dispatch.table_store import PlanKey, Table
from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm as op
from fusewire.custom_ops.ops.norms import add_residual, normalize
from fusewire.custom_ops.tuning import measure as measuring
from fusewire.custom_ops.tuning import timers as timing
from fusewire.custom_ops.tuning import tuner
from fusewire.custom_ops.workspaces import provider as interface
from fusewire.custom_ops.workspaces import registry as workspace
from fusewire.errors import CaptureError, ConfigError, PeerTimeoutError, WorkspaceError

from support.distributed import RankPool, fake_group, shared_pool

BF16 = torch.bfloat16
HIDDEN = 64
KEY = PlanKey("cuda", "NVIDIA H200", "580.1", "NVLink 5 x 18, NVSwitch", 2, HIDDEN, "bfloat16", {"torch": "2.13.0"})
TIMES = {"native": ((1, 10.0), (64, 40.5)), plans.ONE_SHOT: ((1, 2.5), (8, 50.0))}
TABLE = Table(KEY, TIMES, "2026-11-20 08:00 UTC", 12.5, {"x/y": "wrong"}, {"symm_mem": "no"}, 4e11, ("a note",))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(plan_store.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.delenv(plan_vote.TUNE_VARIABLE, raising=False)
    return tmp_path


# --- Tables on disk -----------------------------------------------------------------------------------------


def test_a_table_is_read_back_as_it_was(cache):
    path = plan_store.save(TABLE)
    assert path.parent == cache / "tables" == plan_store.folder()
    assert "NVIDIA-H200-2-ranks-hidden-64-bfloat16" in path.name
    found = plan_store.load(KEY)
    assert found == (path, TABLE, "")
    assert found.table.digest == TABLE.digest
    assert [each.table for each in plan_store.all_files()] == [TABLE]


def test_a_table_is_replaced_only_where_it_differs():
    path = plan_store.save(TABLE)
    before = path.stat().st_ino
    plan_store.save(TABLE)
    assert path.stat().st_ino == before
    plan_store.save(dataclasses.replace(TABLE, seconds=1.0))
    assert plan_store.load(KEY).table.seconds == 1.0


def test_where_tables_lie(monkeypatch):
    monkeypatch.delenv(plan_store.CACHE_VARIABLE)
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert plan_store.folder() == Path("/somewhere/fusewire/tables")
    for ignored in ("relative", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert plan_store.folder() == Path("/home/someone/.cache/fusewire/tables")


def damaged(**changes):
    return json.dumps({**TABLE.as_json(), **changes})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "damaged"),
        ("{", "damaged"),
        ("[" * 100_000, "damaged"),
        ("\udcff", "damaged"),
        ("[1, 2]", "not a table of fusewire's"),
        ('{"times": {}}', "not a table of fusewire's"),
        (damaged(fusewire_table=99), "version 99"),
        (damaged(times={}), "no times"),
        (damaged(times={"native": []}), "do not grow"),
        (damaged(times={"native": [[4, 1.0], [1, 2.0]]}), "do not grow"),
        (damaged(times={"native": [[0, 1.0]]}), "do not grow"),
        (damaged(times={"native": [[1.5, 1.0]]}), "do not grow"),
        (damaged(times={"native": [[1, -1.0]]}), "not a positive number"),
        (damaged(times={"native": [[1, float("nan")]]}), "not a positive number"),
        (damaged(times={"native": [[1, "fast"]]}), "damaged"),
        (damaged(times={"native": 3}), "damaged"),
        (damaged(times=[1]), "damaged"),
        (damaged(notes=None), "damaged"),
        (damaged(rejected=[]), "damaged"),
        (damaged(seconds="long"), "damaged"),
        (damaged(link_rate=-1), "damaged"),
        (damaged(key={"gpu": "x"}), "damaged"),
        (damaged(key={**dataclasses.asdict(KEY), "dtype": "nothing"}), "dtype 'nothing'"),
        (damaged(key={**dataclasses.asdict(KEY), "dtype": "nn"}), "dtype 'nn'"),
        (damaged(key={**dataclasses.asdict(KEY), "hidden": "64"}), "damaged"),
        (damaged(key={**dataclasses.asdict(KEY), "driver": "1.0"}), "another machine (driver 1.0, here 580.1)"),
        (damaged(key={**dataclasses.asdict(KEY), "device": "cpu"}), "another machine (device cpu, here cuda)"),
        (" " * (2 << 20), "too large"),
    ],
)
def test_a_file_that_is_no_table_is_ignored_with_a_reason(text, said):
    path = plan_store.save(TABLE)
    path.write_bytes(text.encode(errors="surrogateescape"))
    found = plan_store.load(KEY)
    assert found.table is None
    assert said in found.reason
    assert str(path) in found.reason


def test_what_is_no_file_is_ignored_too():
    path = plan_store.save(TABLE)
    path.unlink()
    assert plan_store.load(KEY) == (path, None, "")
    path.mkdir()
    assert "ignored" in plan_store.load(KEY).reason


def test_a_failed_write_leaves_the_table_before_it():
    plan_store.save(TABLE)
    with mock.patch.object(os, "replace", side_effect=OSError("disk full")), pytest.raises(OSError, match="disk full"):
        plan_store.save(dataclasses.replace(TABLE, seconds=1.0))
    assert plan_store.load(KEY).table == TABLE
    assert len(list(plan_store.folder().iterdir())) == 1


def test_a_process_killed_while_writing_leaves_the_table_before_it():
    plan_store.save(TABLE)
    code = (
        "import dataclasses, os\nfrom fusewire.custom_ops import plan_store\n"
        "old = plan_store.all_files()[0].table\n"
        "os.fsync = lambda file: os.kill(os.getpid(), 9)\n"
        "plan_store.save(dataclasses.replace(old, seconds=1.0))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert done.returncode == -9, done.stderr
    assert len(list(plan_store.folder().iterdir())) == 2  # what was being written is still there
    assert [found.table for found in plan_store.all_files()] == [TABLE]
    assert plan_store.load(KEY).table == TABLE


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(PlanKey)])
def test_a_table_serves_nothing_but_its_own_key(name):
    value = getattr(KEY, name)
    other = {"torch": "2.14.0"} if name == "versions" else value * 2
    asked = dataclasses.replace(KEY, **{name: other})
    plan_store.save(TABLE)
    assert plan_store.load(asked).table is None
    assert (name if name != "versions" else "torch 2.13.0, here 2.14.0") in KEY.differences(asked)
    # Not even if someone renames the file.
    plan_store.load(KEY).path.rename(plan_store.load(asked).path)
    assert "another machine" in plan_store.load(asked).reason


# --- The key ------------------------------------------------------------------------------------------------


def facts(uuid, **changes):
    versions = {"torch": "2.13.0", **changes.pop("versions", {})}
    found = {"device": "cuda", "gpu": "G", "host": "h", "uuid": uuid, "driver": "1", "links": "NVLink 5 x 18, NVSwitch"}
    return {**found, **changes, "versions": versions}


def test_a_key_is_the_same_whichever_rank_makes_it():
    ranks = [facts("a", gpu="A", versions={"triton": "3"}), facts("b", gpu="B")]
    key = plan_store.key_of(ranks, 64, BF16)
    assert key == plan_store.key_of(ranks[::-1], 64, BF16)
    assert (key.gpu, key.versions["triton"], key.world_size) == ("A + B", "3 + none", 2)


def test_behind_a_switch_it_does_not_matter_which_gpus():
    def links(first, second, **changes):
        return plan_store.key_of([facts(first, **changes), facts(second, **changes)], 64, BF16).links

    assert links("a", "b") == links("c", "d") == "NVLink 5 x 18, NVSwitch"
    assert links("a", "b", links="PCIe 5 x 16") == links("b", "a", links="PCIe 5 x 16")
    assert links("a", "b", links="PCIe 5 x 16") != links("a", "c", links="PCIe 5 x 16")
    assert "2 hosts" in plan_store.key_of([facts("a", host="x"), facts("b", host="y")], 64, BF16).links


def fake_nvml(active, remote=2):
    class Failed(Exception):
        pass

    def state(gpu, link):
        if link >= 12:
            raise Failed
        return link < active

    return types.SimpleNamespace(
        NVMLError=Failed, NVML_NVLINK_MAX_LINKS=18, NVML_NVLINK_DEVICE_TYPE_SWITCH=2,
        nvmlDeviceGetNvLinkState=state, nvmlDeviceGetNvLinkVersion=lambda gpu, link: 4,
        nvmlDeviceGetNvLinkRemoteDeviceType=lambda gpu, link: remote,
        nvmlDeviceGetMaxPcieLinkWidth=lambda gpu: 16, nvmlDeviceGetMaxPcieLinkGeneration=lambda gpu: 5,
        nvmlInit=lambda: None, nvmlShutdown=lambda: None, nvmlSystemGetDriverVersion=lambda: b"580.1.2",
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
    )  # fmt: skip


def test_links_are_read():
    for nvml, said in (
        (fake_nvml(12), "12 NVLinks of NVML's version 4, NVSwitch"),
        (fake_nvml(4, remote=1), "4 NVLinks of NVML's version 4"),
        (fake_nvml(0), "PCIe 5 x 16"),
    ):
        properties = types.SimpleNamespace(name="G", major=9, minor=0, uuid="u")
        with (
            mock.patch.dict(sys.modules, {"pynvml": nvml}),
            mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
        ):
            plan_store._driver_and_links.cache_clear()
            found = plan_store.machine_facts(torch.device("cuda", 0))
        assert (found["driver"], found["links"]) == ("580.1.2", said)
    plan_store._driver_and_links.cache_clear()


def test_nccl_settings_are_part_of_its_version(monkeypatch):
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    assert "NCCL_ALGO=Ring" in plan_store._nccl()


def test_without_nvml_links_are_unknown():
    plan_store._driver_and_links.cache_clear()
    with mock.patch.dict(sys.modules, {"pynvml": None}):
        assert plan_store._driver_and_links(torch.device("cuda", 5))[1] == "unknown"
    plan_store._driver_and_links.cache_clear()


# --- What a table says --------------------------------------------------------------------------------------


def test_a_table_as_a_plan():
    plan = TABLE.plan()
    assert plan.cost("native", HIDDEN * 2) == 10.0
    assert plan.cost(plans.ONE_SHOT, 8 * HIDDEN * 2) == 50.0
    assert "tuned on this machine, 2026-11-20" in plan.source
    assert plans.find_plan("any", 2, HIDDEN, BF16, plan) is plan


def test_the_floor_is_what_must_leave_a_gpu():
    # 8 ranks, 1024 tokens of 8192 in 2 bytes: 16 MiB, of which 2 * 7 / 8 leave, at 450 GB/s.
    table = dataclasses.replace(TABLE, key=dataclasses.replace(KEY, world_size=8, hidden=8192), link_rate=450e9)
    assert table.floor(1024) == pytest.approx(65.2, abs=0.1)
    assert dataclasses.replace(table, link_rate=None).floor(1024) is None


@pytest.mark.parametrize(
    ("most", "named", "grid"),
    [(8, (), (1, 2, 4, 8)), (9, (), (1, 2, 4, 8, 9)), (1, (), (1,)), (8, (5, 3, 5), (3, 5))],
)
def test_token_grid(most, named, grid):
    assert tuner.token_grid(most, named) == grid


@pytest.mark.parametrize(("most", "named"), [(0, ()), (-4, ()), (8, (0, 1))])
def test_a_token_count_is_at_least_one(most, named):
    with pytest.raises(ConfigError, match="at least 1"):
        tuner.token_grid(most, named)


@pytest.mark.parametrize("most", [1, 2, 3, 8, 8192])
def test_coarse_first_keeps_every_size_and_the_largest_early(most):
    grid = tuner.token_grid(most)
    order = measuring.coarse_first(grid)
    assert sorted(order) == list(grid)
    assert most in order[: (len(grid) + 1) // 2]


def run_of(times, rejected=()):
    with fake_group(2) as group, mock.patch.object(measuring, "Channel"):
        made = measuring.Measurement(group, HIDDEN, BF16, torch.device("cpu"), (1, 2, 4), 1.0, times, dict(rejected))
    return lambda label, tokens: made._is_due(
        measuring.Candidate(label, min, range(1, 100), True, label.partition("/")[0]), tokens
    )


def test_far_behind_is_not_tried_at_the_next_size():
    due = run_of({"native": {1: 10.0, 4: 10.0}, "slow": {1: 41.0, 16: 5.0}, "near": {1: 39.0}, "new": {}}, {"bad": ""})
    assert not due("slow", 2)
    assert due("near", 2)
    assert due("native", 2)
    assert due("new", 2)
    assert due("slow", 8)  # it was not tried at 4, so now it is
    assert due("slow", 1)
    assert not due("bad", 8)
    assert not due("native", 100)


def test_rotating_inputs_exceed_the_cache():
    timer = timing.GpuTimer(torch.device("cuda"))
    for nbytes in (128, 1 << 14, 1 << 20, 1 << 27):
        sets = timer.sets(nbytes)
        assert 2 <= sets <= 128 == timer.sets(1)
        assert sets == 128 or sets * 2 * nbytes >= timer.COLD_BYTES
        assert timer.calls(nbytes) >= sets


def test_the_wall_clocks_median():
    timer = timing.CpuTimer(torch.device("cpu"))
    assert 900 < timer.time(lambda i: time.sleep(0.001), 4) < 20_000


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
        us = timing.GpuTimer(torch.device("cuda")).time(lambda i: calls.append((i, gpu.capturing)), 16)
    assert us == pytest.approx(4000 / 16)
    assert gpu.replays == 11
    assert calls == [(0, False), (1, False), *((i, True) for i in range(16))]


def test_a_call_that_never_ends_on_the_gpu_ends_the_wait():
    gpu = FakeGpu([])
    gpu.ended = False
    with gpu.patched(), mock.patch.object(timing, "WAIT_S", 0.1), pytest.raises(PeerTimeoutError, match="cannot go on"):
        timing.GpuTimer(torch.device("cuda")).wait()


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
        ways, sent = timing.peer_copies(made, torch.device("cpu"))
        ways["copy engines"](0)
        ways["kernel"](0)
        assert sent == 3 * nbytes
        assert asked == [(rank, (nbytes,), torch.uint8, 256) for rank in (0, 2, 3)]
        assert [int(buffers[rank].max()) for rank in range(4)] == [0, 1, 0, 0]
        assert pushed == [(made, nbytes, 256)]
        made.layout.sizes["inbox"] = 1000
        with pytest.raises(WorkspaceError, match="too small"):
            timing.peer_copies(made, torch.device("cpu"))


# --- The check ----------------------------------------------------------------------------------------------


def right(dtype=BF16, tokens=5, hidden=256):
    """Inputs of rank 0 of 1, and what they are to give."""
    inputs = timing.draw(0, tokens, hidden, dtype, torch.device("cpu"), 4)
    total = add_residual(inputs[0].x, inputs[0].residual)
    wanted = timing.Wanted(total, torch.full_like(total, 0.01, dtype=torch.float32))
    return inputs[0], wanted, normalize(total, inputs[0].weight, timing.EPS, 0.0, "scale_then_round")


def test_inputs_differ_where_they_should():
    own, other = (timing.draw(rank, 3, 8, BF16, torch.device("cpu"), 4) for rank in (0, 1))
    assert not torch.equal(own[0].x, own[1].x)
    assert not torch.equal(own[0].x, other[0].x)
    assert torch.equal(own[0].residual, other[0].residual)
    assert torch.equal(own[0].weight, other[0].weight)
    assert len(own) == 4
    assert len({inputs.x.data_ptr() for inputs in own}) == 4


@pytest.mark.parametrize("dtype", tuner.DTYPES)
def test_a_right_result_passes(dtype):
    inputs, wanted, norm = right(dtype)
    assert timing.wrong(norm, wanted.total, inputs, wanted, True) == ""
    assert timing.wrong(norm, wanted.total, inputs, wanted, False) == ""


def test_wrong_results_are_told_apart():
    inputs, wanted, norm = right()
    total = wanted.total

    def said(norm=norm, total=total, exact=True):
        return timing.wrong(norm, total, inputs, wanted, exact)

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
    norm = normalize(off, inputs.weight, timing.EPS, 0.0, "scale_then_round")
    assert (off != wanted.total).any()
    assert timing.wrong(norm, off, inputs, dataclasses_replace(wanted, slack=0.05), False) == ""
    assert "residual" in timing.wrong(norm, off, inputs, dataclasses_replace(wanted, slack=0.001), False)


def dataclasses_replace(wanted, slack):
    return wanted._replace(slack=torch.full_like(wanted.slack, slack))


def test_fingerprints_see_one_bit_and_the_order():
    tensor = torch.randn(3, 100).to(BF16)
    other = tensor.clone()
    other.view(torch.int16)[2, 99] ^= 1
    assert timing.fingerprint(tensor) == timing.fingerprint(tensor.clone())
    assert len({timing.fingerprint(t) for t in (tensor, other, tensor.flip(1))}) == 3
    assert timing.fingerprint(torch.ones(4)) != timing.fingerprint(torch.zeros(4))


def job_reference():
    group, rank = dist.group.WORLD, dist.get_rank()
    with mock.patch.object(timing, "ROWS_AT_ONCE", 2):
        inputs = timing.draw(rank, 5, 16, BF16, torch.device("cpu"), 2)
        found = [timing.reference(each, 2, group.group_name) for each in inputs]
    exact = [op(*each, timing.EPS, 0.0, "scale_then_round", group.group_name, policy="rank_ordered") for each in inputs]
    native = [op(*each, timing.EPS, 0.0, "scale_then_round", group.group_name, policy="native") for each in inputs]
    return [
        (torch.equal(f.total, e[1]), timing.wrong(*e, i, f, True), timing.wrong(*n, i, f, False))
        for f, e, n, i in zip(found, exact, native, inputs, strict=True)
    ]


def test_the_reference_is_the_sum_in_rank_order_and_native_is_within_its_bounds():
    assert shared_pool(2).run(job_reference) == [[(True, "", "")] * 2] * 2


# --- Ranks --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def on_rank(cache, made_up=None, **environment):
    """A rank with the fake FlashInfer and a cache folder; made_up(label, tokens, rank) gives the times, if given."""
    folder = cache[dist.get_rank()] if isinstance(cache, (list, tuple)) else cache
    changes = {plan_store.CACHE_VARIABLE: str(folder), plan_vote.TUNE_VARIABLE: "", **environment}

    def timed(self, call, calls):
        candidate, inputs = call.args
        call(0)
        return made_up(candidate.label, inputs[0].x.shape[0], dist.get_rank())

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, changes))
        if made_up is not None:
            stack.enter_context(mock.patch.object(timing.CpuTimer, "time", timed))
        yield stack.enter_context(fake_flashinfer())


def chosen(tokens):
    """The variants that serve these numbers of tokens, as the dispatcher decides for real calls."""
    found = []
    for n in tokens:
        x = torch.ones(n, HIDDEN, dtype=BF16)
        decision = dispatch.decide(op, args_of(x, x, x[0].clone(), dist.group.WORLD.group_name), "flashinfer,native")
        found.append(decision.held[2] if decision.held else decision.provider.name)
    return found


def times_of(label, tokens, rank):
    """Native is the best at 1, one-shot up to 4, two-shot from 8 on; rank 1 is slower."""
    best = {"native": tokens < 2, plans.ONE_SHOT: 2 <= tokens <= 4, plans.TWO_SHOT: tokens > 4}
    return (10.0 if best[label] else 20.0) + rank


def job_tune(cache):
    group = dist.group.WORLD
    with on_rank(cache, times_of) as fake:
        tuned = tuner.tune(group, HIDDEN, BF16, tokens=(1, 2, 4, 8))
        left = api.workspaces()
        served = chosen((1, 2, 4, 8, 100))
        info = api.workspaces()[0]
        return tuned, left, served, info.plan, [call["backend"] for call in fake.created]


def test_ranks_measure_one_table_and_choose_by_it(cache):
    (first, left, served, text, backends), second = shared_pool(2).run(job_tune, cache)
    assert second[0] == first
    assert second[1:] == (left, served, text, backends)
    table = first.table
    # The slowest rank's time.
    assert table.times == {
        "native": ((1, 11.0), (2, 21.0), (4, 21.0), (8, 21.0)),
        plans.ONE_SHOT: ((1, 21.0), (2, 11.0), (4, 11.0), (8, 21.0)),
        plans.TWO_SHOT: ((4, 21.0), (8, 11.0)),
    }
    assert "CUDA GPU" in table.absent["symm_mem"]
    assert table.rejected == {}
    assert (table.key.device, table.key.world_size, table.key.driver) == ("cpu", 2, "none")
    assert left == []  # what was made for measuring is gone
    assert served == ["native", plans.ONE_SHOT, plans.ONE_SHOT, plans.TWO_SHOT, plans.TWO_SHOT]
    assert text == table.plan().source
    assert backends == ["trtllm"] * 2
    assert plan_store.read(Path(first.path)).table == table
    assert first.problem == ""


def job_reload(cache, environment):
    with on_rank(cache, **environment), mock.patch.object(tuner, "tune", side_effect=AssertionError):
        return chosen((1, 8)), api.workspaces()[0].plan


def test_the_next_process_loads_it(cache):
    tuned = shared_pool(2).run(job_tune, cache)[0][0]
    for environment in ({}, {plan_vote.TUNE_VARIABLE: "1"}):
        for served, text in shared_pool(2).run(job_reload, cache, environment):
            assert served == ["native", plans.TWO_SHOT]
            assert text == tuned.table.plan().source


def job_choose(caches, tokens):
    with on_rank(caches):
        return chosen(tokens), [info.plan for info in api.workspaces()]


def job_key():
    return plan_store.key_of([plan_store.machine_facts(torch.device("cpu"))] * 2, HIDDEN, BF16)


def write(folder, costs):
    """A table of this machine in a rank's own folder: microseconds by variant, whatever the size."""
    key = shared_pool(2).run(job_key)[0]
    times = {label: ((1, us), (64, us)) for label, us in costs.items()}
    table = Table(key, times, measured=str(costs), seconds=1.0)
    with mock.patch.dict(os.environ, {plan_store.CACHE_VARIABLE: str(folder)}):
        return plan_store.save(table)


NATIVE_WINS = {"native": 1.0, plans.ONE_SHOT: 9.0, plans.TWO_SHOT: 9.0}
ONE_SHOT_WINS = {"native": 9.0, plans.ONE_SHOT: 1.0, plans.TWO_SHOT: 5.0}
TWO_SHOT_WINS = {"native": 9.0, plans.ONE_SHOT: 5.0, plans.TWO_SHOT: 1.0}


def test_without_a_table_the_shipped_one_serves(cache):
    for served, texts in shared_pool(2).run(job_choose, cache, (1, 8)):
        assert served == [plans.ONE_SHOT] * 2
        assert texts == [""]


def test_ranks_with_different_tables_take_the_first_ranks(cache):
    write(cache / "a", ONE_SHOT_WINS)
    write(cache / "b", TWO_SHOT_WINS)
    answers = shared_pool(2).run(job_choose, [cache / "a", cache / "b"], (1, 8))
    assert [served for served, _ in answers] == [[plans.ONE_SHOT] * 2] * 2
    for _, texts in answers:
        assert "the tuned table of rank 0 is used on every rank: rank(s) 1 had another" in texts[0]
    answers = shared_pool(2).run(job_choose, [cache / "b", cache / "a"], (1, 8))
    assert [served for served, _ in answers] == [[plans.ONE_SHOT, plans.TWO_SHOT]] * 2


def test_a_rank_without_a_table_is_given_one(cache):
    write(cache / "a", TWO_SHOT_WINS)
    for folders, holder, other in (("ab", 0, 1), ("ba", 1, 0)):
        answers = shared_pool(2).run(job_choose, [cache / name for name in folders], (8,))
        assert [served for served, _ in answers] == [[plans.TWO_SHOT]] * 2
        for _, texts in answers:
            assert f"table of rank {holder} is used on every rank: rank(s) {other} had none" in texts[0]


def test_a_damaged_file_on_one_rank_is_made_up_for_and_named(cache):
    write(cache / "a", NATIVE_WINS).write_text("not even JSON")
    write(cache / "b", TWO_SHOT_WINS)
    for served, texts in shared_pool(2).run(job_choose, [cache / "a", cache / "b"], (8,)):
        assert served == [plans.TWO_SHOT]
        assert "rank(s) 0 had none; rank 0:" in texts[0]
        assert "damaged" in texts[0]


def test_damaged_files_on_every_rank_are_ignored_and_named(cache):
    write(cache, NATIVE_WINS).write_text("{}")
    for served, texts in shared_pool(2).run(job_choose, cache, (8,)):
        assert served == [plans.ONE_SHOT]
        assert "rank 0: " in texts[0]
        assert "not a table of fusewire's" in texts[0]


def test_a_tuned_table_may_say_that_nothing_beats_native(cache):
    write(cache, NATIVE_WINS)
    for served, texts in shared_pool(2).run(job_choose, cache, (1, 8)):
        assert served == ["native"] * 2
        assert texts == []  # no workspace was made


# --- When to tune -------------------------------------------------------------------------------------------


def job_opt_in(cache, asking, how):
    """Ask for tuning on some ranks; where the table came from, and what is said."""
    asks = dist.get_rank() in asking
    environment = {plan_vote.TUNE_VARIABLE: "1" if asks and how != "prepare" else ""}
    with on_rank(cache, times_of, **environment), mock.patch.object(tuner, "DEFAULT_MAX_TOKENS", 16):
        if how == "first call":
            served = chosen((1, 8))
        else:
            api.prepare(None, HIDDEN, BF16, max_tokens=8, tune=asks and how == "prepare")
            served = chosen((1, 8))
        measured = max((t for found in plan_store.all_files() for t, _ in found.table.times["native"]), default=0)
        return served, api.workspaces()[0].plan, measured


@pytest.mark.parametrize("how", ["prepare", "prepare by environment", "first call"])
def test_tuning_at_first_use_where_all_ranks_ask(cache, how):
    for served, text, measured in shared_pool(2).run(job_opt_in, cache, (0, 1), how):
        assert served == ["native", plans.TWO_SHOT]
        assert "tuned on this machine" in text
        assert measured == 16  # more than this program's 8: the table is for later ones


@pytest.mark.parametrize("how", ["prepare", "prepare by environment", "first call"])
@pytest.mark.parametrize("asking", [(0,), (1,)])
def test_nobody_tunes_where_ranks_disagree(cache, how, asking):
    silent = 1 - asking[0]
    for served, text, measured in shared_pool(2).run(job_opt_in, cache, asking, how):
        assert served == [plans.ONE_SHOT] * 2
        assert f"nobody tunes: rank(s) {silent} did not ask for it" in text
        assert measured == 0


def test_nobody_tunes_unasked(cache):
    for served, text, measured in shared_pool(2).run(job_opt_in, cache, (), "prepare"):
        assert (served, text, measured) == ([plans.ONE_SHOT] * 2, "", 0)


def job_bad_opt_in(cache):
    with on_rank(cache, **{plan_vote.TUNE_VARIABLE: ["maybe", "1"][dist.get_rank()]}):
        return api.prepare(None, HIDDEN, BF16, max_tokens=8)[0]


def test_an_unclear_opt_in_is_named(cache):
    for info in shared_pool(2).run(job_bad_opt_in, cache):
        assert info.max_tokens == 8
        assert "on rank 0: ConfigError: FUSEWIRE_TUNE='maybe' is neither 1 nor 0" in info.plan


def job_capture(cache):
    capturing = {"is_available": lambda: True, "is_current_stream_capturing": lambda: True}
    errors = []
    with on_rank(cache), mock.patch.multiple(torch.cuda, **capturing):
        for work in (tuner.tune, plan_vote.tuned_plan):
            try:
                work(dist.group.WORLD, HIDDEN, BF16, torch.device("cpu"))
            except CaptureError as error:
                errors.append(str(error))
    return len(errors)


def test_never_while_a_graph_is_captured(cache):
    assert shared_pool(2).run(job_capture, cache) == [2, 2]


def job_failing_tuner(cache):
    failing = mock.patch.object(measuring, "draw", side_effect=RuntimeError("no memory"))
    with on_rank(cache, **{plan_vote.TUNE_VARIABLE: "1"}), failing:
        return chosen((1,)), api.workspaces()[0].plan


def test_a_model_runs_where_tuning_fails(cache):
    for served, text in shared_pool(2).run(job_failing_tuner, cache):
        assert served == [plans.ONE_SHOT]
        assert "tuning failed: nothing could be timed" in text
        assert "no memory" in text


# --- What goes wrong while measuring ------------------------------------------------------------------------


def job_existing_workspace(cache):
    """What a program prepared before is used as it is, and left."""
    with on_rank(cache, times_of) as fake:
        before = api.prepare(None, HIDDEN, BF16, max_tokens=4)
        tuned = tuner.tune(dist.group.WORLD, HIDDEN, BF16, tokens=(1, 4, 8))
        after = api.workspaces()
        return tuned.table, len(fake.created), [(i.provider, i.max_tokens) for i in before + after]


def test_workspaces_of_the_program_are_used_and_left(cache):
    for table, made, sizes in shared_pool(2).run(job_existing_workspace, cache):
        assert made == 1
        assert sizes.count(("flashinfer", 4)) == 2
        assert [tokens for tokens, _ in table.times[plans.ONE_SHOT]] == [1, 4]
        assert table.notes == ("flashinfer was not measured above its workspace's size (4 tokens, there before)",)


def job_no_choice(cache):
    with mock.patch.dict(os.environ, {plan_store.CACHE_VARIABLE: str(cache)}):
        infos = api.prepare(None, HIDDEN, BF16, max_tokens=4, tune=True)
        text = workspace.REGISTRY.plans[dist.group.WORLD.group_name, HIDDEN, BF16].text
        try:
            tuner.tune(dist.group.WORLD, HIDDEN, BF16, tokens=(1,))
        except WorkspaceError as error:
            return [info.max_tokens for info in infos], text, str(error)
        finally:
            api.close()


def test_where_only_native_can_serve_there_is_nothing_to_measure(cache):
    for sizes, text, error in shared_pool(2).run(job_no_choice, cache):
        assert set(sizes) == {0}
        assert "only native can serve here (symm_mem: " in error
        assert f"tuning failed: {error}" in text
    assert plan_store.all_files() == []


def job_wrong(cache, fault):
    """FlashInfer passes its proof and then fails one variant."""
    keeper, rank = interface.PROVIDERS["flashinfer"], dist.get_rank()
    bind = keeper.bind

    def bound(made, variant, *output):
        call = bind(made, variant, *output)
        if variant != plans.TWO_SHOT:
            return call

        def broken(x, *rest):
            norm, total = call(x, *rest)
            if fault == "raises":
                raise RuntimeError("it does not like this")
            if rank == 1 and x.shape[0] == 8:
                (norm if fault == "norm" else total)[-1, 3] += 1 if fault != "nan" else float("nan")
            if fault == "differs" and rank == 1:
                total.view(torch.int16)[0, 0] ^= 1
            return norm, total

        return broken

    with on_rank(cache, lambda label, tokens, _: 1.0 if label == plans.TWO_SHOT else 5.0), contextlib.ExitStack() as s:
        s.enter_context(mock.patch.object(keeper, "bind", bound))
        said = s.enter_context(mock.patch.object(measuring, "log_line"))
        # In the order 4, 16, 8: what was measured before the fault showed is to go, too.
        tuned = tuner.tune(dist.group.WORLD, HIDDEN, BF16, tokens=(4, 8, 16))
        loud = [call.args[0] for call in said.call_args_list if "LEFT OUT" in call.args[0]]
        return tuned, chosen((8,)), api.workspaces(), loud


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("norm", "on rank 1, 8 tokens: the norm is off in 1 of"),
        ("total", "on rank 1, 8 tokens: the residual is off in 1 of"),
        ("nan", "on rank 1, 8 tokens: the residual is off in 1 of"),
        ("differs", "on rank 1, 4 tokens: the residual is off"),
        ("raises", "on rank 0, 4 tokens: RuntimeError: it does not like this"),
    ],
)
def test_a_candidate_that_is_wrong_on_one_rank_is_left_out_on_all(cache, fault, said):
    answers = shared_pool(2).run(job_wrong, cache, fault)
    for tuned, served, infos, _ in answers:
        assert set(tuned.table.times) == {"native", plans.ONE_SHOT}
        assert said in tuned.table.rejected[plans.TWO_SHOT]
        assert served != [plans.TWO_SHOT]
        assert all("is left out" in info.plan for info in infos)
        assert plan_store.read(Path(tuned.path)).table == tuned.table
    assert len(answers[0][3]) == 1
    assert plans.TWO_SHOT in answers[0][3][0]


def job_bits(cache):
    """Results right on each rank, with norms that differ in a last bit: not what kernels of one sum may do."""
    keeper, rank = interface.PROVIDERS["flashinfer"], dist.get_rank()
    bind = keeper.bind

    def bound(made, variant, *output):
        call = bind(made, variant, *output)

        def nudged(*args):
            norm, total = call(*args)
            norm.view(torch.int16)[0, 0] ^= rank
            return norm, total

        return nudged

    with on_rank(cache), mock.patch.object(keeper, "bind", bound):
        return tuner.tune(dist.group.WORLD, HIDDEN, BF16, tokens=(4,)).table.rejected


def test_ranks_must_have_the_same_bits(cache):
    for rejected in shared_pool(2).run(job_bits, cache):
        assert set(rejected) == {plans.ONE_SHOT, plans.TWO_SHOT}
        assert rejected[plans.ONE_SHOT] == "4 tokens: the ranks' results differ"


def job_own_provider(cache):
    def mine(x, residual, weight, eps, weight_bias, form, group_name):
        summed = x + residual  # forgets the other ranks
        return normalize(summed, weight, eps, weight_bias, form), summed

    op.register_impl("mine")(mine)
    try:
        with on_rank(cache):
            return tuner.tune(dist.group.WORLD, HIDDEN, BF16, tokens=(1, 2), providers=("mine", "native")).table
    finally:
        op.unregister_impl("mine")


def test_a_users_provider_is_measured_and_checked_too(cache):
    for table in shared_pool(2).run(job_own_provider, cache):
        assert set(table.times) == {"native"}
        assert "the residual is off" in table.rejected["mine"]


def job_unsaved(caches):
    with on_rank(caches, times_of):
        tuned = tuner.tune(dist.group.WORLD, HIDDEN, BF16, tokens=(1, 8))
        served, text = chosen((1, 8)), api.workspaces()[0].plan
        api.prepare(None, HIDDEN, BF16, max_tokens=8)  # looks at the disk again, and keeps what it has
        return tuned.problem, served, text, chosen((1, 8))


def test_a_folder_that_cannot_be_written_costs_only_the_next_run(cache):
    blocked = cache / "a file"
    blocked.write_text("")
    for folders, ranks in (([blocked, blocked], "every rank"), ([cache, blocked], "rank 1")):
        for problem, served, text, again in shared_pool(2).run(job_unsaved, folders):
            assert served == again == ["native", plans.TWO_SHOT]
            assert "not saved everywhere" in problem
            assert problem in text
            if ranks == "rank 1":
                assert "on rank 1: " in problem
        assert len(list((cache / "tables").glob("*"))) == (ranks == "rank 1")


def job_unlike(cache, what):
    rank = dist.get_rank()
    arguments = {"tokens": (1, 2)} | ({what: [(1, 2), (1, 4)][rank]} if what == "tokens" else {})
    hidden = HIDDEN * (1 + rank) if what == "hidden" else HIDDEN
    if what == "providers":
        arguments["providers"] = [("native",), ("native", "rank_ordered")][rank]
    with on_rank(cache):
        try:
            tuner.tune(dist.group.WORLD, hidden, BF16, **arguments)
        except ConfigError as error:
            return str(error)


@pytest.mark.parametrize("what", ["tokens", "hidden", "providers"])
def test_ranks_that_ask_for_different_things_are_told(cache, what):
    for said in shared_pool(2).run(job_unlike, cache, what):
        assert "the ranks are to tune different things: rank 0" in said


@pytest.mark.parametrize(
    "changes",
    [{"hidden": 0}, {"dtype": torch.float64}, {"budget_s": 0.0}, {"providers": ("nobody",)}, {"tokens": (0,)}],
)
def test_arguments_that_cannot_be_used(fake_world, changes):
    arguments = {"hidden": HIDDEN, "dtype": BF16, **changes}
    with mock.patch.object(measuring, "Channel", side_effect=AssertionError), pytest.raises(ConfigError):
        tuner.tune(fake_world, **arguments)


def job_budget(cache):
    def slow(*args):
        time.sleep(0.3)
        return times_of(*args)

    with on_rank(cache, slow):
        return tuner.tune(dist.group.WORLD, HIDDEN, BF16, max_tokens=64, budget_s=1.5).table


def test_time_that_runs_out_leaves_sizes_out_alike(cache):
    tables = shared_pool(2).run(job_budget, cache)
    assert tables[0] == tables[1]
    assert "these token counts were left out" in tables[0].notes[0]
    assert len(tables[0].times["native"]) < 7


def job_memory(cache):
    with on_rank(cache, times_of):
        check = measuring.Measurement._check_memory

        def scarce(self, nbytes):
            if dist.get_rank() == 1 and nbytes > 20 * 16 * HIDDEN * 2:
                raise WorkspaceError("no room")
            check(self, nbytes)

        with mock.patch.object(measuring.Measurement, "_check_memory", scarce):
            return tuner.tune(dist.group.WORLD, HIDDEN, BF16, max_tokens=64).table


def test_sizes_that_do_not_fit_one_rank_are_left_out_on_all(cache):
    tables = shared_pool(2).run(job_memory, cache)
    assert tables[0] == tables[1]
    assert "on rank 1: no room" in tables[0].notes[0]
    sizes = [tokens for tokens, _ in tables[0].times["native"]]
    assert sizes[0] == 1
    assert sizes[-1] < 64


def job_missing(cache):
    with on_rank(cache, FUSEWIRE_TIMEOUT_S="2"):
        start = time.monotonic()
        if dist.get_rank() == 1:
            time.sleep(6)
            return 0.0, ""
        try:
            tuner.tune(dist.group.WORLD, HIDDEN, BF16, tokens=(1,))
        except PeerTimeoutError as error:
            return time.monotonic() - start, str(error)


def test_a_rank_that_does_not_come_ends_the_wait(cache):
    (took, said), _ = shared_pool(2).run(job_missing, cache)
    assert 1 < took < 6
    assert "rank(s) 1" in said


def job_stuck(cache):
    """A measurement that never returns, on one rank."""
    with on_rank(cache, FUSEWIRE_TIMEOUT_S="3"), mock.patch.object(tuner, "LIMIT_S", 2.0):
        wait = (lambda self: time.sleep(30)) if dist.get_rank() == 1 else (lambda self: None)
        with mock.patch.object(measuring.Measurement, "_compile_ahead", wait):
            start = time.monotonic()
            try:
                tuner.tune(dist.group.WORLD, HIDDEN, BF16, tokens=(1,), budget_s=0.1)
            except (WorkspaceError, PeerTimeoutError) as error:
                return time.monotonic() - start, type(error).__name__


def test_a_rank_that_hangs_ends_the_wait():
    with RankPool(2) as pool:  # its own: a thread is left in it
        for took, name in pool.run(job_stuck, os.environ[plan_store.CACHE_VARIABLE]):
            assert took < 20
            assert name in ("WorkspaceError", "PeerTimeoutError")


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(capsys):
    for terminal in (True, False):
        with mock.patch.object(sys.stderr, "isatty", return_value=terminal, create=True):
            loud, silent = timing.Progress("t", 4, True), timing.Progress("t", 4, False)
            for progress in (loud, silent):
                progress.step("first")
                progress.end()
        said = capsys.readouterr().err
        assert ("\r" in said) == terminal
        assert ("[######..................] 1/4 first" in said) == terminal
        assert ("tuning t: 1/4 first\n" in said) == (not terminal)


# --- The picture and the text -------------------------------------------------------------------------------

SHIPPED = Table(
    dataclasses.replace(KEY, hidden=8192, world_size=4),
    {
        "native": ((1, 15.1), (64, 24.2), (1024, 124.7), (8192, 811.7)),
        plans.ONE_SHOT: ((1, 6.6), (64, 15.9), (1024, 189.6)),
        plans.TWO_SHOT: ((64, 27.0), (1024, 119.5), (8192, 858.1)),
        plans.SYMM_ONE_SHOT: ((1, 3.3), (64, 15.1)),
        plans.SYMM_TWO_SHOT: ((1, 4.5), (64, 10.8), (1024, 87.6), (8192, 601.7)),
    },
    measured="then",
    seconds=20.0,
    link_rate=400e9,
)


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    command.draw([SHIPPED], str(one))
    command.draw([SHIPPED, dataclasses.replace(TABLE, link_rate=None)], str(two))
    for path in (one, two):
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    from matplotlib.figure import Figure

    panel = Figure().subplots()
    command._draw_one(panel, SHIPPED)
    lines = {line.get_label(): line for line in panel.get_lines()}
    assert set(lines) == {*SHIPPED.times, "link floor of two-shot (400 GB/s)"}
    assert list(lines["native"].get_xydata()[-1]) == [8192, 811.7]
    floor = lines["link floor of two-shot (400 GB/s)"].get_xydata()
    assert list(floor[-1]) == [8192, SHIPPED.floor(8192)]
    assert (panel.get_xscale(), panel.get_yscale()) == ("log", "log")
    panel = Figure().subplots()
    command._draw_one(panel, dataclasses.replace(SHIPPED, link_rate=None))
    assert "no link floor: the rate was not measured" in [text.get_text() for text in panel.get_legend().get_texts()]


def test_the_text_marks_the_fastest():
    text = command.as_text(tuner.Tuned(SHIPPED, "/path", ""))
    row = next(line for line in text.splitlines() if line.strip().startswith("8192"))
    assert row.split() == ["8192", "811.7", "858.1", "601.7*"]
    assert "Links: 400 GB/s" in text
    assert "The table: /path" in text
    text = command.as_text(tuner.Tuned(TABLE, "/path", "not saved"))
    assert "LEFT OUT: x/y: wrong" in text
    assert "Not available: symm_mem: no" in text
    assert "Note: a note" in text
    assert "not saved" in text
    assert "The table:" not in text
