"""Regression: predict a number for a text or a pair of texts with a head on the base.

    loss = (head(h) − number)², averaged over rows
    h: a decoder's hidden state of the last token, an encoder's pooled one

The head is transformers' `score` or `classifier` with one output (num_labels 1, problem_type "regression"). Numbers are
not standardized: a decoder's head has no bias that could hold the mean afterwards, so predictions would not come out in
the data's own units in PEFT. A note says where numbers are too large or too far from 0 to be learnt quickly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..config import RunSettings, part
from ..data.columns import is_labelled, may_be_measures
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
    import torch
    from torch import Tensor

    from ..data.labelled import LabelledItem


class RegressionSettings(Lengths, Columns):
    pass


settings = RegressionSettings
peft_type = "SEQ_CLS"
summary = "predict a number for a text or a pair of texts"
unit = "rows"
HEAD = {"num_labels": 1, "problem_type": "regression"}
# Beyond these a head that starts near 0 moves slowly towards the data at the rates that suit LoRA.
FAR, SMALL = 20.0, 0.05


# ------------------------------------------------------------------------------------- rows


def processor(config: RunSettings) -> Any:
    from .text.vocabulary import load_extended_tokenizer

    return load_extended_tokenizer(config)


def data(config: RunSettings, processor: Any) -> Data:
    from ..data.labelled import read_measured

    own = part(config, RegressionSettings)

    def read(rows: Any, first: Any) -> Any:
        max_length = own.max_length if first is None else first.max_length
        return read_measured(rows, processor, columns=own.columns, max_length=max_length, on_long=own.on_long)

    made, first = headed.read_parts(config, processor, read)
    mean, deviation = first.about["targets"]["mean"], first.about["targets"]["deviation"]
    notes = dict(made.notes)
    if abs(mean) > FAR or deviation > FAR or deviation < SMALL:
        notes[
            f"their numbers (mean {mean:.4g}, deviation {deviation:.2g}) are far from 0 to 10, and a head that starts "
            "near 0 learns them slowly: shift and scale them in the data, and predictions back"
        ] = len(first.items)
    shape = f"{made.shape}; numbers of mean {mean:.4g}, deviation {deviation:.4g}"
    return replace(made, shape=shape, notes=notes, about={**made.about, "num_labels": 1})


def recognizes(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]] = ()) -> bool:
    return is_labelled(row) and may_be_measures(each.get("label") for each in rows or [row])


def remembered(about: Mapping[str, Any], base: Any) -> dict[str, Any]:
    return {}


# ------------------------------------------------------------------------------------- the base


def load(config: RunSettings, processor: Any, data: Data, dtype: torch.dtype, device: torch.device) -> Any:
    from transformers import AutoModelForSequenceClassification

    return headed.load_headed(config, processor, AutoModelForSequenceClassification, HEAD, dtype, device)


def skeleton(config: RunSettings, base: Any, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForSequenceClassification

    return headed.skeleton_of(config, base, AutoModelForSequenceClassification, HEAD, dtype)


def margin(base: float) -> float:
    """Return the base's own loss, at least that of other tasks: a loss in the data's unit, squared, has any size."""
    return max(headed.MARGIN, base)


# ------------------------------------------------------------------------------------- batches and losses


def collate(items: Sequence[LabelledItem], base: Base, packed: bool = False) -> dict[str, Tensor]:
    import torch

    from ..data.batches import pad_id
    from ..data.labelled import collate_labelled

    batch = collate_labelled(items, pad_id(base.processor))
    return batch | {"labels": batch["labels"].to(torch.float32)}


def example(rows: int, size: int, share: float = 1.0, packed: bool = False) -> dict[str, Tensor]:
    import torch

    ids = torch.ones(rows, size, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.zeros(rows)}


def losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return (_values(model, batch) - batch["labels"]).square()  # [rows]


def _values(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    values: Tensor = headed.forward(model, batch).logits.float().squeeze(1)  # [rows]
    return values


def evaluate(base: Base, items: Sequence[LabelledItem], batch_size: int) -> dict[str, float]:
    """Return the mean squared error, and Pearson's and Spearman's correlation (NaN where they are not defined).

    Raises NotFiniteError if a row's loss is not finite.
    """
    from .metrics.values import mean_squared_error, pearson, spearman

    truth, predicted = [], []
    for chosen, batch in headed.batches(base, items, batch_size, collate):
        for i, value in zip(chosen, _values(base.model, batch).tolist(), strict=True):
            headed.check_finite(items[i], value)
            truth.append(float(items[i].label))
            predicted.append(value)
    return {
        "loss": mean_squared_error(truth, predicted),
        "pearson": pearson(truth, predicted),
        "spearman": spearman(truth, predicted),
    }


# ------------------------------------------------------------------------------------- predictions


def to_predict(config: RunSettings, processor: Any) -> list[LabelledItem]:
    from ..data.labelled import read_unlabelled

    columns = part(config, Columns).columns
    return read_unlabelled(
        headed.rows_of(config, config.data, config.split), processor, columns, headed.longest_input(config)
    )


def predict(config: RunSettings, base: Base, items: Sequence[LabelledItem], batch_size: int) -> list[dict[str, Any]]:
    """Return {"value"} for each item, in the data's own unit."""
    found: dict[int, float] = {}
    for chosen, batch in headed.batches(base, items, batch_size, collate):
        found |= dict(zip(chosen, _values(base.model, batch).tolist(), strict=True))
    return [{"value": round(found[i], 6)} for i in range(len(items))]
