"""What chat templates get besides the conversation, other templates, and where answers end."""

from __future__ import annotations

import json

import pytest

from lorakit.bases.load import end_tokens, load_tokenizer
from lorakit.data.chat_record import ChatRecord
from lorakit.data.dataset import build, split
from lorakit.data.render import EACH_ANSWER, Renderer, question_ids
from lorakit.data.shapes import read_examples
from lorakit.data.templates import ChatOptions, dated, read_template, reads_date, with_template
from lorakit.errors import ConfigError, DataError

TALK = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "world"},
    {"role": "user", "content": "again"},
    {"role": "assistant", "content": "dog"},
]
DATED = (
    "{%- macro today() %}{{ 'On ' + strftime_now('%d %b %Y') }}{% endmacro -%}\n{{ today() }}\n"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
# As GLM's: an answer has no end of its own, the next role's token ends generation.
ROLES_ONLY = (
    "{% for m in messages %}<|{{ {'user': 'im_start', 'assistant': 'im_end', 'tool': 'endoftext'}[m.role] }}|>\n"
    "{{ m.content }}{% for c in m.tool_calls or [] %}[{{ c.function.arguments | tojson }}]{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_end|>{% endif %}"
)


def trained_texts(row, tokenizer):
    texts, last = [], False
    for token, trained in zip(row.ids, row.trained, strict=True):
        if trained:
            texts = [*texts, []] if not last else texts
            texts[-1].append(token)
        last = trained
    return [tokenizer.decode(ids) for ids in texts]


# ------------------------------------------------------------------------------------- the date


@pytest.mark.parametrize(
    "how", ["%Y-%m-%d", "%d %b %Y", "%B %-d, %Y", "%A %d.%m.%y", "%j %H:%M:%S", "%-m/%-d/%y", "%% %Y"]
)
def test_a_dated_template_writes_the_date_as_strftime_does(make_tokenizer, how):
    from datetime import datetime

    source = (
        "\n  {{ strftime_now('" + how + "') }} {% if strftime_now is defined %}known{% endif %}{{ messages[0].role }}"
    )
    expected = "\n  " + datetime(2025, 3, 4).strftime(how.replace("%%", "%%%%")) + " knownuser"
    t = make_tokenizer(template=source)
    text = t.apply_chat_template(TALK[:1], chat_template=dated(source, "2025-03-04"), tokenize=False)
    assert text == expected


def test_rows_and_prompts_have_the_runs_date(rows, make_tokenizer):
    t = make_tokenizer(template=DATED)
    assert reads_date(t)
    options = ChatOptions(date="2025-03-04")
    item = build(rows({"messages": TALK}), t, options=options).items[0]
    assert t.decode(item.ids).startswith("On 04 Mar 2025\nuser: hello")
    assert t.decode(question_ids("hello", t, "chat", options)) == "On 04 Mar 2025\nuser: hello\nassistant: "
    again = build(rows({"messages": TALK}), t, options=options).items[0]
    other = build(rows({"messages": TALK}), t, options=ChatOptions(date="2025-03-05")).items[0]
    assert again.digest() == item.digest() != other.digest()


def test_a_template_without_a_date_is_left_as_it_is(chatml_tokenizer):
    assert not reads_date(chatml_tokenizer)
    assert dated(chatml_tokenizer.chat_template, "2025-03-04") == chatml_tokenizer.chat_template


@pytest.mark.parametrize("date", ["4 March", "2025-13-01", ""])
def test_what_is_no_date_is_refused(date):
    with pytest.raises(ConfigError, match="expected YYYY-MM-DD"):
        ChatOptions(date=date)


# ------------------------------------------------------------------------------------- arguments and other templates


def test_arguments_reach_the_template_and_a_rows_own_win(rows, make_tokenizer):
    t = make_tokenizer(template="{{ effort }}|{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    options = ChatOptions({"effort": "low"})
    own = {"messages": TALK, "chat_template_kwargs": '{"effort": "high"}'}
    data = build(rows({"messages": TALK}, own), t, options=options)
    assert [t.decode(item.ids).partition("|")[0] for item in data.items] == ["low", "high"]


@pytest.mark.parametrize("name, words", [("effrt", "did you mean 'effort'"), ("tokenize", "set by lorakit")])
def test_an_argument_that_the_template_does_not_read_is_refused(make_tokenizer, name, words):
    t = make_tokenizer(template="{{ effort }}{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(ConfigError, match=words):
        Renderer(t, options=ChatOptions({name: 1}))


def test_another_template_is_used_and_the_tokenizer_itself_keeps_its_own(tmp_path, make_tokenizer, templates, rows):
    t = make_tokenizer(template=templates["chatml"])
    (tmp_path / "other.jinja").write_text("{% for m in messages %}{{ m.role }}> {{ m.content }}\n{% endfor %}")
    other = with_template(t, read_template(str(tmp_path / "other.jinja")))
    assert t.chat_template == templates["chatml"]
    assert other.decode(build(rows({"messages": TALK}), other).items[0].ids).startswith("user> hello\nassistant> world")
    assert with_template(t, None) is t


def test_a_template_file_that_is_none_is_named(tmp_path, chatml_tokenizer):
    (tmp_path / "chat.jinja").write_text("one\n{% for x")
    with pytest.raises(ConfigError, match=r"chat\.jinja, line 2: not a chat template"):
        with_template(chatml_tokenizer, (tmp_path / "chat.jinja").read_text(), "chat.jinja")
    with pytest.raises(ConfigError, match=r"did you mean 'chat\.jinja'"):
        read_template(str(tmp_path / "chat.jnja"))
    (tmp_path / "empty.jinja").write_text(" \n")
    with pytest.raises(ConfigError, match="empty"):
        read_template(str(tmp_path / "empty.jinja"))


# ------------------------------------------------------------------------------------- ends


def ends_of(tokenizer, *texts):
    return [tokenizer.convert_tokens_to_ids(text) for text in texts]


def test_a_role_token_that_ends_generation_belongs_to_the_answer_before_it(rows, make_tokenizer):
    t = make_tokenizer(template=ROLES_ONLY)
    (row,) = Renderer(t, ends=ends_of(t, "<|im_start|>", "<|endoftext|>")).rows(
        read_examples(rows({"messages": TALK}))[1][0]
    )
    assert trained_texts(row, t) == ["\nworld<|im_start|>", "\ndog<|im_start|>"]
    assert t.decode(row.ids) == t.apply_chat_template(TALK, tokenize=False) + "<|im_start|>"


def test_after_a_call_it_is_the_tools_role_token(rows, make_tokenizer):
    t = make_tokenizer(template=ROLES_ONLY)
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {"a": 1}}]}
    (row,) = Renderer(t, ends=ends_of(t, "<|im_start|>", "<|endoftext|>")).rows(
        read_examples(rows({"messages": [TALK[0], call]}))[1][0]
    )
    assert trained_texts(row, t) == ['\n[{"a": 1}]<|endoftext|>']


def test_a_role_token_that_does_not_end_generation_does_not(rows, make_tokenizer):
    t = make_tokenizer(template=ROLES_ONLY)
    (row,) = Renderer(t).rows(read_examples(rows({"messages": TALK}))[1][0])
    assert trained_texts(row, t) == ["\nworld", "\ndog</s>"]


def test_of_several_end_tokens_the_first_is_trained(rows, make_tokenizer, templates):
    t = make_tokenizer(template=templates["chatml"] + "{% if not add_generation_prompt %}</s>{% endif %}")
    first, second = Renderer(t, ends=ends_of(t, "<|im_end|>")).rows(read_examples(rows({"messages": TALK}))[1][0])
    assert trained_texts(first, t) == ["world<|im_end|>"]
    assert trained_texts(second, t) == ["dog<|im_end|>"]
    assert first.notes == (EACH_ANSWER,)
    assert t.decode(second.ids) == t.apply_chat_template(TALK, tokenize=False)


def test_an_ordinary_token_that_a_config_names_by_default_ends_nothing(rows, chatml_tokenizer):
    t = chatml_tokenizer
    (letter,) = t.encode("g", add_special_tokens=False)
    (row,) = Renderer(t, ends=[letter, 10**6]).rows(read_examples(rows({"messages": TALK}))[1][0])
    assert trained_texts(row, t)[-1] == "dog<|im_end|>"


def test_end_tokens_come_from_the_generation_config_else_from_the_config(tmp_path):
    assert end_tokens("embedded") == [load_tokenizer("embedded").eos_token_id]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 7}))
    assert end_tokens(str(tmp_path)) == [7]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
    assert end_tokens(str(tmp_path)) == [3, 5]


# ------------------------------------------------------------------------------------- rows of one conversation


def test_rows_of_one_conversation_are_held_out_together_and_counted(rows, make_tokenizer, templates):
    t = make_tokenizer(template=templates["strips"], end="<|im_end|>")
    talks = [
        {
            "messages": [
                {"role": "user", "content": f"hello {n}"},
                {"role": "assistant", "content": "<think>1</think>world"},
                *TALK[2:],
            ]
        }
        for n in range(10)
    ]
    data = build(rows(*talks), t)
    assert len(data.items) == len(data.lengths) == 20
    assert data.notes == {f"{EACH_ANSWER} (20 rows)": 10}
    assert (data.duplicates, data.same_prompt) == (0, 0)
    train, held = split(data.items, share=0.2)
    assert len(held) == 4
    assert not {item.row.number for item in train} & {item.row.number for item in held}
    assert len(build(rows(*talks), t, turns="last").items) == 10


@pytest.mark.parametrize("date", [None, "2025-03-04"])
def test_named_templates_without_a_default_are_named(rows, make_tokenizer, templates, date):
    tokenizer = make_tokenizer(template={"rag": templates["chatml"], "tool_use": templates["chatml"]}, end="<|im_end|>")
    talk = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]}
    assert build(rows(talk | {"tools": [{"name": "add"}]}), tokenizer, options=ChatOptions(date=date)).items
    with pytest.raises(DataError, match=r"row 1: .*multiple chat templates with no default"):
        build(rows(talk), tokenizer, options=ChatOptions(date=date))


@pytest.mark.parametrize(
    "data",
    [{"date": "tomorrow"}, {"chat_template_kwargs": {"tokenize": True}}, {"date": 3, "chat_template_kwargs": [1]}],
)
def test_a_record_that_is_not_as_we_write_it_is_left_out(data):
    record = ChatRecord.of({"data": {"template": "chat", "chat_template": "{{ messages }}", **data}})
    assert record == ChatRecord("chat", "{{ messages }}")
