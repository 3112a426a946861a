"""Requests that are wrong in one way or another: sound ones, mutated by a seeded random generator."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import dataclass
from typing import Any

SOUND: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [
        {"model": "a", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3, "seed": 1, "top_p": 0.9},
        {
            "model": "embedded",
            "messages": [
                {"role": "system", "content": "x"}, {"role": "user", "content": [{"type": "text", "text": "y"}]},
            ],
            "max_completion_tokens": 2, "n": 2, "stop": ["a", "b"], "logprobs": True, "top_logprobs": 3, "stream": True,
            "stream_options": {"include_usage": True}, "response_format": {"type": "json_object"}, "user": "me",
        },
        {
            "model": "a:0.7+b:0.3", "messages": [{"role": "user", "content": "z"}], "max_tokens": 2,
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
            "tool_choice": "auto", "logit_bias": {"5": -3}, "lorakit": {"scale": 0.5}, "top_k": 5, "min_p": 0.1,
            "repetition_penalty": 1.1,
        },
    ],
    "/v1/completions": [
        {"model": "b", "prompt": "Once", "max_tokens": 3, "temperature": 0, "logprobs": 2, "n": 2, "best_of": 2},
        {"model": "a", "prompt": "Once", "max_tokens": 3, "echo": True},
        {"model": "embedded", "prompt": [1, 2, 3], "max_tokens": 2, "stream": True, "presence_penalty": 0.5},
        {"model": "a", "prompt": ["x", "y"], "max_tokens": 2, "suffix": "", "frequency_penalty": -0.5, "top_p": 0.5},
    ],
    "/v1/load_lora_adapter": [
        {"lora_name": "new", "lora_path": "a"},
        {"lora_name": "c", "lora_path": "gone", "load_inplace": True, "pin": True},
    ],
    "/v1/unload_lora_adapter": [{"lora_name": "nothing"}],
    "/tokenize": [{"model": "a", "prompt": "x"}, {"model": "b", "messages": [{"role": "user", "content": "x"}]}],
    "/detokenize": [{"model": "a", "tokens": [1, 2, 3]}],
}  # fmt: skip
OTHERS = [
    "/v1/models", "/v1/models/a", "/v1/models/../../x", "/v1/embeddings", "/v1/responses", "/metrics", "/openapi.json",
    "/", "/%00", "/v1//models", "/v1/models/" + "a" * 3000, "/health?x=1",
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 10**18, -(10**18), 10**400, 1e308, -1e308, 1e-300, 0.1, "", "a", "x" * 70_000,
    "\x00", "\ud800", "é\u202e\U0001f600", "../../etc/passwd", "{{7*7}}", [], {}, [[]], [None], [{}], {"a": {}},
    {"": ""}, [1] * 5000, {"type": "x"}, float("nan"), float("inf"), -float("inf"), ["x"] * 2000,
    {str(n): n for n in range(3000)}, [{}] * 100_000, ["a"] * 150_000,
]  # fmt: skip
KEYS = [
    "model",
    "stream",
    "max_tokens",
    "n",
    "seed",
    "stop",
    "messages",
    "prompt",
    "tools",
    "schema",
    "lorakit",
    "__class__",
    "",
]
SCHEMAS: list[Any] = [
    {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    for schema in (
        {"type": "nothing"}, {"$ref": "#"}, {"$ref": "http://127.0.0.1/x"}, {"pattern": "(a+)+$", "type": "string"},
        {"type": "string", "minLength": 10**9}, {"enum": []}, {"allOf": [{"$ref": "#"}]}, True, 7,
        {"type": "array", "minItems": 10**7},
        {"anyOf": [{"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(500)}}] * 5},
    )
]  # fmt: skip


@dataclass(frozen=True)
class Bad:
    """A request; headers: besides content-type and length."""

    method: str
    path: str
    body: bytes
    headers: dict[str, str]


def mutated(rng: random.Random) -> Bad:
    """Return the next one."""
    if rng.random() < 0.05:
        method = rng.choice(["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "BREW"])
        return Bad(method, rng.choice([*OTHERS, *SOUND]), rng.choice([b"", b"{}", b"x" * 500]), {})
    path = rng.choice(list(SOUND))
    value = copy.deepcopy(rng.choice(SOUND[path]))
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        _mutate(rng, value)
    body = json.dumps(value, ensure_ascii=rng.random() < 0.7).encode("utf8", "surrogatepass")
    if rng.random() < 0.2:
        body = _damaged(rng, body)
    headers = {}
    if rng.random() < 0.1:
        headers = rng.choice([
            {"content-type": "text/plain"}, {"content-type": "multipart/form-data"}, {"content-type": ""},
            {"accept": "nothing/at-all"}, {"content-encoding": "gzip"}, {"x-" + "y" * 3000: "z"}, {"origin": "null"},
            {"authorization": "Bearer " + "k" * 5000}, {"x-request-id": "\x01"},
        ])  # fmt: skip
    return Bad("POST", path, body, headers)


def _mutate(rng: random.Random, value: dict[str, Any]) -> None:
    """Change one thing, anywhere in it."""
    inside: list[Any] = [value]
    while True:  # walk down, now and then
        children = [
            c
            for c in (inside[-1].values() if isinstance(inside[-1], dict) else inside[-1])
            if isinstance(c, (dict, list)) and c
        ]
        if not children or rng.random() < 0.5:
            break
        inside.append(rng.choice(children))
    at = inside[-1]
    if not at:
        return
    choice = rng.random()
    if isinstance(at, list):
        at[rng.randrange(len(at))] = copy.deepcopy(rng.choice(VALUES))
    elif choice < 0.15:
        del at[rng.choice(list(at))]
    elif choice < 0.3:
        at[rng.choice(KEYS)] = copy.deepcopy(rng.choice(VALUES))
    elif choice < 0.4 and at is value:
        at["response_format"] = rng.choice(SCHEMAS)
    else:
        at[rng.choice(list(at))] = copy.deepcopy(rng.choice(VALUES))


def _damaged(rng: random.Random, body: bytes) -> bytes:
    """Damage the bytes."""
    kind = rng.randrange(7)
    if kind == 0:
        return body[: rng.randrange(len(body) + 1)]
    if kind == 1:
        return bytes(b if rng.random() > 0.01 else rng.randrange(256) for b in body)
    if kind == 2:
        depth = rng.choice([10, 40, 100_000])
        return b'{"model":' + b"[" * depth + b"]" * depth + b"}"
    if kind == 3:
        return body + rng.choice([b"}", b"\x00", body, b"x" * 1_100_000])
    if kind == 4:
        return body.replace(b":", rng.choice([b"", b"::", b"="]), 1)
    if kind == 5:  # sound UTF-16, in which U+0122 has the byte of a quote
        depth = rng.choice([10, 40, 600])
        hidden = '{"model":"\u0122\u0122\u0122","messages":' + "[" * depth + "]" * depth + "}"
        return hidden.encode(rng.choice(["utf-16", "utf-16-le", "utf-16-be", "utf-32-le"]))
    return b"\xff\xfe" + body.decode("utf8", "replace").encode("utf-16-le", "replace")


GARBAGE = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
    b"GET / HTTP/9.9\r\n\r\n", b"GET\r\n\r\n", b"\r\n" * 1000, b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\nzz",
    b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: " + b"y" * 200_000,
    b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFF\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: evil.example\r\nContent-Length: 2\r\n\r\n{}",
    b"GET /\x00 HTTP/1.1\r\n\r\n",
]  # fmt: skip
