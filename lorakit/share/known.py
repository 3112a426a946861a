"""What is known of an adapter: its tensors, what its file says of itself, and its run's folder where there is one.

    RUN/config.yaml       the settings, "auto" where it was left to lorakit
        metrics.jsonl     {"step", "loss", "learning_rate", "tokens", "seconds"}, and {"step", "held_out_loss", "held_out_perplexity"}
        samples/          the newest: [{"prompt", "base", "tuned"}]
        adapter/          the adapter, with the recipe and the data's hash in lorakit.json

All of it may come from somebody else, so that every value is looked at before it is believed to be a number or a text.
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

MOST_SAMPLES = 3
IMAGE_PARTS = ("unet.", "transformer.", "text_encoder.", "text_encoder_2.", "text_encoder_3.")
SETTINGS = (
    "learning_rate", "schedule", "warmup", "batch_size", "epochs", "weight_decay", "dropout", "max_length", "train_on", "precision", "seed",
)  # fmt: skip


@dataclass(frozen=True)
class Known:
    """All that a card can say. `path`: the adapter's folder or file; `file`: the name of the latter."""

    path: Path
    format: str
    facts: AdapterFacts
    base: str | None
    settings: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)  # name, hash, rows, template; id, split where the run's folder tells
    steps: int | None = None
    seconds: float | None = None
    tokens: int | None = None
    held_out: list[Mapping[str, float]] = field(default_factory=list)  # step, held_out_loss, held_out_perplexity
    samples: list[tuple[str, str, str]] = field(default_factory=list)  # prompt, base's answer, the adapter's
    sampled: str = "at the end of the training"
    judged: list[Mapping[str, Any]] = field(default_factory=list)  # the results of `lorakit eval --json`

    @property
    def file(self) -> str | None:
        return self.path.name if self.path.is_file() and self.format not in FOLDERS else None

    @property
    def image(self) -> bool:
        """Whether it is an adapter of an image model."""
        return self.format == "cloneofsimo" or any(m.name.startswith(IMAGE_PARTS) for m in self.facts.modules)

    @property
    def plain_lora(self) -> bool:
        """Whether all updates are low-rank factors."""
        return all(m.kind in ("linear", "embedding", "conv") for m in self.facts.modules)

    @property
    def labels(self) -> list[str]:
        """A classifier's, by their numbers."""
        found = self.data.get("labels")
        return found if isinstance(found, list) and all(isinstance(label, str) for label in found) else []

    @property
    def header(self) -> Mapping[str, Any]:
        return mapping(self.facts.metadata.get("header"))

    @property
    def best(self) -> Mapping[str, float] | None:
        """The evaluation with the least held-out loss, whose parameters the adapter has."""
        return min(self.held_out, key=lambda row: row["held_out_loss"], default=None)


def known(source: str | Path, *, alpha: float | None = None, base: Path | None = None, judged: Path | None = None) -> Known:
    """Read an adapter and what lies beside it. AdapterError for an adapter that is not sound."""
    path = find(source)
    form = format_of(path)
    adapter = load(path, alpha=alpha if form in TAKES_ALPHA else None, base=base)
    facts = describe_adapter(adapter, str(path), form=form)
    home = path if path.is_dir() else path.parent
    told = facts.metadata
    metrics, recipe = mapping(told.get("metrics")), mapping(told.get("recipe"))
    steps = number(metrics.get("steps"))
    found: dict[str, Any] = {
        "base": facts.base, "settings": {k: recipe[k] for k in SETTINGS if k in recipe}, "data": dict(mapping(told.get("data"))),
        "steps": int(steps) if steps is not None else None, }  # fmt: skip
    run = RunFolder(home.parent)
    if home.name == "adapter" and run.config.is_file() and run.metrics.is_file():
        found |= _of_run(run, found)
        found["settings"] = _of_task(found["settings"], str(facts.task))
    elif held_out := number(metrics.get("held_out_loss")):
        found["held_out"] = [{"held_out_loss": held_out}]
    if judged is not None:
        found["judged"], samples = _judged(judged)
        if samples and not found.get("samples"):
            found |= {"samples": samples, "sampled": "to prompts of the evaluated rows"}
    return Known(path, form, facts, **found)


def _of_run(run: RunFolder, found: Mapping[str, Any]) -> dict[str, Any]:
    try:
        config = mapping(yaml.safe_load(run.config.read_text(encoding="utf8")))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise AdapterError(
            f"{run.config} cannot be read: {' '.join(str(error).split())}\n  give the adapter's folder alone, in a place of its own"
        ) from error
    rows = [row for row in run.rows() if isinstance(row, dict)]
    held_out = [row for row in rows if number(row.get("held_out_loss")) is not None]
    trained = [row for row in rows if number(row.get("loss")) is not None]
    settings = {k: config[k] for k in SETTINGS if config.get(k) not in (None, "auto", "")}
    rates = [r for r in (number(row.get("learning_rate")) for row in trained) if r is not None]
    if "learning_rate" not in settings and rates:  # it was auto: the schedule's peak
        settings["learning_rate"] = max(rates)
    data = {"id": config.get("data"), "split": config.get("split"), **found["data"]}
    last = trained[-1] if trained else {}
    return {
        "base": found["base"] or config.get("model"),
        "settings": settings,
        "data": data,
        "steps": found["steps"] or last.get("step"),
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
        raise AdapterError(f"{files[-1][1]} cannot be read: {error}\n  remove it, and the card has no samples") from error
    rows = rows if isinstance(rows, list) else []
    told = [tuple(mapping(row).get(k) for k in ("prompt", "base", "tuned")) for row in rows]
    return [(p, b, t) for p, b, t in told if isinstance(p, str) and isinstance(b, str) and isinstance(t, str)][:MOST_SAMPLES]


def _judged(path: Path) -> tuple[list[Mapping[str, Any]], list[tuple[str, str, str]]]:
    """The base's and the adapter's results, and sample answers, in what `lorakit eval --json` printed."""
    told = read_json(path)
    rows = [row for row in _mappings(told.get("results")) if number(row.get("loss")) is not None]
    if sum(row.get("adapter") is not None for row in rows) != 1:
        raise ConfigError(
            f"{path}: expected the results of one adapter, as `lorakit eval ROWS --adapter ADAPTER --json` prints them"
        )  # of several, which one is this?
    samples = []
    for row in _mappings(told.get("samples")):
        texts = {text.get("adapter") is None: text.get("text") for text in _mappings(row.get("texts"))}
        answers = (row.get("prompt"), texts.get(True), texts.get(False))
        if all(isinstance(text, str) for text in answers):
            samples.append(answers)
    return rows, samples[:MOST_SAMPLES]  # type: ignore[return-value]


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    return [mapping(row) for row in value] if isinstance(value, list) else []


def mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
