"""/v1/chat/completions: a conversation goes on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing
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
from . import asked, sampling
from .answering import Answering
from .answers import Answer, Delta, deltas, submitted, usage, works
from .errors import ApiError
from .events import Chunks, EventStream, text_json
from .forms import ERRORS, AnswerMessage, ChatChoice, ChatCompletion, ChatLogprobs, ToolCall
from .logprobs import chat_logprobs
from .replies import json_bytes, send_json
from .requests import ChatRequest

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
    asked.check(request, service)
    limits = service.limits
    if len(request.messages) > limits.messages:
        given = len(request.messages)
        raise ApiError(f"messages: {given} of them; this server takes up to {limits.messages}", "messages")
    if len(request.tools or ()) > limits.tools:
        raise ApiError(f"tools: {len(request.tools or ())}; this server takes up to {limits.tools}", "tools")
    if request.top_logprobs and not request.logprobs:
        raise ApiError("top_logprobs is given without logprobs: true", "top_logprobs")
    both = request.max_tokens, request.max_completion_tokens
    if None not in both and both[0] != both[1]:
        raise ApiError(
            f"max_tokens is {both[0]} and max_completion_tokens is {both[1]}; give one of them", "max_tokens"
        )


async def _answer(service: Service, request: ChatRequest, send: Send) -> None:
    _check(request, service)
    until = asked.deadline(service)
    stops = sampling.stop_texts(request, service.limits)
    schema = schema_of(request.response_format, service.limits.schema)
    async with service.registry.lease(request.model, asked.scale(request)) as leased:
        prompt = await service.renderer.chat(
            request.messages,
            leased.leading,
            tools=request.tools,
            tool_choice=request.tool_choice,
            parallel_tool_calls=request.parallel_tool_calls is not False,
            kwargs=request.chat_template_kwargs,
        )
        if len(prompt.schema or "") > service.limits.schema:
            most = service.limits.schema
            raise ApiError(f"tools: a demanded call's schema has more than {most:,} characters; give fewer", "tools")
        wanted = request.max_completion_tokens or request.max_tokens
        how = sampling.sampling(
            request,
            service.facts,
            service.limits,
            max_tokens=sampling.room(len(prompt.ids), wanted, service.facts, service.limits),
            stop_ids=prompt.stop_ids,
            logprobs=(request.top_logprobs or 0) if request.logprobs else None,
            schema=schema if prompt.schema is None else prompt.schema,
        )
        with submitted(service, works(prompt.ids, leased.choice, how, request.n or 1, until)) as tickets:
            answers = [_reader(service, prompt, at, ticket, stops) for at, ticket in enumerate(tickets)]
            reply = _Reply(service, request, leased, answers, prompt)
            await (reply.stream(send) if request.stream else reply.whole(send))


def _reader(service: Service, prompt: Prompt, index: int, ticket: Ticket, stops: Sequence[str]) -> Answer:
    calls = None if prompt.syntax is None else service.renderer.calls(prompt)
    return Answer(index, ticket, service.renderer.answer(prompt, stops), calls)


class _Reply:
    """The answers in OpenAI's forms."""

    def __init__(
        self, service: Service, request: ChatRequest, leased: Leased, answers: Sequence[Answer], prompt: Prompt
    ):
        self.answers, self.prompt_tokens = answers, len(prompt.ids)
        self.service, self.leased = service, leased
        self.headers = asked.headers(request, leased, prompt.notes)
        self.reported = bool(request.logprobs)
        self.with_usage = bool(request.stream_options and request.stream_options.include_usage)

    async def whole(self, send: Send) -> None:
        came: dict[int, list[Delta]] = {answer.index: [] for answer in self.answers}
        async with aclosing(deltas(self.answers)) as arriving:
            async for answer, delta in arriving:
                came[answer.index].append(delta)
        choices = [self._choice(answer, came[answer.index]) for answer in self.answers]
        counts = usage(self.prompt_tokens, self.answers)
        fixed = asked.fixed("chat.completion", "chatcmpl", self.leased, self.service)
        await send_json(send, {**fixed, "choices": choices, "usage": counts}, self.headers)

    def _choice(self, answer: Answer, came: Sequence[Delta]) -> ChatChoice:
        text = "".join(delta.text for delta in came)
        message: AnswerMessage = {"role": "assistant", "content": text, "refusal": None}
        if thought := "".join(delta.reasoning for delta in came):
            message["reasoning_content"] = thought
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
        fixed = asked.fixed("chat.completion.chunk", "chatcmpl", self.leased, self.service)
        chunks = Chunks(fixed, self.with_usage)
        events = EventStream(send, self.headers)
        try:
            async with aclosing(deltas(self.answers)) as arriving:
                for answer in self.answers:
                    events.add(chunks.of(ROLE % answer.index))
                async for answer, delta in arriving:
                    events.add(self._events(chunks, answer, delta))
                    # What has arrived meanwhile, and what ends the stream, goes out with it.
                    if events.full or not (answer.ticket.waiting or delta.reason):
                        await events.flush()
            events.add(chunks.last(usage(self.prompt_tokens, self.answers)))
            await events.flush(last=True)
        except Exception as error:
            if not events.begun:
                raise
            await events.fail(error)

    def _events(self, chunks: Chunks, answer: Answer, delta: Delta) -> bytes:
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
