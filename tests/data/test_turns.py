"""What turns hold besides role and content: it reaches the template, decides what is trained, or is named."""

from __future__ import annotations

import json

import pytest

from lorakit.data.dataset import build
from lorakit.data.render import Renderer
from lorakit.data.shapes import read_examples
from lorakit.data.templates import OTHER_IDS
from lorakit.data.turns import NOT_A_CALL
from lorakit.data.unshown import AFTER_LAST
from lorakit.errors import DataError

USER, ANSWER = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}
AGAIN, LAST = {"role": "user", "content": "again"}, {"role": "assistant", "content": "dog"}
CALLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ ' ' + m.name if m.name else '' }}\n{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}[{{ call.function.name }} {{ call.function.arguments | tojson }}]{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def calls_tokenizer(make_tokenizer):
    """Its template writes calls and names."""
    return make_tokenizer(template=CALLS, end="<|im_end|>")


def example_of(rows, messages, **columns):
    return read_examples(rows({"messages": messages} | columns))[1][0]


def trained_texts(rendered, tokenizer):
    texts, last = [], False
    for token, trained in zip(rendered.ids, rendered.trained, strict=True):
        if trained:
            texts = [*texts, []] if not last else texts
            texts[-1].append(token)
        last = trained
    return [tokenizer.decode(ids) for ids in texts]


def trained_of(rows, tokenizer, messages, **columns):
    renderer = Renderer(tokenizer)
    return [t for row in renderer.rows(example_of(rows, messages, **columns)) for t in trained_texts(row, tokenizer)]


# ------------------------------------------------------------------------------------- what is trained


@pytest.mark.parametrize(
    "switch", [{"weight": 0}, {"weight": 0.0}, {"weight": "0"}, {"train": False}, {"training": False}, {"loss": False}]
)
def test_a_turn_that_is_switched_off_is_context(rows, chatml_tokenizer, switch):
    t = chatml_tokenizer
    messages = [USER, ANSWER | switch, AGAIN, LAST]
    (row,) = Renderer(t).rows(example_of(rows, messages))
    assert trained_texts(row, t) == ["dog<|im_end|>"]
    assert t.decode(row.ids) == t.apply_chat_template([USER, ANSWER, AGAIN, LAST], tokenize=False)
    (row,) = Renderer(t).rows(example_of(rows, [USER, ANSWER, AGAIN, LAST | switch]))
    assert trained_texts(row, t) == ["world<|im_end|>"]
    assert row.notes == (AFTER_LAST,)


@pytest.mark.parametrize("switch", [{"weight": 1}, {"weight": 1.0}, {"weight": None}, {"train": True}, {"loss": None}])
def test_a_turn_that_is_switched_on_is_trained_and_its_switch_does_not_reach_the_template(rows, make_tokenizer, switch):
    t = make_tokenizer(template="{% for m in messages %}{{ m | tojson }}{% endfor %}")
    (row,) = Renderer(t).rows(example_of(rows, [USER, ANSWER | switch]))
    assert "weight" not in t.decode(row.ids)
    assert "train" not in t.decode(row.ids)
    assert any(row.trained)


def test_sharegpt_weights_of_all_turns_are_read(rows, chatml_tokenizer):
    turns = [("human", "a", 0), ("gpt", "b", 0), ("human", "c", 0.0), ("gpt", "d", 1.0)]
    values = {"conversations": [{"from": who, "value": what, "weight": w} for who, what, w in turns]}
    _, (example,) = read_examples(rows(values))
    assert [m.trained for m in example.messages] == [False, False, False, True]


@pytest.mark.parametrize("weight", [0.5, 2, -1, "heavy", [1]])
def test_another_weight_is_refused_with_row_and_turn(rows, weight):
    with pytest.raises(DataError, match=r"row 1: messages\[1\]\.weight is .*expected 1 .* or 0"):
        example_of(rows, [USER, ANSWER | {"weight": weight}])
    with pytest.raises(DataError, match=r"row 1: weight is .*expected 1 .* or 0"):
        read_examples(rows({"prompt": "a", "completion": "b", "weight": weight}))


def test_a_user_turn_that_asks_to_be_trained_is_refused(rows):
    with pytest.raises(DataError, match=r"messages\[0\]\.train asks to train a turn of role user"):
        example_of(rows, [USER | {"train": True}, ANSWER])


def test_a_row_of_which_every_answer_is_switched_off_is_refused(rows):
    with pytest.raises(DataError, match=r"row 1: every assistant turn is left out of the loss"):
        example_of(rows, [USER, ANSWER | {"weight": 0}])


@pytest.mark.parametrize("row", [{"prompt": "a ", "completion": "b"}, {"text": "a"}, {"messages": [USER, ANSWER]}])
def test_rows_of_weight_0_are_left_out_and_counted(rows, chatml_tokenizer, row):
    data = build(rows(row | {"weight": 1}, row | {"weight": 0}, row, row | {"weight": "0"}), chatml_tokenizer)
    assert [item.row.number for item in data.items] == [1, 3]
    assert data.notes == {"weight 0, so they are left out": 2}
    with pytest.raises(DataError, match=r"data\.jsonl: every row has weight 0"):
        build(rows(row | {"weight": 0}), chatml_tokenizer)


# ------------------------------------------------------------------------------------- calls


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "add", "arguments": '{"a":1}'}]},
        {
            "role": "assistant",
            "tool_calls": '[{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]',
        },
        {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 1}'}},
        {"role": "function_call", "content": '{"name": "add", "arguments": {"a": 1}}'},
        {"role": "tool_call", "content": '{"name": "add", "parameters": {"a": 1}}'},
        {"from": "function_call", "value": '{"name": "add", "arguments": "{\\"a\\": 1}"}'},
        {"from": "function_call", "value": '[{"name": "add", "arguments": {"a": 1}}]'},
        {"from": "function_call", "value": {"name": "add", "arguments": {"a": 1}}},
    ],
)
def test_a_call_in_any_form_is_written_by_the_template(rows, calls_tokenizer, turn):
    result = {"role": "observation", "content": "1"} if "role" in turn else {"from": "observation", "value": "1"}
    texts = trained_of(rows, calls_tokenizer, [USER, turn, result, LAST])
    assert texts == ['[add {"a": 1}]<|im_end|>', "dog<|im_end|>"]


def test_the_tool_call_demo_rows_of_llama_factory_train_calls(rows, calls_tokenizer):
    """Their form: ShareGPT turns, each call as JSON text, and the tools as JSON text without "function" levels."""
    tools = json.dumps([{"name": "tip", "description": "A tip.", "parameters": {"type": "object", "properties": {}}}])
    conversations = [
        {"from": "human", "value": "How much is the tip?"},
        {"from": "function_call", "value": '{"name": "tip", "arguments": {"bill": 50}}'},
        {"from": "observation", "value": '{"tip": 7.5}'},
        {"from": "gpt", "value": "It is 7.5."},
    ]
    _, (example,) = read_examples(rows({"conversations": conversations, "tools": tools}))
    (row,) = Renderer(calls_tokenizer).rows(example)
    assert trained_texts(row, calls_tokenizer) == ['[tip {"bill": 50}]<|im_end|>', "It is 7.5.<|im_end|>"]
    assert '<|im_start|>tool\n{"tip": 7.5}<|im_end|>' in calls_tokenizer.decode(row.ids)


def test_a_function_call_turn_that_is_no_json_is_trained_as_text_and_said(rows, calls_tokenizer):
    turn = {"from": "function_call", "value": "add(2, 2)"}
    (row,) = Renderer(calls_tokenizer).rows(example_of(rows, [USER, turn]))
    assert trained_texts(row, calls_tokenizer) == ["add(2, 2)<|im_end|>"]
    assert row.notes == (NOT_A_CALL,)


def test_calls_get_ids_where_the_template_rejects_them_without(rows, make_tokenizer):
    """As Mistral's do: nine letters and digits on each call, and the same on its result."""
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content or '' }}{% for call in m.tool_calls or [] %}"
        "{% if call.id|length != 9 %}{{ raise_exception('no id') }}{% endif %}[{{ call.function.name }} {{ call.id }}]"
        "{% endfor %}{{ '=' + m.tool_call_id if m.role == 'tool' else '' }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    t = make_tokenizer(template=template)
    turns = [
        USER,
        {"role": "function_call", "content": '[{"name": "add"}, {"name": "sub"}]'},
        *({"role": "observation", "content": value} for value in "12"),
        ANSWER,
    ]
    (row,) = Renderer(t).rows(example_of(rows, turns))
    assert t.decode(row.ids) == (
        "user: hello\nassistant: [add call00001][sub call00002]\ntool: 1=call00001\ntool: 2=call00002\n"
        "assistant: world\n</s>"
    )
    own = {"role": "assistant", "tool_calls": [{"id": "abcdefghi", "name": "add"}]}
    (row,) = Renderer(t).rows(example_of(rows, [USER, own]))
    assert "[add abcdefghi]" in t.decode(row.ids)


def test_ids_of_a_form_that_the_template_rejects_are_numbered_anew_and_noted(rows, make_tokenizer):
    """OpenAI's ids with Mistral's template: a result keeps to the call that it answers."""
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content or '' }}{% for call in m.tool_calls or [] %}"
        "{% if call.id|length != 9 %}{{ raise_exception('no id') }}{% endif %}[{{ call.function.name }} {{ call.id }}]"
        "{% endfor %}{{ '=' + m.tool_call_id if m.role == 'tool' else '' }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    t = make_tokenizer(template=template)
    calls = [{"id": f"call_{name}_AbCdEf", "function": {"name": name, "arguments": {}}} for name in ("add", "sub")]
    results = [{"role": "tool", "content": call["id"][5:8], "tool_call_id": call["id"]} for call in reversed(calls)]
    (row,) = Renderer(t).rows(
        example_of(rows, [USER, {"role": "assistant", "content": None, "tool_calls": calls}, *results, ANSWER])
    )
    assert t.decode(row.ids) == (
        "user: hello\nassistant: [add call00001][sub call00002]\ntool: sub=call00002\ntool: add=call00001\n"
        "assistant: world\n</s>"
    )
    assert row.notes == (OTHER_IDS,)
    for call, result in zip(calls, reversed(results), strict=True):
        call["id"] = result["tool_call_id"] = f"abcdef{call['id'][5:8]}"
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": calls}, *results, ANSWER]
    (row,) = Renderer(t).rows(example_of(rows, messages))
    assert "[sub abcdefsub]\ntool: sub=abcdefsub" in t.decode(row.ids)
    assert row.notes == ()


@pytest.mark.parametrize("written", ["m.content | tojson", "m.content"])
def test_a_result_that_is_an_object_is_written_as_json(rows, make_tokenizer, written):
    t = make_tokenizer(template=CALLS.replace("m.content or ''", f"{written} if m.role == 'tool' else m.content or ''"))
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add", "arguments": {"a": 1}}]}
    (row,) = Renderer(t).rows(example_of(rows, [USER, call, {"role": "tool", "content": {"sum": "ä"}}, LAST]))
    assert '<|im_start|>tool\n{"sum": "ä"}<|im_end|>' in t.decode(row.ids)


def test_a_call_that_leaves_nothing_but_an_end_to_train_is_an_error(rows, make_tokenizer):
    """A template without calls writes an empty turn, to which the end token would be added."""
    t = make_tokenizer(template="{% for m in messages %}{{ m.role }}: {{ m.content or '' }}\n{% endfor %}")
    turn = {"role": "assistant", "content": None, "tool_calls": [{"name": "add", "arguments": {"a": 1}}]}
    says_nothing = make_tokenizer(
        template="{% for m in messages if m.content %}{{ m.role }}: {{ m.content or '' }}\n{% endfor %}"
    )
    talk = [USER, turn, {"role": "tool", "content": "1"}, LAST]
    for tokenizer, messages in ((t, [USER, turn]), (t, talk), (says_nothing, talk)):
        with pytest.raises(DataError, match="row 1: the chat template does not show tool_calls of a turn"):
            Renderer(tokenizer).rows(example_of(rows, messages))


@pytest.mark.parametrize(
    "calls, words",
    [
        ("{", "messages[1].tool_calls, column 2: broken JSON"),
        ({"a": 1}, "messages[1].tool_calls is expected to be a list"),
        (["add"], "messages[1].tool_calls[0], column 1: broken JSON"),
        ([{"function": {"arguments": {}}}], "messages[1].tool_calls[0] is no call"),
        ([{"function": {"name": "add", "arguments": "{a"}}], "arguments, column 2: broken JSON"),
    ],
)
def test_broken_calls_are_named(rows, calls_tokenizer, calls, words):
    with pytest.raises(DataError) as error:
        trained_of(rows, calls_tokenizer, [USER, {"role": "assistant", "content": None, "tool_calls": calls}])
    assert "row 1" in str(error.value)
    assert words in str(error.value)


def test_a_template_that_writes_only_the_first_of_two_calls_is_an_error(rows, make_tokenizer):
    t = make_tokenizer(template=CALLS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]"))
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    assert trained_of(rows, t, [USER, {"role": "assistant", "tool_calls": [call]}])
    with pytest.raises(DataError, match=r"row 1: the chat template writes only some of a turn's 2 tool_calls"):
        trained_of(rows, t, [USER, {"role": "assistant", "tool_calls": [call, call]}])


def test_the_plain_template_writes_calls_as_json(rows, plain_tokenizer):
    call = {"name": "add", "arguments": {"a": 1}}
    texts = trained_of(rows, plain_tokenizer, [USER, ANSWER | {"tool_calls": [call]}])
    assert texts == ['world\n{"name": "add", "arguments": {"a": 1}}</s>']


# ------------------------------------------------------------------------------------- other keys and columns


def test_keys_that_the_template_reads_reach_it_and_others_are_counted(rows, calls_tokenizer):
    t = calls_tokenizer
    data = build(
        rows(
            {"messages": [USER | {"name": "ann"}, ANSWER | {"id": 7}]},
            {"messages": [USER | {"stamp": "now"}, ANSWER | {"id": 8, "name": None}]},
        ),
        t,
    )
    assert "<|im_start|>user ann\nhello" in t.decode(data.items[0].ids)
    assert data.notes == {
        "the chat template does not show 'id' of assistant turns": 2,
        "the chat template does not show 'stamp' of user turns": 1,
    }


def test_a_system_turn_that_the_template_leaves_out_is_noted_and_a_question_is_an_error(rows, make_tokenizer):
    t = make_tokenizer(
        template="{% for m in messages if m.role in ('user', 'assistant') %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    (row,) = Renderer(t).rows(example_of(rows, [{"role": "system", "content": "be brief"}, USER, ANSWER]))
    assert row.notes == ("the chat template does not show the system turn",)
    with pytest.raises(DataError, match="does not show the content of a tool turn"):
        Renderer(t).rows(example_of(rows, [USER, ANSWER, {"role": "tool", "content": "3"}, LAST]))


def test_documents_tools_and_arguments_of_a_row_reach_the_template(rows, make_tokenizer):
    template = (
        "{% for d in documents or [] %}<{{ d.text }}>{% endfor %}{% for t in tools or [] %}<{{ t.function.name }}>"
        "{% endfor %}{% if enable_thinking %}<think>{% endif %}"
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    t = make_tokenizer(template=template)
    columns = {
        "documents": json.dumps([{"title": "t", "text": "paper"}]),
        "functions": [{"name": "add"}],
        "chat_template_kwargs": {"enable_thinking": True, "depth": 3},
    }
    data = build(rows({"messages": [USER, ANSWER]} | columns), t)
    assert t.decode(data.items[0].ids).startswith("<paper><add><think>user: hello")
    assert data.notes == {"the chat template does not read chat_template_kwargs.depth": 1}
    one = columns | {"documents": {"title": "t", "text": "paper"}, "functions": '{"name": "add"}'}
    assert build(rows({"messages": [USER, ANSWER]} | one), t).items[0].ids == data.items[0].ids
    for wrong in ([3], ["paper"], 3):
        with pytest.raises(DataError, match="documents is expected to be a list of objects"):
            build(rows({"messages": [USER, ANSWER], "documents": wrong}), t)


def test_tools_and_documents_that_a_template_does_not_show_are_noted(rows, chatml_tokenizer):
    row = {"messages": [USER, ANSWER], "tools": [{"name": "add"}], "documents": [{"text": "paper"}]}
    assert build(rows(row, row), chatml_tokenizer).notes == {
        "the chat template does not show the column tools": 2,
        "the chat template does not show the column documents": 2,
    }


@pytest.mark.parametrize(
    "row, unused",
    [
        ({"prompt": "a ", "completion": "b", "input": "c", "id": 1}, "input (2), id (2)"),
        ({"text": "a", "label": 1}, "label"),
        ({"instruction": "a", "output": "b", "text": "c"}, "text"),
        ({"messages": [USER, ANSWER], "source": "web", "score": None}, "source"),
        ({"prompt": "a ", "completion": "b", "system": "c"}, "system"),
        ({"messages": [{"role": "system", "content": "own"}, USER, ANSWER], "system": "other"}, "system"),
    ],
)
def test_columns_that_nothing_reads_are_named_and_counted(rows, chatml_tokenizer, row, unused):
    assert build(rows(row, row), chatml_tokenizer).notes == {f"columns that are not used: {unused}": 2}


def test_a_system_column_equal_to_the_turn_is_no_loss(rows, chatml_tokenizer):
    row = {"messages": [{"role": "system", "content": "own"}, USER, ANSWER], "system": "own"}
    assert build(rows(row), chatml_tokenizer).notes == {}


@pytest.mark.parametrize(
    "columns",
    [
        {"messages": [USER, ANSWER], "tools": [{"name": "add\ud83d"}]},
        {"messages": [USER, ANSWER], "tools": '[{"name": "add\\ud83d"}]'},
        {"messages": [USER, ANSWER | {"tool_calls": [{"name": "add", "arguments": {"a": "\ud83d"}}]}]},
    ],
)
def test_half_a_surrogate_pair_anywhere_is_an_error_with_its_row(rows, make_tokenizer, plain_tokenizer, columns):
    template = CALLS + "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}"
    for tokenizer in (make_tokenizer(template=template), plain_tokenizer):
        with pytest.raises(DataError, match=r"row 1: the template's text .* has half a surrogate pair"):
            build(rows(columns), tokenizer)


def test_turns_with_the_keys_of_both_forms(rows, chatml_tokenizer):
    both = [USER | {"from": "web"}, ANSWER | {"from": "gpt", "value": "other"}]
    data = build(rows({"messages": both}), chatml_tokenizer)
    assert chatml_tokenizer.decode(data.items[0].ids).endswith("<|im_start|>assistant\nworld<|im_end|>\n")
    assert sorted(data.notes) == [
        f"the chat template does not show '{key}' of {role} turns"
        for key, role in (("from", "assistant"), ("from", "user"), ("value", "assistant"))
    ]
    filled = [USER | {"from": None, "value": None}, {"from": "gpt", "value": "b", "role": None, "content": None}]
    assert [m.content for m in example_of(rows, filled).messages] == ["hello", "b"]
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "content": "c"}]
    with pytest.raises(DataError, match=r"conversations\[1\] has from and value, but also content"):
        read_examples(rows({"conversations": turns}))


def test_developer_turns_keep_their_role_where_the_template_knows_it(rows, make_tokenizer, chatml_tokenizer):
    messages = [{"role": "developer", "content": "be brief"}, USER, ANSWER]
    (row,) = Renderer(chatml_tokenizer).rows(example_of(rows, messages))
    assert "<|im_start|>system\nbe brief" in chatml_tokenizer.decode(row.ids)
    t = make_tokenizer(template="{# developer #}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    (row,) = Renderer(t).rows(example_of(rows, messages))
    assert t.decode(row.ids).startswith("developer: be brief\n")
