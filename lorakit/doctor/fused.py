"""Which of lorakit's fused parts apply to which models with the installed transformers, and why others do not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class FusedPart:
    """A part of a model's step. `why`: what keeps it from being fused; empty where it is."""

    model: str
    part: str
    fused: bool
    why: str = ""


# Of every kind of architecture one, as small as it can be.
_SIZES: dict[str, Any] = {
    "vocab_size": 16, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 8, "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
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
    "BERT": ("BertConfig", "BertModel", {k: v for k, v in _SIZES.items() if k not in ("num_key_value_heads", "head_dim")}),
    "T5": ("T5Config", "T5ForConditionalGeneration", _T5),
}


def fused_report() -> list[FusedPart]:
    """By model and part, found by attaching an adapter to a small model of each architecture, in 16 bits on the CPU."""
    import torch
    import transformers

    from ..config import LoraConfig
    from ..layers.fused.fused import report
    from ..model.attach import attach

    found: list[FusedPart] = []
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        for name, (config, model, sizes) in MODELS.items():
            try:
                made = getattr(transformers, model)(getattr(transformers, config)(**sizes)).to(torch.bfloat16)
                rows = report(attach(made, LoraConfig(rank=1)))
            except Exception as error:  # a release that is not known yet may raise anything, and doctor shall say so
                found.append(
                    FusedPart(name, "the model", False, f"cannot be built with this transformers: {type(error).__name__}: {error}")
                )
                continue
            found += [
                FusedPart(name, f"{row.kind} ({row.cls})" if row.cls else row.kind, row.why_not is None, row.why_not or "") for row in rows
            ]
    return found
