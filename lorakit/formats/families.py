"""Which kind of model a pile of PEFT-like keys is for, as far as the names of its modules tell.

    model.layers.0.self_attn.q_proj       Llama, Qwen, Mistral, Gemma, Phi-3 ...
    transformer.h.0.attn.c_attn           GPT-2, and in other words Falcon, BLOOM, GPT-J
    encoder.layer.0.attention.self.query  BERT, RoBERTa

A LoRA of a language model needs its config: alpha, and more, stand nowhere else. So its keys alone are an error that
names the family; those of a diffusion model can be read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_FRONT = r"(base_model\.model\.)?(\w+\.)*?"
# The first that fits. "\d+" stands for a layer's number.
_FAMILIES = (
    ("a vision-language model (Llava, Qwen-VL, Gemma)", r"(language_model|vision_tower|visual|vision_model)\."),
    ("a mixture-of-experts model", r"layers\.\d+\.(mlp|block_sparse_moe|feed_forward)\.(experts|shared_expert)"),
    ("a Llama-like language model (Llama, Qwen, Mistral, Gemma)", r"layers\.\d+\.(self_attn|linear_attn)\.\w+_proj"),
    ("a Llama-like language model (Llama, Qwen, Mistral, Gemma)", r"layers\.\d+\.mlp\.(gate|up|down|gate_up)_proj"),
    ("a Phi-like language model", r"layers\.\d+\.(self_attn\.(qkv_proj|dense)|mlp\.fc[12])"),
    ("an encoder-decoder (BART, Whisper)", r"(encoder|decoder)\.layers\.\d+\.(self_attn|encoder_attn|fc[12])"),
    ("an OPT-like language model", r"layers\.\d+\.fc[12]"),
    ("GPT-2 or a model like it (GPT-J, Falcon, BLOOM)", r"h\.\d+\.(attn|self_attention|mlp|attention)\."),
    ("a GPT-NeoX-like language model (Pythia)", r"gpt_neox\.layers\.\d+\.|layers\.\d+\.attention\.query_key_value"),
    ("ChatGLM or a model like it", r"encoder\.layers\.\d+\.(self_attention|mlp)\."),
    ("a T5-like encoder-decoder", r"(encoder|decoder)\.block\.\d+\.layer\.\d+\."),
    ("a BERT-like encoder (BERT, RoBERTa)", r"encoder\.layer\.\d+\.(attention|intermediate|output)\."),
    ("DistilBERT", r"transformer\.layer\.\d+\.(attention|ffn)\."),
    ("a Mamba-like language model", r"layers\.\d+\.(mixer|mamba)\."),
    ("a Llama in Meta's or torchtune's names", r"layers\.\d+\.(attention\.w[qkvo]|attn\.(q|k|v|output)_proj)\b"),
)
_COMPILED = tuple((family, re.compile(_FRONT + pattern)) for family, pattern in _FAMILIES)
# Paths that look like a language model's and are a diffusion transformer's: ACE-Step.
_NOT = re.compile(r"^(?!(base_model\.model\.)?(model|language_model|transformer\.h|backbone)\.).*\.cross_attn\.")


def family_of(keys: Iterable[str]) -> str | None:
    """The family of language models that most keys look like, in words; None if it is none of those known."""
    keys = list(keys)
    if any(_NOT.match(key) for key in keys):
        return None
    for family, pattern in _COMPILED:
        if 2 * sum(pattern.match(key) is not None for key in keys) >= len(keys) > 0:
            return family
    return None
