"""The command that comes next, with the options of the call that it needs too."""

from __future__ import annotations

import json
from pathlib import Path
from shlex import quote
from typing import Any

from ...config import Quantization, part
from ...errors import AdapterError
from ...io.json_object import read_json
from ...methods import method_of
from ...tasks import DEFAULT, task_of
from ...train.config import TrainConfig
from .quantizing import quantize_flags


def command(verb: str, *arguments: str, **options: Any) -> str:
    """Return `lorakit VERB ARGUMENTS --option value`, quoted. Options that are None, False or empty are left out."""
    return " ".join(["lorakit", verb, *map(quote, arguments), *_words(options)])


def _words(options: dict[str, Any]) -> list[str]:
    words: list[str] = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif value not in (None, False, "", {}, []):
            for one in value if isinstance(value, list) else [value]:
                words += [flag, quote(one if isinstance(one, str) else _text(one))]
    return words


def after_training(config: TrainConfig, result: Path) -> str:
    """Return the lines that follow a training: how to use the result, and how to evaluate it on other rows."""
    method, task = method_of(config.method), task_of(config.task)
    where = method.flags(config.model, str(result))
    if task.tried_with is not None:
        return f"next: {command(*task.tried_with.split(), 'your prompt')} {where}"
    loading = {"precision": None if config.precision == "auto" else config.precision}
    loading |= quantize_flags(part(config, Quantization))
    rows = config.validation if isinstance(config.validation, str) else "TEST.jsonl"
    template = getattr(config, "template", "auto")
    evaluate = command(
        "eval",
        rows,
        **loading,
        columns=getattr(config, "columns", None),
        answer_after=getattr(config, "answer_after", None) if config.task == DEFAULT else None,
        template=None if template == "auto" else template,
        task=None if config.task == DEFAULT else config.task,
    ).replace(f"lorakit eval {quote(rows)}", f"lorakit eval {quote(rows)} {where}", 1)
    lines = [f"next: {evaluate}" + ("" if isinstance(config.validation, str) else "   # rows it was not trained on")]
    if task.writes:
        use = f"generate 'your prompt' {where}" if config.task != DEFAULT or _is_completion(result) else f"chat {where}"
        lines.insert(0, " ".join([f"next: lorakit {use}", *_words(loading)]))
    return "\n".join(lines)


def _is_completion(result: Path) -> bool:
    """Whether the adapter was trained on prompts without a chat's turns, as its record says."""
    try:
        data = read_json(result / "lorakit.json").get("data")
    except AdapterError:
        return False
    return isinstance(data, dict) and data.get("template") == "none"


def _text(value: Any) -> str:
    return ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else json.dumps(value)
