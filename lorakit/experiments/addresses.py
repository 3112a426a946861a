"""Rows of the address task: a Taiwanese address in Chinese, and its fields as JSON.

    prompt      100臺北市中正區中山南路21號
    completion  {"city": "臺北市", "district": "中正區", "road": "中山南路", "postal_code": "100"}

The places come from the user's copy of a public list, whose licence is not stated (no row of it is part of lorakit), or
from a few that are written here. Roads are split between training and test rows, so that a tested road was never seen.

    [{"CityName": ..., "AreaList": [{"ZipCode": ..., "AreaName": ..., "RoadList": [{"RoadName": ...}]}]}]     the list
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import DataError

FIELDS = ("city", "district", "road", "postal_code")
Row = dict[str, str]
TEST_SHARE = 0.2  # of the roads


class Place(NamedTuple):
    """A road with its district, city and postal code."""

    city: str
    district: str
    road: str
    postal_code: str


# City, district, postal code; and names that many towns give their roads.
DISTRICTS = (
    *(("臺北市", "中正區", "100"), ("臺北市", "大安區", "106"), ("臺北市", "士林區", "111")),
    *(("新北市", "板橋區", "220"), ("新北市", "新店區", "231"), ("新北市", "淡水區", "251")),
    *(("桃園市", "桃園區", "330"), ("桃園市", "中壢區", "320"), ("新竹市", "東區", "300")),
    *(("臺中市", "西屯區", "407"), ("臺中市", "北屯區", "406"), ("彰化縣", "鹿港鎮", "505")),
    *(("臺南市", "安平區", "708"), ("臺南市", "永康區", "710"), ("高雄市", "鼓山區", "804")),
    *(("高雄市", "左營區", "813"), ("花蓮縣", "花蓮市", "970"), ("臺東縣", "臺東市", "950")),
)
ROADS = (
    *("中山路", "中正路", "民生路", "民權路", "民族路", "和平路", "忠孝路", "仁愛路", "信義路", "復興路"),
    *("建國路", "中華路", "自由路", "光復路", "文化路", "大同街", "成功路", "公園路", "林森路", "福德街"),
    *("南京東路", "三民路", "四維路", "五福路", "八德路", "青年路", "博愛街", "永安街", "新生北路", "河濱街"),
)


def places(file: Path | None) -> list[Place]:
    """Read the places of a list, or return those written here. Raises DataError for a file of another form."""
    if file is None:
        return [Place(city, area, road, code) for city, area, code in DISTRICTS for road in ROADS]
    try:
        cities = json.loads(file.read_text(encoding="utf-8-sig"))
        found = [
            Place(*map(str, (city["CityName"], area["AreaName"], road["RoadName"], area["ZipCode"])))
            for city in cities
            for area in city["AreaList"]
            for road in area["RoadList"]
        ]
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file} is not a list of addresses ({type(error).__name__}: {error})\n"
            '  expected JSON such as [{"CityName": "臺北市", "AreaList": [{"ZipCode": "100", "AreaName": "中正區", '
            '"RoadList": [{"RoadName": "中山南路"}]}]}]'
        ) from error
    if not found:
        raise DataError(f"{file} has no roads\n  expected the form of AllData.json")
    return found


def row(place: Place, number: int) -> dict[str, str]:
    """Return a row for a house number on this road."""
    answer = json.dumps(dict(zip(FIELDS, place, strict=True)), ensure_ascii=False)
    return {"prompt": f"{place.postal_code}{place.city}{place.district}{place.road}{number}號\n", "completion": answer}


def rows(of: Sequence[Place], train: int, test: int, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """Draw training and test rows, whose roads differ. Raises DataError if there are too few roads."""
    draw = random.Random(seed)
    roads = sorted({place.road for place in of})
    draw.shuffle(roads)
    held = set(roads[: round(len(roads) * TEST_SHARE)])
    parts: list[list[Place]] = [[p for p in of if p.road not in held], [p for p in of if p.road in held]]
    if not all(parts):
        raise DataError(f"{len(roads)} different roads are too few to have some for training and some for the test")
    drawn = [
        [row(draw.choice(own), draw.randint(1, 400)) for _ in range(count)]
        for own, count in zip(parts, (train, test), strict=True)
    ]
    return drawn[0], drawn[1]


def fields_of(text: str) -> dict[str, Any] | None:
    """Parse a generated answer; None if it is not a JSON object."""
    try:
        answer = json.loads(text.strip())
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None


def score(texts: Sequence[str], test: Sequence[dict[str, str]]) -> dict[str, float]:
    """Return the shares of answers that are JSON, that have each field right, and that have all right (0 to 1)."""
    answers = [fields_of(text) for text in texts]
    expected = [json.loads(own["completion"]) for own in test]
    count = len(expected)
    shares = {
        name: sum(a is not None and a.get(name) == e[name] for a, e in zip(answers, expected, strict=True)) / count
        for name in FIELDS
    }
    exact = sum(a == e for a, e in zip(answers, expected, strict=True)) / count
    return {"json": sum(a is not None for a in answers) / count, **shares, "exact": exact}
