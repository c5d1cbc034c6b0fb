"""The `symm_mem` kernels without a GPU: compiled for sm_90 as the host would launch them.

What the host functions hand to Triton is caught and compiled, and the PTX is held to what the kernels rely
on: 16-byte accesses on the data path, one owner per element, fences and barriers in order.
"""

from __future__ import annotations

import re
import subprocess

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fusewire.custom_ops.ops.norms import NormSpec
from fusewire.custom_ops.ops.sharded_norm import rows_per_rank
from fusewire.custom_ops.providers.symm_mem import launcher as symm_mem
from fusewire.custom_ops.providers.symm_mem.arguments import Quantization
from fusewire.custom_ops.providers.symm_mem.kernels import peer_copy as symm_mem_copy
from fusewire.custom_ops.providers.symm_mem.kernels.packets import peer_at
from fusewire.custom_ops.providers.symm_mem.launch_config import (
    ONE_SHOT_KERNEL,
    LaunchConfig,
    check_launch_config,
    launch_config_one_shot,
    launch_config_two_shot_data,
    launch_config_two_shot_flags,
)
from fusewire.custom_ops.providers.symm_mem.layout import Layout, owned_rows
from fusewire.errors import ArgumentError, WorkspaceError

from support.launches import CpuWorkspace, compiled

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SCALE, ROUND = "scale_then_round", "round_then_scale"
WIDE_SCALE, WIDE_ROUND = "wide_sum_scale_then_round", "wide_sum_round_then_scale"


# --- Compilation --------------------------------------------------------------------------------------------


def call_on_cpu(
    kind, world, hidden, dtype, tokens, weight=BF16, form=SCALE, residual=True, inner=None, quant=None, with_norm=False,
    **options,
):  # fmt: skip
    if quant is not None:
        options["quantization"] = Quantization(quant, torch.ones(1) if quant == "tensor" else None, with_norm)
    if inner is not None:
        scale, inner_form = inner
        options["inner"] = NormSpec(None if scale is None else torch.zeros(hidden, dtype=scale), 1e-6, 1.0, inner_form)
    ws = CpuWorkspace(1, world, hidden, dtype, tokens=(tokens, tokens, tokens))
    ws.use(torch.empty(ws.layout.nbytes, dtype=torch.uint8))
    x = torch.zeros(tokens, hidden, dtype=dtype)
    rows = rows_per_rank(tokens, world) if kind == "two_shot_sharded" else tokens
    args = (
        ws,
        x,
        torch.zeros(rows, hidden, dtype=dtype) if residual else None,
        NormSpec(None if weight is None else torch.zeros(hidden, dtype=weight), 1e-5, 1.0, form),
    )
    launch = getattr(symm_mem, f"{kind}_launch")(*args, **options)
    assert check_launch_config(launch.config, ws.layout.packets, ws.multiprocessors, launch.kernel) is None
    return launch


VARIANTS = [
    ("one_shot", 2, 8192, BF16, 1, {}),
    ("one_shot", 4, 8192, BF16, 1, {}),
    ("one_shot", 8, 8192, BF16, 16, {"weight": FP32}),
    ("one_shot", 3, 2880, FP16, 64, {"weight": FP16, "form": ROUND, "residual": False}),
    ("one_shot", 7, 7168, BF16, 128, {"weight": None, "need_residual": False}),
    ("one_shot", 4, 16384, FP32, 4, {"weight": BF16}),
    ("two_shot_sharded", 4, 8192, BF16, 64, {"protocol": "data"}),
    ("two_shot_sharded", 8, 8192, BF16, 512, {"protocol": "data"}),
    ("two_shot", 4, 8192, BF16, 256, {"protocol": "data", "weight": torch.float64}),
    ("two_shot", 5, 5376, FP32, 33, {"protocol": "data", "weight": FP32, "residual": False}),
    ("two_shot_sharded", 6, 2880, FP16, 100, {"protocol": "data", "need_residual": False}),
    ("two_shot_sharded", 4, 8192, BF16, 2048, {"protocol": "flags", "output": 0}),
    ("two_shot_sharded", 2, 4096, BF16, 1000, {"protocol": "flags", "weight": None}),
    ("two_shot", 8, 8192, BF16, 8192, {"protocol": "flags", "output": 0}),
    ("two_shot", 3, 7168, FP16, 1025, {"protocol": "flags", "form": ROUND, "weight": FP32}),
    ("two_shot", 4, 16384, FP32, 64, {"protocol": "flags", "residual": False}),
    ("one_shot", 2, 5376, BF16, 1, {"inner": (BF16, SCALE)}),
    ("one_shot", 8, 16384, FP32, 4, {"inner": (BF16, SCALE), "weight": FP32}),
    ("one_shot", 4, 4096, FP16, 128, {"inner": (FP32, ROUND), "form": ROUND, "need_residual": False}),
    ("two_shot", 8, 5376, BF16, 256, {"protocol": "data", "inner": (BF16, SCALE)}),
    ("two_shot_sharded", 3, 2880, FP32, 5, {"protocol": "data", "inner": (None, SCALE), "weight": None}),
    ("two_shot", 4, 5376, BF16, 2048, {"protocol": "flags", "inner": (BF16, SCALE), "output": 0}),
    ("two_shot_sharded", 8, 16384, BF16, 8192, {"protocol": "flags", "inner": (FP32, ROUND), "output": 0}),
    ("two_shot", 2, 16384, FP32, 64, {"protocol": "flags", "inner": (torch.float64, SCALE)}),
    ("one_shot", 4, 8192, BF16, 1, {"form": WIDE_ROUND}),
    ("one_shot", 8, 5376, BF16, 64, {"form": WIDE_SCALE, "inner": (BF16, SCALE)}),
    ("two_shot", 4, 8192, BF16, 256, {"protocol": "data", "form": WIDE_ROUND}),
    ("two_shot_sharded", 4, 8192, BF16, 64, {"protocol": "data", "form": WIDE_ROUND}),
    ("two_shot_sharded", 8, 5376, FP16, 512, {"protocol": "data", "form": WIDE_SCALE, "inner": (BF16, SCALE)}),
    ("two_shot", 8, 8192, BF16, 8192, {"protocol": "flags", "form": WIDE_ROUND, "output": 0}),
    ("two_shot", 2, 4096, BF16, 2048, {"protocol": "flags", "form": WIDE_SCALE, "inner": (BF16, SCALE)}),
    ("two_shot_sharded", 4, 8192, BF16, 2048, {"protocol": "flags", "form": WIDE_ROUND, "output": 0}),
    ("two_shot_sharded", 2, 8192, BF16, 8192, {"protocol": "flags", "output": 0, "quant": "token"}),
    ("two_shot_sharded", 8, 8192, BF16, 8192, {"protocol": "flags", "quant": "group layout=columns"}),
    ("two_shot_sharded", 2, 4096, FP16, 1000, {"protocol": "flags", "quant": "tensor", "with_norm": True}),
    ("one_shot", 4, 8192, BF16, 1, {"quant": "token"}),
    ("one_shot", 2, 4096, FP16, 64, {"quant": "group", "with_norm": True}),
    ("two_shot", 4, 8192, BF16, 2048, {"protocol": "flags", "output": 0, "quant": "group"}),
]


def check_inner_adds_no_traffic(text, kind, world, hidden, dtype, tokens, options):
    """An inner norm stores no more packets than the kernel without it and loads only its weight besides; blocks
    that share a row exchange one more word.
    """
    inner_weight = options["inner"][0]
    plain_options = {name: value for name, value in options.items() if name != "inner"}
    launch = call_on_cpu(kind, world, hidden, dtype, tokens, **plain_options)
    plain, config = compiled(launch).asm["ptx"], launch.config

    def added(what):
        return text.count(what) - plain.count(what)

    tiles = config.block // config.threads
    assert added("st.global.v4.b32") == added("st.relaxed.sys.global.v4.b32") == 0
    assert added("st.relaxed.sys.global.b64 [%") == (tiles if config.slices > 1 else 0)
    size = {None: 0, BF16: 2, FP16: 2}.get(inner_weight, 4) * 16 // dtype.itemsize
    assert added("ld.global.v2.b32") == (tiles if size == 8 else 0)
    assert added("ld.global.v4.b32") == tiles * (size // 16)


def stack_bytes(kernel, tmp_path):
    """Bytes that a thread keeps in memory for want of registers."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    said = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)],
        capture_output=True, text=True, check=True, timeout=60,
    ).stdout  # fmt: skip
    return int(re.search(r"STACK:(\d+)", said).group(1))


def check_quantises(text, kind, world, options, kernel, tmp_path):
    """Correctly rounded quotients, with four fused operations each and a division for each scale,
    the GPU's own conversion, denormal numbers as they are; a sharded kernel that sends FP8 rows has
    registers for all it keeps.
    """
    assert text.count("div.rn.f32") >= 1
    assert text.count("fma.rn.f32") >= 16
    assert "ftz" not in re.sub(r"rsqrt\.approx\.ftz", "", text)
    assert text.count("cvt.rn.satfinite.e4m3x2.f32") % 2 == 0
    assert text.count("cvt.rn.satfinite.e4m3x2.f32") > 0
    assert ("shfl.sync.bfly.b32" in text) or "group" not in options["quant"]
    if kind == "two_shot_sharded" and not options.get("with_norm"):
        assert stack_bytes(kernel, tmp_path) <= (160 if world > 4 else 0)


@pytest.mark.parametrize(
    ("kind", "world", "hidden", "dtype", "tokens", "options"),
    VARIANTS,
    ids=[f"{v[0]}-{v[1]}x{v[2]}-{str(v[3])[6:]}-{v[4]}" + "".join(f"-{o}" for o in v[5]) for v in VARIANTS],
)
def test_compiles_to_wide_accesses_in_order(kind, world, hidden, dtype, tokens, options, tmp_path):
    launch = call_on_cpu(kind, world, hidden, dtype, tokens, **options)
    kernel = compiled(launch)
    text, ir = kernel.asm["ptx"], kernel.asm["ttgir"]
    layouts = re.findall(r"^#\w+ = #ttg\..*", ir, re.MULTILINE)
    # One layout, one element a thread at a time: no packet belongs to two threads.
    assert len(layouts) == 1
    assert "sizePerThread = [1]" in layouts[0]
    assert "convert_layout" not in ir
    assert min(map(int, re.findall(r"tensor<(\d+)x", ir))) >= launch.config.threads
    # Data moves 16 bytes at a time; narrower are addresses, flags, tagged words and a narrow weight.
    accesses = re.findall(r"\b(?:ld|st)(?:\.\w+)*\.global(\.[\w.]+)", text)
    weights = [options.get("weight", BF16), *options.get("inner", ())[:1]]
    narrow = any(weight in (BF16, FP16) for weight in weights) and dtype == FP32
    fp8 = [".v2.b32", ".b32"] if "quant" in options else []  # rows of half the bytes, and their scales
    assert set(accesses) <= {".v4.b32", ".b64", ".v2.b64", *([".v2.b32"] if narrow else []), *fp8}
    if fp8:
        check_quantises(text, kind, world, options, kernel, tmp_path)
    pushes = text.count("st.relaxed.sys.global.v4.b32")
    assert "multimem" not in text
    if "inner" in options:
        check_inner_adds_no_traffic(text, kind, world, hidden, dtype, tokens, options)
    if launch.kernel == "two_shot_flags_kernel":
        assert pushes == 0
        assert text.count("fence.acq_rel.sys") == 1
        order = [m.group(1) for m in re.finditer(r"(bar\.sync|fence\.acq_rel|ld\.acquire|st\.global\.v4)", text)]
        fence = order.index("fence.acq_rel")
        assert order[fence - 1] == "bar.sync"
        assert all(order[i + 1] == "bar.sync" for i, what in enumerate(order) if what == "ld.acquire")
    else:
        assert pushes >= world - 1
        assert "fence" not in text


@pytest.mark.parametrize(
    ("kind", "world", "hidden", "tokens", "options"),
    [
        ("one_shot", 4, 8192, 1, {}),
        ("one_shot", 8, 5376, 64, {"form": WIDE_SCALE, "inner": (BF16, SCALE)}),
        ("two_shot", 4, 8192, 256, {"protocol": "data"}),
        ("two_shot_sharded", 8, 8192, 512, {"protocol": "data"}),
        ("two_shot", 8, 8192, 8192, {"protocol": "flags", "output": 0, "form": WIDE_ROUND}),
        ("two_shot_sharded", 4, 8192, 2048, {"protocol": "flags", "output": 0}),
    ],
)
def test_batch_invariant_kernels_cost_no_more_than_the_others(kind, world, hidden, tokens, options, tmp_path):
    """No more barriers and accesses of global memory; every step is correctly rounded; and lanes
    add their neighbours in the layout in which these are neighbours.
    """
    plain, invariant = (
        compiled(call_on_cpu(kind, world, hidden, BF16, tokens, batch_invariant=mode, **options))
        for mode in (False, True)
    )
    ptx, ir = invariant.asm["ptx"], invariant.asm["ttgir"]
    for what in (r"\b(?:ld|st)\S*\.global", "bar.sync"):
        assert len(re.findall(what, ptx)) <= len(re.findall(what, plain.asm["ptx"])), what
    assert "sqrt.rn.f32" in ptx
    assert "div.rn.f32" in ptx
    assert not re.search(r"\bfma\.|\.ftz|rsqrt|div\.full|\b(?:add|mul)\.f32", ptx)
    (layout,) = re.findall(r"(#\w+) = #ttg.blocked<\{sizePerThread = \[1\]", ir)
    lanes = [line for line in ir.splitlines() if "shfl.sync.bfly" in line]
    assert lanes
    assert all(re.search(rf"tensor<\d+xi32, {layout}>", line) for line in lanes)
    assert stack_bytes(invariant, tmp_path) <= 160


@pytest.mark.parametrize("kind", ["one_shot", "two_shot"])
def test_no_rounding_to_fp16_is_fused_away(kind):
    """A product that is rounded to fp16, plus the residual: one fused operation would round the sum
    only."""
    text = compiled(call_on_cpu(kind, 2, 4096, FP16, 4, weight=FP16, form=ROUND, inner=(FP16, ROUND))).asm["ptx"]
    assert "fma." not in text


@pytest.mark.parametrize("world", [2, 4, 8])
@pytest.mark.parametrize("form", [SCALE, WIDE_ROUND])
@pytest.mark.parametrize("kind", ["two_shot", "two_shot_sharded"])
def test_large_inputs_leave_the_registers_in_peace(kind, form, world, tmp_path):
    """Bytes that a thread keeps in memory for want of registers. With 8 ranks they were 336 to 552, more than the L1
    cache holds of all threads, and a tenth of the time.
    """
    launch = call_on_cpu(kind, world, 8192, BF16, 8192, protocol="flags", output=0, form=form)
    assert stack_bytes(compiled(launch), tmp_path) <= 160


@pytest.mark.parametrize("hidden", [2880, 4096, 5120, 5376, 7168, 8192, 16384])
@pytest.mark.parametrize("world", range(2, 9))
def test_default_configurations_fit(world, hidden):
    for dtype in (BF16, FP32):
        packets = hidden * dtype.itemsize // 16
        for tokens in (1, 2, 3, 5, 16, 31, 33, 64, 128, 257, 1000, 4096, 8192):
            shard = rows_per_rank(tokens, world)
            configs = [
                (launch_config_one_shot(tokens, packets, 132), ONE_SHOT_KERNEL),
                (launch_config_two_shot_data(shard, packets, world, 132), "two_shot_data_kernel"),
                *(
                    (launch_config_two_shot_flags(shard, packets, world, 132, full), "two_shot_flags_kernel")
                    for full in (True, False)
                ),
            ]
            assert [check_launch_config(config, packets, 132, kernel) for config, kernel in configs] == [None] * 4
            owned = [owned_rows(tokens, world, rank) for rank in range(world)]
            assert sum(owned) == tokens
            assert max(owned) == owned[0] == shard


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (LaunchConfig(3, 1, 32, slices=2), "no multiple of the 2 slices"),  # one of them would wait for ever
        (LaunchConfig(1, 1, 32, slices=2), "fewer than the 2 slices"),
        (LaunchConfig(132 * 16 + 1, 1, 64), "do not all fit on 132"),
        (LaunchConfig(2, 3, 128), "warps is 3"),
        (LaunchConfig(2, 1, 48), "block is 48"),
        (LaunchConfig(2, 1, 32), "do not cover 64 packets"),
        (LaunchConfig(2, 1, 64, unroll=3), "unroll 3"),
    ],
)
def test_configurations_that_cannot_run_are_refused(config, said):
    assert said in (check_launch_config(config, 64, 132, ONE_SHOT_KERNEL) or "")


@pytest.mark.parametrize("world", range(2, 9))
def test_blocks_begin_with_different_peers(world):
    """Each sends to every peer once; together they send to all at any time, which the links are the faster for."""
    for rank in range(world):
        turns = [[peer_at.fn(rank, turn, j, world) for j in range(1, world)] for turn in range(world - 1)]
        peers = [peer for peer in range(world) if peer != rank]
        assert all(sorted(turn) == peers for turn in turns)
        assert all(sorted(step) == peers for step in zip(*turns, strict=True))


def test_a_plain_copy_stores_16_bytes_at_a_time_to_every_peer():
    signature = {"ctl": "*i64", "source": "*u8", "packets": "i32", "rank": "i32", "offset": "i64"}
    constants = {"WORLD": 4, "BLOCK": 1024}
    fn = symm_mem_copy.push_to_peers_kernel
    source = ASTSource(fn=fn, signature={**signature, **dict.fromkeys(constants, "constexpr")}, constexprs=constants)
    ptx = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8, "enable_fp_fusion": False}
    ).asm["ptx"]
    assert ptx.count("st.global.v4.b32") == 3 * 4
    assert ptx.count("ld.global.v4.b32") == 4


def test_results_in_output_buffers_are_no_aliases_of_each_other():
    """torch refuses custom operators whose result shares a storage with an argument: here the residual before."""
    ws = CpuWorkspace(0, 2, 64, BF16, tokens=(8, 16, 32), outputs=2)
    ws.use(torch.zeros(ws.layout.nbytes, dtype=torch.uint8))
    first, second = ws.output(0, 3), ws.output(1, 32)
    assert first.untyped_storage()._cdata != second.untyped_storage()._cdata
    assert first.shape == (3, 64)
    second.fill_(1.0)
    assert not first.any()
    at = ws.layout.offsets["output1"]
    assert ws._buffer[at : at + ws.layout.sizes["output1"]].view(BF16).eq(1.0).all()


def test_areas_of_the_buffer_do_not_overlap():
    layout = Layout(8, 8192, 2, 128, 512, 8192, 2)
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
        (ArgumentError, "one_shot", {"inner": NormSpec(None, 1e-5, 0.0, SCALE)}),
        *[
            (ArgumentError, kind, {"inner": inner, "residual": torch.zeros(rows, 64, dtype=BF16)})
            for kind, rows in (("one_shot", 2), ("two_shot", 2), ("two_shot_sharded", 1))
            for inner in (
                NormSpec(torch.zeros(63), 1e-5, 0.0, SCALE),
                NormSpec(torch.zeros(64, dtype=torch.int32), 1e-5, 0.0, SCALE),
                NormSpec(torch.zeros(64, device="meta"), 1e-5, 0.0, SCALE),
                NormSpec(None, -1.0, 0.0, SCALE),
                NormSpec(None, 1e-5, 0.0, "neither"),
            )
        ],
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
    ws.use(None if change.pop("closed", False) else torch.empty(ws.layout.nbytes, dtype=torch.uint8))
    call = {"x": torch.zeros(2, 64, dtype=BF16), "residual": None, "weight": None, "form": SCALE, **change}
    norm = NormSpec(call.pop("weight"), 1e-5, 0.0, call.pop("form"))
    with pytest.raises(error):
        getattr(symm_mem, kind)(ws, norm=norm, **call)
