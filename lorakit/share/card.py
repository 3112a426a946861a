"""The whole card: metadata for the hub, the page, and what could not be said.

The metadata (YAML at the top) is huggingface_hub's `ModelCardData`, whose fields the hub knows. Only what is certain goes into it: a
base or a dataset that has a hub id, results (`model-index`) on a dataset that has one, a licence that somebody gave.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..bases.load import EMBEDDED
from ..errors import ConfigError
from .known import Known, known, mapping
from .page import base_text, data_text, marked, page
from .words import hub_id, is_hub_name, last_name, line, number, without_paths

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_TASKS = {
    "CAUSAL_LM": "text-generation", "SEQ_CLS": "text-classification", "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering", "FEATURE_EXTRACTION": "feature-extraction",
}  # fmt: skip
_LIBRARIES = {"peft": "peft", "diffusers": "diffusers", "kohya": "diffusers", "mlx": "mlx", "gguf": "gguf"}
_METRICS = (("bleu", "BLEU"), ("chrf", "chrF"), ("rouge_l", "ROUGE-L"), ("exact_match", "exact match"))


@dataclass(frozen=True)
class Card:
    """`text`: the README. `missing`: what it could not say, each with the way to give it. `path`: where it belongs."""

    text: str
    missing: list[str]
    path: Path


def card_of(
    source: str | Path,
    *,
    title: str | None = None,
    description: str | None = None,
    license: str | None = None,
    base_model: str | None = None,
    data: str | None = None,
    repository: str | None = None,
    evaluation: str | Path | None = None,
    evaluated_on: str | None = None,
    alpha: float | None = None,
    base: Path | None = None,
) -> Card:
    """The card of an adapter (a run's folder, an adapter's folder or file, a hub id).

    base_model, data: hub ids of the base and the training data, where they are not known from the run. evaluation: a file with what
    `lorakit eval ... --adapter ADAPTER --json` printed, on the rows called `evaluated_on`. `alpha` and `base` are for files that need
    them to be read. ConfigError for a value that the hub would not take, AdapterError for an adapter that is not sound.
    """
    if license is not None and not _LICENSE.fullmatch(license):
        raise ConfigError(f"license '{license}': expected one of the hub's identifiers, such as apache-2.0, mit, cc-by-4.0 or other")
    for name, value in (("base model", base_model), ("repository", repository)):
        if value is not None and not is_hub_name(value):
            raise ConfigError(f"{name} '{value}': expected a hub id, OWNER/NAME")
    if evaluated_on is not None and evaluation is None:
        raise ConfigError("the rows of an evaluation are named, and its results are not given\n  give both, or neither")
    told = known(source, alpha=alpha, base=base, judged=Path(evaluation).expanduser() if evaluation is not None else None)
    base_id = base_model or hub_id(told.base)
    name = line(title or (repository or "").partition("/")[2] or _title(told, base_id))
    judged_on = None if evaluated_on is None else data_text(told, evaluated_on)
    text = page(told, name, repository, base_id, description, data_text(told, data), judged_on)
    front = _metadata(told, name, license, base_id, data, evaluated_on)
    home = told.path if told.path.is_dir() else told.path.parent
    path = home / ("README.md" if told.file is None else f"{told.path.stem}.README.md")
    missing = _missing(told, license, description, base_id, data, repository, evaluated_on)
    return Card(marked(f"---\n{front}\n---\n\n{text}"), missing, path)


def _title(told: Known, base: str | None) -> str:
    """What the file calls itself, or what it is."""
    for key in ("title", "name"):
        if told.facts.training.get(key):
            return str(told.facts.training[key])
    name = base.partition("/")[2] if base else "" if told.base in (None, EMBEDDED) else last_name(str(told.base).rstrip("/\\"))
    return f"LoRA for {name}" if name else told.path.stem if told.file else "LoRA adapter"


def _metadata(told: Known, name: str, license: str | None, base: str | None, data: str | None, evaluated_on: str | None) -> str:
    """The YAML. Every text in it is one line."""
    from huggingface_hub import ModelCardData

    dataset = hub_id(data or told.data.get("id"))
    triggers = told.facts.training.get("trigger words") or []
    results = _eval_results(told, dataset, evaluated_on)
    task = "text-to-image" if told.image else _TASKS.get(str(told.facts.task))
    library = _LIBRARIES.get(told.format)
    if told.image and told.format == "peft":
        library = None  # the modules of a pipeline: PEFT alone does not load them
    made = ModelCardData(
        base_model=base,
        base_model_relation="adapter" if base else None,
        library_name=library,
        license=license,
        pipeline_tag=task,
        datasets=[dataset] if dataset else None,
        tags=["lora", *(["lorakit"] if told.settings and told.format == "peft" else []), *(["text-to-image"] if told.image else [])],
        instance_prompt=line(triggers[0]) if triggers else None,
        model_name=name if results else None,
        eval_results=results or None,
    )
    return made.to_yaml()


def _eval_results(told: Known, dataset: str | None, evaluated_on: str | None) -> list[EvalResult]:
    """Results on datasets of the hub; what was measured on a file of one's own is on the page alone."""
    from huggingface_hub import EvalResult

    task = _TASKS.get(str(told.facts.task))
    if task is None:
        return []
    found: list[tuple[str, str, str, float]] = []  # dataset, metric's type, its name, value
    judged_on = hub_id(evaluated_on)
    for row in told.judged:
        if judged_on is None or row.get("adapter") is None:
            continue
        values = {"loss": row.get("loss"), "perplexity": row.get("perplexity"), **mapping(row.get("scores"))}
        for key, name in (("loss", "loss"), ("perplexity", "perplexity"), *_METRICS):
            value = number(values.get(key))
            if value is not None:
                found.append((judged_on, key, name, float(value)))
    best = told.best
    if dataset is not None and best is not None:
        for key, kind in (("held_out_loss", "loss"), ("held_out_perplexity", "perplexity")):
            value = number(best.get(key))
            if value is not None:
                found.append((dataset, kind, f"{kind} on rows held out of the training", float(value)))
    return [
        EvalResult(task_type=task, dataset_type=of, dataset_name=of, metric_type=kind, metric_name=name, metric_value=round(value, 4))
        for of, kind, name, value in found
    ]


def _missing(
    told: Known, license: str | None, description: str | None, base: str | None, data: str | None, repository: str | None, on: str | None
) -> list[str]:
    """What is not known, and how to give it."""
    lines = []
    if repository is None:
        lines.append("the repository's name, for the code: `lorakit push` fills it in, or --repository OWNER/NAME")
    if license is None:
        said = told.facts.training.get("license")
        lines.append(f"a licence: --license apache-2.0{f' (the file says {line(said)!r})' if said else ''}")
    if description is None:
        lines.append("what it is good for, and what not: --description TEXT")
    if base is None:
        shown = without_paths(base_text(told, None)) or "not known"
        reason = "is not on the hub" if told.base == EMBEDDED else f"is {shown}, not a hub id"
        lines.append(f"the base's hub id (it {reason}), which links the two: --base-model OWNER/NAME")
    if data is None and not told.data:
        lines.append("the training data: --data NAME or its hub id")
    if not told.judged:
        lines.append(
            "results on rows of their own: lorakit eval ROWS --adapter ADAPTER --json > eval.json, then --eval eval.json --eval-on NAME"
        )
    elif on is None:
        lines.append("what the evaluated rows are: --eval-on NAME or a hub id")
    if not told.samples and not told.image:
        lines.append("samples: they are taken in `lorakit train` (sample_tokens), and read from the run's folder")
    return lines
