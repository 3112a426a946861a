"""Reading an adapter's files as the server does, and what it says where it refuses them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lorakit.errors import AdapterError
from lorakit.serve.guard.adapter_files import HTTP, LOCAL, FileRules
from lorakit.serve.sources import files_at, read_adapter

PICKLES = replace(LOCAL, pickles=True)


def read(path: Path, rules: FileRules = HTTP, boundary: Path | None = None):
    return read_adapter(files_at(path, "sql", boundary, rules))


def refused(path: Path, rules: FileRules = HTTP, boundary: Path | None = None) -> str:
    with pytest.raises(AdapterError) as error:
        read(path, rules, boundary)
    message = str(error.value)
    assert str(path) not in message
    assert "lorakit-read-" not in message
    assert "/tmp" not in message
    assert "sql" in message
    return message


def config(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
