"""The contract of a tool-call syntax, over all of them: what a model writes is read back, however it is cut; what
cannot be read stays content, to the letter; and templates of real families are recognized by their text.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass
from typing import Any

import pytest
import trl_templates

from lorakit.data.shapes import Example
from lorakit.data.templates import ChatOptions, ChatTemplate
from lorakit.data.turns import conversation
from lorakit.errors import DataError
from lorakit.serve.messages import REQUEST
from lorakit.serve.renderer import Renderer
from lorakit.serve.tool_calls.families import PLAIN, SYNTAXES, syntax_of
from lorakit.serve.tool_calls.forced import FORCED
from lorakit.serve.tool_calls.stream import ToolDelta, ToolStream, read_calls
from lorakit.serve.tool_calls.syntax import Syntax

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "where"},
                "days": {"type": "integer", "description": "how many"},
                "zip": {"type": "string", "description": "digits, as text"},
                "at": {"type": "object", "description": "a place", "properties": {"x": {"type": "number"}}},
                "tags": {"type": "array", "description": "texts", "items": {"type": "string"}},
            },
            "required": ["city"],
        },
    },
}
ROME = {"city": "Rome"}
FULL = {"city": 'Rome, "Lazio" {é} €\nIT', "days": 3, "zip": "00042", "at": {"x": 1.5}, "tags": ["a", "b c"]}


@dataclass(frozen=True)
class Sample:
    """Texts of a syntax. one, two: one call, two calls. broken: begins as a call does and is none. after: whether
    content may follow a call. before: whether content may precede it. sign: what a template of the family contains.
    """

    syntax: Syntax
    sign: str
    one: str
    two: str
    broken: tuple[str, ...]
    before: bool = True
    after: bool = True


HERMES_ONE = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
XML_ONE = "<tool_call>\n<function=get_weather>\n<parameter=city>\nRome\n</parameter>\n</function>\n</tool_call>"
GLM_ONE = "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n</tool_call>"
DEEPSEEK_CALL = '<｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Rome"}<｜tool▁call▁end｜>'
DEEPSEEK_OLD = (
    '<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{"city": "Rome"}\n```<｜tool▁call▁end｜>'
)
DEEPSEEK_OLDER = f"<｜tool▁calls▁begin｜>{DEEPSEEK_OLD}<｜tool▁calls▁end｜>"
GEMMA_ONE = '<|tool_call>call:get_weather{city:<|"|>Rome<|"|>}<tool_call|>'
JSON_ONE = '{"name": "get_weather", "arguments": {"city": "Rome"}}'
LLAMA_ONE = '{"name": "get_weather", "parameters": {"city": "Rome"}}'
HARMONY_ONE = (
    "<|channel|>analysis<|message|>They ask.<|end|><|start|>assistant"
    '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Rome"}<|call|>'
)
SAMPLES = [
    Sample(
        next(s for s in SYNTAXES if s.name == "hermes"),
        "return it within <tool_call></tool_call>",
        HERMES_ONE,
        f"{HERMES_ONE}\n{HERMES_ONE}",
        ("<tool_call>\n{'name'}\n</tool_call>", '<tool_call>{"name": 3}</tool_call>', "<tool_call>[]", "a <tool_"),
    ),
    Sample(
        next(s for s in SYNTAXES if s.name == "xml-parameters"),
        "<tool_call>\n<function=f>\n<parameter=p>",
        XML_ONE,
        f"{XML_ONE}\n{XML_ONE}",
        ("<tool_call>\n<function=get_weather>\nRome\n</function>\n</tool_call>", "<tool_call>hm</tool_call>"),
    ),
    Sample(
        next(s for s in SYNTAXES if s.name == "glm"),
        "<tool_call>f\n<arg_key>k</arg_key>\n<arg_value>v</arg_value>",
        GLM_ONE,
        f"{GLM_ONE}\n{GLM_ONE}",
        ("<tool_call>get_weather\n<arg_key>city</tool_call>", "<tool_call></tool_call>"),
    ),
    Sample(
        next(s for s in SYNTAXES if s.name == "mistral"),
        "[TOOL_CALLS]",
        '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Rome"}, "id": "a1b2c3d4e"}]',
        '[TOOL_CALLS]get_weather[ARGS]{"city": "Rome"}[TOOL_CALLS]get_weather[CALL_ID]a1b2c3d4e[ARGS]{"city": "Rome"}',
        ("[TOOL_CALLS][{]", "[TOOL_CALLS]", "[TOOL_CALLS]get_weather{}", "[TOOL_CALLS]f[ARGS]3"),
        after=False,
    ),
    Sample(
        next(s for s in SYNTAXES if s.name == "deepseek"),
        "<｜tool▁calls▁begin｜>",
        f"<｜tool▁calls▁begin｜>{DEEPSEEK_CALL}<｜tool▁calls▁end｜>",
        f"<｜tool▁calls▁begin｜>{DEEPSEEK_OLD}\n{DEEPSEEK_OLD}<｜tool▁calls▁end｜>",
        (
            "<｜tool▁calls▁begin｜>hm<｜tool▁calls▁end｜>",
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>a<｜tool▁calls▁end｜>",
        ),
    ),
    Sample(
        next(s for s in SYNTAXES if s.name == "gemma"),
        "'<|tool_call>call:' + name",
        GEMMA_ONE,
        GEMMA_ONE + GEMMA_ONE,
        ('<|tool_call>call:get_weather{city:<|"|>Rome}<tool_call|>', "<|tool_call>get_weather{}<tool_call|>"),
    ),
    Sample(
        next(s for s in SYNTAXES if s.name == "python-calls"),
        "<|tool_call_start|>",
        '<|tool_call_start|>[get_weather(city="Rome")]<|tool_call_end|>',
        "<|tool_call_start|>[get_weather(city='Rome'), get_weather(city=\"Rome\")]<|tool_call_end|>",
        (
            '<|tool_call_start|>[get_weather("Rome")]<|tool_call_end|>',
            "<|tool_call_start|>[f(x=g())]<|tool_call_end|>",
            "<|tool_call_start|>[f(x=b'1')]<|tool_call_end|>",
            "<|tool_call_start|>[]<|tool_call_end|>",
        ),
    ),
    Sample(
        next(s for s in SYNTAXES if s.name == "harmony"),
        "<|start|>assistant<|channel|>final<|message|>",
        HARMONY_ONE,
        HARMONY_ONE
        + '<|start|>assistant to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Rome"}',
        (),
        before=False,
        after=False,
    ),
    Sample(
        next(s for s in SYNTAXES if s.name == "llama"),
        '{"name": function name, "parameters": ...}; ... \'{"name": "\' + name \'"parameters": \'',
        LLAMA_ONE,
        f"<|python_tag|>{LLAMA_ONE}; {LLAMA_ONE}",
        ('{"name": "Ada", "parameters": {}}', '{"city": "Rome"}', f"{LLAMA_ONE} so", "<|python_tag|>print(1)", " {"),
        before=False,
        after=False,
    ),
    Sample(
        PLAIN,
        "",
        JSON_ONE,
        f"{JSON_ONE}\n{JSON_ONE}",
        ('{"name": "Ada", "arguments": {}}', '{"name"', "{}"),
        before=False,
        after=False,
    ),
    Sample(
        FORCED,
        "",
        f"[{JSON_ONE}]",
        f"[{JSON_ONE}, {JSON_ONE}]",
        ('[{"name": "get_weather", "argum', "[]", "[1]"),
        before=False,
        after=False,
    ),
]
sampled = pytest.mark.parametrize("sample", SAMPLES, ids=[sample.syntax.name for sample in SAMPLES])


def read(text: str, syntax: Syntax, cut: str = "whole", parallel: bool = True) -> ToolDelta:
    """Content and calls of a text that arrives whole, letter by letter, or in pieces of random length."""
    if cut == "whole":
        return read_calls(text, syntax, [TOOL], parallel=parallel)
    draw, at, pieces = random.Random(len(text)), 0, list[str]()
    while at < len(text):
        length = 1 if cut == "letters" else draw.randint(1, 9)
        pieces.append(text[at : at + length])
        at += length
    stream = ToolStream(syntax, [TOOL], parallel=parallel)
    deltas = [*map(stream.feed, pieces), stream.finish()]
    return ToolDelta(
        "".join(d.content for d in deltas),
        tuple(call for d in deltas for call in d.calls),
        "".join(d.reasoning for d in deltas),
    )


def calls_of(delta: ToolDelta) -> list[tuple[str, Any]]:
    return [(call.name, json.loads(call.arguments)) for call in delta.calls]


def test_every_syntax_has_a_sample():
    assert {sample.syntax.name for sample in SAMPLES} == {s.name for s in (*SYNTAXES, PLAIN, FORCED)}


@sampled
@pytest.mark.parametrize("cut", ["whole", "letters", "pieces"])
def test_calls_are_read_back_however_the_text_is_cut(sample, cut):
    once, twice = read(sample.one, sample.syntax, cut), read(sample.two, sample.syntax, cut)
    assert (calls_of(once), once.content) == ([("get_weather", ROME)], "")
    assert (calls_of(twice), twice.content) == ([("get_weather", ROME)] * 2, "")
    assert [call.index for call in twice.calls] == [0, 1]
    assert len({call.id for call in twice.calls}) == 2


@sampled
@pytest.mark.parametrize("cut", ["whole", "letters", "pieces"])
def test_what_is_no_call_stays_content_to_the_letter(sample, cut):
    for text in ("", "Hello.", " { x", "1 < 2 <to [TOO", "line\n\n", *sample.broken):
        if sample.syntax.name == "harmony" and not text.strip():
            continue
        found = read(text, sample.syntax, cut)
        assert (found.content, found.calls) == (text, ()), text


@sampled
@pytest.mark.parametrize("cut", ["whole", "letters", "pieces"])
def test_content_around_calls_is_kept_without_the_space_between(sample, cut):
    text = ("I look.\n\n" if sample.before else "") + sample.one + ("\nDone." if sample.after else "")
    found = read(text, sample.syntax, cut)
    assert calls_of(found) == [("get_weather", ROME)]
    assert found.content == ("I look." if sample.before else "") + ("Done." if sample.after else "")


@sampled
def test_one_call_is_enough_where_calls_may_not_be_parallel(sample):
    stream = ToolStream(sample.syntax, [TOOL], parallel=False)
    deltas = [stream.feed(sample.two), stream.finish()]
    assert [name for d in deltas for name, _ in calls_of(d)] == ["get_weather"]
    assert stream.ended


@sampled
def test_a_template_of_the_family_is_recognized_by_one_syntax(sample):
    if sample.sign:
        assert syntax_of(f"{{{{ {sample.sign} }}}}") is sample.syntax
        assert [s.name for s in SYNTAXES if s.writes(sample.sign)] == [sample.syntax.name]
    else:
        assert sample.syntax not in SYNTAXES


def test_a_template_without_calls_has_no_syntax():
    assert syntax_of("{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}") is None
    assert syntax_of("") is None


FILLS = (
    *(" ", "\n", "a", "'", '"', "\\'", '\\"', "(", "[", "{", "}", ",", "a:", "`", "```", "<", "1.", "; ", "f(a=1),"),
    *("</arg_key><arg_value>", "<arg_key>", "</parameter>", "<parameter=a>", "[ARGS]", "<|channel|>", "</function>"),
)


@sampled
def test_no_text_takes_more_than_linear_time(sample):
    """Calls that go wrong at every third place, by 4,000 characters of something: an answer is read on the event loop,
    so whoever writes a long one must not be able to stop it. A quadratic pattern took up to 26 s for these.
    """
    text = DEEPSEEK_OLDER if sample.syntax.name == "deepseek" else sample.one
    for at in range(3, len(text), 3):
        for fill in FILLS:

            def seconds(length: int, at: int = at, fill: str = fill) -> float:
                began = time.thread_time()
                read(text[:at] + fill * (length // len(fill)) + "x" + text[-24:], sample.syntax)
                return time.thread_time() - began

            taken = seconds(4_000)
            if taken > 0.01:
                assert min(seconds(4_000) for _ in range(3)) < 3 * min(seconds(2_000) for _ in range(3)), (at, fill)


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_arguments_are_json_that_every_client_reads(number):
    """Python's json writes NaN and Infinity, at which JavaScript's throws."""
    for name, text in (
        ("hermes", f'<tool_call>{{"name": "get_weather", "arguments": {{"days": {number}}}}}</tool_call>'),
        ("hermes", f'<tool_call>{{"name": "get_weather", "arguments": "{{\\"days\\": {number}}}"}}</tool_call>'),
        ("mistral", f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {{"days": {number}}}}}]'),
        ("llama", f'{{"name": "get_weather", "parameters": {{"days": {number}}}}}'),
        ("python-calls", f"<|tool_call_start|>[get_weather(days={number})]<|tool_call_end|>"),
        ("python-calls", f"<|tool_call_start|>[get_weather(days=0x{'f' * 5000})]<|tool_call_end|>"),
    ):
        found = read(text, next(s for s in SYNTAXES if s.name == name))
        assert (found.content, found.calls) == (text, ())
    written = GLM_ONE.replace("city", "days").replace("Rome", number)
    assert calls_of(read(written, next(s for s in SYNTAXES if s.name == "glm"))) == [("get_weather", {"days": number})]


def test_channels_of_gpt_oss_are_content_and_reasoning():
    text = (
        "<|channel|>analysis<|message|>Think <b>.<|end|><|start|>assistant<|channel|>commentary<|message|>I see.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>It is 3 < 4.<|return|>"
    )
    for cut in ("whole", "letters", "pieces"):
        found = read(text, next(s for s in SYNTAXES if s.name == "harmony"), cut)
        assert (found.reasoning, found.content, found.calls) == ("Think <b>.", "I see.It is 3 < 4.", ())


def test_values_without_quotes_follow_the_tools_schema():
    """Qwen3-Coder writes 00042 for a text and for a number; only the schema tells which."""
    syntax = next(s for s in SYNTAXES if s.name == "xml-parameters")
    values = {"zip": "00042", "days": "3", "city": "true"}
    body = "".join(f"<parameter={name}>\n{value}\n</parameter>\n" for name, value in values.items())
    found = read(f"<tool_call>\n<function=get_weather>\n{body}</function>\n</tool_call>", syntax)
    assert calls_of(found) == [("get_weather", {"zip": "00042", "days": 3, "city": "true"})]


def test_llamas_built_in_tools_are_calls():
    syntax = next(s for s in SYNTAXES if s.name == "llama")
    found = read('<|python_tag|>brave_search.call(query="Rome", days=3)', syntax)
    assert calls_of(found) == [("brave_search", {"query": "Rome", "days": 3})]


# ------------------------------------------------------------------------------------------ templates of real families

# Templates that write no call, or that TRL's rendering cannot show us: lfm2's writes tools, and no calls.
WITHOUT_TOOLS = {
    *("cohere", "cohere2", "deepseek_r1_distill", "deepseekv3", "gemma", "gemma3", "idefics3", "llama3", "llava_next"),
    *("phi3", "phi3_5", "qwen2_5_vl", "smolvlm"),
}
UNKNOWN = {"lfm2": "writes no calls of assistant turns", "muse_glimmer": "a syntax that is not read yet"}


@pytest.mark.skipif(not trl_templates.FAMILIES, reason="trl is not installed")
@pytest.mark.parametrize("family", trl_templates.FAMILIES)
def test_what_a_familys_template_writes_is_read_back(family):
    """The template is the oracle: a call it renders, as ids that end at the first stop token, gives the call again."""
    tokenizer = trl_templates.tokenizer_of(family)
    renderer = Renderer(tokenizer, trl_templates.ends_of(family))

    async def prompt_of():
        try:
            return await renderer.chat([{"role": "user", "content": "hi"}], tools=[TOOL])
        finally:
            await renderer.close()

    if family in WITHOUT_TOOLS:
        with pytest.raises(DataError, match="does not write tools"):
            asyncio.run(prompt_of())
        return
    prompt = asyncio.run(prompt_of())
    if family in UNKNOWN:
        assert prompt.syntax is None
        pytest.skip(UNKNOWN[family])
    most = 1 if family.startswith(("llama", "gptoss")) else 2  # these templates write one call a turn
    for count in range(1, most + 1):
        ids = _answer_ids(tokenizer, count, prompt.stop_ids)
        text, calls = renderer.answer(prompt), renderer.calls(prompt)
        deltas = [calls.feed(text.feed([token])) for token in ids]
        deltas += [calls.feed(text.finish()), calls.finish()]
        assert [call for d in deltas for call in calls_of(d)] == [("get_weather", FULL)] * count
        content = "".join(d.content for d in deltas)
        assert not content.replace("<think>", "").replace("</think>", "").strip()


def _answer_ids(tokenizer, count: int, stop_ids) -> list[int]:
    """What the template adds to its prompt for calls, up to a stop token."""
    call = {"type": "function", "function": {"name": "get_weather", "arguments": FULL}}
    calls = [{"id": f"call{number:05d}", **call} for number in range(count)]
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "", "tool_calls": calls}]
    messages = conversation(turns, "messages", REQUEST)
    write = ChatTemplate(tokenizer, ChatOptions()).writer(Example("chat", messages, REQUEST, tools=(TOOL,)))
    prompt, full = write(messages[:1], True), write(messages, False)
    same = next((i for i, (a, b) in enumerate(zip(prompt, full)) if a != b), min(len(prompt), len(full)))
    ids = tokenizer.encode(full[same:], add_special_tokens=False)
    return ids[: next((at for at, token in enumerate(ids) if token in stop_ids), len(ids))]
