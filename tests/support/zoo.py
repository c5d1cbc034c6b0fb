"""Tiny tensor-parallel models of the kinds that people run, with what is known of their all-reduces.

`MODELS[name].build(dtype, device)`, called on every rank inside a process group, gives the sharded model;
`.reference(dtype, device)` gives the same weights in one piece. Weights depend on nothing but the parameters'
names. Sizes divide by 2 and by 3; norm weights are random around what the model starts them with, so that a
mistake in a norm's weight or weight_bias shows.
"""
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from support.zoo_hf import (
    HEAD_DIM,
    HEADS,
    HF_MODELS,
    HIDDEN,
    KV_HEADS,
    LAYER_NORM,
    LAYERS,
    VOCAB,
    ModelSpec,
    fill,
)


def count_all_reduces(graph: torch.fx.Graph) -> int:
    """Tensors all-reduced in a post-grad graph; a coalesced all-reduce counts each of its tensors."""
    functional = torch.ops._c10d_functional
    single = sum(node.target is functional.all_reduce.default for node in graph.nodes)
    coalesced = [n for n in graph.nodes if n.target is functional.all_reduce_coalesced.default]
    return single + sum(len(node.args[0]) for node in coalesced)


def forward_logits(model: Callable[..., Any], ids: torch.Tensor) -> torch.Tensor:
    """Logits (batch, tokens, vocabulary) of one forward pass without a cache; `model` may be compiled."""
    inner = getattr(model, "_orig_mod", model)
    output = model(ids) if isinstance(inner, NativeModel) else model(ids, use_cache=False)
    return output if isinstance(output, torch.Tensor) else output.logits


def prefill_and_decode(
    model: Callable[..., Any],
    ids: torch.Tensor,
    steps: int,
    cache: str = "static",
    prefill: Callable[..., Any] | None = None,
) -> list[torch.Tensor]:
    """Logits (batch, its tokens, vocabulary) of a prefill, then of `steps` decode steps, with a KV cache.

    The last `steps` of `ids` (batch, tokens) are fed one at a time, whatever the model predicted, so that
    runs stay comparable when a rounding changes a prediction. `cache` is "static" or "dynamic". `prefill` is
    the callable for the first step if it is not `model`: transformers' generate() runs it eagerly before a
    compiled decode.
    """
    from transformers import DynamicCache, StaticCache

    inner: Any = getattr(model, "_orig_mod", model)
    if isinstance(inner, NativeModel):
        raise ValueError("native models have no KV cache")
    if cache not in ("static", "dynamic"):
        raise ValueError(f"cache must be 'static' or 'dynamic', not {cache!r}")
    tokens = ids.shape[1]
    kv = StaticCache(inner.config, max_cache_len=tokens) if cache == "static" else DynamicCache(config=inner.config)
    # Contiguous, as generate() feeds them: a view's stride would become one more dynamic size.
    parts = [part.contiguous() for part in ids.split([tokens - steps] + [1] * steps, dim=1)]
    runs = [prefill or model] + [model] * steps
    return [run(part, past_key_values=kv, use_cache=True).logits for run, part in zip(runs, parts, strict=True)]


# ---------------------------------------------------------------- models written with torch alone


Norm = Callable[[int], nn.Module]


class OwnNorm(nn.Module):
    """RMSNorm as hand-written models spell it: rounded to the input's dtype, then scaled."""

    def __init__(self, hidden: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden))

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(torch.mean(x * x, dim=-1, keepdim=True) + self.eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._norm(x.float()).type_as(x) * self.weight


class Attention(nn.Module):
    """Causal grouped-query attention over however many heads this rank holds."""

    def __init__(self) -> None:
        super().__init__()
        self.wq = nn.Linear(HIDDEN, HEADS * HEAD_DIM, bias=False)
        self.wk = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False)
        self.wv = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False)
        self.wo = nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.wo(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Linear(HIDDEN, 192, bias=False)
        self.w3 = nn.Linear(HIDDEN, 192, bias=False)
        self.w2 = nn.Linear(192, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = norm(HIDDEN), norm(HIDDEN)
        self.attention, self.feed_forward = Attention(), FeedForward()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class CoalescedBlock(Block):
    """Attention and feed-forward side by side, as in GPT-J; one coalesced all-reduce adds up both."""

    group: dist.ProcessGroup | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [self.attention(self.attention_norm(x)), self.feed_forward(self.ffn_norm(x))]
        if self.group is not None:
            parts = funcol.all_reduce_coalesced(parts, "sum", self.group)
        return x + parts[0] + parts[1]


class NativeModel(nn.Module):
    """Llama-like decoder without positions; returns logits (batch, tokens, vocabulary)."""

    def __init__(self, block: type[nn.Module], norm: Norm) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(block(norm) for _ in range(LAYERS))
        self.norm = norm(HIDDEN)
        self.output = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.tok_embeddings(ids)
        for layer in self.layers:
            h = layer(h)
        return self.output(self.norm(h))


_COLUMNS = ("attention.wq", "attention.wk", "attention.wv", "feed_forward.w1", "feed_forward.w3")
_ROWS = ("attention.wo", "feed_forward.w2")


def _parallelize(model: NativeModel, sequence: bool) -> None:
    """Shard with `parallelize_module`; `sequence` also splits the norms and the residual over the tokens."""
    residual = Shard(1) if sequence else Replicate()
    plan: dict[str, Any] = {
        "tok_embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=residual),
        "output": ColwiseParallel(input_layouts=residual, output_layouts=Replicate()),
        **{f"layers.*.{path}": ColwiseParallel() for path in _COLUMNS},
        **{f"layers.*.{path}": RowwiseParallel(output_layouts=residual) for path in _ROWS},
    }
    if sequence:
        gather = PrepareModuleInput(input_layouts=(residual,), desired_input_layouts=(Replicate(),))
        plan |= {"layers.*.attention": gather, "layers.*.feed_forward": gather}
        plan |= {path: SequenceParallel() for path in ("norm", "layers.*.attention_norm", "layers.*.ffn_norm")}
    mesh = init_device_mesh(model.output.weight.device.type, (dist.get_world_size(),))
    parallelize_module(model, mesh, plan)


def _slice_by_hand(model: NativeModel) -> None:
    """Keep this rank's rows or columns of each projection and reduce in hooks, as hand-written models do."""
    rank, size, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    assert group is not None

    def reduce(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        return funcol.all_reduce(output, "sum", group)

    layer: Any
    for layer in model.layers:
        for dim, paths in ((0, _COLUMNS), (1, _ROWS)):
            for path in paths:
                linear = layer.get_submodule(path)
                linear.weight = nn.Parameter(linear.weight.detach().chunk(size, dim)[rank].clone())
        if isinstance(layer, CoalescedBlock):
            layer.group = group
        else:
            layer.attention.register_forward_hook(reduce)
            layer.feed_forward.register_forward_hook(reduce)


def _make_native(
    block: type[nn.Module],
    norm: Norm,
    shard: Callable[[NativeModel], None],
    dtype: torch.dtype,
    device: torch.device,
    sharded: bool,
) -> nn.Module:
    model = NativeModel(block, norm)
    fill(model).to(device=device, dtype=dtype)
    if sharded:
        shard(model)
    return model.eval()


def _native(
    name: str,
    block: type[nn.Module],
    norm: Norm,
    shard: Callable[[NativeModel], None],
    all_reduces: int,
    fusible: int,
    **known: Any,
) -> ModelSpec:
    return ModelSpec(name, partial(_make_native, block, norm, shard), all_reduces, fusible, has_cache=False, **known)


_RMS_NORM = partial(nn.RMSNorm, eps=1e-5)
_NATIVE_MODELS = (
    _native("native", Block, _RMS_NORM, partial(_parallelize, sequence=False), 5, 5),
    _native("native_sequence", Block, _RMS_NORM, partial(_parallelize, sequence=True), 0, 5, reduce_scatters=5),
    _native("hand_written", Block, OwnNorm, _slice_by_hand, 4, 4),
    _native("coalesced", CoalescedBlock, OwnNorm, _slice_by_hand, 4, 4, merges=2, note="two norms read each sum"),
)

MODELS: dict[str, ModelSpec] = {spec.name: spec for spec in (*HF_MODELS, *_NATIVE_MODELS)}
__all__ = ["LAYER_NORM", "MODELS", "ModelSpec", "count_all_reduces", "forward_logits", "prefill_and_decode"]
