"""Write the page: what the adapter is, how to use it, how it was trained, how good it is. Empty sections are left out.

The last line marks the page as ours, with the hash of everything before it. So a page that someone else wrote or edited
is recognised, and not replaced without asking.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..bases.load import EMBEDDED
from ..errors import ConfigError
from ..io.atomic import write_text
from ..version import VERSION
from .record import AdapterRecord, mapping
from .use import use
from .words import cell, code, hub_id, last_name, line, number, plain

PLACEHOLDER = "OWNER/NAME"  # stands for the repository until it is known
MARK = "Written by lorakit card"
_MARKED = re.compile(rf"<!-- {MARK}, sha256 ([0-9a-f]{{64}}) -->\s*\Z")
_KINDS = {"loha": "LoHa", "lokr": "LoKr", "dense": "dense updates"}
_SCORES = (("bleu", "BLEU"), ("chrf", "chrF"), ("rouge_l", "ROUGE-L"), ("exact_match", "exact match"))
_STYLES = {
    "none": "given in the data",
    "chat": "the base's chat template",
    "plain": "lorakit's plain headings (### Instruction: ...)",
}
MAX_HELD_OUT_ROWS = 12  # in the table of held-out losses
MAX_SAMPLE_LENGTH = 600  # characters of a prompt or an answer


def page(
    record: AdapterRecord,
    title: str,
    repository: str | None,
    base: str | None,
    description: str | None,
    data_name: str | None,
    eval_data: str | None,
) -> str:
    """Return the Markdown below the metadata, without the mark.

    base: its hub id. data_name, eval_data: the training data's and the evaluated rows' names, as Markdown.
    """
    parts = [f"# {plain(title)}", _first(record, base)]
    parts += [description.strip()] if description else []
    parts += _section("Use", use(record, repository or PLACEHOLDER, base))
    parts += _section("What it is", _table(_facts(record, base)))
    parts += _section("Trigger words", _triggers(record))
    parts += _section("Training", _training(record, data_name))
    parts += _section("Results", _results(record, data_name, eval_data))
    parts += _section("Samples", _samples(record))
    parts.append(f"---\n\nThis card was written by lorakit {VERSION} from the adapter and the records of its training.")
    return "\n\n".join(part for part in parts if part)


def marked(text: str) -> str:
    """Append the mark to a page."""
    text = text.rstrip() + "\n"
    return f"{text}\n<!-- {MARK}, sha256 {_digest(text)} -->\n"


def ours(text: str) -> bool:
    """Whether lorakit wrote this page and nobody has changed it since."""
    mark = _MARKED.search(text)
    return mark is not None and mark[1] == _digest(text[: mark.start()].rstrip() + "\n")


def with_repository(text: str, repository: str) -> str:
    """Replace the placeholder in a page with our mark by the repository's name; return any other page unchanged."""
    mark = _MARKED.search(text)
    if mark is None or PLACEHOLDER not in text:
        return text
    changed = text[: mark.start()].replace(PLACEHOLDER, repository)
    return marked(changed) if ours(text) else changed + text[mark.start() :]


def write(text: str, path: Path, force: bool = False) -> None:
    """Write a card. Raises ConfigError if `path` has a page that lorakit did not write, or that was edited since."""
    if path.is_dir():
        raise ConfigError(f"{path} is a folder\n  give a file (--out {path / 'README.md'})")
    if path.exists() and not force:
        try:
            replaceable = ours(path.read_text(encoding="utf8"))
        except (OSError, UnicodeDecodeError):
            replaceable = False
        if not replaceable:
            raise ConfigError(
                f"{path} was not written by lorakit, or was changed since\n"
                "  --force replaces it; --out names another file"
            )
    write_text(path, text)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _section(title: str, parts: Sequence[str]) -> list[str]:
    return [f"## {title}", *parts] if any(parts) else []


def _table(rows: Iterable[tuple[str, str]]) -> list[str]:
    lines = [f"| {name} | {value} |" for name, value in rows if value]
    return ["\n".join(["| | |", "|---|---|", *lines])] if lines else []


def base_text(record: AdapterRecord, base: str | None) -> str:
    """Return the base's name as Markdown: a link to its hub id `base`, or whatever is known."""
    if base is not None:
        return f"[{plain(base)}](https://huggingface.co/{base})"
    if record.base == EMBEDDED:
        return "the language model that lorakit embeds"
    name = plain(last_name(record.base.rstrip("/\\"))) if record.base else ""
    keys = ("ss_sd_model_name", "ss_base_model_version", "modelspec.architecture")
    from_header = next((record.header[key] for key in keys if record.header.get(key)), None)
    return name or (plain(from_header) if isinstance(from_header, str) else "")


def _first(record: AdapterRecord, base: str | None) -> str:
    """Return the page's first sentence."""
    f = record.facts
    kinds = {_KINDS[m.kind] for m in f.modules if m.kind in _KINDS}
    if any(m.dora for m in f.modules):
        kinds.add("DoRA")
    kind = f"An adapter ({', '.join(sorted(kinds))})" if kinds else "A LoRA adapter"
    base_name = base_text(record, base)
    rank = f", rank {f.rank}" if f.rank and not kinds else ""
    in_modules = f" in {len(f.modules)} modules" if f.modules else ""
    if not f.modules:
        embeddings_only = f.embeddings and not f.saved
        kind = "Textual-inversion embeddings" if embeddings_only else "An adapter that replaces weights of its base"
    return f"{kind}{f' for {base_name}' if base_name else ''}{rank}: {f.parameters:,} parameters{in_modules}."


def _counted(counts: Mapping[str, int]) -> str:
    """Return the only value, or each of several (at most 8) with the number of modules that have it."""
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{value} ({count} modules)" for value, count in list(counts.items())[:8])


def _facts(record: AdapterRecord, base: str | None) -> list[tuple[str, str]]:
    f = record.facts
    fingerprint = mapping(f.metadata.get("fingerprint"))
    count = number(fingerprint.get("parameters"))
    fingerprint_text = [
        code(fingerprint["architecture"]) if fingerprint.get("architecture") else "",
        f"{count:,} parameters" if count is not None else "",
        f"shapes {code(fingerprint['shapes'], 32)}" if fingerprint.get("shapes") else "",
    ]
    targets = ", ".join(code(t) for t in f.targets[:40])
    targets += f" and {len(f.targets) - 40} more" if len(f.targets) > 40 else ""
    scale = " (scaled by alpha / √rank)" if f.rslora else ""
    return [
        ("base", base_text(record, base)),
        ("fingerprint of the base", ", ".join(text for text in fingerprint_text if text)),
        ("task", code(f.task) if f.task else ""),
        ("adapted", f"{len(f.modules)} modules: {targets}" if f.modules else ""),
        ("rank", _counted(f.ranks)),
        ("alpha", _counted(f.alphas) + scale if f.alphas else ""),
        ("replaced weights", ", ".join(code(name) for name in list(f.saved)[:10])),
        ("textual-inversion embeddings", ", ".join(code(token) for token in list(f.embeddings)[:10])),
        ("parameters", f"{f.parameters:,}"),
        ("precision", ", ".join(f.dtypes)),
        ("format", record.format),
        ("size", f"{f.bytes:,} bytes" if f.bytes is not None else ""),
    ]


def _triggers(record: AdapterRecord) -> list[str]:
    words = record.facts.training.get("trigger words") or []
    tags = record.facts.training.get("commonest tags") or {}
    parts = [", ".join(code(word) for word in words[:20])]
    if tags:
        counts = ", ".join(f"{code(tag)} ({count})" for tag, count in tags.items())
        parts.append(f"Most common tags of the training captions: {counts}.")
    return [part for part in parts if part]


def _training(record: AdapterRecord, data_name: str | None) -> list[str]:
    data, settings = record.data, dict(record.settings)
    rows, minutes = number(data.get("rows")), (record.seconds or 0) / 60
    split = f", split {code(data['split'])}" if isinstance(data.get("split"), str) else ""
    table = [
        ("data", f"{data_name}{split}" if data_name else ""),
        ("rows", f"{rows:,}" if rows is not None else ""),
        ("SHA-256 of the rows' token ids", code(data["hash"], 80) if isinstance(data.get("hash"), str) else ""),
        ("prompt template", _STYLES.get(str(data.get("template")), "")),
        ("steps", f"{record.steps:,}" if record.steps else ""),
        ("trained tokens", f"{record.tokens:,}" if record.tokens else ""),
        (
            "time",
            f"{minutes:.0f} minutes" if minutes >= 2 else f"{record.seconds:.0f} seconds" if record.seconds else "",
        ),
    ]
    if record.steps:
        settings.pop("epochs", None)
    for name in ("weight_decay", "dropout"):
        if settings.get(name) == 0:
            del settings[name]
    if number(settings.get("warmup")) is not None:
        settings["warmup"] = f"{100 * settings['warmup']:g} % of the steps"
    if record.image:
        extra = {k: v for k, v in record.facts.training.items() if k not in ("trigger words", "commonest tags")}
        table += [(plain(k), plain(v)) for k, v in extra.items()]
    printable = {name: value for name, value in settings.items() if isinstance(value, str | int | float)}
    table += [(name.replace("_", " "), plain(value)) for name, value in printable.items()]
    return _table(table)


def _results(record: AdapterRecord, data_name: str | None, eval_data: str | None) -> list[str]:
    parts = []
    if record.eval_results:
        scores = [mapping(row.get("scores")) for row in record.eval_results]
        scored = [(key, name) for key, name in _SCORES if all(number(row.get(key)) is not None for row in scores)]
        measures = _measures(record.eval_results, "")
        head = ["", *(name for _, name, _ in measures), *(name for _, name in scored)]
        lines = []
        for row in record.eval_results:
            values = [_rounded(row.get(key), digits) for key, _, digits in measures]
            values += [_rounded(mapping(row.get("scores")).get(key), 1) for key, _ in scored]
            lines.append([("base" if row.get("adapter") is None else "this adapter"), *values])
        rows, tokens = number(record.eval_results[0].get("rows")), number(record.eval_results[0].get("tokens"))
        subject = f"{rows:,} rows" if rows is not None else "Rows"
        subject += f" of {eval_data}" if eval_data else ""
        subject += f" ({tokens:,} tokens)" if tokens is not None else ""
        parts += [f"{subject}, the same for base and adapter:", _grid(head, lines)]
    held_out = [row for row in record.held_out if "step" in row]
    if len(held_out) > MAX_HELD_OUT_ROWS:  # evenly spaced, with the first and the last
        last = len(held_out) - 1
        held_out = [held_out[i * last // (MAX_HELD_OUT_ROWS - 1)] for i in range(MAX_HELD_OUT_ROWS)]
    if held_out:
        measures = _measures(held_out, "held_out_")
        lines = [
            [f"{row['step']}", *(_rounded(row.get(key), digits) for key, _, digits in measures)] for row in held_out
        ]
        where = f" of {data_name}" if data_name else ""
        parts += [f"On rows{where} held out from training:", _grid(["step", *(name for _, name, _ in measures)], lines)]
        if record.best is not None and len(record.held_out) > 1 and number(record.best.get("step")) is not None:
            parts.append(f"The adapter has the parameters of step {record.best['step']}, where the loss was lowest.")
    elif record.held_out:
        parts.append(f"Loss on rows held out from training: {_rounded(record.held_out[0]['held_out_loss'], 4)}.")
    return parts


def _measures(rows: Sequence[Mapping[str, Any]], prefix: str) -> list[tuple[str, str, int]]:
    """Return (key, name, digits) of each measure that at least one row has."""
    known = (("loss", 4), ("perplexity", 2), ("accuracy", 4), ("macro_f1", 4))
    measures = [(prefix + name, name.replace("_", " "), digits) for name, digits in known]
    return [measure for measure in measures if any(number(row.get(measure[0])) is not None for row in rows)]


def _grid(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = "|".join(["---", *["---:"] * (len(head) - 1)])
    return "\n".join([f"| {' | '.join(head)} |", f"|{rule}|", *(f"| {' | '.join(row)} |" for row in lines)])


def _rounded(value: Any, digits: int) -> str:
    finite = number(value)
    return f"{finite:,.{digits}f}" if finite is not None else ""


def _samples(record: AdapterRecord) -> list[str]:
    if not record.samples:
        return []
    rows = [[cell(text, MAX_SAMPLE_LENGTH) for text in sample] for sample in record.samples]
    return [
        f"Greedy answers {record.samples_from}:",
        "\n".join(["| prompt | base | this adapter |", "|---|---|---|", *(f"| {' | '.join(r)} |" for r in rows)]),
    ]


def data_text(record: AdapterRecord, given: str | None) -> str | None:
    """Return the name of some data as Markdown: a link to the hub, or a file's name. given: the user's, if any."""
    name = given or record.data.get("id") or record.data.get("name")
    dataset = hub_id(name)
    if dataset:
        return f"[{plain(dataset)}](https://huggingface.co/datasets/{dataset})"
    if isinstance(record.data.get("name"), str) and not given:
        name = record.data["name"]
    if not isinstance(name, str) or not name:
        return None
    return plain(name) if given and " " in name else code(last_name(line(name, 500)))
