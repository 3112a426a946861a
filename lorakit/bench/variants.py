"""Train the embedded model from bases of several precisions, by several variants of LoRA, each with several seeds.

Every cell trains on the demo's rows (E2E NLG) with the demo's settings but fewer steps, and is judged on the same
test rows. Only the seed differs within a cell: the start, the order of rows. A difference between two cells is above
noise if the paired 95 % interval over the seeds excludes zero (see `train/sweep/noise.py`).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from ..bases.load import EMBEDDED
from ..io.atomic import write_text
from .suite import Row, need

TITLE = (
    "The embedded model (5.9 M parameters) trained on E2E rows: held-out loss, BLEU against all references, bytes of "
    "the base and of\n"
    "the adapter's file, CPU seconds of a run. Means over the seeds, with their standard deviation; 'against lora' is "
    "the difference in loss\n"
    "to LoRA on the same base, 'against fp32' to the same variant on the fp32 base, each with its 95 % interval over "
    "paired seeds."
)
SEEDS, STEPS, TESTS = (0, 1, 2), 100, 70
QUICK_SEEDS, QUICK_STEPS, QUICK_TESTS = (0, 1), 4, 4
BASES: Mapping[str, Mapping[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    "int8": {"precision": "fp32", "quantize": "int8"},
    "nf4": {"precision": "fp32", "quantize": "nf4", "double": False},
    "nf4 double": {"precision": "fp32", "quantize": "nf4", "double": True},
}
# Each variant's best of 1e-3, 2e-3, 4e-3 and 8e-3 on the fp32 base with another seed (LoftQ's is LoRA's):
# lorakit sweep --data e2e-rows.jsonl --variant lora,dora,pissa --lr 1e-3,2e-3,4e-3,8e-3 --steps 100 --eval-every 100
# --batch-size 8 --validation 0.02 --patience 0 --seed 7 --precision fp32
RATES = {"lora": 8e-3, "dora": 8e-3, "pissa": 4e-3, "loftq": 8e-3}
VARIANTS = tuple(RATES)
REFERENCE_BASE, REFERENCE_VARIANT = "fp32", "lora"
JUDGED = "judged.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs; finished ones are not repeated")
    parser.add_argument("--bases", nargs="+", choices=BASES, default=list(BASES))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--quick", action="store_true", help="two seeds, few steps: whether it runs")
    args = parser.parse_args()
    from rich.console import Console

    from .suite import machine, machine_line, table

    rows = run(args.out, args.bases, args.variants, args.quick)
    console = Console(width=160)
    console.print(machine_line(machine()), highlight=False)
    console.print(TITLE, highlight=False)
    console.print(table(rows))


def run(out: Path, bases: Sequence[str] = tuple(BASES), variants: Sequence[str] = VARIANTS, quick: bool = False):
    """Train and judge all cells, and return a row for each. `out`: the folder of their runs."""
    if any("quantize" in BASES[base] for base in bases):
        need("bitsandbytes")
    from ..reproduce.demo import write_rows

    data = write_rows(out)
    seeds, steps, tests = (QUICK_SEEDS, QUICK_STEPS, QUICK_TESTS) if quick else (SEEDS, STEPS, TESTS)
    cells: dict[tuple[str, str], list[Row]] = {}
    for base in bases:
        for variant in variants:
            if variant == "loftq" and "quantize" not in BASES[base]:
                continue  # it starts from what quantization changed
            folders = {seed: out / base.replace(" ", "-") / variant / str(seed) for seed in seeds}
            cells[base, variant] = [
                _judged(BASES[base], variant, seed, data, steps, tests, folder) for seed, folder in folders.items()
            ]
    return [_row(base, variant, cells) for base, variant in cells]


def _judged(settings: Mapping[str, Any], variant: str, seed: int, data: Path, steps: int, tests: int, out: Path) -> Row:
    """Train an adapter and judge it, unless that has been done in this folder."""
    if (out / JUDGED).exists():
        return json.loads((out / JUDGED).read_text(encoding="utf8"))
    from ..adapter.adapter import Adapter
    from ..bases.load import load_tokenizer
    from ..model.attach import attach
    from ..reproduce.demo import ASSETS, SETTINGS, judge
    from ..train.config import TrainConfig
    from ..train.progress import Progress
    from ..train.train import train

    own = SETTINGS | {"steps": steps, "eval_every": steps, "save_every": steps, "threads": 1}
    own["learning_rate"] = RATES[variant]
    began = time.process_time()
    result = train(
        TrainConfig(**own, **settings, variant=variant, seed=seed, data=str(data), out=str(out)), Progress(quiet=True)
    )
    seconds = time.process_time() - began
    if result.adapter is None:
        raise SystemExit(f"stopped by {result.stopped}; the same command goes on")
    model = _base(settings)
    size = _saved_bytes(model)
    attach(model, Adapter.load(result.adapter))
    rows = [json.loads(line) for line in (ASSETS / "test.jsonl").read_text(encoding="utf8").splitlines()][:tests]
    _, score = judge(model, load_tokenizer(EMBEDDED), rows, variant, seconds)
    judged = {
        "loss": result.best_loss,
        "bleu": score.bleu,
        "base": size,
        "adapter": sum(file.stat().st_size for file in result.adapter.glob("*.safetensors")),
        "seconds": seconds,
    }
    write_text(out / JUDGED, json.dumps(judged) + "\n")
    return judged


def _base(settings: Mapping[str, Any]) -> Any:
    """Load the embedded model as a run with these settings does."""
    import torch

    from ..bases.load import load_base

    dtype = torch.bfloat16 if settings["precision"] == "bf16" else torch.float32
    quantization = {name: value for name, value in settings.items() if name in ("quantize", "double")}
    return load_base(EMBEDDED, dtype=dtype, device=torch.device("cpu"), **quantization)


def _saved_bytes(model: Any) -> int:
    """Return the bytes of the model's weights in files, with the scales and tables of quantized ones."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def _row(base: str, variant: str, cells: Mapping[tuple[str, str], Sequence[Row]]) -> Row:
    own = cells[base, variant]
    losses, bleus = ([each[name] for each in own] for name in ("loss", "bleu"))
    return {
        "base": base,
        "variant": variant,
        "held-out loss": _with_deviation(losses, 4),
        "against lora": _against(own, cells.get((base, REFERENCE_VARIANT))) if variant != REFERENCE_VARIANT else "",
        "against fp32": _against(own, cells.get((REFERENCE_BASE, variant))) if base != REFERENCE_BASE else "",
        "BLEU": _with_deviation(bleus, 1),
        "base MB": f"{own[0]['base'] / 1e6:.2f}",
        "adapter MB": f"{own[0]['adapter'] / 1e6:.2f}",
        "CPU s": median(each["seconds"] for each in own),
        "losses": losses,
        "bleus": bleus,
    }


def _with_deviation(values: Sequence[float], digits: int) -> str:
    return f"{fmean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def _against(own: Sequence[Row], other: Sequence[Row] | None) -> str:
    """Format the mean difference in loss over paired seeds, and say whether it is above their noise."""
    from ..train.sweep.noise import half_interval

    if other is None:
        return ""
    differences = [a["loss"] - b["loss"] for a, b in zip(own, other, strict=True)]
    mean, within = fmean(differences), half_interval(differences)
    assert within is not None
    verdict = "noise" if abs(mean) <= within else "worse" if mean > 0 else "better"
    return f"{mean:+.4f} ± {within:.4f} {verdict}"


if __name__ == "__main__":
    main()
