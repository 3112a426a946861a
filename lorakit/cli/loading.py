"""A base with its adapters, as `eval`, `generate` and `chat` load them."""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError


def named(adapters: list[str]) -> dict[str, str]:
    """`NAME=PATH` or `PATH` (named "adapter", "adapter2", ...) as {name: path}."""
    found: dict[str, str] = {}
    for given in adapters:
        name, sep, path = given.partition("=")
        if not sep:
            name, path = "adapter" if not found else f"adapter{len(found) + 1}", given
        if name in found:
            raise ConfigError(f"--adapter: two adapters are named '{name}'")
        found[name] = path
    return found


def load(model: str, adapters: list[str], precision: str = "auto") -> tuple[Any, Any, list[str]]:
    """(model, tokenizer, adapter names); the last adapter is active."""
    from ..adapter.adapter import Adapter
    from ..model import attach
    from ..models.base import choose_device, choose_dtype, load_model, load_tokenizer

    values = {name: Adapter.load(path) for name, path in named(adapters).items()}  # before the base: it fails faster
    device = choose_device().value
    base = load_model(model, choose_dtype(precision, device).value, device)
    for name, value in values.items():
        attach(base, value, name)
    return base, load_tokenizer(model), list(values)
