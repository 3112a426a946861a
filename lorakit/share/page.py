"""Write the page: what the adapter is, how to use it, how it was trained, how good it is.

card.md.jinja is the page; here is what needs more than a template to be worked out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from shlex import quote
from typing import TYPE_CHECKING, Any

from ..analysis.inspect import KINDS
from ..bases.load import EMBEDDED
from ..evaluate.figures import MEASURES, measured, show
from ..formats.diffusers import FILE
from ..tasks import task_of_adapter
from ..version import VERSION
from .markdown import Markdown, cell, code, codes, fence, line, plain, rows, section, table
from .paths import hub_id, last_name
from .record import AdapterRecord, mapping, number

if TYPE_CHECKING:
    from jinja2 import Template

PLACEHOLDER = "OWNER/NAME"  # stands for the repository until it is known
# PEFT's task_type -> transformers' class, the hub's task.
TASKS: dict[str, tuple[str | None, str | None]] = {
    "CAUSAL_LM": ("AutoModelForCausalLM", "text-generation"),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", None),  # translation, summarization, ...: which is not recorded
    "SEQ_CLS": ("AutoModelForSequenceClassification", "text-classification"),
    "TOKEN_CLS": ("AutoModelForTokenClassification", "token-classification"),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", "question-answering"),
    "FEATURE_EXTRACTION": ("AutoModel", "feature-extraction"),
}
# The same by lorakit's task, where PEFT's says less or nothing. Their inputs are no texts alone, so the page's code
# leaves loading the base to the reader.
OWN_TASKS: dict[str, tuple[str | None, str | None]] = {
    "image_classification": (None, "image-classification"),
    "speech": (None, "automatic-speech-recognition"),
    "vision_language": (None, "image-text-to-text"),
}
_STYLES = {
    "none": "given in the data",
    "chat": "the base's chat template",
    "plain": "lorakit's plain headings (### Instruction: ...)",
}
MAX_HELD_OUT_ROWS = 12  # in the table of held-out losses
MAX_SAMPLE_LENGTH = 600  # characters of a prompt or an answer


def page(record: AdapterRecord, title: str) -> str:
    """Return the Markdown below the metadata."""
    f, on = record.facts, record.given.evaluated_on
    kinds = {KINDS[m.kind] for m in f.modules if m.kind in KINDS} | {"DoRA" for m in f.modules if m.dora}
    if f.modules:
        kind = f"An adapter ({', '.join(sorted(kinds))})" if kinds else "A LoRA adapter"
    else:
        embeddings_only = f.embeddings and not f.saved
        kind = "Textual-inversion embeddings" if embeddings_only else "An adapter that replaces weights of its base"
    fingerprint = mapping(f.metadata.get("fingerprint"))
    marks = [code(fingerprint.get("architecture")), _thousands(fingerprint.get("parameters"), " parameters")]
    marks += [f"shapes {code(fingerprint['shapes'], 32)}"] if fingerprint.get("shapes") else []
    evaluated = {"base" if row.get("adapter") is None else "this adapter": row for row in record.eval_results}
    held_out = [row for row in record.held_out if "step" in row]
    if len(held_out) > MAX_HELD_OUT_ROWS:  # evenly spaced, with the first and the last
        last = len(held_out) - 1
        held_out = [held_out[i * last // (MAX_HELD_OUT_ROWS - 1)] for i in range(MAX_HELD_OUT_ROWS)]
    samples = [[cell(text, MAX_SAMPLE_LENGTH) for text in sample] for sample in record.samples]
    minutes = (record.seconds or 0) / 60
    embedded = f.base == EMBEDDED
    named = "see the table below" if base_text(record) else "its file does not name it"
    note = "" if record.base_id or embedded else f"`BASE` is the model that the adapter was trained on ({named})."
    return _template().render(
        record=record,
        f=f,
        title=title,
        kind=kind,
        lora=not kinds,
        base_text=base_text(record),
        repository=record.given.repository or PLACEHOLDER,
        base_note=Markdown(note),
        embedded=embedded,
        model_class=record.model_class or class_and_task(record)[0],
        diffusers_file=FILE,
        fingerprint=Markdown(", ".join(filter(None, marks))),
        data=data_text(record, record.given.data),
        prompt_styles=_STYLES,
        time=f"{minutes:.0f} minutes" if minutes >= 2 else f"{record.seconds:.0f} seconds" if record.seconds else "",
        settings=_settings(record),
        evaluated_on=data_text(record, on) if on else None,
        eval_table=_measured("", evaluated),
        held_out_table=_measured("step", {plain(row["step"]): row for row in held_out}),
        samples=table(samples, ("prompt", "base", "this adapter")),
        version=VERSION,
    )


@cache
def _template() -> Template:
    from jinja2 import Environment

    def inserted(value: Any) -> str:
        return "" if value is None else plain(value)

    environment = Environment(trim_blocks=True, lstrip_blocks=True, finalize=inserted)
    ours = (code, codes, rows, section)
    environment.filters |= {function.__name__: function for function in ours} | {
        "counted": _counted,
        "fence": lambda text, language: Markdown(f"\n{fence(text, language)}\n\n"),
        "markdown": lambda text: Markdown(text.rstrip("\n")),
        "py": lambda value: Markdown(json.dumps(line(value), ensure_ascii=False)),
        "measure": lambda value, key: show(key, value),
        "sh": lambda value: Markdown(quote(line(value))),
        "thousands": _thousands,
    }
    return environment.from_string(files(__package__).joinpath("card.md.jinja").read_text(encoding="utf8"))


def class_and_task(record: AdapterRecord) -> tuple[str | None, str | None]:
    """Return transformers' class for the adapter's base and the hub's task; None for what is not known."""
    own = task_of_adapter(record.facts.task, record.facts.metadata)
    return OWN_TASKS.get(str(own), TASKS.get(str(record.facts.task), (None, None)))


def base_text(record: AdapterRecord) -> Markdown:
    """Return the base's name as Markdown: a link to its hub id, or whatever is known."""
    base = record.base_id
    if base is not None:
        return Markdown(f"[{plain(base)}](https://huggingface.co/{base})")
    if record.base == EMBEDDED:
        return Markdown("the language model that lorakit embeds")
    header = mapping(record.facts.metadata.get("header"))
    keys = ("ss_sd_model_name", "ss_base_model_version", "modelspec.architecture")
    return plain(last_name(record.base or "") or next((header[key] for key in keys if header.get(key)), ""))


def data_text(record: AdapterRecord, given: str | None) -> Markdown | None:
    """Return the name of some data as Markdown: a link to the hub, or a file's name. given: the user's, if any."""
    own = record.data.get("name")
    name = given or record.data.get("id") or own
    dataset = hub_id(name)
    if dataset:
        return Markdown(f"[{plain(dataset)}](https://huggingface.co/datasets/{dataset})")
    if not given and isinstance(own, str):
        name = own
    if not isinstance(name, str) or not name:
        return None
    return plain(name) if given and " " in name else code(last_name(line(name, 500)))


def _settings(record: AdapterRecord) -> list[tuple[str, Any]]:
    """Return names and values: of an image adapter's notes, and of the run's settings that had an effect."""
    notes = dict(record.facts.training) if record.image else {}
    settings = {name: value for name, value in record.settings.items() if isinstance(value, str | int | float)}
    if record.steps:
        settings.pop("epochs", None)
    for name in ("weight_decay", "dropout"):
        if settings.get(name) == 0:
            del settings[name]
    if number(settings.get("warmup")) is not None:
        settings["warmup"] = f"{100 * settings['warmup']:g} % of the steps"
    pairs = [(name, value) for name, value in notes.items() if name not in ("trigger words", "commonest tags")]
    return pairs + [(name.replace("_", " "), value) for name, value in settings.items()]


def _measured(title: str, results: Mapping[str, Mapping[str, Any]]) -> Markdown:
    """Return a table with a row for each result and a column for each measure that at least one of them has."""
    keys = measured(list(results.values()))
    cells = [[name, *(show(key, row.get(key)) for key in keys)] for name, row in results.items()]
    return table(cells, [title, *(MEASURES[key][0] for key in keys)], "---:")


def _counted(counts: Mapping[str, int]) -> str:
    """Return the only value, or each of several (at most 8) with the number of modules that have it."""
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{value} ({count} modules)" for value, count in list(counts.items())[:8])


def _thousands(value: Any, unit: str = "") -> str:
    """Return a number with its unit; "" for anything else."""
    return f"{value:,}{unit}" if number(value) is not None else ""
