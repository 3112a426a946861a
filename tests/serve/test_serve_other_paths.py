"""Models, loading, tokens, health, and the OpenAPI page."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
import tiny_lm
from served_adapters import write
from served_app import HELLO, ids, root, served, tokenizer

from lorakit.serve.engine import Stats
from lorakit.serve.guard.hub import Hub
from lorakit.serve.guard.roots import Roots
from lorakit.serve.locations import Locations


def test_models_lists_base_and_adapters_for_the_openai_client():
    app = served()

    async def ask() -> tuple[list[Any], Any]:
        async with app.openai() as client:
            return [model async for model in client.models.list()], await client.models.retrieve("sql")

    models, one = asyncio.run(ask())
    assert [model.id for model in models] == ["base", "chat", "sql"]
    assert (models[0].parent, models[0].root, models[0].max_model_len) == (None, "base", 1024)
    assert (one.parent, one.root, one.owned_by, one.object) == ("base", "sql", "lorakit", "model")
    assert (one.lorakit["status"], one.lorakit["version"]) == ("registered", None)
    app.post("/tokenize", {"model": "sql", "prompt": "x"})  # its first use
    about = app.get("/v1/models/sql").json()["lorakit"]
    assert (about["status"], about["rank"]) == ("ready", 2)
    assert about["version"] == app.registry.get("sql").key[:12]


def test_a_model_that_failed_is_not_listed_but_says_why(tmp_path: Any):
    app = served(adapters=["chat"])
    write(tmp_path / "bad", 7)
    app.registry.add("bad", tmp_path / "bad")
    (tmp_path / "bad" / "adapter_model.safetensors").write_bytes(b"not one")
    answer = app.post("/v1/completions", {"model": "bad", "prompt": "x"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")
    assert [model["id"] for model in app.get("/v1/models").json()["data"]] == ["base", "chat"]
    assert app.get("/v1/models/bad").json()["lorakit"]["problem"] == answer.json()["error"]["message"]


def test_names_with_slashes_and_unknown_ones():
    app = served(adapters=["team/sql"])
    assert app.get("/v1/models/team/sql").json()["id"] == "team/sql"
    answer = app.get("/v1/models/nothing")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_adapters_are_loaded_and_unloaded_in_vllms_forms():
    app = served(adapters=[])
    answer = app.post("/v1/load_lora_adapter", {"lora_name": "new", "lora_path": "team/sql"})
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'new' added successfully.")
    again = {"lora_name": "new", "lora_path": "other"}
    assert app.post("/v1/load_lora_adapter", again).json()["error"]["param"] == "lora_name"
    assert app.post("/v1/load_lora_adapter", {**again, "load_inplace": True, "pin": True}).status_code == 200
    card = app.registry.get("new")
    assert (card.place, card.pinned) == ("other", True)
    assert app.engine.pinned == {card.key}
    answer = app.post("/v1/unload_lora_adapter", {"lora_name": "new"})
    assert answer.text == "Success: LoRA adapter 'new' removed successfully (1 bytes freed)."
    assert app.post("/v1/unload_lora_adapter", {"lora_name": "new"}).status_code == 404


@pytest.mark.parametrize(
    "body, param",
    [
        ({}, "lora_name"),
        ({"lora_name": "x"}, "lora_path"),
        ({"lora_name": "", "lora_path": "sql"}, "lora_name"),
        ({"lora_name": 1, "lora_path": "sql"}, "lora_name"),
        ({"lora_name": "base", "lora_path": "sql"}, "lora_name"),
        ({"lora_name": "a b", "lora_path": "sql"}, "lora_name"),
        ({"lora_name": "x", "lora_path": "../sql"}, "lora_path"),
        ({"lora_name": "x", "lora_path": "/etc"}, "lora_path"),
        ({"lora_name": "x", "lora_path": "nowhere"}, "lora_path"),
        ({"lora_name": "x", "lora_path": "sql", "pin": "yes"}, "pin"),
        ({"lora_name": "x", "lora_path": "sql", "pinned": True}, "pinned"),
        ({"lora_name": "x", "lora_path": "someone/elses"}, "lora_path"),
    ],
)
def test_bad_loads_are_400(body: Any, param: str):
    app = served()
    answer = app.post("/v1/load_lora_adapter", body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert str(root()) not in answer.text
    assert not app.engine.loaded


def test_a_hub_id_that_may_not_be_loaded_names_its_field():
    app = served()
    app.registry.locations = Locations(Roots(()), Hub(["team"]))
    answer = app.post("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "other/sql"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "lora_path")
    assert "--hub other" in answer.json()["error"]["message"]


def test_tokens_of_a_prompt_and_of_messages_and_back():
    app = served()
    answer = app.post("/tokenize", {"prompt": "Hé", "return_token_strs": True}).json()
    assert answer["tokens"] == ids("Hé", end=False)
    assert (answer["count"], answer["max_model_len"], len(answer["token_strs"])) == (3, 1024, 3)
    answer = app.post("/tokenize", {"model": "sql", "messages": HELLO}).json()
    assert tokenizer().decode(answer["tokens"]) == "<user>Hi<assistant>"
    assert answer["token_strs"] is None
    assert app.post("/detokenize", {"tokens": [*ids("Hé"), tiny_lm.EOS]}).json()["prompt"].startswith("Hé")
    assert app.post("/tokenize", {}).status_code == 400
    assert app.post("/tokenize", {"prompt": "a", "messages": HELLO}).status_code == 400
    assert app.post("/tokenize", {"prompt": "", "add_special_tokens": False}).json()["tokens"] == []
    assert app.post("/detokenize", {"tokens": [258]}).status_code == 400
    assert app.post("/detokenize", {"tokens": [5], "model": "nope"}).status_code == 404
    assert app.post("/tokenize", b'{"prompt": "\\ud800"}').status_code == 400
    assert app.leased == 0


@pytest.mark.parametrize(
    "body, param",
    [
        ({"messages": HELLO, "add_generation_prompt": False}, "add_generation_prompt"),
        ({"messages": HELLO, "add_special_tokens": True}, "add_special_tokens"),
        ({"messages": HELLO, "tools": [{}] * 129}, "tools"),
        ({"messages": HELLO * 1001}, "messages"),
        ({"messages": HELLO, "continue_final_message": True}, "continue_final_message"),
        ({"prompt": "a", "tools": []}, "tools"),
        ({"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt"),
    ],
)
def test_tokens_that_would_be_others_are_400(body: Any, param: str):
    answer = served().post("/tokenize", body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_tokenize_names_what_it_does_not_read():
    body = {"messages": HELLO, "add_generation_prompt": True, "add_special_tokens": False, "whatever": True}
    answer = served().post("/tokenize", body)
    assert answer.headers["x-lorakit-warning"] == "not used: whatever"


def test_vllms_fields_of_a_load_are_named_and_a_pin_stays_when_nothing_is_said_of_it():
    app = served(adapters=[])
    body = {"lora_name": "new", "lora_path": "sql", "pin": True, "lora_int_id": 3, "base_model_name": "base"}
    answer = app.post("/v1/load_lora_adapter", body)
    assert (answer.status_code, answer.headers["x-lorakit-warning"]) == (200, "not used: lora_int_id, base_model_name")
    again = {"lora_name": "new", "lora_path": "other", "load_inplace": True}
    assert app.post("/v1/load_lora_adapter", again).status_code == 200
    assert app.registry.get("new").pinned
    answer = app.post("/v1/unload_lora_adapter", {"lora_name": "new", "lora_nam": "x"})
    assert answer.json()["error"]["param"] == "lora_nam"


@pytest.mark.parametrize(
    "stats, status",
    [
        (Stats(), 200),
        (Stats(running=1, last_step=-1.0), 200),
        (Stats(running=1, last_step=-100.0), 503),
        (Stats(running=0, last_step=-100.0), 200),
        (Stats(alive=False), 503),
    ],
)
def test_health_is_200_only_if_idle_or_stepping(stats: Stats, status: int):
    from dataclasses import replace

    app = served()
    last = None if stats.last_step is None else time.monotonic() + stats.last_step
    app.engine.stats = lambda: replace(stats, last_step=last)  # type: ignore[method-assign]
    answer = app.get("/health")
    assert answer.status_code == status
    assert answer.json()["status"] == ("ok" if status == 200 else "failed")


def test_the_openapi_page_has_every_path_and_loads_nothing_from_elsewhere():
    app = served()
    page = app.get("/openapi.json").json()
    assert set(page["paths"]) == {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/models",
        "/v1/models/{model}",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/tokenize",
        "/detokenize",
        "/health",
    }
    for path in page["paths"].values():
        for operation in path.values():
            assert "422" not in operation["responses"]
            assert {"200", "400"} <= set(operation["responses"])
    assert app.get("/docs").status_code == 404


def test_an_answer_on_the_openapi_page_is_the_one_sent():
    """The sent objects have exactly the documented keys."""
    app = served("Hello")
    schemas = app.get("/openapi.json").json()["components"]["schemas"]
    answer = app.post("/v1/chat/completions", {"model": "base", "messages": HELLO, "logprobs": True}).json()
    assert set(answer) == set(schemas["ChatCompletion"]["properties"])
    assert set(answer["choices"][0]) == set(schemas["ChatChoice"]["properties"])
    assert set(answer["choices"][0]["message"]) == set(schemas["AnswerMessage"]["required"])
    assert set(answer["choices"][0]["logprobs"]["content"][0]) == set(schemas["ChatLogprob"]["properties"])
    assert set(answer["usage"]) == set(schemas["Usage"]["properties"])
    model = app.get("/v1/models/sql").json()
    assert set(model) == set(schemas["ModelObject"]["properties"])
    assert set(model["lorakit"]) == set(schemas["AboutModel"]["properties"])
