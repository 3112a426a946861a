"""Small tokenizers made on the spot, and rows without files."""

from __future__ import annotations

import pytest

from lorakit.data.parse import Row

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Llama 2's: BOS in the text before each user turn, no system role, no generation prompt of its own.
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content.strip() }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content.strip() }} {{ eos_token }}"
    "{% else %}{{ raise_exception('System role not supported') }}{% endif %}{% endfor %}"
)
# As Qwen3's and its like: reasoning is taken out of every assistant turn but the last.
STRIPS_THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% "
    "endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The generation prompt opens a reasoning block that a finished turn does not have.
OPENS_THINKING = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")

WORDS = [
    "the quick brown fox jumps over the lazy dog",
    "question answer user assistant system",
    "hello world, how are you?",
    "1 2 3 4 5 6 7 8 9 0",
]


@pytest.fixture(scope="session")
def make_tokenizer():
    """`make_tokenizer(adds_bos, template, end, pad)`: a byte-level BPE of a few hundred tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]

    def make(adds_bos=False, template=None, end="</s>", pad="<pad>", **more):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(WORDS, trainer)
        if adds_bos:
            tokenizer.post_processor = processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
            )
        extra = [token for token in special if token not in ("<s>", end, pad)]
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token="<s>",
            eos_token=end,
            pad_token=pad,
            chat_template=template,
            extra_special_tokens=extra,
            **more,
        )

    return make


@pytest.fixture(scope="session")
def plain_tokenizer(make_tokenizer):
    return make_tokenizer()


@pytest.fixture(scope="session")
def chatml_tokenizer(make_tokenizer):
    return make_tokenizer(template=CHATML, end="<|im_end|>")


@pytest.fixture(scope="session")
def metaspace_tokenizer():
    """A SentencePiece-like one: every text is begun with a space, a line end is a token of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = sorted(set("".join(WORDS)) | set("▁\nA:#InstructionRep"))
    tokenizer = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(["<s>", "</s>", *characters])}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


@pytest.fixture
def rows():
    """`rows({...}, {...})`: rows as if read from a file."""

    def make(*values):
        return [Row(v, "data.jsonl", number) for number, v in enumerate(values, start=1)]

    return make


@pytest.fixture
def templates():
    return {"chatml": CHATML, "llama2": LLAMA2, "strips": STRIPS_THINKING, "opens": OPENS_THINKING}
