"""Time prefill and decode of real model shapes, with plain torch.compile + NCCL and with fusewire.

    torchrun --nproc-per-node 4 examples/benchmarks/models.py --models llama-8b,gemma3-27b --layers 4 --out results

Widths are the real ones, layers fewer, weights random, so times per layer are those of the real model. Every time is
of a CUDA graph's replay (median over replays, maximum over ranks), both variants in the same process, one after the
other. Logits are compared with the same sharded model run eagerly in fp32: fused must be no farther than the baseline.

The 70B shape with fusewire's options beside its defaults, and what is left per step by kernel:

    torchrun --nproc-per-node 4 examples/benchmarks/models.py --models llama-70b --prefill 2048 4096 8192 \
        --decode 1 8 32 128 256 --variants shard_residual output_in_place --profile --out results

With --fp8 the projections behind norms multiply in FP8, their inputs quantised with a scale for each
token. Both variants do so; the error is then that of FP8, and should be alike.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

import fusewire

SHAPES = {
    "llama-8b": ("Llama", {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}),
    "llama-70b": ("Llama", {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}),
    "qwen3-32b": (
        "Qwen3",
        {"hidden_size": 5120, "intermediate_size": 25600, "num_attention_heads": 64, "head_dim": 128},
    ),
    "gemma3-27b": (
        "Gemma3",
        {
            "hidden_size": 5376,
            "intermediate_size": 21504,
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
            "head_dim": 128,
            "query_pre_attn_scalar": 168,
        },
    ),
}
CLASSES = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig"),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config"),
    "Gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig"),
}
VOCABULARY = 32768
CONTEXT = 128
# Options of PassConfig to measure beside the defaults.
VARIANTS = {
    "shard_residual": {"shard_residual": True},
    "output_in_place": {"output_in_place": True},
    "both": {"shard_residual": True, "output_in_place": True},
}
DEFAULT = "default"
# What a kernel does, by its name; the first that fits. Fused kernels communicate and normalise.
KINDS = (
    ("communication", r"nccl|all_?reduce|one_shot|two_shot|all_?gather|reduce_?scatter|lamport"),
    ("norm", r"rsqrt|rms_?norm"),
    ("matrix product", r"gemm|gemv|cutlass|nvjet|cublas|splitk"),
    ("attention", r"flash|fmha|attention|sdpa"),
)
PROFILED_REPLAYS = 3
# What the norms' results go into.
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max


@dataclasses.dataclass
class Row:
    """One measurement; times in milliseconds."""

    model: str
    world_size: int
    phase: str
    tokens: int
    baseline_ms: float
    fused_ms: float
    fused: int
    found: int
    eager_error: float
    baseline_error: float
    fused_error: float
    variant: str = DEFAULT

    @property
    def ratio(self) -> float:
        """Fused time over baseline time; below 1 is faster."""
        return self.fused_ms / self.baseline_ms


def build(name: str, layers: int) -> torch.nn.Module:
    """The model sharded over all ranks with transformers' own plan, with the same random weights everywhere."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    family, shape = SHAPES[name]
    model_class, config_class = (getattr(transformers, cls) for cls in CLASSES[family])
    config = config_class(
        vocab_size=VOCABULARY,
        num_hidden_layers=layers,
        max_position_embeddings=16384,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **{"num_key_value_heads": 8, **shape},
    )
    device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(0)
    torch.cuda.manual_seed(0)
    with torch.device(device):
        whole = model_class(config).to(torch.bfloat16)
    with torch.no_grad():
        for key, parameter in whole.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3 if "embed" in key else parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    weights = whole.state_dict()
    model = model_class.from_pretrained(
        None,
        config=config,
        state_dict=weights,
        dtype=torch.bfloat16,
        tp_plan="auto",
        attn_implementation="sdpa",
    )
    return model.eval()


class Fp8Linear(torch.nn.Module):
    """A linear layer in FP8, with a scale for each token and each output, as torchao computes it.

    Args:
        weight: this rank's rows of it (outputs, inputs).
    """

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        quantized, scale = quantize(weight)
        self.weight = torch.nn.Parameter(quantized, requires_grad=False)
        self.scale = torch.nn.Parameter(scale, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        quantized, scale = quantize(x.reshape(-1, x.shape[-1]))
        out = torch._scaled_mm(quantized, self.weight.t(), scale, self.scale.t(), out_dtype=x.dtype)
        return out.reshape(*x.shape[:-1], -1)


def quantize(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows in FP8, and a scale for each (fp32)."""
    scale = rows.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / LARGEST
    return (rows.float() / scale).clamp(-LARGEST, LARGEST).to(FP8), scale


def to_fp8(model: torch.nn.Module) -> torch.nn.Module:
    """Let a sharded model's projections behind norms multiply in FP8. Their inputs are not sharded."""
    for name, module in list(model.named_modules()):
        parent, _, last = name.rpartition(".")
        if last in PROJECTIONS:
            weight = module.weight
            setattr(model.get_submodule(parent), last, Fp8Linear(getattr(weight, "to_local", lambda w=weight: w)()))
    return model


def replay_ms(
    step: Callable[[], object], replays: int = 20, inspect: Callable[[Callable[[], None]], None] | None = None
) -> float:
    """Return the median time of one CUDA graph replay of `step` in milliseconds, maximum over ranks.

    `inspect` is then given what replays it.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    # One after the other, as a server runs them: alone, a replay would also count how far apart the ranks start.
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 4)]
    dist.barrier()
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in itertools.pairwise(events)]
    worst = torch.tensor(statistics.median(times[3:]), device="cuda")
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    if inspect is not None:
        inspect(graph.replay)
    del graph
    return float(worst)


def kind_of(kernel: str) -> str:
    """What a kernel does, by its name."""
    return next((kind for kind, names in KINDS if re.search(names, kernel, re.IGNORECASE)), "other")


def breakdown(title: str, kernels: dict[str, tuple[int, float]]) -> str:
    """Return the kernels of one step by total time, and each kind's share, as text.

    Args:
        kernels: for each name, how often it ran in a step and how many microseconds all that took.
    """
    total = sum(us for _, us in kernels.values())
    shares: dict[str, float] = {}
    for name, (_, us) in kernels.items():
        shares[kind_of(name)] = shares.get(kind_of(name), 0.0) + us / total
    both = shares.get("communication", 0.0) + shares.get("norm", 0.0)
    parts = ", ".join(f"{kind} {share:.1%}" for kind, share in sorted(shares.items(), key=lambda pair: -pair[1]))
    lines = [f"{title}: {total:.1f} us in kernels; communication and norm {both:.1%} ({parts})"]
    for name, (count, us) in sorted(kernels.items(), key=lambda pair: -pair[1][1]):
        lines.append(f"  {us:10.1f} us {us / total:6.1%} {count:5d} x {kind_of(name):14s} {name[:110]}")
    return "\n".join(lines)


def profiler(title: str, path: Path | None) -> Callable[[Callable[[], None]], None] | None:
    """What appends the breakdown of a step on rank 0 to a file; None without a file. All ranks replay alike."""
    if path is None:
        return None

    def inspect(replay: Callable[[], None]) -> None:
        from torch.profiler import ProfilerActivity, profile

        first = dist.get_rank() == 0
        recording = profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) if first else None
        with recording or contextlib.nullcontext():
            for _ in range(PROFILED_REPLAYS):
                replay()
            torch.cuda.synchronize()
        if recording is None:
            return
        kernels: dict[str, tuple[int, float]] = {}
        for event in recording.events():
            on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
            if on_gpu and not getattr(event, "is_user_annotation", False):
                count, us = kernels.get(event.name, (0, 0.0))
                kernels[event.name] = (count + 1, us + event.time_range.elapsed_us())
        step = {name: (n // PROFILED_REPLAYS, us / PROFILED_REPLAYS) for name, (n, us) in kernels.items()}
        text = breakdown(title, step) if step else f"{title}: the profiler saw no kernels on this machine"
        say(text.splitlines()[0])
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(text + "\n\n")

    return inspect


def compiled(model: torch.nn.Module, backend: str, options: dict[str, object] | None = None) -> torch.nn.Module:
    torch._dynamo.reset()
    return torch.compile(model, backend=backend, dynamic=False, options=options)


def prefill(
    model: torch.nn.Module,
    backend: str,
    ids: torch.Tensor,
    timed: bool,
    options: dict[str, object] | None = None,
    inspect: Callable[[Callable[[], None]], None] | None = None,
) -> tuple[torch.Tensor, float]:
    """Logits of one forward pass without a cache, and its time."""
    run = compiled(model, backend, options)
    logits = run(ids, use_cache=False).logits.float().clone()
    return logits, replay_ms(lambda: run(ids, use_cache=False), inspect=inspect) if timed else 0.0


def decode(
    model: torch.nn.Module,
    backend: str | None,
    batch: int,
    seed: int = 1,
    options: dict[str, object] | None = None,
    inspect: Callable[[Callable[[], None]], None] | None = None,
) -> tuple[torch.Tensor, float]:
    """Return logits and time of one decode step after CONTEXT tokens in a static KV cache.

    Without a backend the step runs eagerly, once, untimed.
    """
    from transformers import StaticCache

    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (batch, CONTEXT + 1), generator=generator).cuda()
    context, last = ids[:, :CONTEXT].contiguous(), ids[:, CONTEXT:].contiguous()
    cache = StaticCache(config=model.config, max_cache_len=CONTEXT * 2)
    model(context, past_key_values=cache, use_cache=True)
    if backend is None:
        return model(last, past_key_values=cache, use_cache=True).logits.float(), 0.0
    run = compiled(model, backend, options)
    logits = run(last, past_key_values=cache, use_cache=True).logits.float().clone()
    return logits, replay_ms(lambda: run(last, past_key_values=cache, use_cache=True), inspect=inspect)


def relative(a: torch.Tensor, reference: torch.Tensor) -> float:
    return float((a - reference).norm() / reference.norm())


def measure(name: str, arguments: argparse.Namespace, rows: list[Row]) -> None:
    """Add all rows of one model."""
    world_size = dist.get_world_size()
    model = build(name, arguments.layers)
    model = to_fp8(model) if arguments.fp8 else model
    exact = build(name, arguments.layers).float()
    generator = torch.Generator().manual_seed(0)
    for phase, tokens in [
        *(("prefill", t) for t in arguments.prefill),
        *(("decode", b) for b in arguments.decode),
    ]:
        ids = None
        fusewire.clear_report()

        def inspect(variant: str, phase: str = phase, tokens: int = tokens) -> Callable[..., None] | None:
            return profiler(f"{name} {world_size} GPUs {phase} {tokens} {variant}", arguments.profile_to)

        def fused(variant: str, phase: str = phase, tokens: int = tokens, ids: torch.Tensor | None = None) -> tuple:
            options = VARIANTS.get(variant)
            if phase == "prefill":
                return prefill(model, "fusewire", ids, True, options, inspect(variant))
            return decode(model, "fusewire", tokens, options=options, inspect=inspect(variant))

        if phase == "prefill":
            ids = torch.randint(3, VOCABULARY, (1, tokens), generator=generator).cuda()
            want = exact(ids, use_cache=False).logits
            eager = relative(model(ids, use_cache=False).logits.float(), want)
            base, base_ms = prefill(model, "inductor", ids, True, inspect=inspect("baseline"))
        else:
            want, _ = decode(exact, None, tokens)
            eager = relative(decode(model, None, tokens)[0], want)
            base, base_ms = decode(model, "inductor", tokens, inspect=inspect("baseline"))
        for variant in (DEFAULT, *arguments.variants):
            if variant != DEFAULT:
                # Made at the first call, with the output buffers that the variant asks for.
                fusewire.close(captured=True)
                fusewire.clear_report()
            got, fused_ms = fused(variant, ids=ids)
            errors = (eager, relative(base, want), relative(got, want))
            report = fusewire.report()
            counts = (report.fused, report.found)
            shape = f"{name} FP8" if arguments.fp8 else name
            rows.append(Row(shape, world_size, phase, tokens, base_ms, fused_ms, *counts, *errors, variant))
            say(show(rows[-1]))
            if report.fused != report.found:
                say(str(report))
            save(rows, arguments.out)
        if arguments.variants:
            fusewire.close(captured=True)


def show(row: Row) -> str:
    return (
        f"{row.model:14s} {row.world_size} GPUs {row.phase:8s}{row.tokens:6d}  baseline "
        f"{row.baseline_ms:8.3f} ms  fused {row.fused_ms:8.3f} ms  ratio {row.ratio:.3f}  "
        f"all-reduces {row.fused}/{row.found}  error eager {row.eager_error:.4f} baseline "
        f"{row.baseline_error:.4f} fused {row.fused_error:.4f}" + (f"  {row.variant}" if row.variant != DEFAULT else "")
    )


def save(rows: list[Row], out: Path | None) -> None:
    """Write models.json, from rank 0."""
    if out and dist.get_rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        (out / "models.json").write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="llama-8b,qwen3-32b,gemma3-27b", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prefill", type=int, nargs="*", default=[512, 2048], help="tokens of the prefill")
    parser.add_argument("--decode", type=int, nargs="*", default=[1, 32], help="batch sizes of the decode step")
    parser.add_argument("--variants", nargs="*", default=[], choices=VARIANTS, help="options beside the defaults")
    parser.add_argument("--fp8", action="store_true", help="FP8 projections behind norms")
    parser.add_argument("--profile", action="store_true", help="write each step's kernels to DIR/profile.txt")
    parser.add_argument("--out", type=Path, metavar="DIR", help="directory for models.json")
    arguments = parser.parse_args()
    if arguments.profile and not arguments.out:
        parser.error("--profile needs --out")
    arguments.profile_to = arguments.out / "profile.txt" if arguments.profile else None
    if not torch.cuda.is_available():
        print("this benchmark needs GPUs: times on a CPU would say nothing about them", file=sys.stderr)
        return 2
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
    say(
        f"{torch.cuda.get_device_name()} x {dist.get_world_size()}, torch {torch.__version__}, "
        f"{time.strftime('%Y-%m-%d')}"
    )
    rows: list[Row] = []
    if arguments.profile_to and dist.get_rank() == 0:
        arguments.profile_to.unlink(missing_ok=True)
    with torch.no_grad():
        for name in arguments.models.split(","):
            try:
                measure(name, arguments, rows)
            except Exception as error:
                say(f"{name}: {type(error).__name__}: {error}")
                raise
            torch.cuda.empty_cache()
    save(rows, arguments.out)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
