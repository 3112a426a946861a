"""`lorakit demo`: train, evaluate and merge in a few minutes, with the embedded model and data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from .shared.output import say
from .shared.starting import starting


def demo(
    out: Annotated[Path, typer.Option(help="the folder to write")] = Path("lorakit-demo"),
    compare: Annotated[
        bool, typer.Option("--compare", help="also run full fine-tuning for the same number of steps")
    ] = False,
    rows: Annotated[int | None, typer.Option(min=1, help="evaluate only the first N test rows")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="number of training steps")] = None,
    force: Annotated[bool, typer.Option("--force", help="start over if the folder exists")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="print the result as JSON")] = False,
) -> None:
    """Fine-tune the embedded model on restaurant descriptions (E2E NLG), evaluate it before and after, save, merge."""
    import shutil

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ..reproduce.demo import ROWS_FILE, run

    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; give a folder (--out)")
    if out.exists() and any(path.name != ROWS_FILE for path in out.iterdir()) and not (out / "run").is_dir():
        # not deleted even with --force
        raise ConfigError(f"{out} is not empty and not a demo's folder; give another (--out)")
    if out.exists() and force:
        shutil.rmtree(out)

    with starting("loading the embedded model"):
        from ..train import loop  # noqa: F401 (imports torch and transformers, which takes seconds)

    console = Console(stderr=json_output)
    outcome = run(
        out, compare, rows, steps, say=lambda line: console.print(f"\n{line}", highlight=False), console=console
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
    print("      lorakit train --data YOUR.jsonl --model Qwen/Qwen3-0.6B     # your data, a larger base")
