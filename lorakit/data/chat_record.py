"""What an adapter keeps of how its conversations were written, in `lorakit.json` under `data`.

template               none, chat or plain
chat_template          the template's text, where it is not the model's own (also beside it, as chat_template.jinja)
chat_template_kwargs   what the template read besides the conversation
date                   the date that the template wrote
end_tokens             tokens that end answers although the model's generation does not end with them
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_args

from lorakit.data.templates import ChatOptions, Style, reads_date
from lorakit.errors import ConfigError

if TYPE_CHECKING:
    from lorakit.data.dataset import Dataset
    from lorakit.data.preference_items import Preferences

TEMPLATE_FILE = "chat_template.jinja"  # transformers' name for it


@dataclass(frozen=True)
class ChatRecord:
    """style: None if not recorded. template: None if it is the model's own."""

    style: Style | None = None
    template: str | None = None
    options: ChatOptions = field(default_factory=ChatOptions)
    end_tokens: tuple[str, ...] = ()

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> ChatRecord:
        """Read an adapter's metadata. What is not as we write it (anybody may have written the file) is left out."""
        about = metadata.get("data")
        about = about if isinstance(about, dict) else {}
        style, template, kwargs, date, ends = (
            about.get(name) for name in ("template", "chat_template", "chat_template_kwargs", "date", "end_tokens")
        )
        try:
            options = ChatOptions(kwargs if isinstance(kwargs, dict) else {}, date if isinstance(date, str) else None)
        except ConfigError:
            options = ChatOptions()
        return cls(
            style if style in get_args(Style) else None,
            template if isinstance(template, str) else None,
            options,
            tuple(token for token in ends if isinstance(token, str)) if isinstance(ends, list) else (),
        )

    def to_pass_on(self, with_template: bool) -> list[str]:
        """Return what a program that serves the adapter must be given by hand. with_template: the files have it."""
        lines = []
        if self.template is not None and not with_template:
            lines.append(
                "trained with a chat template of its own, which this format does not hold: give it to the server"
            )
        if self.options.kwargs:
            given = json.dumps(dict(self.options.kwargs), ensure_ascii=False)
            lines.append(f"trained with chat_template_kwargs {given}: give them with every request")
        return lines


def record(dataset: Dataset | Preferences, tokenizer: Any, options: ChatOptions, own_template: bool) -> dict[str, Any]:
    """Return the record of a dataset. own_template: the chat template is the run's, not the model's."""
    about: dict[str, Any] = {"template": dataset.style}
    if dataset.style != "chat":
        return about
    if own_template:
        about["chat_template"] = tokenizer.chat_template
    if options.kwargs:
        about["chat_template_kwargs"] = dict(options.kwargs)
    if options.date is not None and reads_date(tokenizer):
        about["date"] = options.date
    if dataset.end_tokens:
        about["end_tokens"] = tokenizer.convert_ids_to_tokens(dataset.end_tokens)
    return about
