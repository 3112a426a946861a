"""The same rows judged with the base alone and with each adapter, side by side.

    report = evaluate(model, tokenizer, items, [None, "sql"], generate=True)
    rich.print(report.table());  json.dumps(report.to_dict())

Loss and perplexity are over the trained positions. Text is made greedily from each distinct prompt once; the answers of
all rows with that prompt, and what their `references` column lists, are its references. In a conversation the first
trained answer is the one asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..data.batches import pad_id
from ..errors import ConfigError, DataError, StateError, did_you_mean, listing
from ..generate.generate import check_prompts
from ..generate.generate import generate as write
from ..tasks.text.perplexity import Loss, perplexity
from .metrics import Scores, score

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..data.dataset import Item

BASE = "base"


@dataclass(frozen=True)
class Prompt:
    """A distinct prompt and every right answer to it. `where`: its first row."""

    ids: tuple[int, ...]
    text: str
    references: tuple[str, ...]
    where: str


@dataclass(frozen=True)
class Judged:
    """One adapter's result, None being the base. `texts` answer the report's prompts, in their order; without
    generation, none. `cut`: how many of them the limit of new tokens ended.
    """

    adapter: str | None
    loss: Loss
    scores: Scores | None = None
    texts: tuple[str, ...] = ()
    cut: int = 0

    @property
    def label(self) -> str:
        return BASE if self.adapter is None else self.adapter


@dataclass(frozen=True)
class Report:
    """All results over the same rows; `samples` are the indices of the prompts to show."""

    judged: tuple[Judged, ...]
    prompts: tuple[Prompt, ...] = ()
    samples: tuple[int, ...] = ()

    def table(self) -> Table:
        """One line for each adapter."""
        from rich.table import Table

        first = self.judged[0].loss
        scored = self.judged[0].scores is not None
        title = f"{first.rows:,} rows, {first.tokens:,} trained tokens" + (
            f"; text from {len(self.prompts):,} prompts" if scored else ""
        )
        table = Table(title=title)
        table.add_column("")
        for name in ("loss", "perplexity", *(("BLEU", "chrF", "ROUGE-L", "exact match", "cut off") if scored else ())):
            table.add_column(name, justify="right")
        for one in self.judged:
            s = one.scores
            text = [f"{value:.1f}" for value in (s.bleu, s.chrf, s.rouge_l, s.exact_match)] if s else []
            text += [f"{one.cut:,}"] if s else []
            table.add_row(one.label, f"{one.loss.loss:.4f}", f"{one.loss.perplexity:,.2f}", *text)
        if any(one.cut for one in self.judged):
            table.caption = "cut off: answers that reached --max-new-tokens before their end"
        return table

    def sample_table(self) -> Table | None:
        """A few prompts with their first reference and every adapter's text; None without generation."""
        from rich.table import Table
        from rich.text import Text

        if not self.samples:
            return None
        table = Table(show_lines=True)
        for name in ("prompt", "reference", *(one.label for one in self.judged)):
            table.add_column(Text(name), overflow="fold")
        for i in self.samples:
            prompt = self.prompts[i]
            cells = (prompt.text, prompt.references[0], *(one.texts[i] for one in self.judged))
            table.add_row(*map(Text, cells))  # Text: square brackets in the data are no markup
        return table

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
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
    """Judge the base (None) and the named adapters on `items`; the adapters active before are active again afterwards.

    `max_prompts` bounds the prompts that text is made from, taken evenly from all. `on_rows` hears what is being done
    ("base: loss", "sql: text") and how many rows were just finished.
    """
    wanted = list(dict.fromkeys(adapters))
    _check_adapters(model, wanted)
    prompts = _spread(prompts_of(items, tokenizer, references_column), max_prompts) if generate else []
    check_prompts(model, [p.ids for p in prompts], max_new_tokens, [p.where for p in prompts])
    pad = pad_id(tokenizer)
    judged = []
    with _adapters_restored(model):
        for name in wanted:
            _use(model, name)
            label = BASE if name is None else name
            loss = perplexity(model, items, pad, batch_size, _told(on_rows, f"{label}: loss"))
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
                on_batch=_told(on_rows, f"{label}: text"),
                on_cut=cut.append,
            )
            texts = [text.strip() for text in texts]
            judged.append(Judged(name, loss, score(texts, [p.references for p in prompts]), tuple(texts), len(cut)))
    return Report(tuple(judged), tuple(prompts), tuple(_spread(range(len(prompts)), samples)))


def prompts_of(
    items: Sequence[Item], tokenizer: PreTrainedTokenizerBase, references_column: str = "references"
) -> list[Prompt]:
    """The distinct prompts of `items` in order of appearance, each with all answers that its rows give, without
    repeats.
    """
    groups: dict[tuple[int, ...], list[Item]] = {}
    for item in items:
        start = item.prompt_length
        if start == 0:
            raise DataError(
                f"{item.row.where}: the row has no prompt to generate from (plain text is trained from its first "
                "token)\n"
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
    """At most so many of the things, evenly from the first on."""
    if most is None or len(things) <= most:
        return list(things)
    return [things[i * len(things) // most] for i in range(most)]


def _told(on_rows: Callable[[str, int], None] | None, what: str) -> Callable[[int], None] | None:
    return None if on_rows is None else lambda rows: on_rows(what, rows)


# ------------------------------------------------------------------------------------------ adapters


def _check_adapters(model: PreTrainedModel, wanted: Sequence[str | None]) -> None:
    from ..model.activate import adapters

    attached = adapters(model)
    if not wanted:
        raise ConfigError("no adapter to judge\n  expected names of attached adapters, or None for the base")
    for name in wanted:
        if name is not None and name not in attached:
            known = listing(attached) if attached else "none"
            raise StateError(
                f"no adapter named '{name}' is attached{did_you_mean(name, attached)}\n  attached: {known}"
            )


def _use(model: PreTrainedModel, which: str | Mapping[str, float] | None) -> None:
    from ..model.activate import activate, adapters

    if adapters(model):  # a model without adapters is its base already
        activate(model, which)


@contextmanager
def _adapters_restored(model: PreTrainedModel) -> Iterator[None]:
    from ..model.activate import active, adapters

    before = active(model) if adapters(model) else {}
    try:
        yield
    finally:
        _use(model, before or None)
