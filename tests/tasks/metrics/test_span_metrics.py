"""Entities and answers, counted by hand."""

from __future__ import annotations

import pytest

from lorakit.tasks.metrics.spans import Entity, answer_f1, entities, entity_scores, exact_match, normalized


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O O", []),
        ("B-PER I-PER O B-LOC", [("PER", 0, 1), ("LOC", 3, 3)]),
        ("B-PER B-PER", [("PER", 0, 0), ("PER", 1, 1)]),  # two of a kind, side by side
        ("I-PER I-PER O", [("PER", 0, 1)]),  # broken: begins with I-
        ("B-PER I-LOC I-LOC", [("PER", 0, 0), ("LOC", 1, 2)]),  # broken: the kind changes inside
        ("O I-ORG B-ORG", [("ORG", 1, 1), ("ORG", 2, 2)]),
        ("B-PER O I-PER", [("PER", 0, 0), ("PER", 2, 2)]),
        ("B-PER I-PER", [("PER", 0, 1)]),  # up to the last word
        ("S-PER B-LOC I-LOC E-LOC S-LOC", [("PER", 0, 0), ("LOC", 1, 3), ("LOC", 4, 4)]),  # BIOES
        ("U-PER B-LOC L-LOC I-LOC", [("PER", 0, 0), ("LOC", 1, 2), ("LOC", 3, 3)]),  # BILOU, then broken
        ("B I O B", [("", 0, 1), ("", 3, 3)]),  # one kind, without a name
        ("PER PER O", [("PER", 0, 1)]),  # without a scheme
        ("B-a-b I-a-b", [("a-b", 0, 1)]),
        ("", []),
    ],
)
def test_entities_of_tags(tags, expected):
    assert entities(tags.split()) == [Entity(*each) for each in expected]


def test_an_entity_counts_only_if_its_kind_and_both_ends_are_right():
    """True: 4 entities. Predicted: 4, of which PER (0, 1) and the LOC of the second sentence are right."""
    truth = [["B-PER", "I-PER", "O", "B-LOC", "I-LOC"], ["B-LOC", "O", "B-ORG"]]
    predicted = [["B-PER", "I-PER", "O", "B-LOC", "O"], ["B-LOC", "O", "B-PER"]]
    scores = entity_scores(truth, predicted)
    assert scores == {"precision": 2 / 4, "recall": 2 / 4, "f1": 2 / 4}
    unequal = entity_scores([["B-PER", "O", "O"]], [["B-PER", "O", "B-LOC"]])
    assert unequal == {"precision": 1 / 2, "recall": 1.0, "f1": pytest.approx(2 / 3)}


def test_sentences_without_entities_score_zero_and_lengths_must_agree():
    assert entity_scores([["O"]], [["O"]]) == {"precision": 0.0, "recall": 0.0, "f1": 0.0}
    with pytest.raises(ValueError, match="1 tags and 2"):
        entity_scores([["O"]], [["O", "O"]])


def test_answers_are_normalized_as_squads_script_does():
    assert normalized("The  Eiffel-Tower, a landmark!") == "eiffeltower landmark"
    assert normalized("An apple\tand\nthe theme") == "apple and theme"  # words that only begin with an article stay


def test_exact_match_and_f1_take_the_best_answer():
    answers = ["the Eiffel Tower", "Eiffel Tower in Paris"]
    assert exact_match("Eiffel tower.", answers) == 1
    assert exact_match("Tower", answers) == 0
    assert answer_f1("Eiffel Tower", answers) == 1
    # "tower in lyon" against "eiffel tower": 1 common, 3 + 2 words; "eiffel tower in paris": 2 common, 3 + 4 words
    assert answer_f1("Tower in Lyon", answers) == pytest.approx(max(2 * 1 / 5, 2 * 2 / 7))
    assert answer_f1("tower tower", ["tower"]) == pytest.approx(2 * 1 / 3)  # a word counts as often as in both


def test_a_row_without_an_answer_wants_the_empty_text():
    assert (exact_match("", []), answer_f1("", [])) == (1, 1)
    assert (exact_match("Paris", []), answer_f1("Paris", [])) == (0, 0)
    assert answer_f1("", ["Paris"]) == 0
    assert answer_f1("the", ["a"]) == 1  # both empty, normalized
