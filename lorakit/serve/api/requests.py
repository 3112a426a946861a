"""What clients send: OpenAI's fields, vLLM's for sampling, and lorakit's own under `lorakit`.

Keys that are not read here are accepted, as clients send ever more of them, and named in the header `x-lorakit-warning`
(`unread`). Those that would change the answer are refused by name (`offered.REFUSED`).
"""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AllowInfNan, BaseModel, BeforeValidator, ConfigDict, Field, Strict, model_validator

from ...errors import did_you_mean, listing
from .errors import ApiError

Int = Annotated[int, Strict()]
Number = Annotated[float, Strict(), AllowInfNan(False)]
Flag = Annotated[bool, Strict()]
TokenId = Annotated[int, Strict(), Field(ge=0)]
# Lists end at their first wrong element. All errors of a body of 900 kB took 7 s of the event loop to collect.
Texts = Annotated[list[str], Field(fail_fast=True)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
Objects = Annotated[list[dict[str, Any]], Field(fail_fast=True)]

MOST_BIASES = 1_024  # looked at one by one; `Limits.bias` may be lower
MODEL = "an adapter's name, the base's, base:adapter, or a mix such as a:0.7+b:0.3; see /v1/models"


def _check_texts(given: Any) -> Any:
    """Raise ApiError for a text that cannot be encoded: JSON lets one write half of a surrogate pair."""
    if not isinstance(given, dict):  # pydantic says so
        return given
    try:
        # In C, hundreds of times as fast as a walk through the parts.
        json.dumps(given, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        text = error.object[max(error.start - 20, 0) : error.start + 40]
        shown = text.encode("ascii", "backslashreplace").decode()
        raise ApiError(f"half of a surrogate pair, which is no character, is in {shown!r}; write it as UTF-8") from None
    except RecursionError:
        raise ApiError("the body is nested too deeply", code="nested_too_deep") from None
    return given


class Open(BaseModel):
    """A body whose unknown keys are kept; `unread` names them."""

    model_config = ConfigDict(extra="allow")


class Closed(BaseModel):
    """A body whose unknown keys are refused. prefix: of its keys, in errors."""

    model_config = ConfigDict(extra="forbid")
    prefix: ClassVar[str] = ""

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, given: Any) -> Any:
        wrong = [name for name in given if name not in cls.model_fields] if isinstance(given, dict) else []
        if wrong:
            hint = did_you_mean(str(wrong[0]), cls.model_fields) or f"; expected {listing(cls.model_fields)}"
            raise ApiError(f"{cls.prefix}{str(wrong[0])[:60]} is not known{hint}", f"{cls.prefix}{str(wrong[0])[:60]}")
        return given


class Body(Open):
    """A body of which every text can be encoded."""

    _texts = model_validator(mode="before")(_check_texts)


class LorakitOptions(Closed):
    """What OpenAI's API has no field for."""

    prefix: ClassVar[str] = "lorakit."

    scale: Number | None = Field(None, description="factor on the adapter's change; 0 is the base, 1 as trained")


class StreamOptions(Open):
    """How a stream is sent."""

    include_usage: Flag | None = Field(None, description="end with a chunk that counts the tokens")


def _check_size(given: Any) -> Any:
    if isinstance(given, dict) and len(given) > MOST_BIASES:
        raise ApiError(f"logit_bias: {len(given)} entries; this server takes up to {MOST_BIASES}", "logit_bias")
    return given


Bias = Annotated[dict[str, Annotated[float, Strict(), Field(ge=-100, le=100)]], BeforeValidator(_check_size)]


class Sampled(Body):
    """What both kinds of completion have."""

    model: str = Field(description=MODEL)
    max_tokens: Int | None = Field(None, ge=1, description="the most tokens of the answer")
    n: Int | None = Field(None, ge=1, description="answers to give for each prompt")
    stream: Flag | None = Field(None, description="send the answer as it grows, as server-sent events")
    stream_options: StreamOptions | None = None
    stop: str | Texts | None = Field(None, description="texts that end the answer, and are not part of it")
    stop_token_ids: TokenIds | None = Field(None, description="tokens that end the answer, besides the usual ones")
    ignore_eos: Flag | None = Field(None, description="go on after end tokens, up to max_tokens")
    seed: Int | None = Field(
        None, ge=-(2**63), lt=2**63, description="the same seed gives the same answer; answer i of n has seed + i"
    )
    temperature: Number | None = Field(None, ge=0, le=2, description="0: always the likeliest token; else 1 by default")
    top_p: Number | None = Field(None, gt=0, le=1, description="sample from the likeliest tokens of this mass")
    top_k: Int | None = Field(None, ge=-1, description="sample from this many likeliest tokens; 0 and -1: from all")
    min_p: Number | None = Field(None, ge=0, le=1, description="leave out tokens below this part of the likeliest's")
    presence_penalty: Number | None = Field(None, ge=-2, le=2)
    frequency_penalty: Number | None = Field(None, ge=-2, le=2)
    repetition_penalty: Number | None = Field(None, gt=0, le=10, description="above 1: against tokens seen before")
    logit_bias: Bias | None = Field(None, description="token id to what is added to its logit")
    response_format: dict[str, Any] | None = Field(
        None, description="text, json_object, or json_schema with the schema that the answer must satisfy"
    )
    lorakit: LorakitOptions | None = None


class ChatRequest(Sampled):
    """Body of /v1/chat/completions."""

    messages: Objects = Field(
        min_length=1, description='such as {"role": "user", "content": "Hi"}; a content may be a list of text parts'
    )
    max_completion_tokens: Int | None = Field(None, ge=1, description="the same as max_tokens")
    logprobs: Flag | None = Field(None, description="report each token's log probability")
    top_logprobs: Int | None = Field(None, ge=0, le=20, description="likeliest tokens to report beside each")
    tools: Objects | None = Field(None, description="functions that the answer may call")
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: Flag | None = Field(None, description="false: at most one call")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="what the chat template reads besides")


class CompletionRequest(Sampled):
    """Body of /v1/completions."""

    prompt: str | Texts | TokenIds | Annotated[list[TokenIds], Field(fail_fast=True)] = Field(
        description="a text, its token ids, or a list of either; each gets an answer"
    )
    suffix: str | None = Field(None, description="not served: must be null or empty")
    echo: Flag | None = Field(None, description="put the prompt before the answer")
    best_of: Int | None = Field(None, ge=1, description="answers to compute, of which the n likeliest are given")
    logprobs: Int | None = Field(None, ge=0, le=20, description="likeliest tokens to report beside each token")


class LoadRequest(Closed):
    """Body of /v1/load_lora_adapter, as vLLM's. What manages the server must not be misspelled without an error."""

    _texts = model_validator(mode="before")(_check_texts)

    lora_name: str = Field(min_length=1, max_length=256, description="name to ask for it by")
    lora_path: str = Field(
        min_length=1, max_length=4096, description="path below one of the server's roots, or an allowed hub id"
    )
    load_inplace: Flag | None = Field(None, description="replace an adapter that is loaded under this name")
    pin: Flag | None = Field(None, description="keep it on the device; null: as it was, false for a new one")
    lora_int_id: Int | None = Field(None, description="vLLM's; not used here")
    base_model_name: str | None = Field(None, description="vLLM's; not used here")


class UnloadRequest(Closed):
    """Body of /v1/unload_lora_adapter, as vLLM's."""

    _texts = model_validator(mode="before")(_check_texts)

    lora_name: str = Field(min_length=1, max_length=256)
    lora_int_id: Int | None = Field(None, description="vLLM's; not used here")


class TokenizeRequest(Body):
    """Body of /tokenize, as vLLM's: a prompt or messages."""

    model: str | None = Field(None, description=MODEL)
    prompt: str | None = None
    messages: Objects | None = None
    tools: Objects | None = None
    add_special_tokens: Flag | None = Field(None, description="for a prompt, true by default; messages have a template")
    add_generation_prompt: Flag | None = Field(None, description="for messages; only true, its default, is served")
    return_token_strs: Flag | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(Body):
    """Body of /detokenize, as vLLM's."""

    model: str | None = Field(None, description=MODEL)
    tokens: TokenIds
