"""Tiny random language models of many architectures, large enough in their weights that prompts can be told apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch

VOCABULARY = 60
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_ATTENTION = {
    **_COMMON,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
_MAMBA = {**_COMMON, "state_size": 8}
_HYBRID = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _ATTENTION,
    "gemma3_text": {**_ATTENTION, "head_dim": 8, "sliding_window": 4},
    "gpt2": {**_COMMON, "num_attention_heads": 4, "max_position_embeddings": 64},
    "gptj": {**_COMMON, "num_attention_heads": 4, "rotary_dim": 4, "max_position_embeddings": 64},
    "bloom": {**_COMMON, "num_attention_heads": 4},
    "mpt": {**_COMMON, "num_attention_heads": 4, "max_seq_len": 64},
    "mixtral": {**_ATTENTION, **_EXPERTS},
    "gpt_oss": {**_ATTENTION, **_EXPERTS, "head_dim": 8, "sliding_window": 4},
    "deepseek_v3": {
        **_ATTENTION,
        "num_key_value_heads": 4,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "glm4_moe": {
        **_ATTENTION,
        "head_dim": 8,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "qwen2_moe": {
        **_ATTENTION,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "qwen3_next": {
        **_ATTENTION,
        "head_dim": 8,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "mamba": _MAMBA,
    "mamba2": {**_MAMBA, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8},
    "falcon_mamba": _MAMBA,
    "falcon_h1": {**_ATTENTION, **_HYBRID, "mamba_d_ssm": 64, "head_dim": 8},
    "bamba": {**_ATTENTION, **_HYBRID, "attn_layer_indices": [1]},
    "jamba": {
        **_ATTENTION,
        "num_experts": 2,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "lfm2": {**_ATTENTION, "full_attn_idxs": [1]},
    "rwkv": {**_COMMON, "attention_hidden_size": 32, "intermediate_size": 64, "context_length": 64},
}
# Others with windows, or with windows in some layers.
WINDOWED: dict[str, dict[str, Any]] = {
    "mistral": {**_ATTENTION, "sliding_window": 4},
    "gemma2": {**_ATTENTION, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8},
    "qwen2": {**_ATTENTION, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": {**_ATTENTION, "head_dim": 8},
}
STATE_SPACE = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "bamba", "jamba")
MOE = ("mixtral", "gpt_oss", "deepseek_v3", "glm4_moe", "qwen2_moe", "qwen3_next")


def config_of(architecture: str) -> Any:
    from transformers import CONFIG_MAPPING

    if architecture not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {architecture}")
    return CONFIG_MAPPING[architecture](**(CONFIGS | WINDOWED)[architecture])


def causal_lm(architecture: str, seed: int = 3, noise: float = 0.15):
    """A model in float32, in evaluation mode. `noise` is added to the small weights of a fresh model."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(architecture)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn_like(parameter) * noise)
    return model


def greedy(model: Any, prompt: list[int], steps: int) -> list[int]:
    """The most likely tokens, each from a full forward pass without a cache."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(steps):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]
