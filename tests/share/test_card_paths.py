"""Local paths in an adapter's own notes: what is cut, what is left and named, and what is no path."""

from __future__ import annotations

import json
import time

import pytest

from lorakit.share.paths import Paths, holds_path
from lorakit.share.words import is_local_path, is_path, without_paths


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "modules_to_save"])
def test_names_of_modules_are_patterns_and_never_cut(key):
    paths = Paths()
    value = {key: ["/x/.*", "q_proj"], "rank_pattern": {"/home/a/.*": 3}}
    assert paths.clean(value, "config") == value
    assert paths.cut == []
    assert paths.left == [
        (f"config, {key}[0]", "holds a local path"),
        ("config, rank_pattern, /home/a/.*", "the key holds a local path"),
    ]


@pytest.mark.parametrize(
    "value, clean",
    [
        ("--data=/home/bob/rows.jsonl", "--data=rows.jsonl"),
        ("out=~/runs/x", "out=x"),
        ("--base=../acme/llama", "--base=llama"),
        ("../acme/llama", "llama"),
        ("./llama", "llama"),
        ("/home/Alice Smith/x", "x"),
        ("--data=/home/bob/a --out /home/bob/b", None),
        ("trained on /home/alice/x", None),
        ("rows: ../acme/x", None),
        ("server:/export/home/x", None),
        ("https://a.b/c and /home/alice/x", None),
        ("(file:///home/alice/x)", None),
    ],
)
def test_a_path_is_cut_where_it_is_the_whole_value_and_named_elsewhere(value, clean):
    paths = Paths()
    assert paths.clean({"note": [value]}, "x.json") == {"note": [value if clean is None else clean]}
    expected = ([], [("x.json, note[0]", "holds a local path")])
    if clean is not None:
        expected = ([("x.json, note[0]", f"a local path is cut to {clean!r}")], [])
    assert (paths.cut, paths.left) == expected


@pytest.mark.parametrize(
    "value",
    [
        "https://a.b/c?x=/d/e",
        "s3://a/b/c",
        "1/2 and/or </s>",
        "OWNER/NAME",
        "a/b/c.d",
        r".*\.layers\.\d+\.(q|v)_proj",
        "...",
        "..",
        "3.5/4",
    ],
)
def test_what_is_no_local_path_is_neither_cut_nor_named(value):
    paths = Paths()
    assert paths.clean({"note": value}, "x.json") == {"note": value}
    assert (paths.cut, paths.left) == ([], [])


def test_a_header_that_is_nested_too_deeply_is_a_text():
    paths = Paths()
    text = '{"a":' * 700 + '"/home/alice/x"' + "}" * 700
    assert paths.clean_text(text, "f", "k") in (text, json.dumps(json.loads(text.replace("/home/alice/", ""))))
    assert len(paths.cut) + len(paths.left) == 1


def test_keys_of_somebody_else_cannot_write_on_a_terminal():
    paths = Paths()
    paths.clean({"\x1b[2J": "/home/alice/x", "/home/alice/\x1b[31m": 1, "k" * 999: "/home/a/b"}, "f")
    assert len(paths.cut) + len(paths.left) == 3
    assert all(where.isprintable() and what.isprintable() and len(where) < 130 for where, what in paths.cut + paths.left)


def test_texts_of_somebody_else_take_no_time():
    began = time.monotonic()
    for text in ("/" + "a/" * 40 + "\n/", "/a" * 20_000 + "\n/", "../" * 20_000 + "\n", "~" * 20_000, "\\\\a" * 20_000, "aa:/" * 20_000):
        is_local_path(text)
        without_paths(text)
        holds_path(text)
    assert time.monotonic() - began < 2
    assert not is_path("a" * 100_000)  # longer than any name: no error
