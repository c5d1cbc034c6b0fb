"""The `symm_mem` kernels without a GPU: compiled for sm_90 as the host would launch them, and simulated.

Compilation: what the host functions hand to Triton is caught and compiled, and the PTX is held to what the
kernels rely on: 16-byte accesses on the data path, one owner per element, fences and barriers in order.

Simulation: Triton's interpreter runs every block of every rank in a process of its own, on memory that they
share, with random delays; the few primitives that are PTX have doubles here. So index arithmetic, flags,
slots and the order of pushes and waits are those of the real kernels; memory ordering is only the CPU's.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import mmap
import multiprocessing
import os
import random
import re
import subprocess
import sys
import time
import traceback
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import numpy as np
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fusewire.custom_ops.providers import symm_mem
from fusewire.custom_ops.providers import symm_mem_blocks as blocks
from fusewire.custom_ops.providers import symm_mem_flags as flags
from fusewire.custom_ops.providers import symm_mem_kernels as kernels
from fusewire.custom_ops.providers import symm_mem_math as arithmetic
from fusewire.custom_ops.providers import symm_mem_ptx as ptx
from fusewire.custom_ops.providers import symm_mem_workspace as spaces
from fusewire.custom_ops.providers.symm_mem_plan import Plan, check_plan
from fusewire.errors import ArgumentError, WorkspaceError

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SCALE, ROUND = "scale_then_round", "round_then_scale"
POINTERS = {BF16: "*bf16", FP16: "*fp16", FP32: "*fp32", torch.int64: "*i64"}


class CpuWorkspace(spaces.SymmMemWorkspace):
    """A workspace in CPU memory; `peers` are the buffers of all ranks."""

    def __init__(self, rank, world, hidden, dtype, tokens=(256, 1024, 8192), outputs=1, multiprocessors=132):
        self.rank, self.world_size, self.hidden, self.dtype = rank, world, hidden, dtype
        self.group_name, self.timeout_s, self.device = "simulated", 5.0, torch.device("cpu")
        self.multiprocessors = multiprocessors
        self.layout = spaces.Layout(world, hidden, dtype.itemsize, *tokens, outputs)
        self.ctl = torch.zeros(spaces.CTL_WORDS, dtype=torch.int64)
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def check(self, synchronize=False):
        pass

    def map(self, buffers):
        self._buffer = buffers[self.rank]
        self.ctl = shared_tensor((spaces.CTL_WORDS,), torch.int64).zero_()
        places = torch.tensor([buffer.data_ptr() for buffer in buffers])
        self.ctl[spaces.CTL_PEERS : spaces.CTL_PEERS + self.world_size] = places


def caught_launch(call):
    """What the host would launch: name, plan and arguments."""
    seen = []
    original, symm_mem._run = symm_mem._run, lambda key, name, ws, plan, args: seen.append((name, plan, args))
    try:
        call()
    finally:
        symm_mem._run = original
    assert len(seen) == 1
    return seen[0]


# --- Compilation --------------------------------------------------------------------------------------------


def compiled(name, plan, args):
    fn = getattr(kernels, name, None) or getattr(flags, name)
    signature, constants, attributes = {}, {}, {}
    for i, (param, value) in enumerate(zip(fn.params, args, strict=True)):
        if param.is_constexpr or value is None:
            signature[param.name], constants[param.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[param.name] = POINTERS[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[param.name] = param.annotation_type
            assert param.annotation_type in ("i32", "i64", "fp32")
    source = ASTSource(fn=fn, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": plan.warps, "maxnreg": plan.registers, "launch_pdl": plan.pdl}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def call_on_cpu(kind, world, hidden, dtype, tokens, weight=BF16, form=SCALE, residual=True, **options):
    pdl = options.pop("pdl", False)
    ws = CpuWorkspace(1, world, hidden, dtype, tokens=(tokens, tokens, tokens))
    ws._buffer = torch.empty(ws.layout.nbytes, dtype=torch.uint8)
    x = torch.zeros(tokens, hidden, dtype=dtype)
    rows = spaces.shard_rows(tokens, world) if kind == "two_shot_sharded" else tokens
    args = (
        ws,
        x,
        torch.zeros(rows, hidden, dtype=dtype) if residual else None,
        None if weight is None else torch.zeros(hidden, dtype=weight),
    )
    launch = caught_launch(lambda: getattr(symm_mem, kind)(*args, 1e-5, 1.0, form, **options))
    plan = dataclasses.replace(launch[1], pdl=pdl)
    assert check_plan(plan, ws.layout.packets, ws.multiprocessors) is None
    return launch[0], plan, (*launch[2][:-1], pdl)


VARIANTS = [
    ("one_shot", 2, 8192, BF16, 1, {}),
    ("one_shot", 4, 8192, BF16, 1, {"pdl": True}),
    ("one_shot", 8, 8192, BF16, 16, {"weight": FP32}),
    ("one_shot", 3, 2880, FP16, 64, {"weight": FP16, "form": ROUND, "residual": False}),
    ("one_shot", 7, 7168, BF16, 128, {"weight": None, "need_residual": False}),
    ("one_shot", 4, 16384, FP32, 4, {"weight": BF16}),
    ("two_shot_sharded", 4, 8192, BF16, 64, {"protocol": "data"}),
    ("two_shot_sharded", 8, 8192, BF16, 512, {"protocol": "data", "pdl": True}),
    ("two_shot", 4, 8192, BF16, 256, {"protocol": "data", "weight": torch.float64}),
    ("two_shot", 5, 5376, FP32, 33, {"protocol": "data", "weight": FP32, "residual": False}),
    ("two_shot_sharded", 6, 2880, FP16, 100, {"protocol": "data", "need_residual": False}),
    ("two_shot_sharded", 4, 8192, BF16, 2048, {"protocol": "flags", "output": 0}),
    ("two_shot_sharded", 2, 4096, BF16, 1000, {"protocol": "flags", "weight": None}),
    ("two_shot", 8, 8192, BF16, 8192, {"protocol": "flags", "output": 0}),
    ("two_shot", 3, 7168, FP16, 1025, {"protocol": "flags", "form": ROUND, "weight": FP32}),
    ("two_shot", 4, 16384, FP32, 64, {"protocol": "flags", "residual": False, "pdl": True}),
]


@pytest.mark.parametrize(
    ("kind", "world", "hidden", "dtype", "tokens", "options"),
    VARIANTS,
    ids=[f"{v[0]}-{v[1]}x{v[2]}-{str(v[3])[6:]}-{v[4]}" + "".join(f"-{o}" for o in v[5]) for v in VARIANTS],
)
def test_compiles_to_wide_accesses_in_order(kind, world, hidden, dtype, tokens, options):
    name, plan, args = call_on_cpu(kind, world, hidden, dtype, tokens, **options)
    kernel = compiled(name, plan, args)
    text, ir = kernel.asm["ptx"], kernel.asm["ttgir"]
    layouts = re.findall(r"^#\w+ = #ttg\..*", ir, re.MULTILINE)
    # One layout, one element a thread at a time: no packet belongs to two threads.
    assert len(layouts) == 1
    assert "sizePerThread = [1]" in layouts[0]
    assert "convert_layout" not in ir
    assert min(map(int, re.findall(r"tensor<(\d+)x", ir))) >= plan.threads
    # Data moves 16 bytes at a time; narrower are addresses, flags, tagged words and a narrow weight.
    accesses = re.findall(r"\b(?:ld|st)(?:\.\w+)*\.global(\.[\w.]+)", text)
    narrow = {".b64", ".v2.b32"} if dtype == FP32 and options.get("weight", BF16) != FP32 else {".b64"}
    assert set(accesses) <= {".v4.b32", *narrow}
    pushes = text.count("st.relaxed.sys.global.v4.b32")
    assert "multimem" not in text
    if name == "two_shot_flags_kernel":
        assert pushes == 0
        assert text.count("fence.acq_rel.sys") == 1
        order = [m.group(1) for m in re.finditer(r"(bar\.sync|fence\.acq_rel|ld\.acquire|st\.global\.v4)", text)]
        fence = order.index("fence.acq_rel")
        assert order[fence - 1] == "bar.sync"
        assert all(order[i + 1] == "bar.sync" for i, what in enumerate(order) if what == "ld.acquire")
    else:
        assert pushes >= world - 1
        assert "fence" not in text
    assert ("griddepcontrol.wait" in text) == plan.pdl


@pytest.mark.parametrize("hidden", [2880, 4096, 5120, 5376, 7168, 8192, 16384])
@pytest.mark.parametrize("world", range(2, 9))
def test_default_plans_fit(world, hidden):
    for dtype in (BF16, FP32):
        packets = hidden * dtype.itemsize // 16
        for tokens in (1, 2, 3, 5, 16, 31, 33, 64, 128, 257, 1000, 4096, 8192):
            shard = spaces.shard_rows(tokens, world)
            plans = [
                symm_mem.plan_one_shot(tokens, packets, 132),
                symm_mem.plan_two_shot_data(shard, packets, world, 132),
                symm_mem.plan_two_shot_flags(shard, packets, 132),
            ]
            assert [check_plan(plan, packets, 132) for plan in plans] == [None] * 3
            owned = [spaces.owned_rows(tokens, world, rank) for rank in range(world)]
            assert sum(owned) == tokens
            assert max(owned) == owned[0] == shard


def test_areas_of_the_buffer_do_not_overlap():
    layout = spaces.Layout(8, 8192, 2, 128, 512, 8192, 2)
    ends = 0
    for name, start in sorted(layout.offsets.items(), key=lambda item: item[1]):
        assert start >= ends
        assert start % 16 == 0
        ends = start + layout.sizes[name]
    assert layout.nbytes == ends


@pytest.mark.parametrize(
    ("error", "kind", "change"),
    [
        (ArgumentError, "one_shot", {"x": torch.zeros(2, 128, dtype=BF16)}),
        (ArgumentError, "one_shot", {"x": torch.zeros(2, 64, dtype=FP16)}),
        (ArgumentError, "one_shot", {"x": torch.zeros(9, 64, dtype=BF16)}),
        (ArgumentError, "one_shot", {"residual": torch.zeros(2, 64)}),
        (ArgumentError, "one_shot", {"weight": torch.zeros(63)}),
        (ArgumentError, "one_shot", {"form": "neither"}),
        (ArgumentError, "one_shot", {"norm_out": torch.zeros(2, 64)}),
        (ArgumentError, "two_shot", {"protocol": "barrier"}),
        (ArgumentError, "two_shot", {"x": torch.zeros(17, 64, dtype=BF16), "protocol": "data"}),
        (ArgumentError, "two_shot", {"output": 0, "protocol": "data"}),
        (ArgumentError, "two_shot", {"output": 1}),
        (ArgumentError, "two_shot", {"output": 0, "need_residual": False}),
        (ArgumentError, "two_shot_sharded", {"residual": torch.zeros(2, 64, dtype=BF16)}),
        (WorkspaceError, "two_shot_sharded", {"closed": True}),
    ],
)
def test_refuses(error, kind, change):
    ws = CpuWorkspace(0, 2, 64, BF16, tokens=(8, 16, 32))
    ws._buffer = None if change.pop("closed", False) else torch.empty(ws.layout.nbytes, dtype=torch.uint8)
    call = {"x": torch.zeros(2, 64, dtype=BF16), "residual": None, "weight": None, "form": SCALE, **change}
    with pytest.raises(error):
        getattr(symm_mem, kind)(ws, eps=1e-5, weight_bias=0.0, **call)


# --- Simulation ---------------------------------------------------------------------------------------------

_KEEP = []
_LOCK = multiprocessing.Lock()
_HANG_S = 60.0


def shared_tensor(shape, dtype):
    """A tensor in memory that forked processes share."""
    count = int(np.prod(shape))
    memory = mmap.mmap(-1, max(1, count) * dtype.itemsize)
    _KEEP.append(memory)
    return torch.frombuffer(memory, dtype=dtype, count=max(1, count))[:count].view(shape)


def _array(value):
    return np.asarray(value.handle.data if isinstance(value, tl.tensor) else getattr(value, "value", value))


def _lanes(*values):
    """Operands broadcast and flattened, and a function that makes a tensor of their shape of flat results."""
    from triton.runtime.interpreter import TensorHandle

    arrays = np.broadcast_arrays(*map(_array, values))
    blocky = [value for value in values if isinstance(value, tl.tensor) and value.type.is_block()]
    shape = list(arrays[0].shape) if blocky else []

    def tensor(flat, dtype=tl.int32):
        data = np.asarray(flat).reshape(shape or [1])
        return tl.tensor(TensorHandle(data, dtype), tl.block_type(dtype, shape) if shape else dtype)

    return [array.ravel() for array in arrays], tensor


def _until(ready):
    start, tries = time.monotonic(), 0
    while not ready():
        tries += 1
        time.sleep(0 if tries < 50 else 0.0005)
        if time.monotonic() - start > _HANG_S:
            raise TimeoutError("a wait did not end")


def _word(address, kind=ctypes.c_uint64):
    return kind.from_address(int(address))


def _load(words):
    def load(addr, mask, *_):
        (at, on), tensor = _lanes(addr, mask)
        zeros = bytes(4 * words)
        rows = [ctypes.string_at(int(a), 4 * words) if m else zeros for a, m in zip(at, on, strict=True)]
        columns = np.frombuffer(b"".join(rows), np.int32).reshape(-1, words).T
        return tuple(tensor(column) for column in columns)

    return load


def load_i64(addr, mask):
    (at, on), tensor = _lanes(addr, mask)
    return tensor([_word(a, ctypes.c_int64).value if m else 0 for a, m in zip(at, on, strict=True)], tl.int64)


def store16(addr, words, mask, POLLED):
    if random.random() < 0.03:
        time.sleep(0.2)  # a block that falls behind: peers run ahead as far as the protocol lets them
    (at, on, *columns), _ = _lanes(addr, mask, *words[:4])
    for i in np.nonzero(on)[0]:
        data = np.array([column[i] for column in columns], np.int32).tobytes()
        ctypes.memmove(int(at[i]), data, 16)


def poll16(addrs, ctl, code, rank, N, RANK_STEP, LATE):
    at, tensor = _lanes(*addrs)
    out = np.zeros((4 * N, len(at[0])), np.int32)
    for i in range(len(at[0])):

        def arrived(i=i):
            rows = [np.frombuffer(ctypes.string_at(int(at[j][i]), 16), np.int32) for j in range(N)]
            out[:, i] = np.concatenate(rows)
            return -1 not in out[:, i]

        _until(arrived)
    return tuple(tensor(row) for row in out)


def put_tagged(addr, value, tag, mask):
    (at, bits, tags, on), _ = _lanes(addr, value.to(tl.int32, bitcast=True), tag, mask)
    for i in np.nonzero(on)[0]:
        _word(at[i]).value = int(tags[i]) << 32 | int(np.uint32(bits[i].astype(np.int32).view(np.uint32)))


def poll_tagged(addrs, tag, ctl, code, rank, N, LATE):
    (tags, *at), tensor = _lanes(tag, *addrs)
    out = np.zeros((N, len(tags)), np.uint32)
    for j in range(N):
        for i in range(len(tags)):
            _until(lambda i=i, j=j: _word(at[j][i]).value >> 32 == int(tags[i]))
            out[j, i] = _word(at[j][i]).value & 0xFFFFFFFF
    return tuple(tensor(row.view(np.int32)) for row in out)


def set_flags(a, at_a, b, at_b, value):
    (on_a, to_a, on_b, to_b, values), _ = _lanes(a, at_a, b, at_b, value)
    for on, to in ((on_a, to_a), (on_b, to_b)):
        for i in np.nonzero(on)[0]:
            _word(to[i]).value = int(values[i])


def wait_flag(addr, value, mask, ctl, code, rank, LATE):
    (at, values, on), tensor = _lanes(addr, value, mask)
    for i in np.nonzero(on)[0]:
        _until(lambda i=i: _word(at[i]).value == int(values[i]))
    return tensor(np.zeros(len(at), np.int32))


def read_counter(addr):
    (at,), tensor = _lanes(addr)
    return tensor([_word(at[0]).value], tl.int64)


def add_counter(addr, amount, mask):
    (at, amounts, on), _ = _lanes(addr, amount, mask)
    for i in np.nonzero(on)[0]:
        with _LOCK:
            _word(at[i]).value += int(amounts[i])


def _cast(value, kind):
    dtype = (BF16, FP16, FP32)[int(kind)]
    return torch.from_numpy(np.array(_array(value), np.float32)).to(dtype)


def _bits16(value, kind):
    _, tensor = _lanes(value)
    return tensor(_cast(value, kind).view(torch.int16).numpy().astype(np.int32) & 0xFFFF)


def rounded(value, kind):  # the interpreter truncates to bf16
    _, tensor = _lanes(value)
    return tensor(_cast(value, kind).float().numpy(), tl.float32)


def install_doubles():
    """Replace what is PTX, and what the interpreter cannot do, in the kernels' modules."""
    from triton.runtime import interpreter

    doubles = {"load16": _load(4), "load8": _load(2), "_bits16": _bits16, "rounded": rounded}
    doubles |= {f.__name__: f for f in (load_i64, store16, poll16, put_tagged, poll_tagged, set_flags)}
    doubles |= {f.__name__: f for f in (wait_flag, read_counter, add_counter)}
    for module in (ptx, arithmetic, blocks, kernels, flags):
        for name, value in list(vars(module).items()):
            if name in doubles:
                setattr(module, name, doubles[name])
            elif isinstance(value, tl.constexpr):
                setattr(module, name, value.value)
    original = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        original(tensor, scope)  # its scalars are arrays of one element, which NumPy no longer takes for numbers
        scope.set_attr(tensor, "__index__", lambda self: int(_array(self).reshape(-1)[0]))
        scope.set_attr(tensor, "__bool__", lambda self: bool(_array(self).all()))

    interpreter._patch_lang_tensor = patch


def run_block(name, args, programs, pid):
    from triton.runtime import interpreter

    fn = getattr(kernels, name, None) or getattr(flags, name)
    grid = interpreter.GridExecutor(fn.rewrite(), fn.arg_names, (programs, 1, 1))
    scope = interpreter._patch_lang(grid.fn)
    try:
        values = dict(zip(fn.arg_names, args, strict=True))
        values = {k: v if k in grid.constexprs else interpreter._implicit_cvt(v) for k, v in values.items()}
        interpreter.interpreter_builder.set_grid_dim(programs, 1, 1)
        interpreter.interpreter_builder.set_grid_idx(pid, 0, 0)
        grid.fn(**values)
    finally:
        scope.restore()


def forked(work):
    pid = os.fork()
    if pid == 0:
        code = 1
        with contextlib.suppress(BaseException):
            try:
                random.seed()
                work()
                code = 0
            except BaseException:
                traceback.print_exc()
        os._exit(code)
    return pid


def joined(pids):
    results = [os.waitpid(pid, 0)[1] for pid in pids]
    if any(results):
        raise RuntimeError(f"processes failed: {results}")


def rank_program(ws, calls):
    """One rank's stream: call after call, each with all its blocks at once."""
    for call in calls:
        time.sleep(random.random() * 0.05)
        mine = call.ranks[ws.rank]
        launch = caught_launch(lambda call=call, mine=mine: run_host(ws, call, mine))
        name, plan, args = launch
        assert check_plan(plan, ws.layout.packets, ws.multiprocessors) is None
        order = random.sample(range(plan.programs), plan.programs)
        work = [lambda p=p, a=(name, args, plan.programs): run_block(*a, p) for p in order]
        joined([forked(w) for w in work])
        if call.options.get("output") is not None:  # it lives until the next call
            target = mine.norm_out if call.kind == "two_shot_sharded" else mine.residual_out
            target.copy_(ws.output(call.options["output"], call.tokens))


def run_host(ws, call, mine):
    outs = {"norm_out": mine.norm_out, "residual_out": mine.residual_out}
    if call.options.get("output") is not None:
        outs.pop("norm_out" if call.kind == "two_shot_sharded" else "residual_out")
    function = getattr(symm_mem, call.kind)
    function(ws, mine.x, mine.residual, call.weight, 1e-5, call.bias, call.form, **outs, **call.options)


def make_call(kind, tokens, world, hidden, dtype, residual=True, weight=BF16, bias=0.0, form=SCALE, **options):
    """Inputs of all ranks, places for their results, and the exact ones. Holds -0.0, NaN and the sentinel."""
    parts = [torch.randn(tokens, hidden).to(dtype) for _ in range(world)]
    if tokens > 1:
        parts[0].view(torch.int16 if dtype.itemsize == 2 else torch.int32)[0, 2:4] = -1
        for part in parts:
            part[-1, 5] = -0.0
    full = torch.randn(tokens, hidden).to(dtype) if residual else None
    scale = None if weight is None else torch.randn(hidden).to(weight)
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    total = total.to(dtype)
    if full is not None:
        full[-1, 5] = -0.0
        total = (total.float() + full.float()).to(dtype)
    norm = total.double() * torch.rsqrt(total.double().pow(2).mean(-1, keepdim=True) + 1e-5)
    norm = norm.to(dtype).double() if form == ROUND else norm
    norm = norm if scale is None else norm * (scale.double() + bias)
    shard, ranks = spaces.shard_rows(tokens, world), []
    for rank, part in enumerate(parts):
        rows = slice(rank * shard, (rank + 1) * shard) if kind == "two_shot_sharded" else slice(None)
        mine = SimpleNamespace(x=shared_tensor(part.shape, dtype).copy_(part), residual=None)
        if full is not None:
            mine.residual = shared_tensor(full[rows].shape, dtype).copy_(full[rows])
        mine.norm_out = shared_tensor(part.shape, dtype).fill_(77)
        kept = shard if kind == "two_shot_sharded" else tokens
        mine.residual_out = shared_tensor((kept, hidden), dtype).fill_(77)
        mine.total = total[rows]
        ranks.append(mine)
    return SimpleNamespace(
        kind=kind, tokens=tokens, weight=scale, bias=bias, form=form, options=options, ranks=ranks, norm=norm
    )


def check_call(call, dtype):
    bits = torch.int16 if dtype.itemsize == 2 else torch.int32
    ulp = {BF16: 2**-7, FP16: 2**-10, FP32: 1e-5}[dtype]
    for mine in call.ranks:
        kept = mine.residual_out[: len(mine.total)]
        nans = mine.total.isnan()
        assert torch.equal(kept.isnan(), nans)
        assert torch.equal(kept.view(bits)[~nans], mine.total.view(bits)[~nans]), "residual"
        assert (mine.residual_out[len(mine.total) :] == 77).all(), "rows of nobody"
        nans = call.norm.isnan()
        assert torch.equal(mine.norm_out.isnan(), nans)
        error = (mine.norm_out.double() - call.norm).abs() / (call.norm.abs() + 1e-2)
        assert error[~nans].max() <= ulp * 1.01 if (~nans).any() else True, "norm"
        equal = mine.norm_out.view(bits) == call.ranks[0].norm_out.view(bits)
        assert (equal | nans).all(), "ranks differ"


def simulate(world, hidden, dtype, specs, multiprocessors=3):
    torch.set_num_threads(1)
    install_doubles()
    torch.manual_seed(0)
    spaces_of = [CpuWorkspace(rank, world, hidden, dtype, (8, 16, 24), 1, multiprocessors) for rank in range(world)]
    buffers = [shared_tensor((spaces_of[0].layout.nbytes,), torch.uint8).zero_() for _ in range(world)]
    layout = spaces_of[0].layout
    areas = [slice(layout.offsets[n], layout.offsets[n] + layout.sizes[n]) for n in layout.ones]
    for buffer in buffers:
        for area in areas:
            buffer[area] = 255
    calls = [make_call(kind, tokens, world, hidden, dtype, **options) for kind, tokens, options in specs]
    for ws in spaces_of:
        ws.map(buffers)
    joined([forked(lambda ws=ws: rank_program(ws, calls)) for ws in spaces_of])
    for call in calls:
        check_call(call, dtype)
    for ws, buffer in zip(spaces_of, buffers, strict=True):
        assert all((buffer[area] == 255).all() for area in areas), "packets were left behind"
        launches = [sum(kind == k for k in map(protocol_of, specs)) for kind in ("one", "data", "flags")]
        assert [int(c) for c in ws.ctl[:3]] == [n << 16 for n in launches], "counters"


def protocol_of(spec):
    kind, tokens, options = spec
    if kind == "one_shot":
        return "one"
    default = "data" if tokens <= 16 and options.get("output") is None else "flags"
    return options.get("protocol", default)


def _flags(programs, ahead, lag):
    return Plan(programs, 1, 32, ahead=ahead, lag=lag)


SCENARIOS = {
    "one-shot, slices, 3 ranks": (3, 264, FP32, [
        ("one_shot", 2, {"plan": Plan(3, 1, 32, slices=3), "bias": 1.0}),
        ("one_shot", 1, {"plan": Plan(2, 1, 64, slices=2)}),
        ("one_shot", 4, {"plan": Plan(2, 1, 64, slices=2), "residual": False, "weight": FP32}),
    ]),
    "one-shot, racing, 3 ranks": (3, 64, BF16, [("one_shot", 1 + i % 2, {}) for i in range(6)]),
    "two-shot, data, 3 ranks": (3, 72, FP16, [
        ("two_shot_sharded", 8, {"plan": Plan(3, 1, 32, slices=2, unroll=2), "weight": None}),
        ("two_shot", 7, {"form": ROUND, "weight": FP16}),
        ("two_shot", 1, {"residual": False, "weight": FP32}),
        ("two_shot_sharded", 4, {"plan": Plan(3, 1, 32, unroll=4)}),
    ]),
    "two-shot, flags, 3 ranks": (3, 72, FP32, [
        ("two_shot", 13, {"protocol": "flags", "plan": _flags(2, 1, 0)}),
        ("two_shot_sharded", 14, {"output": 0, "plan": _flags(1, 3, 2)}),
        ("two_shot", 15, {"output": 0, "plan": _flags(2, 2, 1), "residual": False}),
        ("two_shot_sharded", 2, {"protocol": "flags"}),
    ]),
    "all in turn, 4 ranks": (4, 64, BF16, [
        ("one_shot", 2, {}), ("two_shot_sharded", 6, {}), ("two_shot", 19, {}), ("one_shot", 3, {}),
        ("two_shot", 3, {}), ("one_shot", 8, {}),
    ]),
}  # fmt: skip


@pytest.mark.parametrize("name", SCENARIOS)
def test_simulated_ranks_agree_with_the_definition(name):
    from triton.runtime import interpreter

    if not all(hasattr(interpreter, n) for n in ("GridExecutor", "_patch_lang", "_implicit_cvt")):
        pytest.skip("this Triton's interpreter is not the one that this simulation knows")
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}; import importlib.util as u; "
               f"s = u.spec_from_file_location('simulation', {__file__!r}); m = u.module_from_spec(s); "
               f"s.loader.exec_module(m); m.simulate(*m.SCENARIOS[{name!r}])"]  # fmt: skip
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
