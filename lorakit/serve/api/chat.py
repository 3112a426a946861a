"""/v1/chat/completions: answer a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

from fastapi import APIRouter
from starlette.responses import Response
from starlette.types import Send

from ..card import Leased
from ..engine import TokenLogprob
from ..renderer import Prompt
from ..schemas import schema_of
from ..service import Service
from ..ticket import Ticket
from . import sampling
from .answering import Answering
from .answers import Answer, AnswerDelta, collected, deadline, stream, submitted, usage, works
from .errors import ApiError
from .events import Chunks, EventStream, text_json
from .forms import ERRORS, AnswerMessage, ChatChoice, ChatCompletion, ChatLogprobs, ToolCall
from .logprobs import chat_logprobs
from .replies import adapter_header, fixed, json_bytes, send_json
from .requests import ChatRequest
from .unread import warning

OK = {
    "model": ChatCompletion,
    "description": "The answers, or a stream of chunks",
    "content": {"text/event-stream": {"schema": {"type": "string"}}},
}
# The parts of a chunk. A stream sends thousands of the second.
ROLE = b'{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}'
TEXT = b'{"index":%d,"delta":{"content":%s},"logprobs":null,"finish_reason":null}'
DELTA = b'{"index":%d,"delta":%s,"logprobs":%s,"finish_reason":null}'
END = b'{"index":%d,"delta":{},"logprobs":null,"finish_reason":%s}'


def router(service: Service) -> APIRouter:
    """Return the route."""
    routes = APIRouter(tags=["completions"])

    @routes.post("/v1/chat/completions", responses={200: OK, **ERRORS}, response_model=None)
    async def create_chat_completion(request: ChatRequest) -> Response:
        """Answer a conversation. The chat template and the end tokens are those that the adapter was trained with."""
        return Answering(partial(_answer, service, request), service.limits.seconds)

    return routes


def _check(request: ChatRequest, service: Service) -> None:
    sampling.check(request, service.limits)
    sampling.check_conversation(request.messages, request.tools, service.limits)
    if request.top_logprobs and not request.logprobs:
        raise ApiError("top_logprobs is given without logprobs: true", "top_logprobs")
    both = request.max_tokens, request.max_completion_tokens
    if None not in both and both[0] != both[1]:
        raise ApiError(
            f"max_tokens is {both[0]} and max_completion_tokens is {both[1]}; give one of them", "max_tokens"
        )


async def _answer(service: Service, request: ChatRequest, send: Send) -> None:
    _check(request, service)
    until = deadline(service)
    stops = sampling.stop_texts(request, service.limits)
    schema = schema_of(request.response_format, service.limits.schema)
    async with service.registry.lease(request.model, sampling.scale(request)) as leased:
        prompt = await service.renderer.chat(
            request.messages,
            leased.leading,
            tools=request.tools,
            tool_choice=request.tool_choice,
            parallel_tool_calls=request.parallel_tool_calls is not False,
            kwargs=request.chat_template_kwargs,
        )
        if schema is not None and prompt.schema is None and prompt.tools:
            raise ApiError(
                "response_format: an answer that is held to a schema cannot call tools in the model's own syntax\n"
                '  give tool_choice "none" for such an answer, or "required" for a call',
                "response_format",
                "unsupported",
            )
        if len(prompt.schema or "") > service.limits.schema:
            longest = service.limits.schema
            raise ApiError(f"tools: a demanded call's schema has more than {longest:,} characters; give fewer", "tools")
        most = request.max_completion_tokens or request.max_tokens
        how = sampling.sampling(
            request,
            service.facts,
            service.limits,
            max_tokens=sampling.room(len(prompt.ids), most, service.facts, service.limits),
            ends=prompt.stop_ids,
            logprobs=(request.top_logprobs or 0) if request.logprobs else None,
            schema=schema if prompt.schema is None else prompt.schema,
        )
        with submitted(service, works(prompt.ids, leased.choice, how, request.n or 1, until)) as tickets:
            answers = [_reader(service, prompt, at, ticket, stops) for at, ticket in enumerate(tickets)]
            # A call that is demanded is all of the answer, so that nothing of it has the format.
            notes = [
                *prompt.notes,
                *(["response_format is not used: a call is demanded"] if schema and prompt.schema else []),
            ]
            headers = adapter_header(leased) | warning(request, notes)
            reply = _Reply(service, request, leased, answers, len(prompt.ids), headers)
            await (reply.stream(send) if request.stream else reply.whole(send))


def _reader(service: Service, prompt: Prompt, index: int, ticket: Ticket, stops: Sequence[str]) -> Answer:
    calls = None if prompt.syntax is None else service.renderer.calls(prompt)
    return Answer(index, ticket, service.renderer.answer(prompt, stops), calls)


class _Reply:
    """The answers in OpenAI's forms. answers: the `n` to the conversation."""

    def __init__(
        self,
        service: Service,
        request: ChatRequest,
        leased: Leased,
        answers: Sequence[Answer],
        prompt_tokens: int,
        headers: Mapping[str, str],
    ):
        self.answers, self.prompt_tokens, self.headers = answers, prompt_tokens, headers
        self.service, self.leased = service, leased
        self.reported = bool(request.logprobs)
        self.with_usage = bool(request.stream_options and request.stream_options.include_usage)

    async def whole(self, send: Send) -> None:
        came = await collected(self.answers)
        choices = [self._choice(answer, deltas) for answer, deltas in zip(self.answers, came, strict=True)]
        counts = usage(self.prompt_tokens, self.answers)
        keys = fixed("chat.completion", "chatcmpl", self.leased, self.service)
        await send_json(send, {**keys, "choices": choices, "usage": counts}, self.headers)

    def _choice(self, answer: Answer, came: Sequence[AnswerDelta]) -> ChatChoice:
        text = "".join(delta.text for delta in came)
        message: AnswerMessage = {"role": "assistant", "content": text, "refusal": None}
        if reasoning := "".join(delta.reasoning for delta in came):
            message["reasoning_content"] = reasoning
        if calls := [call for delta in came for call in delta.calls]:
            message["content"] = text or None
            message["tool_calls"] = [cast(ToolCall, call.openai()) for call in calls]
        reason = came[-1].reason
        assert reason is not None
        tokens = [token for delta in came for token in delta.logprobs]
        return {"index": answer.index, "message": message, "logprobs": self._logprobs(tokens), "finish_reason": reason}

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> ChatLogprobs | None:
        return (
            {"content": chat_logprobs(tokens, self.service.renderer.texts), "refusal": None} if self.reported else None
        )

    async def stream(self, send: Send) -> None:
        chunks = Chunks(fixed("chat.completion.chunk", "chatcmpl", self.leased, self.service), self.with_usage)
        events = EventStream(send, self.headers)
        for answer in self.answers:
            events.add(chunks.of(ROLE % answer.index))
        await stream(self.answers, events, chunks, partial(self._events, chunks), self.prompt_tokens)

    def _events(self, chunks: Chunks, answer: Answer, delta: AnswerDelta) -> bytes:
        """Return a delta as events: text, calls, and the reason in a chunk of its own."""
        out = []
        if delta.calls or delta.reasoning or (delta.logprobs and self.reported):
            content: dict[str, Any] = {}
            if delta.reasoning:
                content["reasoning_content"] = delta.reasoning
            if delta.text or not (delta.calls or delta.reasoning):
                content["content"] = delta.text
            if delta.calls:
                content["tool_calls"] = [call.openai(streamed=True) for call in delta.calls]
            logprobs = json_bytes(self._logprobs(delta.logprobs))
            out.append(chunks.of(DELTA % (answer.index, json_bytes(content), logprobs)))
        elif delta.text:
            out.append(chunks.of(TEXT % (answer.index, text_json(delta.text))))
        if delta.reason is not None:
            out.append(chunks.of(END % (answer.index, text_json(delta.reason))))
        return b"".join(out)
