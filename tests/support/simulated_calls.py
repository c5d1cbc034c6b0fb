"""Calls of the `symm_mem` kernels on simulated ranks: inputs, references and checks of the results."""

from __future__ import annotations

import os
import re
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

from fusewire.custom_ops.coordination.timeouts import Limit
from fusewire.custom_ops.ops.norms import NormSpec, add_normalize
from fusewire.custom_ops.ops.quantization import GROUP_SIZE, quantize
from fusewire.custom_ops.ops.sharded_norm import rows_per_rank
from fusewire.custom_ops.providers.batch_invariant.torch_norm import normalize_batch_invariant
from fusewire.custom_ops.providers.symm_mem import launcher as symm_mem
from fusewire.custom_ops.providers.symm_mem.arguments import Quantization
from fusewire.custom_ops.providers.symm_mem.layout import CTL_LIMIT_NS, Failure
from fusewire.errors import PeerTimeoutError, RankMismatchError

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SCALE, ROUND = "scale_then_round", "round_then_scale"
WIDE_SCALE, WIDE_ROUND = "wide_sum_scale_then_round", "wide_sum_round_then_scale"
EPS, INNER_EPS = 1e-5, 1e-3
ONE_SHOT_TOKENS, DATA_TOKENS, MAX_TOKENS = 9, 16, 24
LIMIT_S = 1.0  # of simulated time


def launch_of(ws, call, mine):
    """A rank's launch of a call."""
    outs = {"norm_out": mine.norm_out, "residual_out": mine.residual_out}
    if call.options.get("output") is not None:
        outs["norm_out" if call.kind == "two_shot_sharded" else "residual_out"] = None
    make = getattr(symm_mem, f"{call.kind}_launch")
    return make(ws, mine.x, mine.residual, NormSpec(call.weight, EPS, call.bias, call.form), **outs, **call.options)


def note_results(mine, launch):
    """Keep the results that the launch made, full of what no call leaves there."""
    mine.quantized, mine.scales = launch.tensors.quantized_out, launch.tensors.scales_out
    if mine.quantized is not None and launch.outputs[2] is None:  # else an output buffer
        mine.quantized.view(torch.uint8).fill_(0x55)
    if mine.scales is not None:
        mine.scales.fill_(77.0)


def make_call(
    kind, tokens, world, hidden, dtype, residual=True, weight=BF16, bias=0.0, form=SCALE, inner=None, quant=None,
    with_norm=False, scale=None, special=False, **options,
):  # fmt: skip
    """Inputs of all ranks and places for their results. Holds -0.0, NaN, the sentinel, and sums
    that depend on their order. `quant`: the text of a QuantSpec. `special`: the last rows are
    zeros, hold numbers far apart, and hold infinity.
    """
    parts = [torch.randn(tokens, hidden).to(dtype) for _ in range(world)]
    if world > 2:  # from rank 2 on, what comes in before ranks 0 and 1 cancel is rounded away
        big = torch.randn(tokens, hidden // 2) * {BF16: 3e6, FP16: 8e3, FP32: 3e3}[dtype]
        parts[0][:, ::2], parts[1][:, ::2] = big.to(dtype), -big.to(dtype)
    if tokens > 1:
        for part in (parts[0], parts[-1]):  # the owner of row 0 keeps its own part and gets another's
            part.view(torch.int16 if dtype.itemsize == 2 else torch.int32)[0, 2:4] = -1
    for part in parts:
        part[-1, 5] = -0.0
    full = torch.randn(tokens, hidden).to(dtype) if residual else None
    if full is not None:
        full[-1, 5] = -0.0
    if special:
        for rows in (*parts, full):
            rows[-1] = 0
            rows[-2] *= torch.logspace(-12, 3, hidden).to(dtype)
            rows[-3, 1::50] = float("inf")
    if inner is not None:
        inner_weight, inner_form = inner
        inner_weight = None if inner_weight is None else torch.randn(hidden).to(inner_weight)
        options["inner"] = NormSpec(inner_weight, INNER_EPS, 1.0 - bias, inner_form)
    if quant is not None:
        scale = None if scale is None else torch.tensor([scale])
        options["quantization"] = Quantization(quant, scale, with_norm)
    shard, ranks = rows_per_rank(tokens, world), []
    for rank, part in enumerate(parts):
        sharded = kind == "two_shot_sharded"
        rows = slice(rank * shard, (rank + 1) * shard) if sharded else slice(None)
        mine = SimpleNamespace(x=part, rows=rows, residual=None if full is None else full[rows].clone())
        mine.norm_out = torch.full((tokens, hidden), 77.0, dtype=dtype) if with_norm or quant is None else None
        mine.residual_out = torch.full((shard if sharded else tokens, hidden), 77.0, dtype=dtype)
        ranks.append(mine)
    weight = None if weight is None else torch.randn(hidden).to(weight)
    return SimpleNamespace(
        kind=kind, tokens=tokens, weight=weight, bias=bias, form=form, options=options, ranks=ranks, parts=parts,
        full=full, total=None, norm=None, absent=(),
    )  # fmt: skip


def norm_of(rows, weight, eps, bias, form, config, layout, dtype, by_groups=False):
    """The norm as the kernels take it: eight (four) numbers a lane, lanes of a slice, slices in
    order. Rows are of the dtype, or sums in fp32 that are not rounded to it.
    """
    packets = layout.packets
    each = 16 // layout.itemsize
    order = range(each) if each == 4 else (0, 2, 4, 6, 1, 3, 5, 7)
    wide = rows.float().numpy().reshape(len(rows), packets, each)
    lanes = sum(wide[:, :, k] * wide[:, :, k] for k in order)
    size = -(-packets // config.slices)
    if by_groups:  # whole groups
        size = -(-size // (GROUP_SIZE // each)) * (GROUP_SIZE // each)
    squares = None
    for s in range(config.slices):
        part = lanes[:, s * size : (s + 1) * size]
        padded = np.pad(part, ((0, 0), (0, config.block - part.shape[1])))
        value = np.array([np.sum(row) for row in padded], np.float32)
        squares = value if squares is None else squares + value
    rstd = 1 / np.sqrt(squares / np.float32(layout.hidden) + np.float32(eps))
    normed = rows.float() * torch.from_numpy(rstd)[:, None]
    if weight is None:
        return normed.to(dtype)
    if form in (ROUND, WIDE_ROUND):
        return (normed.to(dtype) * (weight + bias)).to(dtype)
    return (normed * (weight.float() + bias)).to(dtype)


def refer(call, config, ws):
    if call.total is not None:
        return
    total = call.parts[0].float()
    for part in call.parts[1:]:
        total = total + part.float()
    total = total.to(ws.dtype)
    if call.options.get("batch_invariant"):
        norm = normalize_batch_invariant
        if inner := call.options.get("inner"):
            total = norm(total, inner)
        call.norm, call.total = add_normalize(total, call.full, NormSpec(call.weight, EPS, call.bias, call.form), norm)
        return
    quantization = call.options.get("quantization")
    last = (config, ws.layout, ws.dtype, quantization is not None and quantization.quant.startswith("group"))
    if inner := call.options.get("inner"):
        total = norm_of(total, *inner, *last)
    wide = total if call.full is None else total.float() + call.full.float()
    call.total = wide.to(ws.dtype)
    rows = wide if call.form in (WIDE_SCALE, WIDE_ROUND) else call.total
    call.norm = norm_of(rows, call.weight, EPS, call.bias, call.form, *last)
    if quantization is not None:
        call.quantized = quantize(call.norm, quantization.scale, quantization.quant)


def strides_of(tensor):
    """Its strides, but for dimensions of one element, where they say nothing."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def wrong(result, exact, lost):
    """How many numbers are wrong; with `lost`, those that are NaN are not."""
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32}[result.itemsize]
    equal = (result.view(bits) == exact.view(bits)) | (result.isnan() & exact.isnan())
    return int((~(equal | result.isnan() if lost else equal)).sum())


def check_call(call, lost=()):
    """Results of all ranks that ended the call. `lost`: ranks whose wait gave up; what they have
    not got, and what they pass on, is NaN.
    """
    for rank, mine in enumerate(call.ranks):
        if rank in call.absent:
            continue
        exact = call.total[mine.rows]
        kept, rest = mine.residual_out[: len(exact)], mine.residual_out[len(exact) :]
        written = call.options.get("need_residual", True)
        if written:
            assert wrong(kept, exact, lost) == 0, f"rank {rank}, {call.kind}, {call.tokens}: residual"
        nobodys = rest[~rest.isnan()] if lost else rest
        assert (nobodys == (0 if written else 77)).all(), f"rank {rank}: rows of nobody"
        where = f"rank {rank}, {call.kind}, {call.tokens}"
        if mine.norm_out is not None:
            assert wrong(mine.norm_out, call.norm, lost) == 0, f"{where}: norm"
        if mine.quantized is not None:
            quantized, scales = call.quantized
            assert wrong(mine.quantized, quantized, lost) == 0, f"{where}: quantised norm"
            if mine.scales is not None:
                assert strides_of(mine.scales) == strides_of(scales)
                assert wrong(mine.scales, scales, lost) == 0, f"{where}: scales"


def are_nan(mine):
    """Whether all numbers of the norm are NaN, in all its forms."""
    return all(made is None or made.isnan().all() for made in (mine.norm_out, mine.quantized, mine.scales))


def protocol_of(call):
    if call.kind == "one_shot":
        return "one"
    if "quantization" in call.options:
        return "flags"
    fits = call.tokens <= DATA_TOKENS and call.options.get("output") is None
    return call.options.get("protocol") or ("data" if fits else "flags")


def check_missing(machine, calls, gone, last, turns):
    """The others end, say whom they waited for, refuse further calls, and have nothing wrong but
    NaN.
    """
    for index, call in enumerate(calls):
        call.absent = [rank.ws.rank for rank in machine.ranks if index >= (last if rank.dies else rank.begun)]
        if len(call.absent) < len(calls[0].ranks):
            check_call(call, lost=index >= last)
    named = {}
    for rank in machine.ranks:
        if rank.dies:
            continue
        with pytest.raises(PeerTimeoutError, match=r"rank \d of group"):
            rank.ws.check()
        named[rank.ws.rank] = Failure.of(rank.ws._error_word.value).rank
        made = calls[rank.begun - 1].ranks[rank.ws.rank]
        if turns == 0:  # it sent nothing of that call, so every row lacks something
            assert rank.begun == last + 1
            assert are_nan(made)
            assert made.residual_out[: len(calls[last].total[made.rows])].isnan().all()
        if rank.begun < len(calls):
            assert isinstance(rank.error, PeerTimeoutError)
            assert (calls[rank.begun].ranks[rank.ws.rank].residual_out == 77).all(), "a call after the error was made"
    # A rank that got all it needed of that call waits in the next, perhaps for one that itself
    # waits in this.
    assert gone in named.values(), named
    assert turns or set(named.values()) == {gone}, named
    assert all(other != rank for rank, other in named.items()), named


def wait_for_ever_but(machine, workspaces, gone):
    """Set no limit, until the ranks learn that the process of rank `gone` has ended."""
    for ws in workspaces:
        ws.timeout_s, ws.ctl[CTL_LIMIT_NS] = 1e6, int(1e15)

    def lose():
        with mock.patch.dict(os.environ, {Limit.ENDED_PEER.variable: str(LIMIT_S)}):
            for ws in workspaces:
                ws.lose(gone)

    machine.idle = lose


def check_late(machine, calls, late):
    """After an error all later calls are NaN on that rank and wait no more; and nobody ever has a
    wrong number."""
    assert machine.now < 4 * LIMIT_S * 1e9, "calls after an error wait for the clock"
    machine.ranks[late].come_back()
    machine.run()
    for call in calls:
        check_call(call, lost=True)
    for rank in machine.ranks:
        with pytest.raises(PeerTimeoutError, match=r"rank \d of group .* call \d+ of the workspace"):
            raise rank.ws.fault()
        failed = Failure.of(rank.ws._error_word.value).call - 1
        assert rank.begun == len(calls)
        if rank.ws.rank != late:
            assert failed < len(calls) - 2, "the error came too late to see what follows"
        for call in calls[failed + 1 :]:
            mine = call.ranks[rank.ws.rank]
            kept = mine.residual_out[: len(call.total[mine.rows])]
            assert are_nan(mine), f"rank {rank.ws.rank}: a norm after the fault is not NaN"
            assert kept.isnan().all(), f"rank {rank.ws.rank}: a residual after the fault is not NaN"


def check_differing(machine, calls):
    """The last rank made the last call where the others made the one before: every rank has an
    error, which flags show at once.
    """
    last, number = machine.ranks[-1].ws.rank, len(calls) - 1
    flags = protocol_of(calls[-2]) == "flags"
    assert not flags or machine.now < LIMIT_S * 1e9, "a difference is noticed by the clock"
    for rank in machine.ranks:
        error, said = (RankMismatchError, "makes call") if flags else (PeerTimeoutError, "call")
        with pytest.raises(error, match=rf"{said} {number} of the workspace") as raised:
            rank.ws.check()
        if flags:
            named = int(re.match(r"rank (\d) makes another call", str(raised.value))[1])
            assert named == last if rank.ws.rank != last else named < last
        mine = calls[-1 if rank.ws.rank == last else -2].ranks[rank.ws.rank]
        assert (mine.quantized if mine.norm_out is None else mine.norm_out).isnan().any()
