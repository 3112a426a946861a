"""Train runs of a table on the embedded model: one set of settings with several seeds, or several learning rates.

Adapters of one base are trained together (`train/sweep`); methods that change the base are trained one by one. Every
run of a table with the same seed has the same rows in the same order, and all are evaluated on the same held-out rows.
Learning rates are chosen on other rows and with another seed than those that are compared.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import StoppedError, TrainError
from ..io.atomic import write_text
from ..methods import method_of
from ..reproduce.demo import ASSETS, ROWS_FILE, judge, write_rows
from .nist import nist
from .work import Work

# Steps of 4 rows, because at this size the number of updates matters more than their noise, and a run has to end within
# seconds. A run that diverges goes on: that a setting does so is a result.
COMMON: dict[str, Any] = {
    "batch_size": 4,
    "patience": 0,
    "sample_tokens": 0,
    "precision": "fp32",
    "threads": 1,
    "memory": "unchecked",
    "keep_best": False,
    "diverged": "continue",
}
RATES = (4e-3, 8e-3, 1.6e-2, 3.2e-2)  # around the best for LoRA on q and v after 60 steps of 4 rows
TRAIN, HELD_OUT = 1000, 72  # rows, spread over the demo's: enough for 250 steps; an evaluation takes about a second
TUNING_SEED = 7  # not among the seeds that are compared

Settings = Mapping[str, Any]
Run = dict[str, Any]  # seed, loss (held out), trainable, folder (of the result), failed (why, or None)


def train_seeds(work: Work, name: str, settings: Settings, seeds: int | None = None) -> list[Run]:
    """Train once per seed, from 0, and return the runs. `name`: of the part; unique in the table."""
    count = work.budget.seeds if seeds is None else seeds
    assert count is not None
    own = settings_of(work, settings)
    return work.cell(name, lambda: _all_ended(name, _train(work, name, own, "seed", list(range(count)))), [own, count])


def train_stable(work: Work, name: str, settings: Settings) -> tuple[list[Run], float]:
    """Train once per seed; if a seed ends with a larger loss than the base's, all of them again at half the rate.

    Several settings share a learning rate in a table, which may be too high for one of them: a rank of 1 with alpha 32
    has the scale of 32. Returns the runs and their rate.
    """
    rate = float(settings["learning_rate"])
    runs = train_seeds(work, name, settings)
    held_out = e2e_files(work.folder)["validation"]
    while max(run["loss"] for run in runs) > work.cell("loss of the base", partial(base_loss, work.folder), held_out):
        rate /= 2
        runs = train_seeds(work, f"{name}, learning rate {rate:g}", {**settings, "learning_rate": rate})
    return runs, rate


def base_loss(folder: Path) -> float:
    """Return the loss of the base on the held-out rows."""
    import torch

    from ..bases.load import EMBEDDED, load_model, load_tokenizer
    from ..data.dataset import build
    from ..data.read import read_rows
    from ..tasks.text.perplexity import perplexity

    tokenizer = load_tokenizer(EMBEDDED)
    items = build(read_rows(e2e_files(folder)["validation"]), tokenizer).items
    return perplexity(load_model(EMBEDDED, torch.float32, torch.device("cpu")), items, tokenizer.pad_token_id).loss


def tune_rate(
    work: Work, name: str, settings: Settings, rates: Sequence[float] = RATES, steps: int | None = None
) -> dict[str, Any]:
    """Train one run per learning rate and return the best one, whether it is at the edge, and all losses.

    `steps`: of a run; the budget's by default. The runs have a seed that is not compared, and rows of their own on
    which their losses are compared (`tuning_rows`).
    """
    own = settings_of(work, {**settings, "steps": steps or work.budget.steps, "seed": TUNING_SEED})
    own["validation"] = str(tuning_rows(work.folder))

    def compute() -> dict[str, Any]:
        runs = _train(work, name, own, "learning_rate", list(rates))
        tried = [(run["learning_rate"], run["loss"]) for run in runs]
        losses = {rate: loss for rate, loss in tried if loss is not None}
        if not losses:
            raise TrainError(f"{name}: training failed with each of {list(rates)}: {runs[0]['failed']}")
        best = min(losses, key=lambda rate: losses[rate])
        return {"rate": best, "edge": best in (min(rates), max(rates)), "tried": tried}

    return work.cell(name, compute, [own, list(rates)])


def settings_of(work: Work, settings: Settings) -> dict[str, Any]:
    """Return all settings of a table's run that its own are a part of."""
    steps = settings.get("steps", work.budget.steps)
    return COMMON | {"steps": steps, "eval_every": steps, "save_every": steps} | e2e_files(work.folder) | dict(settings)


def _all_ended(name: str, runs: list[Run]) -> list[Run]:
    """Return the runs. Raises TrainError if one of them failed."""
    for run in runs:
        if run["loss"] is None:
            raise TrainError(f"{name}, seed {run['seed']}: {run['failed'] or 'the held-out loss is not finite'}")
    return runs


def show_rate(tuned: Mapping[str, Any]) -> str:
    """Format a tuned learning rate, and say so if it is at the edge of those tried."""
    return f"{tuned['rate']:g}" + " (at the edge of those tried)" * tuned["edge"]


def _train(work: Work, name: str, own: Settings, axis: str, values: list[Any]) -> list[Run]:
    """Train one run per value of the setting `axis`. `own`: all other settings. Raises StoppedError on a signal."""
    from ..train.config import TrainConfig

    folder = work.runs / _folder_name(name)
    probe = TrainConfig(**{**own, axis: values[0]})
    runs = (
        _one_by_one(own, axis, values, folder)
        if method_of(probe.method).alone(probe) or len(values) == 1
        else _together(own, axis, values, folder)
    )
    for checkpoints in folder.rglob("checkpoints"):
        shutil.rmtree(checkpoints)  # the results are kept
    return runs


def _together(own: Settings, axis: str, values: list[Any], folder: Path) -> list[Run]:
    from ..train.sweep.sweep import sweep
    from ..train.sweep.sweep_config import expand
    from ..train.sweep.sweep_progress import SweepProgress

    outcome = sweep(expand({**own, axis: values, "out": str(folder)}), SweepProgress(quiet=True))
    if outcome.stopped:
        raise StoppedError(_stopped(outcome.stopped), outcome.stopped)
    by_value = {entry.settings[axis]: entry for entry in outcome.entries}
    return [
        {
            axis: value,
            "loss": _loss(by_value[value].held_out_loss),
            "trainable": by_value[value].trainable,
            "folder": by_value[value].adapter,
            "failed": by_value[value].failed,
        }
        for value in values
    ]


def _one_by_one(own: Settings, axis: str, values: list[Any], folder: Path) -> list[Run]:
    from ..train.config import TrainConfig
    from ..train.progress import Progress
    from ..train.train import train

    runs = []
    for value in values:
        config = TrainConfig(**{**own, axis: value, "out": str(folder / f"{axis}={value}")})
        try:
            result = train(config, Progress(quiet=True))
        except TrainError as error:  # the loss became NaN, as a rate that is too high may have it
            runs.append({axis: value, "loss": None, "trainable": None, "folder": None, "failed": str(error)})
            continue
        if result.adapter is None:
            raise StoppedError(_stopped(result.stopped or ""), result.stopped or "")
        run = {axis: value, "loss": _loss(result.best_loss), "folder": str(result.adapter), "failed": None}
        runs.append(run | {"trainable": trainable(config)})
    return runs


def trainable(config: Any) -> int:
    """Count the trained parameters of a run on shapes, without training it."""
    import torch

    from ..train.memory import planner_for

    return planner_for(config, torch.float32, torch.device("cpu")).shell.trained_parameters


def e2e_files(folder: Path, train: int = TRAIN) -> dict[str, str]:
    """Write `train` rows of E2E and the held-out rows as files, and return them as a run's settings.

    The held-out rows do not depend on `train`, and fewer training rows are the first ones of more.
    """
    lines = _rows(folder)
    paths = {"validation": folder / "held-out.jsonl", "data": folder / f"train-{train}.jsonl"}
    for path, own in zip(paths.values(), (lines[:HELD_OUT], lines[HELD_OUT:][:train]), strict=True):
        if not path.exists():
            write_text(path, "".join(own))
    return {name: str(path) for name, path in paths.items()}


def tuning_rows(folder: Path) -> Path:
    """Write the rows of E2E on which learning rates are chosen: the last ones, as many as are held out.

    They are neither held out nor, up to 3,480 training rows, trained on.
    """
    path = folder / "tuning.jsonl"
    if not path.exists():
        write_text(path, "".join(_rows(folder)[-HELD_OUT:]))
    return path


def _rows(folder: Path) -> list[str]:
    """Return the demo's rows, always in the same random order."""
    rows = (folder / ROWS_FILE).read_text(encoding="utf8") if (folder / ROWS_FILE).exists() else None
    lines = (rows or write_rows(folder).read_text(encoding="utf8")).splitlines(keepends=True)
    random.Random(0).shuffle(lines)
    return lines


def scored(
    work: Work, name: str, runs: Sequence[Run], settings: Settings, tests: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Generate texts for the test rows with each run's result, and score them. `name`: the part that trained them."""

    def scores(run: Run) -> dict[str, Any]:
        model = load_result(run, settings)
        found = scores_of(model, tests)
        if method_of(settings.get("method", "lora")).result == "model":
            shutil.rmtree(run["folder"])  # 24 MB each
        return found

    own = settings_of(work, settings)
    return [
        work.cell(f"{name}, texts of seed {run['seed']}", partial(scores, run), [own, run["loss"], list(tests)])
        for run in runs
    ]


def load_result(run: Run, settings: Settings) -> Any:
    """Load the model that a run trained: the base with the adapter attached, or a model of its own."""
    import torch

    from ..adapter.adapter import Adapter
    from ..bases.load import EMBEDDED, load_model
    from ..model.attach import attach

    if method_of(settings.get("method", "lora")).result == "model":
        return load_model(run["folder"], torch.float32, torch.device("cpu"))
    model = load_model(EMBEDDED, torch.float32, torch.device("cpu"))
    attach(model, Adapter.load(run["folder"]))
    return model


def scores_of(model: Any, tests: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Generate texts for the test rows, and score them against all references."""
    from ..bases.load import EMBEDDED, load_tokenizer

    texts, score = judge(model, load_tokenizer(EMBEDDED), list(tests), "", 0.0)
    own = nist(texts, [test["references"] for test in tests])
    return {"bleu": score.bleu, "rouge_l": score.rouge_l, "nist": own}


def test_rows(count: int) -> list[dict[str, Any]]:
    """Return `count` rows of E2E's test set, spread evenly over it: its rows are ordered by their properties."""
    rows = [json.loads(line) for line in (ASSETS / "test.jsonl").read_text(encoding="utf8").splitlines()]
    count = min(count, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def _folder_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-." else "-" for c in name)


def _loss(value: float | None) -> float | None:
    return None if value is None else round(value, 5)


def _stopped(signal: str) -> str:
    return f"stopped by {signal}; the same command goes on where it stopped"
