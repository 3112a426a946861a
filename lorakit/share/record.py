"""Collect what is known about an adapter: its tensors, its file's metadata, and its run's folder if there is one.

    RUN/config.yaml       the settings; "auto" where lorakit chose
        metrics.jsonl     {"step", "loss", "learning_rate", "tokens", "seconds"} and
                          {"step", "held_out_loss", "held_out_perplexity"}
        samples/          the newest file: [{"prompt", "base", "tuned"}]
        adapter/          the adapter, with the recipe and the data's hash in lorakit.json

All of it is untrusted input, so every value's type is checked before use.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..analysis.inspect import AdapterFacts, describe_adapter
from ..errors import AdapterError, ConfigError
from ..formats import FOLDERS, TAKES_ALPHA, find, format_of, load
from ..io.json_object import read_json
from ..tasks import task_for, task_names, task_of
from ..train.run_folder import RunFolder
from .words import number

MAX_SAMPLES = 3
IMAGE_PARTS = ("unet.", "transformer.", "text_encoder.", "text_encoder_2.", "text_encoder_3.")
SETTINGS = (
    "learning_rate",
    "schedule",
    "warmup",
    "batch_size",
    "epochs",
    "weight_decay",
    "dropout",
    "max_length",
    "train_on",
    "precision",
    "seed",
)


@dataclass(frozen=True)
class AdapterRecord:
    """Everything a card can say. `path`: the adapter's folder or file. Times are in seconds."""

    path: Path
    format: str
    facts: AdapterFacts
    base: str | None
    settings: Mapping[str, Any] = field(default_factory=dict)
    # name, hash, rows, template; id and split from the run's folder
    data: Mapping[str, Any] = field(default_factory=dict)
    steps: int | None = None
    seconds: float | None = None
    tokens: int | None = None
    held_out: list[Mapping[str, float]] = field(default_factory=list)  # step, held_out_loss, held_out_perplexity
    samples: list[tuple[str, str, str]] = field(default_factory=list)  # (prompt, the base's answer, the adapter's)
    samples_from: str = "at the end of training"
    eval_results: list[Mapping[str, Any]] = field(default_factory=list)  # the results of `lorakit eval --json`

    @property
    def file(self) -> str | None:
        """The file's name, for formats of a single file."""
        return self.path.name if self.path.is_file() and self.format not in FOLDERS else None

    @property
    def image(self) -> bool:
        """Whether the base is an image model."""
        return self.format == "cloneofsimo" or any(m.name.startswith(IMAGE_PARTS) for m in self.facts.modules)

    @property
    def plain_lora(self) -> bool:
        """Whether every update is a pair of low-rank factors."""
        return all(m.kind in ("linear", "embedding", "conv") for m in self.facts.modules)

    @property
    def labels(self) -> list[str]:
        """A classifier's label names, by index."""
        labels = self.data.get("labels")
        return labels if isinstance(labels, list) and all(isinstance(label, str) for label in labels) else []

    @property
    def header(self) -> Mapping[str, Any]:
        """The metadata in the file's header."""
        return mapping(self.facts.metadata.get("header"))

    @property
    def best(self) -> Mapping[str, float] | None:
        """The evaluation with the lowest held-out loss; the adapter has that step's parameters."""
        return min(self.held_out, key=lambda row: row["held_out_loss"], default=None)


def read_record(
    source: str | Path, *, alpha: float | None = None, base: Path | None = None, eval_file: Path | None = None
) -> AdapterRecord:
    """Read an adapter, its run's folder, and the output of `lorakit eval --json` in `eval_file`.

    Raises AdapterError for a damaged adapter, ConfigError for an `eval_file` that is not about one adapter.
    """
    path = find(source)
    form = format_of(path)
    adapter = load(path, alpha=alpha if form in TAKES_ALPHA else None, base=base)
    facts = describe_adapter(adapter, str(path), form=form)
    home = path if path.is_dir() else path.parent
    metrics, recipe = mapping(facts.metadata.get("metrics")), mapping(facts.metadata.get("recipe"))
    steps = number(metrics.get("steps"))
    known: dict[str, Any] = {
        "base": facts.base,
        "settings": {k: recipe[k] for k in SETTINGS if k in recipe},
        "data": dict(mapping(facts.metadata.get("data"))),
        "steps": int(steps) if steps is not None else None,
    }
    run = RunFolder(home.parent)
    if home.name == "adapter" and run.config.is_file() and run.metrics.is_file():
        known |= _from_run(run, known)
        known["settings"] = _of_task(known["settings"], str(facts.task))
    elif held_out := number(metrics.get("held_out_loss")):
        known["held_out"] = [{"held_out_loss": held_out}]
    if eval_file is not None:
        known["eval_results"], samples = _from_eval(eval_file)
        if samples and not known.get("samples"):
            known |= {"samples": samples, "samples_from": "to prompts of the evaluated rows"}
    return AdapterRecord(path, form, facts, **known)


def _from_run(run: RunFolder, known: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `AdapterRecord` that a run's folder provides, completed by what is known already."""
    try:
        config = mapping(yaml.safe_load(run.config.read_text(encoding="utf8")))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise AdapterError(
            f"{run.config} cannot be read: {' '.join(str(error).split())}\n"
            "  copy the adapter's folder out of the run's folder, and give the copy"
        ) from error
    rows = [row for row in run.rows() if isinstance(row, dict)]
    held_out = [row for row in rows if number(row.get("held_out_loss")) is not None]
    trained = [row for row in rows if number(row.get("loss")) is not None]
    settings = {k: config[k] for k in SETTINGS if config.get(k) not in (None, "auto", "")}
    rates = [r for r in (number(row.get("learning_rate")) for row in trained) if r is not None]
    if "learning_rate" not in settings and rates:  # it was auto: take the schedule's peak
        settings["learning_rate"] = max(rates)
    data = {"id": config.get("data"), "split": config.get("split"), **known["data"]}
    last = trained[-1] if trained else {}
    return {
        "base": known["base"] or config.get("model"),
        "settings": settings,
        "data": data,
        "steps": known["steps"] or last.get("step"),
        "seconds": number(last.get("seconds")),
        "tokens": sum(int(number(row.get("tokens")) or 0) for row in trained) or None,
        "held_out": held_out,
        "samples": _samples(run),
    }


def _of_task(settings: Mapping[str, Any], peft_type: str) -> dict[str, Any]:
    """Without what only other tasks ask for."""
    name = task_for(peft_type)
    if name is None:
        return dict(settings)
    own = task_of(name).settings.model_fields
    others = {setting for other in task_names() for setting in task_of(other).settings.model_fields} - own.keys()
    return {setting: value for setting, value in settings.items() if setting not in others}


def _samples(run: RunFolder) -> list[tuple[str, str, str]]:
    files = run.sampled()
    try:
        rows = json.loads(files[-1][1].read_text(encoding="utf8")) if files else []
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"{files[-1][1]} cannot be read: {error}\n  remove it to write the card without samples"
        ) from error
    rows = rows if isinstance(rows, list) else []
    texts = [tuple(mapping(row).get(k) for k in ("prompt", "base", "tuned")) for row in rows]
    samples = [(p, b, t) for p, b, t in texts if isinstance(p, str) and isinstance(b, str) and isinstance(t, str)]
    return samples[:MAX_SAMPLES]


def _from_eval(path: Path) -> tuple[list[Mapping[str, Any]], list[tuple[str, str, str]]]:
    """Read the base's and the adapter's results, and sample answers, from the output of `lorakit eval --json`."""
    output = read_json(path)
    rows = [row for row in _mappings(output.get("results")) if number(row.get("loss")) is not None]
    if sum(row.get("adapter") is not None for row in rows) != 1:
        raise ConfigError(
            f"{path}: expected the results of one adapter, as `lorakit eval ROWS --adapter ADAPTER --json` prints them"
        )
    samples = []
    for row in _mappings(output.get("samples")):
        texts = {text.get("adapter") is None: text.get("text") for text in _mappings(row.get("texts"))}
        answers = (row.get("prompt"), texts.get(True), texts.get(False))
        if all(isinstance(text, str) for text in answers):
            samples.append(answers)
    return rows, samples[:MAX_SAMPLES]  # type: ignore[return-value]


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    return [mapping(row) for row in value] if isinstance(value, list) else []


def mapping(value: Any) -> Mapping[str, Any]:
    """Return `value` if it is a mapping, otherwise an empty one."""
    return value if isinstance(value, Mapping) else {}
