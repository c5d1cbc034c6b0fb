"""The benchmark against peers (examples/benchmarks/peers.py): its arithmetic, its files, and a run without GPUs."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import models
import peers
import peers_candidates
import peers_measuring
import peers_ours
import peers_report as report
import pytest
import torch
import torch.distributed as dist

import fusewire
from fusewire.custom_ops.dispatch import cost_tables

from support.distributed import shared_pool

BENCHMARKS = Path(__file__).resolve().parents[2] / "examples" / "benchmarks"


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


def test_cost_tables_are_python_with_the_measured_times(tmp_path, capsys):
    label = {name: candidate for name, candidate in report.COSTS.items() if name != "TWO_SHOT"}
    rows = [row(label[name], report.PEER, 10.04 * tokens, tokens, hidden=hidden)
            for name in label for tokens in (1, 2, 64) for hidden in (4096, 8192)]  # fmt: skip
    report.save([*rows, row("other", report.PEER, 1.0)], {"gpu": "NVIDIA H200", "date": "2026-12-01 10:00 UTC"},
                tmp_path, pictures=False)  # fmt: skip
    assert peers.main(["--from", str(tmp_path / "peers.csv"), "--cost-tables", "--no-pictures"]) == 0
    first, second = eval(f"[{capsys.readouterr().out}]", {**vars(cost_tables), "torch": torch})
    assert (first.gpus, first.world_size, first.hidden, first.dtype) == (("NVIDIA H200",), 4, 4096, torch.bfloat16)
    assert first.source == "measured on 4 x NVIDIA H200, 2026-12-01"
    assert second.hidden == 8192
    assert first.times == {getattr(cost_tables, name): ((1, 10.0), (2, 20.1), (64, 642.6)) for name in label}


def test_candidates_of_cost_tables_are_measured():
    known = {
        names[0] for names in (*peers_ours.OURS, *peers_ours.PROVIDED, *peers_candidates.plain_family("NCCL").labels)
    }
    assert set(report.COSTS.values()) <= known


# --- Refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("argv", "said"), [
    (["--hidden", "100"], "multiples of 8"),
    (["--tokens", "0"], "positive"),
    (["--rounds", "0"], "positive"),
    (["--cost-tables"], "needs --from"),
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
    models.measure("llama-70b", argparse.Namespace(**names, fp8=False, profile_to=None), rows)
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
