"""The sharded residual: which chains are sharded, where residuals are gathered, and that results stay what they were."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm
from fusewire.custom_ops.ops.sandwich_norm import all_reduce_sandwich_norm
from fusewire.custom_ops.ops.sharded_norm import all_reduce_rms_norm_sharded, gather_rows, shard_rows
from fusewire.fusion_passes.passes import shard_residual

from support.blocks import NORMS, reduce_functional, tensors
from support.compiles import WITHOUT_CODE
from support.distributed import fake_group, shared_pool
from support.graphs import capture

PLAIN, SANDWICH = all_reduce_rms_norm.torch_op, all_reduce_sandwich_norm.torch_op
SHARDED, GATHER, TAKE = all_reduce_rms_norm_sharded.torch_op, gather_rows.torch_op, shard_rows.torch_op


@pytest.fixture
def world():
    with fake_group(2) as group:
        yield group


@pytest.fixture(autouse=True)
def cheap_gathers(monkeypatch):
    monkeypatch.setattr(shard_residual, "OPS_PER_GATHER", 3)


def decoder(x, residual, w, layers=4, spelling="L", embedded=False):
    """Layers of all-reduce, add, norm. `embedded` starts with an all-reduce of its own, as a sharded embedding does."""
    if embedded:
        residual = reduce_functional(x)
        x = NORMS[spelling](residual, w, 1e-5)
    for _ in range(layers):
        residual = residual + reduce_functional(x.sin())
        x = NORMS[spelling](residual, w, 1e-5)
    return x, residual


def last_norm(x, residual, w):
    return decoder(x, residual, w)[0]


def last_norm_embedded(x, residual, w):
    return decoder(x, residual, w, embedded=True)[0]


def residual_returned(x, residual, w):
    return decoder(x, residual, w)


def auxiliary_head(x, residual, w):
    x, residual = decoder(x, residual, w, 2)
    head = residual * 2
    return decoder(x, residual, w, 2)[0], head


def sandwiches(x, residual, w):
    for _ in range(4):
        residual = residual + NORMS["G"](reduce_functional(x.sin()), w, 1e-6)
        x = NORMS["G"](residual, w, 1e-6)
    return x, residual


def three_dimensions(x, residual, w):
    x, residual = x.unsqueeze(1).expand(-1, 3, -1).contiguous(), residual.unsqueeze(1).expand(-1, 3, -1).contiguous()
    return decoder(x, residual, w)


BLOCKS = (last_norm, last_norm_embedded, residual_returned, auxiliary_head, sandwiches, three_dimensions)


def sharded(block, *inputs, **options):
    options = {"shard_residual": True, "inline_native": False, **options}
    return capture(block, *(inputs or tensors(shape=(32,))), **options)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("block", "ops", "gathers", "takes"),
    [
        (last_norm, 4, 0, 1),
        (last_norm_embedded, 5, 0, 0),
        (residual_returned, 4, 1, 1),
        (auxiliary_head, 4, 1, 1),
        (sandwiches, 4, 1, 1),
        (three_dimensions, 4, 1, 1),
    ],
)
def test_chains(world, block, ops, gathers, takes, dynamic):
    captured = sharded(block, dynamic=dynamic)
    assert captured.count(SHARDED) == ops
    assert (captured.count(GATHER), captured.count(TAKE)) == (gathers, takes)
    assert captured.count(PLAIN) == captured.count(SANDWICH) == 0
    assert all(entry.fusion.endswith("residual sharded") for entry in captured.report.entries)
    (note,) = captured.report.notes
    assert note.startswith(f"taken to be equal on all ranks: the residual or weight of {ops} operators")


def test_off_by_default(world):
    captured = capture(last_norm, *tensors(shape=(32,)), inline_native=False)
    assert (captured.count(SHARDED), captured.count(PLAIN)) == (0, 4)


def two_heads(x, residual, w):
    x, residual = decoder(x, residual, w, 2)
    head = residual * 2
    x, residual = decoder(x, residual, w, 2)
    return x, residual, head


def single(x, residual, w):
    return decoder(x, residual, w, 1)


@pytest.mark.parametrize(
    ("block", "tokens", "says"),
    [
        (two_heads, 32, "2 residuals are read outside of fused operators too"),
        (single, 32, "no other fused operator takes its residual"),
        (last_norm, 15, "15 tokens; from 16 on"),
    ],
)
def test_not_worth_it(world, block, tokens, says):
    captured = sharded(block, *tensors(shape=(tokens,)))
    assert captured.count(SHARDED) == 0
    (note,) = captured.report.notes
    assert says in note


def scaled(x, residual, w):
    """The residual is changed on its way, so it is no chain."""
    x, residual = decoder(x, residual, w, 2)
    return decoder(x, residual * 0.5, w, 2)[0]


def as_input(x, residual, w):
    """A residual that is also what the next operator sums."""
    x, residual = decoder(x, residual, w, 1)
    return decoder(x + residual, residual, w, 3)[0]


def test_a_residual_that_is_changed_ends_the_chain(world):
    captured = sharded(scaled)
    assert captured.count(SHARDED) == 2  # the second chain; the first would gather one residual for two operators
    assert captured.count(TAKE) == 1


def test_a_residual_that_is_summed_again_is_gathered(world):
    captured = sharded(as_input)
    assert (captured.count(SHARDED), captured.count(GATHER)) == (4, 1)


@pytest.mark.parametrize("policy", ["", "rank_ordered"])
def test_calls_of_the_programs_own(world, policy):
    """They keep the providers that they name."""

    def block(x, residual, w):
        for _ in range(4):
            call = (x.sin(), residual, w, 1e-5, 0.0, "scale_then_round", world.group_name, policy)
            x, residual = torch.ops.fusewire.all_reduce_rms_norm(*call)
        return x

    captured = sharded(block, *tensors(shape=(32,)), ir_op_priority={"all_reduce_rms_norm": ("native",)})
    calls = captured.graph.find_nodes(op="call_function", target=SHARDED)
    assert [call.args[-1] for call in calls] == [policy or "native"] * 4


def test_batch_invariant_mode(world):
    captured = sharded(residual_returned, batch_invariant=True, inline_native=True)
    assert (captured.count(SHARDED), captured.count(TAKE)) == (4, 1)
    assert captured.count(torch.ops._c10d_functional.all_gather_into_tensor.default) == 1  # the gather, written out


def test_two_groups_are_two_chains(world):
    other = dist.new_group([0, 1])

    def block(x, residual, w):
        x, residual = decoder(x, residual, w, 2)
        for _ in range(2):
            residual = residual + torch.distributed._functional_collectives.all_reduce(x.sin(), "sum", other)
            x = NORMS["L"](residual, w, 1e-5)
        return x

    captured = sharded(block)
    assert captured.count(SHARDED) == 2
    assert [note.partition(":")[0] for note in captured.report.notes] == [
        "shard_residual",
        "taken to be equal on all ranks",
    ]


def _same_on_a_rank(name: str, tokens: int, dynamic: bool, inline: bool) -> list[bool]:
    """Whether the sharded graph gives bit for bit what the fused graph without it gives."""
    shard_residual.OPS_PER_GATHER = 3
    shard_residual.MIN_TOKENS = 1
    block = globals()[name]
    # Inlined, torch before 2.13 rounds on CPUs where its fusions end, whatever emulate_precision_casts says.
    exact = not inline or tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
    x, residual, w = tensors(torch.bfloat16 if exact else torch.float32, (tokens,))
    x = x * (1 + dist.get_rank())
    # With more than two ranks gloo's order of summation depends on where in the tensor a number stands.
    provider = "native" if dist.get_world_size() == 2 else "rank_ordered"
    options = {"ir_op_priority": {"all_reduce_rms_norm": [provider]}, "inline_native": inline, "expect_fused": "all"}
    results = []
    for shard in (False, True):
        torch._dynamo.reset()
        chosen = {**options, "shard_residual": shard, "emulate_precision_casts": True}
        chosen |= {} if inline else WITHOUT_CODE
        compiled = torch.compile(block, backend="fusewire", options=chosen, dynamic=dynamic, fullgraph=True)
        with torch.no_grad():
            found = compiled(x, residual, w)
        results.append(found if isinstance(found, tuple) else (found,))
    if not exact:
        return [torch.allclose(a, b, 1e-4, 1e-4) for a, b in zip(*results, strict=True)]
    return [torch.equal(a, b) for a, b in zip(*results, strict=True)]


@pytest.mark.parametrize(
    ("ranks", "name", "tokens", "dynamic", "inline"),
    [
        (2, "residual_returned", 32, False, False),
        (2, "sandwiches", 17, True, True),
        (2, "three_dimensions", 17, True, False),
        (3, "auxiliary_head", 2, False, False),
        (3, "last_norm_embedded", 17, False, False),
    ],
)
def test_results_are_the_same(ranks, name, tokens, dynamic, inline):
    """Rows that divide and such as do not, fewer rows than ranks, and a dynamic token count."""
    found = shared_pool(ranks).run(_same_on_a_rank, name, tokens, dynamic, inline)
    assert all(all(same) for same in found), found
