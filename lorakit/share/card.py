"""Assemble a card: metadata for the hub, the page, and a list of what is missing.

The metadata (YAML at the top) is huggingface_hub's `ModelCardData`, whose fields the hub reads. Only what is certain
goes into it: a base or dataset with a hub id, results (`model-index`) on a dataset with one, a licence that the user
gave.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..bases.load import EMBEDDED
from ..errors import ConfigError
from .page import base_text, data_text, marked, page
from .record import AdapterRecord, mapping, read_record
from .words import hub_id, is_hub_name, last_name, line, number, without_paths

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_TASKS = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}
_LIBRARIES = {"peft": "peft", "diffusers": "diffusers", "kohya": "diffusers", "mlx": "mlx", "gguf": "gguf"}
_METRICS = (("bleu", "BLEU"), ("chrf", "chrF"), ("rouge_l", "ROUGE-L"), ("exact_match", "exact match"))


@dataclass(frozen=True)
class Card:
    """A card. text: the README. missing: what is not known, and the option that provides it. path: where it belongs."""

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
    """Return the card of an adapter: a run's folder, an adapter's folder or file, or a hub id.

    base_model, data: hub ids of the base and the training data, where the run does not name them. evaluation: a file
    with the output of `lorakit eval ... --adapter ADAPTER --json`. evaluated_on: the name or hub id of the rows it was
    measured on. alpha, base: for files that cannot be read without them. Raises ConfigError for a value that the hub
    would reject, AdapterError for a damaged adapter.
    """
    if license is not None and not _LICENSE.fullmatch(license):
        raise ConfigError(
            f"license '{license}': expected one of the hub's identifiers, such as apache-2.0, mit, cc-by-4.0 or other"
        )
    for name, value in (("base model", base_model), ("repository", repository)):
        if value is not None and not is_hub_name(value):
            raise ConfigError(f"{name} '{value}': expected a hub id, OWNER/NAME")
    if evaluated_on is not None and evaluation is None:
        raise ConfigError("the rows of an evaluation are named, but its results are not given\n  give both, or neither")
    eval_file = Path(evaluation).expanduser() if evaluation is not None else None
    record = read_record(source, alpha=alpha, base=base, eval_file=eval_file)
    base_id = base_model or hub_id(record.base)
    name = line(title or (repository or "").partition("/")[2] or _title(record, base_id))
    eval_data = None if evaluated_on is None else data_text(record, evaluated_on)
    text = page(record, name, repository, base_id, description, data_text(record, data), eval_data)
    front = _metadata(record, name, license, base_id, data, evaluated_on)
    home = record.path if record.path.is_dir() else record.path.parent
    path = home / ("README.md" if record.file is None else f"{record.path.stem}.README.md")
    missing = _missing(record, license, description, base_id, data, repository, evaluated_on)
    return Card(marked(f"---\n{front}\n---\n\n{text}"), missing, path)


def _title(record: AdapterRecord, base: str | None) -> str:
    """Return the title that the file gives itself, or else one made from the base's name."""
    for key in ("title", "name"):
        if record.facts.training.get(key):
            return str(record.facts.training[key])
    name = (
        base.partition("/")[2]
        if base
        else ""
        if record.base in (None, EMBEDDED)
        else last_name(str(record.base).rstrip("/\\"))
    )
    return f"LoRA for {name}" if name else record.path.stem if record.file else "LoRA adapter"


def _metadata(
    record: AdapterRecord, name: str, license: str | None, base: str | None, data: str | None, evaluated_on: str | None
) -> str:
    """Return the YAML metadata. Every text in it is one line."""
    from huggingface_hub import ModelCardData

    dataset = hub_id(data or record.data.get("id"))
    triggers = record.facts.training.get("trigger words") or []
    results = _eval_results(record, dataset, evaluated_on)
    task = "text-to-image" if record.image else _TASKS.get(str(record.facts.task))
    library = _LIBRARIES.get(record.format)
    if record.image and record.format == "peft":
        library = None  # a pipeline's modules: PEFT alone cannot load them
    is_ours = bool(record.settings) and record.format == "peft"
    card_data = ModelCardData(
        base_model=base,
        base_model_relation="adapter" if base else None,
        library_name=library,
        license=license,
        pipeline_tag=task,
        datasets=[dataset] if dataset else None,
        tags=["lora", *(["lorakit"] if is_ours else []), *(["text-to-image"] if record.image else [])],
        instance_prompt=line(triggers[0]) if triggers else None,
        model_name=name if results else None,
        eval_results=results or None,
    )
    return card_data.to_yaml()


def _eval_results(record: AdapterRecord, dataset: str | None, evaluated_on: str | None) -> list[EvalResult]:
    """Return results on datasets of the hub; results on local files appear on the page only."""
    from huggingface_hub import EvalResult

    task = _TASKS.get(str(record.facts.task))
    if task is None:
        return []
    results: list[tuple[str, str, str, float]] = []  # (dataset, metric type, metric name, value)
    eval_data = hub_id(evaluated_on)
    for row in record.eval_results:
        if eval_data is None or row.get("adapter") is None:
            continue
        values = {"loss": row.get("loss"), "perplexity": row.get("perplexity"), **mapping(row.get("scores"))}
        for key, name in (("loss", "loss"), ("perplexity", "perplexity"), *_METRICS):
            value = number(values.get(key))
            if value is not None:
                results.append((eval_data, key, name, float(value)))
    best = record.best
    if dataset is not None and best is not None:
        for key, kind in (("held_out_loss", "loss"), ("held_out_perplexity", "perplexity")):
            value = number(best.get(key))
            if value is not None:
                results.append((dataset, kind, f"{kind} on rows held out from training", float(value)))
    return [
        EvalResult(
            task_type=task,
            dataset_type=on,
            dataset_name=on,
            metric_type=kind,
            metric_name=name,
            metric_value=round(value, 4),
        )
        for on, kind, name, value in results
    ]


def _missing(
    record: AdapterRecord,
    license: str | None,
    description: str | None,
    base: str | None,
    data: str | None,
    repository: str | None,
    on: str | None,
) -> list[str]:
    """List what is not known, each with the option that provides it."""
    lines = []
    if repository is None:
        lines.append("the repository's name, for the code: `lorakit push` fills it in, or --repository OWNER/NAME")
    if license is None:
        from_file = record.facts.training.get("license")
        note = f" (the file says {line(from_file)!r})" if from_file else ""
        lines.append(f"a licence: --license apache-2.0{note}")
    if description is None:
        lines.append("what it is good for, and what it is not: --description TEXT")
    if base is None:
        name = without_paths(base_text(record, None)) or "not known"
        reason = "is not on the hub" if record.base == EMBEDDED else f"is {name}, not a hub id"
        lines.append(f"the base's hub id (it {reason}), for the link to it: --base-model OWNER/NAME")
    if data is None and not record.data:
        lines.append("the training data: --data NAME or its hub id")
    if not record.eval_results:
        command = "lorakit eval ROWS --adapter ADAPTER --json > eval.json"
        lines.append(f"results on separate test rows: {command}, then --eval eval.json --eval-on NAME")
    elif on is None:
        lines.append("the name of the evaluated rows: --eval-on NAME or a hub id")
    if not record.samples and not record.image:
        lines.append("samples: `lorakit train` takes them (sample_tokens); they are read from the run's folder")
    return lines
