"""Rows of the address task: a Taiwanese address in Chinese, and its fields as JSON.

    prompt      010甲木市東桐區晨星路21號
    completion  {"city": "甲木市", "district": "東桐區", "road": "晨星路", "postal_code": "010"}

The places come from the user's copy of a public list, whose licence is not stated (no row of it is part of lorakit), or
from a few invented ones that are written here. Roads are split between training and test rows, so that a tested road
was never seen.

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


# City, district, postal code; and roads. All are invented: Taiwan's postal codes begin with 1 to 9.
DISTRICTS = (
    *(("甲木市", "東桐區", "010"), ("甲木市", "西桐區", "016"), ("甲木市", "南桐區", "021")),
    *(("乙水市", "東柏區", "030"), ("乙水市", "西柏區", "041"), ("乙水市", "北柏區", "051")),
    *(("青雲市", "東柳區", "060"), ("青雲市", "南柳區", "062"), ("白楓市", "東楠區", "070")),
    *(("松嵐市", "西楠區", "077"), ("松嵐市", "北櫻區", "076"), ("丙石縣", "南楠鎮", "085")),
    *(("玉虹市", "東樺區", "088"), ("玉虹市", "西樺區", "080"), ("丁火市", "南櫻區", "094")),
    *(("丁火市", "北樺區", "093"), ("明澤縣", "東櫻市", "097"), ("玉泓縣", "西櫻市", "095")),
)
ROADS = (
    *("晨星路", "雲海路", "月光路", "飛鳥路", "綠葉路", "白雪路", "春風路", "金葉街", "青草路", "麥田路"),
    *("流星路", "琴聲路", "風箏街", "貝殼路", "竹影街", "蜻蜓路", "螢火路", "鯨魚路", "棋子街", "畫筆路"),
    *("銀河街", "鐵塔路", "雨傘街", "月牙街", "琥珀路", "雪狼路", "石橋街", "雲雀東路", "燕子北路", "海龜街"),
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
            '  expected JSON such as [{"CityName": "甲木市", "AreaList": [{"ZipCode": "010", "AreaName": "東桐區", '
            '"RoadList": [{"RoadName": "晨星路"}]}]}]'
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
