"""Tokenizers of several kinds, trained on a few lines: each cuts words in its own way."""

from __future__ import annotations

from functools import cache
from typing import Any

LINES = ["Ada lives in Abuja.", "Bo lived in Lagos, and Ada in Abuja!", "Who lives in Abuja? Ada."]


@cache
def bytes() -> Any:
    """One token a byte."""
    import tiny_lm

    return tiny_lm.tokenizer()


@cache
def byte_bpe(prefix_space: bool = False) -> Any:
    """Byte-level BPE as GPT-2's: a word's token includes the space before it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=96)


def byte_bpe_prefix_space() -> Any:
    """The same with a space before the first word too."""
    return byte_bpe(True)


@cache
def wordpiece() -> Any:
    """WordPiece as BERT's, in lower case, with [CLS], [SEP] and segments."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer(lowercase=True)
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    raw.train_from_iterator(LINES, trainers.WordPieceTrainer(vocab_size=80, special_tokens=special))
    marks = [(mark, raw.token_to_id(mark)) for mark in ("[CLS]", "[SEP]")]
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=marks
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        model_max_length=96,
    )
