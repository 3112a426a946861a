"""Chat templates of real model families, as TRL ships them (33 with a variant for training): what is rendered is what
`apply_chat_template` writes, and what is trained is what TRL's variants mark.
"""

from __future__ import annotations

import importlib.util
import re
from copy import copy
from functools import cache
from pathlib import Path

import pytest

from lorakit.bases.load import load_tokenizer
from lorakit.data.parse import Row
from lorakit.data.render import OTHER_START, Renderer
from lorakit.data.shapes import read_examples
from lorakit.errors import DataError

TRL = importlib.util.find_spec("trl")  # found, not imported: its templates are all that is needed
FOLDER = Path(TRL.origin).parent / "chat_templates" if TRL and TRL.origin else Path("trl is not installed")
FAMILIES = sorted(p.stem for p in FOLDER.glob("*.jinja") if not p.stem.endswith("_training"))
if not FAMILIES:
    pytest.skip("trl is not installed", allow_module_level=True)
TRAINING = [name for name in FAMILIES if (FOLDER / f"{name}_training.jinja").exists()]

MARKS = re.compile(
    r"<[|｜][^<>]{1,30}?[|｜]>|<\|\w+>|<\w+\|>|</?think>|<(?:start|end)_of_\w+>|\[gMASK\]|<sop>|\[/?INST\]|</s>"
)
# What ends generation by the models' own generation_config.json, where that is more than the tokenizer's end token.
ENDS = {
    "glm4moe": ("<|user|>", "<|observation|>"),
    "gptoss": ("<|return|>", "<|call|>"),
    "phi3": ("<|end|>",),
    "phi3_5": ("<|end|>",),
}
TALK = [
    {"role": "user", "content": "hello 1"},
    {"role": "assistant", "content": "world 2"},
    {"role": "user", "content": "again 3"},
    {"role": "assistant", "content": "dog 4"},
]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "adds",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "description": "one"}},
            "required": ["a"],
        },
    },
}
REFUSE_CALLS = {
    *(
        "cohere",
        "cohere2",
        "deepseek_r1_distill",
        "gemma",
        "gemma3",
        "idefics3",
        "lfm2",
        "llama3",
        "llava_next",
        "phi3",
    ),
    *("phi3_5", "qwen2_5_vl", "smolvlm"),
}
KNOW_REASONING = [
    name
    for name in FAMILIES
    if re.search(
        r"\.(reasoning_content|thinking|reasoning)\b|\[.reasoning.\]|get\(.reasoning",
        (FOLDER / f"{name}.jinja").read_text(),
    )
    and not re.fullmatch(r"gemma4(_v[234])?", name)  # read only where tools are called
]


@cache
def tokenizer_of(name: str):
    """The embedded tokenizer with a family's template, and its markers as special tokens."""
    source = (FOLDER / f"{name}.jinja").read_text()
    tokenizer = load_tokenizer("embedded")
    tokenizer.add_tokens(sorted(set(MARKS.findall(source))), special_tokens=True)
    tokenizer.model_max_length = 10**30
    tokenizer.chat_template = source
    return tokenizer


def rendered(name, messages, turns="all", **columns):
    """The rows of a conversation, and the renderer."""
    tokenizer = tokenizer_of(name)
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ENDS.get(name, ())]
    renderer = Renderer(tokenizer, ends=ends, turns=turns)
    _, (example,) = read_examples([Row({"messages": messages} | columns, "data.jsonl", 1)])
    return renderer.rows(example), renderer, example


def trained_parts(row, tokenizer) -> list[str]:
    """The text of each stretch of trained tokens."""
    parts, last = [], False
    for token, trained in zip(row.ids, row.trained, strict=True):
        if trained:
            parts = [*parts, []] if not last else parts
            parts[-1].append(token)
        last = trained
    return [tokenizer.decode(part) for part in parts]


def in_parts(messages):
    return [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]


def oracle(name, messages, **options) -> str:
    """What transformers writes: with contents as text, or as parts for families that read nothing else."""
    messages = in_parts(messages) if name in ("idefics3", "llava_next", "smolvlm") else messages
    return tokenizer_of(name).apply_chat_template(messages, tokenize=False, **options)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_answer_is_trained_with_its_end_after_what_generation_would_see(name):
    tokenizer = tokenizer_of(name)
    rows, renderer, _ = rendered(name, TALK)
    parts = [part for row in rows for part in trained_parts(row, tokenizer)]
    assert len(parts) == 2
    for part, word in zip(parts, ("world 2", "dog 4"), strict=True):
        assert word in part
        last = tokenizer.encode(part, add_special_tokens=False)[-1]
        assert last in {tokenizer.eos_token_id, *renderer._own_ends, *renderer.written_ends()}
        assert not tokenizer.decode(last).isspace()
    # Each row is the text of the turns up to its last answer; GLM leaves its end to the next turn.
    for row, count in zip(rows, (2, 4) if len(rows) == 2 else (4,), strict=True):
        text = tokenizer.decode(row.ids)
        written = oracle(name, TALK[:count])
        assert text == written or (name == "glm4moe" and text == written + "<|user|>")
        if OTHER_START not in row.notes:
            start = oracle(name, TALK[: 1 if count == 2 or len(rows) == 1 else 3], add_generation_prompt=True)
            assert row.ids[: row.prompt] == tokenizer.encode(start, add_special_tokens=False)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_prompt_of_an_example_is_the_generation_prompt(name):
    _, renderer, example = rendered(name, TALK)
    assert tokenizer_of(name).decode(renderer.prompt(example)) == oracle(name, TALK[:3], add_generation_prompt=True)


@pytest.mark.parametrize("name", TRAINING)
def test_the_trained_tokens_are_those_of_trls_training_template(name):
    tokenizer = tokenizer_of(name)
    other = copy(tokenizer)
    other.chat_template = (FOLDER / f"{name}_training.jinja").read_text()
    messages = in_parts(TALK[:2]) if name in ("idefics3", "llava_next", "smolvlm") else TALK[:2]
    theirs = other.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    marked = other.decode([i for i, m in zip(theirs["input_ids"], theirs["assistant_masks"], strict=True) if m])
    (row,), _, _ = rendered(name, TALK[:2])
    (ours,) = trained_parts(row, tokenizer)
    if name == "phi3" or name == "phi3_5":
        marked = marked.removesuffix("\n<|endoftext|>")  # generation has ended at <|end|>
    # Some of theirs also mark the header that the generation prompt ends with, or the line end after the end token.
    header, found, rest = marked.partition(ours.rstrip("\n"))
    assert found
    assert not rest.strip()
    assert header in "".join(tokenizer.decode(row.ids[: row.prompt]))


@pytest.mark.parametrize("name", KNOW_REASONING)
@pytest.mark.parametrize("key", ["reasoning_content", "thinking"])
def test_reasoning_is_trained_as_the_template_writes_it(name, key):
    talk = [m | {key: f"because {i}"} if m["role"] == "assistant" else m for i, m in enumerate(TALK)]
    # transformers before 5.24 knows only the name that the template reads
    both = [m | {"reasoning_content": m[key], "thinking": m[key]} if key in m else m for m in talk]
    rows, _, _ = rendered(name, talk)
    parts = [part for row in rows for part in trained_parts(row, tokenizer_of(name))]
    assert len(parts) == 2
    for part, word, reason in zip(parts, ("world 2", "dog 4"), ("because 1", "because 3"), strict=True):
        assert reason in part
        assert word in part
    for row, count in zip(rows, (2, 4) if len(rows) == 2 else (4,), strict=True):
        written = oracle(name, both[:count])
        assert tokenizer_of(name).decode(row.ids) in (written, written + "<|user|>")
    assert not [note for note in rows[0].notes if key in note]


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in KNOW_REASONING and "gemma4" not in name])
def test_reasoning_that_a_template_does_not_show_is_a_note_that_names_it(name):
    talk = [m | {"reasoning_content": "because"} if m["role"] == "assistant" else m for m in TALK]
    rows, _, _ = rendered(name, talk)
    assert "the chat template does not show 'reasoning_content' of assistant turns" in rows[0].notes


def calling(arguments, content="hm"):
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    turn = {"role": "assistant", "tool_calls": [call]} | ({} if content == "left out" else {"content": content})
    return [TALK[0], turn, {"role": "tool", "content": "3"}, TALK[3]]


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in REFUSE_CALLS])
def test_a_call_is_trained_with_arguments_as_object_or_text_and_any_empty_content(name):
    tokenizer = tokenizer_of(name)
    first = rendered(name, calling({"a": 17}, None), tools=[TOOL])[0]
    parts = [part for row in first for part in trained_parts(row, tokenizer)]
    assert len(parts) == 2
    assert "add" in parts[0]
    assert "17" in parts[0]
    assert '\\"' not in parts[0]
    assert "dog 4" in parts[1]
    for arguments, content in (('{"a": 17}', None), ('{"a":17}', ""), ({"a": 17}, ""), ({"a": 17}, "left out")):
        if name == "deepseekv3" and arguments == '{"a":17}':
            continue  # it writes the text as it is
        again = rendered(name, calling(arguments, content), tools=[TOOL])[0]
        assert [row.ids for row in again] == [row.ids for row in first]
    given = '{"a": 17}' if name == "deepseekv3" else {"a": 17}
    full = tokenizer.decode(first[-1].ids)
    written = oracle(name, calling(given, ""), tools=[TOOL])
    assert full in (written, written + "<|user|>")


@pytest.mark.parametrize("name", sorted(REFUSE_CALLS & set(FAMILIES)))
@pytest.mark.parametrize("content", ["hm", None])
def test_a_call_that_a_template_does_not_show_is_an_error(name, content):
    with pytest.raises(DataError, match=r"row 1: .*(tool_calls|rejects)"):
        rendered(name, calling({"a": 17}, content), tools=[TOOL])


@pytest.mark.parametrize("name", [n for n in FAMILIES if n.startswith(("deepseek_r1", "deepseekv3"))])
def test_reasoning_in_the_content_follows_a_prompt_that_opens_it(name):
    tokenizer = tokenizer_of(name)
    content = "<think>\ntwo and two\n</think>\n\nFour."
    rows, renderer, example = rendered(name, [TALK[0], {"role": "assistant", "content": content}])
    assert trained_parts(rows[0], tokenizer) == ["two and two\n</think>\n\nFour.<｜end▁of▁sentence｜>"]
    assert rows[0].ids[: rows[0].prompt] == renderer.prompt(example)
    assert not rows[0].notes
