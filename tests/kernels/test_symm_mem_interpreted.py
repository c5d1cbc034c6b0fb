"""The `symm_mem` kernels run without a GPU: all blocks of all ranks in one process, in a seeded random order.

Triton's interpreter executes the kernels. Their PTX, which it does not know, is executed here instruction by
instruction, so polls, flags, time limits and error words are those of the real kernels. A scheduler runs one
block at a time and switches where memory is touched. Stores reach memory late and in any order, word by word,
unless a fence, a barrier before a fence, or the end of the launch orders them; so a protocol that leans on
more than it may is found out. Accesses outside the tensors and buffers of a launch are errors. Not modelled:
stale caches, threads of a block drifting apart, programmatic dependent launch, and the compiler.

Results are held, bit for bit, to a reference that sums ranks in order, and squares in the order that the
launch's plan gives them.
"""

from __future__ import annotations

import bisect
import collections
import ctypes
import functools
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
import traceback
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import numpy as np
import triton.language as tl

from fusewire.custom_ops.providers.symm_mem import launcher as symm_mem
from fusewire.custom_ops.providers.symm_mem import protocol as symm_mem_protocol
from fusewire.custom_ops.providers.symm_mem import workspace as spaces
from fusewire.custom_ops.providers.symm_mem.arguments import InnerNorm
from fusewire.custom_ops.providers.symm_mem.kernels import packets as blocks
from fusewire.custom_ops.providers.symm_mem.kernels import rows as arithmetic
from fusewire.custom_ops.providers.symm_mem.kernels import two_shot_data as kernels
from fusewire.custom_ops.providers.symm_mem.kernels import two_shot_flags as flags
from fusewire.custom_ops.providers.symm_mem.launch_config import Plan, check_plan
from fusewire.errors import PeerTimeoutError

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SCALE, ROUND = "scale_then_round", "round_then_scale"
EPS, INNER_EPS = 1e-5, 1e-3
LIMIT_S = 1.0  # of simulated time


class CpuWorkspace(spaces.SymmMemWorkspace):
    """A workspace whose buffers are CPU memory: same layout, same control block. `multiprocessors`: of this rank's GPU;
    `plan_alike` makes launches be planned by the least of all ranks.
    """

    def __init__(self, rank, buffers, layout, dtype, multiprocessors):
        self.rank, self.world_size, self.hidden, self.dtype = rank, layout.world_size, layout.hidden, dtype
        self.group_name, self.timeout_s, self.device = "simulated", LIMIT_S, torch.device("cpu")
        self.layout, self.multiprocessors, self._buffer = layout, multiprocessors, buffers[rank]
        self.own_multiprocessors = multiprocessors
        self._outputs, self.known = self._output_tensors(), {}
        self._host_error = torch.zeros(1, dtype=torch.int64)
        self._error_word = ctypes.c_int64.from_address(self._host_error.data_ptr())
        self.ctl = self._control_block([buffer.data_ptr() for buffer in buffers])


def plan_alike(workspaces):
    """What the vote of the ranks comes to: each tells its number, and all plan by the same."""
    facts = [{"multiprocessors": ws.own_multiprocessors} for ws in workspaces]
    for ws in workspaces:
        ws.multiprocessors = symm_mem_protocol.least_multiprocessors(facts)


# --- PTX ----------------------------------------------------------------------------------------------------

BITS = {32: 0xFFFFFFFF, 64: 0xFFFFFFFFFFFFFFFF}
ARITHMETIC = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "shr": lambda a, b: a >> b,
    "max": max,
    "ne": lambda a, b: a != b,
    "eq": lambda a, b: a == b,
    "lt": lambda a, b: a < b,
}


def bits_float(word):
    return np.uint32(word).view(np.float32)


def float_bits(value):
    return int(np.float32(value).view(np.uint32))


class Program:
    """PTX as a list of functions of (registers, block, thread) that return where to jump, or None."""

    def __init__(self, asm):
        self.slots, self.initial, self.labels = {}, [], {}
        statements = []
        for text in re.split(r"[;\n]", asm):
            text = text.strip().removeprefix("{").strip()
            if label := re.fullmatch(r"(\w+):", text):
                self.labels[label[1]] = len(statements)
            elif text not in ("", "}") and not text.startswith(".reg"):
                statements.append(text)
        self.code = [self.statement(text) for text in statements]
        self.polls = self.slots.get("n")

    def slot(self, name):
        """The register's number; constants are registers that nobody writes."""
        if name not in self.slots:
            assert re.fullmatch(r"\$?\w+", name), name
            self.slots[name] = len(self.initial)
            self.initial.append(int(name, 0) if name[0].isdigit() else 0)
        return self.slots[name]

    def vector(self, text):
        return [self.slot(name) for name in re.findall(r"[$\w]+", text)]

    def statement(self, text):
        if guarded := re.fullmatch(r"@(\w+)\s+(.*)", text):
            guard, then = self.slot(guarded[1]), self.statement(guarded[2])
            return lambda r, b, t: then(r, b, t) if r[guard] else None
        op, _, rest = text.partition(" ")
        name, *kinds = op.split(".")
        operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)
        return getattr(self, f"op_{name}", functools.partial(self.op_arithmetic, name))(kinds, operands)

    def op_arithmetic(self, name, kinds, operands):
        to, a, b = map(self.slot, operands)
        if kinds[-1] == "f32":
            assert [name, *kinds] == ["add", "rn", "f32"]
            return lambda r, block, thread: r.__setitem__(to, float_bits(bits_float(r[a]) + bits_float(r[b])))
        work = ARITHMETIC[name]
        mask = 1 if kinds[0] == "pred" else BITS[int(kinds[-1][1:])]

        def run(r, block, thread):
            r[to] = work(r[a], r[b]) & mask

        return run

    def op_setp(self, kinds, operands):
        return self.op_arithmetic(kinds[0], ["pred"], operands)

    def op_mov(self, kinds, operands):
        to, source = operands
        if source == "%globaltimer":
            at = self.slot(to)
            return lambda r, block, thread: r.__setitem__(at, block.machine.now)
        if to.startswith("{"):
            (low, high), at = self.vector(to), self.slot(source)

            def split(r, block, thread):
                r[low], r[high] = r[at] & BITS[32], r[at] >> 32

            return split
        at, words = self.slot(to), self.vector(source)
        if len(words) == 2:
            return lambda r, block, thread: r.__setitem__(at, r[words[0]] | r[words[1]] << 32)
        return lambda r, block, thread: r.__setitem__(at, r[words[0]])

    def op_bra(self, kinds, operands):
        return lambda r, block, thread: self.labels[operands[0]]

    def address(self, text):
        base, _, offset = text.strip("[]").partition("+")
        at, offset = self.slot(base), int(offset or 0)
        return lambda r: r[at] + offset

    def op_ld(self, kinds, operands):
        to, at = self.vector(operands[0]), self.address(operands[1])
        size = int(kinds[-1][1:]) // 8

        def run(r, block, thread):
            assert at(r) % (size * len(to)) == 0, "a misaligned address"
            data = block.load(at(r), size * len(to), thread)
            for i, slot in enumerate(to):
                r[slot] = int.from_bytes(data[i * size : (i + 1) * size], "little")

        return run

    def op_prefetch(self, kinds, operands):
        at = self.address(operands[0])

        def run(r, block, thread):
            block.load(at(r), 16, thread)  # of memory that is there

        return run

    def op_st(self, kinds, operands):
        at, values = self.address(operands[0]), self.vector(operands[1])
        size = int(kinds[-1][1:]) // 8

        def run(r, block, thread):
            assert at(r) % (size * len(values)) == 0, "a misaligned address"
            for i, slot in enumerate(values):  # the words of a vector may arrive one by one
                block.store(at(r) + i * size, r[slot].to_bytes(size, "little"), thread)

        return run

    def op_atom(self, kinds, operands):
        assert kinds[-2:] == ["cas", "b64"]
        to, at, old, new = self.slot(operands[0]), self.address(operands[1]), *map(self.slot, operands[2:])

        def run(r, block, thread):
            word = block.machine.word(at(r))
            r[to] = word.value
            if word.value == r[old]:
                word.value = r[new]
                block.machine.version += 1

        return run

    def op_red(self, kinds, operands):
        assert kinds[-2:] == ["add", "u64"]
        at, amount = self.address(operands[0]), self.slot(operands[1])

        def run(r, block, thread):
            block.machine.word(at(r)).value += r[amount]

        return run

    def op_fence(self, kinds, operands):
        assert kinds == ["acq_rel", "sys"]
        return lambda r, block, thread: block.fence(thread)

    def op_griddepcontrol(self, kinds, operands):
        return lambda r, block, thread: None  # launches do not overlap here

    def run(self, registers, at, block, thread):
        """Run to the end (None), or to a jump back: a poll was fruitless, and goes on there."""
        while at < len(self.code):
            jump = self.code[at](registers, block, thread)
            if jump is not None and jump <= at:
                return jump
            at = at + 1 if jump is None else jump
        return None


assembled = functools.cache(Program)


# --- Blocks, ranks and the machine --------------------------------------------------------------------------


class Block:
    """A block of a launch: a thread that runs only while the machine lets it."""

    def __init__(self, machine, fn, args, programs, pid, threads):
        self.machine, self.grid, self.threads = machine, (programs, pid), threads
        self.pending = {}  # stores not yet in memory, by address, oldest first: [bytes, thread, seen by the block]
        self.polled = None  # the version of memory of its last fruitless poll
        self.over = False
        # Some blocks, and some blocks' stores, come last: only when nothing else can go on.
        self.starved, self.lazy = machine.random.random() < 0.25, machine.random.random() < 0.25
        self.go, self.fn, self.args = threading.Semaphore(0), fn, args
        self.thread = threading.Thread(target=self.body, daemon=True)
        self.thread.start()

    def body(self):
        self.go.acquire()
        try:
            self.fn(**self.args)
        except BaseException:
            self.machine.failure = traceback.format_exc()
        self.over = True
        self.machine.back.release()

    def switch(self):
        self.machine.back.release()
        self.go.acquire()

    def load(self, at, size, thread):
        self.machine.must_hold(at, size)
        data = bytearray(ctypes.string_at(at, size))
        for offset in range(0, size, 4) if self.pending else ():
            for stored, owner, seen in self.pending.get(at + offset, ()):
                if seen or owner == thread:
                    data[offset : offset + len(stored)] = stored
        return data

    def store(self, at, data, thread):
        self.machine.must_hold(at, len(data))
        self.pending.setdefault(at, collections.deque()).append([data, thread, False])

    def barrier(self):
        for queue in self.pending.values():
            for entry in queue:
                entry[2] = True

    def fence(self, thread):
        """What this thread stored, and what it saw of others at a barrier, goes before what it stores next."""
        for at, queue in list(self.pending.items()):
            covered = [i for i, (_, owner, seen) in enumerate(queue) if seen or owner == thread]
            self.deliver(at, covered[-1] + 1 if covered else 0)

    def deliver(self, at, count=1):
        queue = self.pending[at]
        for _ in range(count):
            data = queue.popleft()[0]
            ctypes.memmove(at, data, len(data))
        if not queue:
            del self.pending[at]
        self.machine.version += 1

    def flush(self, share=1.0):
        """Deliver some stores: any, the oldest or the latest."""
        places = list(self.pending)
        count = min(len(places), 1 + int(len(places) * share))
        how = self.machine.random.randrange(3)
        some = (
            self.machine.random.sample(places, count) if how == 0 else places[:count] if how == 1 else places[-count:]
        )
        for at in some if share < 1 else places:
            self.deliver(at, len(self.pending[at]))


class Rank:
    """A rank's stream: one launch after the other. `dies`: (call, turns), when it stops for good."""

    def __init__(self, machine, ws, calls, dies):
        self.machine, self.ws, self.calls, self.dies = machine, ws, calls, dies
        self.blocks, self.next, self.begun, self.turns, self.error = [], 0, 0, 0, None

    @property
    def dead(self):
        return self.dies is not None and (self.next - 1, self.turns) >= self.dies

    @property
    def finished(self):
        return self.dead or (not self.blocks and (self.next == len(self.calls) or self.error is not None))

    def advance(self):
        """End a launch whose blocks are all over; begin the next call."""
        if self.dead or any(not block.over for block in self.blocks):
            return
        if self.blocks:
            self.end()
        elif not self.finished:
            self.next, self.turns = self.next + 1, 0
            if not self.dead:
                self.begin(self.calls[self.next - 1])

    def begin(self, call):
        try:
            name, plan, args = caught_launch(lambda: run_host(self.ws, call, call.ranks[self.ws.rank]))
        except PeerTimeoutError as error:
            self.error = error
            return
        self.begun += 1
        assert check_plan(plan, self.ws.layout.packets, self.ws.own_multiprocessors) is None
        refer(call, plan, self.ws)
        fn, values = self.machine.bound(name, args)
        self.blocks = [
            Block(self.machine, fn, values, plan.programs, pid, plan.threads) for pid in range(plan.programs)
        ]

    def end(self):
        for block in self.blocks:
            block.flush()
        self.blocks = []
        call = self.calls[self.next - 1]
        if call.options.get("output") is not None:  # it lives until the next call
            mine = call.ranks[self.ws.rank]
            target = mine.norm_out if call.kind == "two_shot_sharded" else mine.residual_out
            target.copy_(self.ws.output(call.options["output"], call.tokens))


class Machine:
    """All ranks, their memory and the clock."""

    def __init__(self, seed):
        self.random, self.now, self.version, self.spinning = random.Random(seed), 1, 0, False
        self.back, self.failure, self.running, self.ranks = threading.Semaphore(0), None, None, []
        self.starts, self.ends, self.kept = [], [], []

    def hold(self, tensor):
        """Kernels may touch this tensor, which lives as long as the machine."""
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.itemsize
        at = bisect.bisect(self.starts, start)
        if not self.holds(start, end):
            self.starts.insert(at, start)
            self.ends.insert(at, end)
        self.kept.append(tensor)

    def holds(self, start, end):
        index = bisect.bisect(self.starts, start) - 1
        return index >= 0 and end <= self.ends[index]

    def must_hold(self, at, size):
        if not self.holds(at, at + size):
            raise IndexError(f"{size} bytes at {at:#x}, outside all tensors")

    def word(self, at):
        self.must_hold(at, 8)
        return ctypes.c_uint64.from_address(at)

    def bound(self, name, args):
        from triton.runtime import interpreter

        function = getattr(kernels, name, None) or getattr(flags, name)
        fn = function.rewrite()
        grid = interpreter.GridExecutor(fn, function.arg_names, (1, 1, 1))
        for value in args:
            if isinstance(value, torch.Tensor) and value.numel():
                self.hold(value)
        values = dict(zip(function.arg_names, args, strict=True))
        return fn, {k: v if k in grid.constexprs else interpreter._implicit_cvt(v) for k, v in values.items()}

    def resume(self, block, rank):
        from triton.runtime.interpreter import interpreter_builder

        programs, pid = block.grid
        interpreter_builder.set_grid_dim(programs, 1, 1)
        interpreter_builder.set_grid_idx(pid, 0, 0)
        rank.turns += 1
        block.polled, self.running = None, block
        block.go.release()
        self.back.acquire()
        if self.failure:
            raise RuntimeError(self.failure)

    def run(self):
        spins = 0
        while not all(rank.finished for rank in self.ranks):
            for rank in self.ranks:
                if self.random.random() < 0.5:
                    rank.advance()
            live = [(b, rank) for rank in self.ranks if not rank.dead for b in rank.blocks if not b.over]
            late = [b for rank in self.ranks if not rank.dead for b in rank.blocks if b.pending]
            soon = [block for block in late if not block.lazy]
            if soon and self.random.random() < 0.5:
                self.random.choice(soon).flush(self.random.choice((0.2, 0.7, 1.0)))
            ready = [pair for pair in live if pair[0].polled != self.version]
            first = [pair for pair in ready if not pair[0].starved]
            if first:
                self.resume(*self.random.choice(first))
                spins = 0
            elif any(not rank.finished and all(block.over for block in rank.blocks) for rank in self.ranks):
                continue  # it goes on to its next call before any block that is starved
            elif ready:
                self.resume(*self.random.choice(ready))
                spins = 0
            elif late:
                self.random.choice(late).flush(self.random.choice((0.1, 0.5)))
            elif live:
                spins += 1
                assert spins < 100, "a wait goes on for ever"
                self.spin(live)
                continue
            self.spinning = False

    def spin(self, live):
        """Nothing will happen but that time passes: let everyone look at the clock."""
        self.now += int(LIMIT_S * 1e9 / 16)
        self.spinning = True
        for block, rank in live:
            self.resume(block, rank)
        self.spinning = False


def caught_launch(call):
    seen = []
    original, symm_mem._run = symm_mem._run, lambda key, name, ws, plan, args: seen.append((name, plan, args))
    try:
        call()
    finally:
        symm_mem._run = original
    assert len(seen) == 1
    return seen[0]


# --- What the interpreter lacks -----------------------------------------------------------------------------


def _array(value):
    return np.asarray(value.handle.data if isinstance(value, tl.tensor) else getattr(value, "value", value))


def _tensor(flat, shape, dtype):
    from triton.runtime.interpreter import TensorHandle

    data = np.asarray(flat).reshape(shape or [1])
    return tl.tensor(TensorHandle(data, dtype), tl.block_type(dtype, shape) if shape else dtype)


def _shape(*values):
    shapes = [list(v.handle.data.shape) for v in values if isinstance(v, tl.tensor) and v.type.is_block()]
    return max(shapes, default=[])


def inline_asm(machine, asm, constraints, args, dtype, is_pure, pack):
    """PTX for every lane; if a poll was fruitless, other blocks run before the next."""
    block, program = machine.running, assembled(asm)
    if machine.random.random() < 0.15:
        block.starved = machine.random.random() < 0.3
        block.switch()
    kinds = [kind.strip("=&") for kind in constraints.split(",")]
    outs = constraints.count("=")
    shape = _shape(*args)
    columns = np.broadcast_arrays(*map(_array, args)) if args else []
    lanes = []
    for values in zip(*(c.ravel().tolist() for c in columns), strict=True) if args else [()]:
        registers = program.initial.copy()
        for i, value in enumerate(values):
            registers[program.slot(f"${outs + i}")] = int(value) & BITS[64 if kinds[outs + i] == "l" else 32]
        lanes.append([registers, 0])
    waiting = list(enumerate(lanes))
    while waiting:
        for i, lane in waiting:
            if machine.spinning and program.polls is not None:
                lane[0][program.polls] = 255  # the poll after which it looks at the clock
            lane[1] = program.run(*lane, block, i % block.threads)
        waiting = [pair for pair in waiting if pair[1][1] is not None]
        if waiting:
            block.polled = machine.version
            block.switch()
    out = []
    for k, kind in enumerate(dtype if isinstance(dtype, tuple) else (dtype,)):
        numpy = (np.uint64, np.int64) if kind == tl.int64 else (np.uint32, np.int32)
        values = [registers[program.slot(f"${k}")] for registers, _ in lanes]
        out.append(_tensor(np.array(values, numpy[0]).view(numpy[1]), shape, kind))
    return tuple(out) if isinstance(dtype, tuple) else out[0]


def _rounded(value, kind):
    return torch.from_numpy(np.array(_array(value), np.float32)).to((BF16, FP16, FP32)[int(kind)])


def bits16(value, KIND):
    return _tensor(_rounded(value, KIND).view(torch.int16).numpy().astype(np.int32) & 0xFFFF, _shape(value), tl.int32)


def rounded(value, KIND):  # the interpreter truncates to bf16
    return _tensor(_rounded(value, KIND).float().numpy(), _shape(value), tl.float32)


def install(machine):
    """Make the interpreter run the kernels on this machine."""
    from triton.runtime import interpreter

    for module in (arithmetic, blocks, kernels, flags):
        for name, value in list(vars(module).items()):
            if isinstance(value, tl.constexpr):
                setattr(module, name, value.value)
    arithmetic._bits16, arithmetic.rounded = bits16, rounded
    if interpreter._patch_lang.__name__ == "_patch_lang":
        for function in (kernels.one_shot_kernel, tl.standard.max):  # once for all, not at every call
            interpreter._patch_lang(function.fn)
        interpreter._patch_lang = lambda fn: None
    # Its scalars are arrays of one element, which NumPy no longer takes for numbers.
    tl.tensor.__index__ = lambda self: int(_array(self).reshape(-1)[0])
    tl.tensor.__bool__ = lambda self: bool(_array(self).all())
    tl.inline_asm_elementwise = functools.partial(inline_asm, machine)
    tl.debug_barrier = lambda: machine.running.barrier()


# --- Calls and references -----------------------------------------------------------------------------------


def run_host(ws, call, mine):
    outs = {"norm_out": mine.norm_out, "residual_out": mine.residual_out}
    if call.options.get("output") is not None:
        outs.pop("norm_out" if call.kind == "two_shot_sharded" else "residual_out")
    function = getattr(symm_mem, call.kind)
    function(ws, mine.x, mine.residual, call.weight, EPS, call.bias, call.form, **outs, **call.options)


def make_call(
    kind, tokens, world, hidden, dtype, residual=True, weight=BF16, bias=0.0, form=SCALE, inner=None, **options
):
    """Inputs of all ranks and places for their results. Holds -0.0, NaN, the sentinel, and sums that depend on
    their order.
    """
    parts = [torch.randn(tokens, hidden).to(dtype) for _ in range(world)]
    if world > 2:  # from rank 2 on, what comes in before ranks 0 and 1 cancel is rounded away
        big = torch.randn(tokens, hidden // 2) * {BF16: 3e6, FP16: 8e3, FP32: 3e3}[dtype]
        parts[0][:, ::2], parts[1][:, ::2] = big.to(dtype), -big.to(dtype)
    if tokens > 1:
        parts[0].view(torch.int16 if dtype.itemsize == 2 else torch.int32)[0, 2:4] = -1
    for part in parts:
        part[-1, 5] = -0.0
    full = torch.randn(tokens, hidden).to(dtype) if residual else None
    if full is not None:
        full[-1, 5] = -0.0
    if inner is not None:
        inner_weight, inner_form = inner
        inner_weight = None if inner_weight is None else torch.randn(hidden).to(inner_weight)
        options["inner"] = InnerNorm(inner_weight, INNER_EPS, 1.0 - bias, inner_form)
    shard, ranks = spaces.shard_rows(tokens, world), []
    for rank, part in enumerate(parts):
        sharded = kind == "two_shot_sharded"
        rows = slice(rank * shard, (rank + 1) * shard) if sharded else slice(None)
        mine = SimpleNamespace(x=part, rows=rows, residual=None if full is None else full[rows].clone())
        mine.norm_out = torch.full((tokens, hidden), 77.0, dtype=dtype)
        mine.residual_out = torch.full((shard if sharded else tokens, hidden), 77.0, dtype=dtype)
        ranks.append(mine)
    weight = None if weight is None else torch.randn(hidden).to(weight)
    return SimpleNamespace(
        kind=kind, tokens=tokens, weight=weight, bias=bias, form=form, options=options, ranks=ranks, parts=parts,
        full=full, total=None, norm=None, absent=(),
    )  # fmt: skip


def norm_of(rows, weight, eps, bias, form, plan, layout):
    """The norm as the kernels take it: eight (four) numbers a lane, lanes of a slice, slices in order."""
    dtype, packets = rows.dtype, layout.packets
    each = 16 // layout.itemsize
    order = range(each) if each == 4 else (0, 2, 4, 6, 1, 3, 5, 7)
    wide = rows.float().numpy().reshape(len(rows), packets, each)
    lanes = sum(wide[:, :, k] * wide[:, :, k] for k in order)
    size = -(-packets // plan.slices)
    squares = None
    for s in range(plan.slices):
        part = lanes[:, s * size : (s + 1) * size]
        padded = np.pad(part, ((0, 0), (0, plan.block - part.shape[1])))
        value = np.array([np.sum(row) for row in padded], np.float32)
        squares = value if squares is None else squares + value
    rstd = 1 / np.sqrt(squares / np.float32(layout.hidden) + np.float32(eps))
    normed = rows.float() * torch.from_numpy(rstd)[:, None]
    if weight is None:
        return normed.to(dtype)
    if form == ROUND:
        return (normed.to(dtype) * (weight + bias)).to(dtype)
    return (normed * (weight.float() + bias)).to(dtype)


def refer(call, plan, ws):
    if call.total is not None:
        return
    total = call.parts[0].float()
    for part in call.parts[1:]:
        total = total + part.float()
    total = total.to(ws.dtype)
    if inner := call.options.get("inner"):
        total = norm_of(total, inner.weight, inner.eps, inner.weight_bias, inner.form, plan, ws.layout)
    if call.full is not None:
        total = (total.float() + call.full.float()).to(ws.dtype)
    call.total = total
    call.norm = norm_of(total, call.weight, EPS, call.bias, call.form, plan, ws.layout)


def wrong(result, exact, lost):
    """How many numbers are wrong; with `lost`, those that are NaN are not."""
    bits = torch.int16 if result.itemsize == 2 else torch.int32
    equal = (result.view(bits) == exact.view(bits)) | (result.isnan() & exact.isnan())
    return int((~(equal | result.isnan() if lost else equal)).sum())


def check_call(call, lost=()):
    """Results of all ranks that ended the call. `lost`: ranks whose wait gave up; what they have not got, and
    what they pass on, is NaN.
    """
    for rank, mine in enumerate(call.ranks):
        if rank in call.absent:
            continue
        exact = call.total[mine.rows]
        kept, rest = mine.residual_out[: len(exact)], mine.residual_out[len(exact) :]
        written = call.options.get("need_residual", True)
        if written:
            assert wrong(kept, exact, lost) == 0, f"rank {rank}, {call.kind}, {call.tokens}: residual"
        assert (rest == (0 if written else 77)).all(), f"rank {rank}: rows of nobody"
        assert wrong(mine.norm_out, call.norm, lost) == 0, f"rank {rank}, {call.kind}, {call.tokens}: norm"


def protocol_of(call):
    if call.kind == "one_shot":
        return "one"
    fits = call.tokens <= DATA_TOKENS and call.options.get("output") is None
    return call.options.get("protocol") or ("data" if fits else "flags")


ONE_SHOT_TOKENS, DATA_TOKENS, MAX_TOKENS = 9, 16, 24


def simulate(world, hidden, dtype, specs, seed=0, multiprocessors=3, missing=None):
    """Run the calls on all ranks. `multiprocessors`: of every rank's GPU, or a tuple of each rank's. `missing`: (rank,
    call, turns), a rank that stops in the middle of a call.
    """
    torch.manual_seed(seed)
    machine = Machine(seed)
    install(machine)
    layout = spaces.Layout(world, hidden, dtype.itemsize, ONE_SHOT_TOKENS, DATA_TOKENS, MAX_TOKENS, 1)
    buffers = [torch.zeros(layout.nbytes + 16, dtype=torch.uint8)[: layout.nbytes] for _ in range(world)]
    areas = [slice(layout.offsets[n], layout.offsets[n] + layout.sizes[n]) for n in layout.ones]
    for buffer in buffers:
        machine.hold(buffer)
        for area in areas:
            buffer[area] = 255
    calls = [make_call(kind, tokens, world, hidden, dtype, **options) for kind, tokens, options in specs]
    counts = multiprocessors if isinstance(multiprocessors, tuple) else (multiprocessors,) * world
    spaces_of_ranks = [CpuWorkspace(rank, buffers, layout, dtype, counts[rank]) for rank in range(world)]
    plan_alike(spaces_of_ranks)
    for rank, ws in enumerate(spaces_of_ranks):
        machine.hold(ws._host_error)
        dies = missing[1:] if missing and missing[0] == rank else None
        machine.ranks.append(Rank(machine, ws, calls, dies))
    machine.run()
    if missing:
        check_missing(machine, calls, *missing)
        return
    for rank in machine.ranks:
        rank.ws.check()
    for call in calls:
        check_call(call)
    launches = [sum(protocol == protocol_of(call) for call in calls) for protocol in ("one", "data", "flags")]
    for rank, buffer in zip(machine.ranks, buffers, strict=True):
        assert all((buffer[area] == 255).all() for area in areas), "packets were left behind"
        assert rank.ws.ctl[:3].tolist() == [n << 16 for n in launches], "counters"


def check_missing(machine, calls, gone, last, turns):
    """The others end, say whom they waited for, refuse further calls, and have nothing wrong but NaN."""
    for index, call in enumerate(calls):
        call.absent = [rank.ws.rank for rank in machine.ranks if index >= (last if rank.dies else rank.begun)]
        if len(call.absent) < len(calls[0].ranks):
            check_call(call, lost=index >= last)
    named = {}
    for rank in machine.ranks:
        if rank.dies:
            continue
        with pytest.raises(PeerTimeoutError, match=r"rank \d of group") as error:
            rank.ws.check()
        named[rank.ws.rank] = int(re.match(r"rank (\d)", str(error.value))[1])
        made = calls[rank.begun - 1].ranks[rank.ws.rank]
        if turns == 0:  # it sent nothing of that call, so every row lacks something
            assert rank.begun == last + 1
            assert made.norm_out.isnan().all()
            assert made.residual_out[: len(calls[last].total[made.rows])].isnan().all()
        if rank.begun < len(calls):
            assert isinstance(rank.error, PeerTimeoutError)
            assert (calls[rank.begun].ranks[rank.ws.rank].norm_out == 77).all(), "a call after the error was made"
    # A rank that got all it needed of that call waits in the next, perhaps for one that itself waits in this.
    assert gone in named.values(), named
    assert turns or set(named.values()) == {gone}, named
    assert all(other != rank for rank, other in named.items()), named


# --- Scenarios ----------------------------------------------------------------------------------------------


def _flags(programs, ahead, lag):
    return Plan(programs, 1, 32, ahead=ahead, lag=lag)


def _racing(protocol, count):
    kinds = ("two_shot", "two_shot_sharded", "two_shot_sharded")
    return [(kinds[i % 3], 2 + i % 2, {"protocol": protocol}) for i in range(count)]


SLICED = Plan(3, 1, 32, slices=3)
INNER = {"inner": (BF16, SCALE)}
SCENARIOS = {
    "one-shot, slices, 3 ranks": (3, 264, FP32, [
        ("one_shot", 2, {"plan": SLICED, "bias": 1.0}),
        ("one_shot", 1, {"plan": Plan(2, 1, 64, slices=2), **INNER}),
        ("one_shot", 4, {"plan": Plan(2, 1, 64, slices=2), "residual": False, "weight": FP32}),
        ("one_shot", 3, {"plan": SLICED, "inner": (None, ROUND), "form": ROUND}),
    ]),
    "one-shot, racing, 4 ranks": (4, 64, BF16, [
        ("one_shot", 1 + i % 2, INNER if i % 3 == 1 else {}) for i in range(6)
    ]),
    "two-shot, data, 3 ranks": (3, 72, FP16, [
        ("two_shot_sharded", 8, {"plan": Plan(3, 1, 32, slices=2, unroll=2), "weight": None}),
        ("two_shot", 7, {"form": ROUND, "weight": FP16, "inner": (FP32, ROUND)}),
        ("two_shot", 1, {"residual": False, "weight": FP32}),
        ("two_shot_sharded", 4, {"plan": Plan(3, 1, 32, slices=3, unroll=4), "inner": (FP16, ROUND)}),
    ]),
    # Each thread adds the slices' squares itself, or has their sum from each slice.
    "two-shot, data, slices, 3 ranks": (3, 264, FP32, [
        ("two_shot", 4, {"plan": SLICED, "bias": 1.0}),
        ("two_shot", 5, {"plan": Plan(3, 1, 32, slices=3, unroll=8), **INNER}),
        ("two_shot", 2, {"plan": Plan(2, 1, 64, slices=2), "inner": (None, ROUND), "form": ROUND}),
        ("two_shot", 3, {"plan": Plan(3, 1, 32, slices=3, unroll=8), "residual": False}),
        ("two_shot", 4, {}),
    ]),
    # With these orders a single slot would not do.
    **{f"two-shot, data, racing, 2 ranks, order {seed}": (2, 64, BF16, _racing("data", 12), seed) for seed in (4, 8)},
    "two-shot, flags, racing, 2 ranks": (2, 64, BF16, _racing("flags", 8)),
    "two-shot, flags, 3 ranks": (3, 72, FP32, [
        ("two_shot", 13, {"protocol": "flags", "plan": _flags(2, 1, 0)}),
        ("two_shot_sharded", 14, {"output": 0, "plan": _flags(1, 3, 2), "inner": (FP32, SCALE)}),
        ("two_shot", 15, {"output": 0, "plan": _flags(2, 2, 1), "residual": False}),
        ("two_shot", 9, {"protocol": "flags", "plan": _flags(3, 1, 0), **INNER}),
        ("two_shot_sharded", 2, {"protocol": "flags"}),
    ]),
    "all in turn, 2 ranks": (2, 64, BF16, [
        ("one_shot", 2, INNER), ("two_shot_sharded", 6, INNER), ("two_shot", 19, INNER), ("one_shot", 3, {}),
        ("two_shot", 3, {"need_residual": False}), ("one_shot", 8, {"weight": None, "inner": (None, SCALE)}),
    ]),
    # Planned by its own number, each of these ranks would share a row among another number of blocks.
    **{f"GPUs with {counts} multiprocessors": (len(counts), 1536, BF16, [
        ("two_shot", 2 * len(counts), {"protocol": "data"}), ("two_shot_sharded", len(counts), {"protocol": "data"}),
        ("one_shot", 2, INNER), ("two_shot", 5, {"protocol": "flags"}),
    ], 0, counts) for counts in ((3, 4), (4, 3), (2, 4, 3))},
}  # fmt: skip
PROTOCOLS = {
    "one-shot": ("one_shot", {}),
    "data, sharded": ("two_shot_sharded", {"protocol": "data"}),
    "data, full": ("two_shot", {"protocol": "data"}),
    "flags, sharded": ("two_shot_sharded", {"protocol": "flags"}),
    "flags, full": ("two_shot", {"protocol": "flags"}),
}
SCENARIOS |= {
    f"{name}: rank {gone} stops after {turns} turns": (
        3, 64, BF16, [(kind, 5, {**options, **inner}) for inner in ({}, INNER, {})], turns, 3, (gone, 1, turns),
    )
    for gone, turns in ((2, 0), (1, 12))
    for name, (kind, options) in PROTOCOLS.items()
}  # fmt: skip


PARTS = 16  # of the nightly test, each a few minutes long


def every_scenario():
    """Every count of tokens with every kind of norm, protocol, dtype and number of ranks, in several orders."""
    found = {}
    norms = [
        {}, {"residual": False}, {"weight": None}, {"form": ROUND, "bias": 1.0}, {"weight": FP32}, INNER,
        {"inner": (None, SCALE)}, {"inner": (FP32, ROUND), "form": ROUND}, {"inner": (FP16, ROUND), "bias": 1.0},
    ]  # fmt: skip
    for world in (2, 3, 4):
        for dtype, hidden in ((BF16, 64), (FP16, 184), (FP32, 256)):
            for seed, (name, (kind, options)) in enumerate(PROTOCOLS.items()):
                order = random.Random(f"{world} {dtype} {name}")
                specs = [(kind, tokens, {**options, **norm}) for tokens in range(1, 10) for norm in norms]
                order.shuffle(specs)
                if options.get("protocol") != "flags":
                    plans = [None, None, SLICED, Plan(3, 1, 32, slices=3, unroll=1 if kind == "one_shot" else 8)]
                    specs = [(k, n, {**o, "plan": order.choice(plans)}) for k, n, o in specs]
                for part in range(3):
                    key = f"{name}, {world} ranks, {str(dtype)[6:]}, part {part + 1}"
                    found[key] = (world, hidden, dtype, specs[part::3], seed + 10 * part)
    for name, scenario in list(SCENARIOS.items()):
        if len(scenario) < 7:
            for seed in range(10, 30):
                found[f"{name}, seed {seed}"] = (*scenario[:4], seed, *scenario[5:])
        else:
            for turns in (*range(1, 40, 3), *range(40, 200, 20)):
                gone, last, _ = scenario[-1]
                found[f"{name}, {turns}"] = (*scenario[:4], turns, 3, (gone, last, turns))
    return found


def run_scenarios(names):
    """Results by name, from a process in which Triton interprets."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, __file__]
    run = subprocess.run(
        command, input=json.dumps(names), env=environment, capture_output=True, text=True, timeout=590, check=False
    )
    results = dict(json.loads(line) for line in run.stdout.splitlines() if line.startswith("["))
    missing = run.stdout[-2000:] + run.stderr[-4000:]
    return {name: results.get(name, f"the process ended with {run.returncode}: {missing}") for name in names}


@pytest.fixture(scope="module")
def results():
    from triton.runtime import interpreter

    if not all(hasattr(interpreter, n) for n in ("GridExecutor", "_patch_lang", "_implicit_cvt")):
        pytest.skip("this Triton's interpreter is not the one that this simulation knows")
    return run_scenarios(list(SCENARIOS))


@pytest.mark.parametrize("name", SCENARIOS)
def test_ranks_agree_with_the_definition(name, results):
    assert not results[name], results[name]


@pytest.mark.nightly
@pytest.mark.parametrize("part", range(PARTS))
def test_ranks_agree_with_the_definition_in_every_case(part):
    failed = {name: text for name, text in run_scenarios(list(every_scenario())[part::PARTS]).items() if text}
    assert not failed, f"{len(failed)} scenarios failed: {dict(list(failed.items())[:2])}"


def main():
    torch.set_num_threads(1)
    np.seterr(all="ignore")
    everything = {**every_scenario(), **SCENARIOS}
    for name in json.load(sys.stdin):
        start = time.monotonic()
        try:
            simulate(*everything[name])
            text = ""
        except Exception:
            text = traceback.format_exc()[-3000:]
        print(json.dumps([name, text]), flush=True)
        print(f"{time.monotonic() - start:.1f} s {name}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
