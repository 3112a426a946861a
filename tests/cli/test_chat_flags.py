"""Flags of conversations, from looking at the data to using the adapter."""

from __future__ import annotations

import json

import pytest
import tiny_lm

TEMPLATE = (
    "{{ strftime_now('%y%m%d') }}{% for m in messages %}<{{ m.role }}>{{ m.content if loop.last or m.role == 'user' "
    "else '-' }}{{ eos_token if m.role == 'assistant' else '' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{{ mood or '' }}{% endif %}"
)


@pytest.fixture
def folder(tmp_path):
    """Conversations, and a template of their own."""
    turns = [{"role": role, "content": f"{role[0]}{i}"} for i in "12" for role in ("user", "assistant")]
    rows = [{"messages": [{"role": "user", "content": name}, *turns[1:]]} for name in tiny_lm.NAMES[:8]]
    tiny_lm.write_rows(tmp_path / "talks.jsonl", rows)
    (tmp_path / "own.jinja").write_text(TEMPLATE)
    return tmp_path


def test_data_show_writes_rows_as_asked_and_hands_the_flags_on(lorakit, model, folder):
    flags = ["--chat-template", folder / "own.jinja", "--chat-template-kwargs", "mood=glad", "--date", "2025-03-04"]
    code, out, _ = lorakit("data", "show", folder / "talks.jsonl", "--model", model, *flags, "--turns", "last")
    assert code == 0
    assert "250304<user>Ada<assistant>-</s><user>u2<assistant>⟦a2</s>⟧" in out
    assert "8 rows: earlier answers are context" in out
    assert f"--turns last --chat-template {folder}/own.jinja --chat-template-kwargs mood=glad --date 2025-03-04" in out
    out = lorakit("data", "show", folder / "talks.jsonl", "--model", model, *flags, "--json")[1]
    assert (json.loads(out)["rows"], json.loads(out)["items"]) == (16, 16)


def test_an_adapter_is_judged_and_used_as_it_was_trained(lorakit, model, folder, monkeypatch):
    from lorakit.generate import generate

    flags = ["--chat-template", folder / "own.jinja", "--chat-template-kwargs", "mood=glad", "--date", "2025-03-04"]
    talks, base = folder / "talks.jsonl", ["--model", model, "--precision", "fp32"]
    code, _, err = lorakit(
        "train", *base, "--data", talks, "--out", folder / "run", "--steps", "1", "--quiet", *flags, "--validation", "0"
    )
    assert code == 0, err
    adapter = ["--adapter", folder / "run/adapter"]
    with_record = json.loads(lorakit("eval", talks, *base, *adapter, "--no-text", "--json")[1])["results"]
    spelled_out = json.loads(lorakit("eval", talks, *base, *adapter, *flags, "--no-text", "--json")[1])["results"]
    other_date = lorakit("eval", talks, *base, *adapter, "--date", "2026-01-01", "--no-text", "--json")[1]
    assert with_record == spelled_out != json.loads(other_date)["results"]
    real, asked = generate.stream, []

    def stream(model, tokenizer, ids, **settings):
        asked.append(tokenizer.decode(ids))
        return real(model, tokenizer, ids, **settings)

    monkeypatch.setattr(generate, "stream", stream)
    lorakit("generate", "hi", *base, *adapter, "--max-new-tokens", "1")
    lorakit("generate", "hi", *base, *adapter, "--max-new-tokens", "1", "--chat-template-kwargs", "{mood: '?'}")
    lorakit("chat", *base, *adapter, "--max-new-tokens", "1", stdin="hi\n")
    prompt = "250304<user>hi<assistant>"
    assert asked == [f"{prompt}glad", f"{prompt}?", f"{prompt}glad"]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--chat-template", "none.jinja"], "--chat-template: there is no file 'none.jinja'"),
        (["--chat-template-kwargs", "mood"], "--chat-template-kwargs: expected NAME=VALUE"),
        (["--chat-template-kwargs", "{mood: ["], "--chat-template-kwargs: expected NAME=VALUE"),
        (["--chat-template-kwargs", "mood=1"], "the chat template does not read 'mood'"),
        (["--date", "today"], "expected YYYY-MM-DD"),
    ],
)
def test_bad_flags_are_one_line(lorakit, model, folder, flags, words):
    code, out, err = lorakit("data", "show", folder / "talks.jsonl", "--model", model, *flags)
    assert code != 0
    assert not out
    assert words in err
    assert "Traceback" not in err
