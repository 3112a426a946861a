"""Assemble a card: metadata for the hub, the page, and a list of what is missing; write it to a file.

The metadata (YAML at the top) is huggingface_hub's `ModelCardData`, whose fields the hub reads. Only what is certain
goes into it: a base or dataset with a hub id, results (`model-index`) on a dataset with one, a licence that the user
gave.

The last line marks the page as ours, with the hash of everything before it. So a page that someone else wrote or edited
is recognised, and not replaced without asking.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..bases.load import EMBEDDED
from ..errors import ConfigError
from ..evaluate.figures import MEASURES
from ..io.atomic import write_text
from .markdown import line
from .page import PLACEHOLDER, base_text, class_and_task, page
from .paths import hub_id, is_hub_name, last_name, without_paths
from .record import AdapterRecord, Given, number, read_record

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

_MARK = re.compile(r"<!-- Written by lorakit card, sha256 ([0-9a-f]{64}) -->\s*\Z")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_LIBRARIES = {"peft": "peft", "diffusers": "diffusers", "kohya": "diffusers", "mlx": "mlx", "gguf": "gguf"}


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
    given = Given(title, description, license, base_model, data, repository, evaluated_on)
    eval_file = Path(evaluation).expanduser() if evaluation is not None else None
    record = read_record(source, given, alpha=alpha, base=base, eval_file=eval_file)
    name = line(title or (repository or "").partition("/")[2] or _title(record))
    home = record.path if record.path.is_dir() else record.path.parent
    path = home / ("README.md" if record.file is None else f"{record.path.stem}.README.md")
    return Card(marked(f"---\n{_metadata(record, name)}\n---\n\n{page(record, name)}"), _missing(record), path)


def ours(text: str) -> bool:
    """Whether lorakit wrote this page and nobody has changed it since."""
    mark = _MARK.search(text)
    return mark is not None and marked(text[: mark.start()]) == text


def marked(text: str) -> str:
    """Append the mark to a page."""
    text = text.rstrip() + "\n"
    return f"{text}\n<!-- Written by lorakit card, sha256 {hashlib.sha256(text.encode()).hexdigest()} -->\n"


def with_repository(text: str, repository: str) -> str:
    """Replace the placeholder in a page with our mark by the repository's name; return any other page unchanged."""
    mark = _MARK.search(text)
    if mark is None or PLACEHOLDER not in text:
        return text
    changed = text[: mark.start()].replace(PLACEHOLDER, repository)
    return marked(changed) if ours(text) else changed + text[mark.start() :]


def write(text: str, path: Path, force: bool = False) -> None:
    """Write a card. Raises ConfigError if `path` has a page that lorakit did not write, or that was edited since."""
    if path.is_dir():
        raise ConfigError(f"{path} is a folder\n  give a file (--out {path / 'README.md'})")
    if path.exists() and not force and not ours(path.read_bytes().decode("utf8", errors="replace")):
        raise ConfigError(
            f"{path} was not written by lorakit, or was changed since\n  --force replaces it; --out names another file"
        )
    write_text(path, text)


def _title(record: AdapterRecord) -> str:
    """Return the title that the file gives itself, or else one made from the base's name."""
    own = record.facts.training.get("title") or record.facts.training.get("name")
    if own:
        return str(own)
    base = record.base_id or (record.base if record.base != EMBEDDED else None)
    return f"LoRA for {last_name(base)}" if base else record.path.stem if record.file else "LoRA adapter"


def _metadata(record: AdapterRecord, name: str) -> str:
    """Return the YAML metadata. Every text in it is one line."""
    from huggingface_hub import ModelCardData

    base, dataset = record.base_id, hub_id(record.given.data or record.data.get("id"))
    triggers = record.facts.training.get("trigger words")
    results = _eval_results(record, dataset)
    tags = ["lora", *(["lorakit"] if record.settings and record.format == "peft" else [])]
    is_pipeline = record.image and record.format == "peft"  # a pipeline's modules: PEFT alone cannot load them
    card_data = ModelCardData(
        base_model=base,
        base_model_relation="adapter" if base else None,
        library_name=None if is_pipeline else _LIBRARIES.get(record.format),
        license=record.given.license,
        pipeline_tag="text-to-image" if record.image else _hub_task(record),
        datasets=[dataset] if dataset else None,
        tags=[*tags, *(["text-to-image"] if record.image else [])],
        instance_prompt=line(triggers[0]) if triggers else None,
        model_name=name if results else None,
        eval_results=results or None,
    )
    return card_data.to_yaml()


def _hub_task(record: AdapterRecord) -> str | None:
    return class_and_task(record)[1]


def _eval_results(record: AdapterRecord, dataset: str | None) -> list[EvalResult]:
    """Return results on datasets of the hub; results on local files appear on the page only."""
    from huggingface_hub import EvalResult

    task, evaluated_on = _hub_task(record), hub_id(record.given.evaluated_on)
    scored = {key: name for key, (name, _) in MEASURES.items()}
    held_out = {key: f"{key} on rows held out from training" for key in ("loss", "perplexity")}
    measured = [(evaluated_on, scored, row) for row in record.eval_results if row.get("adapter") is not None]
    measured += [(dataset, held_out, record.best)] if record.best else []
    return [
        EvalResult(task, on, on, metric_type=key, metric_name=name, metric_value=round(float(values[key]), 4))
        for on, names, values in measured
        for key, name in names.items()
        if task and on and number(values.get(key)) is not None
    ]


def _missing(record: AdapterRecord) -> list[str]:
    """List what is not known, each with the option that provides it."""
    given, license = record.given, record.facts.training.get("license")
    from_file = f" (the file says {line(license)!r})" if license else ""
    base = "is not on the hub"
    if record.base != EMBEDDED:
        base = f"is {without_paths(base_text(record)) or 'not known'}, not a hub id"
    results = "lorakit eval ROWS --adapter ADAPTER --json > eval.json, then --eval eval.json --eval-on NAME"
    named = given.evaluated_on or not record.eval_results
    known = {
        "the repository's name, for the code: `lorakit push` fills it in, or --repository OWNER/NAME": given.repository,
        f"a licence: --license apache-2.0{from_file}": given.license,
        "what it is good for, and what it is not: --description TEXT": given.description,
        f"the base's hub id (it {base}), for the link to it: --base-model OWNER/NAME": record.base_id,
        "the training data: --data NAME or its hub id": given.data or record.data,
        f"results on separate test rows: {results}": record.eval_results,
        "the name of the evaluated rows: --eval-on NAME or a hub id": named,
        "samples: `lorakit train` takes them (sample_tokens); they are read from the run's folder": record.samples
        or record.image,
    }
    return [how for how, value in known.items() if not value]
