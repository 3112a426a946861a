"""Collect what is known about an adapter: its tensors, its file's metadata, its run's folder, and what the user says.

    RUN/config.yaml       the settings; "auto" where lorakit chose
        metrics.jsonl     {"step", "loss", "learning_rate", "tokens", "seconds"} and
                          {"step", "held_out_loss", "held_out_perplexity"}
        samples/          the newest file: [{"prompt", "base", "tuned"}]
        adapter/          the adapter, with the recipe and the data's hash in lorakit.json

All of it but the user's words is untrusted input, so every value's type is checked before use.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..analysis.inspect import AdapterFacts, describe_adapter
from ..errors import AdapterError, ConfigError
from ..formats import FOLDERS, TAKES_ALPHA, find, format_of, load
from ..io.json_object import read_json
from ..module_names import is_language_trunk
from ..tasks import task_names, task_of, task_of_adapter
from ..tasks.preferences.settings import LossSettings
from ..train.run_folder import RunFolder
from .paths import hub_id

MAX_SAMPLES = 3
IMAGE_PARTS = ("unet.", "transformer.", "text_encoder.", "text_encoder_2.", "text_encoder_3.")
SETTINGS = (
    *("learning_rate", "schedule", "warmup", "batch_size", "epochs", "weight_decay", "dropout"),
    *("max_length", "train_on", "precision", "quantize", "seed"),
)


@dataclass(frozen=True)
class Given:
    """What the user says about an adapter; `card_of` explains each."""

    title: str | None = None
    description: str | None = None
    license: str | None = None
    base_model: str | None = None
    data: str | None = None
    repository: str | None = None
    evaluated_on: str | None = None


@dataclass(frozen=True)
class AdapterRecord:
    """Everything a card can say. `path`: the adapter's folder or file. `seconds`: the training's."""

    path: Path
    format: str
    facts: AdapterFacts
    given: Given
    base: str | None
    settings: dict[str, Any]
    data: dict[str, Any]  # name, hash, rows, template, labels; id and split from the run's folder
    steps: int | None = None
    seconds: float | None = None
    tokens: int | None = None
    held_out: list[dict[str, Any]] = field(default_factory=list)  # step, and the measures
    samples: list[tuple[str, str, str]] = field(default_factory=list)  # (prompt, the base's answer, the adapter's)
    samples_from: str = "at the end of training"
    eval_results: list[dict[str, Any]] = field(
        default_factory=list
    )  # of `lorakit eval`: adapter, rows, tokens, and the measures

    @property
    def file(self) -> str | None:
        """The file's name, for formats of a single file."""
        return self.path.name if self.path.is_file() and self.format not in FOLDERS else None

    @property
    def image(self) -> bool:
        """Whether the base is an image model."""
        names = [m.name for m in self.facts.modules if m.name.startswith(IMAGE_PARTS)]
        return self.format == "cloneofsimo" or (bool(names) and not any(is_language_trunk(name) for name in names))

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
    def outputs(self) -> int | None:
        """How many outputs a head without label names has, as for regression."""
        found = number(self.data.get("num_labels"))
        return None if self.labels or found is None else int(found)

    @property
    def model_class(self) -> str | None:
        """Transformers' class for the base with the head, where PEFT's type does not tell."""
        name = self.data.get("model_class")
        return name if isinstance(name, str) and name.isidentifier() and name.startswith("AutoModel") else None

    @property
    def key_mapping(self) -> list[tuple[str, str]]:
        """What a base's names are called in the class with the head, for transformers' `from_pretrained`."""
        return [(own, other) for own, other in mapping(self.data.get("key_mapping")).items() if isinstance(other, str)]

    @property
    def base_id(self) -> str | None:
        """The base's hub id, if it has one."""
        return self.given.base_model or hub_id(self.base)

    @property
    def best(self) -> dict[str, Any] | None:
        """The evaluation with the lowest held-out loss; the adapter has that step's parameters."""
        return min(self.held_out, key=lambda row: row["loss"], default=None)


def read_record(
    source: str | Path,
    given: Given,
    *,
    alpha: float | None = None,
    base: Path | None = None,
    eval_file: Path | None = None,
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
    known: dict[str, Any] = {
        "base": facts.base,
        "settings": {k: recipe[k] for k in SETTINGS if k in recipe} | _loss_of(mapping(facts.metadata.get("data"))),
        "data": dict(mapping(facts.metadata.get("data"))),
        "steps": int(number(metrics.get("steps")) or 0) or None,
    }
    run = RunFolder(home.parent)
    if home.name == "adapter" and run.config.is_file() and run.metrics.is_file():
        known |= _from_run(run, known, task_of_adapter(facts.task, facts.metadata))
    elif held_out := number(metrics.get("held_out_loss")):
        known["held_out"] = [{"loss": held_out}]
    if eval_file is not None:
        known["eval_results"], samples = _from_eval(eval_file)
        if samples and not known.get("samples"):
            known |= {"samples": samples, "samples_from": "to prompts of the evaluated rows"}
    return AdapterRecord(path, form, facts, given, **known)


def _from_run(run: RunFolder, known: Mapping[str, Any], task: str | None) -> dict[str, Any]:
    """Return the fields of `AdapterRecord` that a run's folder provides, completed by what is known already."""
    try:
        config = mapping(yaml.safe_load(run.config.read_text(encoding="utf8")))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise AdapterError(
            f"{run.config} cannot be read: {' '.join(str(error).split())}\n"
            "  copy the adapter's folder out of the run's folder, and give the copy"
        ) from error
    rows = _mappings(run.rows())
    trained = [row for row in rows if number(row.get("loss")) is not None]
    last = trained[-1] if trained else {}
    settings = {k: config[k] for k in SETTINGS if config.get(k) not in (None, "auto", "")}
    rates = [r for r in (number(row.get("learning_rate")) for row in trained) if r is not None]
    if rates:  # where it was auto: the schedule's peak
        settings.setdefault("learning_rate", max(rates))
    return {
        "base": known["base"] or config.get("model"),
        "settings": {k: v for k, v in settings.items() if k not in _of_other_tasks(task)} | _loss_of(known["data"]),
        "data": {"id": config.get("data"), "split": config.get("split"), **known["data"]},
        "steps": known["steps"] or number(last.get("step")),
        "seconds": number(last.get("seconds")),
        "tokens": sum(int(number(row.get("tokens")) or 0) for row in trained) or None,
        "held_out": [_held_out(row) for row in rows if number(row.get("held_out_loss")) is not None],
        "samples": _samples(run),
    }


def _loss_of(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the loss of preferences and its settings, as the record of a run's data has them."""
    own = mapping(data.get("preference"))
    return {name: own[name] for name in LossSettings.model_fields if isinstance(own.get(name), str | int | float)}


def _held_out(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a measurement on held-out rows with plain keys: `loss` for `held_out_loss`."""
    names = {key: key.removeprefix("held_out_") for key in row if key == "step" or key.startswith("held_out_")}
    return {name: row[key] for key, name in names.items()}


def _of_other_tasks(own: str | None) -> set[str]:
    """Return the settings that only tasks other than the adapter's own ask for."""
    fields = {name: set(task_of(name).settings.model_fields) for name in task_names()}
    return set().union(*fields.values()) - fields[own] if own else set()


def _samples(run: RunFolder) -> list[tuple[str, str, str]]:
    """Return the newest samples of a run that are texts. Raises AdapterError for a file that is not JSON."""
    files = [(step, path) for step, path in run.sampled() if path.suffix == ".json"]  # others are pictures
    try:
        rows = json.loads(files[-1][1].read_text(encoding="utf8")) if files else []
    except (OSError, ValueError) as error:
        why = f"{files[-1][1]} cannot be read: {error}"
        raise AdapterError(f"{why}\n  remove it to write the card without samples") from error
    return _texts([[row.get(key) for key in ("prompt", "base", "tuned")] for row in _mappings(rows)])


def _from_eval(path: Path) -> tuple[list[dict[str, Any]], list[tuple[str, str, str]]]:
    """Read the base's and the adapter's results, and sample answers, from the output of `lorakit eval --json`."""
    output = read_json(path)
    rows = [row for row in _mappings(output.get("results")) if number(row.get("loss")) is not None]
    if sum(row.get("adapter") is not None for row in rows) != 1:
        raise ConfigError(
            f"{path}: expected the results of one adapter, as `lorakit eval ROWS --adapter ADAPTER --json` prints them"
        )
    answers = []
    for row in _mappings(output.get("samples")):
        texts = {text.get("adapter") is None: text.get("text") for text in _mappings(row.get("texts"))}
        answers.append([row.get("prompt"), texts.get(True), texts.get(False)])
    return [row | mapping(row.get("scores")) for row in rows], _texts(answers)


def _texts(rows: Sequence[Sequence[Any]]) -> list[tuple[str, str, str]]:
    """Return the first rows that are three texts."""
    return [(p, b, t) for p, b, t in rows if all(isinstance(text, str) for text in (p, b, t))][:MAX_SAMPLES]


def number(value: Any) -> float | int | None:
    """Return `value` if it is a finite number, otherwise None."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None


def mapping(value: Any) -> dict[str, Any]:
    """Return `value` if it is a mapping, otherwise an empty one."""
    return dict(value) if isinstance(value, Mapping) else {}


def _mappings(value: Any) -> list[dict[str, Any]]:
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []
