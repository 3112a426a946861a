"""The slot checker: what counts as stated, missing and wrong."""

from __future__ import annotations

import pytest

from lorakit.errors import DataError
from lorakit.reproduce.slots import SlotErrors, check_slots, normalise, parse_mr, slot_error_rate

NAMED = "The Vaults is a place."


def found(slots: dict[str, str], text: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    checked = check_slots(slots, text)
    return checked.missing, checked.wrong


def test_a_meaning_representation_is_read_in_order():
    mr = "name[The Vaults], eatType[pub], priceRange[more than £30], customer rating[5 out of 5], near[Café Adriatic]"
    assert list(parse_mr(mr).items()) == [
        ("name", "The Vaults"),
        ("eatType", "pub"),
        ("priceRange", "more than £30"),
        ("customer rating", "5 out of 5"),
        ("near", "Café Adriatic"),
    ]


@pytest.mark.parametrize(
    "mr, complaint",
    [
        ("", "has no slots"),
        ("name The Vaults", "cannot read 'name The Vaults'"),
        ("name[The Vaults], eatType", "cannot read 'eatType'"),
        ("name[The Vaults] eatType[pub]", "cannot read"),
        ("name[The Vaults], name[The Mill]", "'name' appears twice"),
        ("name[]", "'name' has no value"),
        ("name[The Vaults", "cannot read"),
    ],
)
def test_a_malformed_meaning_representation_is_refused_with_the_place(mr, complaint):
    with pytest.raises(DataError, match=complaint.replace("[", r"\[")):
        parse_mr(mr)


def test_a_text_that_states_every_slot_has_no_errors():
    slots = parse_mr(
        "name[The Vaults], eatType[pub], food[Italian], priceRange[less than £20], customer rating[3 out of 5], "
        "area[riverside], "
        "familyFriendly[no], near[Café Rouge]"
    )
    text = (
        "The Vaults is a cheap pub by the river, near Cafe Rouge. It serves Italian food, has an average customer "
        "rating "
        "and is not family-friendly."
    )
    assert found(slots, text) == ((), ())


@pytest.mark.parametrize(
    "slot, value, text",
    [
        ("priceRange", "less than £20", "costs under £20"),
        ("priceRange", "less than £20", "is inexpensive"),
        ("priceRange", "less than £20", "has low prices"),
        ("priceRange", "cheap", "in the less than 20 pounds price range"),
        ("priceRange", "£20-25", "charges between £20 and £25"),
        ("priceRange", "£20-25", "with prices from £20 – £25"),
        ("priceRange", "moderate", "is moderately priced"),
        ("priceRange", "moderate", "is mid-priced"),
        ("priceRange", "high", "where the price range is high"),
        ("priceRange", "more than £30", "costs over £30"),
        ("priceRange", "more than £30", "is expensive"),
        ("customer rating", "5 out of 5", "is a five-star place"),
        ("customer rating", "5 out of 5", "is highly rated"),
        ("customer rating", "5 out of 5", "has excellent reviews"),
        ("customer rating", "high", "has a high customer rating"),
        ("customer rating", "average", "is rated 3 out of 5 stars"),
        ("customer rating", "3 out of 5", "is averagely rated"),
        ("customer rating", "1 out of 5", "has one star"),
        ("customer rating", "low", "is poorly rated by customers"),
        ("familyFriendly", "yes", "is kid friendly"),
        ("familyFriendly", "yes", "welcomes the whole family"),
        ("familyFriendly", "no", "isn't a family friendly place"),
        ("familyFriendly", "no", "is adults only"),
        ("familyFriendly", "no", "allows no children"),
        ("familyFriendly", "no", "is a non-children-friendly place"),
        ("familyFriendly", "no", "where kids are not welcome"),
        ("familyFriendly", "no", "where children are prohibited"),
        ("customer rating", "5 out of 5", "has an average customer rating of 5 out of 5"),
        ("customer rating", "low", "is a place of one star"),
        ("priceRange", "more than £30", "has higher-than-average prices"),
        ("food", "Fast food", "sells burgers"),
        ("food", "English", "serves British dishes"),
        ("food", "Japanese", "serves sushi"),
        ("area", "riverside", "lies on the river"),
        ("area", "city centre", "is in the center of the city"),
        ("area", "city centre", "is in the city center"),
        ("eatType", "coffee shop", "is a café"),
        ("eatType", "restaurant", "is an eatery"),
    ],
)
def test_a_common_paraphrase_realises_a_slot_and_its_absence_is_missing(slot, value, text):
    assert found({"name": "The Vaults", slot: value}, f"The Vaults {text}.") == ((), ())
    assert found({"name": "The Vaults", slot: value}, NAMED) == ((slot,), ())


@pytest.mark.parametrize(
    "slot, value, text, stated",
    [
        ("priceRange", "less than £20", "is expensive", "high"),
        ("priceRange", "high", "has moderate prices", "mid"),
        ("priceRange", "£20-25", "costs more than £30", "high"),
        ("customer rating", "low", "has a high customer rating", "high"),
        ("customer rating", "5 out of 5", "is rated 3 out of 5 stars", "mid"),
        ("customer rating", "5 out of 5", "is rated 4 out of 5", "between"),
        ("familyFriendly", "yes", "is not family-friendly", "no"),
        ("familyFriendly", "no", "is family-friendly", "yes"),
        ("food", "French", "serves Chinese food", "Chinese"),
        ("area", "riverside", "is in the city centre", "city centre"),
        ("eatType", "pub", "is a coffee shop", "coffee shop"),
    ],
)
def test_another_value_in_place_of_the_right_one_is_one_error(slot, value, text, stated):
    assert found({"name": "The Vaults", slot: value}, f"The Vaults {text}.") == ((), (f"{slot}: {stated}",))


def test_a_value_beside_the_right_one_is_wrong_too():
    assert found({"name": "The Vaults", "food": "French"}, "The Vaults serves French and Chinese food.") == (
        (),
        ("food: Chinese",),
    )


def test_an_attribute_that_was_not_given_is_wrong():
    text = "The Vaults is a family-friendly pub by the riverside."
    assert found({"name": "The Vaults"}, text) == ((), ("eatType: pub", "area: riverside", "familyFriendly: yes"))


def test_another_restaurants_name_is_wrong_and_replaces_a_missing_one():
    assert found({"name": "The Vaults"}, "The Mill is a place.") == ((), ("name: The Mill",))
    assert found({"name": "The Vaults"}, "The Vaults is near The Mill.") == ((), ("name: The Mill",))
    assert found({"name": "The Vaults", "near": "Café Rouge"}, "Nothing is here.") == (("name", "near"), ())


def test_names_match_as_full_words_regardless_of_case_and_accents():
    slots = {"name": "Ranch", "near": "Café Rouge"}
    assert found(slots, "RANCH is near cafe rouge.") == ((), ())
    assert found(slots, "A branch near Café Rouge.") == (("name",), ())


def test_a_name_says_nothing_about_the_attributes():
    slots = {"name": "The Golden Curry", "near": "Raja Indian Cuisine", "food": "Indian", "eatType": "coffee shop"}
    assert found(slots, "The Golden Curry is near Raja Indian Cuisine.") == (("eatType", "food"), ())
    assert found(
        {"name": "Burger King", "near": "Rainbow Vegetarian Café"}, "Burger King is near Rainbow Vegetarian Café."
    ) == ((), ())
    assert found({"name": "The Vaults"}, "The Vaults is near Raja Indian Cuisine.") == (
        (),
        ("name: Raja Indian Cuisine",),
    )


def test_outside_the_city_centre_is_not_a_claim_of_the_centre():
    slots = {"name": "The Vaults", "area": "riverside"}
    assert found(slots, "The Vaults is by the river, north of the city centre.") == ((), ())
    assert found(slots, "The Vaults is by the river, in the city centre.") == ((), ("area: city centre",))


@pytest.mark.parametrize(
    "text",
    [
        "The Vaults has a customer rating of 5 out of 5, with low prices.",
        "The Vaults is low priced, highly rated.",
        "The Vaults is low priced high rated.",
        "The Vaults is highly rated and low priced.",
        "The Vaults has a high customer rating and a low price range.",
        "The Vaults has a low price range and its customer rating is high.",
    ],
)
def test_high_and_low_belong_to_the_noun_they_describe(text):
    assert found({"name": "The Vaults", "priceRange": "cheap", "customer rating": "5 out of 5"}, text) == ((), ())
    swapped = check_slots({"name": "The Vaults", "priceRange": "high", "customer rating": "low"}, text)
    assert swapped.wrong == ("priceRange: low", "customer rating: high")


def test_a_negation_elsewhere_in_the_sentence_is_not_about_families():
    text = "The Vaults is not expensive but is family friendly."
    assert found({"name": "The Vaults", "familyFriendly": "yes"}, text)[0] == ()
    assert "familyFriendly: no" not in check_slots({"name": "The Vaults"}, text).wrong


def test_unknown_slots_and_values_are_matched_verbatim():
    slots = {"name": "The Vaults", "food": "Peruvian", "telephone": "01223"}
    assert found(slots, "The Vaults serves Peruvian food, call 01223.") == ((), ())
    assert found(slots, "The Vaults serves food.") == (("food", "telephone"), ())


def test_the_rate_is_errors_in_percent_of_all_slots():
    mrs = ["name[The Vaults], food[French]", "name[The Mill], area[riverside], near[Café Rouge]"]
    texts = ["The Vaults serves Chinese food.", "The Mill is near Café Rouge."]
    assert slot_error_rate(mrs, texts) == SlotErrors(missing=1, wrong=1, slots=5, rate=40.0)
    assert slot_error_rate(mrs, texts).to_dict() == {"missing": 1, "wrong": 1, "slots": 5, "rate": 40.0}


def test_an_empty_text_misses_every_slot():
    assert slot_error_rate(["name[The Vaults], food[French], familyFriendly[no]"], [""]).rate == 100


def test_unequal_lengths_and_no_rows_are_refused():
    with pytest.raises(DataError, match="1 meaning representations but 2 texts"):
        slot_error_rate(["name[The Vaults]"], ["a", "b"])
    with pytest.raises(DataError, match="no rows"):
        slot_error_rate([], [])


def test_normalised_text_has_no_case_accents_or_typographic_marks():
    assert normalise("Café  “Rouge” – it’s £20") == 'cafe "rouge" - it\'s £20'
