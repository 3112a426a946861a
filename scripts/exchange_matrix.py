"""Print the exchange matrix of docs/images.md: adapters of tiny pipelines, lorakit's files in diffusers, and back.

    python scripts/exchange_matrix.py [FAMILY ...]

A row is a family and a set of modules. In the columns of the formats: how many keys diffusers placed, and the largest
difference of its prediction from lorakit's; "-" where diffusers' loader does not take that form. `back`: the same
modules saved by diffusers' `save_lora_weights` with random PEFT layers, attached here. Pipelines and predictions are
those of tests/formats/test_exchange.py, which asserts all of it.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/formats")]
FORMATS = ("diffusers", "kohya", "comfyui")


def main(wanted: list[str]) -> None:
    warnings.simplefilter("ignore")
    import diffusers
    from exchange_families import FAMILIES

    diffusers.utils.logging.set_verbosity_error()
    print("| family | modules | " + " | ".join(FORMATS) + " | back |\n|" + "---|" * (len(FORMATS) + 3))
    for model in wanted or FAMILIES:
        family = FAMILIES[model]
        for kind in dict.fromkeys((*family.kinds, *(kind for kinds in family.forms.values() for kind in kinds))):
            with tempfile.TemporaryDirectory() as folder:
                print(f"| {model} | {kind} | " + " | ".join(row(model, kind, Path(folder))) + " |", flush=True)


def row(model: str, kind: str, folder: Path) -> list[str]:
    """The cells of one family and kind of file."""
    import exchange_families as exchange
    from test_exchange import from_peft

    import lorakit as lk

    family = exchange.FAMILIES[model]
    pipe = exchange.attached(family, kind)
    ours, adapter = exchange.predict(family, pipe), lk.capture(pipe)
    cells = []
    for format in FORMATS:
        if format != "diffusers" and kind not in family.forms.get(format, ()):
            cells.append("-")
            continue
        adapter.save(folder / f"{format}.safetensors", format)
        theirs = family.pipe()
        theirs.load_lora_weights(str(folder), weight_name=f"{format}.safetensors")
        off = (exchange.predict(family, theirs) - ours).abs().max()
        cells.append(f"{2 * exchange.placed(theirs)} of {2 * len(adapter.updates)}, {off:.1g}")
    expected = from_peft(family, kind, folder / "back", alphas=True)
    back, read = family.pipe(), lk.Adapter.load(folder / "back")
    lk.attach(back, read)
    off = (exchange.predict(family, back) - expected).abs().max()
    return [*cells, f"{2 * len(read.updates)}, {off:.1g}"]


if __name__ == "__main__":
    main(sys.argv[1:])
