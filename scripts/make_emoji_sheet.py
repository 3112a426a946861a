"""Choose the Twemoji pictures that the embedded image model is made of: one sheet and a list of what is on it.

    python scripts/make_emoji_sheet.py --twemoji FOLDER --out lorakit/assets/twemoji

FOLDER holds `twemoji_32px_rgba.npz` (`images`: [n, 32, 32, 4] uint8) and `twemoji_captions.jsonl` (a name for each).
Written: `emoji.png`, the chosen pictures side by side, COLUMNS to a row, and `emoji.json`, for each its caption word,
the word for its kind ("an animal"), its name in Unicode, and whether the base model is trained on it. The ones it is
not trained on are subjects for LoRAs to learn.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

COLUMNS, SIZE = 12, 32

# Chosen to differ in outline and in colour at 32 px; "word = name in Unicode" where the two are not the same.
SEEN = {
    "animal": """panda, cat = cat face, dog = dog face, frog, penguin, whale = spouting whale, butterfly,
        ladybug = lady beetle, turtle, octopus, snail, owl, rabbit = rabbit face, pig = pig face""",
    "fruit": "strawberry, banana, pineapple, watermelon, grape = grapes, cherry = cherries, lemon, pear",
    "snack": "doughnut, burger = hamburger, pizza, cupcake, popcorn",
    "plant": "mushroom, cactus, sunflower, tulip, tree = evergreen tree, palm = palm tree",
    "vehicle": "rocket, boat = sailboat, car = automobile, train = locomotive, tractor, helicopter, airplane",
    "thing": """balloon, umbrella, house, guitar, crown, ball = soccer ball, pumpkin = jack-o-lantern,
        snowman = snowman without snow""",
}
UNSEEN = {
    "animal": """fox, unicorn, koala, lion, cow = cow face, hedgehog, parrot, bear = polar bear, dinosaur = T-Rex, crab,
        lobster, duck, dragon = dragon face""",
    "snack": "taco",
    "plant": "rose",
    "vehicle": "tram",
    "thing": """robot, alien, camera, kite, yarn, gem = gem stone, teddy = teddy bear,
        face = smiling face with sunglasses""",
}


def chosen() -> list[dict]:
    """One entry per emoji: word, kind, name, seen."""
    entries = []
    for seen, kinds in ((True, SEEN), (False, UNSEEN)):
        for kind, words in kinds.items():
            for item in words.split(","):
                word, _, name = (part.strip() for part in item.partition("="))
                entries.append({"word": word, "kind": kind, "name": name or word, "seen": seen})
    return entries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--twemoji", type=Path, required=True, help="folder with all Twemoji pictures and their names")
    parser.add_argument("--out", type=Path, required=True, help="folder for emoji.png and emoji.json")
    args = parser.parse_args()
    pictures = np.load(args.twemoji / "twemoji_32px_rgba.npz")["images"]
    names = [json.loads(line)["name"] for line in (args.twemoji / "twemoji_captions.jsonl").read_text().splitlines()]
    entries = chosen()
    sheet = Image.new("RGBA", (COLUMNS * SIZE, -(-len(entries) // COLUMNS) * SIZE))
    for at, entry in enumerate(entries):
        picture = Image.fromarray(pictures[names.index(entry["name"])])
        sheet.paste(picture, (at % COLUMNS * SIZE, at // COLUMNS * SIZE))
    args.out.mkdir(parents=True, exist_ok=True)
    sheet.save(args.out / "emoji.png", optimize=True)
    rows = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    (args.out / "emoji.json").write_text(f"[\n{rows}\n]\n", encoding="utf8")
    print(f"{len(entries)} emoji, {sum(e['seen'] for e in entries)} of them for the base model")


if __name__ == "__main__":
    main()
