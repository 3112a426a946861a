"""How a conversation becomes text: the tokenizer's own chat template, or a plain one for tokenizers that have none.

Both are a `Writer`: the text of a conversation's beginning, with or without the prompt for the assistant's next turn. The
plain one, with every answer closed by the end token:

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
    """What `template` means for examples of this kind: texts and pairs are taken as they are, unless a chat is asked for."""
    has_one = bool(tokenizer.chat_template)
    if template == "chat" and not has_one:
        raise ConfigError("template: chat, but the tokenizer has no chat template\n  use auto or plain, or a model made for chat")
    if template == "chat" and kind == "text":
        raise ConfigError("template: chat, but the data is plain text, which has no turns\n  use auto")
    if kind == "text" or (kind == "completion" and template != "chat"):
        return "none"
    if template == "auto":
        return "chat" if has_one else "plain"
    return template


def writer_for(style: Style, tokenizer: PreTrainedTokenizerBase, example: Example) -> Writer:
    tools: list[Any] = list(example.tools)
    if style == "plain":
        return lambda messages, prompt: plain_template(messages, prompt, str(tokenizer.eos_token), tools)

    def write(messages: Sequence[Message], prompt: bool) -> str:
        if not messages:
            raise DataError(f"{example.row.where}: the conversation has nothing before the assistant's turn, as a chat template needs")
        turns = [{"role": m.role, "content": m.content} for m in messages]
        try:
            return str(tokenizer.apply_chat_template(turns, tools=tools or None, tokenize=False, add_generation_prompt=prompt))
        # A template is somebody's program: it raises what it likes when it does not take a conversation.
        except Exception as error:
            roles = ", ".join(m.role for m in messages)
            raise DataError(
                f"{example.row.where}: the tokenizer's chat template does not take this conversation (turns: {roles}): {error}\n"
                "  change the data (for example, put the system text into the first user turn), or use template plain"
            ) from error

    return write


def plain_template(messages: Sequence[Message], prompt: bool, end: str, tools: Sequence[dict[str, Any]] = ()) -> str:
    blocks = ["### Tools:\n" + "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)] if tools else []
    blocks += [HEADINGS[m.role] + m.content + (end if m.role == "assistant" else "") for m in messages]
    if prompt:
        blocks.append(HEADINGS["assistant"])
    return "\n\n".join(blocks)
