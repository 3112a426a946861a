"""Long conversations' prompts from windows of a few turns: the same pieces as all prefixes give, or none."""

from __future__ import annotations

import pytest
import trl_templates

from lorakit.data.parse import Row
from lorakit.data.render import Renderer
from lorakit.data.shapes import Example
from lorakit.data.templates import ChatOptions, ChatTemplate
from lorakit.data.turn_windows import MIN_ANSWERS, windowed
from lorakit.data.turns import Message, conversation
from lorakit.errors import DataError

ROW = Row({}, "data.jsonl", 1)
TOOL = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}}}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Each breaks what windows suppose.
GLOBAL = {
    "numbers turns": CHATML.replace("{{ m.role }}", "{{ m.role }} {{ loop.index }}"),
    "counts turns first": "{{ messages | length }}" + CHATML,
    "repeats the first turn": CHATML.replace("{{ m.content }}", "{{ m.content }} ({{ messages[0].content }})"),
    "rewrites earlier turns": CHATML.replace("{{ m.content }}", "{{ m.content if loop.last else 'said' }}"),
    "rewrites earlier answers": CHATML.replace(
        "{{ m.content }}", "{{ m.content if loop.last or m.role != 'assistant' else 'said' }}"
    ),
}


def talk(answers: int, calls: bool = False, system: bool = True) -> list[dict]:
    turns: list[dict] = [{"role": "system", "content": "Be brief."}] if system else []
    for number in range(answers):
        turns.append({"role": "user", "content": f" question {number}\n"})
        if calls and number % 3 == 1:
            call = {
                "id": f"call{number:05d}",
                "type": "function",
                "function": {"name": "add", "arguments": {"a": number}},
            }
            turns.append({"role": "assistant", "content": "", "tool_calls": [call]})
            turns.append({"role": "tool", "tool_call_id": call["id"], "name": "add", "content": f"result {number}"})
        turns.append({"role": "assistant", "content": f"answer {number}"})
    return [*turns, {"role": "user", "content": "and now?"}]


def example_of(turns, tools=()) -> Example:
    return Example("chat", (*conversation(turns, "messages", ROW), Message("assistant", "", True)), ROW, tools=tools)


def by_prefixes(write, messages, answered, prompt):
    """The pieces as every prefix puts them; None where one does not go on from the one before."""
    pieces, at = [], 0
    for index in answered:
        context, answer = write(messages[:index], True), write(messages[: index + 1], False)
        if not (prompt.startswith(answer) and answer.startswith(context)):
            return None
        pieces.append((context[at:], answer[len(context) :]))
        at = len(answer)
    return pieces


def both(source_or_family, turns, tools=()):
    """Pieces by windows and by prefixes."""
    if source_or_family in trl_templates.FAMILIES:
        tokenizer = trl_templates.tokenizer_of(source_or_family)
    else:
        from lorakit.bases.load import load_tokenizer

        tokenizer = load_tokenizer("embedded")
        tokenizer.chat_template = source_or_family
    example = example_of(turns, tools)
    write, messages = ChatTemplate(tokenizer, ChatOptions()).writer(example), example.messages[:-1]
    answered = [index for index, message in enumerate(messages) if message.role == "assistant"]
    prompt = write(messages, True)
    return windowed(messages, answered, write, prompt), by_prefixes(write, messages, answered, prompt)


@pytest.mark.skipif(not trl_templates.FAMILIES, reason="trl is not installed")
@pytest.mark.parametrize("family", trl_templates.FAMILIES)
def test_windows_give_what_prefixes_give(family):
    tried = 0
    for calls in (False, True):
        for system in (False, True):
            tools = (TOOL,) if calls else ()
            try:
                found, expected = both(family, talk(12, calls, system), tools)
            except DataError:
                continue  # a family without calls or system turns
            tried += 1
            assert found == expected  # None for both, where a family rewrites earlier turns
    assert tried


@pytest.mark.parametrize("source", GLOBAL.values(), ids=GLOBAL)
def test_a_template_that_looks_further_back_is_left_to_prefixes(source):
    found, expected = both(source, talk(12))
    assert found is None or found == expected


@pytest.mark.parametrize("source", [CHATML, *GLOBAL.values()], ids=["appends", *GLOBAL])
def test_long_prompts_have_the_ids_that_prefixes_give(source):
    """`Renderer.prompt` of a conversation just below and above the length from which windows are used."""
    from lorakit.bases.load import load_tokenizer

    tokenizer = load_tokenizer("embedded")
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = source
    for answers in (MIN_ANSWERS - 1, MIN_ANSWERS, MIN_ANSWERS + 4):
        example = example_of(talk(answers))
        messages = example.messages[:-1]
        write = ChatTemplate(tokenizer, ChatOptions()).writer(example)
        prompt = write(messages, True)
        answered = [index for index, message in enumerate(messages) if message.role == "assistant"]
        pieces = by_prefixes(write, messages, answered, prompt) or []
        texts = [text for pair in pieces for text in pair]
        texts.append(prompt[len("".join(texts)) :])
        expected = [
            token for text in texts for token in tokenizer.encode(text, add_special_tokens=False, verbose=False)
        ]
        assert Renderer(tokenizer, "chat").prompt(example) == expected
