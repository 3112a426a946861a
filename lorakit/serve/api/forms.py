"""What the server sends: OpenAI's objects. They describe the OpenAPI page, and type the code that builds them."""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

Reason = Literal["stop", "length", "tool_calls"]


class ErrorObject(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(TypedDict):
    error: ErrorObject


class CachedTokens(TypedDict):
    cached_tokens: int


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class TopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    content: list[ChatLogprob]
    refusal: None


class CalledFunction(TypedDict):
    name: str
    arguments: str


class ToolCall(TypedDict):
    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(TypedDict):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: NotRequired[list[ToolCall]]
    reasoning_content: NotRequired[str]  # vLLM's and DeepSeek's key for reasoning that is written apart


class ChatChoice(TypedDict):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Reason


class ChatCompletion(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class TextLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(TypedDict):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class TextCompletion(TypedDict):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage


class AboutModel(TypedDict):
    """What OpenAI's model object has no key for."""

    status: Literal["registered", "ready", "failed"]
    version: str | None  # the first characters of the hash of an adapter's contents
    rank: int | None
    bytes: int | None
    pinned: bool
    running: int
    problem: str | None


class ModelObject(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    lorakit: NotRequired[AboutModel]


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[ModelObject]


class Tokens(TypedDict):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(TypedDict):
    prompt: str


class Health(TypedDict):
    status: Literal["ok", "failed"]
    running: int
    waiting: int
    adapters: int
    problem: str | None


def _error(description: str) -> dict[str, Any]:
    # By reference: FastAPI would build the schema of a `model` anew for each status of each path.
    return {
        "description": description,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}},
    }


# How FastAPI describes errors that any endpoint may answer with. The model of the first puts ErrorBody on the page.
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "The request cannot be answered as it is"},
    401: _error("The API key is missing or wrong"),
    403: _error("The key or the origin does not permit this"),
    404: _error("No such model"),
    413: _error("The body is too large"),
    429: _error("All places are taken; retry-after says when to ask again"),
    500: _error("The server failed"),
    503: _error("The server is stopping, or its engine is broken"),
    504: _error("The request's time was over"),
}
