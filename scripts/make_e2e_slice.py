"""Cut the embedded slice of the E2E NLG dataset (Novikova et al. 2017, CC BY-SA 4.0) out of its release.

    python scripts/make_e2e_slice.py e2e-dataset.zip lorakit/assets/e2e

train.jsonl: at most two texts for each of the release's 4,862 training meaning representations, chosen among those that
state every slot and none that is not there (by lorakit's own slot patterns, as far as they go; about a third of the
release leaves something out). test.jsonl: the whole test set, all references, untouched.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import random
import zipfile
from pathlib import Path

from lorakit.reproduce.slots import check_slots, parse_mr

PER_MEANING = 2


def read(archive: zipfile.ZipFile, name: str) -> dict[str, list[str]]:
    """Meaning representation -> its texts, in the file's order."""
    found: dict[str, list[str]] = {}
    with archive.open(f"e2e-dataset/{name}") as file:
        for row in csv.DictReader(io.TextIOWrapper(file, encoding="utf8", newline="")):
            found.setdefault(row["mr"].strip(), []).append(" ".join(row["ref"].split()))
    return found


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf8")
    print(f"{path}: {len(rows):,} rows, {path.stat().st_size:,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("release", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    with zipfile.ZipFile(args.release) as archive:
        train, test = read(archive, "trainset.csv"), read(archive, "testset_w_refs.csv")
    rows = []
    for mr, texts in train.items():
        sound = [t for t in dict.fromkeys(texts) if not (c := check_slots(parse_mr(mr), t)).missing and not c.wrong]
        draw.shuffle(sound)
        rows += [{"prompt": mr + "\n", "completion": text} for text in sound[:PER_MEANING]]
    write(args.out / "train.jsonl", rows)
    write(args.out / "test.jsonl", [{"prompt": mr + "\n", "references": texts} for mr, texts in test.items()])


if __name__ == "__main__":
    main()
