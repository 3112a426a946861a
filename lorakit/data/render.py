"""Render an example to token ids and their loss mask, segment by segment.

    segments   [(text, answer?), ...]   "<|im_start|>user Hi<|im_end|> <|im_start|>assistant" no · "Hello<|im_end|>" yes
    ids        encode(text) of each, concatenated
    trained    answer?, once per id of its segment

The rendered text is never searched for role markers. A conversation's segments are differences between renderings of
its prefixes (`templates`): what the template writes for messages[:k] with the generation prompt is context, and what it
adds for messages[:k+1] is the answer. So `{% generation %}` is not needed, and the prompt that generation starts from
(`Renderer.prompt`) is by construction a prefix of what is trained.

A conversation is one row as long as the template only appends. Where it rewrites an earlier answer (it takes reasoning
out of it, or closes the last answer differently), a new row begins, so that each answer is trained after the text that
generation would see. Where a finished turn does not begin with the generation prompt, training begins where they part.

The end token is trained, and added if neither the template nor the data wrote it (`end_tokens`). A plain prompt and
completion are concatenated as given: a space between them must be in the data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from lorakit.data.common_text import common_beginning, longest_ending_within
from lorakit.data.end_tokens import EndTokens, added_tokens
from lorakit.data.parse import Row
from lorakit.data.shapes import Example
from lorakit.data.templates import ChatOptions, ChatTemplate, Style, Template, Writer, plain_writer, style_for
from lorakit.data.turn_windows import MIN_ANSWERS, windowed
from lorakit.data.turns import Message, checked, conversation
from lorakit.data.unshown import Answer, Unshown, has_all
from lorakit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["completion", "all"]
Turns = Literal["all", "last"]

NO_SPACE_BETWEEN = "no space or newline between prompt and completion"
EACH_ANSWER = "the chat template rewrites earlier turns, so their answers are trained in rows of their own"
LAST_TURN_ONLY = "earlier answers are context: only the last assistant turn is trained (turns: last)"
OTHER_START = (
    "finished answers do not begin with the chat template's generation prompt: trained from where the two part "
    "(chat_template_kwargs or --chat-template can make them agree)"
)


@dataclass(frozen=True)
class Rendered:
    """Token ids and their loss mask.

    prompt: number of ids before the first answer, 0 if there is no prompt. opening: the prompt of the conversation's
    first row, where it has several. notes: what the user should be told.
    """

    ids: list[int]
    trained: list[bool]
    prompt: int = 0
    opening: tuple[int, ...] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Segment:
    """A stretch of text that is trained in full (`answer`) or not at all. `calls`: the answer calls a tool."""

    text: str
    answer: bool
    calls: bool = False


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


class Renderer:
    """Renders the examples of a dataset; tokenizer and template are probed once.

    ends: the ids that end the model's generation, besides the tokenizer's end token. apply: renders the chat template
    in place of `tokenizer.apply_chat_template`, with the same arguments. Raises ConfigError for chat options that the
    template does not read.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: Template = "auto",
        train_on: TrainOn = "completion",
        turns: Turns = "all",
        options: ChatOptions | None = None,
        ends: Sequence[int] = (),
        apply: Callable[..., Any] | None = None,
    ):
        self.tokenizer, self.template, self.train_on, self.turns = tokenizer, template, train_on, turns
        self._behaviour = TokenizerBehaviour.of(tokenizer)
        self._chat = ChatTemplate(tokenizer, options or ChatOptions(), apply)
        # A config's end token may be the default of its class, which is an ordinary token of this tokenizer.
        added = added_tokens(tokenizer)
        own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self._own_ends = [*own, *(token for token in ends if token in added)]
        self._ends: dict[tuple[Style, bool], EndTokens] = {}
        self._unshown: dict[Style, Unshown] = {}

    def rows(self, example: Example) -> list[Rendered]:
        """Render `example` up to its last trained message: one row, or several where the template rewrites answers.

        Raises DataError if the tokenizer has no end token, if the chat template does not accept the conversation or
        does not show all of it, and ConfigError if `template` does not fit the data.
        """
        if self.tokenizer.eos_token_id is None:
            raise DataError(
                "the tokenizer has no end (eos) token, so a model trained with it cannot learn to stop\n"
                "  set one: tokenizer.eos_token = '...', or eos_token in tokenizer_config.json"
            )
        style = style_for(example.kind, self.tokenizer, self.template)
        if style == "none":
            before, answer = example.messages[:-1], example.messages[-1]
            unspaced = bool(before) and before[-1].content[-1:].strip() and answer.content[:1].strip()
            segments = [[Segment(message.content, message.trained) for message in example.messages]]
            notes = [NO_SPACE_BETWEEN] if unspaced else []
        else:
            segments, notes = self._conversation(example, style)
        rows = [self._tokens(row, style, example, with_end=True) for row in segments]
        opening = tuple(rows[0].ids[: rows[0].prompt]) if len(rows) > 1 else None
        return [replace(row, opening=opening, notes=tuple(dict.fromkeys(notes))) for row in map(self._masked, rows)]

    def prompt(self, example: Example) -> list[int]:
        """Return the ids that generation of the last answer starts from, generation prompt included."""
        style = style_for(example.kind, self.tokenizer, self.template)
        answered = self._answered(example)
        before = example.messages[: answered[-1]]
        if style == "none":
            segments = [Segment(message.content, message.trained) for message in before]
        else:
            write = self._writer(example, style)
            opening = write(before, True)
            segments = self._earlier(example, write, answered[:-1], style, opening)
            written = sum(len(segment.text) for segment in segments)
            segments = [*segments, Segment(opening[written:], False)]
        return self._tokens(segments, style, example, with_end=False).ids

    def _earlier(
        self, example: Example, write: Writer, answered: Sequence[int], style: Style, opening: str
    ) -> list[Segment]:
        """Return the segments up to the last earlier answer, none if the prompt (`opening`) writes that one anew."""
        try:
            rows = self._rows_of(example, write, answered[-1:], style)[0]
        except DataError:  # such an answer cannot be trained, so no row has this prompt; it can be answered
            return []
        if not rows or not opening.startswith("".join(segment.text for segment in rows[0])):
            return []
        if len(answered) >= MIN_ANSWERS:
            found = windowed(example.messages[: answered[-1] + 1], answered, write, opening)
            if found is not None:
                return [Segment(text, is_answer) for pair in found for text, is_answer in zip(pair, (False, True))]
        return self._rows_of(example, write, answered, style)[0][-1]

    def prompt_notes(self, example: Example) -> list[str]:
        """Return what to tell of a prompt: what its turns, tools and arguments hold and the template does not write.

        Raises DataError for contents and calls that it leaves out.
        """
        style = style_for(example.kind, self.tokenizer, self.template)
        notes = self._chat.unread(example) if style == "chat" else []
        return notes + self._unshown_for(style).of_prompt(example, self._writer(example, style))

    def end_ids(self, kind: Literal["text", "completion", "chat"], with_tools: bool = False) -> frozenset[int]:
        """Return the tokens that end answers to examples of a kind: those given, and the one that the template writes.

        with_tools: of conversations with tools, for which some tokenizers have another template.
        """
        return frozenset(self._ends_for(style_for(kind, self.tokenizer, self.template), with_tools).all)

    def written_ends(self) -> list[int]:
        """The tokens that end trained answers although neither tokenizer nor model ends generation with them."""
        return sorted({ends.written for ends in self._ends.values() if ends.written is not None})

    # ---------------------------------------------------------------------------- text

    def _conversation(self, example: Example, style: Style) -> tuple[list[list[Segment]], list[str]]:
        """Return the segments of each row, and notes."""
        write, answered = self._writer(example, style), self._answered(example)
        notes = []
        if self.turns == "last" and len(answered) > 1:
            answered, notes = answered[-1:], [LAST_TURN_ONLY]
        rows, answers, other_start = self._rows_of(example, write, answered, style)
        if len(rows) > 1:
            notes.append(EACH_ANSWER)
        if other_start:
            notes.append(OTHER_START)
        if style == "chat":
            notes += self._chat.unread(example)
        return rows, notes + self._unshown_for(style).notes(example, write, answers)

    def _unshown_for(self, style: Style) -> Unshown:
        if style not in self._unshown:
            self._unshown[style] = Unshown(lambda other: self._writer(other, style))
        return self._unshown[style]

    def _rows_of(
        self, example: Example, write: Writer, answered: Sequence[int], style: Style
    ) -> tuple[list[list[Segment]], list[Answer], bool]:
        """Return rows of segments, the answers in them, and whether one does not begin with its generation prompt."""
        rows: list[list[Segment]] = []
        answers, other_start, written = [], False, ""
        for index in answered:
            prompt, full = write(example.messages[:index], True), write(example.messages[: index + 1], False)
            context, text = prompt, full[len(prompt) :]
            if not full.startswith(prompt):
                context, text, parts = self._parted(example, index, write, prompt, full, style)
                other_start = other_start or parts
            if not rows or not context.startswith(written):
                rows.append([])
                written = ""
            calls = bool(example.messages[index].turn.get("tool_calls"))
            rows[-1] += [Segment(context[len(written) :], False), Segment(text, True, calls)]
            written = context + text
            answers.append(Answer(index, context, text, full))
        return rows, answers, other_start

    def _parted(
        self, example: Example, index: int, write: Writer, prompt: str, full: str, style: Style
    ) -> tuple[str, str, bool]:
        """Return context and answer of a turn that the template does not add to its generation prompt as it is.

        Also whether the answer begins otherwise than the generation prompt does. Raises DataError where the two texts
        cannot be brought together.
        """
        before, message = example.messages[:index], example.messages[index]
        agreed = common_beginning(prompt, full)
        history = len(common_beginning(prompt, write(before, False)).rstrip())
        if len(agreed) < history:
            # The answer changed the turns before it, as gpt-oss' does with reasoning: the prompt stays as it was.
            same = longest_ending_within(prompt, full)
            answer = full[full.rfind(same) + len(same) :]
            is_whole = has_all(same, before[-1].content) and has_all(answer, message.content)
            if is_whole and len(same) > len(prompt) - history:
                return prompt, answer, False
            if not has_all(agreed, before[-1].content):
                raise DataError(
                    f"{example.row.where}: the chat template starts the assistant's turn differently from its own "
                    "generation prompt, so training and generation would not see the same prompt\n"
                    "  use template plain, or another chat template (--chat-template FILE)"
                )
        agreed = self._at_token(agreed, prompt, full)
        opened, content = prompt[len(agreed) :].strip(), message.content.lstrip()
        lost = not has_all(full[len(agreed) :], content)
        if lost and opened and content.startswith(opened) and not message.turn.get("tool_calls"):
            # The data brings what the prompt ends with, as "<think>" does for DeepSeek-R1's template, which takes
            # reasoning out of every finished turn: the answer follows the prompt as it is.
            rest = content.removeprefix(opened)
            end = self._chat.forms(bool(example.tools)).after_answer if style == "chat" else ""
            return prompt, (rest.removeprefix("\n") if prompt.endswith("\n") else rest) + end, False
        return agreed, full[len(agreed) :], True

    def _at_token(self, agreed: str, prompt: str, full: str) -> str:
        """Return what two texts have in common, up to the last border of tokens in both."""
        ours, theirs = (self.tokenizer.encode(text, add_special_tokens=False, verbose=False) for text in (full, prompt))
        same = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
        decoded = str(self.tokenizer.decode(ours[:same], clean_up_tokenization_spaces=False))
        return decoded if agreed.startswith(decoded) else agreed

    @staticmethod
    def _answered(example: Example) -> list[int]:
        return [index for index, message in enumerate(example.messages) if message.trained]

    def _writer(self, example: Example, style: Style) -> Writer:
        return self._chat.writer(example) if style == "chat" else plain_writer(self.tokenizer, example)

    # ---------------------------------------------------------------------------- tokens

    def _tokens(self, segments: Sequence[Segment], style: Style, example: Example, with_end: bool) -> Rendered:
        """Encode the segments. with_end: if the last segment is an answer, it ends with an end token."""
        segments = [segment for segment in segments if segment.text]
        # Chat templates write their own BOS where the model needs one; transformers does not add one either.
        prefix = [] if style == "chat" else self._behaviour.prefix
        ends = self._ends_for(style, bool(example.tools))
        ids, trained = list(prefix), [False] * len(prefix)
        prompt: int | None = None
        stop: int | None = None
        for position, segment in enumerate(segments):
            segment_ids = _encode(self.tokenizer, self._behaviour, segment.text, continues=position > 0)
            if position == 0 and segment_ids[: len(prefix)] == prefix:
                segment_ids = segment_ids[len(prefix) :]  # the text has its own BOS: do not add a second
            if segment.answer and prompt is None:
                prompt = len(ids) if position else 0
            open_end = position > 0 and segments[position - 1].answer and stop is None
            stop = ends.stop(segment_ids) if segment.answer else None
            ids += segment_ids
            # Whitespace that the template writes after the end token is never generated, so it is not trained.
            trained += [segment.answer and (stop is None or index < stop) for index in range(len(segment_ids))]
            if open_end and not segment.answer and segment_ids[0] in ends.own:
                trained[-len(segment_ids)] = True  # the role token of the next turn ends the answer
        if with_end and segments and segments[-1].answer and stop is None:
            seam = ends.seam(segments[-1].calls)
            ids.append(self.tokenizer.eos_token_id if seam is None else seam)
            trained.append(True)
        return Rendered(ids, trained, prompt or 0)

    def _ends_for(self, style: Style, with_tools: bool) -> EndTokens:
        key = (style, style == "chat" and with_tools)
        if key not in self._ends:
            forms = self._chat.forms(with_tools) if style == "chat" else None
            self._ends[key] = EndTokens(self.tokenizer, self._own_ends, forms)
        return self._ends[key]

    def _masked(self, rendered: Rendered) -> Rendered:
        """Train on everything but the tokenizer's prefix, if that is asked for."""
        if self.train_on != "all":
            return rendered
        prefix = self._behaviour.prefix
        start = len(prefix) if rendered.ids[: len(prefix)] == prefix else 0
        return replace(rendered, trained=[position >= start for position in range(len(rendered.ids))])


def render(
    example: Example, tokenizer: PreTrainedTokenizerBase, template: Template = "auto", train_on: TrainOn = "completion"
) -> Rendered:
    """Render one example to the row that ends with its last answer; see `Renderer.rows`."""
    return Renderer(tokenizer, template, train_on).rows(example)[-1]


def render_prompt(
    example: Example | Sequence[Message] | Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    template: Template = "auto",
    options: ChatOptions | None = None,
) -> list[int]:
    """Return the token ids that generation starts from, generation prompt included.

    For an `Example`, everything `render` puts before the last answer. For a list of messages, the entire conversation,
    without a final assistant turn. Raises DataError and ConfigError as `render` does.
    """
    if not isinstance(example, Example):
        example = _awaiting_answer(example)
    return Renderer(tokenizer, template, options=options).prompt(example)


def question_ids(
    question: str | Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    style: Style,
    options: ChatOptions | None = None,
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
    return render_prompt(messages, tokenizer, style, options)


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
    turns = [m.turn if isinstance(m, Message) else dict(m) for m in messages]
    if turns and turns[-1].get("role") == "assistant":
        turns = turns[:-1]
    messages = conversation(turns, "messages", row)
    return Example("chat", checked((*messages, Message("assistant", "", True)), row), row)
