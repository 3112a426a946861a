"""Chat templates of real model families, as TRL ships them, on the embedded tokenizer."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import Any

_TRL = importlib.util.find_spec("trl")  # found, not imported: its templates are all that is needed
FOLDER = Path(_TRL.origin).parent / "chat_templates" if _TRL and _TRL.origin else Path("trl is not installed")
FAMILIES = sorted(path.stem for path in FOLDER.glob("*.jinja") if not path.stem.endswith("_training"))
MARKS = re.compile(r"<[|｜][^<>]{1,30}?[|｜]>|<\|\w+>|<\w+\|>|<(?:start|end)_of_\w+>|\[gMASK\]|<sop>|\[/?INST\]|</s>")
# What ends generation by the models' own generation_config.json, where that is more than what the template writes.
ENDS = {
    "glm4moe": ("<|user|>", "<|observation|>"),
    "gptoss": ("<|return|>", "<|call|>"),
    "gemma4": ("<|tool_response>",),
}


def source_of(family: str) -> str:
    return (FOLDER / f"{family}.jinja").read_text()


@cache
def tokenizer_of(family: str) -> Any:
    """The embedded tokenizer with a family's template, and its markers as special tokens."""
    from lorakit.bases.load import load_tokenizer

    tokenizer = load_tokenizer("embedded")
    tokenizer.add_tokens(sorted(set(MARKS.findall(source_of(family)))), special_tokens=True)
    tokenizer.model_max_length = 10**30
    tokenizer.chat_template = source_of(family)
    return tokenizer


def ends_of(family: str) -> list[int]:
    """The ids that end generation with a family's model."""
    tokenizer = tokenizer_of(family)
    texts = ENDS.get(next((name for name in ENDS if family.startswith(name)), ""), ())
    return [tokenizer.eos_token_id, *(tokenizer.convert_tokens_to_ids(text) for text in texts)]
