"""Samples that are texts: `samples/step-N.json`, the base's answers beside the tuned model's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...config import RunSettings
from ...errors import TrainError
from ...io.atomic import write_text
from ..task import Base, Shown


@dataclass(frozen=True)
class TextSample:
    """A prompt and what a model answered."""

    prompt: str
    text: str


def base_samples(folder: Path, config: RunSettings, base: Base, prompts: Sequence[Any]) -> list[TextSample]:
    """Return none: an interrupted run's base answers again."""
    return []


def write_samples(folder: Path, step: int, base: Sequence[TextSample], tuned: Sequence[TextSample]) -> Path:
    path = folder / f"step-{step}.json"
    rows = [{"prompt": b.prompt, "base": b.text, "tuned": t.text} for b, t in zip(base, tuned, strict=True)]
    write_text(path, json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
    return path


def read_samples(path: Path) -> Shown:
    try:
        rows = json.loads(path.read_bytes())
        return Shown(texts=[{name: str(row[name]) for name in ("prompt", "base", "tuned")} for row in rows])
    except (ValueError, KeyError, TypeError) as error:
        raise TrainError(f"{path.name} is damaged.") from error
