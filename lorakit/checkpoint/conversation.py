"""A merged language model talks as its adapter was trained: its chat template, and the tokens that end an answer."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..adapter.adapter import Adapter
from ..data.chat_record import TEMPLATE_FILE, ChatRecord

GENERATION, CONFIG, TOKENIZER = "generation_config.json", "config.json", "tokenizer.json"


def keep_conversation(folder: Path, adapters: Iterable[Adapter]) -> list[str]:
    """Write what adapters learned of conversations into a model's folder; of several templates, the last adapter's.

    Returns warnings.
    """
    records = [ChatRecord.of(adapter.metadata) for adapter in adapters]
    template = next((record.template for record in reversed(records) if record.template is not None), None)
    ends = list(dict.fromkeys(token for record in records for token in record.end_tokens))
    if not (folder / CONFIG).is_file():
        return []
    if template is not None:
        (folder / TEMPLATE_FILE).write_text(template, encoding="utf8")
    if not ends:
        return []
    ids = _ids(folder / TOKENIZER)
    missing = [token for token in ends if token not in ids]
    settings = _object(folder / GENERATION) or {
        key: value for key, value in _object(folder / CONFIG).items() if key.endswith("_token_id") and value is not None
    }
    own = settings.get("eos_token_id")
    own = own if isinstance(own, list) else [] if own is None else [own]
    settings["eos_token_id"] = [*dict.fromkeys([*own, *(ids[token] for token in ends if token in ids)])]
    (folder / GENERATION).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf8")
    return [f"its tokenizer.json has no '{token}', which ends the adapter's answers" for token in missing]


def _ids(file: Path) -> dict[str, int]:
    """Return token ids by text."""
    tokenizer = _object(file)
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    return ids | {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or []}


def _object(file: Path) -> dict[str, Any]:
    """Read a JSON object, empty if there is no such file."""
    if not file.is_file():
        return {}
    found = json.loads(file.read_text(encoding="utf8"))
    return found if isinstance(found, dict) else {}
