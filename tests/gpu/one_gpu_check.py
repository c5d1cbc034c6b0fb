"""The `symm_mem` kernels on one GPU: all ranks in this process, each on a stream and a share of the multiprocessors.

    python tests/gpu/one_gpu_check.py              # needs one GPU, no torchrun; a few minutes
    python tests/gpu/one_gpu_check.py --calls 50   # more payloads a case
    python tests/gpu/one_gpu_check.py --only fp8   # all quantisations, and nothing else
    python tests/gpu/one_gpu_check.py --only invariant  # all batch-invariant cases, nothing else

Memory that the peers map is here a plain tensor for each rank, and the links are this GPU's own
memory. So this checks protocols, launches and results on real hardware; times and the memory order
between GPUs it does not (tests/gpu/symm_mem_check.py does). Sums are compared bit for bit with the
sum in rank order, norms with float64 and, in 16 bits, with the form in PyTorch, number by number.
FP8 results are compared bit for bit with native's quantisation of the norm of the same kernel
without FP8. Batch-invariant results are compared bit for bit with a sum in rank order and
triton_batch_invariant, and one row with itself among other rows, in every kernel; the kernels that
are not batch-invariant must fail that. Kernels give up after 5 s. Exits with 1 if a case failed.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import os
import subprocess
import sys
import time
from types import SimpleNamespace
from unittest import mock

# A queue for each rank's stream: two streams in one queue would wait for each other.
os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "32"

import torch

from fusewire.custom_ops.ops.norms import (
    FORMS,
    SCALE_THEN_ROUND,
    TRITON_NORM,
    NormSpec,
    add_normalize,
    fused_add_rms_norm,
    normalize,
    rms_norm,
    rounds_first,
)
from fusewire.custom_ops.ops.quantization import quantize
from fusewire.custom_ops.providers.symm_mem import launcher
from fusewire.custom_ops.providers.symm_mem import workspace as spaces
from fusewire.custom_ops.providers.symm_mem.arguments import Quantization
from fusewire.custom_ops.providers.symm_mem.layout import owned_rows
from fusewire.custom_ops.providers.symm_mem.prepared_launch import PreparedCall

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DEVICE = torch.device("cuda", 0)
EPS, INNER_EPS, TIMEOUT_S = 1e-5, 1e-3, 5.0
ONE_SHOT_TOKENS, DATA_TOKENS, MAX_TOKENS = 64, 256, 2304
ULPS = {BF16: 3 * 2.0**-8, FP16: 3 * 2.0**-11, FP32: 2.0**-18}


class LocalWorkspace(spaces.SymmMemWorkspace):
    """A rank's workspace whose peers are tensors of this process."""

    def __init__(self, buffers, rank, multiprocessors, **sizes):
        self._buffers, group = buffers, SimpleNamespace(size=lambda: len(buffers), rank=lambda: rank)
        with mock.patch.object(spaces, "resolve_group", return_value=group):
            super().__init__("one GPU", **sizes, device=DEVICE, multiprocessors=multiprocessors, barrier=lambda: None)

    def _allocate(self):
        nbytes = self.layout.nbytes
        for rank, buffer in enumerate(self._buffers):
            if buffer is None:
                made = torch.zeros(nbytes, dtype=torch.uint8, device=DEVICE)
                for name in self.layout.ones:
                    at = self.layout.offsets[name]
                    made[at : at + self.layout.sizes[name]].fill_(255)
                self._buffers[rank] = made
        self._buffer = self._buffers[self.rank]
        return [buffer.data_ptr() for buffer in self._buffers]


def make_ranks(world, hidden, dtype):
    """One workspace and one stream for each rank."""
    buffers = [None] * world
    share = torch.cuda.get_device_properties(DEVICE).multi_processor_count // world
    sizes = {"max_tokens": MAX_TOKENS, "one_shot_tokens": ONE_SHOT_TOKENS, "data_tokens": DATA_TOKENS, "outputs": 2}
    sizes |= {"hidden": hidden, "dtype": dtype, "timeout_s": TIMEOUT_S}
    spaces_of_ranks = [LocalWorkspace(buffers, rank, share, **sizes) for rank in range(world)]
    return list(zip(spaces_of_ranks, streams(), strict=False))


@functools.cache
def streams():
    """Return a stream for each rank, the same ones for all sizes: more would share queues."""
    return [torch.cuda.Stream(DEVICE) for _ in range(8)]


def fill_allocator(stream):
    """Leave memory in torch's cache for a stream: cudaMalloc would wait for a kernel, which waits for the next launch."""
    with torch.cuda.stream(stream):
        small = [torch.empty(1 << 19, dtype=torch.uint8, device=DEVICE) for _ in range(32)]
        large = [torch.empty(80 << 20, dtype=torch.uint8, device=DEVICE) for _ in range(4)]
    del small, large


class Case:
    """Calls of one kind: how to make them on every rank, and what they must give."""

    def __init__(self, ranks, kind, tokens, dtype, residual, weight, bias, form, inner, output):
        self.ranks, self.kind, self.tokens, self.dtype = ranks, kind, tokens, dtype
        self.hidden, self.world = ranks[0][0].hidden, len(ranks)
        self.has_residual, self.bias, self.form, self.output = residual or inner, bias, form, output
        self.weight = None if weight is None else torch.randn(self.hidden, device=DEVICE).to(weight)
        self.inner = None
        if inner:
            self.inner = NormSpec(torch.randn(self.hidden, device=DEVICE).to(dtype), INNER_EPS, 1.0 - bias, form)
        make = getattr(launcher, f"{kind}_launch")
        self.calls = [PreparedCall(ws, make, output) for ws, _ in ranks]
        self.quantization = ()

    def draw(self, seed):
        g = torch.Generator(DEVICE).manual_seed(seed)
        xs = [torch.randn(self.tokens, self.hidden, generator=g, device=DEVICE).to(self.dtype) for _ in self.ranks]
        full = torch.randn(self.tokens, self.hidden, generator=g, device=DEVICE).to(self.dtype)
        return xs, full if self.has_residual else None

    def own(self, rank, full):
        """The rows of the residual that a rank of the sharded kernel is given."""
        if full is None or self.kind != "two_shot_sharded":
            return full
        shard = -(-self.tokens // self.world)
        return full[rank * shard : rank * shard + owned_rows(self.tokens, self.world, rank)].clone()

    def run(self, xs, full):
        """One call on every rank, each on its stream; waits for none of them."""
        return self.run_each(self.calls, xs, full, *self.quantization)

    def run_each(self, calls, xs, full, *quantization):
        current, results = torch.cuda.current_stream(), []
        norm = NormSpec(self.weight, EPS, self.bias, self.form)
        residuals = [self.own(rank, full) for rank in range(self.world)]
        for (_, stream), call, x, residual in zip(self.ranks, calls, xs, residuals, strict=True):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                results.append(call(x, residual, norm, self.inner, *quantization))
        for _, stream in self.ranks:
            current.wait_stream(stream)
        return results

    def compile(self):
        with launcher.compiling_only():
            self.run(*self.draw(0))

    def problems(self, xs, full, results):
        total = xs[0].float()
        for x in xs[1:]:
            total = total + x.float()
        total = total.to(self.dtype)
        if self.inner:
            total = normalize(total, self.inner).to(self.dtype)
        expected, summed = add_normalize(total, full, NormSpec(self.weight, EPS, self.bias, self.form))
        shard = -(-self.tokens // self.world)
        for rank, (_, got) in enumerate(results):
            wanted = summed
            if self.kind == "two_shot_sharded":
                rows = owned_rows(self.tokens, self.world, rank)
                wanted, got = summed[rank * shard : rank * shard + rows], got[:rows]
            slack = 4 * ULPS[self.dtype] if self.inner else 0.0  # the inner norm is rounded in another order
            off = (got.double() - wanted.double()).abs()
            if not bool((off <= slack * (wanted.double().abs() + 1)).all()):
                yield f"rank {rank}: the residual is off by {float(off.max()):.3g}"
        norms = [norm for norm, _ in results]
        for rank, norm in enumerate(norms[1:], 1):
            if not torch.equal(norm.view(torch.uint8), norms[0].view(torch.uint8)):
                yield f"ranks 0 and {rank} have different norms"
        if self.kind == "two_shot_sharded":
            rows = [got[: owned_rows(self.tokens, self.world, rank)] for rank, (_, got) in enumerate(results)]
            summed = torch.cat(rows)
        else:
            summed = results[0][1]
        weight = None if self.weight is None else self.weight.double()
        exact = normalize(summed.double(), NormSpec(weight, EPS, self.bias, SCALE_THEN_ROUND))
        off = (norms[0].double() - exact).abs()
        limit = (2 if rounds_first(self.form) else 1) * ULPS[self.dtype]
        if not bool((off <= limit * (exact.abs() + 1e-2)).all()):
            yield f"the norm is off by {float(off.max()):.3g}"
        # Another order of the squares turns few roundings to 16 bits; another form turns a tenth of
        # them at least.
        turned = float((norms[0] != expected).float().mean()) if self.dtype != FP32 else 0.0
        if turned > 0.02:
            yield f"{turned:.1%} of the norm's numbers are not those of {self.form}"


class QuantCase(Case):
    """Calls with FP8 results, held against native's quantisation of the same calls without."""

    def __init__(self, *args, quant, with_norm):
        super().__init__(*args)
        text, scale = quant
        self.label = f"{text}{'' if scale is None else f', {scale:g}'}{', with the norm' if with_norm else ''}"
        self.quantization = (
            Quantization(text, None if scale is None else torch.tensor([scale], device=DEVICE), with_norm),
        )
        protocol = {} if self.kind == "one_shot" else {"protocol": "flags"}
        plain = getattr(launcher, self.kind)
        self.plain = [lambda *args, ws=ws: plain(ws, *args[:-1], inner=args[-1], **protocol) for ws, _ in self.ranks]

    def draw(self, seed):
        xs, full = super().draw(seed)
        if seed % 4 == 1 and self.tokens > 4:  # rows of zeros, with a NaN, and with infinity
            for x in xs:
                x[0] = x[4] = 0
            xs[0][1, 7], xs[-1][2, -1] = float("nan"), float("inf")
            if full is not None:
                full[0] = 0
        return xs, full

    def compile(self):
        super().compile()
        with launcher.compiling_only():
            self.run_each(self.plain, *self.draw(0))

    def problems(self, xs, full, results):
        plain = self.run_each(self.plain, xs, full)
        torch.cuda.synchronize()
        if not plain[0][0].isnan().any():
            rows = [(before[0], got[1]) for before, got in zip(plain, results, strict=True)]
            yield from super().problems(xs, full, rows)
        (quantization,) = self.quantization
        quantized, scales = quantize(plain[0][0], quantization.scale, quantization.quant)
        for rank, (norm, _, got, got_scales) in enumerate(results):
            if norm is not None and not same(norm, plain[0][0]):
                yield f"rank {rank}: the norm is not that of the kernel without FP8"
            if not same(got, quantized):
                differ = got.view(torch.uint8) != quantized.view(torch.uint8)
                row, column = divmod(int(differ.flatten().int().argmax()), self.hidden)
                yield f"rank {rank}: {int(differ.sum())} FP8 numbers differ, the first in row {row}, column {column}"
            laid_out = got_scales is None or min(scales.shape) == 1 or got_scales.stride() == scales.stride()
            if got_scales is not None and not (same(got_scales, scales) and laid_out):
                yield f"rank {rank}: {int((got_scales != scales).sum())} scales differ"


NEEDLES = {}  # the norm of the one row that is in all batch-invariant cases


class InvariantCase(Case):
    """Batch-invariant calls with numbers of many magnitudes, and one row that is in all of them."""

    def __init__(self, ranks, kind, tokens, dtype, form, inner, output, batch_invariant=True):
        super().__init__(ranks, kind, tokens, dtype, True, dtype, 0.0, form, inner, output)
        self.weight = self.spread(1, 1)[0]
        self.inner = self.inner and NormSpec(self.spread(1, 2)[0], INNER_EPS, 1.0, form)
        make = functools.partial(getattr(launcher, f"{kind}_launch"), batch_invariant=batch_invariant)
        self.calls = [PreparedCall(ws, make, output) for ws, _ in ranks]

    def spread(self, rows, seed):
        g = torch.Generator(DEVICE).manual_seed(seed)
        values = torch.randn(rows, self.hidden, generator=g, device=DEVICE)
        powers = torch.randint(-6, 7, (rows, self.hidden), generator=g, device=DEVICE)
        return torch.ldexp(values.clamp(-4, 4), powers).to(self.dtype)

    def draw(self, seed):
        found = [self.spread(self.tokens, 100 * seed + rank) for rank in range(self.world + 1)]
        self.needle = seed * 37 % self.tokens
        for number, rows in enumerate(found):
            rows[self.needle] = self.spread(1, 10**6 + number)[0]
        return found[:-1], found[-1]

    def problems(self, xs, full, results):
        total = functools.reduce(torch.add, [x.float() for x in xs]).to(self.dtype)
        if self.inner:
            total = rms_norm.providers[TRITON_NORM].fn(total, *self.inner)
        both = fused_add_rms_norm.providers[TRITON_NORM].fn
        expected, summed = both(total, full, self.weight, EPS, self.bias, self.form)
        shard = -(-self.tokens // self.world)
        for rank, (norm, got) in enumerate(results):
            wanted = summed
            if self.kind == "two_shot_sharded":
                rows = owned_rows(self.tokens, self.world, rank)
                wanted, got = summed[rank * shard : rank * shard + rows], got[:rows]
            for name, found, exact in (("norm", norm, expected), ("residual", got, wanted)):
                if not same(found, exact):
                    yield f"rank {rank}: {int((found != exact).sum())} numbers of the {name} are not {TRITON_NORM}'s"
        # The row alone, among others, on either side of a protocol's border, whole and sharded.
        key = (self.world, self.hidden, self.dtype, self.form, bool(self.inner))
        needle = results[0][0][self.needle].clone()
        if not same(NEEDLES.setdefault(key, needle), needle):
            yield f"row {self.needle} of {self.tokens} has other bits than among other rows"


def invariant_cases(ranks, dtype, every):
    """Numbers of tokens around the borders between kernels; in every form, or in one."""
    counts = {
        "one_shot": (1, 2, 17, 34, 64),
        "two_shot": (1, 18, 67, 129, 256, 257, 513, 2049),
        "two_shot_sharded": (2, 133, 256, 257, 640),
    }
    forms = [(form, False) for form in FORMS[: 2 if dtype == FP32 else 4]] + [(SCALE_THEN_ROUND, True)]
    for number, (kind, tokens) in enumerate((kind, tokens) for kind, found in counts.items() for tokens in found):
        output = 1 if tokens in (513, 640) else None
        for form, inner in forms if every else [forms[number % len(forms)]]:
            yield InvariantCase(ranks, kind, tokens, dtype, form, inner, output)


def variant_passes(ranks, dtype):
    """Whether kernels that are not batch-invariant pass: the check would see nothing."""
    tokens = (1, 2, 17, 34, 64)
    cases = [InvariantCase(ranks, "one_shot", n, dtype, SCALE_THEN_ROUND, False, None, False) for n in tokens]
    with mock.patch.dict(NEEDLES, clear=True):
        return not [problem for case in cases for problem in check(case, 3)]


def same(a, b):
    """Whether two tensors have the same bits, but for those of NaN."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.itemsize]
    a, b = a.contiguous(), b.contiguous()
    return bool(((a.view(kind) == b.view(kind)) | (a.float().isnan() & b.float().isnan())).all())


QUANTS = (
    ("token scale_floor=4.359654017857143e-06", None),
    ("group amax_floor=1e-10", None),
    ("tensor apply=reciprocal", 0.0123),
    ("token narrow_scale=True", None),
    ("group amax_by=multiply amax_floor=1e-10 layout=aligned_columns", None),
    ("tensor", 2.0**-5),  # many ties
    ("token amax_by=multiply narrow_scale=True narrow=True", 2.5),
    ("group layout=columns", None),
    ("tensor apply=multiply", 200.0),
    ("tensor apply=reciprocal narrow=True", 0.002),
)  # fmt: skip


PLACES = (  # kind, tokens, output buffer
    ("two_shot_sharded", 639, 1),
    ("one_shot", 33, None),
    ("two_shot", 257, 1),
    ("two_shot_sharded", 5, None),
    ("one_shot", 1, None),
    ("two_shot", 64, None),
)


def quant_cases(ranks, dtype, every):
    """Each kind of call with one quantisation, or with `every` one in two places; half of them with
    the norm.
    """
    if dtype == FP32:
        return  # the provider does not use these kernels in fp32
    size = len(ranks) + ranks[0][0].hidden // 512 + dtype.itemsize
    chosen = range(len(PLACES) * len(QUANTS)) if every else range(3 * size, 3 * size + 3)
    for turn in chosen:
        kind, tokens, output = PLACES[turn % len(PLACES)]
        form, inner, bias = FORMS[turn // 3 % len(FORMS)], tokens == 64, float(turn % 2)
        args = (ranks, kind, tokens, dtype, True, dtype, bias, form, inner, output)
        yield QuantCase(
            *args, quant=QUANTS[(turn // len(PLACES) + turn // 3) % len(QUANTS)], with_norm=turn // 6 % 2 > 0
        )


def cases(ranks, dtype):
    counts = {"one_shot": (1, 3, 33), "two_shot": (1, 7, 64, 255, 257, 640), "two_shot_sharded": (5, 64, 257, 639)}
    forms = FORMS[:2]
    options = [(True, dtype, 0.0), (False, FP32, 1.0), (True, None, 0.0)]
    for kind, tokens in ((kind, tokens) for kind, found in counts.items() for tokens in found):
        for (residual, weight, bias), form in zip(options, itertools.cycle(forms)):
            yield Case(ranks, kind, tokens, dtype, residual, weight, bias, form, False, None)
        yield Case(ranks, kind, tokens, dtype, True, dtype, 0.0, forms[tokens % 2], True, None)
        outputs = (None, 1) if kind != "one_shot" and tokens > DATA_TOKENS else (None,)
        for output in outputs[1:]:
            yield Case(ranks, kind, tokens, dtype, True, dtype, 0.0, forms[tokens % 2], False, output)
        if dtype != FP32:  # where the forms of a wide sum are the others
            for output, form in itertools.product(outputs, FORMS[2:]):
                yield Case(ranks, kind, tokens, dtype, True, dtype, float(rounds_first(form)), form, False, output)
            yield Case(ranks, kind, tokens, dtype, True, dtype, 0.0, FORMS[2 + tokens % 2], True, None)


def check(case, calls):
    """Eager calls with fresh payloads, the first of which prepares the launch; then replays of a CUDA graph."""
    found = []
    for seed in range(calls):
        xs, full = case.draw(seed)
        results = case.run(xs, full)
        torch.cuda.synchronize()
        case.ranks[0][0].check()
        found += [f"call {seed}: {problem}" for problem in case.problems(xs, full, results)]
    if case.kind == "two_shot_sharded" and case.has_residual:
        return found  # the ranks' rows of the residual are copied by `own`, which a capture would hold on to
    xs, full = case.draw(0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results = case.run(xs, full)
    for seed in range(100, 100 + calls):
        fresh, other = case.draw(seed)
        for x, new in zip(xs, fresh, strict=True):
            x.copy_(new)
        if full is not None:
            full.copy_(other)
        graph.replay()
        torch.cuda.synchronize()
        case.ranks[0][0].check()
        found += [f"replay {seed}: {problem}" for problem in case.problems(xs, full, results)]
    return found


def compile_ahead(processes):
    """Compile all kernels into Triton's cache on disk, in several processes."""
    start = time.monotonic()
    command = [sys.executable, *sys.argv, "--share"]
    running = [subprocess.Popen([*command, f"{share}/{processes}"]) for share in range(processes)]
    failed = sum(process.wait() != 0 for process in running)
    print(f"compiled ahead in {time.monotonic() - start:.0f} s; {failed} processes failed", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=6, help="payloads a case, eager and by replay (default 6)")
    parser.add_argument("--worlds", default="2,4,8")
    parser.add_argument("--hidden", default="4096,8192,1536")
    parser.add_argument("--only", choices=("plain", "fp8", "invariant"), help="only these kernels")
    parser.add_argument("--processes", type=int, default=8, help="processes that compile before (default 8)")
    parser.add_argument("--share", help=argparse.SUPPRESS)  # K/N: compile each Nth case from K on, and end
    parser.add_argument("--limit", type=float, default=500.0, help="seconds after which no further case begins")
    options = parser.parse_args()
    share, processes = map(int, (options.share or "0/0").split("/"))
    if not options.share:
        compile_ahead(options.processes)
    torch.cuda.set_device(DEVICE)
    gc.disable()  # what it frees between two ranks' launches could wait for the first one's kernel
    if not options.share:
        for stream in streams():
            fill_allocator(stream)
    cases_seen = itertools.count()
    start, passed, failed, left_out = time.monotonic(), 0, 0, 0
    sizes = itertools.product(
        map(int, options.worlds.split(",")), map(int, options.hidden.split(",")), (BF16, FP16, FP32)
    )
    for world, hidden, dtype in sizes:
        ranks = make_ranks(world, hidden, dtype)
        gc.collect()
        every = options.only == "fp8" and (world, hidden, dtype) == (2, 4096, BF16)
        found = [cases(ranks, dtype)] if options.only in (None, "plain") else []
        found += [quant_cases(ranks, dtype, every)] if options.only in (None, "fp8") else []
        if options.only in (None, "invariant"):
            found.append(invariant_cases(ranks, dtype, options.only == "invariant"))
        for case in itertools.chain(*found):
            if options.share:
                if next(cases_seen) % processes == share:
                    case.compile()
                continue
            if time.monotonic() - start > options.limit:
                left_out += 1
                continue
            label = f"{world} ranks, hidden {hidden}, {dtype}, {case.kind}, {case.tokens} tokens, output {case.output}"
            label += f", FP8 {case.label}" if case.quantization else ""
            label += f", batch-invariant, {case.form}" if isinstance(case, InvariantCase) else ""
            case.compile()
            problems = check(case, options.calls)
            passed, failed = passed + (not problems), failed + bool(problems)
            for problem in problems[:3]:
                print(f"FAILED {label}: {problem}", flush=True)
        if options.share:
            continue
        if options.only == "invariant" and variant_passes(ranks, dtype):
            failed += 1
            print(f"FAILED {world} ranks, hidden {hidden}, {dtype}: a variant passes for batch-invariant", flush=True)
        print(f"{world} ranks, hidden {hidden}, {dtype}: {passed} passed, {failed} failed so far", flush=True)
    print(f"{passed} passed, {failed} failed, {left_out} left out for want of time, {time.monotonic() - start:.0f} s")
    return int(bool(failed or left_out))


if __name__ == "__main__":
    sys.exit(main())
