"""Rows of the address task: from the list's form, from names written here, and how answers are scored."""

from __future__ import annotations

import json

import pytest

from lorakit.errors import DataError
from lorakit.experiments import addresses

LIST = [
    {
        "CityName": "甲木市",
        "AreaList": [
            {"ZipCode": "010", "AreaName": "東桐區", "RoadList": [{"RoadName": "晨星路"}, {"RoadName": "雲海路２段"}]}
        ],
    }
]


def test_the_lists_form_is_read(tmp_path):
    path = tmp_path / "list.json"
    path.write_text(json.dumps(LIST), encoding="utf-8-sig")  # the public list begins with a byte-order mark
    first, second = addresses.places(path)
    assert first == ("甲木市", "東桐區", "晨星路", "010")
    assert addresses.row(second, 12) == {
        "prompt": "010甲木市東桐區雲海路２段12號\n",
        "completion": '{"city": "甲木市", "district": "東桐區", "road": "雲海路２段", "postal_code": "010"}',
    }


@pytest.mark.parametrize("content", ["{", "[]", '[{"CityName": "x"}]', '{"a": 1}'])
def test_another_file_is_refused_with_the_form_expected(tmp_path, content):
    path = tmp_path / "list.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"RoadName|no roads"):
        addresses.places(path)
    with pytest.raises(DataError, match="cannot be read"):
        addresses.places(tmp_path / "missing.json")


def test_tested_roads_are_not_in_training():
    train, test = addresses.rows(addresses.places(None), 300, 60)
    roads = [{json.loads(row["completion"])["road"] for row in part} for part in (train, test)]
    assert (len(train), len(test)) == (300, 60)
    assert all(roads)
    assert not roads[0] & roads[1]
    assert addresses.rows(addresses.places(None), 300, 60) == (train, test)
    with pytest.raises(DataError, match="too few"):
        addresses.rows(addresses.places(None)[:1], 3, 3)


def test_answers_are_scored_by_field_and_in_all():
    right = addresses.row(addresses.Place("甲木市", "東桐區", "晨星路", "010"), 1)
    wrong = right["completion"].replace("東桐區", "西桐區")
    scores = addresses.score([right["completion"], wrong, "no", "[1]"], [right] * 4)
    assert scores == {"json": 0.5, "city": 0.5, "district": 0.25, "road": 0.5, "postal_code": 0.5, "exact": 0.25}
