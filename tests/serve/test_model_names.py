"""What `model` may say, and what it is refused with."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.errors import ConfigError
from lorakit.serve import names
from lorakit.serve.errors import UnknownAdapter

KNOWN = {"sql", "chat", "team/sql-v2", "a.b"}
BASES = ("base", "org/base", "qwen3:0.6b")


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        ("base", ()),
        ("org/base", ()),
        ("qwen3:0.6b", ()),
        ("sql", (("sql", 1.0),)),
        ("team/sql-v2", (("team/sql-v2", 1.0),)),
        ("base:sql", (("sql", 1.0),)),
        ("org/base:team/sql-v2", (("team/sql-v2", 1.0),)),
        ("qwen3:0.6b:sql", (("sql", 1.0),)),
        ("sql:0.5", (("sql", 0.5),)),
        ("sql:-1", (("sql", -1.0),)),
        ("sql:.25+chat", (("sql", 0.25), ("chat", 1.0))),
        ("sql:0.7+chat:0.3", (("sql", 0.7), ("chat", 0.3))),
        ("org/base:sql:0.7+a.b:0.3", (("sql", 0.7), ("a.b", 0.3))),
    ],
)
def test_models_are_parsed(model, parts):
    assert names.parse(model, KNOWN, BASES) == parts


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("sq", "did you mean 'sql'"),
        ("bas", "did you mean 'base'"),
        ("base:sq", "did you mean 'sql'"),
        ("sql+chta:0.5", "did you mean 'chat'"),
        ("gpt-4o", "/v1/models"),
        ("", "no model ''"),
        ("sql\n", "'sql\\n'"),
        (":", "no model"),
        ("+", "no model"),
        ("x" * 5_000, "...'"),
    ],
)
def test_unknown_models_are_refused_with_the_nearest_name(model, said):
    with pytest.raises(UnknownAdapter) as error:
        names.parse(model, KNOWN, BASES)
    assert said in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("sql:1e2", "weight of 'sql'"),
        ("sql:nan", "weight of 'sql'"),
        ("sql:inf", "weight of 'sql'"),
        ("sql:", "weight of 'sql'"),
        ("sql:101", "-100 to 100"),
        ("sql:0.5:0.5", "weight of 'sql'"),
        ("sql+sql:0.5", "twice"),
        ("base:0.5+sql:0.5", "base"),
        ("sql+base:0.5", "base"),
        ("+".join(["sql"] * 9), "at most 8"),
        ("sql:0.7+", "a name left out"),
        ("+sql", "a name left out"),
    ],
)
def test_weights_and_mixes_that_are_none_are_refused(model, said):
    with pytest.raises((ConfigError, UnknownAdapter)) as error:
        names.parse(model, KNOWN, BASES)
    assert said in str(error.value)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="sqlchat:+.0123456789-/ eбase\x00", max_size=40))
def test_any_text_is_parsed_or_refused(model):
    try:
        parts = names.parse(model, KNOWN, BASES)
    except (UnknownAdapter, ConfigError):
        return
    assert all(name in KNOWN and abs(weight) <= 100 for name, weight in parts)


def test_looking_for_a_similar_name_among_many_is_quick():
    many = {f"customer-{n}/adapter" for n in range(10_000)}
    begin = time.process_time()
    with pytest.raises(UnknownAdapter):
        names.parse("customer-77/adaptr", many, BASES)
    assert time.process_time() - begin < 0.5


def test_scales_multiply_weights_and_are_checked():
    assert names.scaled((("a", 0.5), ("b", 2.0)), 0.5) == (("a", 0.25), ("b", 1.0))
    assert names.scaled((), None) == ()
    for parts, scale in [
        ((), 0.5),
        ((("a", 1.0),), float("nan")),
        ((("a", 1.0),), float("inf")),
        ((("a", 1.0),), 1e9),
        ((("b", 0.1), ("a", -100.0)), 1.1),
    ]:
        with pytest.raises(ConfigError):
            names.scaled(parts, scale)


@pytest.mark.parametrize("name", ["sql", "a/b/c", "v1.2_x-y", "_x", "x" * 128])
def test_names_that_can_be(name):
    names.check_name(name, BASES)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "a:b",
        "a+b",
        "a b",
        "a@b",
        "/a",
        "a/",
        "a//b",
        "../a",
        "a/../b",
        ".a",
        "-a",
        "é",
        "a\n",
        "x" * 129,
        "base",
        "a\x00",
    ],
)
def test_names_that_cannot_be(name):
    with pytest.raises(ConfigError):
        names.check_name(name, BASES)
