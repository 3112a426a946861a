"""/v1/completions through the real openai client, whole and streamed."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from served_app import ids, served, tokenizer

from lorakit.serve.engine import Piece, TokenLogprob, Work
from lorakit.serve.ticket import Ticket

ASK = {"model": "base", "prompt": "Once"}


def complete(app: Any, **fields: Any) -> Any:
    async def ask() -> Any:
        async with app.openai() as client:
            return await client.completions.create(**{**ASK, **fields})

    return asyncio.run(ask())


def shout(work: Work) -> list[int]:
    """Answer with the prompt's text in capitals."""
    return ids(tokenizer().decode(work.ids).upper())


def test_a_text_goes_on_without_a_template():
    app = served(" upon")
    answer = complete(app)
    assert (answer.object, answer.choices[0].text, answer.choices[0].finish_reason) == (
        "text_completion",
        " upon",
        "stop",
    )
    assert list(app.engine.works[0].ids) == ids("Once", end=False)
    assert app.engine.works[0].sampling.max_tokens == 16
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 5)


def test_prompts_as_list_of_texts_and_of_ids():
    app = served(shout)
    assert [c.text for c in complete(app, prompt=["ab", "cd"], n=2).choices] == ["AB", "AB", "CD", "CD"]
    assert [c.index for c in complete(app, prompt=["ab", "cd"], n=2).choices] == [0, 1, 2, 3]
    assert complete(app, prompt=ids("xy", end=False)).choices[0].text == "XY"
    two = complete(app, prompt=[ids("xy", end=False), ids("z", end=False)])
    assert [c.text for c in two.choices] == ["XY", "Z"]
    assert two.usage.prompt_tokens == 3


def test_echo_puts_the_prompt_first_also_in_streams():
    app = served(shout)
    assert [c.text for c in complete(app, prompt=["ab", "cd"], echo=True).choices] == ["abAB", "cdCD"]
    assert complete(app, prompt=ids("xy", end=False), echo=True).choices[0].text == "xyXY"
    texts = ["", ""]
    for chunk in app.events("/v1/completions", {**ASK, "prompt": ["ab", "cd"], "echo": True}):
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == ["abAB", "cdCD"]


def test_log_probabilities_with_offsets_whole_and_streamed():
    app = served("abc")
    found = complete(app, logprobs=2).choices[0].logprobs
    assert found.tokens == ["a", "b", "c"]
    assert found.token_logprobs == [-0.5] * 3
    assert found.text_offset == [0, 1, 2]
    assert found.top_logprobs[0] == {"a": -0.5, "b": -1.5}
    offsets = [
        offset
        for chunk in app.events("/v1/completions", {**ASK, "logprobs": 2})
        if chunk["choices"][0]["logprobs"]
        for offset in chunk["choices"][0]["logprobs"]["text_offset"]
    ]
    assert offsets == [0, 1, 2]


def test_a_stream_ends_with_usage_if_asked():
    chunks = served(" upon").events("/v1/completions", {**ASK, "stream_options": {"include_usage": True}})
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == " upon"
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 9
    assert chunks[0]["usage"] is None


def test_best_of_gives_the_likeliest_per_token():
    app = served()
    answers = iter([("worst", -3.0), ("best!!", -0.1), ("middle", -1.0)])

    def submit(work: Work) -> Ticket:
        text, logprob = next(answers)
        ticket = Ticket(lambda: None)
        for token in ids(text, end=False):
            ticket.put(Piece((token,), (TokenLogprob(token, logprob),)))
        ticket.put(Piece((), finish="stop"))
        return ticket

    app.engine.submit = submit  # type: ignore[method-assign]
    answer = complete(app, n=2, best_of=3)
    assert [c.text for c in answer.choices] == ["best!!", "middle"]
    assert [c.index for c in answer.choices] == [0, 1]
    assert answer.choices[0].logprobs is None
    assert answer.usage.completion_tokens == 17  # of all three


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"suffix": "end"}, "suffix"),
        ({"echo": True, "logprobs": 0}, "echo"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"best_of": 9}, "best_of"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a"] * 300}, "prompt"),
        ({"prompt": [5000]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": "x" * 1100}, None),
        ({"logprobs": 50}, "logprobs"),
    ],
)
def test_what_cannot_be_answered_is_400_and_names_the_field(fields: dict[str, Any], param: str | None):
    app = served()
    answer = app.post("/v1/completions", {**ASK, **fields})
    assert answer.status_code == 400, answer.text
    found = answer.json()["error"]["param"]
    assert found is None or found.split(".")[0] == param
    assert not app.engine.works
