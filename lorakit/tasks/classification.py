"""Sequence classification: predict a label for a text or a pair of texts with a head on the base.

    loss = −log softmax(head(h))[label], averaged over rows
    h: a decoder's hidden state of the last token, an encoder's pooled one

The head is transformers' `score` or `classifier` (`text/headed.py`). The label names are stored in the adapter's
metadata and in the model's config (id2label).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..config import RunSettings, part
from ..data.columns import is_labelled, may_be_classes
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

    from ..data.labelled import LabelledItem


class ClassificationSettings(Labels, Lengths, Columns):
    pass


settings = ClassificationSettings
peft_type = "SEQ_CLS"
summary = "predict a label for a text or a pair of texts"
unit = "rows"


# ------------------------------------------------------------------------------------- rows


def processor(config: RunSettings) -> Any:
    from .text.vocabulary import load_extended_tokenizer

    return load_extended_tokenizer(config)


def data(config: RunSettings, processor: Any) -> Data:
    from ..data.labelled import read_labelled

    own = part(config, ClassificationSettings)

    def read(rows: Any, first: Any) -> Any:
        max_length = own.max_length if first is None else first.max_length
        names = own.labels if first is None else first.names
        return read_labelled(
            rows, processor, columns=own.columns, names=names, max_length=max_length, on_long=own.on_long
        )

    made, first = headed.read_parts(config, processor, read)
    return replace(made, shape=f"{made.shape}; {labels_shown(first.names)}")


def labels_shown(names: Sequence[str]) -> str:
    """Describe label names for the start panel: their number and the first of them."""
    return f"{len(names)} labels: {', '.join(names[:12])}{' ...' * (len(names) > 12)}"


def recognizes(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]] = ()) -> bool:
    return is_labelled(row) and may_be_classes(each.get("label") for each in rows or [row])


def remembered(about: Mapping[str, Any], base: Any) -> dict[str, Any]:
    names = headed.names_of(about, base)
    return {"labels": names} if names else {}


# ------------------------------------------------------------------------------------- the base


def load(config: RunSettings, processor: Any, data: Data, dtype: torch.dtype, device: torch.device) -> Any:
    from transformers import AutoModelForSequenceClassification

    from ..bases.load_head import labelled

    names = data.about.get("labels") or part(config, ClassificationSettings).labels
    return headed.load_headed(config, processor, AutoModelForSequenceClassification, labelled(names), dtype, device)


def skeleton(config: RunSettings, base: Any, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForSequenceClassification

    labels = {"num_labels": max(2, len(part(config, ClassificationSettings).labels))}
    return headed.skeleton_of(config, base, AutoModelForSequenceClassification, labels, dtype)


# ------------------------------------------------------------------------------------- batches and losses


def collate(items: Sequence[LabelledItem], base: Base, packed: bool = False) -> dict[str, Tensor]:
    from ..data.batches import pad_id
    from ..data.labelled import collate_labelled

    return collate_labelled(items, pad_id(base.processor))


def example(rows: int, size: int, share: float = 1.0, packed: bool = False) -> dict[str, Tensor]:
    import torch

    ids = torch.ones(rows, size, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.zeros(rows, dtype=torch.long)}


def losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return _losses(_logits(model, batch), batch["labels"])


def _logits(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    logits: Tensor = headed.forward(model, batch).logits.float()  # [rows, labels]
    return logits


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    import torch.nn.functional as F

    return F.cross_entropy(logits, labels, reduction="none")  # [rows]


def evaluate(base: Base, items: Sequence[LabelledItem], batch_size: int) -> dict[str, float]:
    """Return the mean loss, accuracy, macro F1 and Matthews correlation. NotFiniteError if a loss is not finite."""
    from .metrics.classes import accuracy, macro_f1, matthews

    total, truth, predicted = 0.0, [], []
    for chosen, batch in headed.batches(base, items, batch_size, collate):
        logits = _logits(base.model, batch)
        for i, loss in zip(chosen, _losses(logits, batch["labels"]).tolist(), strict=True):
            total += headed.check_finite(items[i], loss)
        truth += batch["labels"].tolist()
        predicted += logits.argmax(1).tolist()
    return {
        "loss": total / len(truth),
        "accuracy": accuracy(truth, predicted),
        "macro_f1": macro_f1(truth, predicted),
        "matthews": matthews(truth, predicted),
    }


# ------------------------------------------------------------------------------------- predictions


def to_predict(config: RunSettings, processor: Any) -> list[LabelledItem]:
    from ..data.labelled import read_unlabelled

    columns = part(config, Columns).columns
    return read_unlabelled(
        headed.rows_of(config, config.data, config.split), processor, columns, headed.longest_input(config)
    )


def predict(config: RunSettings, base: Base, items: Sequence[LabelledItem], batch_size: int) -> list[dict[str, Any]]:
    """Return {"label", "score", "scores"} for each item; scores are probabilities by label name."""
    names = base.model.config.id2label
    found: dict[int, dict[str, Any]] = {}
    for chosen, batch in headed.batches(base, items, batch_size, collate):
        probabilities = _logits(base.model, batch).softmax(1)
        for i, row in zip(chosen, probabilities.tolist(), strict=True):
            best = max(range(len(row)), key=row.__getitem__)
            scores = {names[label]: round(score, 6) for label, score in enumerate(row)}
            found[i] = {"label": names[best], "score": round(row[best], 6), "scores": scores}
    return [found[i] for i in range(len(items))]
