"""A tiny language model on disk, of bytes, and rows to train it on:
enough for the whole way from data to merged model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from lorakit.data.dataset import Item
from lorakit.data.parse import Row
from lorakit.train.config import TrainConfig, belongs, task_named

PAD, EOS = 0, 1
POSITIONS = 96
NAMES = ("Ada", "Bo", "Cy", "Dee", "Eve", "Finn", "Gus", "Hal", "Ida", "Jo", "Kim", "Leo")
CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% "
    "endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


# A short run on one thread, as the command line takes it.
FLAGS = [
    "--rank",
    "4",
    "--steps",
    "6",
    "--batch-size",
    "4",
    "--learning-rate",
    "2e-2",
    "--precision",
    "fp32",
    "--threads",
    "1",
    "--sample-tokens",
    "0",
]

# The same for methods without a rank.
WITHOUT_RANK = FLAGS[2:]


def tokenizer(chat_template: str | None = None):
    """One token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(
        models.BPE(vocab={"<pad>": PAD, "</s>": EOS, **{c: i + 2 for i, c in enumerate(alphabet)}}, merges=[])
    )
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        eos_token="</s>",
        chat_template=chat_template,
        model_max_length=POSITIONS,
    )


def llama(seed: int = 0, tied: bool = False):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        initializer_range=0.1,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def biased():
    """A Qwen2: its linears in the attention have biases."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
        tie_word_embeddings=False,
    )
    return Qwen2ForCausalLM(config)


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=258,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=POSITIONS,
        initializer_range=0.2,
        bos_token_id=EOS,
        eos_token_id=EOS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config)


def gemma2():
    """Its logits are soft-capped after the output layer: cap · tanh(x / cap)."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=POSITIONS,
        initializer_range=0.5,
        final_logit_softcapping=2.0,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    return Gemma2ForCausalLM(config)


def save(folder: Path, model: Any = None, chat_template: str | None = None) -> Path:
    """A model folder, with its tokenizer."""
    (model or llama()).save_pretrained(folder)
    tokenizer(chat_template).save_pretrained(folder)
    return folder


def rows(count: int = 24) -> list[dict[str, str]]:
    """Pairs of unequal lengths, all prompts different."""
    made = []
    for i in range(count):
        name = NAMES[i % len(NAMES)] + (str(i) if i >= len(NAMES) else "")
        made.append({"prompt": f"{name}: {i % 7}\n", "completion": f"{name} has {'very ' * (i % 4)}{i % 7} apples."})
    return made


def write_rows(path: Path, values: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in values), encoding="utf8")
    return path


def config(model: Path, data: Path, out: Path, **changes: Any) -> TrainConfig:
    """A short run on one thread in float32, without the settings that its method and task do not have."""
    values: dict[str, Any] = {
        "rank": 4,
        "steps": 6,
        "batch_size": 4,
        "micro_batch": 2,
        "learning_rate": 5e-3,
        "precision": "fp32",
        "threads": 1,
        "validation": 0.2,
        "eval_every": 2,
        "sample_tokens": 4,
    }
    method, task = changes.get("method", "lora"), task_named(changes.get("task"))
    values = {name: value for name, value in values.items() if belongs(name, method, task)}
    return TrainConfig(**values | {"model": str(model), "data": str(data), "out": str(out)} | changes)


def item(ids: Sequence[int], prompt: int, number: int = 1) -> Item:
    """A row of ids whose first `prompt` are not trained."""
    return Item(list(ids), [place >= prompt for place in range(len(ids))], Row({}, "rows.jsonl", number), prompt)


def items(lengths: Sequence[int], seed: int = 0, vocabulary: int = 258) -> list[Item]:
    """Rows of random ids, of these lengths, each trained from its middle on."""
    made = torch.Generator().manual_seed(seed)
    return [
        item(torch.randint(2, vocabulary, (length,), generator=made).tolist(), length // 2, number)
        for number, length in enumerate(lengths, start=1)
    ]
