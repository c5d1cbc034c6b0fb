"""Check the batch-invariant norms on one GPU, and time them.

    python tests/gpu/batch_invariant_check.py --out results

Every case compares one row alone with the same row among 3, 299 and 2047 others, bit for bit, at every
position or on both sides of block boundaries; fused add + norm with add, then norm; the kernel with the
same arithmetic in PyTorch; and the result with float64. Implementations that are wrong on purpose must be
caught by the same check. The exit status is 1 if anything failed, 2 if there is no GPU.
tests/unit/test_batch_invariant.py uses the checker on the CPU.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import rms_norm as torch_rms_norm

from fusewire.custom_ops.ops.norms import (
    ROUND_THEN_SCALE,
    SCALE_THEN_ROUND,
    WIDE_SUM_ROUND_THEN_SCALE,
    WIDE_SUM_SCALE_THEN_ROUND,
    NormSpec,
    add_residual,
    add_wide,
    fused_add_rms_norm,
    keeps_wide_sum,
    normalize,
    rms_norm,
    rounds_first,
)
from fusewire.custom_ops.providers.batch_invariant import torch_norm as torch_batch_invariant
from fusewire.custom_ops.providers.batch_invariant import triton_norm
from fusewire.custom_ops.providers.batch_invariant.triton_norm import rms_norm_batch_invariant

OTHERS = (3, 299, 2047)
HIDDEN = (64, 576, 2048, 2688, 2880, 4096, 5120, 5376, 7168, 8192, 16384)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_BOUNDARIES = (1, 2, 8, 16, 32, 64, 128, 256, 512, 1024)
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_MANTISSA = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23, torch.float64: 52}

# (x, residual or None) -> (norm,) or (norm, residual_out)
Norm = Callable[[Tensor, "Tensor | None"], "tuple[Tensor, ...]"]


class Case(NamedTuple):
    """One instance of the norm; the dtypes of absent tensors are None."""

    hidden: int
    dtype: torch.dtype
    weight: torch.dtype | None = None
    residual: torch.dtype | None = None
    weight_bias: float = 0.0
    form: str = SCALE_THEN_ROUND

    def __str__(self) -> str:
        names = [str(d).removeprefix("torch.") for d in (self.dtype, self.weight, self.residual)]
        return "hidden {} x {} weight {} residual {} bias {:g} {}".format(
            self.hidden, *names, self.weight_bias, self.form
        )


def rows(n: int, hidden: int, dtype: torch.dtype, kind: str, seed: int, device: str = "cpu", reach: int = 12) -> Tensor:
    """Random rows: `normal`, or `spread` over 2 * `reach` binades (fp16 has room for 12 at most)."""
    generator = torch.Generator(device).manual_seed(seed)
    values = torch.randn(n, hidden, generator=generator, device=device)
    if kind == "spread":
        powers = torch.randint(-reach, reach, (n, hidden), generator=generator, device=device)
        values = torch.ldexp(values.clamp(-4, 4), powers)
    return values.to(dtype)


def bits(tensor: Tensor) -> Tensor:
    """The bit patterns as integers, all NaNs as one."""
    tensor = torch.where(tensor.isnan(), torch.full_like(tensor, torch.nan), tensor)
    return tensor.contiguous().view(_INTEGERS[tensor.element_size()])


def same_bits(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> bool:
    """Whether all tensors agree bit for bit (in dtype and shape too)."""
    pairs = list(zip(left, right, strict=True))
    return all(a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b)) for a, b in pairs)


def _pick(tensors: tuple[Tensor, ...], index: Any) -> tuple[Tensor, ...]:
    return tuple(tensor[index] for tensor in tensors)


def _probes(n: int) -> list[int]:
    """Every row of a batch of up to 300; of a larger one the ends and both sides of each boundary."""
    if n <= 300:
        return list(range(n))
    near = itertools.chain.from_iterable((b - 1, b, b + 1) for b in _BOUNDARIES)
    return sorted({0, 1, n // 2, n - 2, n - 1, *(p for p in near if p < n)})


def batch_invariance_faults(
    norm: Norm, make: Callable[[int], tuple[Tensor, Tensor | None]], others: tuple[int, ...] = OTHERS
) -> list[str]:
    """What shows that a row's bits depend on the rows beside it; empty if nothing does.

    Args:
        norm: the implementation.
        make: gives x (n, hidden) and the residual, or None, for a number of rows.
        others: how many other rows there are.
    """
    faults = []
    for n in (count + 1 for count in others):
        x, residual = make(n)
        batch = norm(x, residual)

        def part(index: Any, x: Tensor = x, residual: Tensor | None = residual) -> tuple[Tensor, ...]:
            return norm(x[index], None if residual is None else residual[index])

        probes = _probes(n)
        alone = [part(torch.tensor([at], device=x.device)) for at in probes]
        together = tuple(torch.cat(column) for column in zip(*alone, strict=True))
        index = torch.tensor(probes, device=x.device)
        if not same_bits(together, _pick(batch, index)):
            wrong = [at for at, one in zip(probes, alone, strict=True) if not same_bits(one, _pick(batch, [at]))]
            faults.append(f"row {wrong[0]} of {n} differs from the row alone ({len(wrong)} of {len(probes)} rows)")
        for boundary in (b for b in _BOUNDARIES if b < n):
            for rows in (slice(boundary, None), slice(0, boundary)):
                if not same_bits(part(rows), _pick(batch, rows)):
                    faults.append(f"rows {rows.start}:{rows.stop} of {n} differ from the same among all")
        order = torch.arange(n, device=x.device).roll(n // 3 + 1)
        if not same_bits(part(order), _pick(batch, order)):
            faults.append(f"{n} rows in another order differ")
    return faults


def _finish(wide: Tensor, total: Tensor, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    normed = wide * torch.rsqrt(total / wide.shape[-1] + 1e-6)
    return (normed if weight is None else normed * weight.float()).to(dtype)


def row_count_variant(weight: Tensor | None = None) -> Norm:
    """Wrong on purpose: splits the reduction by the number of rows, as kernels tuned for occupancy do."""

    def norm(x: Tensor, residual: Tensor | None) -> tuple[Tensor, ...]:
        summed = x if residual is None else add_residual(x, residual)
        wide = summed.float()
        splits = 1 if len(x) > 1024 else 4 if len(x) > 64 else 16
        parts = wide.square().reshape(len(x), splits, -1).sum(-1)
        total = parts[:, :1]
        for i in range(1, splits):
            total = total + parts[:, i : i + 1]
        out = _finish(wide, total, weight, x.dtype)
        return (out,) if residual is None else (out, summed)

    return norm


def position_variant(weight: Tensor | None = None) -> Norm:
    """Wrong on purpose: every eighth row is summed in another order, as at the edge of a block."""

    def norm(x: Tensor, residual: Tensor | None) -> tuple[Tensor, ...]:
        summed = x if residual is None else add_residual(x, residual)
        wide = summed.float()
        edge = (torch.arange(len(x), device=x.device) % 8 == 7)[:, None]
        moved = wide.new_zeros(len(x), 1)
        for part in (wide * wide).split(8, -1):  # from left to right
            moved = moved + part.sum(-1, keepdim=True)
        out = _finish(wide, torch.where(edge, moved, torch_batch_invariant.sum_of_squares(wide)), weight, x.dtype)
        return (out,) if residual is None else (out, summed)

    return norm


def ulps(result: Tensor, exact: Tensor) -> float:
    """The largest distance from `exact` (float64) in units in the last place of result's dtype."""
    info = torch.finfo(result.dtype)
    exponent = torch.frexp(exact.abs().clamp_min(info.smallest_normal)).exponent - 1
    unit = torch.ldexp(torch.ones_like(exact), exponent - _MANTISSA[result.dtype])
    return float(((result.double() - exact).abs() / unit).max()) if result.numel() else 0.0


def exact_norm(r: Tensor, weight: Tensor | None, eps: float, weight_bias: float) -> Tensor:
    """RMSNorm of r in float64, rounded nowhere."""
    wide = r.double()
    normed = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()
    return normed if weight is None else normed * (weight.double() + weight_bias)


def allowed_ulps(case: Case) -> float:
    """One unit where one rounding is all that shows; four where value, weight and product are rounded.

    In fp32 every step's rounding shows: the sums', the mean's, the root's, its inverse's and the products'.
    """
    if case.dtype == torch.float32:
        return 6.0
    return 4.0 if rounds_first(case.form) and case.weight is not None else 1.0


class Instance:
    """A case with its weight, makers of its inputs, and the implementations that compute it.

    With `sharp`, its batches repeat one row for which the order of summation matters, and the weight puts
    every element of that row's norm next to a tie of x's dtype: a last bit of fp32 in the row's root mean
    square then shows in a bf16 result, where it would else show in one element of 30,000. That takes an fp32
    weight, a single rounding and no bias.
    """

    def __init__(self, case: Case, device: str, sharp: int | None = None) -> None:
        self.case, self.device = case, device
        self.row: tuple[Tensor, ...] = ()
        weight = rows(1, case.hidden, torch.float32, "normal", 7, device)[0]
        self.weight = None if case.weight is None else weight.to(case.weight)
        if sharp is not None:
            assert case == Case(case.hidden, case.dtype, torch.float32, case.residual), case
            self._sharpen(sharp)

    def _sharpen(self, seed: int) -> None:
        x, residual = self.make("normal", 100 * seed)(32)
        summed = x if residual is None else add_residual(x, residual)
        orders = [torch_batch_invariant.sum_of_squares(summed.float().roll(k, -1)) for k in range(16)]
        best = int(torch.tensor([len(set(row)) for row in torch.cat(orders, 1).tolist()]).argmax())
        self.row = (x[best],) if residual is None else (x[best], residual[best])
        exact = exact_norm(summed[best], None, 1e-6, 0.0)
        below = exact.to(self.case.dtype)
        above = torch.nextafter(below, torch.full_like(below, torch.inf))
        weight = (below.double() + above.double()) / 2 / exact
        self.weight = torch.where(weight.isfinite(), weight, 1.0).float()

    def make(self, kind: str, seed: int = 0) -> Callable[[int], tuple[Tensor, Tensor | None]]:
        """A maker of inputs for `batch_invariance_faults`."""
        case, device = self.case, self.device
        reach = 12 if torch.float16 in (case.dtype, case.residual) else 24

        def made(n: int) -> tuple[Tensor, Tensor | None]:
            x = rows(n, case.hidden, case.dtype, kind, seed + n, device, reach)
            residual = None
            if case.residual is not None:
                residual = rows(n, case.hidden, case.residual, kind, seed + n + 1, device, reach)
            for tensor, row in zip((x, residual), self.row, strict=False):
                assert tensor is not None
                tensor[torch.arange(n, device=device) % 3 != 1] = row
            return x, residual

        return made

    def kernel(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, ...]:
        """By the Triton kernel."""
        c = self.case
        out = rms_norm_batch_invariant(x, self.weight, 1e-6, c.weight_bias, residual, c.form)
        return out if isinstance(out, tuple) else (out,)

    def plain(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, ...]:
        """By the operator's PyTorch provider."""
        rest: tuple[Any, ...] = (1e-6, self.case.weight_bias, self.case.form, torch_batch_invariant.PROVIDER)
        weight = None if self.weight is None else self.weight.to(x.device)
        if residual is None:
            return (rms_norm(x, weight, *rest),)
        out: tuple[Tensor, ...] = fused_add_rms_norm(x, residual, weight, *rest)
        return out


def numerics_faults(instance: Instance, norm: Norm, kind: str, n: int = 64) -> tuple[list[str], float]:
    """What is wrong with the values themselves, and the largest error in units in the last place."""
    case, faults = instance.case, []
    x, residual = instance.make(kind)(n)
    out = norm(x, residual)
    r = x if residual is None else add_residual(x, residual)
    if residual is not None:
        if not same_bits((out[1],), (r,)):
            faults.append("residual_out is not the rounded sum")
        if keeps_wide_sum(case.form, case.dtype):
            r = add_wide(x, residual)
        elif not same_bits(norm(r, None), out[:1]):
            faults.append("add + norm differs from add, then norm")
    if not same_bits(out, instance.plain(x, residual)):
        faults.append("the kernel and PyTorch differ on this device")
    few = (x[:4].cpu(), None if residual is None else residual[:4].cpu())
    if not same_bits(tuple(t[:4].cpu() for t in out), instance.plain(*few)):
        faults.append("the kernel and PyTorch on the CPU differ")
    error = ulps(out[0], exact_norm(r, instance.weight, 1e-6, case.weight_bias))
    if not error <= allowed_ulps(case):
        faults.append(f"{error:.2f} units in the last place from float64, {allowed_ulps(case):g} allowed")
    return faults, error


def all_cases() -> Iterator[Case]:
    """Six to eight kinds of norm for each dtype and hidden size."""
    for hidden, dtype in itertools.product(HIDDEN, DTYPES):
        yield Case(hidden, dtype)
        yield Case(hidden, dtype, dtype)
        yield Case(hidden, dtype, dtype, dtype, 1.0)
        yield Case(hidden, dtype, torch.float32, dtype)
        yield Case(hidden, dtype, dtype, torch.float32, 0.0, ROUND_THEN_SCALE)
        yield Case(hidden, dtype, torch.float32, None, 1.0, ROUND_THEN_SCALE)
        if dtype != torch.float32:
            yield Case(hidden, dtype, dtype, dtype, 0.0, WIDE_SUM_ROUND_THEN_SCALE)
            yield Case(hidden, dtype, dtype, dtype, 1.0, WIDE_SUM_SCALE_THEN_ROUND)


class Log:
    """Prints, and keeps what it printed."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.failures: list[str] = []

    def say(self, text: str) -> None:
        """Print a line and keep it."""
        print(text, flush=True)
        self.lines.append(text)

    def fail(self, where: object, faults: list[str]) -> None:
        """Record faults, if any."""
        for fault in faults:
            self.failures.append(f"{where}: {fault}")
            self.say(f"FAIL {where}: {fault}")


def check_cases(log: Log, device: str) -> None:
    """Invariance and numerics of every case."""
    worst: dict[tuple[torch.dtype, str], float] = {}
    started, count = time.monotonic(), 0
    for case in all_cases():
        instance = Instance(case, device)
        for kind in ("normal", "spread"):
            log.fail(case, batch_invariance_faults(instance.kernel, instance.make(kind)))
            faults, error = numerics_faults(instance, instance.kernel, kind)
            log.fail(f"{case} {kind}", faults)
            key = (case.dtype, case.form if case.weight else "no weight")
            worst[key] = max(worst.get(key, 0.0), error)
            count += 1
    for hidden, dtype in itertools.product(HIDDEN, DTYPES):
        for case in (Case(hidden, dtype, torch.float32), Case(hidden, dtype, torch.float32, dtype)):
            for seed in range(3):
                instance = Instance(case, device, seed)
                log.fail(f"{case} sharp", batch_invariance_faults(instance.kernel, instance.make("normal")))
                count += 1
    log.say(f"invariance and numerics: {count} cases in {time.monotonic() - started:.0f} s")
    for (dtype, form), error in sorted(worst.items(), key=str):
        log.say(f"  largest error against float64, {dtype}, {form}: {error:.3f} ulp")


def caught(
    instances: Iterable[Instance], variant: Callable[[Tensor | None], Norm], others: tuple[int, ...] = OTHERS
) -> list[str]:
    """What the checker finds against a variant, on the first of these instances whose batches show it."""
    for instance in instances:
        faults = batch_invariance_faults(variant(instance.weight), instance.make("normal"), others)
        if faults:
            return faults
    return []


def check_variants(log: Log, device: str) -> None:
    """Wrong implementations must be caught on this very device."""
    for dtype, hidden in itertools.product(DTYPES, (2048, 4096, 8192)):
        case = Case(hidden, dtype, torch.float32, dtype)
        instances = [Instance(case, device, seed) for seed in range(5)]
        for name, variant in (("row count", row_count_variant), ("position", position_variant)):
            found = caught(instances, variant)
            if not found:
                log.fail(case, [f"the {name} variant was not caught"])
            log.say(f"variant by {name}, {case}: {found[0] if found else 'NOT CAUGHT'}")


def special_rows(hidden: int, dtype: torch.dtype, device: str) -> Tensor:
    """Rows with NaN, infinities, signed zeros, subnormals, the largest numbers, and only zeros."""
    info = torch.finfo(dtype)
    x = rows(8, hidden, dtype, "normal", 3, device)
    x[0, 1], x[1, hidden - 1], x[2, 0] = torch.nan, torch.inf, -torch.inf
    x[3] = 0.0
    x[4] = -0.0
    x[5] = rows(1, hidden, dtype, "normal", 4, device)[0] * info.smallest_normal / 4
    x[6, ::3], x[6, 1::3] = info.max, -info.max
    x[7] = info.tiny
    return x


def check_edges(log: Log, device: str) -> None:
    """Special values, strides, alignment, shapes, chunked rows, CUDA graphs."""
    faults: list[str] = []
    for hidden, dtype in itertools.product((64, 65, 1000, 4096, 4097, 16385, 40000), DTYPES):
        for case in (Case(hidden, dtype, dtype), Case(hidden, dtype, torch.float32, dtype, 1.0)):
            instance = Instance(case, device)
            log.fail(case, batch_invariance_faults(instance.kernel, instance.make("normal"), (3, 40)))
            x = special_rows(hidden, dtype, device)
            residual = None if case.residual is None else -x.roll(1, 0)
            same = same_bits(instance.kernel(x, residual), instance.plain(x, residual))
            log.fail(case, [] if same else ["special values differ"])
    for dtype in DTYPES:
        instance = Instance(Case(2880, dtype, dtype, torch.float32), device)
        x, residual = instance.make("normal")(60)
        assert residual is not None
        want = instance.kernel(x, residual)
        wide, buffer = (
            torch.zeros(60, 3001, device=device, dtype=dtype),
            torch.zeros(60 * 2880 + 1, device=device),
        )
        wide[:, :2880] = x
        shifted = buffer[1:].view(60, 2880)
        shifted.copy_(residual)
        for name, got in (
            ("strided rows", instance.kernel(wide[:, :2880], shifted)),
            ("transposed", instance.kernel(x.t().contiguous().t(), residual.t().contiguous().t())),
            ("4-D", instance.kernel(x.view(3, 4, 5, 2880), residual.view(3, 4, 5, 2880))),
        ):
            if not same_bits(tuple(t.reshape(60, 2880) for t in got), want):
                faults.append(f"{name} {dtype} differ")
        empty = instance.kernel(x[:0], residual[:0])
        if [t.shape for t in empty] != [(0, 2880)] * 2:
            faults.append("no rows: wrong shapes")
    log.fail("edges", faults)
    check_graphs(log, device)


def check_graphs(log: Log, device: str) -> None:
    """Replays of a captured call follow their inputs; whether a first call may be captured is reported."""
    instance = Instance(Case(5120, torch.bfloat16, torch.bfloat16, torch.bfloat16), device)
    x, residual = instance.make("normal")(17)
    assert residual is not None
    instance.kernel(x, residual)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = instance.kernel(x, residual)
    for seed in range(3):
        x.copy_(rows(17, 5120, torch.bfloat16, "spread", seed, device))
        for tensor in out:
            tensor.fill_(torch.nan)
        graph.replay()
        if not same_bits(out, instance.kernel(x, residual)):
            log.fail("CUDA graph", [f"replay {seed} differs from an eager call"])
    cold = Instance(Case(5104, torch.bfloat16, torch.bfloat16), device)
    x = rows(17, 5104, torch.bfloat16, "normal", 0, device)
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            cold.kernel(x, None)
        log.say("CUDA graphs: replays are right; a first call inside a capture works here")
    except Exception as error:
        log.say(f"CUDA graphs: replays are right; a first call inside a capture fails here: {error}")


def microseconds(call: Callable[[int], Any], sets: int, replays: int = 20) -> float:
    """The median time of one call by replaying a CUDA graph of `sets` calls on inputs of their own."""
    for i in range(3):
        call(i % sets)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(sets):
            call(i)
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / sets)
    return statistics.median(times)


def timings(log: Log, device: str) -> None:
    """Microseconds a call beside torch.compile's norm and torch's own, bf16; many tokens are not in cache."""
    log.say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16; us a call, CUDA-graph replay")
    log.say(
        f"{'hidden':>7} {'tokens':>7} | {'norm':>8} {'compiled':>9} {'F.rms_norm':>10} | "
        f"{'add+norm':>9} {'compiled':>9} {'GB/s':>6} | {'compiled/ours':>13}"
    )
    for hidden, tokens in itertools.product((2880, 4096, 8192), (1, 16, 64, 512, 2048, 8192)):
        sets = max(2, min(32, 2**29 // (tokens * hidden * 8)))
        xs = [rows(tokens, hidden, torch.bfloat16, "normal", i, device) for i in range(sets)]
        residuals = [rows(tokens, hidden, torch.bfloat16, "normal", -1 - i, device) for i in range(sets)]
        w = rows(1, hidden, torch.bfloat16, "normal", 5, device)[0]
        torch._dynamo.reset()
        norm = torch.compile(lambda x, w=w: normalize(x, NormSpec(w, 1e-6, 0.0, SCALE_THEN_ROUND)), dynamic=False)

        def added(x: Tensor, residual: Tensor, w: Tensor = w) -> tuple[Tensor, Tensor]:
            summed = add_residual(x, residual)
            return normalize(summed, NormSpec(w, 1e-6, 0.0, SCALE_THEN_ROUND)), summed

        add_norm = torch.compile(added, dynamic=False)
        calls: list[Callable[[int], Any]] = [
            lambda i, w=w, xs=xs: rms_norm_batch_invariant(xs[i], w),
            lambda i, norm=norm, xs=xs: norm(xs[i]),
            lambda i, w=w, xs=xs: torch_rms_norm(xs[i], (len(w),), w, 1e-6),
            lambda i, w=w, xs=xs, rs=residuals: rms_norm_batch_invariant(xs[i], w, residual=rs[i]),
            lambda i, add_norm=add_norm, xs=xs, rs=residuals: add_norm(xs[i], rs[i]),
        ]
        t = [microseconds(call, sets) for call in calls]
        rate = 4 * tokens * hidden * 2 / t[3] / 1e3
        log.say(
            f"{hidden:7} {tokens:7} | {t[0]:8.2f} {t[1]:9.2f} {t[2]:10.2f} | "
            f"{t[3]:9.2f} {t[4]:9.2f} {rate:6.0f} | {t[1] / t[0]:6.2f} {t[4] / t[3]:6.2f}"
        )


def host_time(log: Log, device: str) -> None:
    """Microseconds of host time a call, the queue never full."""
    x = rows(1, 4096, torch.bfloat16, "normal", 0, device)
    w = x[0].clone()
    policy = triton_norm.PROVIDER
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("rms_norm_batch_invariant", lambda: rms_norm_batch_invariant(x, w, residual=x)),
        ("the operator", lambda: fused_add_rms_norm(x, x, w, 1e-6, 0.0, SCALE_THEN_ROUND, policy)),
        ("F.rms_norm alone", lambda: torch_rms_norm(x, (4096,), w, 1e-6)),
    ]
    for name, call in calls:
        samples = []
        for _ in range(20):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(100):
                call()
            samples.append((time.perf_counter() - start) * 1e4)
        log.say(f"host time a call, {name}: {statistics.median(samples):.1f} us")


def sweep_warps(log: Log, device: str) -> None:
    """The kernel with other numbers of warps: the bits must not change, the time may."""
    plan = triton_norm._plan
    for hidden, tokens in itertools.product((64, 2880, 4096, 8192, 16384), (1, 64, 4096)):
        x = rows(tokens, hidden, torch.bfloat16, "normal", 0, device)
        residual, w = x.flip(0).contiguous(), x[0].clone()

        def call(_: int = 0, x: Tensor = x, residual: Tensor = residual, w: Tensor = w) -> tuple[Tensor, ...]:
            out = rms_norm_batch_invariant(x, w, residual=residual)
            assert isinstance(out, tuple)
            return out

        want, parts = call(), []
        for warps in (1, 2, 4, 8, 16):
            triton_norm._plan = lambda hidden, warps=warps: plan(hidden)._replace(warps=warps)
            try:
                if not same_bits(call(), want):
                    log.fail(f"{warps} warps, hidden {hidden}", ["other bits"])
                us = microseconds(call, 20)
            finally:
                triton_norm._plan = plan
            parts.append(f"{warps}: {us:.2f}{'*' if warps == plan(hidden).warps else ''}")
        log.say(f"us by warps (* chosen), hidden {hidden}, {tokens} tokens: {', '.join(parts)}")


def main() -> int:
    """Run the checks; 0 if all passed, 1 if not, 2 if there is no GPU to run them on."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="directory for the log")
    parser.add_argument("--no-timing", action="store_true", help="checks only")
    parser.add_argument("--sweep-warps", action="store_true", help="also try other numbers of warps")
    arguments = parser.parse_args()
    support = triton_norm.availability()
    if not support or not torch.cuda.is_available():
        print(f"skipped: {support.reason or 'torch sees no CUDA GPU'}")
        return 2
    log, device = Log(), "cuda"
    for check in (check_variants, check_edges, check_cases):
        check(log, device)
    if arguments.sweep_warps:
        sweep_warps(log, device)
    if not arguments.no_timing:
        host_time(log, device)
        timings(log, device)
    log.say(f"{len(log.failures)} failures" if log.failures else "all passed")
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "batch_invariant.log").write_text("\n".join(log.lines) + "\n")
    return 1 if log.failures else 0


if __name__ == "__main__":
    sys.exit(main())
