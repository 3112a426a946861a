"""Answers to a few fixed prompts during training, the base's beside the adapter's."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from ..data.dataset import Item
from ..data.render import question_ids
from ..data.templates import Style
from ..generate.generate import check_prompts, generate, positions_of
from ..io.atomic import write_text
from ..methods import method_of
from .config import TrainConfig
from .run_folder import RunFolder

DEFAULT_PROMPTS = 2


@dataclass(frozen=True)
class Prompt:
    text: str
    ids: list[int]


def prompts_for(config: TrainConfig, model: Any, tokenizer: Any, held_out: list[Item], style: Style) -> list[Prompt]:
    """The configured prompts, written as the data's are (`style`), or the first held-out rows that have one and leave room for an answer."""
    if config.sample_tokens == 0 or not method_of(config.method).keeps_base:
        return []
    if config.sample_prompts:
        ids = [question_ids(text, tokenizer, style) for text in config.sample_prompts]
        check_prompts(model, ids, config.sample_tokens, [f"sample prompt {text!r}" for text in config.sample_prompts])
        return [Prompt(text, i) for text, i in zip(config.sample_prompts, ids, strict=True)]
    positions = positions_of(model)
    room = math.inf if positions is None else positions - config.sample_tokens
    found: list[Prompt] = []
    for item in held_out:
        beginning = item.ids[: item.prompt_length]
        if 0 < len(beginning) <= room and beginning not in [p.ids for p in found]:
            found.append(Prompt(tokenizer.decode(beginning), beginning))
        if len(found) == DEFAULT_PROMPTS:
            break
    return found


def take(model: Any, tokenizer: Any, prompts: list[Prompt], tokens: int) -> list[str]:
    """One greedy answer for each prompt, as the model is now."""
    return generate(model, tokenizer, [p.ids for p in prompts], max_new_tokens=tokens) if prompts else []


def write(folder: RunFolder, step: int, prompts: list[Prompt], base: list[str], tuned: list[str]) -> None:
    """`samples/step-N.json`."""
    rows = [{"prompt": p.text, "base": b, "tuned": t} for p, b, t in zip(prompts, base, tuned, strict=True)]
    write_text(folder.samples / f"step-{step}.json", json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
