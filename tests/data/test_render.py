"""Token ids and loss mask: what is trained, where it ends, and that generation starts from a prefix of it."""

from __future__ import annotations

import pytest

from lorakit.data.render import (
    EACH_ANSWER,
    LAST_TURN_ONLY,
    NO_SPACE_BETWEEN,
    OTHER_START,
    Renderer,
    render,
    render_prompt,
)
from lorakit.data.shapes import Message, read_examples
from lorakit.errors import ConfigError, DataError


def one(rows, **values):
    return read_examples(rows(values))[1][0]


def chat(rows, *contents, system=None):
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents)]
    return one(rows, messages=[{"role": "system", "content": system}, *messages] if system else messages)


def spans(rendered, tokenizer):
    """Return (text, trained) of each run of equal mask."""
    runs = []
    for token, trained in zip(rendered.ids, rendered.trained, strict=True):
        if not runs or runs[-1][1] != trained:
            runs.append(([], trained))
        runs[-1][0].append(token)
    return [(tokenizer.decode(ids), trained) for ids, trained in runs]


def test_a_pair_is_prompt_completion_and_end_with_the_last_two_trained(rows, plain_tokenizer):
    t = plain_tokenizer
    rendered = render(one(rows, prompt="the quick ", completion="brown fox"), t)
    assert rendered.ids == [*t.encode("the quick "), *t.encode("brown fox"), t.eos_token_id]
    assert spans(rendered, t) == [("the quick ", False), ("brown fox</s>", True)]
    assert rendered.prompt == len(t.encode("the quick "))
    assert rendered.notes == ()


def test_a_pair_without_a_space_between_is_concatenated_as_given_and_noted(rows, plain_tokenizer):
    rendered = render(one(rows, prompt="the quick", completion="brown"), plain_tokenizer)
    assert plain_tokenizer.decode(rendered.ids) == "the quickbrown</s>"
    assert rendered.notes == (NO_SPACE_BETWEEN,)


def test_every_token_of_a_text_is_trained_and_its_end(rows, plain_tokenizer):
    rendered = render(one(rows, text="hello world"), plain_tokenizer)
    assert spans(rendered, plain_tokenizer) == [("hello world</s>", True)]
    assert rendered.prompt == 0


@pytest.mark.parametrize(
    "values", [{"prompt": "the ", "completion": "dog"}, {"prompt": "", "completion": "dog"}, {"text": "the dog"}]
)
@pytest.mark.parametrize("adds_bos", [True, False])
def test_bos_is_added_only_by_tokenizers_that_add_one_and_is_never_trained(rows, make_tokenizer, adds_bos, values):
    t = make_tokenizer(adds_bos=adds_bos)
    rendered = render(one(rows, **values), t)
    assert rendered.ids.count(t.bos_token_id) == int(adds_bos)
    assert (rendered.ids[0] == t.bos_token_id) == adds_bos
    assert not (adds_bos and rendered.trained[0])


def test_bos_and_end_already_in_the_text_are_not_added_again(rows, make_tokenizer):
    t = make_tokenizer(adds_bos=True)
    rendered = render(one(rows, text="<s>hello</s>"), t)
    assert t.decode(rendered.ids) == "<s>hello</s>"
    assert rendered.trained[-1]


def test_chatml_trains_each_assistant_turn_with_its_end_marker_and_nothing_else(rows, chatml_tokenizer):
    t = chatml_tokenizer
    example = chat(rows, "hello", "world", "again", "dog", system="the system")
    rendered = render(example, t)
    assert spans(rendered, t) == [
        ("<|im_start|>system\nthe system<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n", False),
        ("world<|im_end|>", True),
        ("\n<|im_start|>user\nagain<|im_end|>\n<|im_start|>assistant\n", False),
        ("dog<|im_end|>", True),
        ("\n", False),
    ]
    messages = [{"role": m.role, "content": m.content} for m in example.messages]
    assert t.decode(rendered.ids) == t.apply_chat_template(messages, tokenize=False)


def test_the_end_token_that_the_template_writes_is_trained_where_the_tokenizer_names_another(
    rows, make_tokenizer, templates
):
    t = make_tokenizer(template=templates["chatml"], end="<|endoftext|>")
    renderer = Renderer(t)
    (rendered,) = renderer.rows(chat(rows, "hello", "world", "again", "dog"))
    assert [text for text, trained in spans(rendered, t) if trained] == ["world<|im_end|>", "dog<|im_end|>"]
    assert t.eos_token_id not in rendered.ids
    assert renderer.written_ends() == [t.convert_tokens_to_ids("<|im_end|>")]


def test_an_end_token_the_template_does_not_write_is_added_once_after_the_last_answer(rows, make_tokenizer, templates):
    t = make_tokenizer(template=templates["chatml"].replace("<|im_end|>", ""), end="<|endoftext|>")
    rendered = render(chat(rows, "hello", "world", "again", "dog"), t)
    assert rendered.ids.count(t.eos_token_id) == 1
    assert rendered.trained[-1]
    assert spans(rendered, t)[-1] == ("dog\n<|endoftext|>", True)


def test_an_answer_is_trained_past_an_end_token_it_quotes(rows, chatml_tokenizer):
    rendered = render(chat(rows, "hello", "it is <|im_end|> dog"), chatml_tokenizer)
    assert spans(rendered, chatml_tokenizer)[1] == ("it is <|im_end|> dog<|im_end|>", True)


def test_a_template_with_bos_gets_no_second_one_from_the_tokenizer(rows, make_tokenizer, templates):
    t = make_tokenizer(adds_bos=True, template=templates["llama2"])
    rendered = render(chat(rows, "hello", "world"), t)
    assert spans(rendered, t) == [("<s>[INST] hello [/INST]", False), (" world </s>", True)]


def test_the_error_quotes_a_template_that_rejects_the_system_role(rows, make_tokenizer, templates):
    t = make_tokenizer(template=templates["llama2"])
    with pytest.raises(DataError, match=r"row 1: .*turns: system, user.*System role not supported"):
        render(chat(rows, "hello", "world", system="the system"), t)


def test_a_template_that_strips_earlier_reasoning_gives_each_answer_a_row(rows, make_tokenizer, templates):
    t = make_tokenizer(template=templates["strips"], end="<|im_end|>")
    thinking = chat(rows, "hello", "<think>1 2</think>world", "again", "<think>3 4</think>dog")
    first, second = Renderer(t).rows(thinking)
    assert first.notes == second.notes == (EACH_ANSWER,)
    assert [text for text, trained in spans(first, t) if trained] == ["<think>1 2</think>world<|im_end|>"]
    assert [text for text, trained in spans(second, t) if trained] == ["<think>3 4</think>dog<|im_end|>"]
    assert "1 2" not in t.decode(second.ids)
    assert first.opening == second.opening == tuple(first.ids[: first.prompt])
    # Without reasoning the same template is stable, and every turn is trained.
    (plain,) = Renderer(t).rows(chat(rows, "hello", "world", "again", "dog"))
    assert plain.notes == ()
    assert [text for text, trained in spans(plain, t) if trained] == ["world<|im_end|>", "dog<|im_end|>"]


def test_the_last_turn_alone_is_trained_when_asked_for_and_said_so(rows, make_tokenizer, templates):
    t = make_tokenizer(template=templates["strips"], end="<|im_end|>")
    (rendered,) = Renderer(t, turns="last").rows(chat(rows, "hello", "<think>1 2</think>world", "again", "dog"))
    assert rendered.notes == (LAST_TURN_ONLY,)
    assert [text for text, trained in spans(rendered, t) if trained] == ["dog<|im_end|>"]


def test_a_turn_that_does_not_start_with_the_generation_prompt_is_trained_from_where_they_part(
    rows, make_tokenizer, templates
):
    t = make_tokenizer(template=templates["opens"], end="<|im_end|>")
    example = chat(rows, "hello", "world")
    rendered = render(example, t)
    assert rendered.notes == (OTHER_START,)
    assert spans(rendered, t)[1] == ("world<|im_end|>", True)
    assert t.decode(render_prompt(example, t)).endswith("<|im_start|>assistant\n<think>\n")


def test_a_template_that_rewrites_the_question_when_it_is_answered_is_an_error(rows, make_tokenizer):
    template = (
        "{% for m in messages %}{{ m.role if messages[-1].role == 'user' else '#' }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(DataError, match=r"row 1: .*generation prompt"):
        render(chat(rows, "hello", "world"), make_tokenizer(template=template))


def test_without_a_chat_template_the_plain_one_ends_each_answer(rows, make_tokenizer):
    t = make_tokenizer(adds_bos=True)
    rendered = render(chat(rows, "hello", "world", "again", "dog", system="the system"), t)
    assert spans(rendered, t) == [
        ("<s>the system\n\n### Instruction:\nhello\n\n### Response:\n", False),
        ("world</s>", True),
        ("\n\n### Instruction:\nagain\n\n### Response:\n", False),
        ("dog</s>", True),
    ]


def test_the_plain_template_can_replace_a_chat_template(rows, chatml_tokenizer):
    rendered = render(chat(rows, "hello", "world"), chatml_tokenizer, template="plain")
    assert chatml_tokenizer.decode(rendered.ids) == "### Instruction:\nhello\n\n### Response:\nworld<|im_end|>"


def test_a_pair_becomes_a_chat_only_when_asked(rows, chatml_tokenizer):
    pair = one(rows, prompt="hello", completion=" world")
    assert chatml_tokenizer.decode(render(pair, chatml_tokenizer).ids) == "hello world<|im_end|>"
    assert (
        render(pair, chatml_tokenizer, template="chat").ids
        == render(chat(rows, "hello", " world"), chatml_tokenizer).ids
    )


def test_a_chat_asked_for_without_a_template_or_turns_is_an_error(rows, plain_tokenizer, chatml_tokenizer):
    with pytest.raises(ConfigError, match="no chat template"):
        render(chat(rows, "hello", "world"), plain_tokenizer, template="chat")
    with pytest.raises(ConfigError, match="plain text"):
        render(one(rows, text="hello"), chatml_tokenizer, template="chat")


def test_tools_reach_the_template(rows, make_tokenizer, templates):
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]
    example = one(rows, messages=messages, tools=[{"name": "add"}])
    t = make_tokenizer(template="{% for tool in tools or [] %}{{ tool.name }}!{% endfor %}" + templates["chatml"])
    assert t.decode(render(example, t).ids).startswith("add!<|im_start|>")
    assert '{"name": "add"}' in t.decode(render(example, t, template="plain").ids)


def test_train_on_all_trains_everything_but_bos(rows, make_tokenizer):
    t = make_tokenizer(adds_bos=True)
    pair = one(rows, prompt="the ", completion="dog")
    everything, answer = render(pair, t, train_on="all"), render(pair, t)
    assert everything.ids == answer.ids
    assert everything.trained == [False] + [True] * (len(answer.ids) - 1)
    assert everything.prompt == answer.prompt


def test_a_tokenizer_without_an_end_token_is_an_error(rows, make_tokenizer):
    with pytest.raises(DataError, match="no end"):
        render(one(rows, text="hello"), make_tokenizer(end=None))


def test_later_segments_do_not_get_sentencepieces_leading_space(rows, metaspace_tokenizer):
    t = metaspace_tokenizer
    rendered = render(one(rows, prompt="A: ", completion="dog"), t)
    assert t.convert_ids_to_tokens(rendered.ids) == ["▁", "A", ":", "▁", "d", "o", "g", "</s>"]
    assert spans(render(chat(rows, "A", "dog"), t), t)[1] == ("dog</s>", True)


@pytest.mark.parametrize("template", ["chatml", "llama2", "strips", None])
@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize(
    "contents",
    [("hello", "world"), ("hello", "<think>1</think> world", "again", "<think>2</think> dog"), ("hello\n", "\nworld")],
)
def test_the_generation_prompt_is_the_untrained_prefix_of_the_trained_ids(
    rows, make_tokenizer, templates, template, adds_bos, contents
):
    t = make_tokenizer(adds_bos=adds_bos, template=templates.get(template))
    example = chat(rows, *contents)
    rendered, prompt = render(example, t), render_prompt(example, t)
    assert rendered.ids[: len(prompt)] == prompt
    assert not rendered.trained[len(prompt) - 1]
    assert rendered.trained[len(prompt)]
    assert (
        prompt
        == render_prompt(example.messages, t)
        == render_prompt([{"role": m.role, "content": m.content} for m in example.messages[:-1]], t)
    )


@pytest.mark.parametrize(
    "values", [{"prompt": "the quick", "completion": " fox"}, {"prompt": "", "completion": "fox"}, {"text": "fox"}]
)
@pytest.mark.parametrize("adds_bos", [True, False])
def test_the_prompt_of_pairs_and_texts_is_the_untrained_prefix_too(rows, make_tokenizer, adds_bos, values):
    t = make_tokenizer(adds_bos=adds_bos)
    example = one(rows, **values)
    rendered, prompt = render(example, t), render_prompt(example, t)
    assert rendered.ids[: len(prompt)] == prompt
    assert all(rendered.trained[len(prompt) :])
    assert not any(rendered.trained[: len(prompt)])


def test_a_conversation_waiting_for_its_answer_keeps_every_turn(chatml_tokenizer):
    messages = [Message("user", "hello", False), Message("assistant", "world", True), Message("user", "again", False)]
    text = chatml_tokenizer.decode(render_prompt(messages, chatml_tokenizer))
    assert text.endswith("world<|im_end|>\n<|im_start|>user\nagain<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    "messages", [[], [{"role": "assistant", "content": "hello"}], [{"role": "wizard", "content": "hello"}]]
)
def test_nothing_to_answer_is_an_error(chatml_tokenizer, messages):
    with pytest.raises(DataError, match="messages"):
        render_prompt(messages, chatml_tokenizer)
