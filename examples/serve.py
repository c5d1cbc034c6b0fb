"""Serve a trained model with vLLM on two ranks, without fusewire and with it, and compare.

    python examples/serve.py

Starts vLLM's own HTTP server three times: as it is, with FUSEWIRE_VLLM=1, and with it again, from
vLLM's compile cache. Each answers the same prompts greedily. Exit status: 0 if every all-reduce is
fused and the texts agree, 1 if not, 2 if something is missing.

The model is SmolLM2-135M-Instruct with its 9 heads padded to 12, of zeros, so that two ranks can
share them. On a machine without GPUs a platform plugin (tests/serving/plugin) makes vLLM's CPU
build compile as its CUDA build does.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import smollm2

HERE = Path(__file__).resolve().parent
CPU_PLATFORM = HERE.parent / "tests" / "serving" / "plugin"
PROMPTS = ("The capital of France is", "Three colours of the rainbow are", "def fibonacci(n):")
HEADS, KEY_HEADS = 12, 4
# Differences of a logprob that rounding explains: float32 sums in another order, and bfloat16.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}


class ServerError(Exception):
    """The server did not start, or answered with an error; the message has the end of its log."""


@dataclasses.dataclass(frozen=True)
class Answers:
    """The answers of one server: texts, their tokens' logprobs, and its workers' reports."""

    texts: list[str]
    logprobs: list[list[float]]
    reports: list[str]
    start_seconds: float


def pad_heads(source: Path, target: Path, layers: int | None = None) -> Path:
    """Write a copy of a Llama checkpoint with more attention heads, of zeros: the same function.

    Args:
        source: a folder with config.json and model.safetensors.
        target: the new folder.
        layers: keep only the first layers, for a faster start.
    """
    import torch
    from safetensors.torch import load_file, save_file

    config = json.loads((source / "config.json").read_text())
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    more = (HEADS - config["num_attention_heads"]) * size
    more_keys = (KEY_HEADS - config["num_key_value_heads"]) * size
    layers = layers or config["num_hidden_layers"]
    weights: dict[str, Any] = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if ".layers." in name and int(name.split(".layers.")[1].split(".")[0]) >= layers:
            continue
        kind = name.split(".")[-2]
        if kind == "o_proj":
            weight = torch.cat([weight, weight.new_zeros(weight.shape[0], more)], 1)
        elif kind in ("q_proj", "k_proj", "v_proj"):
            rows = more if kind == "q_proj" else more_keys
            weight = torch.cat([weight, weight.new_zeros(rows, weight.shape[1])])
        weights[name] = weight.contiguous()
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        shutil.copy(file, target / file.name)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    config.update(num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS, head_dim=size, num_hidden_layers=layers)
    (target / "config.json").write_text(json.dumps(config, indent=1))
    return target


def server_environment(cache: Path, **variables: str) -> dict[str, str]:
    """Return the environment of a server whose compile cache lies in a folder."""
    import torch

    environment = {name: value for name, value in os.environ.items() if not name.startswith("FUSEWIRE_")}
    environment.update(
        VLLM_CACHE_ROOT=str(cache), VLLM_NO_USAGE_STATS="1", VLLM_SERVER_DEV_MODE="1", HF_HUB_OFFLINE="1", **variables
    )
    if not torch.cuda.is_available():
        path = os.pathsep.join(filter(None, (str(CPU_PLATFORM), environment.get("PYTHONPATH", ""))))
        environment.update(PYTHONPATH=path, OMP_NUM_THREADS="1", VLLM_CPU_KVCACHE_SPACE="1", VLLM_HOST_IP="127.0.0.1")
        environment.update(VLLM_CPU_OMP_THREADS_BIND="nobind")
    return environment


@contextlib.contextmanager
def serving(
    model: Path, log: Path, environment: dict[str, str], *, dtype: str, arguments: tuple[str, ...] = (), limit_s: float
) -> Iterator[str]:
    """Run vLLM's HTTP server on two ranks in the block; yield its address.

    Raises:
        ServerError: it ended, or did not answer within `limit_s` seconds.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", "model", "--tensor-parallel-size", "2", "--dtype", dtype]
    command += ["--max-model-len", "256", "--max-num-seqs", "4", "--max-num-batched-tokens", "256"]
    command += ["--no-enable-prefix-caching", "--host", "127.0.0.1", "--port", str(port), *arguments]
    if not any(argument.startswith("--compilation-config") for argument in arguments):
        command += ["--compilation-config", '{"mode": 3}']
    with open(log, "w") as file:
        # A session of its own: vLLM's workers end with it.
        server = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + limit_s
    try:
        while not _answers(address):
            if server.poll() is not None:
                raise ServerError(f"the server ended with status {server.returncode}:\n{_end(log)}")
            if time.monotonic() > deadline:
                raise ServerError(f"the server did not answer within {limit_s:.0f} s:\n{_end(log)}")
            time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=2) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _end(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-25:])


def post(address: str, path: str, body: dict[str, Any]) -> Any:
    """Send a JSON request to the server and return its answer. Raises ServerError."""
    request = urllib.request.Request(
        f"{address}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=300) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as error:
        raise ServerError(f"{path} answered {error.code}: {error.read().decode(errors='replace')[:2000]}") from None
    except OSError as error:
        raise ServerError(f"{path}: {error}") from None


def ask(
    model: Path, log: Path, environment: dict[str, str], *, dtype: str = "float32", tokens: int = 32,
    arguments: tuple[str, ...] = (), limit_s: float = 900,
) -> Answers:  # fmt: skip
    """Start a server, complete the prompts greedily, fetch the workers' reports, and stop it."""
    start = time.monotonic()
    with serving(model, log, environment, dtype=dtype, arguments=arguments, limit_s=limit_s) as address:
        seconds = time.monotonic() - start
        texts, logprobs = [], []
        for prompt in PROMPTS:
            body = {"model": "model", "prompt": prompt, "temperature": 0, "max_tokens": tokens, "logprobs": 1}
            choice = post(address, "/v1/completions", body)["choices"][0]
            texts.append(choice["text"])
            logprobs.append(choice["logprobs"]["token_logprobs"])
        reports = post(address, "/collective_rpc", {"method": "fusewire_report"})["results"]
    return Answers(texts, logprobs, reports, seconds)


def difference(some: Answers, other: Answers) -> float:
    """Return the largest difference between two answers' logprobs, up to the first other token."""
    largest = 0.0
    for text, others_text, a, b in zip(some.texts, other.texts, some.logprobs, other.logprobs, strict=True):
        if text == others_text:
            largest = max([largest, *(abs(x - y) for x, y in zip(a, b, strict=True))])
    return largest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=tuple(TOLERANCE), default="float32")
    parser.add_argument("--layers", type=int, help="keep only this many layers of the model, for a faster start")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of each completion")
    parser.add_argument("--logs", type=Path, help="folder for the servers' logs, kept; by default they are removed")
    arguments = parser.parse_args()
    try:
        import vllm
    except ImportError as error:
        print(f"error: vLLM is missing ({error}); `make serve` makes an environment that has it", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="fusewire-serve-") as folder:
        logs = arguments.logs or Path(folder)
        logs.mkdir(parents=True, exist_ok=True)
        try:
            model = pad_heads(smollm2.prepare(_show), Path(folder) / "model", arguments.layers)
        except smollm2.SetupError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        _show(f"vLLM {vllm.__version__}, SmolLM2-135M-Instruct, {arguments.dtype}, 2 ranks, logs in {logs}")
        try:
            return _compare(model, logs, Path(folder) / "cache", arguments)
        except ServerError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1


def _show(stage: str) -> None:
    print(stage, flush=True)


def _compare(model: Path, logs: Path, cache: Path, arguments: argparse.Namespace) -> int:
    answers: dict[str, Answers] = {}
    for name, switch in (("plain", {}), ("fusewire", {"FUSEWIRE_VLLM": "1"}), ("warm", {"FUSEWIRE_VLLM": "1"})):
        what = {"plain": "without fusewire", "fusewire": "with FUSEWIRE_VLLM=1", "warm": "again, from the cache"}[name]
        _show(f"\n{what}: starting the server (it compiles for a minute or more)")
        environment = server_environment(cache, **switch)
        found = answers[name] = ask(
            model, logs / f"{name}.log", environment, dtype=arguments.dtype, tokens=arguments.tokens
        )
        _show(f"{what}: ready after {found.start_seconds:.0f} s")
        for prompt, text in zip(PROMPTS, found.texts, strict=True):
            _show(f"  {prompt}{text!r}")
    _show("\nreport of rank 0:\n" + answers["warm"].reports[0])
    plain, right = answers["plain"], True
    for name in ("fusewire", "warm"):
        same = sum(a == b for a, b in zip(answers[name].texts, plain.texts, strict=True))
        largest = difference(answers[name], plain)
        _show(f"{name}: {same} of {len(PROMPTS)} texts as without; largest difference of a logprob {largest:.1e}")
        right &= math.isfinite(largest) and largest <= TOLERANCE[arguments.dtype]
        right &= same == len(PROMPTS) or arguments.dtype != "float32"
        right &= all(" 0 of 0 " not in report for report in answers[name].reports)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
