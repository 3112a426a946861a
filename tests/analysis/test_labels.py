"""Text on pictures: wrapped to a width, in fonts that have its characters."""

from __future__ import annotations

import time

import pytest

from lorakit.analysis.fonts import font_files
from lorakit.analysis.labels import MOST_LINES, _file_of, text_width, wrapped


def test_long_labels_are_wrapped_and_cut_with_an_ellipsis():
    prompt = "a small balloon at sunset, sks style, " * 20
    label = wrapped(prompt, 160, 14)
    assert len(label.lines) == MOST_LINES
    assert label.lines[-1].endswith("…")
    assert label.width <= 160
    assert " ".join(label.lines)[:-1].rstrip() in " ".join(prompt.split())
    word = wrapped("pneumonoultramicroscopicsilicovolcanoconiosis", 100, 14)
    assert "".join(word.lines) == "pneumonoultramicroscopicsilicovolcanoconiosis"
    assert word.width <= 100
    assert wrapped("two\nlines", 160, 14).lines == ("two", "lines")
    assert wrapped("   ", 160, 14).lines == ()


def test_wider_text_and_bold_text_measure_wider():
    assert text_width("ww", 14) > text_width("w", 14) > 0
    assert text_width("panda", 14, bold=True) > text_width("panda", 14)


@pytest.mark.parametrize("text", ["一只猫在草地上" * 400, "a cat in a meadow " * 2000, "x" * 20_000])
def test_a_very_long_text_takes_no_time(text):
    wrapped("warm 一", 260, 13)
    began = time.perf_counter()
    label = wrapped(text, 260, 13, most_lines=3)
    assert time.perf_counter() - began < 2
    assert len(label.lines) == 3
    assert label.lines[-1].endswith("…")
    assert label.width <= 260
    assert text.replace(" ", "").startswith("".join(label.lines)[:-1].replace(" ", ""))


def test_each_character_has_the_font_that_has_it():
    assert _file_of("a") == _file_of("я") == font_files("a")[0]
    for character in "猫ก":
        assert _file_of(character) in font_files(f"a{character}")
