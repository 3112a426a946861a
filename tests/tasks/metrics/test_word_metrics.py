"""Word error rate, against values counted by hand."""

from __future__ import annotations

import pytest

from lorakit.tasks.metrics.words import edit_distance, word_error_rate


@pytest.mark.parametrize(
    ("reference", "transcript", "changes"),
    [
        ("the cat sat", "the cat sat", 0),
        ("the cat sat", "the dog sat", 1),  # one substituted
        ("the cat sat", "the cat", 1),  # one left out
        ("the cat sat", "the the cat sat down", 2),  # two added
        ("a b c d", "b c d a", 2),  # one left out in front, one added at the end
        ("a b c", "", 3),
        ("", "a b", 2),
        ("a b c d", "x b y z d", 3),  # a -> x, c -> y, z added
    ],
)
def test_the_least_number_of_changes(reference, transcript, changes):
    assert edit_distance(reference.split(), transcript.split()) == changes
    assert edit_distance(transcript.split(), reference.split()) == changes


def test_the_rate_is_over_all_words_not_the_mean_of_rows():
    assert word_error_rate(["a b c d", "e"], ["a b c d", "f"]) == pytest.approx(1 / 5)
    assert word_error_rate(["a"], ["a b c"]) == 2.0
    assert word_error_rate(["Yes."], ["yes"]) == 1.0  # case and punctuation count
    with pytest.raises(ValueError, match="no words"):
        word_error_rate([""], ["a"])
    with pytest.raises(ValueError, match="argument"):
        word_error_rate(["a"], [])
