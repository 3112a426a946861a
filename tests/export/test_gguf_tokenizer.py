"""Tokenizers as GGUF pairs: pre-tokenizers are recognized by definition, and transformers reads the same tokens from
the file.
"""

from __future__ import annotations

import json

import pytest
import tiny_lm
import torch
import transformers
from packaging.version import Version
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lorakit.errors import LorakitError
from lorakit.export.gguf_tokenizer import pre_name, vocabulary
from lorakit.export.merged import export_merged

# transformers' own table of GGUF's pre-tokenizer names; older releases do not have it.
GGUF_PRE_TOKENIZER_SPLITS = pytest.importorskip(
    "transformers.integrations.gguf.gguf_tokenizer_mapping"
).GGUF_PRE_TOKENIZER_SPLITS

TEXT = [
    "the cat sat on the mat, there and then; in 1984 it was 42 degrees. "
    "That's what they've said!\n\tCafé 東京 привет 🙂"
] * 3
SAMPLES = (
    "the cat's mat",
    "In 1984,  3 x 42!\n\n\tthen",
    " café 東京 привет, 🙂👍🏽",
    "they've THEY'VE 12345",
    "<|end|>the",
    "",
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)


def split(expression: str, behavior: str = "isolated", invert: bool = False):
    cut = pre_tokenizers.Split(Regex(expression), behavior, invert)
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def byte_level(cut, **more) -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE(**more))
    raw.pre_tokenizer, raw.decoder = cut, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(vocab_size=320, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<|end|>", eos_token="<|end|>")


def sentencepiece(begin: bool = True, complete: bool = True) -> PreTrainedTokenizerFast:
    """As transformers converts Llama 2's .model: the merges of a token are all its splits into two tokens, ordered by
    score.
    """
    words = ["▁the", "▁th", "he", "▁t", "th", "▁cat", "at", "▁c", "ca", "cat"]
    letters = [*"abcdefghijklmnopqrstuvwxyz", "▁"]
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))]
    order = ["he", "▁t", "th", "at", "▁th", "▁c", "ca", "▁the", "cat", "▁cat"]
    vocab = {t: n for n, t in enumerate([*specials, *letters, *sorted(words)])}
    merges = [(t[:i], t[i:]) for t in order for i in range(1, len(t)) if t[:i] in vocab and t[i:] in vocab]
    raw = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=merges if complete else merges[:-1],
            byte_fallback=True,
            unk_token="<unk>",
            fuse_unk=True,
        )
    )
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    raw.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in specials[:3]])
    if begin:
        raw.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def definition(tokenizer) -> dict:
    return json.loads(tokenizer.backend_tokenizer.to_str())


DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES])


@pytest.mark.parametrize("name", ["llama-bpe", "qwen2", "tekken", "gpt-4o", "smaug-bpe"])
def test_pre_tokenizer_names_match_transformers_table(name):
    whole = name in ("llama-bpe", "tekken")
    expression = GGUF_PRE_TOKENIZER_SPLITS[name]
    assert pre_name(definition(byte_level(split(expression), ignore_merges=whole))) == name
    assert pre_name(definition(byte_level(split(expression, "removed", True), ignore_merges=whole))) == name


def test_byte_and_digit_pre_tokenizers_have_names():
    assert pre_name(definition(byte_level(BYTES))) == "gpt-2"
    assert pre_name(definition(byte_level(DIGITS))) == "smollm"


@pytest.mark.parametrize(
    "cut, more",
    [
        (split(r"\p{L}+|[^\p{L}]+"), {}),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), {}),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), BYTES]), {}),
        (BYTES, {"ignore_merges": True}),
        (split(GGUF_PRE_TOKENIZER_SPLITS["qwen2"], "merged_with_next"), {}),
    ],
)
def test_an_unknown_pre_tokenizer_is_refused_and_shown(cut, more):
    with pytest.raises(
        LorakitError,
        match=r"llama\.cpp has no known name for its pre-tokenizer: \{.*\n  known: gpt-2, smollm, llama-bpe",
    ) as caught:
        vocabulary(byte_level(cut, **more), 400)
    assert "lorakit merge writes a transformers folder" in str(caught.value)


@pytest.mark.parametrize(
    "changes", [{"normalizer": normalizers.Lowercase()}, {"model": models.WordLevel({"a": 0}, "a")}]
)
def test_other_normalizers_and_models_are_refused(changes):
    tokenizer = byte_level(BYTES)
    for name, value in changes.items():
        setattr(tokenizer.backend_tokenizer, name, value)
    with pytest.raises(LorakitError, match="tokenizer cannot be written as GGUF: it"):
        vocabulary(tokenizer, 400)


def test_token_types_ids_and_padding():
    tokenizer = byte_level(BYTES)
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    size = len(tokenizer)
    pairs = vocabulary(tokenizer, size + 2).pairs
    types = dict(zip(pairs["tokenizer.ggml.tokens"], pairs["tokenizer.ggml.token_type"], strict=True))
    assert (types["<|end|>"], types["<think>"], types["Ġthe"], types[f"[PAD{size}]"]) == (3, 4, 1, 5)
    assert pairs["tokenizer.ggml.tokens"][tokenizer.convert_tokens_to_ids("<think>")] == "<think>"
    assert pairs["tokenizer.ggml.eos_token_id"] == pairs["tokenizer.ggml.bos_token_id"] == 0
    assert not pairs["tokenizer.ggml.add_bos_token"]
    with pytest.raises(LorakitError, match=f"token ids up to {size - 1}, but the embedding has only {size - 1} rows"):
        vocabulary(tokenizer, size - 1)


def test_a_missing_end_token_gives_a_warning():
    tokenizer = byte_level(BYTES)
    tokenizer.eos_token = tokenizer.bos_token = None
    assert "llama.cpp uses 11 (" in " ".join(vocabulary(tokenizer, 400).warnings)
    known = vocabulary(tokenizer, 400, eos=7)
    assert (known.pairs["tokenizer.ggml.eos_token_id"], known.warnings) == (7, [])


def test_add_bos_token_is_tested_on_a_sample():
    assert vocabulary(sentencepiece(), 300).pairs["tokenizer.ggml.add_bos_token"]
    assert not vocabulary(sentencepiece(begin=False), 300).pairs["tokenizer.ggml.add_bos_token"]


def test_merges_that_differ_from_sentencepiece_give_a_warning():
    assert vocabulary(sentencepiece(), 300).warnings == []
    assert "(tokens: ▁cat)" in " ".join(vocabulary(sentencepiece(complete=False), 300).warnings)


def test_metaspace_is_written_with_a_warning():
    tokenizer = sentencepiece()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=False)
    known = vocabulary(tokenizer, 300)
    assert known.pairs["tokenizer.ggml.add_space_prefix"]
    assert "begins with a space" in known.warnings[0]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "never", split=False)
    known = vocabulary(tokenizer, 300)
    assert (known.pairs["tokenizer.ggml.add_space_prefix"], known.warnings) == (False, [])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=True)
    with pytest.raises(LorakitError, match="treats spaces differently"):
        vocabulary(tokenizer, 300)


def test_scores_follow_the_merge_order():
    pairs = vocabulary(sentencepiece(), 300).pairs
    scores = dict(zip(pairs["tokenizer.ggml.tokens"], pairs["tokenizer.ggml.scores"], strict=True))
    assert scores["he"] > scores["▁t"] > scores["▁the"] > scores["cat"] > scores["▁cat"]
    assert pairs["tokenizer.ggml.add_space_prefix"]
    types = dict(zip(pairs["tokenizer.ggml.tokens"], pairs["tokenizer.ggml.token_type"], strict=True))
    assert (types["<unk>"], types["<s>"], types["<0x0A>"], types["he"]) == (2, 3, 6, 1)


@pytest.mark.parametrize(
    "tokenizer",
    [
        lambda: byte_level(BYTES),
        lambda: byte_level(split(GGUF_PRE_TOKENIZER_SPLITS["qwen2"])),
        lambda: byte_level(split(GGUF_PRE_TOKENIZER_SPLITS["llama-bpe"]), ignore_merges=True),
        sentencepiece,
    ],
)
def test_transformers_reads_the_same_tokenizer_from_the_file(tokenizer, tmp_path):
    if tokenizer is sentencepiece and Version(transformers.__version__) < Version("5.24"):
        pytest.skip("transformers 5.18 does not read add_bos_token from a GGUF")
    torch.manual_seed(0)
    ours = tokenizer()
    ours.chat_template = tiny_lm.CHATML
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=330)).save_pretrained(tmp_path / "base")
    ours.save_pretrained(tmp_path / "base")
    export_merged(None, tmp_path / "base", tmp_path / "x.gguf", dtype="f32")
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf")
    # transformers' own Llama tokenizer puts no space before a space; the one here does, and so does llama.cpp.
    for text in (t for t in SAMPLES if not (ours.unk_token and t.startswith(" "))):
        assert theirs(text)["input_ids"] == ours(text)["input_ids"], text
    assert theirs.chat_template == tiny_lm.CHATML


@pytest.mark.parametrize(
    "template, said",
    [
        ("{% for", r"line 1: unexpected 'end of template'"),
        ("hello\n{{ messages | nosuch }}", r"line 2: No filter named 'nosuch'"),
        ({"tool_use": "fine", "default": "{%"}, "tag name expected"),
        (5, "expected text, got int"),
    ],
)
def test_an_invalid_chat_template_is_left_out_with_a_warning(template, said):
    tokenizer = tiny_lm.tokenizer()
    tokenizer.chat_template = template
    made = vocabulary(tokenizer, 258)
    assert "tokenizer.chat_template" not in made.pairs
    assert any(line.startswith("the base's chat template is invalid (") and said in line for line in made.warnings)


def test_a_chat_template_with_generation_tags_is_kept():
    own = (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}{{ "
        "raise_exception('x') }}"
    )
    tokenizer = tiny_lm.tokenizer(own)
    made = vocabulary(tokenizer, 258)
    assert made.pairs["tokenizer.chat_template"] == own
    assert made.warnings == vocabulary(tiny_lm.tokenizer(), 258).warnings
