"""Ollama's Modelfile, written next to the GGUF: the model to start FROM, and the adapter to add.

FROM llama3.2                 FROM ./model.gguf
ADAPTER ./adapter.gguf
"""

from __future__ import annotations

import json
from pathlib import Path

from ..adapter.adapter import Adapter
from ..data.chat_record import ChatRecord
from ..errors import ConfigError

NAME = "Modelfile"


def modelfile(gguf: Path, model: str | None = None, adapter: Adapter | None = None) -> str:
    """Write the text of a Modelfile: `gguf` as an adapter of `model`, or as a complete model if `model` is None.

    Generation stops at the end tokens that `adapter` learned besides the model's own.
    """
    source = f"FROM ./{gguf.name}\n" if model is None else f"FROM {model}\nADAPTER ./{gguf.name}\n"
    ends = ChatRecord.of(adapter.metadata).end_tokens if adapter is not None else ()
    return source + "".join(f"PARAMETER stop {json.dumps(token, ensure_ascii=False)}\n" for token in ends)


def check_modelfile(gguf: Path, text: str, force: bool) -> Path:
    """Return the Modelfile's path. Raises ConfigError if one with other content exists: it may hold the user's own
    settings.
    """
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
