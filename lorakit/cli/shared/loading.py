"""A base with its adapters, as `eval`, `generate` and `chat` load them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import ConfigError

if TYPE_CHECKING:
    from ...adapter.adapter import Adapter
    from ...data.templates import Style


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


@dataclass(frozen=True)
class Loaded:
    """A base with adapters. `style`: how the last adapter's training data was written, where it says so."""

    model: Any
    tokenizer: Any
    names: list[str]
    style: str | None

    def style_for(self, template: str) -> Style:
        """How a prompt is to be written: as asked, as the adapter was trained, or by the chat template if there is one."""
        has_one = bool(getattr(self.tokenizer, "chat_template", None))
        style = (self.style or ("chat" if has_one else "none")) if template == "auto" else template
        if style == "chat" and not has_one:
            why = "the adapter was trained with a chat template" if template == "auto" else "--template chat"
            raise ConfigError(
                f"{why}: this model's tokenizer has no chat template\n  use --template plain or none, or the base it was trained on"
            )
        return style  # type: ignore[return-value]


def read(model: str, adapters: list[str]) -> dict[str, Adapter]:
    """The adapters by name. A GGUF needs the base's config, to know the heads of its permuted rows."""
    from ...adapter.adapter import Adapter
    from ...bases.load import load_config
    from ...formats import format_of

    return {
        name: Adapter.load(path, base=load_config(model) if format_of(path) == "gguf" else None)
        for name, path in named(adapters).items()
    }  # fmt: skip


def load(model: str, adapters: list[str], precision: str = "auto") -> Loaded:
    """The base with the adapters attached; the last of them is active."""
    return attached(model, read(model, adapters), precision)  # adapters before the base's weights: it fails faster


def attached(model: str, values: Mapping[str, Adapter], precision: str = "auto") -> Loaded:
    """The same with adapters that are read already."""
    from ...bases.device import choose_device, choose_dtype
    from ...bases.load import load_model, load_tokenizer
    from ...model.attach import attach

    device = choose_device().value
    base = load_model(model, choose_dtype(precision, device).value, device)
    style = None
    for name, value in values.items():
        attach(base, value, name)
        style = (value.metadata.get("data") or {}).get("template")
    return Loaded(base, load_tokenizer(model), list(values), style if style in ("none", "chat", "plain") else None)
