"""Time the steps of a vLLM engine: without fusion, with vLLM's own, and with fusewire.

    python examples/benchmarks/vllm_steps.py --hidden 4096 --layers 32 --out results

The model is a Llama of that shape with random weights. Each mode runs in processes of its own, one
mode after the other, `--rounds` times. A time is the median interval between steps of the engine by
the host's clock, so it has the scheduler, the sampler and the transfer of tokens in it. `--profile`
adds the GPU's time in kernels on rank 0, by kind, of one step. Needs vLLM (`make serving-env`).

Without GPUs it runs on CPUs, for a try: `--hidden 256 --layers 2 --batches 1 2 --prefills 16`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
MODES = ("plain", "own", "fusewire")
CONTEXT, VOCABULARY, HEAD = 16, 32000, 128
# Steps of a batch that are left out, then those that are timed. The first fill the batch.
SKIPPED, TIMED, PROFILED = 8, 100, 5
PREFILLS = 9
# What a kernel does, by its name; the first that fits.
KINDS = (
    ("all-reduce and norm", r"_one_shot|_two_shot|allreduce_fusion"),
    ("all-reduce", r"nccl|cross_device_reduce|all_?reduce"),
    ("norm", r"rsqrt|rms_?norm"),
    ("matrix product", r"gemm|gemv|cutlass|nvjet|cublas|splitk"),
    ("attention", r"attention|flash|fmha|reshape_and_cache"),
)


class Extension:
    """Methods of vLLM's workers, for `collective_rpc`."""

    def start_kernels(self) -> None:
        """Start the profiler of the GPU's kernels."""
        import torch

        self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self._profiler.__enter__()

    def stop_kernels(self) -> list[tuple[str, int, float]]:
        """Return name, number and microseconds of the kernels since `start_kernels`."""
        import torch

        torch.cuda.synchronize()
        self._profiler.__exit__(None, None, None)
        return [(event.key, event.count, event.self_device_time_total) for event in self._profiler.key_averages()]


def write_model(folder: Path, hidden: int, layers: int, ranks: int) -> None:
    """Write the configuration of a Llama; vLLM makes the weights."""
    heads = max(hidden // HEAD, ranks)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": hidden * 7 // 2, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": min(8, heads), "head_dim": hidden // heads, "vocab_size": VOCABULARY,
        "max_position_embeddings": 16384, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu",
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))


def environment_of(mode: str, out: Path) -> dict[str, str]:
    """Return the variables of one mode's processes. Nothing makes NVLink multicast objects."""
    import serve

    variables = {"FUSEWIRE_VLLM": "1"} if mode == "fusewire" else {}
    environment = serve.server_environment(out / f"cache-{mode}", **variables)
    environment.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_WORKER_MULTIPROC_METHOD="spawn", NCCL_NVLS_ENABLE="0",
        VLLM_ALLREDUCE_USE_SYMM_MEM="0", VLLM_ALLREDUCE_USE_FLASHINFER="0",
        VLLM_FLASHINFER_ALLREDUCE_BACKEND="trtllm", TORCH_SYMM_MEM_DISABLE_MULTICAST="1",
        PYTHONPATH=os.pathsep.join(filter(None, (str(HERE), environment.get("PYTHONPATH", "")))),
    )  # fmt: skip
    return environment


def start_engine(arguments: argparse.Namespace) -> Any:
    """Return vLLM's `LLM`, ready to run."""
    import torch
    from vllm import LLM

    gpu = torch.cuda.is_available()
    passes = {"fuse_allreduce_rms": arguments.mode == "own"}
    compilation: dict[str, Any] = {"mode": 3, "pass_config": passes}
    if gpu:
        compilation["cudagraph_capture_sizes"] = sorted(arguments.batches)
    longest = max([*arguments.prefills, CONTEXT])
    return LLM(
        str(arguments.out / "model"),
        skip_tokenizer_init=True,
        load_format="dummy",
        tensor_parallel_size=arguments.ranks,
        dtype="bfloat16" if gpu else "float32",
        max_model_len=max(longest, CONTEXT + SKIPPED + TIMED + PROFILED) + 16,
        max_num_batched_tokens=max(longest, CONTEXT * max(arguments.batches)),
        max_num_seqs=max(arguments.batches),
        enable_prefix_caching=False,
        compilation_config=compilation,
        worker_extension_cls="vllm_steps.Extension",
        disable_log_stats=True,
        **({"gpu_memory_utilization": 0.5, "attention_config": {"backend": "TRITON_ATTN"}} if gpu else {}),
    )


def steps(engine: Any, batch: int, prompt: int, tokens: int) -> Iterator[float]:
    """Run requests to their end; yield the seconds between the ends of the engine's steps."""
    from vllm import SamplingParams

    settings = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0, detokenize=False)
    for number in range(batch):
        ids = [(number * 7 + place) % (VOCABULARY - 5) + 5 for place in range(prompt)]
        engine.add_request(f"{time.monotonic_ns()}-{number}", {"prompt_token_ids": ids}, settings)
    last = time.perf_counter()
    while engine.has_unfinished_requests():
        engine.step()
        now = time.perf_counter()
        yield now - last
        last = now


def kernels_of_a_step(llm: Any, batch: int) -> dict[str, float]:
    """Return milliseconds of the GPU's kernels in one decode step on rank 0, by kind."""
    import re

    running = steps(llm.llm_engine, batch, CONTEXT, SKIPPED + PROFILED + 1)
    for _ in range(SKIPPED):
        next(running)
    llm.collective_rpc("start_kernels")
    for _ in range(PROFILED):
        next(running)
    found = llm.collective_rpc("stop_kernels")[0]
    for _ in running:
        pass
    kinds: dict[str, float] = {}
    for name, _, microseconds in found:
        kind = next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), "other")
        kinds[kind] = kinds.get(kind, 0.0) + microseconds / PROFILED / 1e3
    return kinds


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one mode in this process."""
    start = time.monotonic()
    llm = start_engine(arguments)
    found: dict[str, Any] = {"start_s": time.monotonic() - start, "kernels": {}}
    for batch in arguments.batches:
        times = list(steps(llm.llm_engine, batch, CONTEXT, SKIPPED + TIMED))
        found[f"decode {batch}"] = statistics.median(times[SKIPPED : SKIPPED + TIMED]) * 1e3
        print(f"{arguments.mode}: decode {batch}: {found[f'decode {batch}']:.3f} ms", flush=True)
    for tokens in arguments.prefills:
        times = [sum(steps(llm.llm_engine, 1, tokens, 1)) for _ in range(PREFILLS + 2)][2:]
        found[f"prefill {tokens}"] = statistics.median(times) * 1e3
        print(f"{arguments.mode}: prefill {tokens}: {found[f'prefill {tokens}']:.3f} ms", flush=True)
    if arguments.profile:
        found["kernels"] = {batch: kernels_of_a_step(llm, batch) for batch in arguments.batches}
    if arguments.mode == "fusewire":
        found["report"] = llm.collective_rpc("fusewire_report")[0]
    return found


def compare(results: dict[str, list[dict[str, Any]]], arguments: argparse.Namespace) -> str:
    """Return a table of milliseconds, medians of the rounds, with ratios to the first mode."""
    modes = list(results)
    lines = ["| step | " + " | ".join(modes) + " |", "|---|" + "--:|" * len(modes)]
    sizes = [f"decode {b}" for b in arguments.batches] + [f"prefill {n}" for n in arguments.prefills]
    for size in sizes:
        times = {mode: statistics.median(found[size] for found in results[mode]) for mode in modes}
        cells = [f"{times[mode]:.3f} ({times[mode] / times[modes[0]]:.2f})" for mode in modes]
        lines.append(f"| {size} | " + " | ".join(cells) + " |")
    for mode in modes:
        for batch, kinds in results[mode][-1]["kernels"].items():
            listed = ", ".join(f"{kind} {ms:.3f}" for kind, ms in sorted(kinds.items()))
            lines.append(f"{mode}, decode {batch}, ms in kernels: {listed}; all {sum(kinds.values()):.3f}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64, 128])
    parser.add_argument("--prefills", type=int, nargs="*", default=[512, 2048, 4096, 8192])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--profile", action="store_true", help="needs GPUs")
    parser.add_argument("--out", type=Path, help="folder for results and logs; by default they are removed")
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)  # one mode, in this process
    arguments = parser.parse_args()
    if arguments.mode:
        (arguments.out / f"{arguments.mode}.json").write_text(json.dumps(measure(arguments)))
        return 0
    try:
        import vllm
    except ImportError as error:
        print(f"error: vLLM is missing ({error}); `make serving-env` makes an environment that has it", file=sys.stderr)
        return 2
    print(f"vLLM {vllm.__version__}, hidden {arguments.hidden}, {arguments.layers} layers, {arguments.ranks} ranks")
    with tempfile.TemporaryDirectory(prefix="fusewire-vllm-steps-") as folder:
        arguments.out = (arguments.out or Path(folder)).resolve()
        write_model(arguments.out / "model", arguments.hidden, arguments.layers, arguments.ranks)
        return run_modes(arguments)


def run_modes(arguments: argparse.Namespace) -> int:
    """Run each mode in a process of its own, print the table, and return the exit status."""
    results: dict[str, list[dict[str, Any]]] = {mode: [] for mode in arguments.modes}
    for number in range(arguments.rounds):
        for mode in arguments.modes:
            log = arguments.out / f"{mode}-{number}.log"
            command = [sys.executable, __file__, *sys.argv[1:], "--out", str(arguments.out), "--mode", mode]
            print(f"\nround {number + 1}, {mode}: the engine starts and compiles (log: {log})", flush=True)
            with open(log, "w") as file:
                run = subprocess.Popen(
                    command, env=environment_of(mode, arguments.out), stdout=subprocess.PIPE, stderr=file, text=True
                )
                assert run.stdout is not None
                for line in run.stdout:
                    file.write(line)
                    if line.startswith(f"{mode}: "):
                        print(line, end="", flush=True)
                if run.wait():
                    end = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
                    print(f"error: {mode} ended with status {run.returncode}:\n{end}", file=sys.stderr)
                    return 1
            results[mode].append(json.loads((arguments.out / f"{mode}.json").read_text()))
    (arguments.out / "results.json").write_text(json.dumps(results, indent=1))
    print("\n" + compare(results, arguments))
    if "fusewire" in results:
        print("\n" + results["fusewire"][-1]["report"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
