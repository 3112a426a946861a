"""The demo's rows: the most likely text of each meaning, and fewer rows with few properties."""

from __future__ import annotations

import json
from collections import Counter

from lorakit.reproduce.demo import ASSETS
from lorakit.reproduce.demo_rows import MANY, ONE_IN, most_likely, select_rows
from lorakit.reproduce.slots import check_slots, parse_mr


def row(name: str, text: str) -> dict[str, str]:
    return {"prompt": f"name[{name}], eatType[pub]\n", "completion": text}


def test_the_most_likely_text_of_each_meaning_is_selected():
    rows = [
        row("The Mill", "The Mill is a pub."),
        row("The Mill", "A pub goes by the name of The Mill."),
        row("Cocum", "What a pub Cocum is!"),
        row("Cocum", "Cocum is a pub."),
        row("Zizzi", "Zizzi is a pub."),
    ]
    assert [r["completion"] for r in most_likely(rows)] == ["The Mill is a pub.", "Cocum is a pub.", "Zizzi is a pub."]


def test_the_shorter_of_equally_likely_texts_is_selected():
    rows = [row("Cocum", "Cocum is a pub. Cocum is a pub."), row("Cocum", "Cocum is a pub.")]
    assert [r["completion"] for r in most_likely(rows)] == ["Cocum is a pub."]


def test_the_slice_keeps_every_meaning_and_its_texts_state_all_slots():
    rows = [json.loads(line) for line in (ASSETS / "train.jsonl").read_text(encoding="utf8").splitlines()]
    selected = most_likely(rows)
    assert [r["prompt"] for r in selected] == list(dict.fromkeys(r["prompt"] for r in rows))
    assert all(r in rows for r in selected[:200])
    starts = [r["completion"].startswith(parse_mr(r["prompt"].strip())["name"]) for r in selected]
    assert sum(starts) / len(starts) > 0.65, (
        "most texts start with the name: 57 % of all, and more of the selected ones"
    )
    assert not any(check_slots(parse_mr(r["prompt"].strip()), r["completion"]).missing for r in selected)


def test_only_meanings_with_few_properties_are_thinned_out():
    rows = [json.loads(line) for line in (ASSETS / "train.jsonl").read_text(encoding="utf8").splitlines()]
    before, after = (
        Counter(len(parse_mr(r["prompt"].strip())) >= MANY for r in some)
        for some in (most_likely(rows), select_rows(rows))
    )
    assert after[True] == before[True]
    assert after[False] == -(-before[False] // ONE_IN)
