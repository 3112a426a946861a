"""Requests to token ids: a prompt is what the adapter was trained on, by its own record."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
import trl_templates

from lorakit.bases.load import load_tokenizer
from lorakit.data.chat_record import ChatRecord
from lorakit.data.parse import Row
from lorakit.data.render import Renderer as RowRenderer
from lorakit.data.render import question_ids
from lorakit.data.shapes import read_examples
from lorakit.data.templates import ChatOptions, with_template
from lorakit.errors import AdapterError, ConfigError, DataError
from lorakit.serve.card import Card
from lorakit.serve.errors import Busy
from lorakit.serve.foreign_template import Bounds
from lorakit.serve.renderer import Renderer

CHATML = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# An adapter's own: other marks, an argument, today's date.
OWN = (
    "{% if loud %}LOUD {% endif %}{{ strftime_now('%d %b %Y') }}{% for m in messages %}"
    "[{{ m.role }}] {{ m.content }}{{ eos_token if m.role == 'assistant' else '' }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hello 1"},
    {"role": "assistant", "content": "world 2"},
    {"role": "user", "content": "again 3"},
]
TOOL = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}}}


def make_tokenizer(template=None):
    tokenizer = load_tokenizer("embedded")
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def card(name="a", **record):
    return Card(name, name, 0, chat=ChatRecord(**record))


@pytest.fixture(scope="module")
def chatml():
    return make_tokenizer(CHATML)


@pytest.fixture(scope="module")
def renderer(chatml):
    made = Renderer(chatml, [chatml.eos_token_id], bounds=Bounds(seconds=1.0))
    yield made
    asyncio.run(made.close())


@pytest.fixture(scope="module")
def bare():
    """Of a base without a chat template."""
    tokenizer = make_tokenizer()
    made = Renderer(tokenizer, [tokenizer.eos_token_id])
    yield made
    asyncio.run(made.close())


def chat(renderer, messages, card=None, **more):
    return asyncio.run(renderer.chat(messages, card, **more))


def text(renderer, prompt, card=None):
    return asyncio.run(renderer.text(prompt, card))


def read(renderer, prompt) -> str:
    return renderer.tokenizer.decode(prompt.ids, clean_up_tokenization_spaces=False)


# ------------------------------------------------------------------------------------------ as in training

RECORDS = {
    "base": ChatRecord(),
    "chat": ChatRecord("chat"),
    "plain": ChatRecord("plain"),
    "own template": ChatRecord("chat", OWN, ChatOptions({}, "2026-01-31")),
    "own arguments": ChatRecord("chat", OWN, ChatOptions({"loud": True}, "2026-01-31")),
}


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
def test_a_prompt_is_what_lorakit_chat_writes(renderer, chatml, record):
    adapter = None if record == ChatRecord() else Card("a", "a", 0, chat=record)
    tokenizer = with_template(chatml, record.template)
    expected = question_ids(TALK, tokenizer, record.style or "chat", record.options)
    assert list(chat(renderer, TALK, adapter).ids) == expected
    parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in TALK]
    assert list(chat(renderer, parts, adapter).ids) == expected


@pytest.mark.parametrize("record", list(RECORDS.values())[1:], ids=list(RECORDS)[1:])
def test_a_prompt_is_the_beginning_of_a_row_that_was_trained(renderer, chatml, record):
    rows = RowRenderer(
        with_template(chatml, record.template), record.style, options=record.options, ends=[chatml.eos_token_id]
    )
    turns = [*TALK, {"role": "assistant", "content": "dog 4"}]
    _, (example,) = read_examples([Row({"messages": turns}, "data.jsonl", 1)])
    row = rows.rows(example)[-1]
    prompt = chat(renderer, TALK, Card("a", "a", 0, chat=record))
    assert tuple(row.ids[: len(prompt.ids)]) == prompt.ids
    assert renderer.tokenizer.decode(row.ids[len(prompt.ids) :]).startswith("dog 4")
    # What ends the trained answer ends generation.
    assert set(row.ids[len(prompt.ids) :]) & prompt.stop_ids


@pytest.mark.skipif(not trl_templates.FAMILIES, reason="trl is not installed")
@pytest.mark.parametrize("family", trl_templates.FAMILIES)
def test_templates_of_real_families_that_come_with_adapters(family):
    """Rendered apart, with their date, as in this process."""
    tokenizer, source = trl_templates.tokenizer_of(family), trl_templates.source_of(family)
    turns = [turn for turn in TALK if turn["role"] != "system"]
    options = ChatOptions({}, "2026-01-31")
    made = Renderer(load_bare(family), trl_templates.ends_of(family))
    try:
        prompt = chat(made, turns, Card("a", "a", 0, chat=ChatRecord("chat", source, options)))
    finally:
        asyncio.run(made.close())
    assert list(prompt.ids) == question_ids(turns, tokenizer, "chat", options)


def load_bare(family):
    from copy import copy

    tokenizer = copy(trl_templates.tokenizer_of(family))
    tokenizer.chat_template = None
    return tokenizer


def test_texts_are_encoded_as_training_encodes_texts(renderer, chatml):
    assert list(text(renderer, "hello 1").ids) == question_ids("hello 1", chatml, "none")
    assert text(renderer, [5, 6, 7]).ids == (5, 6, 7)
    single = [{"role": "user", "content": "hello 1"}]
    assert chat(renderer, single, card(style="none")).ids == text(renderer, "hello 1").ids


def test_a_base_without_a_template_is_written_to_plainly(bare):
    assert read(bare, chat(bare, TALK[1:2])) == "### Instruction:\nhello 1\n\n### Response:\n"
    own = card(style="chat", template=OWN, options=ChatOptions({}, "2026-01-31"))
    assert read(bare, chat(bare, TALK[1:2], own)) == "31 Jan 2026[user] hello 1\n[assistant] "


def test_the_operators_template_is_the_bases_and_not_that_of_adapters_with_their_own(chatml):
    made = Renderer(chatml, [], template=OWN)
    try:
        assert read(made, chat(made, TALK[1:2])).endswith("[user] hello 1\n[assistant] ")
        own = card(style="chat", template=CHATML)
        assert read(made, chat(made, TALK[1:2], own)).startswith("<|im_start|>user\nhello 1")
    finally:
        asyncio.run(made.close())
    with pytest.raises(ConfigError, match="--chat-template"):
        Renderer(chatml, [], template="{% if %}")


# ------------------------------------------------------------------------------------------ stop tokens


def test_stop_ids_are_the_bases_the_templates_and_the_records(renderer, bare, chatml):
    eos, end, start = chatml.eos_token_id, *chatml.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"])
    assert chat(renderer, TALK).stop_ids == {eos, end}  # the template ends its answers with <|im_end|>
    assert text(renderer, "x").stop_ids == {eos}
    recorded = card(style="chat", end_tokens=("<|im_start|>", "<|nowhere|>"))
    assert chat(renderer, TALK, recorded).stop_ids == {eos, end, start}
    assert text(renderer, "x", recorded).stop_ids == {eos, start}
    assert chat(bare, TALK).stop_ids == {eos}
    other = Renderer(chatml, [7])
    assert text(other, "x").stop_ids == {eos, 7}
    asyncio.run(other.close())


def test_two_adapters_with_two_templates_at_once(renderer):
    one, two = card("one", style="chat", template=OWN), card("two", style="chat", template=OWN.replace("[", "("))

    async def both():
        return await asyncio.gather(*(renderer.chat(TALK, each) for each in [one, two, None] * 8))

    found = asyncio.run(both())
    assert len({prompt.ids for prompt in found}) == 3
    assert [prompt.ids for prompt in found] == [prompt.ids for prompt in found[:3]] * 8


def test_many_adapters_share_one_tokenizer(renderer, chatml):
    """A tokenizer takes megabytes: an adapter's format may have a template of its own, and no vocabulary."""
    formats = [renderer._formats.of(ChatRecord("chat", f"{n}{OWN}")) for n in range(300)]
    assert len(set(map(id, formats))) == 300
    assert {id(each._tokenizer.backend_tokenizer) for each in formats} == {id(chatml.backend_tokenizer)}
    assert len(renderer._formats._kept) <= 256
    same = [renderer._formats.of(ChatRecord("chat", str(OWN))) for _ in range(3)]
    assert len(set(map(id, same))) == 1


# ------------------------------------------------------------------------------------------ tools


def test_tools_are_shown_unless_they_may_not_be_called(renderer):
    prompt = chat(renderer, TALK, tools=[TOOL])
    assert '"name": "add"' in read(renderer, prompt)
    assert prompt.schema is None
    hidden = chat(renderer, TALK, tools=[TOOL], tool_choice="none")
    assert (hidden.ids, hidden.syntax) == (chat(renderer, TALK).ids, None)
    demanded = chat(renderer, TALK, tools=[TOOL], tool_choice="required")
    assert demanded.ids == prompt.ids
    assert '"const": "add"' in demanded.schema
    calls = renderer.calls(demanded)
    assert [call.name for call in calls.feed('[{"name": "add", "arguments": {}}]').calls + calls.finish().calls] == [
        "add"
    ]


def test_calls_of_a_plain_prompt_are_read_as_the_template_writes_them(bare):
    prompt = chat(bare, TALK, tools=[TOOL])
    assert "### Tools:" in read(bare, prompt)
    calls = bare.calls(prompt)
    calls.feed('{"name": "add", "arguments": {"a": 1}}')
    assert [call.arguments for call in calls.finish().calls] == ['{"a": 1}']


def test_history_with_calls_and_results(renderer, bare):
    call = {"id": "x", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    turns = [
        *TALK[:2],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "x"},
    ]
    written = read(bare, chat(bare, turns, tools=[TOOL]))
    assert '{"name": "add", "arguments": "{\\"a\\": 1}"}' in written
    assert "### Tool result:\n2" in written
    with pytest.raises(DataError, match="does not show tool_calls"):
        chat(renderer, turns, tools=[TOOL])  # this ChatML has no calls: silence would hide them from the model


# ------------------------------------------------------------------------------------------ nothing is dropped silently


def test_what_the_template_does_not_read_is_noted(renderer, bare):
    prompt = chat(renderer, TALK, kwargs={"enable_thinking": False})
    assert prompt.notes == ("the chat template does not read chat_template_kwargs.enable_thinking",)
    assert chat(bare, TALK, kwargs={"a": 1}).notes == ("the plain template does not read chat_template_kwargs.a",)
    named = [{**TALK[1], "name": "Ada"}]
    assert chat(renderer, named).notes == ("the chat template does not show 'name' of user turns",)
    assert chat(renderer, TALK).notes == ()
    many = chat(renderer, TALK, kwargs={f"{'x' * 1_000}{n}": n for n in range(50)}).notes
    assert len(many) == 9
    assert max(map(len, many)) < 170
    assert many[-1] == "and 42 more"


def test_arguments_of_a_request_count_more_than_the_records(renderer):
    own = card(style="chat", template=OWN, options=ChatOptions({"loud": True}, "2026-01-31"))
    assert read(renderer, chat(renderer, TALK[1:2], own)).startswith("LOUD 31 Jan")
    assert read(renderer, chat(renderer, TALK[1:2], own, kwargs={"loud": False})).startswith("31 Jan")
    with pytest.raises(DataError, match="'tools' is set by lorakit"):
        chat(renderer, TALK, kwargs={"tools": []})


def test_a_date_that_is_not_recorded_is_todays(renderer):
    from datetime import datetime

    today = datetime.now().strftime("%d %b %Y")
    assert read(renderer, chat(renderer, TALK[1:2], card(style="chat", template=OWN))).startswith(today)


def test_turns_of_the_assistant_stay_even_empty_or_last(renderer):
    turns = [*TALK, {"role": "assistant", "content": ""}, {"role": "assistant", "content": "dog 4"}]
    written = read(renderer, chat(renderer, turns))
    assert written.endswith(
        "again 3<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n<|im_start|>assistant\ndog 4<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


WRONG = [
    ([], "messages is an empty list"),
    ("hello", "messages is a str"),
    ([3], r"messages\[0\] is a int"),
    ([{"content": "x"}], r"messages\[0\].role is None; expected one of system"),
    ([*TALK, {"role": "usr", "content": "x"}], r"messages\[4\].role is 'usr'.*; did you mean 'user'"),
    ([{"role": "user"}], r"messages\[0\].content is missing or null"),
    ([{"role": "user", "content": None}], r"messages\[0\].content is missing or null"),
    ([{"role": "user", "content": 3}], r"messages\[0\].content is a int"),
    ([{"role": "user", "content": "\ud800"}], "half a surrogate pair"),
    ([{"role": "user", "content": [{"type": "text", "text": 3}]}], r"messages\[0\].content\[0\].text is a int"),
    (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        r"messages\[0\].content\[0\] is of type image_url; this server takes text only",
    ),
    ([{"role": "user", "content": "x", "weight": 1}], r"messages\[0\].weight says what is trained"),
    ([{**TALK[1], **{f"key{n}": n for n in range(17)}}], r"messages have 17 keys that are not OpenAI's .key0"),
    ([{"role": "assistant", "content": "", "tool_calls": [{}]}], r"messages\[0\].tool_calls\[0\] is no call"),
]


@pytest.mark.parametrize(("messages", "says"), WRONG, ids=range(len(WRONG)))
def test_what_is_wrong_with_which_message(renderer, messages, says):
    with pytest.raises(DataError, match=says) as caught:
        chat(renderer, messages)
    assert "train" not in str(caught.value) or "weight" in says


def test_an_adapter_of_texts_refuses_conversations(renderer):
    with pytest.raises(DataError, match="trained on texts without turns"):
        chat(renderer, TALK, card(style="none"))
    with pytest.raises(DataError, match="cannot call tools"):
        chat(renderer, TALK[1:2], card(style="none"), tools=[TOOL])


def test_a_template_that_hides_what_is_asked_is_an_error(renderer):
    hides = card(style="chat", template="{% for m in messages %}{{ m.role }}{% endfor %}")
    with pytest.raises(DataError, match="does not show the content of a user turn"):
        chat(renderer, TALK, hides)
    with pytest.raises(DataError, match="does not write tools"):
        chat(renderer, TALK, card(style="chat", template=OWN), tools=[TOOL])
    refuses = card(style="chat", template="{{ raise_exception('no system turns') }}")
    with pytest.raises(DataError, match=r"rejects this conversation .*no system turns"):
        chat(renderer, TALK, refuses)


def test_prompts_that_are_no_tokens(renderer, chatml):
    with pytest.raises(DataError, match="prompt is empty"):
        text(renderer, [])
    with pytest.raises(DataError, match="prompt is empty"):
        text(renderer, "")
    for wrong in (len(chatml), -1, "x", 1.5, True):
        with pytest.raises(DataError, match=f"token id {wrong!r}; expected ids from 0 to {len(chatml) - 1}"):
            text(renderer, [5, wrong])


# ------------------------------------------------------------------------------------------ records that do not fit


def metadata(added=None, **about):
    """As `lorakit.json` has it."""
    return {"data": about, "added_tokens": added or {}}


UNFIT = [
    (
        metadata(template="chat", chat_template=OWN, chat_template_kwargs={"lout": 1}),
        "does not read 'lout'; did you mean 'loud'",
    ),
    (metadata(template="chat", chat_template="\n{% if %}"), "template cannot be used: it is no Jinja template: line 2"),
    (metadata(template="chat", chat_template="{{ 'a' * (10 ** 11) }}"), "cannot be used: it needs more memory"),
    (metadata(template="chat", chat_template="a" * 300_000), "cannot be used: it has 300,000 characters"),
    (metadata(template="chat", end_tokens=["<|nowhere|>"]), r"end with <\|nowhere\|>, which the base's"),
    (metadata({"<new>": 9999}, template="plain"), "tokens of its own .<new>., which the base"),
]


@pytest.mark.parametrize(("adapter", "says"), UNFIT, ids=range(len(UNFIT)))
def test_a_record_that_does_not_fit_is_found_when_the_adapter_is_loaded(bare, adapter, says):
    with pytest.raises(AdapterError, match=says):
        asyncio.run(bare.check(adapter))
    with pytest.raises(AdapterError, match="cannot be used"):  # refused at once the second time
        asyncio.run(bare.check(metadata(template="chat", chat_template="{{ 'a' * (10 ** 11) }}")))


def test_a_chat_adapter_on_a_base_without_a_template(bare):
    asyncio.run(bare.check(metadata(template="chat")))
    adapter = card(style="chat")
    with pytest.raises(DataError, match="trained with a chat template, but the base has none"):
        chat(bare, TALK, adapter)
    assert text(bare, "hello", adapter).ids  # texts need no template


def test_records_that_fit_pass(bare, chatml):
    known = {"<|im_end|>": chatml.convert_tokens_to_ids("<|im_end|>")}
    for fits in (
        {},
        metadata(template="none"),
        metadata(known, template="plain"),
        metadata(template="chat", chat_template=OWN, end_tokens=["<|im_end|>"]),
        metadata(template="chat", chat_template="{{ raise_exception('needs a system turn') }}"),
    ):
        asyncio.run(bare.check(fits))


def test_a_stuck_template_delays_no_other_adapter(chatml):
    made = Renderer(chatml, [], bounds=replace(Bounds(), seconds=1.5))
    stuck = card("stuck", style="chat", template="{{ messages[0].content }}{{ 10 ** (10 ** 9) }}")

    async def both():
        hanging = asyncio.create_task(made.chat(TALK, stuck))
        await asyncio.sleep(0.05)
        loop = asyncio.get_running_loop()
        started = loop.time()
        await made.chat(TALK)
        waited = loop.time() - started
        with pytest.raises(DataError, match="processor time"):
            await hanging
        return waited, loop.time() - started

    try:
        waited, whole = asyncio.run(both())
    finally:
        asyncio.run(made.close())
    assert waited < whole / 2


def test_a_rendering_that_is_ended_from_outside_leaves_nothing_behind(chatml, monkeypatch):
    """A machine short of memory kills a rendering, also one of those that find out what a template writes."""
    own = card("own", style="chat", template=CHATML.replace("<|im_start|>", "[").replace("<|im_end|>", "]"))

    async def killed_at(nth: int) -> bool:
        """Kill a request's nth rendering; return whether it had so many."""
        made = Renderer(chatml, [])
        render, count = made._process.render, 0

        def killed_once(source, variables):
            nonlocal count
            count += 1
            if count == nth:
                raise Busy("killed")
            return render(source, variables)

        monkeypatch.setattr(made._process, "render", killed_once)
        try:
            first = await made.chat(TALK, own, tools=[TOOL])
            assert count < nth
            expected.append(first)
        except Busy:
            assert count >= nth
            prompts.append(await made.chat(TALK, own, tools=[TOOL]))
        finally:
            await made.close()
        return not expected

    expected, prompts = [], []
    while asyncio.run(killed_at(len(prompts) + 1)):
        pass
    assert len(prompts) > 3
    assert all(prompt == expected[0] for prompt in prompts)
