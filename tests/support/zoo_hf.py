"""Tiny models of transformers, with what is known of their all-reduces: the larger part of the zoo."""
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import importlib.metadata
import tempfile
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

HIDDEN = 96
VOCAB = 132
HEADS = 12
KV_HEADS = 6
HEAD_DIM = 8
LAYERS = 2


@dataclass(frozen=True)
class ModelSpec:
    """A model and the report of its all-reduces in one forward pass of the compiled graph.

    - `all_reduces`: tensors all-reduced, counted by `count_all_reduces`. The same for 2 and 3
      ranks.
    - `fusible`: those among them, or reduce-scatters in their place, that reach an RMSNorm through
      a bias, a scale, views, residual adds or a sum with another all-reduce, so that the
      mathematics lets them be fused with it.
    - `merges`: collectives that go away when a sum of two all-reduces becomes the all-reduce of the
      sum; the all-reduces concerned are in `fusible`.
    - `gated`: further ones that could be fused if a gate between them were known to be equal on
      every rank.
    - `reduce_scatters`: collectives of sequence parallelism in place of all-reduces.
    - `has_cache`: `prefill_and_decode` can run it. `note`: what is odd about it.
    - `skip_reason`: why the packages installed here cannot run it. `counted`: the numbers hold for
      them.

    The numbers are transformers 5.24's, where every model compiles to one graph. Up to 5.17 at
    least, the embedding of a model with untied weights is not sharded, and norms of queries and
    keys break the graph.
    """

    name: str
    make: Callable[[torch.dtype, torch.device, bool], nn.Module]
    all_reduces: int
    fusible: int
    check: Callable[[], str] = str
    merges: int = 0
    gated: int = 0
    reduce_scatters: int = 0
    has_cache: bool = True
    note: str = ""

    @property
    def skip_reason(self) -> str:
        """Empty where the model can be run."""
        return self.check()

    @property
    def counted(self) -> bool:
        """Whether the numbers hold for the transformers installed here."""
        return not self.has_cache or _transformers_version() >= (5, 24)

    def build(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> nn.Module:
        """This rank's part of the model. Raises RuntimeError without a process group."""
        if not dist.is_initialized():
            raise RuntimeError("build() needs a process group: call it on every rank, or use reference()")
        return self.make(dtype, torch.device(device), True)

    def reference(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> nn.Module:
        """The whole model with the same weights; dtype may be float64."""
        return self.make(dtype, torch.device(device), False)

    def inputs(self, batch: int, tokens: int, device: torch.device | str = "cpu", seed: int = 0) -> torch.Tensor:
        """Random token ids (batch, tokens), the same on every rank."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, VOCAB, (batch, tokens), generator=generator).to(device)


def _unshared(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict with tied weights under their first name only."""
    unshared: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict().items():
        unshared.setdefault(tensor.data_ptr(), (name, tensor))
    return dict(unshared.values())


def fill(model: nn.Module) -> nn.Module:
    """Random weights that depend on nothing but their names; vectors stay around their initial
    value.
    """
    with torch.no_grad():
        for name, tensor in _unshared(model).items():
            if not tensor.is_floating_point():
                continue
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim < 2:
                tensor.add_(0.2 * noise)
            elif "embed" in name:
                tensor.copy_(0.3 * noise)
            else:
                tensor.copy_(noise / tensor.shape[-1] ** 0.5)
    return model


_BASE = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 192,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEAD = {"head_dim": HEAD_DIM}
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_LOCAL_EXPERTS = {"num_local_experts": 6, "num_experts_per_tok": 2}
_SHARED_EXPERT = {**_EXPERTS, "shared_expert_intermediate_size": 48}
_SLIDING = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}
_GEMMA = {**_HEAD, **_SLIDING, "query_pre_attn_scalar": HEAD_DIM}
_PER_LAYER = {
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 16,
    "num_kv_shared_layers": 0,
    **_HEAD,
    **_SLIDING,
}
_LINEAR = {
    "linear_num_value_heads": HEADS,
    "linear_num_key_heads": KV_HEADS,
    "linear_key_head_dim": HEAD_DIM,
    "linear_value_head_dim": HEAD_DIM,
    "layer_types": ["linear_attention", "full_attention"],
    **_HEAD,
}
_ROUTED = {
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_MLA = {
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_rope_head_dim": HEAD_DIM,
    "qk_nope_head_dim": HEAD_DIM,
    "v_head_dim": HEAD_DIM,
    "num_key_value_heads": HEADS,
}
_MAMBA = {"mamba_n_heads": HEADS, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 16}
_SCALES = {"residual_multiplier": 0.22, "embedding_multiplier": 12.0, "attention_multiplier": 0.125}


def _plan(mlp: str, *names: str, attention: bool = False) -> dict[str, str]:
    """Return a plan that shards the embedding, an MLP (`names`: gate, up, down) and perhaps
    attention.
    """
    plan = {"embed_tokens": "embedding_rowwise"}
    plan |= {f"layers.*.{mlp}.{name}": "colwise" for name in names[:-1]}
    plan[f"layers.*.{mlp}.{names[-1]}"] = "rowwise"
    if attention:
        plan |= {f"layers.*.self_attn.{name}_proj": "colwise" for name in "qkv"}
        plan["layers.*.self_attn.o_proj"] = "rowwise"
    return plan


_GATED = ("gate_proj", "up_proj", "down_proj")


def _make_hf(
    classes: tuple[str, str],
    overrides: dict[str, Any],
    attention: str,
    ep: bool,
    plan: dict[str, str] | None,
    dtype: torch.dtype,
    device: torch.device,
    sharded: bool,
) -> nn.Module:
    """Load fresh weights the way users load a checkpoint: `from_pretrained(..., tp_plan="auto")`.

    `plan` is for a model that transformers has no plan for.
    """
    import safetensors.torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    model_class, config_class = (getattr(transformers, name) for name in classes)
    config = config_class(**{**_BASE, **overrides})
    if plan is not None:
        config.base_model_tp_plan = plan
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        whole: Any = fill(model_class(config))
    options: dict[str, Any] = {"attn_implementation": attention}
    if sharded and ep:
        size = dist.get_world_size()
        options["distributed_config"] = transformers.DistributedConfig(tp_size=size, ep_size=size)
    elif sharded:
        options |= {"tp_plan": "auto", "tp_size": dist.get_world_size()}
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as directory:
        warnings.simplefilter("ignore", FutureWarning)
        # Not the model's save_pretrained: inside a process group it writes on rank 0 only.
        whole.generation_config.save_pretrained(directory)
        safetensors.torch.save_file(_unshared(whole), f"{directory}/model.safetensors", {"format": "pt"})
        model = model_class.from_pretrained(directory, config=config, dtype=dtype, **options)
    if not sharded:
        return model.to(device).eval()
    if model.device.type != device.type:
        raise RuntimeError(
            f"transformers placed the model on {model.device}, not on {device}: it takes the accelerator it "
            "sees; hide it with CUDA_VISIBLE_DEVICES='' for a CPU model"
        )
    return model.eval()


def _transformers_version() -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in importlib.metadata.version("transformers").split(".")[:2])
    except importlib.metadata.PackageNotFoundError:
        return ()


def _check_hf(classes: tuple[str, str], ep: bool, planned: bool, since: tuple[int, int]) -> str:
    """Why the transformers installed here cannot shard this model, "" if it can."""
    if not _transformers_version():
        return "transformers is not installed"
    import transformers

    if _transformers_version() < since:
        return f"transformers {transformers.__version__} gets {classes[0]} wrong, {since[0]}.{since[1]} does not"
    missing = [name for name in classes if not hasattr(transformers, name)]
    if missing:
        return f"transformers {transformers.__version__} has no {missing[0]}"
    model_class, config_class = (getattr(transformers, name) for name in classes)
    if not (planned or getattr(config_class, "base_model_tp_plan", None) or getattr(model_class, "_tp_plan", None)):
        return f"transformers {transformers.__version__} has no tensor-parallel plan for {classes[0]}"
    if ep and not hasattr(getattr(transformers, "DistributedConfig", None), "ep_size"):
        return f"transformers {transformers.__version__} has no DistributedConfig(ep_size=...)"
    return ""


def _hf(
    name: str,
    stem: str,
    overrides: dict[str, Any] | None = None,
    all_reduces: int = 1 + 2 * LAYERS,
    fusible: int | None = None,
    *,
    text: str = "",
    attention: str = "sdpa",
    ep: bool = False,
    plan: dict[str, str] | None = None,
    since: tuple[int, int] = (5, 0),
    **known: Any,
) -> ModelSpec:
    """One row. By default the embedding and two projections a layer are all-reduced, and fusible."""
    classes = (f"{stem}ForCausalLM", f"{stem}{text}Config")
    make = partial(_make_hf, classes, overrides or {}, attention, ep, plan)
    fusible = all_reduces if fusible is None else fusible
    check = partial(_check_hf, classes, ep, plan is not None, since)
    return ModelSpec(name, make, all_reduces, fusible, check, **known)


LAYER_NORM = "LayerNorm, not RMSNorm: nothing may fuse"
# h + (E + g * S) = (h + g * S) + E: the experts' all-reduce E fuses with g * S in its residual,
# whatever the gate g. S could be fused, or be added to E before one all-reduce, only if g were
# known to be the same on every rank.
_GATE = "experts + sigmoid(gate) * shared expert: the gate stands between the norm and the shared expert's all-reduce"
_POST_NORM = "the embedding's all-reduce feeds projections, not a norm"
_NO_PLAN = "a plan of the zoo's own: transformers shards the embedding only"
_OWN_MLP = "a plan of the zoo's own, for the MLP: transformers shards the embedding only"
# h + (E + S) * c = (h + S * c) + E * c: the shared expert S is whole on every rank and joins the
# residual.
_SHARED_WHOLE = "the shared MLP is whole on every rank; a scale follows their sum"
_WHOLE = "attention is whole on every rank"
_EXPERTS_ONLY = "only the experts of one layer and the embedding are sharded"
_EP = "expert parallelism: the all-reduce adds the outputs of each rank's whole experts"

HF_MODELS = (
    _hf("llama", "Llama"),
    _hf("llama_bias", "Llama", {"attention_bias": True, "mlp_bias": True}, note="a bias after the all-reduce"),
    _hf("mistral", "Mistral", {**_HEAD, "sliding_window": None}),
    _hf("qwen2", "Qwen2", {"tie_word_embeddings": True}),
    _hf("qwen3", "Qwen3", _HEAD),
    _hf("smollm3", "SmolLM3"),
    _hf("gemma1", "Gemma", _HEAD),
    _hf("gemma2", "Gemma2", _GEMMA, attention="eager"),
    _hf("gemma3", "Gemma3", _GEMMA, text="Text"),
    _hf(
        *("gemma3n", "Gemma3n", {**_PER_LAYER, "laurel_rank": 8, "activation_sparsity_pattern": None}, 5, 4),
        text="Text",
        since=(5, 17),
        note="the embedding's all-reduce feeds AltUp, not a norm; activation sparsity is off: sharded, "
        "transformers takes its statistics over one rank's part of the MLP, which gives another model",
    ),
    _hf("gemma4", "Gemma4", {**_PER_LAYER, "global_head_dim": HEAD_DIM}, text="Text", since=(5, 17)),
    _hf("qwen3_moe", "Qwen3Moe", {**_HEAD, **_EXPERTS}),
    _hf("qwen3_moe_ep", "Qwen3Moe", {**_HEAD, **_EXPERTS}, ep=True, note=_EP),
    _hf("qwen2_moe", "Qwen2Moe", _SHARED_EXPERT, note="the shared expert is whole on every rank"),
    _hf("mixtral", "Mixtral", _LOCAL_EXPERTS),
    _hf("olmoe", "Olmoe", _EXPERTS),
    _hf("minimax_m2", "MiniMaxM2", {**_HEAD, **_LOCAL_EXPERTS, "rotary_dim": HEAD_DIM}),
    _hf("deepseek_v3", "DeepseekV3", {**_MLA, **_ROUTED}, 4, merges=1, note="attention is whole on every rank"),
    _hf("glm4", "Glm4", {**_HEAD, "partial_rotary_factor": 0.5}),
    _hf("glm4_moe", "Glm4Moe", {**_HEAD, **_ROUTED}, 6, merges=1),
    _hf("granite", "Granite", {**_SCALES, "logits_scaling": 8.0}),
    _hf(
        "granite_moe",
        "GraniteMoe",
        {**_LOCAL_EXPERTS, **_SCALES},
        3,
        note="the experts are whole on every rank",
    ),
    _hf("olmo", "Olmo", None, 5, 0, note=LAYER_NORM),
    _hf("olmo2", "Olmo2", None, 5, 4, note=_POST_NORM),
    _hf("olmo3", "Olmo3", _SLIDING, 5, 4, note=_POST_NORM),
    _hf("exaone4", "Exaone4", _SLIDING, 5, 4, note=_POST_NORM),
    _hf("nanochat", "NanoChat", note="RMSNorm without a weight"),
    _hf("phi", "Phi", None, 5, 0, note=LAYER_NORM),
    _hf("phi3", "Phi3", {"sliding_window": None}, note="Phi-4 is this class too"),
    _hf("cohere", "Cohere", None, 5, 0, note=LAYER_NORM),
    _hf("cohere2", "Cohere2", _SLIDING, 5, 0, note=LAYER_NORM),
    _hf("gpt_neox", "GPTNeoX", None, 5, 0, note=LAYER_NORM),
    _hf("qwen3_next", "Qwen3Next", {**_LINEAR, **_SHARED_EXPERT}, 6, 4, gated=2, note=_GATE),
    _hf("qwen3_5", "Qwen3_5", _LINEAR, 4, text="Text", note="linear attention ends in an all-gather"),
    _hf("qwen3_5_moe", "Qwen3_5Moe", {**_LINEAR, **_SHARED_EXPERT}, 6, 4, text="Text", gated=2, note=_GATE),
    _hf(
        *("llama4", "Llama4", {**_HEAD, "intermediate_size_mlp": 192, **_LOCAL_EXPERTS}, 7),
        text="Text",
        since=(5, 17),
        attention="eager",
        merges=2,
        note="every expert's output is all-reduced, and only then summed over the experts",
    ),
    _hf(
        *("gpt_oss", "GptOss", {**_HEAD, **_SLIDING, **_LOCAL_EXPERTS}, 1),
        attention="eager",
        note="the plan shards the embedding and the output projection only",
    ),
    _hf(
        "gpt_oss_ep",
        "GptOss",
        {**_HEAD, **_SLIDING, **_LOCAL_EXPERTS},
        3,
        attention="eager",
        ep=True,
        note=_EP,
    ),
    _hf("arcee", "Arcee", note="an MLP without a gate"),
    _hf("apertus", "Apertus"),
    _hf("seed_oss", "SeedOss", _HEAD),
    _hf("ernie4_5", "Ernie4_5"),
    _hf(
        *("ernie4_5_moe", "Ernie4_5_Moe"),
        {"moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 48, "moe_num_shared_experts": 1}
        | {"moe_layer_start_index": 0},
        *(7, 7),
        merges=2,
    ),
    _hf("hunyuan", "HunYuanDenseV1", _HEAD, plan=_plan("mlp", *_GATED, attention=True), note=_NO_PLAN),
    _hf("hunyuan_v3", "HYV3", {**_HEAD, **_EXPERTS, "num_shared_experts": 1}, 6, merges=1),
    _hf("dots1", "Dots1", {**_HEAD, **_ROUTED}, 6, merges=1),
    _hf("starcoder2", "Starcoder2", {"sliding_window": None}, 5, 0, note=LAYER_NORM),
    _hf("nemotron", "Nemotron", _HEAD, 5, 0, note=LAYER_NORM),
    _hf("jais2", "Jais2", _HEAD, 5, 0, note=LAYER_NORM),
    _hf("helium", "Helium", _HEAD),
    _hf("glm", "Glm", _HEAD),
    _hf("glm4_moe_lite", "Glm4MoeLite", {**_MLA, **_ROUTED}, 5, note="the shared expert is whole on every rank"),
    _hf("phimoe", "Phimoe", _LOCAL_EXPERTS, 3, 0, note=LAYER_NORM),
    _hf("deepseek_v2", "DeepseekV2", {**_MLA, **_ROUTED}, 6, merges=1),
    _hf(
        "granite_shared",
        "GraniteMoeShared",
        {**_LOCAL_EXPERTS, **_SCALES, "shared_intermediate_size": 96},
        3,
        note=_SHARED_WHOLE,
    ),
    _hf(
        *("granite_hybrid", "GraniteMoeHybrid"),
        {**_LOCAL_EXPERTS, **_SCALES, **_MAMBA, "shared_intermediate_size": 96, "layer_types": ["mamba", "attention"]},
        3,
        note=_SHARED_WHOLE,
    ),
    _hf(
        "lfm2",
        "Lfm2",
        {"layer_types": ["conv", "full_attention"]},
        3,
        plan=_plan("feed_forward", "w1", "w3", "w2"),
        note=_OWN_MLP,
    ),
    _hf(
        *("lfm2_moe", "Lfm2Moe"),
        {**_EXPERTS, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
        2,
        note=_EXPERTS_ONLY,
    ),
    _hf("bamba", "Bamba", {"attn_layer_indices": [1], **_MAMBA}, 3, plan=_plan("feed_forward", *_GATED), note=_OWN_MLP),
    _hf(
        *("falcon_h1", "FalconH1"),
        {**_MAMBA, "mamba_n_groups": 1, "mamba_d_ssm": 192, "mlp_multipliers": [0.5, 0.25]},
        3,
        plan=_plan("feed_forward", *_GATED),
        note=_OWN_MLP + "; a scale after the all-reduce",
    ),
    _hf(
        *("jamba", "Jamba"),
        {"num_experts": 6, "num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 1}
        | {"expert_layer_period": 2, "expert_layer_offset": 1, "use_mamba_kernels": False},
        2,
        note=_EXPERTS_ONLY,
    ),
    _hf(
        *("exaone_moe", "ExaoneMoe"),
        {**_HEAD, **_SLIDING, **_EXPERTS, "num_shared_experts": 1, "is_moe_layer": [False, True]},
    ),
    _hf("flex_olmo", "FlexOlmo", _EXPERTS, 5, 4, note=_POST_NORM),
    _hf("ministral3", "Ministral3", _HEAD),
    _hf("minimax", "MiniMax", {**_HEAD, **_LOCAL_EXPERTS, "layer_types": ["full_attention"] * LAYERS}),
    _hf("laguna", "Laguna", {**_HEAD, **_EXPERTS}, 6, merges=1),
    _hf("solar_open", "SolarOpen", {**_HEAD, **_ROUTED}),
    _hf("mellum", "Mellum", {**_HEAD, **_EXPERTS}),
    _hf("youtu", "Youtu", _MLA, 3, note=_WHOLE),
    _hf("kimi_linear", "KimiLinear", {**_MLA, **_ROUTED}, 4, merges=1, note=_WHOLE),
    _hf("vaultgemma", "VaultGemma", _GEMMA, attention="eager"),
    _hf(
        "falcon",
        "Falcon",
        {"new_decoder_architecture": True, "num_kv_heads": KV_HEADS, "tie_word_embeddings": False},
        3,
        0,
        plan={
            "word_embeddings": "embedding_rowwise",
            "h.*.mlp.dense_h_to_4h": "colwise",
            "h.*.mlp.dense_4h_to_h": "rowwise",
        },
        note="a plan of the zoo's own, for the MLP: transformers has none, and its attention takes whole heads only. "
        "Attention and MLP side by side. " + LAYER_NORM,
    ),
)
