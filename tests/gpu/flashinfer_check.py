"""FlashInfer's kernels against exact references, on however many GPUs there are. Run with torchrun:

    torchrun --nproc-per-node 2 tests/gpu/flashinfer_check.py --out /tmp/check

Prints a table of cases run, passed and skipped (with reasons) and exits with 1 if any failed. Each phase has
a time limit: a kernel that never returns ends the process with a stack trace in the log. Every rank computes
on the device beside its own number, so that nothing may take one for the other.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import sys
import time
import traceback
from collections import Counter
from datetime import timedelta
from pathlib import Path

# Multicast objects are not for tests: one that goes wrong takes the machine's GPUs out of service.
os.environ["NCCL_NVLS_ENABLE"] = "0"
os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"

import torch
import torch.distributed as dist

from fusewire.custom_ops import api
from fusewire.custom_ops.coordination import timeouts
from fusewire.custom_ops.dispatch import dispatcher as dispatch
from fusewire.custom_ops.dispatch import overview
from fusewire.custom_ops.dispatch.cost_tables import ONE_SHOT, TWO_SHOT
from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm
from fusewire.custom_ops.ops.norms import NormSpec, add_residual, normalize
from fusewire.custom_ops.providers.flashinfer import provider
from fusewire.custom_ops.workspaces import provider as interface
from fusewire.custom_ops.workspaces import registry as workspace
from fusewire.errors import CaptureError, NoProviderError, WorkspaceError

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HIDDEN = (64, 576, 2048, 2688, 2880, 4096, 5120, 5376, 7168, 8192)
TOKENS = (1, 2, 3, 8, 16, 17, 33, 34, 66, 67, 128, 133, 265, 512, 2048)
VARIANTS = {  # name: (with residual, with weight, weight_bias)
    "residual": (True, True, 0.0),
    "residual, 1 + weight": (True, True, 1.0),
    "no residual": (False, True, 0.0),
    "no residual, 1 + weight": (False, True, 1.0),
    "weightless": (True, False, 0.0),
    "weightless, no residual": (False, False, 0.0),
}
EPS = 1e-5
# The kernels sum squares in another order and take an approximate square root: in fp32 this shows.
ULPS = {torch.bfloat16: 1, torch.float16: 1, torch.float32: 32}


class Checks:
    """What ran and how it ended. Outcomes stay on the GPU until `flush`, which compares them across ranks."""

    def __init__(self, device: torch.device, log: Path) -> None:
        self.device, self.log = device, log.open("w", buffering=1)
        self.counts = {}
        self.failures = []
        self.skips = Counter()
        self._pending = []

    def write(self, text: str) -> None:
        self.log.write(f"{time.strftime('%H:%M:%S')} {text}\n")

    def count(self, phase: str, what: str) -> None:
        self.counts.setdefault(phase, Counter())[what] += 1

    def skip(self, phase: str, name: str, reason: str) -> None:
        self.count(phase, "skipped")
        self.skips[f"{phase}: {reason}"] += 1
        self.write(f"SKIP {phase}: {name}: {reason}")

    def now(self, phase: str, name: str, ok: bool, detail: str = "") -> None:
        self.count(phase, "passed" if ok else "failed")
        self.write(f"{'ok' if ok else 'FAIL'} {phase}: {name} {detail}")
        if not ok:
            self.failures.append(f"{phase}: {name} {detail}")

    def later(self, phase: str, name: str, bad: dict, *outputs: torch.Tensor) -> None:
        """`bad`: counts of wrong elements; `outputs` must be equal bit for bit on all ranks."""
        values = [*bad.values(), *(fingerprint(output) for output in outputs)]
        self._pending.append((phase, name, list(bad), torch.stack([value.to(torch.int64) for value in values])))

    def flush(self, group: dist.ProcessGroup | None = None) -> None:
        if not self._pending:
            return
        flat = torch.cat([values for *_, values in self._pending])
        ranks = [torch.empty_like(flat) for _ in range(dist.get_world_size(group))]
        dist.all_gather(ranks, flat, group=group)
        rows, start = [row.tolist() for row in ranks], 0
        for phase, name, kinds, values in self._pending:
            bad = {kind: rows[dist.get_rank(group)][start + i] for i, kind in enumerate(kinds)}
            prints = {tuple(row[start + len(kinds) : start + len(values)]) for row in rows}
            if len(prints) > 1:
                bad["ranks differ"] = len(prints)
            wrong = {kind: count for kind, count in bad.items() if count}
            self.now(phase, name, not wrong, str(wrong or ""))
            start += len(values)
        self._pending.clear()


_WEIGHTS: list[torch.Tensor] = []


def fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """A number that two tensors share if they are equal bit for bit, and hardly otherwise."""
    bits = tensor.reshape(-1).view(torch.int16 if tensor.element_size() == 2 else torch.int32)
    if not _WEIGHTS:
        generator = torch.Generator(tensor.device).manual_seed(1)
        _WEIGHTS.append(torch.randint(1, 1 << 30, (1 << 20,), generator=generator, device=tensor.device))
    weights = _WEIGHTS[0]
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for i, part in enumerate(bits.split(len(weights))):
        total += (part.long() * weights[: len(part)]).sum() * (2 * i + 1)
    return total


def ordered(tensor: torch.Tensor) -> torch.Tensor:
    """Floats as integers in the same order: differences count units in the last place; -0.0 equals 0.0."""
    if tensor.element_size() == 2:
        bits = tensor.view(torch.int16).int()
        return torch.where(bits < 0, -(1 << 15) - bits, bits)
    bits = tensor.view(torch.int32).long()
    return torch.where(bits < 0, -(1 << 31) - bits, bits)


class Reference:
    """Inputs of all ranks (every rank draws the same numbers) and the exact results for one hidden size."""

    def __init__(self, c: Context, tokens: int, hidden: int, dtype: torch.dtype, factor: float = 1.0) -> None:
        generator = torch.Generator(c.device).manual_seed(hidden * 31 + dtype.itemsize)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=c.device).to(dtype)

        self.dtype, self.weight = dtype, draw(hidden)
        self.parts = [draw(tokens, hidden) * factor for _ in range(c.ranks)]
        self.residual = draw(tokens, hidden) * factor
        summed = sum_of(self.parts)
        self.totals = {True: add_residual(summed, self.residual), False: summed}
        self.norms = {name: ordered(self.norm(*variant)) for name, variant in VARIANTS.items()}

    def norm(self, residual: bool, weight: bool, weight_bias: float) -> torch.Tensor:
        wide = self.totals[residual].double()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        return (wide * (weight_bias + self.weight.double()) if weight else wide).to(self.dtype)

    def check(self, name: str, norm: torch.Tensor, total: torch.Tensor, tokens: int) -> dict:
        with_residual = VARIANTS[name][0]
        norm, total = norm.reshape(tokens, -1), total.reshape(tokens, -1)
        distance = (ordered(norm) - self.norms[name][:tokens]).abs()
        return {
            "sum": (ordered(total) != ordered(self.totals[with_residual][:tokens])).sum(),
            "norm": (distance > ULPS[self.dtype]).sum(),
        }


def sum_of(parts: list) -> torch.Tensor:
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts[0].dtype)


def poison(like: torch.Tensor) -> None:
    """Leave NaNs in the memory that the next two outputs of this size are given."""
    torch.full_like(like, torch.nan), torch.full_like(like, torch.nan)


class Context:
    def __init__(self, checks: Checks, args: argparse.Namespace) -> None:
        self.checks, self.args = checks, args
        self.device = checks.device
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.group = dist.group.WORLD
        self.name = self.group.group_name

    def make(self, hidden: int, dtype: torch.dtype, tokens: int, group: dist.ProcessGroup | None = None):
        """The workspace, or None with the reason."""
        workspace_provider = interface.PROVIDERS["flashinfer"]
        found = api._prepare_one(workspace_provider, group or self.group, hidden, dtype, self.device, tokens, 0)
        key = interface.WorkspaceKey("flashinfer", found.group_name, dtype, hidden)
        entry = workspace.REGISTRY.entries.get(key)
        return (entry.workspace if entry else None), found.reason

    def op(self, *call, policy: str, group: str | None = None):
        return all_reduce_rms_norm(*call, group_name=group or self.name, policy=policy)


# --- Phases -------------------------------------------------------------------------------------------------


def matrix(c: Context) -> None:
    """Every dtype, hidden size, token count, variant and path."""
    for dtype in DTYPES:
        for hidden in HIDDEN:
            made, reason = c.make(hidden, dtype, TOKENS[-1])
            if made is None:
                c.checks.skip("matrix", f"{dtype} hidden {hidden}", reason)
                continue
            reference = Reference(c, TOKENS[-1], hidden, dtype)
            for path in (ONE_SHOT, TWO_SHOT):
                span = provider.token_limit(path, hidden, dtype, c.ranks, made.max_tokens)
                for tokens in TOKENS:
                    if tokens not in span:
                        c.checks.skip(
                            "matrix",
                            f"{path} {dtype} {hidden} {tokens}",
                            f"{path} takes {span.start} to {span.stop - 1} tokens",
                        )
                        continue
                    for name in VARIANTS:
                        matrix_case(c, made, reference, path, tokens, name)
            c.checks.flush()
            del reference
            api.close(captured=True)


def matrix_case(c: Context, made, reference: Reference, path: str, tokens: int, name: str) -> None:
    with_residual, with_weight, weight_bias = VARIANTS[name]
    x = reference.parts[c.rank][:tokens]
    residual = reference.residual[:tokens] if with_residual else None
    if tokens % 2 == 0:  # any leading dimensions
        x = x.view(2, tokens // 2, -1)
        residual = residual if residual is None else residual.view(x.shape)
    poison(x)
    norm, total = made.run(path == ONE_SHOT, x, residual, reference.weight if with_weight else None, EPS, weight_bias)
    assert norm.shape == total.shape == x.shape
    label = f"{path} {str(reference.dtype)[6:]} hidden {x.shape[-1]} tokens {tokens} {name}"
    c.checks.later("matrix", label, reference.check(name, norm, total, tokens), norm, total)


def specials(c: Context) -> None:
    """NaN, Inf, -0.0 and subnormals; outputs between guard bands."""
    hidden, tokens = 4096, 40
    for dtype in DTYPES:
        made, reason = c.make(hidden, dtype, 64)
        if made is None:
            c.checks.skip("specials", str(dtype), reason)
            continue
        tiny = torch.finfo(dtype).smallest_normal
        for kind, value in {
            "nan": torch.nan,
            "inf": torch.inf,
            "-inf": -torch.inf,
            "-0.0": -0.0,
            "subnormal": tiny / 4,
            "smallest": tiny * torch.finfo(dtype).eps,
            "largest": torch.finfo(dtype).max / 64,
        }.items():
            reference = Reference(c, tokens, hidden, dtype)
            every = kind in ("-0.0", "subnormal", "smallest", "largest")
            for rank, part in enumerate(reference.parts):
                if every:
                    part.fill_(value)
                elif rank == c.ranks - 1:
                    part[::3, ::7] = value
            if every:
                reference.residual.fill_(value)
            total_ref = add_residual(sum_of(reference.parts), reference.residual)
            for path in (ONE_SHOT, TWO_SHOT):
                args = (reference.parts[c.rank], reference.residual, reference.weight, EPS, 0.0)
                poison(args[0])
                norm, total = made.run(path == ONE_SHOT, *args)
                bad = {"sum": (~same(total, total_ref, dtype)).sum()}
                wanted = normalize(total, NormSpec(reference.weight, EPS, 0.0, "scale_then_round"))
                near = (ordered(norm) - ordered(wanted)).abs() <= ULPS[dtype]
                both_nan = norm.isnan() & wanted.isnan()
                flushed = (norm.float().abs() <= 2.0**-110) & (wanted.float().abs() <= 2.0**-110)
                bad["norm"] = (~(near | both_nan | flushed)).sum()
                c.checks.later("specials", f"{path} {str(dtype)[6:]} {kind}", bad, norm, total)
        guard_bands(c, made, dtype, hidden)
        c.checks.flush()
        api.close(captured=True)


def same(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Equal, both NaN, or both so small that fast math may have made zeros of them."""
    small = 2.0**-118 if dtype != torch.float16 else 0.0
    tiny = (found.float().abs() <= small) & (wanted.float().abs() <= small)
    return (found == wanted) | (found.isnan() & wanted.isnan()) | tiny


def guard_bands(c: Context, made, dtype: torch.dtype, hidden: int) -> None:
    """The kernels write their outputs and nothing beside them."""
    for path in (ONE_SHOT, TWO_SHOT):
        tokens, band = 33, 8
        buffers = [torch.full((tokens + 2 * band, hidden), 777.0, dtype=dtype, device=c.device) for _ in range(2)]
        norm, total = (buffer[band : band + tokens] for buffer in buffers)
        x = torch.randn(tokens, hidden, device=c.device).to(dtype)
        made._fused(
            input=x, workspace=made.handle, pattern=1, output=norm, residual_in=x, rms_gamma=x[0].clone(),
            rms_eps=EPS, residual_out=total, norm_out=norm, use_oneshot=path == ONE_SHOT, fp32_acc=True,
        )  # fmt: skip
        outside = [torch.cat([buffer[:band], buffer[band + tokens :]]) for buffer in buffers]
        bad = {"written beside the outputs": sum((part != 777.0).sum() for part in outside)}
        c.checks.later("specials", f"{path} {str(dtype)[6:]} guard bands", bad)


def limits(c: Context) -> None:
    """At the workspace's limit, one above it, no tokens, and at FlashInfer's own limit of 1 GiB."""
    hidden, dtype = 4096, torch.bfloat16
    made, reason = c.make(hidden, dtype, 300)
    if made is None:
        return c.checks.skip("limits", "all", reason)
    reference = Reference(c, 301, hidden, dtype)
    for tokens, policy in ((300, "flashinfer"), (301, "flashinfer,native"), (0, "flashinfer")):
        x, residual = reference.parts[c.rank][:tokens], reference.residual[:tokens]
        norm, total = c.op(x, residual, reference.weight, EPS, policy=policy)
        if tokens == 301:
            bad = {"sum": far(total, reference.totals[True])}
            c.checks.later("limits", "one token more goes to native", bad)
        elif not tokens:
            c.checks.now("limits", "no tokens", norm.shape == total.shape == (0, hidden))
        else:
            bad = reference.check("residual", norm, total, tokens)
            c.checks.later("limits", f"{tokens} of 300 tokens", bad, norm)
    too_many = reference.parts[0]
    for what, error, call in (
        ("one more, forced", NoProviderError, lambda: c.op(too_many, None, None, EPS, policy="flashinfer")),
        ("past the check", WorkspaceError, lambda: made.run(True, too_many, None, None, EPS, 0.0)),
        ("growing", WorkspaceError, lambda: c.make(hidden, dtype, 301)),
    ):
        c.checks.now("limits", what, raises(error, call))
    c.checks.flush()
    api.close(captured=True)
    return largest(c)


def largest(c: Context) -> None:
    hidden, dtype = 8192, torch.bfloat16
    tokens = provider.max_tokens(hidden, dtype, c.ranks)
    made, reason = c.make(hidden, dtype, tokens)
    if made is None:
        return c.checks.skip("limits", f"{tokens} tokens of hidden size {hidden}", reason)
    generator = torch.Generator(c.device).manual_seed(5)
    mine, total = torch.empty(0), torch.zeros(tokens, hidden, device=c.device)
    for rank in range(c.ranks):
        part = torch.randn(tokens, hidden, generator=generator, device=c.device, dtype=dtype)
        total += part
        mine = part if rank == c.rank else mine
    wanted = total.to(dtype)
    del total, part
    for path in (ONE_SHOT, TWO_SHOT):
        for _ in range(4):  # all three of one-shot's buffers, and the first again
            _, found = made.run(path == ONE_SHOT, mine, None, None, EPS, 0.0)
        bad = {"sum": (ordered(found) != ordered(wanted)).sum()}
        c.checks.later("limits", f"{path} at the limit of 1 GiB: {tokens} tokens of hidden size {hidden}", bad)
    c.checks.flush()
    api.close(captured=True)
    return None


def far(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Elements further apart than NCCL's own order and rounding of bf16 sums explain."""
    return ((found.float() - wanted.float()).abs() > 2.0**-4 + 2.0**-5 * wanted.float().abs()).sum()


def raises(error: type, call) -> bool:
    try:
        call()
    except error:
        return True
    return False


def graphs(c: Context) -> None:
    """Captured by hand, replayed with fresh inputs, eager calls in between; capture without a workspace."""
    hidden, dtype = 4096, torch.bfloat16
    x = torch.zeros(16, hidden, dtype=dtype, device=c.device)
    graph = torch.cuda.CUDAGraph()

    def capture_unprepared() -> None:
        with torch.cuda.graph(graph):
            c.op(x, None, None, EPS, policy="flashinfer,native")

    c.checks.now("graphs", "capture without a workspace", raises(CaptureError, capture_unprepared))
    made, reason = c.make(hidden, dtype, 1024)
    if made is None:
        return c.checks.skip("graphs", "all", reason)
    for tokens in (1, 16, 133, 512):
        first = Reference(c, tokens, hidden, dtype)
        inputs = (torch.zeros_like(first.residual), torch.zeros_like(first.residual))
        graph, outputs = torch.cuda.CUDAGraph(), {}
        with torch.cuda.graph(graph):
            outputs["residual"] = c.op(*inputs, first.weight, EPS, policy="flashinfer")
            outputs["no residual"] = c.op(inputs[0], None, first.weight, EPS, policy="flashinfer")
            outputs["weightless"] = c.op(*inputs, None, EPS, policy="flashinfer")
        for replay in range(4):
            fresh = Reference(c, tokens, hidden, dtype, factor=2.0**replay)
            inputs[0].copy_(fresh.parts[c.rank])
            inputs[1].copy_(fresh.residual)
            graph.replay()
            for name, (norm, total) in outputs.items():
                bad = fresh.check(name, norm, total, tokens)
                c.checks.later("graphs", f"{tokens} tokens {name} replay {replay}", bad, norm, total)
            args = (fresh.parts[c.rank], fresh.residual, fresh.weight, EPS)
            norm, total = c.op(*args, policy="flashinfer")
            bad = fresh.check("residual", norm, total, tokens)
            c.checks.later("graphs", f"{tokens} tokens eager after replay {replay}", bad, norm)
        c.checks.flush()
    api.close(captured=True)
    return None


def streams(c: Context) -> None:
    """Calls on alternating streams of one workspace."""
    hidden, dtype = 4096, torch.bfloat16
    made, reason = c.make(hidden, dtype, 256)
    if made is None:
        return c.checks.skip("streams", "all", reason)
    reference = Reference(c, 256, hidden, dtype)
    side = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    results = []
    for i in range(40):
        with torch.cuda.stream(side[i % 2]):
            tokens = (1, 17, 256)[i % 3]
            args = (reference.parts[c.rank][:tokens], reference.residual[:tokens], reference.weight, EPS, 0.0)
            results.append((tokens, made.run(i % 4 < 2 or tokens == 1, *args)))
    torch.cuda.synchronize()
    for i, (tokens, (norm, total)) in enumerate(results):
        c.checks.later("streams", f"call {i}", reference.check("residual", norm, total, tokens), norm)
    c.checks.flush()
    api.close(captured=True)
    return None


def subgroups(c: Context) -> None:
    """Pairs of ranks that are no neighbours, at the same time, between calls of the whole group."""
    if c.ranks < 4:
        return c.checks.skip("subgroups", "2 x TP2", "needs 4 GPUs")
    hidden, dtype, half = 4096, torch.bfloat16, c.ranks // 2
    pairs = [dist.new_group([i + half, i]) for i in range(half)]
    mine = pairs[c.rank % half]
    reference = Reference(c, 64, hidden, dtype)
    everyone, reason = c.make(hidden, dtype, 64)
    pair, pair_reason = c.make(hidden, dtype, 64, mine)
    if pair is None or everyone is None:
        return c.checks.skip("subgroups", "2 x TP2", pair_reason or reason)
    members = sorted(dist.get_process_group_ranks(mine), key=lambda r: dist.get_group_rank(mine, r))
    wanted = sum_of([reference.parts[r] for r in members])
    for repeat in range(3):
        for path in (ONE_SHOT, TWO_SHOT):
            norm, total = pair.run(path == ONE_SHOT, reference.parts[c.rank], None, reference.weight, EPS, 0.0)
            bad = {"sum": (ordered(total) != ordered(wanted)).sum(), "nan": norm.isnan().sum()}
            c.checks.later("subgroups", f"pair {members} {path} {repeat}", bad)
            args = (reference.parts[c.rank], reference.residual, reference.weight, EPS, 0.0)
            norm, total = everyone.run(path == ONE_SHOT, *args)
            label = f"everyone {path} {repeat}"
            c.checks.later("subgroups", label, reference.check("residual", norm, total, 64), norm)
    c.checks.flush()
    api.close(captured=True)
    return None


def dispatched(c: Context) -> None:
    """The operator as graphs call it: default policy, against native, on both sides of the plan's limits."""
    hidden, dtype = 8192, torch.bfloat16
    reference = Reference(c, 2048, hidden, dtype)
    for tokens in (1, 7, 64, 83, 84, 128, 211, 212, 256, 1024, 1919, 1920, 2048):
        x, residual = reference.parts[c.rank][:tokens], reference.residual[:tokens]
        args = (x, residual, reference.weight, EPS, 0.0, "round_then_scale", c.name)
        chosen = dispatch.select(all_reduce_rms_norm, args, "").name
        norm, total = c.op(*args[:-1], policy="")
        want_norm, want_total = c.op(*args[:-1], policy="native")
        bad = {
            "sum": far(total, want_total),
            "norm": far(norm, want_norm),
        }
        c.checks.later("dispatched", f"{tokens} tokens: {chosen}", bad, norm)
    c.checks.flush()
    for row in overview.explain_choices(c.group, hidden, dtype):
        c.checks.write(f"plan: {row}")
    api.close(captured=True)


def leaks(c: Context) -> None:
    """Making and closing a workspace gives its memory back."""
    free = []
    for _ in range(4):
        made, reason = c.make(4096, torch.bfloat16, 2048)
        if made is None:
            return c.checks.skip("leaks", "all", reason)
        nbytes = made.nbytes
        del made
        api.close(captured=True)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        dist.barrier()
        free.append(torch.cuda.mem_get_info()[0])
    lost = free[0] - free[-1]
    detail = f"lost {lost >> 10} KiB over 3 workspaces of {nbytes >> 20} MiB"
    c.checks.now("leaks", "memory comes back", lost < nbytes // 4, detail)
    return None


def inductor(c: Context) -> None:
    """Inside a compiled graph, with Inductor's own CUDA graphs and a dynamic number of tokens."""
    hidden, dtype = 4096, torch.bfloat16
    reference = Reference(c, 64, hidden, dtype)

    def layer(x: torch.Tensor, residual: torch.Tensor) -> tuple:
        norm, total = c.op(x * 1.0, residual, reference.weight, EPS, policy="flashinfer")
        return norm * 2.0, total

    for label, options in (("triton.cudagraphs", {"triton.cudagraphs": True}), ("dynamic", None)):
        torch._dynamo.reset()
        compiled = torch.compile(layer, options=options, dynamic=None if options else True)
        for tokens in (8, 8, 8, 64, 64, 64):
            norm, total = compiled(reference.parts[c.rank][:tokens].clone(), reference.residual[:tokens].clone())
            bad = reference.check("residual", norm / 2.0, total, tokens)
            c.checks.later("inductor", f"{label} {tokens} tokens", bad)
            c.checks.flush()
    api.close(captured=True)


def speed(c: Context) -> None:
    """Microseconds per call by CUDA-graph replay, the slowest rank: what custom_ops/plans.py is made of."""
    hidden, dtype, calls = 8192, torch.bfloat16, 20
    made, reason = c.make(hidden, dtype, 2048)
    if made is None:
        return c.checks.skip("speed", "all", reason)
    weight = torch.randn(hidden, device=c.device).to(dtype)

    def add_and_norm(x: torch.Tensor, residual: torch.Tensor) -> tuple:
        total = x + residual
        return normalize(total, NormSpec(weight, EPS, 0.0, "scale_then_round")), total

    add_norm = torch.compile(add_and_norm, dynamic=True)
    rows = {}
    for tokens in (1, 4, 16, 32, 64, 128, 256, 512, 1024, 2048):
        x, residual = (torch.randn(tokens, hidden, device=c.device).to(dtype) for _ in range(2))

        def baseline(x=x, residual=residual) -> None:
            dist.all_reduce(x)
            add_norm(x, residual)

        ways = {"nccl + inductor": baseline, "nccl": lambda x=x: dist.all_reduce(x)}
        for path in (ONE_SHOT, TWO_SHOT):
            if tokens in provider.token_limit(path, hidden, dtype, c.ranks, made.max_tokens):
                ways[path] = lambda x=x, r=residual, p=path: made.run(p == ONE_SHOT, x, r, weight, EPS, 0.0)
        rows[tokens] = {name: timed(way, calls) for name, way in ways.items()}
    names = ["nccl + inductor", "nccl", ONE_SHOT, TWO_SHOT]
    if c.rank == 0:
        print(f"\nmicroseconds per call, hidden size {hidden}, {c.ranks} x {torch.cuda.get_device_name()}")
        for tokens, row in rows.items():
            print(f"{tokens:6}" + "".join(f"  {name} {row.get(name, float('nan')):8.1f}" for name in names))
        (c.args.out / "speed.json").write_text(json.dumps(rows, indent=1))
    c.checks.now("speed", "measured", True)
    api.close(captured=True)
    return None


def timed(way, calls: int) -> float:
    """Microseconds per call on the slowest rank."""
    for _ in range(3):
        way()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            way()
    best = float("inf")
    for _ in range(5):
        dist.barrier()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(end) / calls * 1e3)
    slowest = torch.tensor([best], device="cuda")
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest)


PHASES = {  # name: (function, limit in seconds)
    "matrix": (matrix, 120),
    "specials": (specials, 30),
    "limits": (limits, 40),
    "graphs": (graphs, 40),
    "streams": (streams, 20),
    "subgroups": (subgroups, 30),
    "dispatched": (dispatched, 30),
    "leaks": (leaks, 30),
    "inductor": (inductor, 120),
    "speed": (speed, 90),
}


# --- Running them -------------------------------------------------------------------------------------------


def run_phases(c: Context) -> None:
    for name in c.args.phase or PHASES:
        phase, limit_s = PHASES[name]
        faulthandler.dump_traceback_later(limit_s * c.args.patience, exit=True, file=c.checks.log)
        start = time.monotonic()
        try:
            phase(c)
        except Exception as error:  # the rest is worth running; a rank out of step ends by its limit
            c.checks._pending.clear()
            c.checks.now(name, "ran to its end", False, f"{type(error).__name__}: {error}")
            c.checks.log.write(traceback.format_exc())
            api.close(captured=True)
        torch.cuda.synchronize()
        faulthandler.cancel_dump_traceback_later()
        c.checks.write(f"phase {name}: {time.monotonic() - start:.1f} s")
        if c.rank == 0:
            print(
                f"{name}: {dict(c.checks.counts.get(name, {}))} in {time.monotonic() - start:.1f} s",
                flush=True,
            )


def table(checks: Checks) -> str:
    lines = [f"{'phase':12}{'run':>8}{'passed':>8}{'failed':>8}{'skipped':>8}"]
    for phase, found in checks.counts.items():
        ran = found["passed"] + found["failed"]
        lines.append(f"{phase:12}{ran:8}{found['passed']:8}{found['failed']:8}{found['skipped']:8}")
    lines += [f"skipped {count:5}  {reason}" for reason, count in checks.skips.items()]
    lines += [f"FAILED {text}" for text in checks.failures[:40]]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("flashinfer_check"), help="directory for logs")
    parser.add_argument("--phase", action="append", choices=PHASES, help="run only these phases")
    parser.add_argument("--patience", type=float, default=1.0, help="multiplies every phase's time limit")
    parser.add_argument("--device-shift", type=int, default=1, help="device = (local rank + shift) %% GPUs")
    args = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.device_count() < 2:
        print("skipped: needs at least two CUDA GPUs")
        return 0
    local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    device = torch.device("cuda", (local + args.device_shift) % count)
    torch.cuda.set_device(device)
    args.out.mkdir(parents=True, exist_ok=True)
    dist.init_process_group("nccl", device_id=device, timeout=timedelta(seconds=120))
    os.environ.setdefault(timeouts.TIMEOUT_VARIABLE, "60")
    checks = Checks(device, args.out / f"rank{dist.get_rank()}.log")
    run_phases(Context(checks, args))
    failed = torch.tensor([len(checks.failures)], device=device)
    dist.all_reduce(failed)
    if dist.get_rank() == 0:
        text = table(checks) + f"\nfailures over all ranks: {int(failed)}"
        print(text, flush=True)
        (args.out / "table.txt").write_text(text + "\n")
    api.close(captured=True)
    dist.destroy_process_group()
    return 1 if int(failed) else 0


if __name__ == "__main__":
    sys.exit(main())
