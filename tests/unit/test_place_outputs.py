"""Results that stay in symmetric buffers: which are placed, and adversarial graphs whose results must stay right.

A provider on the CPU keeps output buffers as the kernels do: a call fills its buffer with NaN, then leaves its result
there. Whatever reads a result too late reads NaN or another call's numbers.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from fusewire.custom_ops import api
from fusewire.custom_ops.dispatch import dispatcher as dispatch
from fusewire.custom_ops.dispatch.policy import Policy, read_policy
from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm
from fusewire.custom_ops.ops.quantized_norm import (
    all_reduce_rms_norm_quantized,
    all_reduce_rms_norm_quantized_sharded,
)
from fusewire.custom_ops.ops.registry import YES
from fusewire.custom_ops.ops.sandwich_norm import all_reduce_sandwich_norm
from fusewire.custom_ops.ops.sharded_norm import all_reduce_rms_norm_sharded
from fusewire.custom_ops.workspaces import provider as interface
from fusewire.custom_ops.workspaces import registry as workspace
from fusewire.errors import ConfigError
from fusewire.fusion_passes.compiler import inductor as matcher
from fusewire.fusion_passes.passes import place_outputs, shard_residual

from support.blocks import HIDDEN, NORMS, reduce_functional, tensors
from support.distributed import fake_group, shared_pool
from support.graphs import capture
from support.written_graphs import GROUP, NORM, Build

NAME = "slots"
CONFIG = {"output_in_place": True, "ir_op_priority": {"all_reduce_rms_norm": (NAME,)}}


class Buffers(interface.Workspace):
    def __init__(self, request):
        key, tokens = request.key, request.max_tokens
        super().__init__(key, tokens, 0, request.device)
        self.outputs = [torch.full((tokens, key.hidden), torch.nan, dtype=key.dtype) for _ in range(request.outputs)]
        self.placed = 0

    def leave(self, slot, result):
        """The result in its buffer."""
        rows = result.reshape(-1, result.shape[-1])
        self.outputs[slot].fill_(torch.nan)
        self.outputs[slot][: rows.shape[0]] = rows
        self.placed += 1
        return self.outputs[slot][: rows.shape[0]].view(result.shape)

    def release(self):
        self.outputs = []


class Slots(interface.WorkspaceProvider):
    name = NAME
    variants = (f"{NAME}/only",)

    def machine(self, group, device):
        return interface.device_facts(device)

    def limits(self, hidden, dtype, world_size):
        return YES

    def token_limit(self, variant, hidden, dtype, world_size, max_tokens):
        return range(max_tokens + 1)

    def max_tokens(self, hidden, dtype, world_size):
        return 4096

    def nbytes(self, hidden, dtype, world_size, max_tokens):
        return 0

    def create(self, request, channel):
        return Buffers(request)

    def self_test(self, workspace, stage):
        pass

    def bind(self, workspace, variant, output=None):
        def call(*args):
            if output is not None:  # as the kernel, which may write as soon as it runs
                inputs = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
                norm, summed = all_reduce_rms_norm.native(*inputs)
                return norm, workspace.leave(output, summed)
            return all_reduce_rms_norm.native(*args)

        return call

    def bind_derived(self, workspace, variant, op_name, args, output=None):
        sharded = op_name == all_reduce_rms_norm_sharded.name
        native = (all_reduce_rms_norm_sharded if sharded else all_reduce_sandwich_norm).native

        def call(*args):
            norm, summed = native(*args)
            if output is None:
                return norm, summed
            if sharded:
                return workspace.leave(output, norm), summed
            return norm, workspace.leave(output, summed)

        return call


@contextlib.contextmanager
def slots(on_gpu=True):
    """The provider is there; with `on_gpu` its buffers are used, else it is native under another name."""
    all_reduce_rms_norm.register_impl(NAME)(
        lambda x, residual, weight, eps, weight_bias, form, group_name: all_reduce_rms_norm.native(
            x, residual, weight, eps, weight_bias, form, group_name
        )
    )
    with (
        mock.patch.dict(interface.PROVIDERS, {NAME: Slots()}),
        mock.patch.object(dispatch, "on_gpu", return_value=on_gpu),
        mock.patch.object(workspace, "check_memory"),
    ):
        try:
            yield
        finally:
            api.close()
            all_reduce_rms_norm.unregister_impl(NAME)


@pytest.fixture
def world():
    with fake_group(2) as group, slots(on_gpu=False):
        yield group


def layer(x, residual, w, m):
    residual = residual + reduce_functional(x)
    return NORMS["L"](residual, w, 1e-5) @ m, residual


def decoder(x, residual, w, m):
    """What every decoder is: each residual is read by the next layer only."""
    for _ in range(4):
        x, residual = layer(x, residual, w, m)
    return x


def held_across_layers(x, residual, w, m):
    """A residual that is read once more, at the very end: its buffer is not written again in this graph."""
    x, first = layer(x, residual, w, m)
    residual = first
    for _ in range(4):
        x, residual = layer(x, residual, w, m)
    return x + first


def returned(x, residual, w, m):
    for _ in range(3):
        x, residual = layer(x, residual, w, m)
    return x, residual


def returned_from_the_middle(x, residual, w, m):
    x, residual = layer(x, residual, w, m)
    x, middle = layer(x, residual, w, m)
    residual = middle
    for _ in range(2):
        x, residual = layer(x, residual, w, m)
    return x, middle


def view_returned(x, residual, w, m):
    x, residual = layer(x, residual, w, m)
    head = residual.view(2, -1, HIDDEN)[:, -1]
    for _ in range(3):
        x, residual = layer(x, residual, w, m)
    return x, head


def cheap_value_used_late(x, residual, w, m):
    """A pointwise value of a residual, which Inductor computes where it is used: three layers on."""
    x, residual = layer(x, residual, w, m)
    cheap = residual * 2 + 1
    for _ in range(3):
        x, residual = layer(x, residual, w, m)
    return x * cheap


def product_used_late(x, residual, w, m):
    """A matrix product of a residual that no layer needs may run at the very end."""
    x, residual = layer(x, residual, w, m)
    head = residual @ m
    for _ in range(3):
        x, residual = layer(x, residual, w, m)
    return x + head


def only_the_shape(x, residual, w, m):
    """The next layers need a product's shape and not its value."""
    x, residual = layer(x, residual, w, m)
    head = residual @ m
    x = x + torch.zeros_like(head)
    for _ in range(3):
        x, residual = layer(x, residual, w, m)
    return x, head


def to_the_power_of_nothing(x, residual, w, m):
    x, residual = layer(x, residual, w, m)
    head = residual @ m
    x = x * head**0
    for _ in range(3):
        x, residual = layer(x, residual, w, m)
    return x, head


def scratch_memory(x, residual, w, m):
    """Large values that are made when residuals are no more needed, and live to the end: Inductor gives them memory
    that others are done with."""
    kept = []
    for _ in range(5):
        x, residual = layer(x, residual, w, m)
        kept.append(x.sin() @ m)
    return (x, *kept)


def copied_into_a_cache(x, residual, w, m, cache):
    x, residual = layer(x, residual, w, m)
    cache.copy_(residual)
    for _ in range(3):
        x, residual = layer(x, residual, w, m)
    return x


def two_streams(x, residual, w, m):
    """Two chains beside each other, which may run in any order."""
    a, ra = x, residual
    b, rb = x * 2, residual * 3
    for _ in range(3):
        a, ra = layer(a, ra, w, m)
        b, rb = layer(b, rb, w, m)
    return a + b


def sandwiches(x, residual, w, m):
    for _ in range(4):
        residual = residual + NORMS["G"](reduce_functional(x), w, 1e-6)
        x = NORMS["G"](residual, w, 1e-6) @ m
    return x


def norm_returned(x, residual, w, m):
    """With a sharded residual it is the norm that stays in the buffer."""
    norms = []
    for _ in range(4):
        residual = residual + reduce_functional(x)
        norm = NORMS["L"](residual, w, 1e-5)
        norms.append(norm)
        x = norm @ m
    return x, norms[1]


PLACED = {
    decoder: 3,
    held_across_layers: 3,
    returned: 2,
    returned_from_the_middle: 2,
    view_returned: 2,
    cheap_value_used_late: 2,
    product_used_late: 2,
    only_the_shape: 2,
    to_the_power_of_nothing: 2,
    scratch_memory: 4,
    copied_into_a_cache: 2,
    two_streams: 2,
    sandwiches: 3,
    norm_returned: 3,
}


def inputs(block, tokens=12):
    x, residual, w = tensors(torch.float32, (tokens,))
    m = torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(5)) / 8
    cache = [torch.zeros_like(residual)] if block is copied_into_a_cache else []
    return [x, residual, w, m, *cache]


def slots_of(captured):
    calls = [node for node in captured.graph.nodes if node.target in place_outputs._PLACED]
    return [node.args[-1].partition(";output=")[2].replace("-1", "") for node in calls]


@pytest.mark.parametrize(("block", "placed"), PLACED.items(), ids=[block.__name__ for block in PLACED])
def test_placed(world, block, placed):
    captured = capture(block, *inputs(block), **CONFIG)
    found = slots_of(captured)
    assert len([slot for slot in found if slot]) == placed, found


def test_slots_alternate(world):
    assert slots_of(capture(decoder, *inputs(decoder), **CONFIG)) == ["0", "1", "0", ""]


def test_off_by_default(world):
    captured = capture(decoder, *inputs(decoder), ir_op_priority=CONFIG["ir_op_priority"])
    assert slots_of(captured) == [""] * 4


def test_what_is_copied_is_noted(world):
    captured = capture(cheap_value_used_late, *inputs(cheap_value_used_late), **CONFIG)
    note, assumed = captured.report.notes
    assert note.startswith("output_in_place: 1 of 3 results are copied")
    assert assumed.startswith("taken to be equal on all ranks: the residual or weight of 4 operators")


@pytest.mark.parametrize(
    ("op", "with_norm", "placed"),
    [
        (all_reduce_rms_norm_quantized, True, 1),
        (all_reduce_rms_norm_quantized, False, 1),
        (all_reduce_rms_norm_quantized_sharded, True, 0),
        (all_reduce_rms_norm_quantized_sharded, False, 2),
    ],
)
@pytest.mark.parametrize("returned", range(4))
def test_which_result_of_quantised_operators_stays(op, with_norm, placed, returned):
    """The graph's output reads one result, a matrix product the others: the one that stays must not
    be returned.
    """
    build = Build()
    build.x.meta["val"] = torch.empty(4, 128, device="meta")
    inner, quant = (None, 0.0, 0.0, ""), (None, "token", with_norm)
    call = build.call(op.torch_op, build.x, build.r, build.w, *NORM, *inner, *quant, GROUP, "symm_mem")
    items = [build.item(call, index) for index in range(4)]
    for item in items:
        build.call(torch.ops.aten.mm.default, item, build.w)
    build.graph.output(items[returned])
    context = SimpleNamespace(notes=[])
    with mock.patch.object(place_outputs, "never_reuse_outputs"):
        assert place_outputs.place_outputs(build.graph, context) == (returned != placed)
    assert call.args[-1] == ("symm_mem;output=0" if returned != placed else "symm_mem")


def test_policy_option():
    op = all_reduce_rms_norm
    assert read_policy(op, "native;output=1").output == 1
    assert read_policy(op, "native;max_size_mb=2;output=0") == Policy(("native",), 2.0, 0)
    assert [read_policy(op, f"native{text}").slot for text in ("", ";output=-1", ";output=1")] == [
        None,
        None,
        1,
    ]
    with pytest.raises(ConfigError, match="is not a number"):
        read_policy(op, "native;output=first")
    with pytest.raises(ConfigError, match="unknown option 'outputs'; there are max_size_mb, output"):
        read_policy(op, "native;outputs=1")


def _run(name, sharded, protect=True):
    """How far the results with placed outputs are from those without, and how many were placed."""
    shard_residual.MIN_TOKENS, shard_residual.OPS_PER_GATHER = 1, 1
    block = globals()[name]
    given = inputs(block)
    given[0] = given[0] * (1 + dist.get_rank())
    results, counts = [], []
    with contextlib.ExitStack() as stack:
        stack.enter_context(slots())
        # As on GPUs: of memory that it takes to be unaligned, as all of a CPU's is, Inductor reuses none.
        stack.enter_context(mock.patch("torch._inductor.graph.should_assume_input_aligned", return_value=True))
        if not protect:
            stack.enter_context(mock.patch.object(place_outputs, "never_reuse_outputs"))
            for op in place_outputs._PLACED:
                matcher.lowering.lowerings.pop(op, None)
            # Where it may raise, torch itself notices a result in the memory of an input; here the numbers shall tell.
            stack.enter_context(torch._functorch.config.patch(check_custom_op_aliasing=False))
        for in_place in (False, True):
            torch._dynamo.reset()
            api.close()
            options = {**CONFIG, "output_in_place": in_place, "shard_residual": sharded}
            compiled = torch.compile(block, backend="fusewire", options={**options, "fx_graph_cache": False})
            mine = [tensor.clone() for tensor in given]
            with torch.no_grad():
                for _ in range(2):  # the second time the buffers hold what the first has left
                    found = compiled(*mine)
            found = found if isinstance(found, tuple) else (found,)
            results.append([*(t.clone() for t in found), *mine])
            counts.append(sum(e.workspace.placed for e in workspace.REGISTRY.entries.values() if e.workspace))
    same = all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    return same, counts[0], counts[1] // 2


@pytest.mark.parametrize("sharded", [False, True], ids=["complete", "sharded"])
@pytest.mark.parametrize("blocks", ["a few", pytest.param("all", marks=pytest.mark.nightly)])
def test_results_stay_right(sharded, blocks):
    """The adversarial graphs, compiled and run on two ranks."""
    wrong = []
    few = (norm_returned, decoder) if sharded else (cheap_value_used_late, scratch_memory, sandwiches)
    for block, placed in PLACED.items():
        if blocks == "a few" and block not in few:
            continue
        for same, before, count in shared_pool(2).run(_run, block.__name__, sharded):
            if not same or before or (not sharded and count != placed) or (sharded and block is decoder and not count):
                wrong.append((block.__name__, same, before, count))
    assert wrong == []


def test_memory_planning_would_take_the_buffers():
    """Without the protection the same graphs come out wrong: what `never_reuse_outputs` is for."""
    found = [shared_pool(2).run(_run, block.__name__, False, False) for block in (scratch_memory, decoder)]
    assert not all(same for ranks in found for same, _, _ in ranks)
