"""The benchmark against peers (examples/benchmarks/peers.py): its arithmetic, its files, and a run without GPUs."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from support.distributed import shared_pool

BENCHMARKS = Path(__file__).resolve().parents[2] / "examples" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import models  # noqa: E402
import peers  # noqa: E402
import peers_candidates  # noqa: E402
import peers_measuring  # noqa: E402
import peers_ours  # noqa: E402
import peers_report as report  # noqa: E402
import peers_vllm  # noqa: E402

import fusewire  # noqa: E402
from fusewire.custom_ops.tuning.timers import Inputs  # noqa: E402
from fusewire.errors import WorkspaceError  # noqa: E402


def row(candidate, kind, us, tokens=512, world_size=4, hidden=8192, **more):
    return report.Row(world_size, hidden, tokens, candidate, candidate, kind, us, **more)


def one_size(*rows):
    (size,) = report.sizes(rows)
    return size


def verdicts(*rows):
    return {judged.bar: judged for judged in report.judge(report.sizes(rows))}


# --- The bars -----------------------------------------------------------------------------------------------


def test_the_best_is_of_what_was_timed():
    size = one_size(row("slow", report.PEER, 30.0), row("fast", report.PEER, 20.0), row("not there", report.PEER, None))
    assert size.best(report.PEER) == (20.0, "fast")
    assert size.best(report.FUSEWIRE) is None
    assert size.ratio(*report.FULL) is None


def test_a_peer_that_is_spared_its_copy_sets_no_bar():
    rows = (row("copies", report.PEER, 20.0), row("spared", report.SPARED, 10.0), row("ours", report.FUSEWIRE, 18.0))
    size = one_size(*rows)
    assert size.ratio(*report.FULL) == pytest.approx(0.9)
    assert size.ratio(*report.FULL, peers=(report.PEER, report.SPARED)) == pytest.approx(1.8)


def test_the_sharded_residual_does_not_count_as_full():
    size = one_size(row("p", report.PEER, 10.0), row("f", report.FUSEWIRE, 9.0), row("s", report.SHARDED, 5.0))
    assert size.ratio(*report.FULL) == pytest.approx(0.9)
    assert size.ratio(report.SHARDED) == pytest.approx(0.5)


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_the_share_of_the_rate_by_hand(world_size):
    # 8192 x 8192 bf16 numbers are 128 MiB; a two-shot sends 2 (R - 1) / R of them.
    sent = {2: 128 << 20, 4: 192 << 20, 8: 224 << 20}[world_size]
    size = one_size(
        row("copy", report.COPY, 1000.0, 8192, world_size, sent=400_000_000),  # 400 GB/s
        row("ours", report.FUSEWIRE, sent / 360e9 * 1e6, 8192, world_size),
    )
    assert size.link_rate() == pytest.approx(400e9)
    assert size.rate_share(*report.FULL) == pytest.approx(0.9)


@pytest.mark.parametrize(("us", "met"), [(10.3, True), (10.31, False)])
def test_never_above_1_03(us, met):
    found = verdicts(row("p", report.PEER, 10.0, tokens=1), row("ours", report.FUSEWIRE, us, tokens=1))
    assert found["best of fusewire / best peer, every size"].met is met


def test_one_bad_size_misses_a_bar_and_is_named():
    rows = [row("p", report.PEER, 10.0, tokens=t) for t in (1, 64, 512)]
    rows += [row("ours", report.FUSEWIRE, us, tokens=t) for t, us in ((1, 5.0), (64, 11.0), (512, 8.0))]
    judged = verdicts(*rows)["best of fusewire / best peer, every size"]
    assert (judged.met, judged.sizes, judged.at) == (False, 3, "64 x 8192 on 4")
    assert judged.worst == pytest.approx(1.1)


@pytest.mark.parametrize(("us", "met"), [(7.5, True), (7.6, False)])
def test_sharded_at_most_0_75_from_512_tokens(us, met):
    rows = [row("p", report.PEER, 10.0), row("s", report.SHARDED, us)]
    rows += [row("p", report.PEER, 10.0, tokens=256), row("s", report.SHARDED, 20.0, tokens=256)]  # no matter there
    judged = verdicts(*rows)["sharded residual / best peer, from 512 tokens"]
    assert (judged.met, judged.sizes) == (met, 1)


@pytest.mark.parametrize(("world_size", "us", "below", "most"), [
    (2, 9.9, True, None), (2, 10.0, False, None), (4, 9.0, True, True), (4, 9.1, True, False), (8, 9.1, True, False),
])  # fmt: skip
def test_full_below_1_and_at_most_0_90_on_4_and_8(world_size, us, below, most):
    found = verdicts(row("p", report.PEER, 10.0, 512, world_size), row("o", report.FUSEWIRE, us, 512, world_size))
    assert found["full residual / best peer, from 512 tokens"].met is below
    assert found["full residual / best peer, from 512 tokens, 4 and 8 GPUs"].met is most


def test_sizes_without_a_number_are_told():
    rows = [row("p", report.PEER, 10.0, tokens=t) for t in (2048, 4096)]
    rows += [row("o", report.FUSEWIRE, 8.0, tokens=2048), row("o", report.FUSEWIRE, None, tokens=4096, note="broken")]
    judged = verdicts(*rows)
    full = judged["full residual / best peer, from 512 tokens"]
    assert (full.met, full.sizes, full.unmeasured) == (True, 1, ("4096 x 8192 on 4",))
    assert judged["share of a plain copy's rate, full residual, from 2048 tokens"].met is None
    text = report.bars_table(list(judged.values()))
    assert "met (1 sizes), 1 without a number" in text
    assert "not measured" in text


# --- Tables and files ---------------------------------------------------------------------------------------


def some_rows():
    return [
        row("NCCL + Inductor", report.PEER, 21.0),
        row("torch two-shot + Inductor", report.PEER, 22.0),
        row("torch two-shot, no copy + Inductor", report.SPARED, 16.0),
        row("vLLM", report.PEER, None, note="no nvcc, and nothing prebuilt"),
        row("symm_mem two-shot", report.FUSEWIRE, 14.7),
        row("symm_mem sharded residual", report.SHARDED, 10.5),
        row("fusewire's own choice", report.CHOSEN, 14.8, note="symm_mem/twoshot"),
    ]


def test_the_table_and_the_reasons():
    text = report.report(some_rows(), {"gpu": "NVIDIA H200", "versions": {"torch": "2.11"}, "notes": ["a note"]})
    (line,) = [line for line in text.splitlines() if line.startswith("| 512 ")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == [
        "512",
        "21.0",
        "22.0",
        "16.0",
        "14.7",
        "10.5",
        "14.8",
        "NCCL + Inductor",
        "0.70",
        "0.50",
        "0.92",
        "",
    ]
    header = next(line for line in text.splitlines() if line.startswith("| tokens"))
    assert header.count("|") == line.count("|")
    assert "- vLLM: no nvcc, and nothing prebuilt" in text
    assert "- a note" in text


def test_a_reason_at_some_sizes_names_them():
    rows = [row("p", report.PEER, 1.0, tokens=1), row("p", report.PEER, None, tokens=2, note="too few")]
    assert report.left_out(report.sizes(rows)) == ["- p at 2 tokens: too few"]


def test_a_shared_column_shows_the_fastest():
    rows = [report.Row(2, 64, 8, name, "column", report.PEER, us) for name, us in (("a", 3.0), ("b", 2.0))]
    assert "| 8 | 2.0 | b |" in report.table(report.sizes(rows))


def test_csv_there_and_back(tmp_path):
    path = tmp_path / "peers.csv"
    rows = [*some_rows(), row("copy", report.COPY, 12.5, sent=7)]
    report.write_csv(rows, path)
    assert report.read_csv(path) == rows


@pytest.mark.parametrize(("text", "said"), [
    ("", "no peers.csv"),
    ("a,b\n", "no peers.csv"),
    ("{header}\n4,8192,one,x,x,peer,1.0,0,\n", "line 2"),
    ("{header}\n4,8192,1,x,x,friend,1.0,0,\n", "unknown kind 'friend'"),
    ("{header}\n4,8192,1,x\n", "line 2"),
])  # fmt: skip
def test_another_file_is_refused(tmp_path, text, said):
    path = tmp_path / "peers.csv"
    path.write_text(text.format(header=",".join(report._FIELDS)))
    with pytest.raises(ValueError, match=said):
        report.read_csv(path)


def test_saved_files_are_few_and_reported_on_again(tmp_path, capsys):
    problems = report.save(some_rows(), {"gpu": "some GPU", "date": "today"}, tmp_path, pictures=True)
    names = sorted(path.name for path in tmp_path.iterdir())
    drawn = importlib.util.find_spec("matplotlib") is not None
    assert names == ["peers.csv", "peers.json", "peers.md", *(["peers_4x8192.png"] if drawn else [])]
    assert bool(problems) is not drawn
    assert peers.main(["--from", str(tmp_path / "peers.csv"), "--out", str(tmp_path / "again"), "--no-pictures"]) == 0
    assert "some GPU" in capsys.readouterr().out
    assert (tmp_path / "again" / "peers.md").read_text() == (tmp_path / "peers.md").read_text()


# --- Refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("argv", "said"), [
    (["--hidden", "100"], "multiples of 8"),
    (["--tokens", "0"], "positive"),
    (["--rounds", "0"], "positive"),
    (["--hidden", "8,16,24,32,40,48", "--out", "x"], "fewer hidden sizes"),
])  # fmt: skip
def test_arguments_that_cannot_be_used(argv, said, capsys):
    with pytest.raises(SystemExit):
        peers.parse(argv)
    assert said in capsys.readouterr().err


def test_defaults_are_the_issue_s():
    options = peers.parse([])
    assert options.tokens == [2**power for power in range(14)]
    assert options.hidden == [4096, 5120, 7168, 8192]
    assert peers.parse(["--hidden", "8192,4096,8192"]).hidden == [8192, 4096]


def test_without_torchrun_or_gpus_it_says_so(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    assert peers.main([]) == 2
    assert "torchrun" in capsys.readouterr().err
    if not torch.cuda.is_available():
        monkeypatch.setenv("RANK", "0")
        assert peers.main([]) == 2
        assert "--cpu" in capsys.readouterr().err


def test_every_label_is_one_candidate_s():
    names = [names for family in peers_ours.families(torch.device("cuda")) for names in family.labels]
    assert len({label for label, _, _ in names}) == len(names) >= 20
    assert {kind for _, _, kind in names} == set(report.KINDS)


# --- Candidates that need a GPU, with stand-ins for its libraries -------------------------------------------


def bench_of(**more):
    """A Bench without a group and a compiler."""
    bench = object.__new__(peers_candidates.Bench)
    bench.__dict__.update(norm=None, missing={}, world_size=2, rank=0, cpu_group=None, dtype=torch.bfloat16, **more)
    return bench


def arena_of(sets=4, symmetric=None):
    drawn = [Inputs(torch.full((2, 8), i + 1.0), torch.full((2, 8), 10.0), torch.ones(8)) for i in range(sets)]
    return peers_candidates.Arena(drawn, symmetric)


def test_the_arena_restores_what_was_overwritten():
    arena = arena_of(symmetric=torch.zeros(100))
    arena.also.append(torch.zeros(4, 2, 8))
    for tensor in (arena.x[1], arena.residual[2], arena.symmetric[3]):
        tensor.fill_(77.0)
    arena.restore()
    assert arena.x[1].eq(2).all()
    assert arena.residual[2].eq(10).all()
    assert arena.symmetric[3].eq(4).all()
    assert arena.also[0][2].eq(3).all()
    assert arena.inputs[1].x.data_ptr() != arena.x[1].data_ptr()


def test_norms_after_an_all_reduce():
    labels = peers_candidates.both_norms("reduce", "reduce", report.PEER)
    bench = bench_of(tail=lambda total, residual: ("tail", total + residual))
    reduce = lambda arena: lambda i: arena.inputs[i].x * 2  # noqa: E731
    (alone,) = peers_candidates.with_norms(bench, labels, reduce)
    assert "FlashInfer" in bench.missing["reduce + FlashInfer norm"]
    assert alone.bind(arena_of())(1)[1].eq(14).all()

    def norm(x, residual, weight):
        residual += x
        x.copy_(residual * 100)

    bench.norm = norm
    inductor, fused = peers_candidates.with_norms(bench, labels, reduce)
    arena = arena_of()
    normed, total = fused.bind(arena)(1)
    assert (total.eq(14).all(), normed.eq(1400).all()) == (True, True)
    assert arena.inputs[1].residual.eq(10).all()
    assert (inductor.in_place, fused.in_place) == (False, True)


class FakeVllm:
    """Stands in for flashinfer.comm: remembers calls, and reduces by doubling."""

    def __init__(self, fails=False):
        self.calls, self.fails, self.captured = [], fails, []

    def create_shared_buffer(self, nbytes, group):
        self.calls.append(("buffer", nbytes))
        return [1 << 20, 2 << 20]

    def vllm_meta_size(self):
        return 64

    def vllm_init_custom_ar(self, pointers, table, rank, full_nvlink):
        return 5

    def vllm_register_buffer(self, handle, pointers):
        self.calls.append(("register", pointers))

    def vllm_all_reduce(self, handle, x, out, buffer, size, blocks):
        assert (handle, buffer, size) == (5, 0, 0)
        out.copy_(x * 2)

    def vllm_get_graph_buffer_ipc_meta(self, handle):
        if self.fails:
            raise RuntimeError("no handles")
        return [1, 2], [3]

    def vllm_register_graph_buffers(self, handle, handles, offsets):
        self.calls.append(("graph", handles, offsets))


@pytest.fixture
def vllm(monkeypatch):
    """Makes a Vllm on the CPU, whose peer always answers as this rank does, or as it is told to."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(dist, "barrier", lambda group=None: None)
    monkeypatch.setattr(peers_vllm.Vllm, "_view", lambda self, pointers, nbytes: torch.zeros(nbytes, dtype=torch.uint8))

    def make(fails=False, peer=None):
        def gather(into, value, group=None):
            into[:] = [value, value if peer is None else peer]

        monkeypatch.setattr(dist, "all_gather_object", gather)
        comm = FakeVllm(fails)
        bench = bench_of(device=torch.device("cpu"), most_bytes=1024, tail=None)
        bench.dtype = torch.float32
        return peers_vllm.Vllm(comm, bench), comm

    return make


def test_vllm_registers_each_set_once(vllm):
    made, comm = vllm()
    arena = arena_of(sets=3)
    first, second = made.reduce(arena), made.reduce(arena)
    arena.restore()
    nbytes = 2 * 8 * 4
    wanted = [("register", [(1 << 20) + i * nbytes, (2 << 20) + i * nbytes]) for i in range(3)]
    assert [call for call in comm.calls if call[0] == "register"] == wanted
    assert first(2).eq(6).all()
    assert second(0).eq(2).all()


def test_vllm_registers_what_was_captured_before_a_replay(vllm, monkeypatch):
    made, comm = vllm(peer=(([7, 8], [9]), ""))
    call = made.reduce(arena_of())
    call(0)
    made.before_replay()
    assert not [c for c in comm.calls if c[0] == "graph"]  # nothing was captured
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    call(0)
    made.before_replay()
    made.before_replay()
    assert [c for c in comm.calls if c[0] == "graph"] == [("graph", [[1, 2], [7, 8]], [[3], [9]])]


def test_vllm_refuses_unequal_captures(vllm, monkeypatch):
    made, _ = vllm(peer=(([7, 8], [9, 10]), ""))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    made.reduce(arena_of())(0)
    with pytest.raises(WorkspaceError, match="different numbers"):
        made.before_replay()


def test_vllm_fails_on_all_ranks_if_on_one(vllm, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for made, _ in (vllm(fails=True), vllm(peer=([], "no handles"))):
        made.reduce(arena_of())(0)
        with pytest.raises(WorkspaceError, match="no handles"):
            made.before_replay()


# --- A run on the CPU ---------------------------------------------------------------------------------------


def wrong_family(bench):
    """Candidates that are wrong in the ways that matter."""

    def forgets(arena):
        tail = peers_candidates.Tail(bench.weight)
        return lambda i: tail(arena.inputs[i].x, arena.inputs[i].residual)

    def broken(arena):
        if dist.get_rank() == 1:
            raise RuntimeError("rank 1 cannot")
        return lambda i: pytest.fail("a candidate was called that a rank cannot bind")

    def stale(arena):
        right = peers_candidates.plain_family("gloo").together(bench)[1].bind(arena)
        kept = []

        def call(i):
            kept.append(right(i))
            return kept[-1] if len(kept) < 3 else kept[1 - i % 2]  # right at first only

        return call

    named = {"forgets the sum": forgets, "fails on one rank": broken, "right at first": stale}
    return [
        peers_candidates.Candidate(name, name, report.PEER, bind, in_place=bind is stale)
        for name, bind in named.items()
    ]


def measure_on_cpu(tokens, hidden, families):
    """On each rank: the rows and notes of a run. Without Inductor, whose compiler takes seconds."""
    torch.set_num_threads(1)
    peers_measuring.families = lambda device: (
        [peers_ours.families(device)[number] for number in families]
        + [peers_candidates.Family("wrong ones", (), wrong_family)]
    )
    original, peers_candidates.torch.compile = torch.compile, lambda module, **_: module
    saved = []
    try:
        run = peers_measuring.Run(
            dist.group.WORLD, None, torch.device("cpu"), rounds=2, seconds=60, save=lambda rows: saved.append(len(rows))
        )
        rows = run.measure(hidden, tokens)
    finally:
        torch.compile = original
        peers_measuring.families = peers_ours.families
    return rows, run.notes, saved


def test_a_run_on_two_ranks():
    (rows, notes, saved), (others, _, _) = shared_pool(2).run(measure_on_cpu, [1, 3, 8], [64, 16], (0, 1, 2))
    assert rows == others  # all ranks know the same
    assert {(r.hidden, r.tokens) for r in rows} == {(h, t) for h in (64, 16) for t in (1, 3, 8)}
    assert saved == sorted(saved)
    assert len(saved) == 6
    timed = {r.candidate for r in rows if r.us is not None}
    labels = {names[0] for family in peers_ours.families(torch.device("cpu")) for names in family.labels}
    assert timed == labels
    assert all(r.us > 0 for r in rows if r.us is not None)
    assert {r.note for r in rows if r.kind == report.CHOSEN} == {"native"}
    wrong = [r for r in rows if r.candidate == "forgets the sum"]
    assert all("the residual is off" in r.note for r in wrong)
    assert all("on rank 1: RuntimeError: rank 1 cannot" in r.note for r in rows if r.candidate == "fails on one rank")
    assert all("check again" in r.note for r in rows if r.candidate == "right at first")
    assert any("forgets the sum is left out" in note for note in notes)
    assert "best of fusewire / best peer, every size" in report.report(rows, {})


def without_some():
    """A run that leaves out one candidate and one whole family."""
    torch.set_num_threads(1)
    peers_measuring.families = lambda device: [peers_ours.families(device)[number] for number in (1, 2)]
    without = ("rank_ordered", "own choice")
    run = peers_measuring.Run(dist.group.WORLD, None, torch.device("cpu"), rounds=1, seconds=60, without=without)
    return run.measure([16], [2])


def test_candidates_can_be_left_out():
    rows = {r.candidate: r for r in shared_pool(2).run(without_some)[0]}
    assert rows["fusewire native"].us > 0
    for name in ("fusewire rank_ordered", "fusewire's own choice"):
        assert (rows[name].us, rows[name].note) == (None, "left out by --without")


def test_no_size_is_begun_without_time():
    rows, notes, _ = shared_pool(2).run(out_of_time)[0]
    assert len({r.tokens for r in rows}) == 1
    assert any("no time was left for 2, 4 tokens" in note for note in notes)


def out_of_time():
    """A run whose time is over before it begins."""
    torch.set_num_threads(1)
    peers_measuring.families = lambda device: [peers_ours.families(device)[1]]
    run = peers_measuring.Run(dist.group.WORLD, None, torch.device("cpu"), rounds=1, seconds=1e-3)
    return run.measure([16], [1, 2, 4]), run.notes, None


@pytest.mark.nightly
def test_the_command_on_the_cpu(tmp_path):
    import subprocess

    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += [str(BENCHMARKS / "peers.py"), "--cpu", "--tokens", "1,8", "--hidden", "64", "--rounds", "2"]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| 8 |" in done.stdout
    rows = report.read_csv(tmp_path / "peers.csv")
    assert all(r.us for r in rows)
    assert {"gloo + Inductor", "gloo + eager"} < {r.candidate for r in rows}
    assert len(list(tmp_path.iterdir())) <= report.MOST_FILES


# --- models.py: what is left of a step ----------------------------------------------------------------------


def test_kernels_by_kind():
    names = {
        "ncclDevKernel_AllReduce_Sum_bf16_RING_LL": "communication",
        "two_shot_flags_kernel": "communication",
        "void flashinfer::trtllm_allreduce_fusion::allreduce_fusion_kernel_oneshot_lamport": "communication",
        "triton_red_fused_add_mean_mul_pow_rsqrt_3": "norm",
        "nvjet_tst_128x256_64x4": "matrix product",
        "void pytorch_flash::flash_fwd_kernel": "attention",
        "triton_poi_fused_mul_silu_2": "other",
    }
    assert {name: models.kind_of(name) for name in names} == names


def test_the_breakdown_of_a_step():
    kernels = {"ncclDevKernel_AllReduce": (2, 30.0), "triton_red_fused_rsqrt": (2, 10.0), "nvjet_x": (4, 60.0)}
    text = models.breakdown("llama", kernels)
    assert "100.0 us in kernels; communication and norm 40.0%" in text
    assert [line.split()[-1] for line in text.splitlines()[1:]] == [
        "nvjet_x",
        "ncclDevKernel_AllReduce",
        "triton_red_fused_rsqrt",
    ]


def test_options_of_a_model_are_measured_beside_the_defaults(tmp_path, monkeypatch, capsys):
    calls = []

    def decode(model, backend, batch, options=None, inspect=None):
        calls.append((backend, options))
        return torch.ones(2), {"inductor": 2.0, "fusewire": 1.0 if options is None else 0.5, None: 0.0}[backend]

    monkeypatch.setattr(models, "build", lambda name, layers: torch.nn.Linear(1, 1))
    monkeypatch.setattr(models, "decode", decode)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    names = {"layers": 1, "prefill": [], "decode": [8], "variants": ["shard_residual", "both"], "out": tmp_path}
    rows = []
    models.measure("llama-70b", argparse.Namespace(**names, profile_to=None), rows)
    assert [(row.variant, row.ratio) for row in rows] == [("default", 0.5), ("shard_residual", 0.25), ("both", 0.25)]
    assert calls[2:] == [
        ("inductor", None),
        ("fusewire", None),
        ("fusewire", {"shard_residual": True}),
        ("fusewire", {"shard_residual": True, "output_in_place": True}),
    ]
    saved = json.loads((tmp_path / "models.json").read_text())
    assert [row["variant"] for row in saved] == ["default", "shard_residual", "both"]
    default, sharded, _ = capsys.readouterr().out.strip().splitlines()
    assert default.endswith("fused 0.0000")
    assert sharded.endswith("fused 0.0000  shard_residual")
    assert set(models.VARIANTS) >= {"shard_residual", "output_in_place"}
    for options in models.VARIANTS.values():
        fusewire.PassConfig.from_options(options)
