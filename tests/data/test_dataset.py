"""Building a dataset: the length limit and its counts, the train/held-out split, the fingerprint."""

from __future__ import annotations

import pytest

from lorakit.data.dataset import TEXT_LENGTH, Item, build, fingerprint, split
from lorakit.data.parse import Row
from lorakit.errors import ConfigError, DataError

ROW = Row({}, "data.jsonl", 1)


@pytest.fixture
def pairs(rows):
    """Pairs with a prompt of one token and a completion of `n` tokens each ("0" is one token)."""
    return lambda *counts: rows(*({"prompt": "1", "completion": "0" * n} for n in counts))


def items_of(*prompts, completions=None):
    """Return items with the given prompts, and completions that all differ unless given."""
    completions = completions or range(100, 100 + len(prompts))
    return [Item([prompt, completion, 1], [False, True, True], ROW) for prompt, completion in zip(prompts, completions)]


def test_items_carry_ids_mask_and_row(pairs, plain_tokenizer):
    data = build(pairs(3), plain_tokenizer)
    (item,) = data.items
    assert item.trained == [False, True, True, True, True]
    assert item.prompt == 1
    assert item.row.number == 1
    assert (data.shape, data.style, data.lengths) == ("prompt/completion", "none", [5])


def test_auto_length_is_the_99th_percentile_rounded_up_and_longer_rows_are_dropped(pairs, plain_tokenizer):
    data = build(pairs(*[10] * 198, 11, 11, 300), plain_tokenizer)
    assert data.max_length == 16  # the percentile is 13: prompt, 11, end
    assert "99th percentile of 201 rows is 13" in data.max_length_reason
    assert (len(data.items), data.dropped, data.cut, data.split) == (200, 1, 0, 0)
    assert max(data.lengths) == 302


def test_auto_length_drops_no_row_of_a_small_dataset(pairs, plain_tokenizer):
    data = build(pairs(1, 2, 50), plain_tokenizer)
    assert (len(data.items), data.dropped, data.max_length) == (3, 0, 56)


def test_auto_length_stays_below_the_tokenizers_own_limit(pairs, make_tokenizer):
    data = build(pairs(2, 50), make_tokenizer(model_max_length=20))
    assert (data.max_length, data.dropped) == (20, 1)
    assert "model_max_length" in data.max_length_reason


def test_cutting_keeps_the_start_and_drops_rows_whose_prompt_fills_the_limit(rows, plain_tokenizer):
    data = build(
        rows(
            {"prompt": "1", "completion": "0" * 9},
            {"prompt": "1" * 8, "completion": "0"},
            {"prompt": "1", "completion": "0"},
        ),
        plain_tokenizer,
        max_length=6,
        on_long="cut",
    )
    assert (data.cut, data.dropped, len(data.items)) == (1, 1, 2)
    zero = plain_tokenizer.encode("0")[0]
    assert data.items[0].ids[1:] == [zero] * 5
    assert all(any(item.trained) for item in data.items)


def test_long_text_is_split_into_chunks_that_add_up_to_it(rows, plain_tokenizer):
    data = build(rows({"text": "0" * 50}, {"text": "0"}), plain_tokenizer, max_length=20)
    assert [len(item.ids) for item in data.items] == [20, 20, 11, 2]
    assert [item.row.number for item in data.items] == [1, 1, 1, 2]
    whole = [token for item in data.items[:3] for token in item.ids]
    assert plain_tokenizer.decode(whole) == "0" * 50 + "</s>"
    assert (data.split, data.cut, data.dropped) == (1, 0, 0)


def test_auto_length_of_text_is_capped(rows, plain_tokenizer):
    data = build(rows({"text": "0" * 5000}), plain_tokenizer)
    assert data.max_length == TEXT_LENGTH
    assert sum(len(item.ids) for item in data.items) == 5001


def test_split_is_refused_for_pairs(pairs, plain_tokenizer):
    with pytest.raises(ConfigError, match="plain text"):
        build(pairs(3), plain_tokenizer, on_long="split")


@pytest.mark.parametrize("max_length", [1, 0, -8])
def test_a_max_length_below_two_is_refused(pairs, plain_tokenizer, max_length):
    with pytest.raises(ConfigError, match="max_length"):
        build(pairs(3), plain_tokenizer, max_length=max_length)


def test_if_every_row_is_too_long_the_error_names_the_shortest(pairs, plain_tokenizer):
    with pytest.raises(DataError, match=r"every row is longer than max_length 4 .*shortest has 7"):
        build(pairs(5, 6), plain_tokenizer, max_length=4)


def test_a_row_without_trained_tokens_is_an_error_with_file_and_row(rows, make_tokenizer):
    t = make_tokenizer(template="{% for m in messages if m.role == 'user' %}{{ m.content }}\n{% endfor %}")
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(DataError, match=r"data\.jsonl, row 1: no trained tokens"):
        build(rows(good), t)


def test_repeats_are_counted(rows, plain_tokenizer):
    pair = {"prompt": "the ", "completion": "dog"}
    data = build(
        rows(pair, pair, pair, {"prompt": "the ", "completion": "fox"}, {"prompt": "a ", "completion": "dog"}),
        plain_tokenizer,
    )
    assert data.duplicates == 2
    assert data.same_prompt == 4


def test_empty_prompts_do_not_count_as_the_same_prompt(rows, make_tokenizer):
    data = build(
        rows({"prompt": "", "completion": "dog"}, {"prompt": "", "completion": "fox"}), make_tokenizer(adds_bos=True)
    )
    assert data.same_prompt == 0
    assert [len(side) for side in split(data.items)] == [1, 1]


def test_notes_are_counted(rows, plain_tokenizer):
    data = build(rows({"prompt": "the", "completion": "dog"}, {"prompt": "the ", "completion": "dog"}), plain_tokenizer)
    assert list(data.notes.values()) == [1]


def test_equal_prompts_never_land_on_both_sides_of_the_split():
    items = items_of(*[prompt for prompt in range(40) for _ in range(5)])
    for seed in range(5):
        train, held = split(items, share=0.1, seed=seed)
        assert len(train) + len(held) == 200
        assert len(held) == 20
        assert not {item.ids[0] for item in train} & {item.ids[0] for item in held}


def test_equal_prompts_stay_together_when_everything_is_trained(rows, plain_tokenizer):
    values = [
        {"prompt": f"{word} ", "completion": str(n)} for word in ("the", "quick", "brown", "fox") for n in range(5)
    ]
    data = build(rows(*values), plain_tokenizer, train_on="all")
    train, held = split(data.items, share=0.3)
    assert not {item.row.values["prompt"] for item in train} & {item.row.values["prompt"] for item in held}
    assert held


def test_the_split_depends_on_the_seed_alone_and_keeps_the_order():
    items = items_of(*range(100))
    assert split(items, seed=3) == split(items, seed=3)
    assert split(items, seed=3) != split(items, seed=4)
    train, held = split(items, share=0.2)
    assert len(held) == 20
    for side in (train, held):
        assert [item.ids[0] for item in side] == sorted(item.ids[0] for item in side)


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_each_side_gets_at_least_one_row(share):
    train, held = split(items_of(1, 2), share=share)
    assert (len(train), len(held)) == (1, 1)


def test_if_every_prompt_group_exceeds_the_share_the_smallest_is_held_out():
    train, held = split(items_of(*[1] * 50, *[2] * 40), share=0.05)
    assert (len(train), len(held)) == (50, 40)


@pytest.mark.parametrize("prompts, word", [([], "no rows"), ([1], "only one row"), ([1, 1, 1], "same prompt")])
def test_fewer_than_two_prompts_cannot_be_split(prompts, word):
    with pytest.raises(DataError, match=word):
        split(items_of(*prompts))


@pytest.mark.parametrize("share", [0, 1, -0.1, 5])
def test_a_share_outside_zero_and_one_is_refused(share):
    with pytest.raises(ConfigError, match="share"):
        split(items_of(1, 2), share=share)


def test_the_fingerprint_changes_with_ids_masks_order_and_row_boundaries():
    base = [Item([1, 2], [False, True], ROW), Item([3], [True], ROW)]
    others = [
        [Item([1, 2], [True, True], ROW), Item([3], [True], ROW)],
        [Item([1, 4], [False, True], ROW), Item([3], [True], ROW)],
        base[::-1],
        [Item([1], [False], ROW), Item([2, 3], [True, True], ROW)],
        base[:1],
    ]
    prints = [fingerprint(items) for items in (base, *others)]
    assert len(set(prints)) == len(prints)
    assert fingerprint([Item([1, 2], [False, True], Row({"a": 1}, "other", 9)), base[1]]) == prints[0]
