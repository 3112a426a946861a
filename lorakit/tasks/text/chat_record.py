"""Record how an adapter's conversations were formatted, in `lorakit.json` under `data`.

template               none, chat or plain
chat_template          the template's text, if it is not the model's own (also saved as chat_template.jinja)
chat_template_kwargs   the template's further variables
date                   the date that the template wrote
end_tokens             tokens that end answers, but at which the model's generation would not stop
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...data.dataset import Dataset
    from ...data.templates import ChatOptions

TEMPLATE_FILE = "chat_template.jinja"  # transformers' name for it


def record(dataset: Dataset, tokenizer: Any, options: ChatOptions, own_template: bool) -> dict[str, Any]:
    """Return the record of a dataset. `own_template`: whether the chat template is the run's own."""
    from ...data.templates import reads_date

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
