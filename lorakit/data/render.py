"""Render an example to token ids and their loss mask, segment by segment.

    segments   [(text, answer?), ...]   "<|im_start|>user Hi<|im_end|> <|im_start|>assistant" no · "Hello<|im_end|>" yes
    ids        encode(text) of each, concatenated
    trained    answer?, once per id of its segment

The rendered text is never searched for role markers. A conversation's segments are differences between renderings of
its prefixes (`templates`): what the template writes for messages[:k] with the generation prompt is context, and what it
adds for messages[:k+1] is the answer. So every template that only appends works (`{% generation %}` is not needed), and
the prompt that generation starts from (`render_prompt`) is by construction a prefix of what is trained.

The end token is trained, and added if neither the template nor the data wrote it. A plain prompt and completion are
concatenated as given: a space between them must be in the data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from lorakit.data.parse import Row
from lorakit.data.shapes import Example
from lorakit.data.templates import Style, Template, Writer, style_for, writer_for
from lorakit.data.turns import Message, checked, conversation
from lorakit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["completion", "all"]

NO_SPACE_BETWEEN = "no space or newline between prompt and completion"
LAST_TURN_ONLY = "the chat template rewrites earlier turns: only the last assistant turn is trained"


@dataclass(frozen=True)
class Rendered:
    """Token ids and their loss mask.

    prompt: number of ids before the first answer, 0 if there is no prompt. note: what the user should be told.
    """

    ids: list[int]
    trained: list[bool]
    prompt: int = 0
    note: str | None = None


@dataclass(frozen=True)
class Segment:
    """A stretch of text that is trained in full (`answer`) or not at all."""

    text: str
    answer: bool


@dataclass(frozen=True)
class TokenizerBehaviour:
    """What a tokenizer adds to any text. Found by encoding "x" and newlines, once for many examples."""

    prefix: list[int]  # the special tokens it puts first: BOS, [CLS] or none
    newline: list[int] | None  # the ids of a newline; None if a text has the same ids at the start and after a newline

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> TokenizerBehaviour:
        """Probe the tokenizer."""
        bare = tokenizer.encode("x", add_special_tokens=False)
        with_special = tokenizer.encode("x")
        start = next((i for i in range(len(with_special)) if with_special[i : i + len(bare)] == bare), 0)
        newline = tokenizer.encode("\n", add_special_tokens=False)
        same = tokenizer.encode("\nx", add_special_tokens=False)[len(newline) :] == bare
        return cls(with_special[:start], None if same else newline)


def render(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    template: Template = "auto",
    train_on: TrainOn = "completion",
    behaviour: TokenizerBehaviour | None = None,
) -> Rendered:
    """Render `example` up to its last trained message.

    behaviour: pass it when rendering many examples, so that the tokenizer is probed once. Raises DataError if the
    tokenizer has no end token or the chat template does not accept the conversation, ConfigError if `template` does not
    fit the data.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise DataError(
            "the tokenizer has no end (eos) token, so a model trained with it cannot learn to stop\n"
            "  set one: tokenizer.eos_token = '...', or eos_token in tokenizer_config.json"
        )
    behaviour = behaviour or TokenizerBehaviour.of(tokenizer)
    prefix, segments, note = _segments(example, tokenizer, behaviour, template)
    rendered = _tokens(segments, tokenizer, behaviour, prefix, end)
    if train_on == "all":
        start = len(prefix) if rendered.ids[: len(prefix)] == prefix else 0
        rendered = replace(rendered, trained=[position >= start for position in range(len(rendered.ids))])
    return replace(rendered, note=note)


def render_prompt(
    example: Example | Sequence[Message] | Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    template: Template = "auto",
) -> list[int]:
    """Return the token ids that generation starts from, generation prompt included.

    For an `Example`, everything `render` puts before the last answer. For a list of messages, the entire conversation,
    without a final assistant turn. Raises DataError and ConfigError as `render` does.
    """
    if not isinstance(example, Example):
        example = _awaiting_answer(example)
    behaviour = TokenizerBehaviour.of(tokenizer)
    prefix, segments, _ = _segments(example, tokenizer, behaviour, template, with_answer=False)
    return _tokens(segments, tokenizer, behaviour, prefix, end=None).ids


def question_ids(
    question: str | Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, style: Style
) -> list[int]:
    """Return the token ids that the answer to a question starts from.

    question: a text, or messages with role and content. Style "none" encodes the text without a template. Raises
    DataError if the template does not accept the conversation.
    """
    if style == "none":
        text = question if isinstance(question, str) else str(question[-1]["content"])
        behaviour = TokenizerBehaviour.of(tokenizer)
        return [*behaviour.prefix, *_encode(tokenizer, behaviour, text, continues=False)]
    messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
    return render_prompt(messages, tokenizer, style)


def _segments(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    behaviour: TokenizerBehaviour,
    template: Template,
    with_answer: bool = True,
) -> tuple[list[int], list[Segment], str | None]:
    """Return the tokenizer's prefix ids, the segments up to the last answer (included or not), and a note."""
    style = style_for(example.kind, tokenizer, template)
    last = max(index for index, message in enumerate(example.messages) if message.trained)
    before = example.messages[:last]
    if style == "none":
        segments = [Segment(message.content, message.trained) for message in before]
        answer = example.messages[last].content
        unspaced = bool(before) and before[-1].content[-1:].strip() and answer[:1].strip()
        if with_answer:
            segments.append(Segment(answer, True))
        return behaviour.prefix, segments, NO_SPACE_BETWEEN if unspaced else None
    write = writer_for(style, tokenizer, example)
    segments, written, note = _context(before, write)
    if with_answer:
        full = write(example.messages[: last + 1], False)
        if not full.startswith(written):
            raise DataError(
                f"{example.row.where}: the chat template starts the assistant's turn differently from its own "
                "generation "
                "prompt, so training and generation would not see the same prompt\n"
                "  use template plain, or a tokenizer with another chat template"
            )
        segments.append(Segment(full[len(written) :], True))
    # Chat templates write their own BOS where the model needs one; transformers does not add one either.
    return [] if style == "chat" else behaviour.prefix, segments, note


def _context(before: Sequence[Message], write: Writer) -> tuple[list[Segment], str, str | None]:
    """Return the segments before the last answer, their text, and a note if earlier answers cannot be trained."""
    opening = write(before, True)
    segments: list[Segment] = []
    written = ""
    for index, message in enumerate(before):
        if message.trained:
            prompt, full = write(before[:index], True), write(before[: index + 1], False)
            if not (prompt.startswith(written) and full.startswith(prompt)):
                return [Segment(opening, False)], opening, LAST_TURN_ONLY
            segments += [Segment(prompt[len(written) :], False), Segment(full[len(prompt) :], True)]
            written = full
    if not opening.startswith(written):
        return [Segment(opening, False)], opening, LAST_TURN_ONLY
    return [*segments, Segment(opening[len(written) :], False)], opening, None


def _tokens(
    segments: Sequence[Segment],
    tokenizer: PreTrainedTokenizerBase,
    behaviour: TokenizerBehaviour,
    prefix: list[int],
    end: int | None,
) -> Rendered:
    """Encode the segments. If `end` is given and the last segment is an answer, it ends with that token."""
    segments = [segment for segment in segments if segment.text]
    ids, trained = list(prefix), [False] * len(prefix)
    prompt: int | None = None
    stop: int | None = None
    for position, segment in enumerate(segments):
        segment_ids = _encode(tokenizer, behaviour, segment.text, continues=position > 0)
        if position == 0 and segment_ids[: len(prefix)] == prefix:
            segment_ids = segment_ids[len(prefix) :]  # the text has its own BOS: do not add a second
        if segment.answer and prompt is None:
            prompt = len(ids) if position else 0
        stop = _end_in(segment_ids, tokenizer) if segment.answer else None
        ids += segment_ids
        # Whitespace that the template writes after the end token is never generated, so it is not trained.
        trained += [segment.answer and (stop is None or index < stop) for index in range(len(segment_ids))]
    if end is not None and segments and segments[-1].answer and stop is None:
        ids.append(end)
        trained.append(True)
    return Rendered(ids, trained, prompt or 0)


def _end_in(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the index just after an answer's last end token, None if there is none or more than whitespace follows."""
    end = tokenizer.eos_token_id
    if end not in ids:
        return None
    stop = len(ids) - ids[::-1].index(end)
    return stop if not str(tokenizer.decode(ids[stop:])).strip() else None


def _encode(tokenizer: PreTrainedTokenizerBase, behaviour: TokenizerBehaviour, text: str, continues: bool) -> list[int]:
    """Encode `text` without special tokens, and without a leading space where it continues another text.

    SentencePiece tokenizers put a space before every text. In the middle of a sequence that space is not in the data,
    so the text is encoded after a newline, whose ids are then removed.
    """
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    newline = behaviour.newline
    if not continues or newline is None:
        return ids
    after_newline = tokenizer.encode("\n" + text, add_special_tokens=False, verbose=False)
    return after_newline[len(newline) :] if after_newline[: len(newline)] == newline else ids


def _awaiting_answer(messages: Sequence[Message] | Sequence[Mapping[str, Any]]) -> Example:
    """Make a conversation without its answer into an example whose last message is an empty answer."""
    row = Row({}, "messages", 1)
    turns = [{"role": m.role, "content": m.content} if isinstance(m, Message) else dict(m) for m in messages]
    if turns and turns[-1].get("role") == "assistant":
        turns = turns[:-1]
    messages = conversation(turns, "messages", row)
    return Example("chat", checked((*messages, Message("assistant", "", True)), row), row)
