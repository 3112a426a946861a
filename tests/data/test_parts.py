"""Contents that are lists of parts: text, reasoning, calls and images, for templates that take texts or parts."""

from __future__ import annotations

import pytest

from lorakit.data.render import Renderer
from lorakit.data.shapes import read_examples
from lorakit.errors import DataError

USER, ANSWER = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}


def row_of(rows, tokenizer, messages):
    (row,) = Renderer(tokenizer).rows(read_examples(rows({"messages": messages}))[1][0])
    return row


def trained_of(rows, tokenizer, messages):
    row = row_of(rows, tokenizer, messages)
    return tokenizer.decode([token for token, trained in zip(row.ids, row.trained, strict=True) if trained])


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",  # would write the list itself
        "{% for m in messages %}{{ m.role }}: {{ m.content if m.content is string else '' }}\n{% endfor %}",
        "{% for m in messages %}{{ m.role }}: {% for p in m.content %}{{ p.text }}{% endfor %}{{ '\\n' }}{% endfor %}",
    ],
)
@pytest.mark.parametrize("form", ["text", "parts", "both"])
def test_contents_are_written_whether_text_or_parts(rows, make_tokenizer, template, form):
    parts = [{"type": "text", "text": "wor"}, {"type": "text", "text": "ld"}]
    user = USER if form == "text" else USER | {"content": [{"type": "text", "text": "hello"}]}
    t = make_tokenizer(template=template)
    row = row_of(rows, t, [user, ANSWER if form != "both" else ANSWER | {"content": parts}])
    assert t.decode(row.ids).startswith("user: hello\nassistant: world\n")
    assert "world" in t.decode([token for token, trained in zip(row.ids, row.trained, strict=True) if trained])


def test_parts_of_reasoning_reach_a_template_that_writes_them_or_are_an_error(rows, make_tokenizer, chatml_tokenizer):
    content = [{"type": "thinking", "thinking": "two"}, {"type": "text", "text": "world"}]
    template = (
        "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}"
        "{% for p in m.content %}{{ p.text or '(' + p.thinking + ')' }}{% endfor %}{% endif %}\n{% endfor %}"
    )
    assert "(two)world" in trained_of(rows, make_tokenizer(template=template), [USER, ANSWER | {"content": content}])
    lacks = template.replace("'(' + p.thinking + ')'", "''")
    with pytest.raises(DataError, match="does not show a part of type thinking of a assistant turn"):
        trained_of(rows, make_tokenizer(template=lacks), [USER, ANSWER | {"content": content}])


@pytest.mark.parametrize(
    "part",
    [
        {"type": "thinking", "thinking": "two"},
        {"type": "thinking", "thinking": [{"type": "text", "text": "two"}]},  # Mistral's
        {"type": "reasoning", "text": "two"},
        {"type": "reasoning", "reasoning": "two", "text": None},
    ],
)
def test_a_part_of_reasoning_becomes_the_key_that_the_template_reads(rows, make_tokenizer, chatml_tokenizer, part):
    reads = "{% for m in messages %}{{ m.role }}: {{ '(' + m.reasoning_content + ')' if m.reasoning_content else '' }}"
    t = make_tokenizer(template=reads + "{{ m.content }}\n{% endfor %}")
    content = [part, {"type": "text", "text": "world"}]
    text = trained_of(rows, t, [USER, ANSWER | {"content": content}])
    assert "(two)world" in text
    with pytest.raises(DataError, match=f"row 1: .* part of type {part['type']}"):
        trained_of(rows, chatml_tokenizer, [USER, ANSWER | {"content": content}])


def test_parts_of_text_by_openais_later_names_are_text(rows, make_tokenizer):
    t = make_tokenizer(
        template="{% for m in messages %}{{ m.role }}: {% for p in m.content if p.type == 'text' %}{{ p.text }}"
        "{% endfor %}{{ '\\n' }}{% endfor %}"
    )
    user = USER | {"content": [{"type": "input_text", "text": "hello"}]}
    row = row_of(rows, t, [user, ANSWER | {"content": [{"type": "output_text", "text": "world"}]}])
    assert t.decode(row.ids).startswith("user: hello\nassistant: world\n")


def test_a_turn_of_one_part_that_is_not_shown_is_an_error(rows, make_tokenizer):
    t = make_tokenizer(  # as Idefics3's: it looks at the first part, and cannot take an empty list
        template="{% for m in messages %}{{ m.role }}:{{ '' if m.content[0].type == 'image' else ' ' }}"
        "{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}{{ '\\n' }}{% endfor %}"
    )
    with pytest.raises(DataError, match="row 1: the chat template does not show a part of type refusal"):
        trained_of(rows, t, [USER, ANSWER | {"content": [{"type": "refusal", "refusal": "no"}]}])


def test_a_part_that_a_template_of_texts_cannot_take_is_named(rows, chatml_tokenizer):
    content = [{"type": "text", "text": "world"}, {"type": "tool_use", "name": "add", "input": {}}]
    with pytest.raises(DataError, match=r"row 1: the chat template takes text only, .* a part of type tool_use"):
        trained_of(rows, chatml_tokenizer, [USER, ANSWER | {"content": content}])


def test_nulls_of_parts_do_not_reach_the_template(rows, make_tokenizer):
    """Parquet and datasets fill them in; Qwen3.5's template takes a part that has the key for an image."""
    t = make_tokenizer(
        template="{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}"
        "{% for p in m.content %}{{ '<image>' if 'image_url' in p else p.text }}{% endfor %}{% endif %}\n{% endfor %}"
    )
    part = {"type": "text", "text": "hello", "image_url": None}
    row = row_of(rows, t, [USER | {"content": [part]}, ANSWER])
    assert t.decode(row.ids).startswith("user: hello")
    with pytest.raises(DataError, match=r"messages\[0\]\.content\[0\]\.text is expected to be text"):
        row_of(rows, t, [USER | {"content": [part | {"text": None}]}, ANSWER])


def test_a_template_that_writes_the_first_part_only_does_not_hide_the_others(rows, make_tokenizer):
    t = make_tokenizer(  # as Mistral Small's
        template="{% for m in messages %}{{ m.role }}: {{ m.content if m.content is string else m.content[0].text }}\n"
        "{% endfor %}"
    )
    content = [{"type": "thinking", "thinking": "two"}, {"type": "text", "text": "world"}]
    with pytest.raises(DataError, match="does not show a part of type thinking"):
        row_of(rows, t, [USER, ANSWER | {"content": content}])
    two = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    assert row_of(rows, t, [USER | {"content": two}, ANSWER]).notes == (
        "the chat template changes the content of user turns",
    )


def test_a_call_is_hidden_although_the_template_tells_no_content_from_an_empty_one(rows, make_tokenizer):
    t = make_tokenizer(  # as LLaVA's
        template="{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }} {% endif %}\n"
        "{% endfor %}"
    )
    turn = {"role": "assistant", "content": None, "tool_calls": [{"name": "add", "arguments": {"a": 1}}]}
    with pytest.raises(DataError, match="row 1: the chat template does not show tool_calls of a turn"):
        row_of(rows, t, [USER, turn, {"role": "tool", "content": "1"}, ANSWER])
