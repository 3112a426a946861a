"""`--server URL` of `eval` and `chat`."""

from __future__ import annotations

import json

import openai_stub
import pytest


def test_eval_asks_the_base_and_each_adapter(lorakit, data):
    with openai_stub.serving(lambda path, body: body["model"]) as stub:
        code, out, _ = lorakit("eval", data, "--server", stub.url, "--adapter", "sql", "--limit", "4", "--samples", "1")
        assert code == 0
        assert "text from" in out
        assert "BLEU" in out
        assert out.endswith(f"next: lorakit chat --server {stub.url} --adapter sql\n")
        assert "loss and perplexity are measured by lorakit eval without --server" in out
        models = [body["model"] for path, body, _ in stub.asked if path == "/v1/chat/completions"]
        assert models.count("base") == models.count("sql") > 0
        assert all(body["temperature"] == 0 for path, body, _ in stub.asked if path == "/v1/chat/completions")


def test_eval_as_json_and_with_texts_to_continue(lorakit, data):
    with openai_stub.serving(lambda path, body: "x") as stub:
        args = ["eval", data, "--server", stub.url, "--template", "none", "--json", "--limit", "2", "--model", "sql"]
        code, out, _ = lorakit(*args)
        assert code == 0
        assert [one["adapter"] for one in json.loads(out)["results"]] == ["sql"]
        assert {path for path, _, _ in stub.asked} == {"/v1/models", "/v1/completions"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--precision", "bf16"], "--precision has no effect with --server"),
        (["--quantize", "nf4"], "--quantize has no effect with --server"),
        (["--turns", "last"], "--turns has no effect with --server"),
        (["--no-text"], "--no-text has no effect with --server"),
        (["--task", "classification"], "--task has no effect with --server"),
        (["--template", "plain"], "--template plain has no effect with --server"),
        (["--adapter", "sql=out/adapter"], "with --server an adapter is a name that the server knows"),
    ],
)
def test_eval_refuses_what_a_server_does_not_read(lorakit, data, flags, message):
    with openai_stub.serving(lambda path, body: "x") as stub:
        code, _, err = lorakit("eval", data, "--server", stub.url, *flags)
    assert code == 2
    assert message in err
    assert stub.asked == []


def test_eval_without_a_server_has_no_template_none(lorakit, data, model):
    code, _, err = lorakit("eval", data, "--model", model, "--template", "none")
    assert (code, "--template none is for --server" in err) == (2, True)


def test_chat_keeps_the_conversation_and_switches_models(lorakit):
    def answer(path, body):
        if body["model"] == "nobody":
            return 404, {}, {"error": {"message": "no model 'nobody'"}}
        return f"{body['model']} {len(body['messages'])}"

    lines = ["hi", "again", "/adapter sql", "hi", "/adapter nobody", "hi", "/base", "/reset", "hi", "/what", "/quit"]
    with openai_stub.serving(answer) as stub:
        code, out, _ = lorakit(
            "chat", "--server", stub.url, "--system", "brief", "--temperature", "0", stdin="\n".join(lines) + "\n"
        )
    assert code == 0
    answers = [answer.strip() for answer in out.split("> ")[1:]]
    assert answers[:4] == ["base 2", "base 4", "", "sql 6"]
    assert answers[4] == "note: the server does not list 'nobody'"
    assert answers[5] == f"lorakit: {stub.url}/v1 answered 404: no model 'nobody'"
    assert answers[8] == "base 2"
    assert "/adapter NAME" in answers[9]
    assert stub.asked[1][1]["messages"][0] == {"role": "system", "content": "brief"}
    assert stub.asked[1][1]["stream"] is True


def test_chat_completes_texts_and_refuses_what_has_no_effect(lorakit):
    with openai_stub.serving(lambda path, body: body["prompt"].upper()) as stub:
        code, out, _ = lorakit("chat", "--server", stub.url, "--template", "none", stdin="a\\nb\n")
        assert code == 0
        assert "A\nB" in out
        code, _, err = lorakit("chat", "--server", stub.url, "--precision", "fp32", stdin="")
        assert (code, "--precision has no effect" in err) == (2, True)
    code, _, err = lorakit("chat", "--server", "http://127.0.0.1:1", stdin="")
    assert (code, "no server answers at" in err) == (1, True)


def test_eval_finds_a_mistyped_name_before_it_asks_for_all_answers(lorakit, data):
    def answer(path, body):
        return "Hi" if body["model"] != "sqk" else (404, {}, {"error": {"message": "no model 'sqk'"}})

    with openai_stub.serving(answer) as stub:
        code, out, err = lorakit("eval", data, "--server", stub.url, "--adapter", "sqk")
    assert (code, out) == (1, "")
    assert "no model 'sqk'" in err
    posts = [body for path, body, _ in stub.asked if path != "/v1/models"]
    assert [(body["model"], body["max_tokens"]) for body in posts] == [("sqk", 1)]


def test_chat_says_which_listed_name_is_near(lorakit):
    with openai_stub.serving(lambda path, body: "Hi") as stub:
        _, out, _ = lorakit("chat", "--server", stub.url, "--adapter", "sqk", stdin="/adapter sql\n")
    assert out.count("note: ") == 1
    assert "the server does not list 'sqk'; did you mean 'sql'?" in out
