"""Read JSON objects, with errors that say where the text is broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import AdapterError, not_the_file


def read_json(path: Path) -> dict[str, Any]:
    """Read a file's JSON object. Raises AdapterError, with line and column where the JSON is broken."""
    try:
        text = path.read_text(encoding="utf8")
    except (OSError, UnicodeDecodeError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error
    problem = not_the_file(path)
    if problem is not None:
        raise AdapterError(problem)
    return parse_json(text, str(path))


def parse_json(text: str, where: str) -> dict[str, Any]:
    """Parse a JSON object; `where` names its source. Raises AdapterError, with line and column if it is broken."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise AdapterError(f"{where}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from error
    except RecursionError as error:
        raise AdapterError(f"{where}: its JSON is nested too deeply") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{where} holds a {type(value).__name__}; expected a JSON object")
    return value
