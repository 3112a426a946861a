"""Find which fused parts apply to which architectures with the installed transformers, and why others do not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class FusedPart:
    """A part of a model's training step. `why`: the reason it is not fused; empty if it is."""

    model: str
    part: str
    fused: bool
    why: str = ""


# One model per kind of architecture, as small as possible.
_SIZES: dict[str, Any] = {
    "vocab_size": 16,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_T5 = {
    "vocab_size": 16,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 1,
    "num_heads": 2,
    "feed_forward_proj": "gated-silu",
    "dropout_rate": 0.0,
}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", "LlamaForCausalLM", _SIZES),
    "Mistral": ("MistralConfig", "MistralForCausalLM", _SIZES),
    "Qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _SIZES),
    "Gemma 3": ("Gemma3TextConfig", "Gemma3ForCausalLM", _SIZES),
    "Phi-3": ("Phi3Config", "Phi3ForCausalLM", _SIZES),
    "GPT-NeoX": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _SIZES),
    "BERT": (
        "BertConfig",
        "BertModel",
        {k: v for k, v in _SIZES.items() if k not in ("num_key_value_heads", "head_dim")},
    ),
    "T5": ("T5Config", "T5ForConditionalGeneration", _T5),
}


def fused_report() -> list[FusedPart]:
    """Attach an adapter to a tiny bf16 model of each architecture, on the CPU, and report every part of it."""
    import torch
    import transformers

    from ..config import LoraConfig
    from ..layers.fused.fused import report
    from ..model.attach import attach

    parts: list[FusedPart] = []
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        for name, (config_class, model_class, sizes) in MODELS.items():
            try:
                config = getattr(transformers, config_class)(**sizes)
                model = getattr(transformers, model_class)(config).to(torch.bfloat16)
                rows = report(attach(model, LoraConfig(rank=1)))
            except Exception as error:  # a future release may raise anything; doctor has to report it, not crash
                why = f"cannot be built with this transformers: {type(error).__name__}: {error}"
                parts.append(FusedPart(name, "the model", False, why))
                continue
            for row in rows:
                part = f"{row.kind} ({row.cls})" if row.cls else row.kind
                parts.append(FusedPart(name, part, row.why_not is None, row.why_not or ""))
    return parts
