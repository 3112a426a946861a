"""Tiny encoder-decoders on disk, and pairs to train them on."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import tiny_lm
import torch

FOODS = ("tea", "rice", "soup", "figs", "cake", "corn")


def t5(vocabulary: int = 258, gated: bool = True, tied: bool = False, **changes: Any):
    """Of bytes; with the gated feed-forward and the untied head of T5 1.1 and FLAN, unless said."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=vocabulary,
        d_kv=8,
        num_heads=4,
        feed_forward_proj="gated-gelu" if gated else "relu",
        tie_word_embeddings=tied,
        decoder_start_token_id=tiny_lm.PAD,
        pad_token_id=tiny_lm.PAD,
        eos_token_id=tiny_lm.EOS,
        **{"d_model": 32, "d_ff": 48, "num_layers": 2} | changes,
    )
    return T5ForConditionalGeneration(config)


def bart(kind: str = "Bart", **changes: Any):
    """BART, or what is built like it: MBart, Pegasus, Marian."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=258,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=tiny_lm.POSITIONS,
        init_std=0.2,
        pad_token_id=tiny_lm.PAD,
        bos_token_id=None,
        eos_token_id=tiny_lm.EOS,
        decoder_start_token_id=tiny_lm.EOS,
        forced_eos_token_id=tiny_lm.EOS,
        **changes,
    )
    name = "MarianMTModel" if kind == "Marian" else f"{kind}ForConditionalGeneration"
    return getattr(transformers, name)(config)


def pairs(count: int = 24) -> list[dict[str, str]]:
    """Sources and targets of unequal lengths, all sources different."""
    return [{"source": row["prompt"].strip(), "target": row["completion"]} for row in tiny_lm.rows(count)]


# ------------------------------------------------------------------------------------- something to learn


def word_tokenizer(words: list[str]):
    """A token for each word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def slots() -> list[dict[str, str]]:
    """A name and a food in either order, to a sentence: 72 pairs in a fixed random order."""
    made = [
        {"source": f"name {n} food {f}" if i % 2 else f"food {f} name {n}", "target": f"{n} eats {f}"}
        for i, (n, f) in enumerate(itertools.product(tiny_lm.NAMES, FOODS))
    ]
    random.Random(0).shuffle(made)
    return made


def save_for_slots(folder: Path) -> Path:
    """A T5 of one layer with a token for each word of `slots`."""
    tokenizer = word_tokenizer(["name", "food", "eats", *tiny_lm.NAMES, *FOODS])
    model = t5(len(tokenizer), gated=False, tied=True, d_ff=64, num_layers=1, dropout_rate=0.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
