"""Sequence classification: predict a label for a text or a pair of texts with a head on the base.

    loss = −log softmax(head(h))[label], averaged over rows
    h: a decoder's hidden state of the last token, an encoder's pooled one

The head (transformers' `score` or `classifier`) is initialized at random from the run's seed, trained in full and saved
with the adapter, as in PEFT (modules_to_save). The label names are stored in the adapter's metadata and in the model's
config (id2label).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..config import Quantization, RunSettings, part
from ..data.columns import is_labelled, is_measure
from ..errors import ConfigError, NotFiniteError, TrainError
from .task import Base, Data
from .text.base import (  # noqa: F401 (names of the task)
    blueprint,
    checkpoint,
    compares,
    configure,
    defaults,
    drawn,
    for_run,
    learning_rate,
    loss_labels,
    margin,
    prepare,
    rate_factor,
    recorded,
    samples_from_file,
    save_adapter,
    save_beside,
    shares,
    size_at_once,
    size_unit,
    to_attach,
    traced,
    tried_with,
    unsaved,
    uses_all,
)
from .text.samples import TextSample, base_samples, read_samples, write_samples  # noqa: F401
from .text.settings import Columns, Labels, Lengths

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..data.labelled import LabelledItem


class ClassificationSettings(Lengths, Labels, Columns):
    pass


settings = ClassificationSettings
peft_type = "SEQ_CLS"
summary = "predict a label for a text or a pair of texts"
unit = "rows"


# ------------------------------------------------------------------------------------- rows


def processor(config: RunSettings) -> Any:
    from .text.vocabulary import load_extended_tokenizer

    return load_extended_tokenizer(config)


def resolved(config: RunSettings, processor: Any, earlier: Mapping[str, Any]) -> RunSettings:
    from .text.token_ids import with_token_ids

    return with_token_ids(config, processor)


def data(config: RunSettings, processor: Any) -> Data:
    from ..data.dataset import held_out_of
    from ..data.labelled import read_labelled
    from ..data.read import read_rows
    from .text.lengths import check_limit, described
    from .text.vocabulary import check_vocabulary

    own = part(config, ClassificationSettings)
    for name in ("mix", "streaming"):
        if getattr(config, name, None):
            raise ConfigError(f"{name}: classification does not have it\n  remove {name}; one data set, in memory")
    check_limit(config)
    dataset = read_labelled(
        read_rows(config.data, config.split),
        processor,
        columns=own.columns,
        names=own.labels,
        max_length=own.max_length,
        on_long=own.on_long,
    )
    counts = {"dropped": dataset.dropped, "cut": dataset.cut}
    length = described(dataset.lengths, dataset.max_length, dataset.max_length_reason, counts, config)
    if isinstance(config.validation, str):
        validation = read_labelled(
            read_rows(config.validation),
            processor,
            columns=own.columns,
            names=dataset.names,
            max_length=dataset.max_length,
            on_long=own.on_long,
        )
        train, held_out = dataset.items, validation.items
    else:
        train, held_out = held_out_of(dataset.items, config.validation)
    check_vocabulary(config, processor, [*train, *held_out])
    names = dataset.names
    shape = f"shape {dataset.shape}; {len(names)} labels: {', '.join(names[:12])}{' ...' * (len(names) > 12)}"
    return Data(train, held_out, shape, [("length", length)], {"labels": names}, dataset.notes)


def recognizes(row: Mapping[str, Any]) -> bool:
    label = row.get("label")
    return is_labelled(row) and isinstance(label, str | int) and not is_measure(label)


def remembered(about: Mapping[str, Any], base: Any) -> dict[str, Any]:
    names = about.get("labels") or [base.id2label[label] for label in sorted(base.id2label)]
    return {} if names == [f"LABEL_{label}" for label in range(len(names))] else {"labels": list(names)}


# ------------------------------------------------------------------------------------- the base


def load(config: RunSettings, processor: Any, data: Data, dtype: torch.dtype, device: torch.device) -> Any:
    import torch
    from transformers import AutoModelForSequenceClassification

    from ..bases.load import load_config
    from ..bases.load_head import labelled, load_with_head
    from ..data.batches import pad_id
    from .text.vocabulary import grow_for

    base = load_config(config.model, config.revision, config.trust_remote_code)
    if base.is_encoder_decoder:
        raise TrainError(
            f"{config.model} is an encoder-decoder ({type(base).__name__}); classification needs an encoder or a "
            "decoder\n"
            "  choose another base (--model)"
        )
    torch.manual_seed(config.seed)  # for the new head's initialization
    model = load_with_head(
        AutoModelForSequenceClassification,
        config.model,
        dtype,
        device,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        changes=labelled(data.about["labels"]),
        trained=getattr(config, "save_modules", ()),
        quantization=part(config, Quantization),
    )
    grow_for(config, model, processor)
    return _configured(model, pad_id(processor))


def skeleton(config: RunSettings, base: Any, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForSequenceClassification

    from .text.vocabulary import grow_skeleton

    grow_skeleton(config, base)
    base.num_labels = max(2, len(part(config, ClassificationSettings).labels))
    model = AutoModelForSequenceClassification.from_config(
        base, dtype=dtype, trust_remote_code=config.trust_remote_code
    )
    return _configured(model, 0 if base.pad_token_id is None else base.pad_token_id)


def _configured(model: Any, pad: int) -> Any:
    """Set the padding id, by which a decoder finds each row's last token, and disable the KV cache, which is unused."""
    model.config.get_text_config().pad_token_id = model.config.pad_token_id = pad
    model.config.use_cache = False
    return model


def check(config: RunSettings, model: Any, items: Iterable[LabelledItem]) -> None:
    from .text.positions import check_positions

    check_positions(config, model, items)


def check_together(model: Any) -> None:
    """Do nothing: `alone` already keeps this task out of sweeps."""


def alone(config: RunSettings) -> str | None:
    return (
        "task: classification trains a head in full, and a sweep does not train several heads side by side yet\n"
        "  start these runs one by one with lorakit train"
    )


# ------------------------------------------------------------------------------------- batches and losses


def packs(config: RunSettings) -> bool:
    return False


def saved_padding(batches: Sequence[Sequence[LabelledItem]]) -> str:
    raise TrainError("classification does not pack rows: a decoder's head reads the last token of a sequence")


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
    # [rows, labels]
    return model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits.float()


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    import torch.nn.functional as F

    return F.cross_entropy(logits, labels, reduction="none")  # [rows]


def evaluate(base: Base, items: Sequence[LabelledItem], batch_size: int) -> dict[str, float]:
    """Return the mean loss, the accuracy and the macro F1. Raises NotFiniteError if a row's loss is not finite."""
    import torch

    from ..generate.eval_mode import evaluating

    ordered = sorted(items, key=lambda item: -item.size)  # similar lengths together need little padding
    total, truth, predicted = 0.0, [], []
    with evaluating(base.model), torch.inference_mode():
        for start in range(0, len(ordered), batch_size):
            rows = ordered[start : start + batch_size]
            batch = {name: tensor.to(base.model.device) for name, tensor in collate(rows, base).items()}
            logits = _logits(base.model, batch)
            for item, loss in zip(rows, _losses(logits, batch["labels"]).tolist(), strict=True):
                if not math.isfinite(loss):
                    raise NotFiniteError(
                        f"{item.where}: the loss is {loss}\n  load the model in bfloat16 or float32 rather than float16"
                    )
                total += loss
            truth += [item.label for item in rows]
            predicted += logits.argmax(1).tolist()
    correct = sum(t == p for t, p in zip(truth, predicted, strict=True))
    return {"loss": total / len(truth), "accuracy": correct / len(truth), "macro_f1": macro_f1(truth, predicted)}


def macro_f1(truth: Sequence[int], predicted: Sequence[int]) -> float:
    """Average the labels' F1 = 2·TP / (2·TP + FP + FN), over all labels in `truth` or `predicted` (as scikit-learn)."""
    pairs = list(zip(truth, predicted, strict=True))
    scores = []
    for label in {*truth, *predicted}:
        hits = sum(t == p == label for t, p in pairs)
        scores.append(2 * hits / (sum(t == label for t, _ in pairs) + sum(p == label for _, p in pairs)))
    return sum(scores) / len(scores)


# ------------------------------------------------------------------------------------- samples


def prompts(config: RunSettings, base: Base, data: Data) -> list[Any]:
    return []


def samples(config: RunSettings, base: Base, prompts: Sequence[Any]) -> list[TextSample]:
    return []
