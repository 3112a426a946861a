"""One example to token ids and the mask of what is trained, born together, segment by segment.

    segments   [(text, answer?), ...]     "<|im_start|>user Hi<|im_end|> <|im_start|>assistant" no · "Hello<|im_end|>" yes
    ids        encode(text) of each, joined
    trained    answer?, once per id of its segment

No marker is searched for in finished text. A conversation's segments are differences between renderings of its beginnings
(`templates`): what the template writes for messages[:k] with the generation prompt is context, what it writes beyond that
for messages[:k+1] is the answer. So any template works whose text only grows (`{% generation %}` is not needed), and what
is generated from (`render_prompt`) is a prefix of what is trained on, by construction.

The end token is trained: where neither template nor data wrote it, it is added. The prompt and completion of a plain pair
are joined as they are given; a space between them is the data's business.
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

JOINED = "prompt and completion meet without a space or line end between them"
LAST_TURN_ONLY = "the chat template rewrites earlier turns: only the last assistant turn is trained"


@dataclass(frozen=True)
class Rendered:
    """`prompt` counts the ids before the first answer, 0 if the example has no prompt; `note` is what a user should know."""

    ids: list[int]
    trained: list[bool]
    prompt: int = 0
    note: str | None = None


@dataclass(frozen=True)
class Segment:
    text: str
    answer: bool


@dataclass(frozen=True)
class Habits:
    """What a tokenizer does to any text, found by trying it once (five short encodings, five of seven for a prompt and completion)."""

    head: list[int]  # what it puts before a text: BOS, [CLS] or nothing
    mark: list[int] | None  # the ids of a line end, if a text begins otherwise by itself than behind one

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Habits:
        bare = tokenizer.encode("x", add_special_tokens=False)
        dressed = tokenizer.encode("x")
        start = next((i for i in range(len(dressed)) if dressed[i : i + len(bare)] == bare), 0)
        mark = tokenizer.encode("\n", add_special_tokens=False)
        same = tokenizer.encode("\nx", add_special_tokens=False)[len(mark) :] == bare
        return cls(dressed[:start], None if same else mark)


def render(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    template: Template = "auto",
    train_on: TrainOn = "completion",
    habits: Habits | None = None,
) -> Rendered:
    """The ids of `example`, up to its last trained message, and which of them are trained. `habits`: the tokenizer's, for many examples."""
    end = tokenizer.eos_token_id
    if end is None:
        raise DataError(
            "the tokenizer has no end (eos) token, so a model trained with it could not learn to stop\n"
            "  set one: tokenizer.eos_token = '...', or eos_token in tokenizer_config.json"
        )
    habits = habits or Habits.of(tokenizer)
    head, segments, note = _segments(example, tokenizer, habits, template)
    rendered = _tokens(segments, tokenizer, habits, head, end)
    if train_on == "all":
        start = len(head) if rendered.ids[: len(head)] == head else 0
        rendered = replace(rendered, trained=[position >= start for position in range(len(rendered.ids))])
    return replace(rendered, note=note)


def render_prompt(
    example: Example | Sequence[Message] | Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, template: Template = "auto"
) -> list[int]:
    """The ids a generation starts from, generation prompt included.

    Of an `Example`, all that `render` puts before the last answer. Of a list of messages, the whole conversation, less a
    last turn that is the assistant's.
    """
    if not isinstance(example, Example):
        example = _to_answer(example)
    habits = Habits.of(tokenizer)
    head, segments, _ = _segments(example, tokenizer, habits, template, with_answer=False)
    return _tokens(segments, tokenizer, habits, head, end=None).ids


def question_ids(question: str | Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, style: Style) -> list[int]:
    """The ids that an answer to a free question starts from: the text as it is ("none"), or as a user's turn or conversation."""
    if style == "none":
        text = question if isinstance(question, str) else str(question[-1]["content"])
        habits = Habits.of(tokenizer)
        return [*habits.head, *_encode(tokenizer, habits, text, continues=False)]
    return render_prompt([{"role": "user", "content": question}] if isinstance(question, str) else question, tokenizer, style)


def _segments(
    example: Example, tokenizer: PreTrainedTokenizerBase, habits: Habits, template: Template, with_answer: bool = True
) -> tuple[list[int], list[Segment], str | None]:
    """What the tokenizer puts first, the segments up to the last answer (with it or not), and a note."""
    style = style_for(example.kind, tokenizer, template)
    last = max(index for index, message in enumerate(example.messages) if message.trained)
    before = example.messages[:last]
    if style == "none":
        segments = [Segment(message.content, message.trained) for message in before]
        answer = example.messages[last].content
        bare_joint = bool(before) and before[-1].content[-1:].strip() and answer[:1].strip()
        return habits.head, segments + [Segment(answer, True)] * with_answer, JOINED if bare_joint else None
    write = writer_for(style, tokenizer, example)
    segments, written, note = _context(before, write)
    if with_answer:
        full = write(example.messages[: last + 1], False)
        if not full.startswith(written):
            raise DataError(
                f"{example.row.where}: the chat template writes the assistant's turn differently from its own generation prompt, "
                "so what is trained would not follow what is generated from\n  use template plain, or a tokenizer with another chat template"
            )
        segments.append(Segment(full[len(written) :], True))
    # A chat template writes its own BOS where the model wants one; transformers adds none to it either.
    return [] if style == "chat" else habits.head, segments, note


def _context(before: Sequence[Message], write: Writer) -> tuple[list[Segment], str, str | None]:
    """The segments before the last answer, their text as one, and a note if earlier answers could not be kept apart."""
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


def _tokens(segments: Sequence[Segment], tokenizer: PreTrainedTokenizerBase, habits: Habits, head: list[int], end: int | None) -> Rendered:
    """Ids and mask of the segments; with `end`, the last one is an answer and ends with it."""
    segments = [segment for segment in segments if segment.text]
    ids, trained = list(head), [False] * len(head)
    prompt: int | None = None
    stop: int | None = None
    for position, segment in enumerate(segments):
        piece = _encode(tokenizer, habits, segment.text, continues=position > 0)
        if position == 0 and piece[: len(head)] == head:
            piece = piece[len(head) :]  # the text brings its own BOS: one is enough
        if segment.answer and prompt is None:
            prompt = len(ids) if position else 0
        stop = _end_in(piece, tokenizer) if segment.answer else None
        ids += piece
        # Blank tokens that the template writes after the end token are never generated: nothing to learn there.
        trained += [segment.answer and (stop is None or index < stop) for index in range(len(piece))]
    if end is not None and segments and segments[-1].answer and stop is None:
        ids.append(end)
        trained.append(True)
    return Rendered(ids, trained, prompt or 0)


def _end_in(piece: list[int], tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Where an answer's ids are over: just after its end token, if nothing but blanks follows that."""
    end = tokenizer.eos_token_id
    if end not in piece:
        return None
    stop = len(piece) - piece[::-1].index(end)
    return stop if not str(tokenizer.decode(piece[stop:])).strip() else None


def _encode(tokenizer: PreTrainedTokenizerBase, habits: Habits, text: str, continues: bool) -> list[int]:
    """The ids of `text` with nothing added; where it continues another, without a space put before it.

    SentencePiece tokenizers begin every text with a space. Inside a sequence it is not in the data: the text is encoded
    behind a line end, whose ids are then taken off.
    """
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    mark = habits.mark
    if not continues or mark is None:
        return ids
    behind = tokenizer.encode("\n" + text, add_special_tokens=False, verbose=False)
    return behind[len(mark) :] if behind[: len(mark)] == mark else ids


def _to_answer(messages: Sequence[Message] | Sequence[Mapping[str, Any]]) -> Example:
    """A conversation that waits for its answer, as an example whose last message is that answer, still unknown."""
    row = Row({}, "messages", 1)
    turns = [{"role": m.role, "content": m.content} if isinstance(m, Message) else dict(m) for m in messages]
    if turns and turns[-1].get("role") == "assistant":
        turns = turns[:-1]
    asked = conversation(turns, "messages", row)
    return Example("chat", checked((*asked, Message("assistant", "", True)), row), row)
