"""Kernels that `fusewire.prepare` compiles before the calls that need them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from fusewire.custom_ops.ops.norms import NormSpec, forms_of
from fusewire.custom_ops.workspaces import provider as interface
from fusewire.custom_ops.workspaces import registry as workspace
from fusewire.custom_ops.workspaces.precompile import compile_ahead

from support.distributed import shared_pool
from support.launches import CpuWorkspace, caught_launch, compiled

BF16, FP32 = torch.bfloat16, torch.float32
triton = pytest.importorskip("triton", reason="Triton is not installed")
symm_mem = pytest.importorskip("fusewire.custom_ops.providers.symm_mem.launcher")
ahead = pytest.importorskip("fusewire.custom_ops.providers.symm_mem.precompile")


def made(world, hidden, dtype, tokens=(128, 512, 8192), outputs=0):
    ws = CpuWorkspace(1, world, hidden, dtype, tokens, outputs)
    ws.use(torch.empty(ws.layout.nbytes, dtype=torch.uint8))
    return ws


def compiled_as(launch):
    """What decides whether a kernel that is there serves a launch."""
    config = launch.config
    kinds = tuple(arg for arg in launch.arguments[-16:] if type(arg) in (int, bool))
    return launch.kernel, config.warps, config.block, config.slices, config.unroll, kinds


@pytest.mark.parametrize(("hidden", "dtype"), [(8192, BF16), (4096, BF16), (2880, torch.float16), (8192, FP32)])
@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_no_call_compiles_afterwards(world, hidden, dtype):
    ws = made(world, hidden, dtype, outputs=2)
    known = {compiled_as(caught_launch(piece)) for piece in ahead.compilations(ws)}
    assert len(known) == len(ahead.compilations(ws))
    some = [*range(1, 20), 31, 64, 65, 100, 128, 129, 300, 512, 513, 700, 1000, 1500, 2047, 2048, 3000, 5000, 8192]
    inputs = torch.empty(2, max(some), hidden, dtype=dtype)
    for tokens in some:
        x, residual = inputs[:, :tokens]
        for form in forms_of(dtype):
            calls = [(symm_mem.one_shot, {})] if tokens <= 128 else []
            calls += [(symm_mem.two_shot, {})] + ([(symm_mem.two_shot, {"output": 1})] if tokens > 512 else [])
            for call, options in calls:
                launch = caught_launch(lambda: call(ws, x, residual, NormSpec(x[0], 1e-5, 1.0, form), **options))  # noqa: B023
                assert compiled_as(launch) in known, f"{call.__name__}, {tokens} tokens, {form}, {options}"


def test_the_pieces_are_kernels_that_compile():
    for piece in ahead.compilations(made(2, 64, BF16, (4, 8, 16))):
        assert compiled(caught_launch(piece)).asm["cubin"]


KEYS = """
import sys
from fusewire.custom_ops.providers.symm_mem.kernels import one_shot, peer_copy, two_shot_data, two_shot_flags
kernels = [
    one_shot.one_shot_kernel, two_shot_data.two_shot_data_kernel,
    two_shot_flags.two_shot_flags_kernel, peer_copy.push_to_peers_kernel,
]
for i in map(int, sys.argv[1]):
    kernels[i].cache_key
print(*(kernel.cache_key for kernel in kernels))
"""


def test_ranks_find_what_others_compiled_whatever_they_compiled_before():
    """Each rank compiles a share of the kernels, and takes the rest from the cache on disk, by their keys."""
    keys = {
        subprocess.run([sys.executable, "-c", KEYS, order], capture_output=True, text=True, check=True).stdout
        for order in ("0123", "3210", "1032")
    }
    assert len(keys) == 1
    assert len(set(keys.pop().split())) == 4


@pytest.mark.parametrize(
    ("directory", "inside"),
    [
        ("/tmp/torchinductor_someone/triton/3", "/tmp/torchinductor_someone/triton"),  # as Inductor sets it on GPU 3
        ("/home/someone/.triton/cache", "/home/someone/.triton/cache"),
        ("/scratch/rank3", "/scratch/rank3"),
        (None, None),
    ],
)
def test_ranks_share_a_cache_where_inductor_has_given_each_its_own(monkeypatch, directory, inside):
    if directory is None:
        monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    else:
        monkeypatch.setenv("TRITON_CACHE_DIR", directory)
    with symm_mem.compiling_only():
        assert os.environ.get("TRITON_CACHE_DIR") == inside
        assert triton.knobs.cache.dir == inside or inside is None
    assert os.environ.get("TRITON_CACHE_DIR") == directory


class Provider(interface.WorkspaceProvider):
    """Five pieces, of which one may fail on one rank."""

    name, variants = "pieces", ()
    machine = validate = limits = token_limit = max_tokens = nbytes = create = self_test = bind = None

    def __init__(self, failing):
        self.failing, self.done = failing, []

    def kernels_to_compile(self, held):
        return [lambda number=number: self.piece(number) for number in range(5)]

    def piece(self, number):
        if self.failing == (dist.get_rank(), number):
            raise ValueError("planted")
        self.done.append(number)


class Held(interface.Workspace):
    freed = False

    def release(self):
        self.freed = True


def _ahead(failing):
    group, provider = dist.group.WORLD, Provider(failing)
    key = interface.WorkspaceKey("pieces", group.group_name, BF16, 64)
    held = Held(key, 8, 0, torch.device("cpu"))
    entry = workspace.REGISTRY.entries[key] = workspace.WorkspaceEntry(key, lambda: group, held)
    compile_ahead(provider, entry, group)
    del workspace.REGISTRY.entries[key]
    return provider.done, entry.workspace is held, entry.refusal, held.freed


def test_each_rank_compiles_its_share_first():
    first, second = shared_pool(2).run(_ahead, None)
    assert first == ([0, 2, 4, 0, 1, 2, 3, 4], True, "", False)
    assert second == ([1, 3, 0, 1, 2, 3, 4], True, "", False)


def test_a_kernel_that_does_not_compile_on_one_rank_is_used_by_none():
    for done, kept, reason, freed in shared_pool(2).run(_ahead, (1, 3)):
        assert (kept, freed) == (False, True)
        assert "planted" in reason
        assert "rank 1" in reason
        assert len(done) <= 3
