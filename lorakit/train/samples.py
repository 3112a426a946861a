"""Write samples during training, of the base and of the tuned model: `samples/step-N.json`."""

from __future__ import annotations

import json
from collections.abc import Sequence

from ..io.atomic import write_text
from ..tasks.task import Prompt
from .run_folder import RunFolder


def write(folder: RunFolder, step: int, prompts: Sequence[Prompt], base: list[str], tuned: list[str]) -> None:
    """Write the answers of the base and of the tuned model to each prompt."""
    rows = [{"prompt": p.text, "base": b, "tuned": t} for p, b, t in zip(prompts, base, tuned, strict=True)]
    write_text(folder.samples / f"step-{step}.json", json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
