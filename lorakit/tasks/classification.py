"""Sequence classification: a label for each text, or pair of texts, from a head on the base (transformers' `score` or
`classifier`).

    loss = −log softmax(head(h))[label], the mean over rows        h: the last token's hidden state of a decoder, the
                                                                   pooled one of an encoder

The head starts anew, at random by the run's seed; it is trained whole and saved with the adapter, as PEFT does
(modules_to_save). The labels' names travel in the adapter's metadata and in the model's config (id2label).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from ..config import RunSettings, part
from ..errors import NotFiniteError, TrainError
from .task import Base, Data
from .text.settings import Columns, Lengths

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..data.labelled import LabelledItem


class ClassificationSettings(Lengths, Columns):
    rows: ClassVar = {"labels"}

    labels: list[str] = Field(
        default_factory=list,
        description="names of the labels, in the order of their numbers; default: those of the data, sorted",
    )


settings = ClassificationSettings
peft_type = "SEQ_CLS"
summary = "a label for each text, or pair of texts"
unit = "rows"


# ------------------------------------------------------------------------------------- rows


def processor(config: RunSettings) -> Any:
    from ..bases.load import load_tokenizer

    return load_tokenizer(config.model, config.revision, config.trust_remote_code)


def data(config: RunSettings, processor: Any) -> Data:
    from ..data.dataset import held_out_of
    from ..data.labelled import read_labelled
    from ..data.read import read_rows

    own = part(config, ClassificationSettings)
    found = read_labelled(
        read_rows(config.data, config.split),
        processor,
        columns=own.columns,
        names=own.labels,
        max_length=own.max_length,
        on_long=own.on_long,
    )
    if isinstance(config.validation, str):
        held = read_labelled(
            read_rows(config.validation),
            processor,
            columns=own.columns,
            names=found.names,
            max_length=found.max_length,
            on_long=own.on_long,
        )
        train, held_out = found.items, held.items
    else:
        train, held_out = held_out_of(found.items, config.validation)
    left_out = "".join(f", {count} {what}" for count, what in ((found.dropped, "dropped"), (found.cut, "cut")) if count)
    length = f"at most {found.max_length} tokens ({found.max_length_reason}){left_out}"
    shape = f"{found.shape}; {len(found.names)} labels: {', '.join(found.names[:12])}{' ...' * (len(found.names) > 12)}"
    return Data(train, held_out, shape, length, {"labels": found.names}, found.notes)


def remembered(about: Mapping[str, Any], base: Any) -> dict[str, Any]:
    names = about.get("labels") or [base.id2label[number] for number in sorted(base.id2label)]
    return {} if names == [f"LABEL_{number}" for number in range(len(names))] else {"labels": list(names)}


# ------------------------------------------------------------------------------------- the base


def load(config: RunSettings, processor: Any, data: Data, dtype: torch.dtype, device: torch.device) -> Any:
    import torch

    from ..bases.load import load_classifier, load_config
    from ..data.batches import pad_id

    base = load_config(config.model, config.revision, config.trust_remote_code)
    if base.is_encoder_decoder:
        raise TrainError(
            f"{config.model} is an encoder-decoder ({type(base).__name__}); classification takes an encoder or a "
            "decoder"
        )
    torch.manual_seed(config.seed)  # a fresh head's start
    trained = getattr(config, "save_modules", ())
    model = load_classifier(
        config.model, data.about["labels"], dtype, device, config.revision, config.trust_remote_code, trained
    )
    return _settled(model, pad_id(processor))


def skeleton(config: RunSettings, base: Any, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForSequenceClassification

    base.num_labels = max(2, len(part(config, ClassificationSettings).labels))
    made = AutoModelForSequenceClassification.from_config(base, dtype=dtype, trust_remote_code=config.trust_remote_code)
    return _settled(made, 0 if base.pad_token_id is None else base.pad_token_id)


def _settled(model: Any, pad: int) -> Any:
    """With what a decoder needs: its last token is told by the padding; keys and values are kept for nobody."""
    model.config.get_text_config().pad_token_id = model.config.pad_token_id = pad
    model.config.use_cache = False
    return model


def check(config: RunSettings, model: Any, items: Sequence[LabelledItem]) -> None:
    from .text.positions import check_positions

    check_positions(config, model, items)


def check_together(model: Any) -> None:
    """Nothing: such runs train alone."""


def alone(config: RunSettings) -> str | None:
    return (
        "task: classification trains a head whole, which takes the base's place for every row, so runs cannot share a "
        "pass\n"
        "  start such runs one by one with lorakit train"
    )


# ------------------------------------------------------------------------------------- batches and losses


def collate(items: Sequence[LabelledItem], base: Base) -> dict[str, Tensor]:
    from ..data.batches import pad_id
    from ..data.labelled import collate_labelled

    return collate_labelled(items, pad_id(base.processor))


def example(rows: int, size: int, share: float = 1.0) -> dict[str, Tensor]:
    import torch

    ids = torch.ones(rows, size, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.zeros(rows, dtype=torch.long)}


def losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return _losses(_logits(model, batch), batch["labels"])


def _logits(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    # [rows, labels]
    return model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits.float()


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    import torch.nn.functional as F

    return F.cross_entropy(logits, labels, reduction="none")  # [rows]


def evaluate(base: Base, items: Sequence[LabelledItem], batch_size: int) -> dict[str, float]:
    """The mean loss, the share of right labels, and the mean of the labels' F1."""
    import torch

    from ..generate.eval_mode import evaluating

    ordered = sorted(items, key=lambda item: -item.size)  # like lengths together: little padding
    total, truth, predicted = 0.0, [], []
    with evaluating(base.model), torch.inference_mode():
        for start in range(0, len(ordered), batch_size):
            part = ordered[start : start + batch_size]
            batch = {name: tensor.to(base.model.device) for name, tensor in collate(part, base).items()}
            logits = _logits(base.model, batch)
            for item, loss in zip(part, _losses(logits, batch["labels"]).tolist(), strict=True):
                if not math.isfinite(loss):
                    raise NotFiniteError(
                        f"{item.where}: the loss is {loss}\n  load the model in bfloat16 or float32 rather than float16"
                    )
                total += loss
            truth += [item.label for item in part]
            predicted += logits.argmax(1).tolist()
    right = sum(t == p for t, p in zip(truth, predicted, strict=True))
    return {"loss": total / len(truth), "accuracy": right / len(truth), "macro_f1": macro_f1(truth, predicted)}


def macro_f1(truth: Sequence[int], predicted: Sequence[int]) -> float:
    """The mean of each label's F1 = 2·TP / (2·TP + FP + FN), over labels that are right or predicted somewhere
    (scikit-learn's).
    """
    pairs = list(zip(truth, predicted, strict=True))
    scores = []
    for label in {*truth, *predicted}:
        hits = sum(t == p == label for t, p in pairs)
        scores.append(2 * hits / (sum(t == label for t, _ in pairs) + sum(p == label for _, p in pairs)))
    return sum(scores) / len(scores)


# ------------------------------------------------------------------------------------- samples


def prompts(config: RunSettings, base: Base, data: Data) -> list[Any]:
    return []


def samples(config: RunSettings, base: Base, prompts: Sequence[Any]) -> list[str]:
    return []
