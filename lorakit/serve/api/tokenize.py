"""/tokenize and /detokenize, in vLLM's forms: what a prompt becomes, without an answer."""

from __future__ import annotations

import asyncio
from functools import partial

from fastapi import APIRouter
from starlette.responses import Response

from ..service import Service
from .errors import ApiError
from .forms import ERRORS, Detokenized, Tokens
from .replies import Json
from .requests import DetokenizeRequest, TokenizeRequest
from .sampling import check_conversation
from .unread import check_offered, warning


def router(service: Service) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(tags=["tokens"])
    tokenizer = service.renderer.tokenizer

    @routes.post("/tokenize", responses={200: {"model": Tokens}, **ERRORS}, response_model=None)
    async def tokenize(request: TokenizeRequest) -> Response:
        """Return the token ids that the model is given for a prompt or messages, with the adapter's template."""
        check_offered(request.model_extra)
        if (request.prompt is None) == (request.messages is None):
            raise ApiError("give either prompt or messages", "prompt")
        _check(request)
        ids = await (_chat(request) if request.prompt is None else _text(request))
        strings = tokenizer.convert_ids_to_tokens(ids) if request.return_token_strs else None
        length = service.facts.context
        content = {"count": len(ids), "max_model_len": length, "tokens": ids, "token_strs": strings}
        return Json(content, headers=warning(request))

    async def _text(request: TokenizeRequest) -> list[int]:
        async with service.registry.lease(request.model or service.registry.base_names[0], None) as leased:
            if request.add_special_tokens is False:
                encode = partial(tokenizer.encode, request.prompt, add_special_tokens=False, verbose=False)
                return list(await asyncio.to_thread(encode))
            assert request.prompt is not None
            return list((await service.renderer.text(request.prompt, leased.leading)).ids)

    async def _chat(request: TokenizeRequest) -> list[int]:
        check_conversation(request.messages or (), request.tools, service.limits)
        async with service.registry.lease(request.model or service.registry.base_names[0], None) as leased:
            prompt = await service.renderer.chat(
                request.messages or (), leased.leading, tools=request.tools, kwargs=request.chat_template_kwargs
            )
            return list(prompt.ids)

    @routes.post("/detokenize", responses={200: {"model": Detokenized}, **ERRORS}, response_model=None)
    async def detokenize(request: DetokenizeRequest) -> Response:
        """Return the text of token ids."""
        unknown = [token for token in request.tokens if token >= service.facts.vocabulary]
        if unknown:
            last = service.facts.vocabulary - 1
            raise ApiError(f"tokens: {unknown[0]} is not a token of the model; its ids end at {last}", "tokens")
        async with service.registry.lease(request.model or service.registry.base_names[0], None):
            text = await asyncio.to_thread(tokenizer.decode, request.tokens)
        return Json({"prompt": text}, headers=warning(request))

    return routes


def _check(request: TokenizeRequest) -> None:
    """Raise ApiError for a field that means nothing for a prompt, or for messages, or would give other ids."""
    if request.messages is None:
        for name in ("tools", "chat_template_kwargs", "add_generation_prompt"):
            if getattr(request, name) is not None:
                raise ApiError(f"{name} is for messages; a prompt has no template\n  leave it out", name)
    elif request.add_special_tokens:
        raise ApiError(
            "add_special_tokens: the chat template writes those of messages; leave it out", "add_special_tokens"
        )
    elif request.add_generation_prompt is False:
        raise ApiError(
            "add_generation_prompt: the ids end with it, as those that an answer is computed for; leave it out",
            "add_generation_prompt",
            "unsupported",
        )
