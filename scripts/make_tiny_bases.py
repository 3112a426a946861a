"""Tiny random models of the architectures that lorakit writes as GGUF, each with a tokenizer and an adapter, for
try_llama_cpp.py.

    python scripts/make_tiny_bases.py OUT
    for name in OUT/*-base; do python scripts/try_llama_cpp.py $name ${name%-base}-adapter --dtypes f32; done

Weights, norms and biases are random, large enough that a wrong place of any would show. The tokenizers are trained on
lorakit's own source.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

import lorakit as lk
from lorakit.layers.updates.lora import LoraFactors

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "factor": 4.0}
TEXT = [
    p.read_text(encoding="utf8")[:3000] for p in sorted((Path(__file__).parent.parent / "lorakit").rglob("*.py"))[:60]
]
TEXT += ["Café naïve, Straße, 東京, привет, 🙂👍🏽. " * 20]


def byte_level(name: str | None = None, whole: bool = False) -> PreTrainedTokenizerFast:
    """`name`: llama.cpp's for how text is cut; else as GPT-2 does."""
    raw = Tokenizer(models.BPE(ignore_merges=whole))
    cut = [pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[name]), "isolated")] if name else []
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [*cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not cut)]
    )
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(vocab_size=700, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<|end|>", eos_token="<|end|>", pad_token="<|end|>")


def sentencepiece() -> PreTrainedTokenizerFast:
    """Merges as transformers makes them of a SentencePiece model: all the ways to cut a token in two, in the order of
    the tokens' scores.
    """
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))]
    raw = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("▁?[^▁]+|▁"), "isolated")
    lines = [text.replace("\n", " ") for text in TEXT]
    raw.train_from_iterator(
        lines, trainers.BpeTrainer(vocab_size=800, special_tokens=specials, limit_alphabet=90, show_progress=False)
    )
    model = json.loads(raw.to_str())["model"]
    vocab, order = model["vocab"], dict.fromkeys(a + b for a, b in model["merges"])
    merges = [(t[:i], t[i:]) for t in order for i in range(1, len(t)) if t[:i] in vocab and t[i:] in vocab]
    raw.model = models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    raw.pre_tokenizer = pre_tokenizers.Sequence([])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    raw.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in specials[:3]])
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


BASES: dict[str, tuple[str, Callable[[], PreTrainedTokenizerFast], dict[str, Any]]] = {
    "llama": ("Llama", sentencepiece, {}),
    "llama-biases": (
        "Llama",
        lambda: byte_level("llama-bpe", whole=True),
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama-llama3": ("Llama", lambda: byte_level("smaug-bpe"), {"rope_parameters": {"rope_theta": 1e4, **LLAMA3}}),
    "llama-yarn": ("Llama", lambda: byte_level("gpt-4o"), {"rope_parameters": {"rope_theta": 1e4, **YARN}}),
    "llama-linear": ("Llama", lambda: byte_level("gpt-4o"), {"rope_parameters": {"rope_theta": 1e4, **LINEAR}}),
    "mistral": ("Mistral", lambda: byte_level("tekken", whole=True), {"head_dim": 32, "sliding_window": 128}),
    "qwen2": ("Qwen2", lambda: byte_level("qwen2"), {}),
    "qwen3": ("Qwen3", lambda: byte_level("qwen2"), {"head_dim": 128, "tie_word_embeddings": True}),
    "gemma": ("Gemma", sentencepiece, {"head_dim": 32}),
    "gpt2": ("GPT2", byte_level, {}),
}


def main() -> None:
    out = Path(sys.argv[1])
    for name, (kind, tokenizer_of, more) in BASES.items():
        torch.manual_seed(0)
        tokenizer = tokenizer_of()
        ids = {f"{end}_token_id": getattr(tokenizer, f"{end}_token_id") for end in ("bos", "eos", "pad")} | {
            "vocab_size": len(tokenizer) + 5
        }
        gpt2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.1}
        config = getattr(transformers, f"{kind}Config")(**(gpt2 if kind == "GPT2" else SIZES), **ids, **more)
        model = getattr(transformers, f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(config)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data.add_(torch.randn(parameter.shape) * 0.2)
        model.save_pretrained(out / f"{name}-base")
        tokenizer.save_pretrained(out / f"{name}-base")
        lk.attach(model, lk.LoraConfig(rank=4))
        for module in model.modules():
            if isinstance(module, LoraFactors):
                module.A.data.normal_(0, 0.15)
                module.B.data.normal_(0, 0.15)
        lk.capture(model).save(out / f"{name}-adapter")


if __name__ == "__main__":
    main()
