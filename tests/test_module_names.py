"""Ranks and alphas by module name: fast lookup that agrees with PEFT's regular expressions."""

from __future__ import annotations

import copy
import pickle
import re
import time

from hypothesis import given, settings
from hypothesis import strategies as st

import lorakit as lk
from lorakit.module_names import Patterns, plain

PART = st.text("ab0_.", min_size=1, max_size=4)
NAME = st.lists(PART, min_size=1, max_size=3).map(".".join)
KEYS = st.one_of(
    NAME,
    NAME.map(lambda name: f"^{name}"),
    NAME.map(lambda name: f"^{re.escape(name)}"),
    NAME.map(re.escape),
    st.sampled_from(
        [r"a|b", r".*", r"(a|b)\.0", r"\d", r"^a.*b$", r"a\.[0-9]", r"[ab]+", r"b?", r"^(a|b)\.", r"-", r"\-"]
    ),
)


def value_by_peft(pattern, name, default):
    """The value of the first key that matches, as peft.utils.get_pattern_key does it."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), default)


@settings(max_examples=600, deadline=None)
@given(keys=st.lists(KEYS, unique=True, max_size=8), names=st.lists(NAME, min_size=1, max_size=6), chosen=st.data())
def test_the_first_matching_key_wins_for_names_and_expressions(keys, names, chosen):
    pattern = {key: number for number, key in enumerate(keys, start=1)}
    patterns = Patterns(pattern)
    for name in [*names, "a.b\\n", "a\\nb", *(re.sub(r"[\\^$]", "", key) for key in keys)]:
        assert patterns.value(name, None) == value_by_peft(pattern, name, None)


def test_values_are_those_of_pefts_get_pattern_key():
    from peft.utils.other import get_pattern_key

    pattern = {"^model.a": 1, "a": 2, r"b\.\d": 3, "x.y": 4, "q": 5}
    for name in ("model.a", "model_a", "other.model.a", "k.b.3", "xzy", "m.x.y", "m.q", "mq", "none"):
        key = get_pattern_key(pattern, name)
        assert Patterns(pattern).value(name, None) == pattern.get(key)


def test_plain_tells_names_from_expressions():
    assert all(map(plain, ("q_proj", "^unet.down_blocks.0.attn1", r"model\.layers\.0", "a-b")))
    assert not any(map(plain, ("a|b", "a.*", r"\d", "a$", "(a)", "[ab]", "a+", "", "^", r"a\\b")))


def test_a_thousand_ranks_are_looked_up_in_under_a_second():
    """Matching every key against every name took most of a minute."""
    names = [
        f"unet.down_blocks.{i}.attentions.{j}.transformer_blocks.{k}.attn1.to_{x}"
        for i in range(3)
        for j in range(3)
        for k in range(40)
        for x in "qkv"
    ]
    config = lk.LoraConfig(targets=["to_q"], rank_pattern={f"^{n}": 1 + i % 7 for i, n in enumerate(names)})
    began = time.process_time()
    assert [config.rank_of(n) for n in names] == [1 + i % 7 for i in range(len(names))]
    assert config.rank_of("other.to_q") == 16
    assert time.process_time() - began < 1


def test_looking_up_a_rank_does_not_change_a_configs_equality():
    a, b = (lk.LoraConfig(rank_pattern={"^a.b": 3}) for _ in range(2))
    assert a.rank_of("a.b") == 3
    assert a == b
    assert copy.deepcopy(a) == pickle.loads(pickle.dumps(a)) == b
    assert a.replace(rank_pattern={"^a.b": 5}).rank_of("a.b") == 5
    assert a.model_dump() == b.model_dump()
