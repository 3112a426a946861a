"""Requests in words to token ids, each with its adapter's own chat template, and ids back to words.

    prompt = await renderer.chat(messages, card, tools=tools, tool_choice="auto")   # ids, stop ids, how calls are read
    text, calls = renderer.answer(prompt, stop), renderer.calls(prompt)
    for piece in ...: delta = calls.feed(text.feed(piece.ids))                      # then both finish()

A prompt is what the adapter was trained on, because the code that renders rows of training data renders it, in the
style, with the template, its arguments and the date that the adapter recorded (`data.chat_record`). An adapter without
a record is written to like its base: with the base's chat template, or the plain one if it has none.

Rendering takes milliseconds, so it is done off the event loop. The base's template is the operator's choice and runs
here. An adapter's own template came with a file that anybody may have written: it runs in a process of its own, with
bounds on time, memory and output (`foreign_template`), and what exceeds them is refused from then on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..bases.vocabulary import recorded_tokens
from ..data.chat_record import ChatRecord
from ..data.templates import with_template
from ..errors import AdapterError, DataError
from .answer_text import AnswerText, TokenTexts
from .chat_format import ChatFormat, Formats
from .foreign_template import Bounds, TemplateProcess
from .messages import checked_messages, only_text
from .tool_calls.choice import tool_request
from .tool_calls.forced import FORCED
from .tool_calls.stream import ToolStream
from .tool_calls.syntax import Syntax, Tools

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .card import Card


@dataclass(frozen=True)
class Prompt:
    """A request as an engine takes it, and what its answer needs to be read.

    ids: the prompt's tokens, generation prompt included. stop_ids: for `Sampling.stop_ids`. schema: what `tool_choice`
    demands of the answer, for `Sampling.schema`; None leaves it to `response_format`. notes: what of the request the
    template does not write, for a warning header. tools, syntax, keep, parallel: how calls are read out of the answer
    (`Renderer.calls`, `Renderer.answer`).
    """

    ids: tuple[int, ...]
    stop_ids: frozenset[int]
    schema: str | None = None
    notes: tuple[str, ...] = ()
    tools: Tools = ()
    syntax: Syntax | None = None
    keep: frozenset[int] = frozenset()
    parallel: bool = True


class Renderer:
    """Renders requests for one base and all its adapters, which share one tokenizer."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        model_ends: Collection[int],
        *,
        template: str | None = None,
        bounds: Bounds | None = None,
    ):
        """Take the base's tokenizer. model_ends: what ends the model's generation (`generate.end_ids`).

        template: the text of a chat template for the base in place of its own, and for adapters that have none of
        their own. bounds: for templates that come with adapters. Raises ConfigError for an invalid template.
        """
        self.tokenizer = with_template(tokenizer, template, "--chat-template")
        self.texts = TokenTexts(self.tokenizer)
        self._process = TemplateProcess(bounds or Bounds())
        self._formats = Formats(self.tokenizer, self.texts, model_ends, self._process)
        # Foreign templates have a thread of their own, so that a slow one delays no others.
        self._own = ThreadPoolExecutor(2, "render")
        self._foreign = ThreadPoolExecutor(1, "render-foreign")

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        card: Card | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = (),
        tool_choice: str | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool = True,
        kwargs: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """Render a conversation, in OpenAI's form, up to where the assistant's next turn begins.

        card: of the adapter that answers; None: the base. tools, tool_choice, parallel_tool_calls: as in OpenAI's
        requests; with tool_choice "none" the prompt does not show the tools. kwargs: the request's
        chat_template_kwargs; they count more than the adapter's.

        Raises DataError, naming the message, tool or key, for what is malformed, is not text, or is rejected or not
        shown by the template, and Busy where its rendering was ended from outside (`foreign_template`).
        """
        thread = self._thread_for(_record(card))
        return await asyncio.get_running_loop().run_in_executor(
            thread, self._chat, messages, card, tools, tool_choice, parallel_tool_calls, kwargs or {}
        )

    async def text(self, prompt: str | Sequence[int], card: Card | None = None) -> Prompt:
        """Encode the prompt of a completion, as training encodes texts without a template; ids stay as they are.

        Raises DataError for an empty prompt, and for ids that are no tokens.
        """
        return await asyncio.get_running_loop().run_in_executor(self._own, self._text, prompt, card)

    async def check(self, metadata: Mapping[str, Any]) -> None:
        """Check what an adapter's metadata says of its prompts against the base, and try its template.

        Raises AdapterError: for end tokens or added tokens that the base does not have, arguments that the template
        does not read, and a template that is invalid or exceeds the bounds.
        """
        record = ChatRecord.of(metadata)
        added = recorded_tokens(metadata)
        await asyncio.get_running_loop().run_in_executor(self._thread_for(record), self._check, record, added)

    def answer(self, prompt: Prompt, stop: Sequence[str] = ()) -> AnswerText:
        """Return the reader of one answer's ids. stop: the request's stop texts."""
        return AnswerText(self.texts, stop, prompt.keep)

    def calls(self, prompt: Prompt) -> ToolStream:
        """Return the reader of one answer's calls: it splits its text into content and calls."""
        return ToolStream(prompt.syntax, prompt.tools, parallel=prompt.parallel)

    async def close(self) -> None:
        """End the process of foreign templates, and the threads."""
        self._process.close()
        self._own.shutdown(wait=False, cancel_futures=True)
        self._foreign.shutdown(wait=False, cancel_futures=True)

    def _thread_for(self, record: ChatRecord) -> ThreadPoolExecutor:
        return self._own if record.template is None else self._foreign

    def _chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        card: Card | None,
        tools: object,
        tool_choice: object,
        parallel: bool,
        kwargs: Mapping[str, Any],
    ) -> Prompt:
        turns, request = checked_messages(messages), tool_request(tools, tool_choice, parallel)
        form = self._formats.of(_record(card))
        if form.style == "none":
            if request.tools:
                raise DataError("this adapter was trained on texts without turns, so it cannot call tools")
            return Prompt(form.text_ids(only_text(turns)), form.stop_ids(False))
        with form.uninterrupted():
            ids, notes = form.chat_ids(turns, request.tools, kwargs)
            syntax, keep = self._syntax(form, request.tools, request.schema)
            ends = form.stop_ids(bool(request.tools))
        return Prompt(ids, ends, request.schema, notes, request.tools, syntax, keep, parallel)

    def _check(self, record: ChatRecord, added: Mapping[str, int]) -> None:
        form = self._formats.of(record)
        try:
            with form.uninterrupted():
                form.check(added)
        except DataError as error:
            raise AdapterError(f"the adapter does not fit this server: {error}") from error

    @staticmethod
    def _syntax(form: ChatFormat, tools: Tools, schema: str | None) -> tuple[Syntax | None, frozenset[int]]:
        if schema is not None:
            return FORCED, frozenset()
        syntax = form.syntax
        if syntax is None or not (tools or syntax.always):
            return None, frozenset()
        return syntax, form.markers

    def _text(self, prompt: str | Sequence[int], card: Card | None) -> Prompt:
        form = self._formats.of(_record(card))
        if isinstance(prompt, str):
            return Prompt(form.text_ids(prompt), form.text_stop_ids)
        highest = len(self.tokenizer)
        wrong = next((token for token in prompt if type(token) is not int or not 0 <= token < highest), None)
        if wrong is not None:
            raise DataError(f"prompt has the token id {wrong!r}; expected ids from 0 to {highest - 1}")
        if not prompt:
            raise DataError("prompt is empty; expected at least one token")
        return Prompt(tuple(prompt), form.text_stop_ids)


def _record(card: Card | None) -> ChatRecord:
    return ChatRecord() if card is None else card.chat
