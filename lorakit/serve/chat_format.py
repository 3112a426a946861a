"""How one adapter is written to: its chat record turned into prompts, stop tokens and a tool-call syntax.

Adapters with the same record share one `ChatFormat`, and all share the base's tokenizer: what differs is the template's
text. So hundreds of adapters cost no more than their distinct templates.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from threading import Lock
from typing import Any

from ..data.chat_record import ChatRecord
from ..data.found_once import found_once
from ..data.render import Renderer as RowRenderer
from ..data.render import question_ids
from ..data.shapes import Example
from ..data.templates import ChatOptions, Style, Template, source_of
from ..data.turns import Message, checked, conversation
from ..data.unshown import column_note
from ..errors import ConfigError, DataError, listing
from .answer_text import TokenTexts
from .errors import Busy
from .foreign_template import ForeignTemplate, TemplateProcess, UnusableTemplateError
from .messages import REQUEST
from .tool_calls.families import PLAIN, syntax_of
from .tool_calls.syntax import Syntax, Tools

KEPT = 256  # records whose formats are kept; another costs some trials of its template again
NOTES, NOTE = 8, 160  # how many notes on a request, and how long
NOT_READ = "the plain template does not read chat_template_kwargs"


class Formats:
    """The formats of a base and its adapters, those used last."""

    def __init__(self, tokenizer: Any, texts: TokenTexts, model_ends: Collection[int], process: TemplateProcess):
        self._tokenizer, self._texts, self._process = tokenizer, texts, process
        self._ends = tuple(model_ends)
        self._kept: OrderedDict[tuple[object, ...], ChatFormat] = OrderedDict()
        self._lock = Lock()

    def of(self, record: ChatRecord) -> ChatFormat:
        """Return the format of a record; an empty one is the base's. Costs nothing the second time."""
        kwargs = json.dumps(dict(record.options.kwargs), sort_keys=True, default=str)
        key = (record.style, record.template, kwargs, record.options.date, record.end_tokens)
        with self._lock:
            found = self._kept.get(key)
            if found is None or found.interrupted is not None:
                found = ChatFormat(record, self._tokenizer, self._texts, self._ends, self._process)
                self._kept[key] = found
                if len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
        return found


class ChatFormat:
    """How adapters with one chat record are written to. `style`: none, chat or plain."""

    def __init__(
        self, record: ChatRecord, tokenizer: Any, texts: TokenTexts, model_ends: Sequence[int], process: TemplateProcess
    ):
        self._record, self._texts, self._model_ends = record, texts, model_ends
        self._tokenizer = tokenizer
        self._foreign: ForeignTemplate | None = None
        if record.template is not None:
            # Not `with_template`, which compiles: even that must not happen here, as constants are computed then.
            self._tokenizer = copy(tokenizer)
            self._tokenizer.chat_template = record.template
            self._foreign = ForeignTemplate(process, record.template, tokenizer.special_tokens_map)
        default: Style = "chat" if self._tokenizer.chat_template else "plain"
        self.style: Style = record.style or default
        own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.text_stop_ids = frozenset([*own, *model_ends, *self._recorded_ends()])

    @property
    def interrupted(self) -> Busy | None:
        """Why a rendering of its template was ended from outside, None if none was. Its findings may be wrong then."""
        return None if self._foreign is None else self._foreign.interrupted

    @contextmanager
    def uninterrupted(self) -> Iterator[None]:
        """Raise Busy if a rendering within the block was ended from outside.

        What tries a template takes an error of any kind for the template's, and goes on.
        """
        try:
            yield
        finally:
            if self.interrupted is not None:
                raise self.interrupted

    def chat_ids(
        self, turns: Sequence[dict[str, Any]], tools: Tools, kwargs: Mapping[str, Any]
    ) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Return the ids of a conversation up to the next answer, and notes on what of it is not shown.

        turns: of `checked_messages`. Raises DataError where the template rejects the conversation, or leaves out a
        content or the tools.
        """
        notes = [f"{NOT_READ}.{name}" for name in kwargs] if self.style == "plain" else []
        rows = self._rows
        if self._foreign is not None:
            self._foreign.begin()
        try:
            messages = conversation(list(turns), "messages", REQUEST)
            example = Example(
                "chat",
                checked((*messages, Message("assistant", "", True)), REQUEST),
                REQUEST,
                tools=tuple(dict(tool) for tool in tools),
                template_kwargs=kwargs if self.style == "chat" else {},
            )
            ids = rows.prompt(example)
            notes += rows.prompt_notes(example)
        except (ConfigError, DataError) as error:
            # The lines after the first say how to mend a file of training data.
            raise DataError(str(error).partition("\n")[0].removeprefix(f"{REQUEST.where}: ")) from error
        if column_note("tools") in notes:
            raise DataError(
                "the chat template does not write tools, so the model would not know of them\n"
                "  leave tools out of the request, or ask a model whose template has them"
            )
        return tuple(ids), _shortened(notes)

    def text_ids(self, text: str) -> tuple[int, ...]:
        """Return the ids of a text without a template, with the start token that the tokenizer gives every text."""
        ids = tuple(question_ids(text, self._tokenizer, "none"))
        if not ids:
            raise DataError("prompt is empty; expected at least one token")
        return ids

    def stop_ids(self, with_tools: bool) -> frozenset[int]:
        """Return what ends a chat answer: the base's end tokens, the record's, and the one that the template writes."""
        if self.style == "none":
            return self.text_stop_ids
        return self.text_stop_ids | self._rows.end_ids("chat", with_tools)

    @found_once
    def syntax(self) -> Syntax | None:
        """How its template writes tool calls, None if that is not known."""
        return PLAIN if self.style == "plain" else syntax_of(source_of(self._tokenizer, with_tools=True))

    @found_once
    def markers(self) -> frozenset[int]:
        """The special tokens of the syntax, which have to stay in an answer's text."""
        markers = () if self.syntax is None else self.syntax.markers
        ids = (self._id(marker) for marker in markers)
        return frozenset(token for token in ids if token is not None and self._texts.is_special(token))

    def check(self, added: Mapping[str, int]) -> None:
        """Raise DataError for a record that does not fit the base. added: tokens of the adapter's own, by their ids."""
        missing = [token for token, number in added.items() if self._id(token) != number]
        if missing:
            raise DataError(
                f"it was trained with tokens of its own ({listing(missing)}), which the base's tokenizer lacks\n"
                "  merge it into its base (lorakit merge) and serve the result"
            )
        unknown = [token for token in self._record.end_tokens if self._id(token) is None]
        if unknown:
            raise DataError(
                f"its answers end with {listing(unknown)}, which the base's tokenizer does not have\n"
                "  serve it with the base that it was trained on"
            )
        if self._foreign is not None:
            try:
                self._foreign.check()
            except UnusableTemplateError as error:
                raise DataError(f"its chat template cannot be used: {error}") from error
        if self.style != "none" and self._tokenizer.chat_template:
            _ = self._rows

    @found_once
    def _rows(self) -> RowRenderer:
        """The renderer of training rows. Raises DataError for a record that does not fit the template."""
        if self.style == "chat" and not self._tokenizer.chat_template:
            raise DataError(
                "this adapter was trained with a chat template, but the base has none\n"
                "  start the server with the template: --chat-template FILE"
            )
        options = self._record.options if self.style == "chat" else ChatOptions()
        template: Template = "chat" if self.style == "chat" else "plain"
        try:
            return RowRenderer(self._tokenizer, template, options=options, ends=self._model_ends, apply=self._foreign)
        except ConfigError as error:
            raise DataError(f"this adapter's record does not fit its chat template: {error}") from error

    def _recorded_ends(self) -> list[int]:
        ids = map(self._id, self._record.end_tokens)
        return [token for token in ids if token is not None]

    def _id(self, token: str) -> int | None:
        """Return the id of a token given as text, None if the tokenizer does not have it."""
        found = self._tokenizer.convert_tokens_to_ids(token)
        return found if found is not None and self._tokenizer.convert_ids_to_tokens(found) == token else None


def _shortened(notes: Sequence[str]) -> tuple[str, ...]:
    """Return notes that fit a header: they repeat names out of the request."""
    short = [note if len(note) <= NOTE else f"{note[:NOTE]}..." for note in dict.fromkeys(notes)]
    more = len(short) - NOTES
    return tuple(short if more <= 0 else [*short[:NOTES], f"and {more} more"])
