"""Ollama's Modelfile, written next to the GGUF: the model to start FROM, and the adapter to add.

FROM llama3.2                 FROM ./model.gguf
ADAPTER ./adapter.gguf
"""

from __future__ import annotations

import json
from pathlib import Path

from ..adapter.adapter import Adapter
from ..errors import ConfigError

NAME = "Modelfile"


def modelfile(gguf: Path, model: str | None = None, adapter: Adapter | None = None) -> str:
    """The text of a Modelfile: `gguf` as an adapter of `model`, or as a complete model if `model` is None.

    Generation stops at the end tokens that `adapter` learned besides the model's own.
    """
    source = f"FROM ./{gguf.name}\n" if model is None else f"FROM {model}\nADAPTER ./{gguf.name}\n"
    return source + "".join(
        f"PARAMETER stop {json.dumps(token, ensure_ascii=False)}\n" for token in end_tokens(adapter)
    )


def end_tokens(adapter: Adapter | None) -> list[str]:
    """The tokens that an adapter learned to end answers with, besides its base's own."""
    about = {} if adapter is None else adapter.metadata.get("data")
    found = about.get("end_tokens") if isinstance(about, dict) else None
    return [token for token in found if isinstance(token, str)] if isinstance(found, list) else []


def own_template(adapter: Adapter | None) -> str | None:
    """The chat template that an adapter was trained with, if it is not its base's own."""
    about = {} if adapter is None else adapter.metadata.get("data")
    found = about.get("chat_template") if isinstance(about, dict) else None
    return found if isinstance(found, str) else None


def check_modelfile(gguf: Path, text: str, force: bool) -> Path:
    """The Modelfile's path. ConfigError if one with other content exists: it may hold the user's own settings."""
    path = gguf.parent / NAME
    if path.is_dir():
        raise ConfigError(
            f"{path} is a folder, but Ollama's Modelfile must be written there\n  write the GGUF to another folder"
        )
    if not force and path.exists() and path.read_bytes() != text.encode("utf8"):
        raise ConfigError(
            f"{path} exists with other content\n  --force (force=True) replaces it; or name another folder"
        )
    return path
