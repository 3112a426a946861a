"""`lorakit demo`: train, evaluate and merge in a few minutes, with the embedded models and data: text, or pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from .shared.output import say
from .shared.starting import starting

FOLDER, IMAGE_FOLDER = Path("lorakit-demo"), Path("lorakit-demo-image")


def demo(
    image: Annotated[
        bool, typer.Option("--image", help="pictures instead of text: a style, a subject and a slider")
    ] = False,
    out: Annotated[Path | None, typer.Option(help=f"the folder to write; default: {FOLDER}, or {IMAGE_FOLDER}")] = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="also run full fine-tuning for the same number of steps; with --image: the subject without prior",
        ),
    ] = False,
    rows: Annotated[int | None, typer.Option(min=1, help="evaluate only the first N test rows (text)")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="number of training steps")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="seed of training and of samples")] = 0,
    force: Annotated[bool, typer.Option("--force", help="start over if the folder exists")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="print the result as JSON")] = False,
) -> None:
    """Fine-tune the embedded model on restaurant descriptions (E2E NLG), evaluate it before and after, save, merge.

    With --image: a style, a subject and a slider for the embedded image model, measured, merged, and one picture.
    """
    if image:
        if rows is not None:
            raise ConfigError("--rows is for the text demo, which has test rows\n  leave it out with --image")
        _of_pictures(out or IMAGE_FOLDER, compare, steps, seed, force, json_output)
    else:
        _of_text(out or FOLDER, compare, rows, steps, seed, force, json_output)


def _folder(out: Path, force: bool, is_ours: Callable[[Path], bool], starts_with: str) -> None:
    """Check that OUT may be written, and empty it with --force. `starts_with`: what the demo writes there first."""
    import shutil

    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; give a folder (--out)")
    if out.exists() and any(path.name != starts_with for path in out.iterdir()) and not is_ours(out):
        # not deleted even with --force
        raise ConfigError(f"{out} is not empty and not a demo's folder; give another (--out)")
    if out.exists() and force:
        shutil.rmtree(out)


def _of_text(
    out: Path, compare: bool, rows: int | None, steps: int | None, seed: int, force: bool, json_output: bool
) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ..reproduce.demo import ROWS_FILE, run

    _folder(out, force, lambda folder: (folder / "run").is_dir(), ROWS_FILE)
    with starting("loading the embedded model"):
        from ..train import loop  # noqa: F401 (imports torch and transformers, which takes seconds)

    console = Console(stderr=json_output)
    outcome = run(
        out,
        compare,
        rows,
        steps,
        seed=seed,
        say=lambda line: console.print(f"\n{line}", highlight=False),
        console=console,
    )
    if json_output:
        print(json.dumps(outcome.to_dict(), ensure_ascii=False))
        return
    for sample in outcome.samples:
        console.print()
        for name, text in sample.items():
            console.print(
                Text(f"{name:>6}  ", style="bold") + Text(text if len(text) < 400 else text[:400] + "…"), soft_wrap=True
            )
    table = Table(title="test set of E2E NLG")
    table.add_column("")
    for column in ("BLEU", "chrF", "ROUGE-L", "slot errors", "training"):
        table.add_column(column, justify="right")
    for s in outcome.scores:
        trained = f"{s.seconds:.0f} s" if s.seconds else ""
        table.add_row(s.name, f"{s.bleu:.1f}", f"{s.chrf:.1f}", f"{s.rouge_l:.1f}", f"{s.slot_errors:.1f} %", trained)
    console.print()
    console.print(table)
    say(f"merged model and adapter: largest difference of the logits {outcome.merged_difference:.2g}")
    say(f"adapter: {outcome.adapter}; merged model: {outcome.merged}; {outcome.seconds:.0f} s in all")
    print(f"next: lorakit generate 'name[Blue Spice], eatType[pub], area[riverside]\\n' --adapter {outcome.adapter}")
    print(f"      lorakit serve embedded --adapter demo={outcome.adapter}     # OpenAI's API on port 8000")
    print("      lorakit train --data YOUR.jsonl --model Qwen/Qwen3-0.6B     # your data, a larger base")


def _of_pictures(out: Path, compare: bool, steps: int | None, seed: int, force: bool, json_output: bool) -> None:
    from rich.console import Console

    from ..reproduce.demo_image import PICTURES, run
    from .shared.demo_figures import lines, table

    _folder(out, force, lambda folder: (folder / PICTURES).is_dir(), PICTURES)
    with starting("loading the embedded image model"):
        from ..train import loop  # noqa: F401 (imports torch and transformers, which takes seconds)

    console = Console(stderr=json_output)
    outcome = run(
        out,
        seed=seed,
        steps=steps,
        compare=compare,
        say=lambda line: console.print(f"\n{line}", highlight=False),
        console=console,
    )
    if json_output:
        print(json.dumps(outcome.to_dict(), ensure_ascii=False))
        return
    console.print()
    console.print(table(outcome))
    for line in lines(outcome):
        say(line)
    style = outcome.adapters[0].files["diffusers"]
    print(f"next: lorakit image generate 'an owl in the snow' 'a cat at night' --adapter {style} --scale 0 0.5 1")
    print("      lorakit image train YOUR_PICTURES --model stable-diffusion-v1-5/stable-diffusion-v1-5     # your data")
