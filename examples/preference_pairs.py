"""Write preference pairs to learn from: a description of a restaurant, and the same with one property wrong.

    python examples/preference_pairs.py --pairs 600 --test-pairs 200 --out pairs

writes pairs/train.jsonl and pairs/test.jsonl from the E2E rows that lorakit has in it:

    {"prompt": "name[The Vaults], eatType[pub], near[Café Adriatic]\\n",
     "chosen": "Near Café Adriatic is a pub called The Vaults.",
     "rejected": "Near Café Adriatic is a restaurant called The Vaults."}

A pair that swaps Italian for Chinese is not told by how it reads, only by the prompt.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

PROPERTIES = ("food", "area", "eatType", "near")  # whose values stand in the sentences as they are


def slots(prompt: str) -> dict[str, str]:
    """Read "name[The Vaults], eatType[pub]"."""
    return dict(re.findall(r"(\w[\w ]*)\[(.*?)\]", prompt))


def rows(file: str) -> list[dict[str, str]]:
    """Read a file's rows, the first sentence of each prompt."""
    lines = (files("lorakit") / "assets" / "e2e" / file).read_text(encoding="utf8").splitlines()
    first: dict[str, str] = {}
    for row in map(json.loads, lines):
        first.setdefault(row["prompt"], row.get("completion") or row["references"][0])
    return [{"prompt": prompt, "text": text} for prompt, text in first.items()]


def pairs(file: str, count: int, chance: random.Random) -> list[dict[str, str]]:
    """Return `count` pairs of a file's rows in which a sentence names a property's value."""
    read = rows(file)
    values = {name: sorted({slots(row["prompt"]).get(name, "") for row in read} - {""}) for name in PROPERTIES}
    chance.shuffle(read)
    made: list[dict[str, str]] = []
    for row in read:
        own = slots(row["prompt"])
        named = [name for name in PROPERTIES if name in own and row["text"].count(own[name]) == 1]
        if not named:
            continue
        name = chance.choice(named)
        other = chance.choice([value for value in values[name] if value != own[name]])
        wrong = row["text"].replace(own[name], other)
        made.append({"prompt": row["prompt"], "chosen": row["text"], "rejected": wrong})
    return made[:count]


def main(arguments: Sequence[str] | None = None) -> Path:
    """Write both files. Returns their folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=600)
    parser.add_argument("--test-pairs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("pairs"))
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    chance = random.Random(options.seed)
    for file, count in (("train.jsonl", options.pairs), ("test.jsonl", options.test_pairs)):
        made = pairs(file, count, chance)
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in made)
        (options.out / file).write_text("".join(lines), encoding="utf8")
        print(f"{options.out / file}: {len(made)} pairs")
    return options.out


if __name__ == "__main__":
    main()
