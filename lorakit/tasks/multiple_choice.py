"""Multiple choice: pick the right one of several answers, with a head on the base that scores each.

    loss = −log softmax(head(h_1), ..., head(h_n))[answer], averaged over rows
    h_k: a decoder's hidden state of the last token of question and choice k, an encoder's pooled one

The head has one output. Encoders that have a class for this (BertForMultipleChoice) take it; other models, among them
all decoders, take their class for classification with one label, of which the choices' outputs are compared. Both call
the head `classifier` or `score`, and PEFT's type is SEQ_CLS: it has none of its own for this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..config import RunSettings, part
from ..data.columns import OF_LANGUAGE_MODELS
from ..errors import TrainError
from .task import Base, Data
from .text import headed
from .text.headed import (  # noqa: F401 (names of the task)
    alone,
    asked,
    base_samples,
    blueprint,
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
from .text.settings import Columns, Lengths

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from torch import Tensor

    from ..data.choices import ChoiceItem


class MultipleChoiceSettings(Lengths, Columns):
    pass


settings = MultipleChoiceSettings
peft_type = "SEQ_CLS"
summary = "pick the right one of several answers"
unit = "rows"
CHOICES = 4  # of a row, for estimates: the commonest number
HEAD = {"num_labels": 1}


# ------------------------------------------------------------------------------------- rows


def processor(config: RunSettings) -> Any:
    from .text.vocabulary import load_extended_tokenizer

    return load_extended_tokenizer(config)


def data(config: RunSettings, processor: Any) -> Data:
    from ..data.choices import read_choices

    own = part(config, MultipleChoiceSettings)

    def read(rows: Any, first: Any) -> Any:
        max_length = own.max_length if first is None else first.max_length
        return read_choices(rows, processor, columns=own.columns, max_length=max_length, on_long=own.on_long)

    made, _ = headed.read_parts(config, processor, read)
    own_class = _auto_class(blueprint(config)).__name__
    return replace(made, about={**made.about, **HEAD, "model_class": own_class})


def recognizes(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]] = ()) -> bool:
    choices, before = row.get("choices"), {"question", "context"} & row.keys()
    texts = choices.get("text") if isinstance(choices, Mapping) else choices
    return bool(before) and isinstance(texts, list) and "answer" in row and not OF_LANGUAGE_MODELS & row.keys()


def remembered(about: Mapping[str, Any], base: Any) -> dict[str, Any]:
    return {}


# ------------------------------------------------------------------------------------- the base


def load(config: RunSettings, processor: Any, data: Data, dtype: torch.dtype, device: torch.device) -> Any:
    return headed.load_headed(config, processor, _auto_class(blueprint(config)), HEAD, dtype, device)


def skeleton(config: RunSettings, base: Any, dtype: torch.dtype) -> Any:
    return headed.skeleton_of(config, base, _auto_class(base), HEAD, dtype)


def _auto_class(base: Any) -> Any:
    """Return transformers' class that builds a base with a score for each choice. `base`: its config."""
    from transformers import AutoModelForMultipleChoice, AutoModelForSequenceClassification

    return AutoModelForMultipleChoice if _has_own_class(base) else AutoModelForSequenceClassification


def _has_own_class(base: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIPLE_CHOICE_MAPPING

    return type(base) in MODEL_FOR_MULTIPLE_CHOICE_MAPPING


def check(config: RunSettings, model: Any, items: Iterable[ChoiceItem]) -> None:
    from .text.positions import left_by

    positions = left_by(config, model)
    longest = max(items, key=lambda item: item.longest)
    if positions is not None and longest.longest > positions:
        raise TrainError(
            f"{longest.where}: a choice with its question is {longest.longest} tokens, but {config.model} has "
            f"{positions} positions\n"
            f"  set max_length to {positions} or less; on_long says whether longer rows are dropped or cut"
        )


# ------------------------------------------------------------------------------------- batches and losses


def collate(items: Sequence[ChoiceItem], base: Base, packed: bool = False) -> dict[str, Tensor]:
    from ..data.batches import pad_id
    from ..data.choices import collate_choices

    return collate_choices(items, pad_id(base.processor))


def example(rows: int, size: int, share: float = 1.0, packed: bool = False) -> dict[str, Tensor]:
    import torch

    ids = torch.ones(rows, max(1, size // CHOICES) * CHOICES, dtype=torch.long)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.zeros(rows, dtype=torch.long),
        "choices": torch.ones(rows, CHOICES, dtype=torch.bool),
    }


def losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return _losses(_scores(model, batch), batch["labels"])


def _scores(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the head's output for each choice: [rows, choices]."""
    rows, count = batch["choices"].shape
    parted = {name: batch[name].unflatten(1, (count, -1)) for name in headed.INPUTS if name in batch}
    if not _has_own_class(getattr(model, "module", model).config):
        parted = {name: tensor.flatten(0, 1) for name, tensor in parted.items()}
    logits: Tensor = headed.forward(model, parted).logits.float()
    return logits.reshape(rows, count)


def _losses(scores: Tensor, labels: Tensor) -> Tensor:
    import torch.nn.functional as F

    return F.cross_entropy(scores, labels, reduction="none")  # [rows]


def evaluate(base: Base, items: Sequence[ChoiceItem], batch_size: int) -> dict[str, float]:
    """Return the mean loss and the accuracy. Raises NotFiniteError if a row's loss is not finite."""
    from .metrics.classes import accuracy

    total, truth, predicted = 0.0, [], []
    for chosen, batch in headed.batches(base, items, batch_size, collate):
        scores = _scores(base.model, batch)
        for i, loss in zip(chosen, _losses(scores, batch["labels"]).tolist(), strict=True):
            total += headed.check_finite(items[i], loss)
        truth += batch["labels"].tolist()
        predicted += scores.argmax(1).tolist()
    return {"loss": total / len(truth), "accuracy": accuracy(truth, predicted)}


# ------------------------------------------------------------------------------------- predictions


def to_predict(config: RunSettings, processor: Any) -> list[ChoiceItem]:
    from ..data.choices import read_unchosen

    rows = headed.rows_of(config, config.data, config.split)
    return read_unchosen(rows, processor, part(config, Columns).columns, headed.longest_input(config))


def predict(config: RunSettings, base: Base, items: Sequence[ChoiceItem], batch_size: int) -> list[dict[str, Any]]:
    """Return {"answer", "choice", "score", "scores"} for each item: the index and the text of the choice, its
    probability, and those of all choices.
    """
    found: dict[int, dict[str, Any]] = {}
    for chosen, batch in headed.batches(base, items, batch_size, collate):
        for i, row in zip(chosen, _scores(base.model, batch).softmax(1).tolist(), strict=True):
            best = max(range(len(row)), key=row.__getitem__)
            scores = [round(score, 6) for score in row]
            found[i] = {"answer": best, "choice": items[i].choices[best], "score": scores[best], "scores": scores}
    return [found[i] for i in range(len(items))]
