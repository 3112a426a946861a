"""Ollama's Modelfile, beside the GGUF: what a model starts FROM, and the adapter that it adds.

FROM llama3.2                 FROM ./model.gguf
ADAPTER ./adapter.gguf
"""

from __future__ import annotations

from pathlib import Path

from ..errors import ConfigError

NAME = "Modelfile"


def modelfile(gguf: Path, model: str | None = None) -> str:
    """Its text: of an adapter of `model`, or of a whole model."""
    return f"FROM ./{gguf.name}\n" if model is None else f"FROM {model}\nADAPTER ./{gguf.name}\n"


def check_place(gguf: Path, text: str, force: bool) -> Path:
    """Where it goes. ConfigError where another one is there: it is not what OUT names, and may hold somebody's own settings."""
    path = gguf.parent / NAME
    if path.is_dir():
        raise ConfigError(f"{path} is a folder, and Ollama's Modelfile is to be written there\n  name another place for the GGUF")
    if not force and path.exists() and path.read_bytes() != text.encode("utf8"):
        raise ConfigError(f"{path} exists and says other things\n  --force (force=True) replaces it; or name another folder")
    return path
