"""What OpenAI's API has and this server does not: said by name, never pretended."""

from __future__ import annotations

from ...errors import did_you_mean

CHAT = "/v1/chat/completions"
# The first part of a path below /v1: what to use instead, or "" if nothing here does it.
NOT_HERE = {
    "responses": CHAT,
    "embeddings": "",
    "moderations": "",
    "images": "",
    "audio": "",
    "videos": "",
    "files": "",
    "uploads": "",
    "batches": "",
    "assistants": CHAT,
    "threads": CHAT,
    "conversations": CHAT,
    "realtime": CHAT,
    "vector_stores": "",
    "containers": "",
    "evals": "`lorakit eval --server URL`",
    "fine_tuning": "`lorakit train`, then /v1/load_lora_adapter",
    "engines": "/v1/models",
    "edits": CHAT,
    "rerank": "",
    "score": "",
    "pooling": "",
    "classify": "",
}

# Fields that name the caller or the provider's plan, and mean nothing here; modalities is checked apart.
LABELS = frozenset(
    {
        "user",
        "metadata",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "store",
        "service_tier",
        "modalities",
    }
)

# Fields that would change the answer and are not done here: refused where they ask for something, with what to use.
REFUSED = {
    "functions": "give them as `tools`",
    "function_call": "give it as `tool_choice`",
    "audio": "answers are text",
    "web_search_options": "there is no web search here",
    "guided_json": "use `response_format` with a JSON schema",
    "guided_choice": "use `response_format` with a JSON schema that has an enum",
    "guided_regex": "use `response_format` with a JSON schema",
    "guided_grammar": "use `response_format` with a JSON schema",
    "structured_outputs": "use `response_format` with a JSON schema",
    "prompt_logprobs": "log probabilities are given for the answer only",
    "use_beam_search": "answers are sampled; use `n` for several",
    "min_tokens": "give the end token a negative `logit_bias` instead",
    "continue_final_message": "use /v1/completions with the text to go on from",
    "chat_template": "adapters bring their own; the base's is given when the server starts (--chat-template)",
    "documents": "write them into the messages",
    "bad_words": "give their tokens a negative `logit_bias`",
    "truncate_prompt_tokens": "shorten the prompt before it is sent",
    "include_stop_str_in_output": "append the stop text to the answer",
}


# What a mistyped path may have been meant for.
PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/tokenize",
    "/detokenize",
    "/health",
    "/metrics",
)


def missing(path: str) -> str:
    """Say why a path answers 404."""
    parts = path.strip("/").split("/")
    named = parts[1] if len(parts) > 1 and parts[0] == "v1" else parts[0]
    if named in NOT_HERE:
        instead = NOT_HERE[named]
        return f"lorakit does not serve {path[:100]}" + (f"; use {instead}" if instead else "")
    if path.rstrip("/") in ("/chat/completions", "/completions", "/models"):
        return f"no such path: {path}; the API's paths begin with /v1, so the client's base URL must end with /v1"
    hint = did_you_mean(path[:100], PATHS)
    return f"no such path: {path[:100]}{hint or '; /openapi.json lists those there are'}"


def is_asked(value: object) -> bool:
    """Whether the value of a field asks for anything. {} does: as a schema, it asks for JSON."""
    return not (value is None or value is False or value in (0, "", []))
