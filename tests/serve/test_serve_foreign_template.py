"""Chat templates that anybody may have written: they render as transformers renders them, and nothing they do goes on
for long, takes much, or reaches files.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from contextlib import suppress

import pytest
import trl_templates

from lorakit.bases.load import load_tokenizer
from lorakit.errors import DataError
from lorakit.serve.errors import Busy
from lorakit.serve.foreign_template import Bounds, ForeignTemplate, TemplateProcess, UnusableTemplateError

TIGHT = Bounds(seconds=0.3, wall=20.0, memory=96 * 2**20, characters=100_000)
TURNS = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def process():
    process = TemplateProcess(TIGHT)
    yield process
    process.close()


def render(process, source, **variables):
    return process.render(source, {"messages": TURNS, "add_generation_prompt": True, **variables})


# ------------------------------------------------------------------------------------------ as transformers renders

TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "adds <b> & 'c'",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer", "description": "é"}}},
    },
}
CALL = {"id": "call00001", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CONVERSATIONS = [
    TURNS,
    [{"role": "system", "content": "Be <b>."}, *TURNS, {"role": "assistant", "content": "é & ü"}, *TURNS],
    [*TURNS, {"role": "assistant", "content": "x", "reasoning_content": "because"}, *TURNS],
    [
        *TURNS,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "2", "name": "add"},
    ],
]


def outcome(apply, turns, tools):
    try:
        return apply(turns, tools=tools, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates reject conversations with errors of any kind
        return type(error).__name__ if not isinstance(error, DataError) else "DataError"


@pytest.mark.skipif(not trl_templates.FAMILIES, reason="trl is not installed")
@pytest.mark.parametrize("family", trl_templates.FAMILIES)
def test_it_renders_what_transformers_renders(process, family):
    tokenizer = load_tokenizer("embedded")
    tokenizer.chat_template = trl_templates.source_of(family)
    foreign = ForeignTemplate(process, tokenizer.chat_template, tokenizer.special_tokens_map)
    rendered = 0
    for turns in CONVERSATIONS:
        for tools in (None, [TOOL]):
            # transformers gives reasoning its two common names; lorakit's templates do so before they render.
            named = [{"thinking": t["reasoning_content"], **t} if "reasoning_content" in t else t for t in turns]
            ours, theirs = (outcome(apply, named, tools) for apply in (foreign, tokenizer.apply_chat_template))
            if theirs.endswith("Error"):
                assert ours == "DataError"
            else:
                assert ours == theirs
                rendered += 1
    assert rendered


def test_generation_blocks_and_the_clock_are_known(process):
    source = "{% generation %}{{ messages[0].content }}{% endgeneration %}{{ strftime_now('%Y') }}{% break %}"
    with pytest.raises(DataError):
        render(process, source)  # break, outside of a loop
    year = time.strftime("%Y")
    assert render(process, source.removesuffix("{% break %}")) == f"Hello{year}"
    kept = "{% set ns = namespace(self=1) %}{{ ns.self }}{{ dict(a=1) | tojson }}{{ dict.fromkeys(['b']) }}"
    assert render(process, kept) == "1{\"a\": 1}{'b': None}"


# ------------------------------------------------------------------------------------------ bounds


def test_what_is_killed_from_outside_may_be_tried_again():
    """A machine without time or memory left does that to any template: it says nothing of this one."""
    process = TemplateProcess(Bounds(seconds=20.0, wall=0.3))
    loops = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}Hello"
    try:
        for _ in range(2):
            with pytest.raises(Busy, match=r"could not be rendered within 0.3 s"):
                render(process, loops)
        process.bounds = Bounds(seconds=0.2)
        with pytest.raises(UnusableTemplateError, match="processor time"):
            render(process, loops)
        assert render(process, "Hello") == "Hello"
    finally:
        process.close()


HOSTILE = {
    "a power": "{{ 10 ** (10 ** 10) }}",
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a recursive macro": "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "a huge text": "{{ 'a' * (10 ** 11) }}",
    "a text that doubles": (
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
    ),
    "a padded number": "{{ '%99999999999d' | format(1) }}",
    "a centred text": "{{ 'a' | center(10 ** 11) }}",
    "much output": "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
    "nesting": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "a constant power": "{% set x = 9 ** (9 ** 9) %}",
    "a list that grows": "{% set x = range(99999) | list %}{% for i in range(9999) %}{% set x = x + x %}{% endfor %}",
}


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE)
def test_a_template_cannot_take_time_or_memory(process, source):
    start = time.monotonic()
    with suppress(DataError):  # some end by themselves, with an error or a short text
        assert len(render(process, source)) <= TIGHT.characters
    assert time.monotonic() - start < 15  # of 0.3 s processor time, on a busy machine
    assert render(process, "{{ messages[0].content }}") == "Hello"  # the next one is served


def test_a_template_that_exceeded_its_bounds_is_not_run_again(process):
    source = "{% for a in range(99999) %}{% for b in range(99998) %}{% endfor %}{% endfor %}"
    with pytest.raises(DataError, match=r"more than 0\.3 s of processor time"):
        render(process, source)
    start = time.process_time(), time.monotonic()
    with pytest.raises(DataError, match=r"more than 0\.3 s of processor time"):
        render(process, source)
    assert time.monotonic() - start[1] < 0.2


def test_all_renderings_of_a_request_have_a_bound_together():
    process = TemplateProcess(Bounds(seconds=5.0, request_seconds=0.2))
    try:
        slow = ForeignTemplate(process, "{% for a in range(99999) %}{% endfor %}{{ messages[0].content }}", {})

        def render_often() -> None:
            for _ in range(1_000):
                slow(TURNS, tools=None, tokenize=False, add_generation_prompt=True)

        slow.begin()
        with pytest.raises(DataError, match=r"more than 0\.2 s of processor time for this request"):
            render_often()
        slow.begin()  # the next request
        assert slow(TURNS, tools=None, tokenize=False, add_generation_prompt=True) == "Hello"
    finally:
        process.close()


FORBIDDEN = {
    "internals": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ raise_exception.__globals__ }}",
    "a namespace's": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "attributes by filter": "{{ ('' | attr('__class__')) }}",
    "format": "{{ '{0.__class__}'.format('') }}",
    "includes": "{% include '/etc/passwd' %}",
    "imports": "{% import 'os' as os %}{{ os.environ }}",
    "changes": "{{ messages.append(1) }}",
}


@pytest.mark.parametrize("source", FORBIDDEN.values(), ids=FORBIDDEN)
def test_a_template_cannot_leave_the_sandbox(process, source):
    try:
        text = render(process, source)
    except DataError:
        return
    assert "class" not in text
    assert "root:" not in text


def test_the_process_has_no_keys_and_may_write_nothing(monkeypatch):
    """What is left if the sandbox should have a hole."""
    monkeypatch.setenv("LORAKIT_API_KEY", "secret")
    monkeypatch.setenv("HF_TOKEN", "secret")
    process = TemplateProcess(TIGHT)
    try:
        assert render(process, "{{ messages[0].content }}") == "Hello"
        child = process._child.pid
        folder = f"/proc/{child}"
        if not os.path.isdir(folder):
            pytest.skip("no /proc here")
        with open(f"{folder}/environ") as file:
            assert "secret" not in file.read()
        with open(f"{folder}/limits") as file:
            limits = {line[:26].strip(): line[26:].split()[0] for line in file}
        assert limits["Max file size"] == limits["Max processes"] == "0"
        assert limits["Max address space"].isdigit()
    finally:
        process.close()


def test_the_process_is_started_again_when_it_is_gone():
    process = TemplateProcess(TIGHT)
    try:
        assert render(process, "a") == "a"
        process._child.kill()
        process._child.wait()
        assert render(process, "b") == "b"
    finally:
        process.close()
    with pytest.raises(DataError, match="stopping"):
        render(process, "c")
    assert process._child.wait(10) != 0


def test_errors_of_a_template_are_passed_on(process):
    with pytest.raises(DataError, match="System role not supported"):
        render(process, "{{ raise_exception('System role not supported') }}")
    with pytest.raises(DataError, match="has 300,000 characters; at most 262,144"):
        render(process, "a" * 300_000)
    with pytest.raises(DataError, match="it is no Jinja template: line 1: Unexpected end of template"):
        render(process, "{% if x %}")


def test_the_event_loop_goes_on_while_a_template_is_stuck(process):
    """In this process, {{ 10 ** (10 ** 9) }} would hold the interpreter's lock, and with it every stream."""

    async def ticks() -> int:
        count, done = 0, asyncio.Event()

        async def tick() -> None:
            nonlocal count
            while not done.is_set():
                await asyncio.sleep(0.02)
                count += 1

        ticking = asyncio.create_task(tick())
        with pytest.raises(DataError):
            await asyncio.to_thread(render, process, "{{ 10 ** (10 ** 9) }}")
        done.set()
        await ticking
        return count

    assert asyncio.run(ticks()) >= 5


def test_variables_and_text_of_any_letters_survive(process):
    values = {"deep": [{"é": "日本 \u2028 \x00"}], "n": 1.5, "none": None, "yes": True}
    source = "{{ values | tojson }}"
    assert json.loads(render(process, source, values=values)) == values
