"""The machine on which the `symm_mem` kernels run without a GPU: all blocks of all ranks in one
process.

Triton's interpreter executes the kernels. Their PTX, which it does not know, is executed by
`support.ptx` instruction by instruction, so polls, flags, time limits and error words are those of
the real kernels. A scheduler runs one block at a time and switches where memory is touched. Stores
reach memory late and in any order, word by word, unless a fence, a barrier before a fence, or the
end of the launch orders them; so a protocol that relies on more than it may is found out. Accesses
outside the tensors and buffers of a launch are errors. Not modelled: stale caches, threads of a
block drifting apart, and the compiler.

Only for a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import bisect
import collections
import ctypes
import functools
import random
import threading
import traceback

import numpy as np
import torch
import triton.language as tl

from fusewire.custom_ops.providers.symm_mem import launcher as symm_mem
from fusewire.custom_ops.providers.symm_mem import protocol as symm_mem_protocol
from fusewire.custom_ops.providers.symm_mem import workspace as spaces
from fusewire.custom_ops.providers.symm_mem.kernels import one_shot, quantize, two_shot_data, two_shot_flags
from fusewire.custom_ops.providers.symm_mem.kernels import packets as blocks
from fusewire.custom_ops.providers.symm_mem.kernels import rows as arithmetic
from fusewire.custom_ops.providers.symm_mem.launch_config import check_launch_config
from fusewire.custom_ops.providers.symm_mem.layout import Layout
from fusewire.errors import PeerTimeoutError

from .ptx import BITS, assembled, butterflies
from .quick_interpreter import make_quick
from .simulated_arithmetic import array_of, bits16, fused, group_largest, make_tensor, rounded, shape_of
from .simulated_calls import (
    DATA_TOKENS,
    LIMIT_S,
    MAX_TOKENS,
    ONE_SHOT_TOKENS,
    check_call,
    check_differing,
    check_late,
    check_missing,
    launch_of,
    make_call,
    note_results,
    protocol_of,
    refer,
    wait_for_ever_but,
)


class CpuWorkspace(spaces.SymmMemWorkspace):
    """A workspace whose buffers are CPU memory: same layout, same control block. `multiprocessors`:
    of this rank's GPU; `plan_alike` makes launches be planned by the least of all ranks.
    """

    def __init__(self, rank, buffers, layout, dtype, multiprocessors):
        self.rank, self.world_size, self.hidden, self.dtype = rank, layout.world_size, layout.hidden, dtype
        self.group_name, self.timeout_s, self.device = "simulated", LIMIT_S, torch.device("cpu")
        self.layout, self.multiprocessors, self._buffer = layout, multiprocessors, buffers[rank]
        self.own_multiprocessors = multiprocessors
        self._outputs = self._output_tensors()
        self._host_error = torch.zeros(1, dtype=torch.int64)
        self._error_word = ctypes.c_int64.from_address(self._host_error.data_ptr())
        self.ctl = self._control_block([buffer.data_ptr() for buffer in buffers])
        self._limit_ns, self._limit_stream = torch.zeros(1, dtype=torch.int64), None
        self.replays = False  # as of a CUDA graph: no host code runs

    def check(self, synchronize=False):
        if not self.replays:
            super().check(synchronize)


def plan_alike(workspaces):
    """What the vote of the ranks comes to: each tells its number, and all plan by the same."""
    facts = [{"multiprocessors": ws.own_multiprocessors} for ws in workspaces]
    for ws in workspaces:
        ws.multiprocessors = symm_mem_protocol.least_multiprocessors(facts)


class Block:
    """A block of a launch: a thread that runs only while the machine lets it."""

    def __init__(self, machine, fn, args, programs, pid, threads):
        self.machine, self.grid, self.threads = machine, (programs, pid), threads
        self.pending = {}  # stores not yet in memory, by address, oldest first: [bytes, thread, seen by the block]
        self.polled = None  # the version of memory of its last fruitless poll
        self.over = False
        # Some blocks, and some blocks' stores, come last: only when nothing else can go on.
        self.starved, self.lazy = machine.random.random() < 0.25, machine.random.random() < 0.25
        self.go, self.fn, self.args = threading.Lock(), fn, args
        self.go.acquire()
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
        """What this thread stored, and what it saw of others at a barrier, goes before what it
        stores next.
        """
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
    """A rank's stream: one launch after the other.

    `dies`: (call, turns), when it stops for good; or, if it `returns`, until nothing else can go
    on. `resident`: how many blocks of a launch are on the GPU at once; the next starts when one
    ends, in the order of their numbers or in `any_order`.
    """

    def __init__(self, machine, ws, calls, dies=None, returns=False, resident=None, any_order=False):
        self.machine, self.ws, self.calls, self.dies, self.returns = machine, ws, calls, dies, returns
        self.resident, self.any_order = resident, any_order
        self.blocks, self.next, self.begun, self.turns, self.error = [], 0, 0, 0, None

    @property
    def dead(self):
        return self.dies is not None and (self.next - 1, self.turns) >= self.dies

    @property
    def finished(self):
        if self.dead:
            return not self.returns
        return not self.blocks and (self.next == len(self.calls) or self.error is not None)

    @property
    def running(self):
        """The blocks that are on the GPU."""
        return [] if self.dead else [block for block in self.blocks if not block.over][: self.resident]

    def come_back(self):
        """Go on where it stopped."""
        self.dies = None
        if self.begun < self.next:  # just before a call
            self.begin(self.calls[self.begun])

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
            launch = launch_of(self.ws, call, call.ranks[self.ws.rank])
        except PeerTimeoutError as error:
            self.error = error
            return
        self.begun += 1
        note_results(call.ranks[self.ws.rank], launch)
        assert not check_launch_config(
            launch.config, self.ws.layout.packets, self.ws.own_multiprocessors, launch.kernel
        )
        refer(call, launch.config, self.ws)
        self.blocks = self.machine.blocks_of(launch)
        if self.any_order:
            self.machine.random.shuffle(self.blocks)

    def end(self):
        for block in self.blocks:
            block.flush()
        self.blocks = []
        call = self.calls[self.next - 1]
        if call.options.get("output") is not None:  # it lives until the next call
            mine = call.ranks[self.ws.rank]
            target = mine.norm_out if call.kind == "two_shot_sharded" else mine.residual_out
            if target is None:
                mine.quantized = mine.quantized.clone()
            else:
                target.copy_(self.ws.output(call.options["output"], call.tokens))


class Machine:
    """All ranks, their memory and the clock."""

    def __init__(self, seed):
        self.random, self.now, self.version, self.spinning = random.Random(seed), 1, 0, False
        self.back, self.failure, self.running, self.ranks = threading.Lock(), None, None, []
        self.back.acquire()
        self.idle = lambda: None  # called when nothing more will happen
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

    def blocks_of(self, launch):
        from triton.runtime import interpreter

        function, args = symm_mem.kernel(launch.kernel), (*launch.tensors, *launch.arguments)
        fn = function.rewrite()
        grid = interpreter.GridExecutor(fn, function.arg_names, (1, 1, 1))
        for value in args:
            if isinstance(value, torch.Tensor) and value.numel():
                self.hold(value)
        values = dict(zip(function.arg_names, args, strict=True))
        values = {k: v if k in grid.constexprs else interpreter._implicit_cvt(v) for k, v in values.items()}
        programs, threads = launch.config.programs, launch.config.threads
        return [Block(self, fn, values, programs, pid, threads) for pid in range(programs)]

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
            live = [(block, rank) for rank in self.ranks for block in rank.running]
            late = [b for rank in self.ranks if not rank.dead for b in rank.blocks if b.pending]
            soon = [block for block in late if not block.lazy]
            if soon and self.random.random() < 0.5:
                self.random.choice(soon).flush(self.random.choice((0.2, 0.7, 1.0)))
            ready = [pair for pair in live if pair[0].polled != self.version]
            first = [pair for pair in ready if not pair[0].starved]
            if first:
                self.resume(*self.random.choice(first))
                spins = 0
            elif any(not (r.finished or r.dead) and all(block.over for block in r.blocks) for r in self.ranks):
                continue  # it goes on to its next call before any block that is starved
            elif ready:
                self.resume(*self.random.choice(ready))
                spins = 0
            elif late:
                self.random.choice(late).flush(self.random.choice((0.1, 0.5)))
            elif away := [rank for rank in self.ranks if rank.dead and rank.returns]:
                away[0].come_back()
            elif live:
                spins += 1
                assert spins < 100, "a wait goes on for ever"
                self.spin(live)
                continue
            self.spinning = False

    def spin(self, live):
        """Nothing will happen but that time passes: let everyone look at the clock."""
        self.idle()
        self.now += int(LIMIT_S * 1e9 / 16)
        self.spinning = True
        for block, rank in live:
            self.resume(block, rank)
        self.spinning = False


def inline_asm(machine, asm, constraints, args, dtype, is_pure, pack):
    """PTX for every lane; if a poll was fruitless, other blocks run before the next."""
    if "shfl" in asm:
        values = butterflies(asm, array_of(args[0]), machine.running.threads)
        return make_tensor(values, list(values.shape), tl.int32)
    block, program = machine.running, assembled(asm)
    if machine.random.random() < 0.15:
        block.starved = machine.random.random() < 0.3
        block.switch()
    kinds = [kind.strip("=&") for kind in constraints.split(",")]
    outs = constraints.count("=")
    shape = shape_of(*args)
    places = [(program.slot(f"${i}"), BITS[64 if kinds[i] == "l" else 32]) for i in range(outs, len(kinds))]
    columns = np.broadcast_arrays(*map(array_of, args)) if args else []
    lanes = []
    for values in zip(*(c.ravel().tolist() for c in columns), strict=True) if args else [()]:
        registers = program.initial.copy()
        for (slot, mask), value in zip(places, values, strict=True):
            registers[slot] = int(value) & mask
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
        slot = program.slot(f"${k}")
        values = [registers[slot] for registers, _ in lanes]
        out.append(make_tensor(np.array(values, numpy[0]).view(numpy[1]), shape, kind))
    return tuple(out) if isinstance(dtype, tuple) else out[0]


def install(machine):
    """Make the interpreter run the kernels on this machine."""
    from triton.runtime import interpreter

    make_quick()
    for module in (arithmetic, blocks, quantize, one_shot, two_shot_data, two_shot_flags):
        for name, value in list(vars(module).items()):
            if isinstance(value, tl.constexpr):
                setattr(module, name, value.value)
    arithmetic._bits16, arithmetic.rounded, quantize.rounded, quantize.fused = bits16, rounded, rounded, fused
    quantize.group_largest = group_largest
    if interpreter._patch_lang.__name__ == "_patch_lang":
        for function in (one_shot.one_shot_kernel, tl.standard.max):  # once for all, not at every call
            interpreter._patch_lang(function.fn)
        interpreter._patch_lang = lambda fn: None
    # Its scalars are arrays of one element, which NumPy no longer takes for numbers.
    tl.tensor.__index__ = lambda self: int(array_of(self).reshape(-1)[0])
    tl.tensor.__bool__ = lambda self: bool(array_of(self).all())
    tl.inline_asm_elementwise = functools.partial(inline_asm, machine)
    tl.debug_barrier = lambda: machine.running.barrier()


def simulate(
    world, hidden, dtype, specs, seed=0, multiprocessors=3, missing=None, late=None,
    delayed=None, resident=None, any_order=False, ended=False,
):  # fmt: skip
    """Run the calls on all ranks. `multiprocessors`: of every rank's GPU, or a tuple of each
    rank's. `missing`: (rank, call, turns), a rank that stops in the middle of a call. `late`:
    likewise, but it goes on once the others have ended all their calls, which are replays and so go
    on after an error. `delayed`: likewise, but it goes on once nobody else can, so before any time
    limit. `resident`, `any_order`: see `Rank`; `resident` is a tuple of each rank's. `ended`: no
    limit but that after the end of the missing rank's process.
    """
    torch.manual_seed(seed)
    machine = Machine(seed)
    install(machine)
    layout = Layout(world, hidden, dtype.itemsize, ONE_SHOT_TOKENS, DATA_TOKENS, MAX_TOKENS, 1)
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
        gone, ws.replays = missing or late or delayed, late is not None
        dies = gone[1:] if gone and gone[0] == rank else None
        fits = resident[rank] if resident else None
        machine.ranks.append(Rank(machine, ws, calls, dies, delayed is not None, fits, any_order))
    if ended:
        wait_for_ever_but(machine, spaces_of_ranks, missing[0])
    machine.run()
    if late:
        check_late(machine, calls, late[0])
        return
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


def simulate_differing(world, hidden, dtype, alike, one, other):
    """All ranks make the calls `alike`; then the last rank makes the call `other` where the others
    make `one`."""
    machine = Machine(0)
    install(machine)
    layout = Layout(world, hidden, dtype.itemsize, ONE_SHOT_TOKENS, DATA_TOKENS, MAX_TOKENS, 1)
    buffers = [torch.zeros(layout.nbytes + 16, dtype=torch.uint8)[: layout.nbytes] for _ in range(world)]
    calls = [make_call(kind, tokens, world, hidden, dtype, **options) for kind, tokens, options in (*alike, one, other)]
    for rank, buffer in enumerate(buffers):
        machine.hold(buffer)
        for name in layout.ones:
            buffer[layout.offsets[name] : layout.offsets[name] + layout.sizes[name]] = 255
        ws = CpuWorkspace(rank, buffers, layout, dtype, 3)
        machine.hold(ws._host_error)
        machine.ranks.append(Rank(machine, ws, [*calls[:-2], calls[-1 if rank == world - 1 else -2]]))
    machine.run()
    check_differing(machine, calls)
