"""Sentences wrap between words on a terminal only; elsewhere a row keeps its line."""

from __future__ import annotations

import io
import sys

import pytest

from lorakit.cli.shared.output import complain, output, say

SENTENCE = "r1 contains a run with other settings, so it cannot be resumed with these"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream, show", [("stderr", complain), ("stdout", say)])
def test_sentences_wrap_between_words_on_a_terminal(stream, show, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    terminal = Terminal()
    monkeypatch.setattr(sys, stream, terminal)
    show(SENTENCE)
    lines = terminal.getvalue().splitlines()
    assert len(lines) > 2
    assert max(map(len, lines)) <= 30
    assert " ".join(terminal.getvalue().split()) == SENTENCE


@pytest.mark.parametrize("stream, show", [("stderr", complain), ("stdout", say)])
def test_elsewhere_they_stay_on_their_line(stream, show, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    file = io.StringIO()
    monkeypatch.setattr(sys, stream, file)
    show(SENTENCE)
    assert file.getvalue() == SENTENCE + "\n"


def test_the_lines_of_an_error_stay_apart(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    complain("first\n  " + "word " * 12 + "\n  lorakit train --config a/very/long/path/that/does/not/fit.yaml")
    lines = terminal.getvalue().splitlines()
    assert lines[0] == "first"
    assert lines[2].startswith("    word")
    assert lines[-1].strip() == "a/very/long/path/that/does/not/fit.yaml"


def test_a_pipe_is_wide_enough_for_a_row(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert output().width == 200
