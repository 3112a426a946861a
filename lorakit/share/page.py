"""The page's text: what it is, how it is used, how it was trained, how good it is. A section that nothing is known for is not there.

The last line marks the page as ours, with the hash of all before it: a page that somebody wrote or changed is known by it, and is not
replaced unasked.
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
from .known import Known, mapping
from .use import use
from .words import cell, code, hub_id, last_name, line, number, plain

PLACEHOLDER = "OWNER/NAME"  # of the repository, until it is known
MARK = "Written by lorakit card"
_MARKED = re.compile(rf"<!-- {MARK}, sha256 ([0-9a-f]{{64}}) -->\s*\Z")
_KINDS = {"hadamard": "LoHa", "kronecker": "LoKr", "dense": "whole updates"}
_SCORES = (("bleu", "BLEU"), ("chrf", "chrF"), ("rouge_l", "ROUGE-L"), ("exact_match", "exact match"))
_STYLES = {
    "none": "they are in the data",
    "chat": "the base's chat template has it",
    "plain": "lorakit's plain headings (### Instruction: ...)",
}
MOST_ROWS = 12  # of the held-out evaluations
MOST_SAMPLE = 600  # characters of a prompt or an answer


def page(
    known: Known,
    title: str,
    repository: str | None,
    base: str | None,
    description: str | None,
    data_name: str | None,
    judged_on: str | None,
) -> str:
    """The Markdown below the metadata, without the mark. `base`: its hub id; `data_name`: how the data is called on the page."""
    parts = [f"# {plain(title)}", _first(known, base)]
    parts += [description.strip()] if description else []
    parts += _section("Use", use(known, repository or PLACEHOLDER, base))
    parts += _section("What it is", _table(_facts(known, base)))
    parts += _section("Trigger words", _triggers(known))
    parts += _section("Training", _training(known, data_name))
    parts += _section("Results", _results(known, data_name, judged_on))
    parts += _section("Samples", _samples(known))
    parts.append(f"---\n\nThis card was written by lorakit {VERSION} from the adapter and what it knows of its training.")
    return "\n\n".join(part for part in parts if part)


def marked(text: str) -> str:
    text = text.rstrip() + "\n"
    return f"{text}\n<!-- {MARK}, sha256 {_digest(text)} -->\n"


def ours(text: str) -> bool:
    """Whether lorakit wrote this page, and nobody has changed it since."""
    found = _MARKED.search(text)
    return found is not None and found[1] == _digest(text[: found.start()].rstrip() + "\n")


def with_repository(text: str, repository: str) -> str:
    """A page of ours with the repository's name where the placeholder was; any other as it is."""
    found = _MARKED.search(text)
    if found is None or PLACEHOLDER not in text:
        return text
    changed, whole = text[: found.start()].replace(PLACEHOLDER, repository), ours(text)
    return marked(changed) if whole else changed + text[found.start() :]


def write(text: str, path: Path, force: bool = False) -> None:
    """Write a card. ConfigError if there is a page that somebody else wrote, or changed."""
    if path.is_dir():
        raise ConfigError(f"{path} is a folder\n  give a file (--out {path / 'README.md'})")
    if path.exists() and not force:
        try:
            kept = not ours(path.read_text(encoding="utf8"))
        except (OSError, UnicodeDecodeError):
            kept = True
        if kept:
            raise ConfigError(f"{path} was not written by lorakit, or was changed since\n  --force replaces it; --out names another file")
    write_text(path, text)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _section(title: str, parts: Sequence[str]) -> list[str]:
    return [f"## {title}", *parts] if any(parts) else []


def _table(rows: Iterable[tuple[str, str]]) -> list[str]:
    told = [f"| {name} | {value} |" for name, value in rows if value]
    return ["\n".join(["| | |", "|---|---|", *told])] if told else []


def base_text(known: Known, base: str | None) -> str:
    """The base's name: a link, or what is known of it."""
    if base is not None:
        return f"[{plain(base)}](https://huggingface.co/{base})"
    if known.base == EMBEDDED:
        return "the language model that lorakit embeds"
    name = plain(last_name(known.base.rstrip("/\\"))) if known.base else ""
    said = known.header.get("ss_sd_model_name") or known.header.get("ss_base_model_version") or known.header.get("modelspec.architecture")
    return name or (plain(said) if isinstance(said, str) else "")


def _first(known: Known, base: str | None) -> str:
    f = known.facts
    kinds = sorted({_KINDS[m.kind] for m in f.modules if m.kind in _KINDS} | ({"DoRA"} if any(m.dora for m in f.modules) else set()))
    kind = f"An adapter ({', '.join(kinds)})" if kinds else "A LoRA adapter"
    base_name = base_text(known, base)
    rank = f", rank {f.rank}" if f.rank and not kinds else ""
    held = f" in {len(f.modules)} modules" if f.modules else ""
    if not f.modules:
        kind = "Learned tokens" if f.embeddings and not f.saved else "An adapter of weights saved whole"
    return f"{kind}{f' for {base_name}' if base_name else ''}{rank}: {f.parameters:,} parameters{held}."


def _counted(counts: Mapping[str, int]) -> str:
    """The one value, or each with how many modules have it."""
    return (
        next(iter(counts), "") if len(counts) == 1 else ", ".join(f"{value} ({count} modules)" for value, count in list(counts.items())[:8])
    )


def _facts(known: Known, base: str | None) -> list[tuple[str, str]]:
    f = known.facts
    mark = mapping(f.metadata.get("fingerprint"))
    count = number(mark.get("parameters"))
    base_is = [
        code(mark["architecture"]) if mark.get("architecture") else "",
        f"{count:,} parameters" if count is not None else "",
        f"shapes {code(mark['shapes'], 32)}" if mark.get("shapes") else "",
    ]
    targets = ", ".join(code(t) for t in f.targets[:40]) + (f" and {len(f.targets) - 40} more" if len(f.targets) > 40 else "")
    scale = " (scaled by alpha / √rank)" if f.rslora else ""
    return [
        ("base", base_text(known, base)),
        ("fingerprint of the base", ", ".join(b for b in base_is if b)),
        ("task", code(f.task) if f.task else ""),
        ("adapted", f"{len(f.modules)} modules: {targets}" if f.modules else ""),
        ("rank", _counted(f.ranks)),
        ("alpha", _counted(f.alphas) + scale if f.alphas else ""),
        ("saved whole", ", ".join(code(name) for name in list(f.saved)[:10])),
        ("learned tokens", ", ".join(code(token) for token in list(f.embeddings)[:10])),
        ("parameters", f"{f.parameters:,}"),
        ("precision", ", ".join(f.dtypes)),
        ("format", known.format),
        ("size", f"{f.bytes:,} bytes" if f.bytes is not None else ""),
    ]


def _triggers(known: Known) -> list[str]:
    words = known.facts.training.get("trigger words") or []
    tags = known.facts.training.get("commonest tags") or {}
    told = [", ".join(code(word) for word in words[:20])]
    if tags:
        told.append("Commonest tags of the training captions: " + ", ".join(f"{code(tag)} ({count})" for tag, count in tags.items()) + ".")
    return [part for part in told if part]


def _training(known: Known, data_name: str | None) -> list[str]:
    data, settings = known.data, dict(known.settings)
    rows, minutes = number(data.get("rows")), (known.seconds or 0) / 60
    split = f", split {code(data['split'])}" if isinstance(data.get("split"), str) else ""
    table = [
        ("data", f"{data_name}{split}" if data_name else ""),
        ("rows", f"{rows:,}" if rows is not None else ""),
        ("SHA-256 of the rows' token ids", code(data["hash"], 80) if isinstance(data.get("hash"), str) else ""),
        ("prompts written as", _STYLES.get(str(data.get("template")), "")),
        ("steps", f"{known.steps:,}" if known.steps else ""),
        ("trained tokens", f"{known.tokens:,}" if known.tokens else ""),
        ("time", f"{minutes:.0f} minutes" if minutes >= 2 else f"{known.seconds:.0f} seconds" if known.seconds else ""),
    ]
    if known.steps:
        settings.pop("epochs", None)
    for name in ("weight_decay", "dropout"):
        if settings.get(name) == 0:
            del settings[name]
    if number(settings.get("warmup")) is not None:
        settings["warmup"] = f"{100 * settings['warmup']:g} % of the steps"
    if known.image:
        shown = {k: v for k, v in known.facts.training.items() if k not in ("trigger words", "commonest tags")}
        table += [(plain(k), plain(v)) for k, v in shown.items()]
    table += [(name.replace("_", " "), plain(value)) for name, value in settings.items() if isinstance(value, str | int | float)]
    return _table(table)


def _results(known: Known, data_name: str | None, judged_on: str | None) -> list[str]:
    told = []
    if known.judged:
        scored = [(key, name) for key, name in _SCORES if all(number(mapping(r.get("scores")).get(key)) is not None for r in known.judged)]
        measured = _measured(known.judged, "")
        head = ["", *(name for _, name, _ in measured), *(name for _, name in scored)]
        lines = []
        for row in known.judged:
            values = [_rounded(row.get(key), digits) for key, _, digits in measured]
            values += [_rounded(mapping(row.get("scores")).get(key), 1) for key, _ in scored]
            lines.append([("base" if row.get("adapter") is None else "this adapter"), *values])
        rows, tokens = number(known.judged[0].get("rows")), number(known.judged[0].get("tokens"))
        of = f"{rows:,} rows" if rows is not None else "Rows"
        trained = f" ({tokens:,} tokens)" if tokens is not None else ""
        told += [f"{of}{f' of {judged_on}' if judged_on else ''}{trained}, base and adapter on the same:", _grid(head, lines)]
    held = [row for row in known.held_out if "step" in row]
    if len(held) > MOST_ROWS:  # evenly, and the last
        held = [held[i * (len(held) - 1) // (MOST_ROWS - 1)] for i in range(MOST_ROWS)]
    if held:
        measured = _measured(held, "held_out_")
        lines = [[f"{row['step']}", *(_rounded(row.get(key), digits) for key, _, digits in measured)] for row in held]
        where = f" of {data_name}" if data_name else ""
        told += [f"On rows{where} that were held out of the training:", _grid(["step", *(name for _, name, _ in measured)], lines)]
        if known.best is not None and len(known.held_out) > 1 and number(known.best.get("step")) is not None:
            told.append(f"The adapter has the parameters of step {known.best['step']}, where the loss was least.")
    elif known.held_out:
        told.append(f"Loss on rows held out of the training: {_rounded(known.held_out[0]['held_out_loss'], 4)}.")
    return told


def _measured(rows: Sequence[Mapping[str, Any]], prefix: str) -> list[tuple[str, str, int]]:
    """The figures that some row has: key, name, digits."""
    known = (("loss", 4), ("perplexity", 2), ("accuracy", 4), ("macro_f1", 4))
    found = [(prefix + name, name.replace("_", " "), digits) for name, digits in known]
    return [figure for figure in found if any(number(row.get(figure[0])) is not None for row in rows)]


def _grid(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = "|".join(["---", *["---:"] * (len(head) - 1)])
    return "\n".join([f"| {' | '.join(head)} |", f"|{rule}|", *(f"| {' | '.join(row)} |" for row in lines)])


def _rounded(value: Any, digits: int) -> str:
    known = number(value)
    return f"{known:,.{digits}f}" if known is not None else ""


def _samples(known: Known) -> list[str]:
    if not known.samples:
        return []
    rows = [[cell(text, MOST_SAMPLE) for text in sample] for sample in known.samples]
    return [
        f"Greedy answers {known.sampled}:",
        "\n".join(["| prompt | base | this adapter |", "|---|---|---|", *(f"| {' | '.join(r)} |" for r in rows)]),
    ]


def data_text(known: Known, given: str | None) -> str | None:
    """How the training data is called: a link to the hub, or the file's name."""
    name = given or known.data.get("id") or known.data.get("name")
    found = hub_id(name)
    if found:
        return f"[{plain(found)}](https://huggingface.co/datasets/{found})"
    shown = known.data.get("name") if isinstance(known.data.get("name"), str) and not given else name
    if not isinstance(shown, str) or not shown:
        return None
    return plain(shown) if given and " " in shown else code(last_name(line(shown, 500)))
