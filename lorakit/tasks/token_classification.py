"""Token classification: predict a tag for each word of a text, such as B-PER, with a head on the base.

    loss = −Σ log softmax(head(h_w))[tag_w] / words
    h_w: the hidden state of word w's first token

A decoder's state knows only what stands before and the token itself; an encoder's also what follows. The head is
transformers' `score` or `classifier` (`text/headed.py`), the tags' names are stored as classification's labels are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..config import RunSettings, part
from ..data.columns import OF_LANGUAGE_MODELS
from .classification import labels_shown, remembered  # noqa: F401 (names of the task)
from .task import Base, Data
from .text import headed
from .text.headed import (  # noqa: F401 (names of the task)
    alone,
    asked,
    base_samples,
    blueprint,
    check,
    check_together,
    checkpoint,
    compares,
    configure,
    defaults,
    drawn,
    for_run,
    learning_rate,
    loss_labels,
    margin,
    packs,
    prepare,
    prompts,
    rate_factor,
    read_samples,
    recorded,
    resolved,
    samples,
    samples_from_file,
    save_adapter,
    save_beside,
    saved_padding,
    shares,
    size_at_once,
    size_unit,
    to_attach,
    traced,
    tried_with,
    unsaved,
    uses_all,
    write_samples,
    writes,
)
from .text.settings import Columns, Labels, Lengths

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..data.tagged import TaggedItem


class TokenClassificationSettings(Labels, Lengths, Columns):
    pass


settings = TokenClassificationSettings
peft_type = "TOKEN_CLS"
summary = "predict a tag for each word, such as B-PER"
unit = "words"


# ------------------------------------------------------------------------------------- rows


def processor(config: RunSettings) -> Any:
    from .text.vocabulary import load_extended_tokenizer

    return load_extended_tokenizer(config)


def data(config: RunSettings, processor: Any) -> Data:
    from ..data.tagged import read_tagged

    own = part(config, TokenClassificationSettings)

    def read(rows: Any, first: Any) -> Any:
        max_length = own.max_length if first is None else first.max_length
        names = own.labels if first is None else first.names
        return read_tagged(
            rows, processor, columns=own.columns, names=names, max_length=max_length, on_long=own.on_long
        )

    made, first = headed.read_parts(config, processor, read)
    return replace(made, shape=f"{made.shape}; {labels_shown(first.names)}")


def recognizes(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]] = ()) -> bool:
    from ..data.tagged import ALIASES

    words, tags = (
        next((row[name] for name in (ours, *ALIASES[ours]) if name in row), None) for ours in ("tokens", "tags")
    )
    if not isinstance(words, list) or not isinstance(tags, list) or OF_LANGUAGE_MODELS & row.keys():
        return False
    # Of different lengths: the task's own error names the row, unless a language model could learn from the text.
    alike = len(words) == len(tags) or "text" not in row
    return alike and bool(words) and bool(tags) and all(isinstance(word, str) for word in words)


# ------------------------------------------------------------------------------------- the base


def load(config: RunSettings, processor: Any, data: Data, dtype: torch.dtype, device: torch.device) -> Any:
    from transformers import AutoModelForTokenClassification

    from ..bases.load_head import labelled

    names = data.about.get("labels") or part(config, TokenClassificationSettings).labels
    return headed.load_headed(config, processor, AutoModelForTokenClassification, labelled(names), dtype, device)


def skeleton(config: RunSettings, base: Any, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForTokenClassification

    labels = {"num_labels": max(2, len(part(config, TokenClassificationSettings).labels))}
    return headed.skeleton_of(config, base, AutoModelForTokenClassification, labels, dtype)


# ------------------------------------------------------------------------------------- batches and losses


def collate(items: Sequence[TaggedItem], base: Base, packed: bool = False) -> dict[str, Tensor]:
    from ..data.batches import pad_id
    from ..data.tagged import collate_tagged

    return collate_tagged(items, pad_id(base.processor))


def example(rows: int, size: int, share: float = 1.0, packed: bool = False) -> dict[str, Tensor]:
    import torch

    ids = torch.ones(rows, size, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.zeros_like(ids)}


def losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return _losses(_logits(model, batch), batch["labels"])


def _logits(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    logits: Tensor = headed.forward(model, batch).logits.float()  # [rows, tokens, labels]
    return logits


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    import torch.nn.functional as F

    from ..ops import IGNORE_INDEX

    losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORE_INDEX, reduction="none")
    return losses.sum(1)  # [rows]


def evaluate(base: Base, items: Sequence[TaggedItem], batch_size: int) -> dict[str, float]:
    """Return the mean loss of a word, and the accuracy over words; F1, precision and recall of entities if the tags
    mark such (B-, I-), else the words' macro F1. Raises NotFiniteError if a row's loss is not finite.
    """
    from ..ops import IGNORE_INDEX
    from .metrics.classes import accuracy, macro_f1
    from .metrics.spans import entity_scores

    total, truth, predicted = 0.0, [], []
    names = base.model.config.id2label
    for chosen, batch in headed.batches(base, items, batch_size, collate):
        logits = _logits(base.model, batch)
        guesses = logits.argmax(2).tolist()
        for i, guess, loss in zip(chosen, guesses, _losses(logits, batch["labels"]).tolist(), strict=True):
            total += headed.check_finite(items[i], loss)
            places = [place for place, label in enumerate(items[i].labels) if label != IGNORE_INDEX]
            truth.append([names[items[i].labels[place]] for place in places])
            predicted.append([names[guess[place]] for place in places])
    words = [tag for tags in truth for tag in tags], [tag for tags in predicted for tag in tags]
    measured = {"loss": total / len(words[0]), "accuracy": accuracy(*words)}
    if any(name.startswith(("B-", "I-")) for name in names.values()):
        scores = entity_scores(truth, predicted)
        return measured | {f"entity_{name}": scores[name] for name in ("f1", "precision", "recall")}
    return measured | {"macro_f1": macro_f1(*words)}


# ------------------------------------------------------------------------------------- predictions


def to_predict(config: RunSettings, processor: Any) -> list[TaggedItem]:
    from ..data.tagged import read_untagged

    rows = headed.rows_of(config, config.data, config.split)
    columns = part(config, TokenClassificationSettings).columns
    return read_untagged(rows, processor, columns, headed.longest_input(config))


def predict(config: RunSettings, base: Base, items: Sequence[TaggedItem], batch_size: int) -> list[dict[str, Any]]:
    """Return {"tags", "scores", "entities"} for each item: a tag and its probability for each word, and the entities.

    A word of which the tokenizer makes no token has the tag None.
    """
    from ..data.tagged import OUTSIDE, words_of
    from .metrics.spans import entities

    names = base.model.config.id2label
    found: dict[int, dict[str, Any]] = {}
    for chosen, batch in headed.batches(base, items, batch_size, collate):
        best = _logits(base.model, batch).softmax(2).max(2)
        scores, labels = best.values.tolist(), best.indices.tolist()
        for i, row_scores, row_labels in zip(chosen, scores, labels, strict=True):
            tags = [None if place is None else names[row_labels[place]] for place in items[i].places]
            words = words_of(items[i], part(config, TokenClassificationSettings).columns)
            spans = entities([tag or OUTSIDE for tag in tags])
            found[i] = {
                "tags": tags,
                "scores": [None if place is None else round(row_scores[place], 6) for place in items[i].places],
                "entities": [
                    {"kind": each.kind, "words": words[each.first : each.last + 1], "first": each.first}
                    for each in spans
                ],
            }
    return [found[i] for i in range(len(items))]
