"""The whole server over vLLM (the stub): names, conversations, mixes, loading over HTTP, and the flags it computes."""

from __future__ import annotations

import asyncio
import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from engine_cases import STUB, Control, made

from lorakit.config import Quantization
from lorakit.errors import ConfigError
from lorakit.serve.settings import ServeSettings
from lorakit.serve.start import Built, start
from lorakit.serve.vllm.build import build

COMMAND = shlex.join([sys.executable, str(STUB)])


def settings(folder: Path, **changes: Any) -> ServeSettings:
    given: dict[str, Any] = {"engine": "vllm", "vllm": COMMAND, "roots": (folder / "root",), **changes}
    return ServeSettings("embedded", "tiny", **given)


def built(folder: Path, **changes: Any) -> Built:
    (folder / "root").mkdir(exist_ok=True)
    return build(settings(folder, **changes))


@pytest.fixture(scope="module")
def client(tmp_path_factory) -> Iterator[Any]:
    """`client(method, path, body)`: asks the server; it has the adapters sql and, below its root, chat."""
    folder = tmp_path_factory.mktemp("server")
    made(1).save(folder / "sql")
    made(2, rank=20).save(folder / "root" / "chat")
    with pytest.MonkeyPatch.context() as environment, asyncio.Runner() as runner:
        control = Control(folder / "stub")
        environment.setenv("VLLM_STUB", str(control.file))
        environment.setenv("XDG_CACHE_HOME", str(folder / "caches"))
        running = runner.run(start(settings(folder, adapters={"sql": str(folder / "sql")}), lambda service: None))
        web = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=running.app), base_url="http://127.0.0.1")

        def ask(method: str, path: str, body: Any = None) -> httpx2.Response:
            return runner.run(web.request(method, path, json=body))

        ask.control = control  # type: ignore[attr-defined]
        yield ask
        runner.run(web.aclose())
        runner.run(running.stop(5))


def completion(client: Any, model: str, **more: Any) -> httpx2.Response:
    return client(
        "POST", "/v1/completions", {"model": model, "prompt": "Hello", "max_tokens": 8, "temperature": 0, **more}
    )


def test_the_rank_flag_is_that_of_the_largest_adapter_named_or_below_a_root(client):
    argv = client.control.log()[0]["argv"]
    assert argv[argv.index("--max-lora-rank") + 1] == "32"
    assert argv[argv.index("--max-loras") + 1] == "32"


def test_names_and_mixes_answer_by_one_base(client):
    texts = {
        model: completion(client, model).json()["choices"][0]["text"]
        for model in ("tiny", "sql", "chat", "tiny:sql", "sql:0.7+chat:0.3")
    }
    assert texts["sql"] == texts["tiny:sql"]
    assert len(set(texts.values())) == 4
    half = completion(client, "sql", lorakit={"scale": 0.5}).json()["choices"][0]["text"]
    assert half not in texts.values()


def test_streamed_and_whole_answers_are_the_same(client):
    body = {"model": "sql", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9, "temperature": 0}
    whole = client("POST", "/v1/chat/completions", body).json()
    lines = client("POST", "/v1/chat/completions", {**body, "stream": True}).text.splitlines()
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    streamed = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert streamed == whole["choices"][0]["message"]["content"]
    assert whole["usage"]["completion_tokens"] == 9


def test_json_schemas_and_logprobs_go_through(client):
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": {**schema, "additionalProperties": False}}}
    text = completion(client, "sql", max_tokens=40, response_format=wanted).json()["choices"][0]["text"]
    assert json.loads(text) == {"n": 7}
    reported = completion(client, "chat", logprobs=3).json()["choices"][0]["logprobs"]
    assert len(reported["tokens"]) == len(reported["top_logprobs"]) == 8


def test_loading_over_http_reaches_vllm_and_unloading_too(client):
    loaded = client("POST", "/v1/load_lora_adapter", {"lora_name": "again", "lora_path": "chat"})
    assert loaded.status_code == 200, loaded.text
    again, chat = (completion(client, name).json() for name in ("again", "chat"))
    assert (again["choices"], again["usage"]) == (chat["choices"], chat["usage"])
    assert client("POST", "/v1/unload_lora_adapter", {"lora_name": "again"}).status_code == 200
    assert completion(client, "again").status_code == 404


def test_what_vllm_refuses_is_a_400_and_what_breaks_a_500(client):
    client.control.set(status=400, param="temperature")
    refused = completion(client, "sql")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "temperature")
    client.control.set(half_after=2)
    assert completion(client, "sql").status_code == 500
    client.control.set(status=503)
    busy = completion(client, "sql")
    assert (busy.status_code, "retry-after" in busy.headers) == (429, True)
    client.control.set()
    assert completion(client, "sql").status_code == 200


def test_settings_of_the_embedded_engine_are_refused_with_a_way_out(tmp_path):
    with pytest.raises(ConfigError, match="--quantize is for the embedded engine"):
        built(tmp_path, quantization=Quantization(quantize="nf4"))
    with pytest.raises(ConfigError, match="--prefix-memory is for the embedded engine"):
        built(tmp_path, prefix_memory=1 << 20)
    with pytest.raises(ConfigError, match="lorakit sets --port itself"):
        built(tmp_path, vllm_arguments=("--port=1",))


def test_the_rank_is_at_least_vllms_own_and_a_rank_asked_for_must_suffice(tmp_path):
    assert built(tmp_path).engine.settings.max_rank == 16  # type: ignore[attr-defined]
    made(1, rank=12).save(tmp_path / "root" / "inside" / "a")
    (tmp_path / "root" / "rubbish").mkdir()
    (tmp_path / "root" / "rubbish" / "adapter_config.json").write_text("[")
    assert built(tmp_path).engine.settings.max_rank == 16  # type: ignore[attr-defined]
    assert built(tmp_path, max_rank=20).engine.settings.max_rank == 32  # type: ignore[attr-defined]
    made(1, rank=40).save(tmp_path / "large")
    with pytest.raises(ConfigError, match="'large' has rank 40, and --max-rank is 32"):
        built(tmp_path, max_rank=32, adapters={"large": str(tmp_path / "large")})


def test_memory_for_adapters_is_a_number_of_them(tmp_path):
    made = built(tmp_path, adapter_memory=100 << 20, device_adapters=4).engine.settings  # type: ignore[attr-defined]
    # 6 layers of 4 · 256x256 and 3 · 256x704, and the output layer 256x4096, at rank 16 in 16 bits
    each = 2 * 16 * (6 * (4 * 512 + 3 * 960) + 256 + 4096)
    assert made.in_memory == 4 + (100 << 20) // each
