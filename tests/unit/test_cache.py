"""The passes are in the compile cache's key, and a warm cache runs, and reports, what a cold one made.

Nothing here needs C++: the fused operator stays a call (inline_native=False), so a compilation takes a
fraction of a second. Inductor has two caches, one of post-grad graphs ("fx") and one in front of it
("autograd"); both are tested.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
from pathlib import Path

import pytest
import torch
import torch._inductor.config as inductor_config
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import fresh_cache
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.distributed.fake_pg import FakeStore

import fusewire
from fusewire import PassConfig, custom_ops, fusion_passes, patterns
from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm
from fusewire.custom_ops.ops.registry import NATIVE, YES, Support
from fusewire.fusion_passes import backend, cache_key, registry
from fusewire.fusion_passes.compiler.cache_artifact import cache_folder, write_file
from fusewire.fusion_passes.config import BATCH_INVARIANT_VARIABLE
from fusewire.fusion_passes.report import cache as report_cache
from fusewire.fusion_passes.report import model as reports

from support.blocks import NORMS, reduce_functional, tensors
from support.distributed import fake_group, run_ranks

CALLS = {"inline_native": False}
FUSED_OP = "fusewire.all_reduce_rms_norm.default"
CACHES = ["autograd", "fx"]
TIMES = ("pass_seconds", "pass_processor_seconds", "waited_seconds")


@pytest.fixture(autouse=True)
def _own_state():
    passes = list(registry._PASSES)
    with fresh_cache(), fake_group(2):
        yield
    registry._PASSES[:] = passes


def block(x, r, w):
    total = r + reduce_functional(x)
    return NORMS["L"](total, w, 1e-5), total


def compiled(way="backend", cache="autograd", fn=block, **options):
    """Compile and run anew, as a new process would."""
    torch._dynamo.reset()
    counters.clear()
    fusewire.clear_report()
    options = {**CALLS, **options}
    with torch.no_grad(), torch._functorch.config.patch(enable_autograd_cache=cache == "autograd"):
        if way == "backend":
            result = torch.compile(fn, backend="fusewire", options=options, fullgraph=True)(*tensors())
        else:
            with fusewire.enable(**options):
                result = torch.compile(fn, fullgraph=True)(*tensors())
    return result


def hit(way="backend", cache="autograd", **options):
    """Compile and run anew; whether the cache had the graph. Both caches' counts must say so."""
    compiled(way, cache, **options)
    fx, autograd = counters["inductor"], counters["aot_autograd"]
    found = (fx["fxgraph_cache_hit"], fx["fxgraph_cache_miss"])
    assert found in ((1, 0), (0, 1)), found
    front = (autograd["autograd_cache_hit"], autograd["autograd_cache_miss"])
    assert front == (found if cache == "autograd" else (0, 0))
    return found == (1, 0)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("way", ["backend", "enable"])
def test_the_second_compilation_hits(way, cache):
    assert not hit(way, cache)
    assert hit(way, cache)
    for got, want in zip(compiled(way, cache), block(*tensors()), strict=True):
        assert torch.equal(got, want)


# What must miss


@contextlib.contextmanager
def another_field(monkeypatch):
    yield {"merge_allreduces": False}


@contextlib.contextmanager
def priority_of_the_configuration(monkeypatch):
    yield {"ir_op_priority": {"all_reduce_rms_norm": ["rank_ordered"]}}


@contextlib.contextmanager
def priority_by_default(monkeypatch):
    before = all_reduce_rms_norm.default_priority
    all_reduce_rms_norm.set_default_priority(["rank_ordered"])
    yield {}
    all_reduce_rms_norm.default_priority = before


@contextlib.contextmanager
def priority_in_a_block(monkeypatch):
    with fusewire.ir_op_priority({"all_reduce_rms_norm": ["rank_ordered"]}):
        yield {}


@contextlib.contextmanager
def another_provider(monkeypatch):
    all_reduce_rms_norm.register_impl("test_other")(
        lambda x, residual, weight, eps, weight_bias, form, group_name: None
    )
    yield {}
    all_reduce_rms_norm.unregister_impl("test_other")


@contextlib.contextmanager
def another_version_of_a_provider(monkeypatch):
    provider = dataclasses.replace(all_reduce_rms_norm.providers[NATIVE], version="2")
    monkeypatch.setitem(all_reduce_rms_norm.providers, NATIVE, provider)
    yield {}


def _does_nothing(graph, config):
    return False


@contextlib.contextmanager
def a_users_pass(monkeypatch):
    registry.register_pass("user", _does_nothing)
    yield {}
    registry.unregister_pass("user")


@contextlib.contextmanager
def a_users_pass_elsewhere(monkeypatch):
    registry.register_pass("user", _does_nothing, before="raise_ops")
    yield {}
    registry.unregister_pass("user")


@contextlib.contextmanager
def another_source_of_a_users_pass(monkeypatch):
    registry.register_pass("user", _does_nothing, source="version 2")
    yield {}
    registry.unregister_pass("user")


@contextlib.contextmanager
def another_source_of_fusewire(monkeypatch):
    monkeypatch.setattr(cache_key, "source_hash", lambda: "another")
    yield {}


@contextlib.contextmanager
def the_environment(monkeypatch):
    monkeypatch.setenv(BATCH_INVARIANT_VARIABLE, "1")
    yield {"ir_op_priority": {"all_reduce_rms_norm": [NATIVE]}}


CHANGES = [
    another_field,
    priority_of_the_configuration,
    priority_by_default,
    priority_in_a_block,
    another_provider,
    another_version_of_a_provider,
    a_users_pass,
    another_source_of_fusewire,
    the_environment,
]
# (way in, cache): each way and each cache once
ROUTES = [("backend", "autograd"), ("enable", "fx")]


@pytest.mark.parametrize(("way", "cache"), ROUTES)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_misses(monkeypatch, change, way, cache):
    assert not hit(way, cache)
    with change(monkeypatch) as options:
        assert not hit(way, cache, **options)
        assert hit(way, cache, **options)  # it was the change, and not a cache that never hits
    monkeypatch.undo()
    assert hit(way, cache)


@pytest.mark.parametrize("change", [a_users_pass_elsewhere, another_source_of_a_users_pass], ids=lambda c: c.__name__)
def test_a_change_of_a_users_pass_misses(monkeypatch, change):
    with a_users_pass(monkeypatch):
        assert not hit()
    with change(monkeypatch):
        assert not hit()
    with a_users_pass(monkeypatch):
        assert hit()


FIELDS = {
    "fuse_allreduce_rms": False,
    "eliminate_noops": False,
    "fuse_sandwich_norms": False,
    "fuse_sequence_parallel": False,
    "fuse_quantization": False,
    "shard_residual": True,
    "output_in_place": True,
    "fi_allreduce_fusion_max_size_mb": 1.5,
    "ir_op_priority": {"rms_norm": (NATIVE,)},
    "batch_invariant": True,
    "inline_native": False,
    "allow_reassociation": False,
    "assume_replicated_scales": False,
    "assume_replicated_gates": True,
    "assume_replicated_residuals": False,
    "merge_allreduces": False,
    "expect_fused": 1,
    "compile_alone": True,
    "disabled_passes": ("eliminate_noops",),
    "dump_graphs": "graphs",
}


# They change what is checked and written, not what runs.
REPORTS = ("expect_fused", "dump_graphs")


@pytest.mark.parametrize("name", [name for name in PassConfig.field_names() if name not in REPORTS])
def test_every_field_that_changes_what_runs_changes_the_key(name):
    changed = PassConfig(**{name: FIELDS[name]})
    assert backend.FusewirePass(changed).uuid() != backend.FusewirePass(PassConfig()).uuid()
    assert backend.FusewirePass(changed).uuid() == backend.FusewirePass(PassConfig(**{name: FIELDS[name]})).uuid()


@pytest.mark.parametrize("name", REPORTS)
def test_what_is_checked_and_written_leaves_the_key(name):
    assert backend.FusewirePass(PassConfig(**{name: FIELDS[name]})).uuid() == backend.FusewirePass(PassConfig()).uuid()


@pytest.mark.parametrize(("way", "cache"), ROUTES)
def test_a_graph_from_the_cache_must_meet_the_expectation_too(way, cache):
    assert not hit(way, cache, expect_fused=1)
    assert hit(way, cache, expect_fused="all")
    with pytest.raises(Exception, match="expect_fused=2, but 1 of 1 all-reduces were fused"):
        hit(way, cache, expect_fused=2)


def test_a_graph_from_the_cache_is_not_dumped_and_the_report_says_so(tmp_path):
    compiled(dump_graphs=str(tmp_path / "cold"))
    assert list((tmp_path / "cold").iterdir())
    assert fusewire.report().notes == ()
    assert hit(dump_graphs=str(tmp_path / "warm"))
    assert not (tmp_path / "warm").exists()
    assert fusewire.report().notes == (backend._NOT_DUMPED,)


def test_the_source_hash_covers_every_file_of_fusewire_and_no_other(monkeypatch):
    read = []
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: read.append(self.resolve()) or real(self))
    cache_key.source_hash.cache_clear()
    first = cache_key.source_hash()
    packages = (fusewire, custom_ops, patterns, fusion_passes)
    folders = [Path(package.__path__[0]).resolve() for package in packages]
    assert set(read) == {file for folder in folders for file in folder.rglob("*.py")}
    assert {"collectives.py", "registry.py", "norms.py", "errors.py"} <= {file.name for file in read}
    # Nothing else of a clone: no tests, no virtual environment.
    root = Path(fusewire.__file__).resolve().parents[1]
    assert {file.relative_to(root).parts[0] for file in read} <= {"fusewire", "custom_ops", "patterns", "fusion_passes"}
    monkeypatch.setattr(Path, "read_bytes", lambda self: real(self) + b"#" * (self.name == "norms.py"))
    cache_key.source_hash.cache_clear()
    assert cache_key.source_hash() != first
    cache_key.source_hash.cache_clear()


@pytest.fixture
def zeros():
    """A provider of rms_norm whose result shows that it served: zeros."""
    fusewire.rms_norm.register_impl("test_zeros")(lambda x, weight, eps, weight_bias, form: torch.zeros_like(x))
    yield "test_zeros"
    fusewire.rms_norm.unregister_impl("test_zeros")


@pytest.mark.parametrize("cache", CACHES)
def test_what_this_machine_can_serve_is_in_the_key(monkeypatch, zeros, cache):
    """A graph made while a provider was missing must not be found once it is there."""

    def norm(x, r, w):
        return fusewire.rms_norm(x, w, 1e-5)

    providers, options = fusewire.rms_norm.providers, {"ir_op_priority": {"rms_norm": [zeros, NATIVE]}}
    missing = dataclasses.replace(providers[zeros], supported=lambda: Support.no("not installed"))
    with monkeypatch.context() as patched:
        patched.setitem(providers, zeros, missing)
        assert torch.equal(compiled(cache=cache, fn=norm, **options), norm(*tensors()))
    assert torch.equal(compiled(cache=cache, fn=norm, **options), torch.zeros_like(tensors()[0]))
    assert counters["inductor"]["fxgraph_cache_miss"] == 1
    assert hit(cache=cache, fn=norm, **options)


@contextlib.contextmanager
def _other_world(size):
    """A stretch of the test in a group of another size, under the same name."""
    dist.destroy_process_group()
    try:
        with fake_group(size):
            yield
    finally:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)


@pytest.mark.parametrize(("way", "cache"), ROUTES)
def test_another_world_size_misses(way, cache):
    """The checks ask for the group's size, and the graph holds no more than its name."""
    assert not hit(way, cache)
    with _other_world(4):
        assert not hit(way, cache)
        assert hit(way, cache)
    assert hit(way, cache)


def _scale_epsilon(graph, config):
    for node in graph.nodes:
        if str(node.target) == FUSED_OP:
            node.args = (*node.args[:3], 100.0, *node.args[4:])
    return True


def _scale_epsilon_more(graph, config):
    for node in graph.nodes:
        if str(node.target) == FUSED_OP:
            node.args = (*node.args[:3], 400.0, *node.args[4:])
    return True


@pytest.mark.parametrize("cache", CACHES)
def test_a_changed_users_pass_takes_effect(cache):
    """The same name with another source: the graph in the cache must not be found."""
    largest = []
    for run in (_scale_epsilon, _scale_epsilon_more, _scale_epsilon):
        registry.register_pass("scale", run, after="lower_ops")
        norm, _ = compiled(cache=cache)
        largest.append(float(norm.abs().max()))
        registry.unregister_pass("scale")
    assert largest[0] == largest[2]
    assert largest[0] > 1.5 * largest[1]


class _Theirs(CustomGraphPass):
    def __init__(self, version):
        self.version = version

    def __call__(self, graph):
        return

    def uuid(self):
        return self.version


@pytest.mark.parametrize("way", ["backend", "enable"])
def test_a_chained_pass_is_in_the_key(way):
    for version, expected in (("1", False), ("1", True), ("2", False), ("1", True)):
        with inductor_config.patch(post_grad_custom_post_pass=_Theirs(version)):
            assert hit(way) is expected
    assert not hit(way)


@pytest.mark.parametrize("way", ["backend", "enable"])
def test_a_plain_callable_bypasses_the_cache(way):
    """What it does cannot be told from any key, so every compilation runs the passes."""
    for _ in range(2):
        with inductor_config.patch(post_grad_custom_post_pass=_Theirs("1").__call__):
            compiled(way)
        assert counters["inductor"]["fxgraph_cache_bypass"] == 1
        (graph,) = fusewire.report().graphs
        assert not graph.cached


# Reports of cached graphs


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("way", ["backend", "enable"])
def test_the_report_comes_back_with_the_graph(way, cache):
    compiled(way, cache)
    (cold,) = fusewire.report().graphs
    assert hit(way, cache)
    (warm,) = fusewire.report().graphs
    assert warm == dataclasses.replace(cold, cached=True, **dict.fromkeys(TIMES, 0.0))
    assert "from the compile cache" in str(fusewire.report())


def test_a_refusal_comes_back_too():
    def refused(x, r, w):
        return reduce_functional(x @ r.t())

    compiled(fn=refused)
    (cold,) = fusewire.report().entries
    assert hit(fn=refused)
    assert fusewire.report().entries == (cold,)
    assert cold.status == "refused"


@pytest.mark.parametrize(
    ("spoil", "logged"),
    [
        (lambda file: file.unlink(), False),
        (lambda file: file.write_text("{"), True),
        (lambda file: file.write_text('[{"number": 0}]'), True),
        (lambda file: file.write_text('{"salt": "0", "graphs": "[{}]"}'), True),
    ],
    ids=["gone", "no JSON", "another form", "another report"],
)
def test_a_graph_without_a_report_is_compiled_anew(spoil, logged, caplog):
    """What a graph in the cache would do, and whether the other ranks may run it, only its report says."""
    first = compiled()
    (file,) = cache_folder().glob("*.json")
    spoil(file)
    second = compiled()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    (graph,) = fusewire.report().graphs
    assert not graph.cached
    assert fusewire.report().fused == 1
    assert ("the graph is compiled anew" in caplog.text) == logged
    compiled()
    assert fusewire.report().graphs[0].cached


def test_the_report_is_kept_by_the_passes_themselves():
    """Ranks that share a cache directory compile at once: who finds a graph there must find its report."""
    with FakeTensorMode() as mode:
        graph = make_fx(block)(*map(mode.from_tensor, tensors())).graph
    with report_cache.reports_kept("name") as cache:
        backend.FusewirePass(PassConfig())(graph)
        kept = json.loads((cache_folder() / "name.json").read_text())
    (report,) = reports.graph_reports_from_json(kept["graphs"])
    assert report.entries == fusewire.report().entries
    assert len(report.entries) == 1
    assert cache.key == f"name-{kept['salt']}"


def test_a_report_that_cannot_be_written_is_a_warning(caplog):
    folder = cache_folder()
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.write_text("a file where the folder should be")
    result = compiled()
    assert torch.equal(result[0], block(*tensors())[0])
    assert "the report of a graph could not be kept beside the compile cache: " in caplog.text
    assert fusewire.report().fused == 1


def test_reports_that_were_used_longest_ago_are_evicted(monkeypatch):
    """Their graphs are compiled anew; the one that has just been made stays, however large it is."""
    for number in range(3):
        write_file(cache_folder() / f"{number}.json", "x" * 100)
        os.utime(cache_folder() / f"{number}.json", (number, number))
    os.utime(cache_folder() / "0.json")  # used since
    write_file(cache_folder() / "other.txt", "x" * 1000)

    def left_of(most_bytes):
        monkeypatch.setattr(report_cache, "MOST_BYTES", most_bytes)
        report_cache._evict(cache_folder() / "2.json")
        return sorted(file.name for file in cache_folder().iterdir())

    assert left_of(300) == ["0.json", "1.json", "2.json", "other.txt"]
    assert left_of(299) == ["0.json", "2.json", "other.txt"]
    assert left_of(50) == ["2.json", "other.txt"]


def test_saving_a_report_evicts_others_and_their_graphs_are_compiled_anew(monkeypatch):
    compiled()
    monkeypatch.setattr(report_cache, "MOST_BYTES", 1)
    compiled(merge_allreduces=False)
    assert len(list(cache_folder().glob("*.json"))) == 1
    compiled()
    (graph,) = fusewire.report().graphs
    assert not graph.cached


def _early_bound(model, inputs):
    """A backend of somebody who imported compile_fx before `enable` was entered."""
    return compile_fx(model, inputs)


def test_graphs_from_the_cache_that_were_compiled_past_enable_are_counted():
    for _ in range(2):
        torch._dynamo.reset()
        fusewire.clear_report()
        with torch.no_grad(), fusewire.enable(**CALLS):
            torch.compile(block, backend=_early_bound)(*tensors())
    (graph,) = fusewire.report().graphs
    assert graph.cached
    assert graph.notes == (
        "the compile cache held 1 graph, rewritten as they were when they were made; no report was kept",
    )


def test_within_enable_a_pass_given_to_one_compilation_is_in_the_key():
    """An engine gives its own custom pass with each compilation: that must not take the place of ours."""
    for text, expected in (("1", False), ("1", True), ("2", False)):
        torch._dynamo.reset()
        counters.clear()
        fusewire.clear_report()
        with torch.no_grad(), fusewire.enable(**CALLS):
            torch.compile(block, options={"post_grad_custom_post_pass": _Theirs(text)})(*tensors())
        assert fusewire.report().fused == 1
        assert bool(counters["inductor"]["fxgraph_cache_hit"]) == expected


def test_backend_within_enable_is_not_counted_twice():
    compiled()
    with fusewire.enable(**CALLS):
        compiled()
    (graph,) = fusewire.report().graphs
    assert graph.cached
    assert graph.notes == ()


# A second process


def _on_a_rank(cache):
    """Compile and run on real ranks; what the process has to say."""
    rank = dist.get_rank()
    inputs = [tensors(seed=rank)[0], *tensors()[1:]]
    calls = []
    native = all_reduce_rms_norm.providers[NATIVE]
    counted = dataclasses.replace(native, fn=lambda *args: calls.append(args) or native.fn(*args))
    all_reduce_rms_norm.providers[NATIVE] = counted
    counters.clear()
    fusewire.clear_report()
    with torch.no_grad(), torch._functorch.config.patch(enable_autograd_cache=cache == "autograd"):
        function = torch.compile(block, backend="fusewire", options={**CALLS, "expect_fused": "all"}, fullgraph=True)
        results = [function(*inputs) for _ in range(2)]
    section, name = {
        "autograd": ("aot_autograd", "autograd_cache_hit"),
        "fx": ("inductor", "fxgraph_cache_hit"),
    }[cache]
    return {
        "misses": counters["inductor"]["fxgraph_cache_miss"],
        "hits": counters[section][name],
        "calls": len(calls),
        "right": all(torch.equal(a, b) for result in results for a, b in zip(result, block(*inputs), strict=True)),
        "norm": results[0][0],
        "report": fusewire.report(),
    }


def test_a_second_process_runs_fused(tmp_path):
    """Two gloo ranks, three times in new processes: cold, then warm by either cache."""
    run = functools.partial(run_ranks, _on_a_rank, 2, cache_dir=tmp_path)
    cold = run("autograd")
    assert any(said["misses"] for said in cold)  # one rank may find what the other has just made
    for cache in CACHES:
        for said, made in zip(run(cache), cold, strict=True):
            assert (said["hits"], said["misses"]) == (1, 0)
            assert said["calls"] == 2
            assert said["right"]
            assert torch.equal(said["norm"], cold[0]["norm"])
            (graph,), (first,) = said["report"].graphs, made["report"].graphs
            assert graph.cached
            assert graph.notes == ()
            assert graph.entries == first.entries
            assert [entry.status for entry in graph.entries] == ["fused"]


def test_real_ranks_do_not_find_a_graph_compiled_for_a_fake_group():
    """The fake group's graph compares nothing between ranks; the real ranks' report would name
    peers to compare with."""
    options = {"expect_fused": "all"}
    assert not hit(**options)
    folder = os.environ["TORCHINDUCTOR_CACHE_DIR"]
    said = run_ranks(_on_a_rank, 2, "autograd", cache_dir=folder)
    assert any(rank["misses"] for rank in said)  # one rank may find what the other has just made
    assert all(rank["right"] for rank in said)
    assert hit(**options)


def test_machine_support_is_asked_once_per_provider(monkeypatch, zeros):
    """The key asks whether providers can serve here, for each compilation: the answer must be kept."""
    asked = []
    provider = dataclasses.replace(fusewire.rms_norm.providers[zeros], supported=lambda: asked.append(1) or YES)
    monkeypatch.setitem(fusewire.rms_norm.providers, zeros, provider)
    for _ in range(3):
        cache_key.cache_key(PassConfig(ir_op_priority={"rms_norm": [zeros]}))
    assert asked == [1]


def test_the_key_leaves_to_the_vote_what_the_ranks_vote_on(monkeypatch):
    """One rank's machine must not enter the key where all ranks' machines decide at run time."""
    asked = []
    provider = dataclasses.replace(all_reduce_rms_norm.providers[NATIVE], supported=lambda: asked.append(1) or YES)
    monkeypatch.setitem(all_reduce_rms_norm.providers, NATIVE, provider)
    cache_key.cache_key(PassConfig(ir_op_priority={"all_reduce_rms_norm": [NATIVE]}))
    assert asked == []
