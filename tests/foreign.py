"""Small random models of Hugging Face's own classes, as the tests of the conversion need them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB_SIZE, CONTEXT = 97, 128
_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2}
_QWEN = {"num_key_value_heads": 2, "moe_intermediate_size": 24, **_EXPERTS}
_LATENT = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "num_mtp_layers": 0,
}
_ALL_SLIDING = {"use_sliding_window": True, "sliding_window": 7, "layer_types": ["sliding_attention"] * 3}

# Each model: its model_type, its settings besides the sizes, what it is there for.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"num_key_value_heads": 2, "num_local_experts": 5, "num_experts_per_tok": 2}),
    "mixtral: window, wide heads, tied": (
        "mixtral",
        {
            "num_key_value_heads": 1,
            "num_local_experts": 4,
            "num_experts_per_tok": 3,
            "sliding_window": 6,
            "head_dim": 12,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3_moe: biases, window, a dense layer, normed": (
        "qwen3_moe",
        {
            **_QWEN,
            "head_dim": 12,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
        },
    ),
    "qwen3_moe: experts in each second layer, tied": (
        "qwen3_moe",
        {**_QWEN, "head_dim": 8, "decoder_sparse_step": 2, "tie_word_embeddings": True},
    ),
    "qwen2_moe": ("qwen2_moe", {**_QWEN, "shared_expert_intermediate_size": 40, "rms_norm_eps": 1e-5}),
    "qwen2_moe: window, a dense layer, normed, no biases": (
        "qwen2_moe",
        {
            **_QWEN,
            **_ALL_SLIDING,
            "shared_expert_intermediate_size": 20,
            "mlp_only_layers": [0],
            "norm_topk_prob": True,
            "qkv_bias": False,
        },
    ),
    "olmoe: biases": ("olmoe", {**_EXPERTS, "num_key_value_heads": 2, "attention_bias": True}),
    "olmoe: normed": ("olmoe", {**_EXPERTS, "num_key_value_heads": 4, "norm_topk_prob": True}),
    "deepseek_v3: groups, two shared experts": (
        "deepseek_v3",
        {**_LATENT, "n_group": 4, "topk_group": 2, "n_shared_experts": 2, "first_k_dense_replace": 1},
    ),
    "deepseek_v3: no latent queries, no groups, no dense layer": (
        "deepseek_v3",
        {
            **_LATENT,
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 0,
            "routed_scaling_factor": 1.0,
        },
    ),
    "llama": ("llama", {"num_key_value_heads": 2}),
    "llama: biases, wide heads, tied": (
        "llama",
        {"num_key_value_heads": 4, "head_dim": 12, "attention_bias": True, "tie_word_embeddings": True},
    ),
}
EACH_FAMILY = {model_type: name for name, (model_type, _) in reversed(MODELS.items())}


def hf_config(name: str) -> Any:
    model_type, settings = MODELS[name]
    return transformers.AutoConfig.for_model(model_type, **{**_SIZES, **settings})


@torch.no_grad()
def hf_model(name: str) -> Any:
    """No norm is 1, no bias 0, and the weights are wide enough to say different things."""
    torch.manual_seed(11)
    model = transformers.AutoModelForCausalLM.from_config(hf_config(name)).eval()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for tensor_name, tensor in tensors.items():
        if tensor_name.endswith("inv_freq"):
            continue
        if "norm" in tensor_name:
            tensor.copy_(1 + 0.3 * torch.randn_like(tensor))
        else:
            tensor.copy_(0.25 * torch.randn_like(tensor))
    return model


def save_hf_model(name: str, folder: Path, max_shard_size: str = "50KB") -> Any:
    model = hf_model(name)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model
