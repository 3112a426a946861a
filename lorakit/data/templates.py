"""Turn a conversation into text with the tokenizer's chat template, or with a plain one if the tokenizer has none.

Both are a `Writer`: messages and "add the generation prompt?" in, text out. The plain template ends every answer with
the end token:

    SYSTEM TEXT

    ### Instruction:
    USER TEXT

    ### Response:
    ASSISTANT TEXT<end>

A chat template gets each turn with all its keys, in the form it takes (`template_forms`), the row's tools and
documents, and the template's own arguments (`ChatOptions.kwargs`, and those of the row). A template that asks for
today's date gets the run's (`ChatOptions.date`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from datetime import date as Date
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorakit.data.shapes import Example
from lorakit.data.template_forms import TemplateForms
from lorakit.data.turns import Message, string
from lorakit.errors import ConfigError, DataError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Template = Literal["auto", "chat", "plain"]
Style = Literal["none", "chat", "plain"]
Writer = Callable[[Sequence[Message], bool], str]

HEADINGS = {"system": "", "user": "### Instruction:\n", "tool": "### Tool result:\n", "assistant": "### Response:\n"}
WRITTEN = "the template's text (its tools, documents and keys of turns included)"
CLOCK = "strftime_now"
OTHER_IDS = "the chat template rejects the ids of tool calls, so they are numbered in the form that it takes"
DIRECTIVES = "aAbBcdFHIjmMpSTuUVwWxXyYZ"  # what a format of strftime may hold; the hour is midnight's
UNPADDED = "dmHIMSj"  # those that also come as "%-d", without a leading zero
# Arguments of apply_chat_template that are not the template's.
RESERVED = {
    "conversation",
    "messages",
    "tools",
    "documents",
    "chat_template",
    "add_generation_prompt",
    "tokenize",
    "padding",
    "continue_final_message",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "tokenizer_kwargs",
    "return_assistant_tokens_mask",
    "sanitize_control_tokens",
}


@dataclass(frozen=True)
class ChatOptions:
    """What a chat template gets besides the conversation. date: as YYYY-MM-DD; None leaves it to the clock."""

    kwargs: Mapping[str, Any] = field(default_factory=dict)
    date: str | None = None

    def __post_init__(self) -> None:
        check_kwargs(self.kwargs, "chat_template_kwargs")
        if self.date is not None:
            parsed_date(self.date)


def parsed_date(text: str) -> Date:
    """Read a date. Raises ConfigError."""
    try:
        return Date.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(f"date: '{text}' is no date; expected YYYY-MM-DD, such as 2026-01-31") from error


def check_kwargs(kwargs: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError for an argument that is not the template's own."""
    for name in kwargs:
        if name in RESERVED:
            raise ConfigError(f"{where}: '{name}' is set by lorakit and cannot be given to the chat template")


def source_of(tokenizer: PreTrainedTokenizerBase, with_tools: bool = False) -> str:
    """Return the template's text, "" without one. Some tokenizers have another for rows with tools."""
    if not tokenizer.chat_template:
        return ""
    try:
        return str(tokenizer.get_chat_template(None, [{}] if with_tools else None))
    except ValueError:  # several templates by name, none of them the default: rows that need one say so
        return ""


def reads_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template writes today's date."""
    return any(CLOCK in source_of(tokenizer, with_tools) for with_tools in (False, True))


def dated(source: str, date: str) -> str:
    """Return a template in which the clock stands still: `strftime_now` is a macro that knows one date."""
    if CLOCK not in source:
        return source
    day = parsed_date(date)
    values = {f"%-{letter}": day.strftime(f"%{letter}").lstrip("0") or "0" for letter in UNPADDED}
    values |= {f"%{letter}": day.strftime(f"%{letter}") for letter in DIRECTIVES}
    filters = "".join(f" | replace({name!r}, {value!r})" for name, value in values.items())
    # "+%}": the template's own first newline stays.
    return f"{{%- macro {CLOCK}(format) %}}{{{{ format{filters} }}}}{{% endmacro +%}}{source}"


def with_template(tokenizer: Any, source: str | None, where: str = "chat_template") -> Any:
    """Return the tokenizer with another chat template; itself for None. Raises ConfigError for what is no template."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    if source is None:
        return tokenizer
    try:
        render_jinja_template(conversations=[], chat_template=source)
    except TemplateError as error:
        line = getattr(error, "lineno", None)
        raise ConfigError(f"{where}{f', line {line}' if line else ''}: not a chat template (Jinja): {error}") from error
    other = copy(tokenizer)
    other.chat_template = source
    return other


def read_template(path: str) -> str:
    """Return the text of a template file. Raises ConfigError."""
    file = Path(path).expanduser()
    try:
        source = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        near = [p.name for p in file.parent.iterdir()] if file.parent.is_dir() else []
        raise ConfigError(f"chat_template: there is no file '{path}'{did_you_mean(file.name, near)}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"chat_template: {path} cannot be read as UTF-8 text: {error}") from error
    if not source.strip():
        raise ConfigError(f"chat_template: {path} is empty; expected a Jinja template")
    return source


def style_for(kind: str, tokenizer: PreTrainedTokenizerBase, template: Template) -> Style:
    """Resolve `template` for examples of one kind: texts and pairs get none, unless pairs are asked for as chat.

    Raises ConfigError for "chat" with plain text or without a chat template.
    """
    has_template = bool(tokenizer.chat_template)
    if template == "chat" and not has_template:
        raise ConfigError(
            "template: chat, but the tokenizer has no chat template\n"
            "  give one (--chat-template FILE), use auto or plain, or a model made for chat"
        )
    if template == "chat" and kind == "text":
        raise ConfigError("template: chat, but the data is plain text, which has no turns\n  use auto")
    if kind == "text" or (kind == "completion" and template != "chat"):
        return "none"
    if template == "auto":
        return "chat" if has_template else "plain"
    return template


class ChatTemplate:
    """A tokenizer's chat template with a run's options; one object serves many examples.

    apply: renders in place of `tokenizer.apply_chat_template`, with the same arguments (a server's, for templates that
    must not run in its process).
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, options: ChatOptions, apply: Callable[..., Any] | None = None
    ):
        self.tokenizer, self.options = tokenizer, options
        self._renders = apply
        self._forms: dict[bool, TemplateForms] = {}
        self._words = set(re.findall(r"[A-Za-z_]\w*", source_of(tokenizer) + source_of(tokenizer, True)))
        for name in options.kwargs:
            if name not in self._words:
                raise ConfigError(
                    f"chat_template_kwargs: the chat template does not read '{name}'{did_you_mean(name, self._words)}"
                )

    def unread(self, example: Example) -> list[str]:
        """Notes on a row's own chat_template_kwargs that the template does not read, and on ids that it rejects."""
        calls = [call for message in example.messages for call in message.turn.get("tool_calls", ())]
        renamed = [OTHER_IDS] if calls and self.forms(bool(example.tools)).rejects_ids(calls) else []
        return renamed + [
            f"the chat template does not read chat_template_kwargs.{name}"
            for name in example.template_kwargs
            if name not in self._words
        ]

    def forms(self, with_tools: bool) -> TemplateForms:
        """The forms that the template for rows with (or without) tools takes."""
        if with_tools not in self._forms:
            source = source_of(self.tokenizer, with_tools)
            if self.options.date is not None:
                source = dated(source, self.options.date)

            def write(turns: Sequence[dict[str, Any]], prompt: bool, tools: Sequence[dict[str, Any]]) -> str:
                return self._apply(source, turns, prompt, tools, self.options.kwargs)

            self._forms[with_tools] = TemplateForms(write, source)
        return self._forms[with_tools]

    def writer(self, example: Example) -> Writer:
        """Return the writer of an example. It raises DataError where the template rejects the turns."""
        forms = self.forms(bool(example.tools))
        where, tools = example.row.where, forms.tools(example.tools)
        check_kwargs(example.template_kwargs, f"{where}: chat_template_kwargs")
        kwargs = {**self.options.kwargs, **example.template_kwargs}

        def write(messages: Sequence[Message], prompt: bool) -> str:
            if not messages:
                raise DataError(
                    f"{where}: nothing precedes the assistant's turn\n"
                    "  a chat template needs a user or system turn first"
                )
            turns = forms.with_ids([forms.turn(message, where) for message in messages])
            try:
                text = self._apply(forms.source, turns, prompt, tools, kwargs, example.documents)
            # A chat template is a program and may raise anything to reject a conversation.
            except Exception as error:
                roles = ", ".join(m.role for m in messages)
                raise DataError(
                    f"{where}: the tokenizer's chat template rejects this conversation (turns: {roles}): {error}\n"
                    "  change the data (for example, move the system text into the first user turn), give another "
                    "template (--chat-template FILE), or use template plain"
                ) from error
            return string(text, WRITTEN, example.row)

        return write

    def _apply(
        self,
        source: str,
        turns: Sequence[dict[str, Any]],
        prompt: bool,
        tools: Sequence[dict[str, Any]],
        kwargs: Mapping[str, Any],
        documents: Sequence[dict[str, Any]] = (),
    ) -> str:
        more: dict[str, Any] = {"documents": list(documents)} if documents else {}
        if self.options.date is not None and source:  # without a text, transformers says which templates there are
            more["chat_template"] = source
        renders = self._renders or self.tokenizer.apply_chat_template
        return str(
            renders(
                list(turns), tools=list(tools) or None, tokenize=False, add_generation_prompt=prompt, **more, **kwargs
            )
        )


def plain_writer(tokenizer: PreTrainedTokenizerBase, example: Example) -> Writer:
    """Return the plain template's writer of an example."""

    def write(messages: Sequence[Message], prompt: bool) -> str:
        text = plain_template(messages, prompt, str(tokenizer.eos_token), example.tools)
        return string(text, WRITTEN, example.row)

    return write


def plain_template(messages: Sequence[Message], prompt: bool, end: str, tools: Sequence[dict[str, Any]] = ()) -> str:
    """Write messages in the plain template. prompt: append the assistant's heading. end: the end token's text.

    Tool calls are written as JSON, one a line, after the turn's text.
    """
    blocks = ["### Tools:\n" + "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)] if tools else []
    blocks += [HEADINGS[m.role] + _plain_text(m) + (end if m.role == "assistant" else "") for m in messages]
    if prompt:
        blocks.append(HEADINGS["assistant"])
    return "\n\n".join(blocks)


def _plain_text(message: Message) -> str:
    calls = [call["function"] for call in message.turn.get("tool_calls", ())]
    text = message.content if "content" in message.turn else ""
    return "\n".join([*([text] if text else []), *(json.dumps(call, ensure_ascii=False) for call in calls)])
