"""Turn a conversation into text with the tokenizer's chat template, or with a plain one if the tokenizer has none.

Both are a `Writer`: messages and "add the generation prompt?" in, text out. The plain template ends every answer with
the end token:

    SYSTEM TEXT

    ### Instruction:
    USER TEXT

    ### Response:
    ASSISTANT TEXT<end>
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from lorakit.data.shapes import Example
from lorakit.data.turns import Message
from lorakit.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Template = Literal["auto", "chat", "plain"]
Style = Literal["none", "chat", "plain"]
Writer = Callable[[Sequence[Message], bool], str]

HEADINGS = {"system": "", "user": "### Instruction:\n", "tool": "### Tool result:\n", "assistant": "### Response:\n"}


def style_for(kind: str, tokenizer: PreTrainedTokenizerBase, template: Template) -> Style:
    """Resolve `template` for examples of one kind: texts and pairs get none, unless pairs are asked for as chat.

    Raises ConfigError for "chat" with plain text or without a chat template.
    """
    has_template = bool(tokenizer.chat_template)
    if template == "chat" and not has_template:
        raise ConfigError(
            "template: chat, but the tokenizer has no chat template\n  use auto or plain, or a model made for chat"
        )
    if template == "chat" and kind == "text":
        raise ConfigError("template: chat, but the data is plain text, which has no turns\n  use auto")
    if kind == "text" or (kind == "completion" and template != "chat"):
        return "none"
    if template == "auto":
        return "chat" if has_template else "plain"
    return template


def writer_for(style: Style, tokenizer: PreTrainedTokenizerBase, example: Example) -> Writer:
    """Return the writer for a style that has a template. It raises DataError where the template rejects the turns."""
    tools: list[Any] = list(example.tools)
    if style == "plain":
        return lambda messages, prompt: plain_template(messages, prompt, str(tokenizer.eos_token), tools)

    def write(messages: Sequence[Message], prompt: bool) -> str:
        if not messages:
            raise DataError(
                f"{example.row.where}: nothing precedes the assistant's turn\n"
                "  a chat template needs a user or system turn first"
            )
        turns = [{"role": m.role, "content": m.content} for m in messages]
        try:
            return str(
                tokenizer.apply_chat_template(turns, tools=tools or None, tokenize=False, add_generation_prompt=prompt)
            )
        # A chat template is a program and may raise anything to reject a conversation.
        except Exception as error:
            roles = ", ".join(m.role for m in messages)
            raise DataError(
                f"{example.row.where}: the tokenizer's chat template rejects this conversation (turns: {roles}): "
                f"{error}\n"
                "  change the data (for example, move the system text into the first user turn), or use template plain"
            ) from error

    return write


def plain_template(messages: Sequence[Message], prompt: bool, end: str, tools: Sequence[dict[str, Any]] = ()) -> str:
    """Write messages in the plain template. prompt: append the assistant's heading. end: the end token's text."""
    blocks = ["### Tools:\n" + "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)] if tools else []
    blocks += [HEADINGS[m.role] + m.content + (end if m.role == "assistant" else "") for m in messages]
    if prompt:
        blocks.append(HEADINGS["assistant"])
    return "\n\n".join(blocks)
