"""Real vLLM servers on two ranks with a trained model, asked over HTTP.

Ten minutes: `make test-serving TEST_ARGS="-m nightly"`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-serving")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import serve
import smollm2

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(1800)]
LAYERS = 30
ALL_REDUCES = 2 * LAYERS + 1  # two in each layer, and one after the embedding
FUSED = f"{ALL_REDUCES} of {ALL_REDUCES} all-reduces fused"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return serve.pad_heads(smollm2.prepare(), tmp_path_factory.mktemp("model"), LAYERS)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def ask(model, cache, tmp_path_factory):
    logs = tmp_path_factory.mktemp("logs")

    def ask(name, *arguments, **variables):
        log = logs / f"{name}.log"
        answers = serve.ask(model, log, serve.server_environment(cache, **variables), arguments=arguments)
        return answers, log.read_text()

    return ask


@pytest.fixture(scope="module")
def plain(ask):
    return ask("plain")[0]


@pytest.fixture(scope="module")
def fused(ask):
    return ask("fused", FUSEWIRE_VLLM=f'{{"expect_fused": {ALL_REDUCES}}}')


def same(answers, plain):
    return answers.texts == plain.texts and serve.difference(answers, plain) == 0


def test_the_model_is_trained(plain):
    assert "Paris" in plain.texts[0]


def test_all_is_fused_and_nothing_else_changes(fused, plain):
    """Two addends: their sum is the same in either order, so are all bits after it."""
    answers, log = fused
    assert same(answers, plain)
    assert len(answers.reports) == 2
    assert all(FUSED in report for report in answers.reports)
    assert "fusewire is on" in log


def test_a_warm_start_is_the_same_and_has_its_report(ask, fused, plain):
    answers, log = ask("warm", FUSEWIRE_VLLM=f'{{"expect_fused": {ALL_REDUCES}}}')
    assert "Directly load AOT compilation" in log
    assert same(answers, plain)
    assert all(FUSED in report for report in answers.reports)


def test_a_rank_whose_cache_is_gone_compiles_beside_one_that_loads(ask, cache, fused, plain):
    gone = sorted(cache.glob("torch_compile_cache/torch_aot_compile/*/rank_1_0"))
    assert gone
    for folder in gone:
        folder.rename(folder.with_name("away"))
    answers, _ = ask("half warm", FUSEWIRE_VLLM=f'{{"expect_fused": {ALL_REDUCES}}}')
    assert same(answers, plain)


def test_disabled_it_is_vllms_own(ask, plain):
    answers, log = ask("disabled", FUSEWIRE_VLLM="1", FUSEWIRE_DISABLE="1")
    assert same(answers, plain)
    assert all("0 of 0 all-reduces" in report for report in answers.reports)
    assert "Directly load AOT compilation" in log  # what the server without fusewire compiled


def test_an_expectation_that_is_not_met_stops_the_start(ask):
    with pytest.raises(serve.ServerError, match="the server ended"):
        ask("expected", FUSEWIRE_VLLM='{"expect_fused": 3}')


def test_the_benchmark_of_steps_compares_two_modes(tmp_path):
    script = Path(serve.HERE) / "benchmarks" / "vllm_steps.py"
    sizes = ["--hidden", "256", "--layers", "2", "--batches", "1", "2", "--prefills", "16"]
    command = [sys.executable, str(script), *sizes, "--modes", "plain", "fusewire", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith(("| decode", "| prefill"))]
    assert [row.split("|")[1].strip() for row in rows] == ["decode 1", "decode 2", "prefill 16"]
    assert "5 of 5 all-reduces fused" in done.stdout
