"""Evaluate the base alone and each adapter on the same rows, side by side.

    report = evaluate(model, tokenizer, items, [None, "sql"], generate=True)
    rich.print(report.table());  json.dumps(report.to_dict())

Loss and perplexity are over the trained positions. Text is generated greedily, once for each distinct prompt. Its
references are the answers of all rows with that prompt, and those in their `references` column. In a conversation the
first trained answer counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..analysis.tables import Table
from ..data.batches import pad_id
from ..errors import ConfigError, StateError, did_you_mean, listing
from ..generate.generate import check_prompts
from ..generate.generate import generate as write
from ..tasks.metrics.texts import Compared, Scores, score
from ..tasks.task import Asked, Base, Task, weight_of
from ..tasks.text.perplexity import Loss, perplexity
from ..tasks.text.prompts_of import prompts_of
from .figures import table

if TYPE_CHECKING:
    from rich.table import Table as RichTable
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..data.dataset import Item

BASE = "base"
BATCHES_AT_ONCE = 8  # between two reports of progress


@dataclass(frozen=True)
class Judged:
    """The result of one adapter, or of the base (None).

    loss: None for a model on a server, which does not tell. texts: its answers to the report's prompts, if generated;
    cut: how many of them the limit of new tokens ended.
    """

    adapter: str | None
    loss: Loss | None
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
    prompts: tuple[Asked, ...] = ()
    samples: tuple[int, ...] = ()

    def table(self) -> Table:
        """Return a table with a line for each adapter."""
        first = self.judged[0].loss
        parts = [f"{first.rows:,} rows, {first.tokens:,} trained tokens"] if first else []
        parts += [f"text from {len(self.prompts):,} prompts"] if self.judged[0].scores is not None else []
        title = "; ".join(parts)
        losses = [{"adapter": one.adapter} | _measures(one.loss) for one in self.judged]
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
                    **(one.loss.to_dict() if one.loss else {}),
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


def _measures(loss: Loss | None) -> dict[str, float]:
    return {"loss": loss.loss, "perplexity": loss.perplexity} if loss else {}


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
    task: Task | None = None,
    compared: Compared | None = None,
    on_rows: Callable[[str, int], None] | None = None,
) -> Report:
    """Evaluate the base (None) and the named adapters on `items`; what was active before is active again afterwards.

    generate: also generate text, up to `max_new_tokens` or a text in `stop`, and score it. max_prompts: generate for at
    most this many prompts, evenly spaced. task: the task of the items, if not causal_lm: its loss and its prompts.
    compared: what exact match compares. samples: the number of prompts to show. on_rows(what, rows): called after
    each batch, with what was computed ("base: loss", "sql: text") and its number of rows.

    Raises ConfigError without an adapter to evaluate, StateError for one that is not attached, DataError for a row
    without a prompt or one too long to generate from.
    """
    requested = list(dict.fromkeys(adapters))
    _check_adapters(model, requested)
    base = Base(model, tokenizer)
    prompts = spread(task.asked(base, items) if task else prompts_of(items, tokenizer), max_prompts) if generate else []
    check_prompts(model, [p.ids for p in prompts], max_new_tokens, [p.where for p in prompts])
    pad = pad_id(tokenizer)
    judged = []
    with _adapters_restored(model):
        for name in requested:
            _use(model, name)
            label = BASE if name is None else name
            report = _reporting(on_rows, f"{label}: loss")
            loss = (
                _loss(task, base, items, batch_size, report)
                if task
                else perplexity(model, items, pad, batch_size, report)
            )
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
            judged.append(
                Judged(name, loss, score(texts, [p.references for p in prompts], compared), tuple(texts), len(cut))
            )
    return Report(tuple(judged), tuple(prompts), tuple(spread(range(len(prompts)), samples)))


def _loss(task: Task, base: Base, items: Sequence[Any], batch_size: int, on_rows: Callable[[int], None] | None) -> Loss:
    """Return the task's loss over all items, in portions, so that progress can be shown."""
    ordered = sorted(items, key=lambda item: -item.size)
    total, size = 0.0, batch_size * BATCHES_AT_ONCE
    for start in range(0, len(ordered), size):
        rows = ordered[start : start + size]
        total += task.evaluate(base, rows, batch_size)["loss"] * weight_of(rows)
        if on_rows is not None:
            on_rows(len(rows))
    loss = total / weight_of(ordered)
    return Loss(loss, math.exp(loss) if loss < 709 else math.inf, weight_of(ordered), len(ordered))


def spread(things: Sequence[Any], most: int | None) -> list[Any]:
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
