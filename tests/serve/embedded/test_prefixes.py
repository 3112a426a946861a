"""Keys and values of prompts that were computed before: what is found, shared and dropped, and the bytes it takes."""

from __future__ import annotations

import random

import pytest
import torch

from lorakit.serve.embedded import prefixes as prefixes_module
from lorakit.serve.embedded.prefixes import LEAST, Prefixes
from lorakit.serve.engine import BASE

SQL, CHAT, MIX = (("sql", 1.0),), (("chat", 1.0),), (("sql", 0.7), ("chat", 0.3))
PER_TOKEN = 2 * 2 * 3 * 4 * 4 + 36  # layers, keys and values, heads, head_dim, bytes of a float32; the id


def computed(ids, choice=BASE):
    """Keys and values that say of which token, layer and choice they are; as causal attention gives them, every
    position depends on all before it.
    """
    seed = float(hash(choice) % 1000)
    so_far = torch.tensor([[float(token)] for token in ids]).cumsum(0)  # [positions, 1]
    one = (so_far + torch.arange(4.0)).expand(3, len(ids), 4) + seed  # [heads, positions, head_dim]
    return [(one + layer, -one - layer) for layer in range(2)]


def check(prefixes, choice, ids, expected):
    """`expected` tokens are found, with the right keys and values; None: nothing is found."""
    found = prefixes.find(choice, ids)
    if expected is None:
        assert found is None
        return
    assert found is not None
    assert found.length == expected
    for (keys, values), (right_keys, right_values) in zip(
        found.keys_values, computed(ids[:expected], choice), strict=True
    ):
        torch.testing.assert_close(keys, right_keys, atol=0, rtol=0)
        torch.testing.assert_close(values, right_values, atol=0, rtol=0)


def keep(prefixes, choice, ids):
    prefixes.keep(choice, ids, computed(ids, choice))


@pytest.fixture
def prefixes():
    return Prefixes(1 << 20)


def run(start, length):
    return tuple(range(start, start + length))


def test_the_longest_known_start_is_found_and_never_the_entire_prompt(prefixes):
    ids = run(0, 40)
    keep(prefixes, BASE, ids)
    check(prefixes, BASE, ids, 39)  # the last token is computed, for its logits
    check(prefixes, BASE, (*ids, 7, 8), 40)
    check(prefixes, BASE, (*ids[:25], 999, 998), 25)
    check(prefixes, BASE, ids[:30], 29)
    check(prefixes, BASE, (5, *ids), None)


def test_short_starts_are_neither_found_nor_kept(prefixes):
    keep(prefixes, BASE, run(0, LEAST - 1))
    assert prefixes.bytes == 0
    keep(prefixes, BASE, run(0, 40))
    check(prefixes, BASE, (*run(0, LEAST - 1), 999, 998), None)
    check(prefixes, BASE, (*run(0, LEAST), 999, 998), LEAST)
    check(prefixes, BASE, run(0, LEAST), None)


def test_nothing_crosses_from_one_choice_to_another(prefixes):
    ids = run(0, 30)
    keep(prefixes, SQL, ids)
    for other in (BASE, CHAT, MIX, (("sql", 0.5),)):
        check(prefixes, other, ids, None)
    for choice in (BASE, CHAT, MIX):
        keep(prefixes, choice, ids)
    for choice in (SQL, BASE, CHAT, MIX):
        check(prefixes, choice, ids, 29)


def test_prompts_with_the_same_start_share_its_memory(prefixes):
    start = run(0, 100)
    for number in range(5):
        keep(prefixes, BASE, (*start, *run(1000 * (number + 1), 20)))
    assert prefixes.bytes == (100 + 5 * 20) * PER_TOKEN
    for number in range(5):
        check(prefixes, BASE, (*start, *run(1000 * (number + 1), 20), 1), 120)
    check(prefixes, BASE, (*start, 1, 2), 100)


def test_a_longer_turn_of_a_chat_adds_only_what_is_new(prefixes):
    keep(prefixes, BASE, run(0, 50))
    keep(prefixes, BASE, run(0, 50))
    keep(prefixes, BASE, run(0, 50 + LEAST - 1))  # too little new to be worth a copy
    assert prefixes.bytes == 50 * PER_TOKEN
    keep(prefixes, BASE, run(0, 90))
    assert prefixes.bytes == 90 * PER_TOKEN
    check(prefixes, BASE, run(0, 100), 90)


def test_what_is_kept_is_a_copy(prefixes):
    ids = run(0, 30)
    buffer = [(torch.zeros(3, 64, 4), torch.zeros(3, 64, 4)) for _ in range(2)]
    for (keys, values), (new_keys, new_values) in zip(buffer, computed(ids), strict=True):
        keys[:, :30], values[:, :30] = new_keys, new_values
    prefixes.keep(BASE, ids, buffer)  # more positions than tokens: those after them are of nobody
    for keys, values in buffer:
        keys.fill_(9.0)
        values.fill_(9.0)
    check(prefixes, BASE, ids, 29)
    assert prefixes.bytes == 30 * PER_TOKEN


def test_the_least_recently_used_go_first(prefixes):
    prefixes.budget_bytes = 100 * PER_TOKEN
    first, second, third = run(0, 40), run(1000, 40), run(2000, 40)
    keep(prefixes, BASE, first)
    keep(prefixes, SQL, second)
    check(prefixes, BASE, first, 39)  # used, so `second` is the oldest
    keep(prefixes, CHAT, third)
    assert prefixes.bytes == 80 * PER_TOKEN
    check(prefixes, SQL, second, None)
    check(prefixes, BASE, first, 39)
    check(prefixes, CHAT, third, 39)


def test_a_shared_start_outlives_its_ends(prefixes):
    prefixes.budget_bytes = 100 * PER_TOKEN
    start = run(0, 60)
    for number in range(10):
        keep(prefixes, BASE, (*start, *run(1000 * (number + 1), 20)))
    assert prefixes.bytes <= 100 * PER_TOKEN
    check(prefixes, BASE, (*start, 1, 2), 60)
    check(prefixes, BASE, (*start, *run(10_000, 20), 1), 80)


def test_of_a_prompt_larger_than_the_budget_the_start_is_kept(prefixes):
    prefixes.budget_bytes = 50 * PER_TOKEN + 5
    keep(prefixes, BASE, run(0, 200))
    assert prefixes.bytes == 50 * PER_TOKEN
    check(prefixes, BASE, run(0, 200), 50)


@pytest.mark.parametrize("budget", [0, PER_TOKEN])
def test_without_a_budget_nothing_is_kept(budget):
    prefixes = Prefixes(budget)
    keep(prefixes, BASE, run(0, 200))
    check(prefixes, BASE, run(0, 200), None)
    assert prefixes.bytes == 0


@pytest.mark.parametrize("copies_before", range(3))
def test_where_memory_is_short_for_a_copy_nothing_has_changed(prefixes, monkeypatch, copies_before):
    """A prompt that parts from a kept one takes three copies: of the new run, and of both parts of the old one."""
    ids, other = run(0, 40), (*run(0, 20), *run(500, 30))
    keep(prefixes, BASE, ids)
    held, made = prefixes.bytes, []

    def copied(keys_values):
        if len(made) == copies_before:
            raise RuntimeError("out of memory")
        made.append(1)
        return real(keys_values)

    real = prefixes_module._copied
    with monkeypatch.context() as patched:
        patched.setattr(prefixes_module, "_copied", copied)
        for choice in (BASE, SQL) if not copies_before else (BASE,):
            with pytest.raises(RuntimeError):
                keep(prefixes, choice, other)
    assert prefixes.bytes == held
    check(prefixes, BASE, (*ids, 7), 40)
    check(prefixes, BASE, other, 20)
    check(prefixes, SQL, other, None)
    keep(prefixes, BASE, other)
    check(prefixes, BASE, (*other, 7), 50)
    prefixes.budget_bytes = 30 * PER_TOKEN
    keep(prefixes, SQL, run(0, 30))  # drops all others, one by one
    assert prefixes.bytes == 30 * PER_TOKEN


def test_forgetting_an_adapter_drops_its_prompts_and_those_of_mixes_with_it(prefixes):
    for choice in (BASE, SQL, CHAT, MIX):
        keep(prefixes, choice, run(0, 30))
        keep(prefixes, choice, (*run(0, 20), *run(500, 20)))
    held = prefixes.bytes
    assert prefixes.forget("sql") == held // 2
    assert prefixes.bytes == held // 2
    for choice, expected in ((BASE, 29), (CHAT, 29), (SQL, None), (MIX, None)):
        check(prefixes, choice, run(0, 30), expected)
    assert prefixes.forget("sql") == prefixes.forget("never seen") == 0
    prefixes.forget("chat")
    keep(prefixes, SQL, run(0, 30))
    check(prefixes, SQL, run(0, 30), 29)


@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_asked_in_whatever_order_only_right_values_come_out(seed):
    """Prompts over three tokens, so that they part everywhere, beside a list of all that was kept."""
    dice = random.Random(seed)
    prefixes = Prefixes(150 * PER_TOKEN if seed % 2 else 1 << 30)
    kept: dict[tuple, list[tuple]] = {BASE: [], SQL: []}
    for _ in range(150):
        choice = dice.choice((BASE, SQL))
        stem = dice.choice(kept[choice])[: dice.randrange(80)] if kept[choice] and dice.random() < 0.8 else ()
        ids = (*stem, *(dice.randrange(3) for _ in range(dice.randrange(1, 60))))
        found = prefixes.find(choice, ids)
        longest = max((_agree(ids[:-1], other) for other in kept[choice]), default=0)
        length = 0 if found is None else found.length
        assert length <= longest
        if found is not None:
            check(prefixes, choice, ids, length)
        if seed % 2 == 0:  # nothing was dropped, but ends of under LEAST tokens are left out
            assert length > longest - LEAST or longest < 2 * LEAST
        keep(prefixes, choice, ids)
        kept[choice].append(ids)
        assert prefixes.bytes <= prefixes.budget_bytes
        if dice.random() < 0.01:
            prefixes.forget("sql")
            kept[SQL].clear()


def _agree(left, right):
    return next((at for at, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
