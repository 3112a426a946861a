"""The demo's rows: one text for each meaning, that in the more usual words."""

from __future__ import annotations

import json
from collections import Counter

from lorakit.reproduce.demo import ASSETS
from lorakit.reproduce.demo_rows import MANY, ONE_IN, chosen, usual
from lorakit.reproduce.slots import check_slots, parse_mr


def row(name: str, text: str) -> dict[str, str]:
    return {"prompt": f"name[{name}], eatType[pub]\n", "completion": text}


def test_of_each_meaning_the_more_usual_text_is_taken_whatever_its_place_and_name():
    rows = [
        row("The Mill", "The Mill is a pub."),
        row("The Mill", "A pub goes by the name of The Mill."),
        row("Cocum", "What a pub Cocum is!"),
        row("Cocum", "Cocum is a pub."),
        row("Zizzi", "Zizzi is a pub."),
    ]
    assert [r["completion"] for r in usual(rows)] == ["The Mill is a pub.", "Cocum is a pub.", "Zizzi is a pub."]


def test_of_equally_usual_texts_the_shorter_is_taken():
    rows = [row("Cocum", "Cocum is a pub. Cocum is a pub."), row("Cocum", "Cocum is a pub.")]
    assert [r["completion"] for r in usual(rows)] == ["Cocum is a pub."]


def test_the_slice_keeps_every_meaning_and_its_texts_state_all_slots():
    rows = [json.loads(line) for line in (ASSETS / "train.jsonl").read_text(encoding="utf8").splitlines()]
    kept = usual(rows)
    assert [r["prompt"] for r in kept] == list(dict.fromkeys(r["prompt"] for r in rows))
    assert all(r in rows for r in kept[:200])
    starts = [r["completion"].startswith(parse_mr(r["prompt"].strip())["name"]) for r in kept]
    assert sum(starts) / len(starts) > 0.65, "most texts begin with the name, and more of the kept ones (57 % before)"
    assert not any(check_slots(parse_mr(r["prompt"].strip()), r["completion"]).missing for r in kept)


def test_meanings_with_few_properties_are_thinned_out_and_none_with_many():
    rows = [json.loads(line) for line in (ASSETS / "train.jsonl").read_text(encoding="utf8").splitlines()]
    before, after = (Counter(len(parse_mr(r["prompt"].strip())) >= MANY for r in some) for some in (usual(rows), chosen(rows)))
    assert after[True] == before[True]
    assert after[False] == -(-before[False] // ONE_IN)
