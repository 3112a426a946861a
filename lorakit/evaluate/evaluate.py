"""Evaluate the base alone and each adapter on the same rows, side by side.

    report = evaluate(model, tokenizer, items, [None, "sql"], generate=True)
    rich.print(report.table());  json.dumps(report.to_dict())

Loss and perplexity are over the trained positions. Text is generated greedily, once for each distinct prompt. Its
references are the answers of all rows with that prompt, and those in their `references` column. In a conversation the
first trained answer counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..analysis.tables import Table
from ..data.batches import pad_id
from ..errors import ConfigError, DataError, StateError, did_you_mean, listing
from ..generate.generate import check_prompts
from ..generate.generate import generate as write
from ..tasks.text.perplexity import Loss, perplexity
from .figures import table
from .metrics import Scores, score

if TYPE_CHECKING:
    from rich.table import Table as RichTable
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..data.dataset import Item

BASE = "base"


@dataclass(frozen=True)
class Prompt:
    """A distinct prompt and the right answers to it. where: its first row."""

    ids: tuple[int, ...]
    text: str
    references: tuple[str, ...]
    where: str


@dataclass(frozen=True)
class Judged:
    """The result of one adapter, or of the base (None).

    texts: its answers to the report's prompts, if generated; cut: how many of them the limit of new tokens ended.
    """

    adapter: str | None
    loss: Loss
    scores: Scores | None = None
    texts: tuple[str, ...] = ()
    cut: int = 0

    @property
    def label(self) -> str:
        """The adapter's name, or "base"."""
        return BASE if self.adapter is None else self.adapter


@dataclass(frozen=True)
class Report:
    """All results on the same rows. samples: indices of the prompts to show."""

    judged: tuple[Judged, ...]
    prompts: tuple[Prompt, ...] = ()
    samples: tuple[int, ...] = ()

    def table(self) -> Table:
        """Return a table with a line for each adapter."""
        first = self.judged[0].loss
        title = f"{first.rows:,} rows, {first.tokens:,} trained tokens"
        title += f"; text from {len(self.prompts):,} prompts" if self.judged[0].scores is not None else ""
        losses = [{"adapter": a.adapter, "loss": a.loss.loss, "perplexity": a.loss.perplexity} for a in self.judged]
        scores = [one.scores.to_dict() | {"cut": one.cut} if one.scores else {} for one in self.judged]
        return table([loss | score for loss, score in zip(losses, scores)], title, BASE)

    def sample_table(self) -> RichTable | None:
        """Return a few prompts: first reference and each adapter's text below. None without generation."""
        from rich.table import Table as RichTable
        from rich.text import Text

        if not self.samples:
            return None
        table = RichTable.grid(padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True, style="bold")
        for i in self.samples:
            prompt = self.prompts[i]
            rows = [("prompt", prompt.text), ("reference", prompt.references[0])]
            for name, text in [*rows, *((one.label, one.texts[i]) for one in self.judged)]:
                table.add_row(Text(name), Text(text))  # Text: square brackets in the data are not markup
            table.add_row()
        return table

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        return {
            "results": [
                {
                    "adapter": one.adapter,
                    **one.loss.to_dict(),
                    "scores": one.scores.to_dict() if one.scores else None,
                    "cut": one.cut,
                }
                for one in self.judged
            ],
            "samples": [
                {
                    "prompt": self.prompts[i].text,
                    "references": list(self.prompts[i].references),
                    "texts": [{"adapter": one.adapter, "text": one.texts[i]} for one in self.judged],
                }
                for i in self.samples
            ],
        }


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    adapters: Sequence[str | None] = (None,),
    *,
    generate: bool = False,
    max_new_tokens: int = 128,
    stop: Sequence[str] = (),
    max_prompts: int | None = None,
    samples: int = 3,
    batch_size: int = 16,
    references_column: str = "references",
    on_rows: Callable[[str, int], None] | None = None,
) -> Report:
    """Evaluate the base (None) and the named adapters on `items`; what was active before is active again afterwards.

    generate: also generate text, up to `max_new_tokens` or a text in `stop`, and score it. max_prompts: generate for at
    most this many prompts, evenly spaced. samples: the number of prompts to show. on_rows(what, rows): called after
    each batch, with what was computed ("base: loss", "sql: text") and its number of rows.

    Raises ConfigError without an adapter to evaluate, StateError for one that is not attached, DataError for a row
    without a prompt or one too long to generate from.
    """
    requested = list(dict.fromkeys(adapters))
    _check_adapters(model, requested)
    prompts = _spread(prompts_of(items, tokenizer, references_column), max_prompts) if generate else []
    check_prompts(model, [p.ids for p in prompts], max_new_tokens, [p.where for p in prompts])
    pad = pad_id(tokenizer)
    judged = []
    with _adapters_restored(model):
        for name in requested:
            _use(model, name)
            label = BASE if name is None else name
            loss = perplexity(model, items, pad, batch_size, _reporting(on_rows, f"{label}: loss"))
            if not prompts:
                judged.append(Judged(name, loss))
                continue
            cut: list[int] = []
            texts = write(
                model,
                tokenizer,
                [p.ids for p in prompts],
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                stop=stop,
                on_batch=_reporting(on_rows, f"{label}: text"),
                on_cut=cut.append,
            )
            texts = [text.strip() for text in texts]
            judged.append(Judged(name, loss, score(texts, [p.references for p in prompts]), tuple(texts), len(cut)))
    return Report(tuple(judged), tuple(prompts), tuple(_spread(range(len(prompts)), samples)))


def prompts_of(
    items: Sequence[Item], tokenizer: PreTrainedTokenizerBase, references_column: str = "references"
) -> list[Prompt]:
    """Return the distinct prompts in order of appearance, each with the distinct answers in its rows.

    Raises DataError for a row without a prompt.
    """
    groups: dict[tuple[int, ...], list[Item]] = {}
    for item in items:
        start = item.prompt_length
        if start == 0:
            raise DataError(
                f"{item.row.where}: the row has no prompt to generate from; all of a plain text is trained\n"
                "  leave generation out, or give rows with prompt and completion"
            )
        groups.setdefault(tuple(item.ids[:start]), []).append(item)
    prompts = []
    for ids, rows in groups.items():
        answers = [answer for item in rows for answer in _answers(item, tokenizer, references_column)]
        prompts.append(Prompt(ids, _text(tokenizer, ids), tuple(dict.fromkeys(answers)), rows[0].row.where))
    return prompts


def _answers(item: Item, tokenizer: PreTrainedTokenizerBase, references_column: str) -> list[str]:
    start = item.prompt_length
    end = next((i for i in range(start + 1, len(item.ids)) if not item.trained[i]), len(item.ids))
    listed = item.row.values.get(references_column) or []
    return [
        _text(tokenizer, item.ids[start:end]),
        *(text.strip() for text in ([listed] if isinstance(listed, str) else listed)),
    ]


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()


def _spread(things: Sequence[Any], most: int | None) -> list[Any]:
    """Return at most `most` of `things`, evenly spaced, beginning with the first."""
    if most is None or len(things) <= most:
        return list(things)
    return [things[i * len(things) // most] for i in range(most)]


def _reporting(on_rows: Callable[[str, int], None] | None, what: str) -> Callable[[int], None] | None:
    return None if on_rows is None else lambda rows: on_rows(what, rows)


# ------------------------------------------------------------------------------------------ adapters


def _check_adapters(model: PreTrainedModel, requested: Sequence[str | None]) -> None:
    from ..model.activate import adapters

    attached = adapters(model)
    if not requested:
        raise ConfigError("no adapter to evaluate\n  expected names of attached adapters, or None for the base")
    for name in requested:
        if name is not None and name not in attached:
            known = listing(attached) if attached else "none"
            raise StateError(
                f"no adapter named '{name}' is attached{did_you_mean(name, attached)}\n  attached: {known}"
            )


def _use(model: PreTrainedModel, which: str | Mapping[str, Any] | None) -> None:
    from ..model.activate import activate, adapters

    if adapters(model):  # without adapters the model is its base
        activate(model, which)


@contextmanager
def _adapters_restored(model: PreTrainedModel) -> Iterator[None]:
    from ..model.activate import active, adapters

    before = active(model) if adapters(model) else {}
    try:
        yield
    finally:
        _use(model, before or None)
