"""The command on a `next:` line, with the options of the call that printed it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from ...methods import method_of
from ...tasks import DEFAULT

if TYPE_CHECKING:
    from ...train.config import TrainConfig

# What stand for files of the user's: evaluating on the rows a model was trained on would say little.
TRAINING_ROWS, TEST_ROWS, TEST_NOTE = "YOUR.jsonl", "TEST.jsonl", "   # rows that it was not trained on"

Option = str | float | Path | Sequence[str] | None


def next_command(*words: str, **options: Option) -> str:
    """Join `lorakit`, the words and the options (see `flags`), quoted for a shell."""
    return " ".join(["lorakit", *map(quote, words), *flags(**options)])


def flags(**options: Option) -> list[str]:
    """Write options as flags, with hyphens for underscores.

    None and False leave an option out, True makes it a switch, a list repeats it.
    """
    words = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif value is not None and value is not False:
            values = value if isinstance(value, list | tuple) else [value]
            words += [f"{flag} {quote(str(each))}" for each in values]
    return words


def after_training(settings: TrainConfig, result: str) -> str:
    """Return the next commands after a run: chat with the result, and evaluate it on rows it was not trained on."""
    result_flags = method_of(settings.method).flags(settings.model, result)
    given = settings.model_dump(include={"columns", "template", "turns", "precision"}, exclude_defaults=True)
    if "columns" in given:
        given["columns"] = ",".join(f"{name}={own}" for name, own in given["columns"].items())
    chats = settings.task == DEFAULT
    evaluate = ["lorakit eval", TEST_ROWS, result_flags, *flags(**given, task=None if chats else settings.task)]
    chat = ["lorakit chat", result_flags, *flags(precision=given.get("precision"))]
    return next_lines(*([" ".join(chat)] if chats else []), " ".join(evaluate) + TEST_NOTE)


def next_lines(*commands: str) -> str:
    """Return the last lines of a job, one for each command that may come next."""
    return "\n".join(f"next: {command}" for command in commands)


def changed(value: str, default: str) -> str | None:
    """Return an option's value, or None where it is the default and need not be written."""
    return None if value == default else value
