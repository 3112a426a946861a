"""Embeddings: vectors of texts in which what belongs together is near (contrastive learning on any encoder or decoder).

    pairs with negatives: InfoNCE over the batch; pairs with scores: squared error of the cosine     (`text/vectors.py`)

There is no head: the adapter is on the base model itself (transformers' AutoModel, PEFT's FEATURE_EXTRACTION). How
texts are pooled, and their prefixes, are kept in the adapter's metadata.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from ..config import Quantization, RunSettings, Strict, part
from ..errors import NotFiniteError, TrainError
from .task import Base, Data
from .text.base import (  # noqa: F401 (names of the task)
    asked,
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
    size_unit,
    to_attach,
    traced,
    tried_with,
    unsaved,
    writes,
)
from .text.headed import read_parts, resolved, rows_of  # noqa: F401 (names of the task)
from .text.samples import TextSample, base_samples, read_samples, write_samples  # noqa: F401
from .text.settings import Columns, Lengths

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..data.contrasts import ContrastItem, Encoding
    from ..data.fields import RowSet
    from ..data.parse import Row


class Vectors(Strict):
    """How texts become vectors, and vectors a loss."""

    rows: ClassVar = {"pooling", "query_prefix", "passage_prefix", "score_range"}
    anew: ClassVar = {"contrast_temperature"}

    pooling: Literal["mean", "last", "cls"] = Field(
        "mean", description="a text's vector: the mean of its tokens' states, that of its end token, or the first one's"
    )
    contrast_temperature: float = Field(
        0.05, gt=0, allow_inf_nan=False, description="what cosines are divided by before the softmax over a batch"
    )
    query_prefix: str = Field("", description="text before every anchor, such as 'query: ' for E5")
    passage_prefix: str = Field("", description="text before every positive and negative, such as 'passage: ' for E5")
    score_range: list[float] = Field(
        default_factory=list, description="lowest and highest score of pairs, as [0, 5]; default: those of the data"
    )

    @field_validator("score_range")
    @classmethod
    def _two(cls, value: list[float]) -> list[float]:
        if value and (len(value) != 2 or not value[0] < value[1]):
            raise ValueError(f"expected the lowest and the highest score, such as [0, 5] (got {value})")
        return value


class EmbeddingSettings(Lengths, Columns, Vectors):
    pass


settings = EmbeddingSettings
peft_type = "FEATURE_EXTRACTION"
summary = "turn texts into vectors: similar texts, search (contrastive)"
unit = "rows"
shares = False  # a row's loss depends on its run's other rows
uses_all = False  # an encoder's pooler is adapted, and not used
_RECORDED = ("pooling", "contrast_temperature", "query_prefix", "passage_prefix", "score_range")
RECALLS = (1, 5, 10)


# ------------------------------------------------------------------------------------- rows


def processor(config: RunSettings) -> Any:
    from .text.vocabulary import load_extended_tokenizer

    return load_extended_tokenizer(config)


def _encoding(own: Vectors, processor: Any) -> Encoding:
    from ..data.contrasts import Encoding

    return Encoding(processor, own.query_prefix, own.passage_prefix, with_end=own.pooling == "last")


def data(config: RunSettings, processor: Any) -> Data:
    from dataclasses import replace

    from ..data.contrasts import read_contrasts

    own = part(config, EmbeddingSettings)

    def read(rows: Sequence[Row], first: RowSet | None) -> RowSet:
        known = own.score_range if first is None else first.about.get("score_range", ())
        return read_contrasts(
            rows,
            _encoding(own, processor),
            columns=own.columns,
            score_range=known,
            max_length=own.max_length if first is None else first.max_length,
            on_long=own.on_long,
        )

    data, _ = read_parts(config, processor, read)
    about = {name: value for name in _RECORDED if (value := getattr(own, name))} | dict(data.about)
    return replace(data, about=about)


def recognizes(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]] = ()) -> bool:
    return "positive" in row and bool({"anchor", "query"} & row.keys())


def remembered(about: Mapping[str, Any], base: Any) -> dict[str, Any]:
    return {name: about[name] for name in _RECORDED if about.get(name)}


# ------------------------------------------------------------------------------------- the base


def load(config: RunSettings, processor: Any, data: Data, dtype: torch.dtype, device: torch.device) -> Any:
    import torch
    from transformers import AutoModel

    from ..bases.load_head import load_with_head
    from .text.vocabulary import grow_for

    _check_kind(config, blueprint(config))
    torch.manual_seed(config.seed)  # for a pooler that the folder lacks; its values are not used
    model = load_with_head(
        AutoModel,
        config.model,
        dtype,
        device,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        trained=("pooler", *getattr(config, "save_modules", ())),
        quantization=part(config, Quantization),
    )
    grow_for(config, model, processor)
    model.config.use_cache = False
    return model


def skeleton(config: RunSettings, base: Any, dtype: torch.dtype) -> Any:
    from transformers import AutoModel

    from .text.vocabulary import grow_skeleton

    _check_kind(config, base)
    grow_skeleton(config, base)
    model = AutoModel.from_config(base, dtype=dtype, trust_remote_code=config.trust_remote_code)
    model.config.use_cache = False
    return model


def _check_kind(config: RunSettings, base: Any) -> None:
    if base.is_encoder_decoder:
        raise TrainError(
            f"{config.model} is an encoder-decoder ({type(base).__name__}); the task embeddings needs an encoder or a "
            "decoder\n"
            "  choose another base (--model)"
        )


def check(config: RunSettings, model: Any, items: Iterable[ContrastItem]) -> None:
    """Raise TrainError for a text longer than the model's positions, and for batches that would be divided."""
    from .text.positions import left_by

    positions, contrasted = left_by(config, model), False
    for item in items:
        longest = max(map(len, item.texts))
        contrasted = contrasted or item.score is None
        if positions is not None and longest > positions:
            raise TrainError(
                f"{item.where}: {longest} tokens, but {config.model} has {positions} positions\n"
                f"  set max_length to {positions} or less; on_long says whether longer rows are dropped or cut"
            )
    if contrasted:
        _check_whole(config)


def _check_whole(config: RunSettings) -> None:
    import torch.distributed as dist

    if config.micro_batch != "auto" and int(config.micro_batch) < config.batch_size:
        raise TrainError(
            f"micro_batch: {config.micro_batch}: a batch of {config.batch_size} rows is contrasted as a whole, and "
            "parts of it would have fewer negatives\n"
            "  omit micro_batch: the texts of large batches are encoded in portions, which does not change the loss"
        )
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise TrainError(
            "embeddings: a batch is contrasted as a whole, and several processes would each have a part of it\n"
            "  start one process"
        )


def size_at_once(device: torch.device) -> None:
    """Return None: a batch is computed as a whole (see `text/vectors.py`)."""


def check_together(model: Any) -> None:
    """Do nothing: each run of a sweep computes its own batches."""


def alone(config: RunSettings) -> str | None:
    return None


# ------------------------------------------------------------------------------------- batches and losses


def packs(config: RunSettings) -> bool:
    return False


def saved_padding(batches: Sequence[Sequence[ContrastItem]]) -> str:
    raise TrainError("embeddings does not pack rows: each text has a vector of its own")


def collate(items: Sequence[ContrastItem], base: Base, packed: bool = False) -> dict[str, Tensor]:
    """Return the texts of a batch (`text.vectors.pooled`) in the order anchors, positives, negatives, with the pairs'
    `scores` [rows], or with what is `masked` [rows, candidates] and the `temperature` [].
    """
    import torch

    from ..data.batches import pad_id
    from .text.vectors import masked, pooled

    own = part(base.config, Vectors)
    texts = [item.texts[0] for item in items] + [item.texts[1] for item in items]
    texts += [text for item in items for text in item.texts[2:]]
    batch = pooled(texts, own.pooling, pad_id(base.processor))
    if items[0].score is not None:
        return batch | {"scores": torch.tensor([float(item.score or 0.0) for item in items])}
    return batch | {"masked": masked(items), "temperature": torch.tensor(own.contrast_temperature)}


def example(rows: int, size: int, share: float = 1.0, packed: bool = False) -> dict[str, Tensor]:
    """Return pairs with scores: a row of `size` is two texts of half of it."""
    import torch

    ids = torch.ones(2 * rows, max(1, size // 2), dtype=torch.long)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pool": torch.ones(ids.shape) / ids.shape[1],
        "scores": torch.ones(rows),
    }


def losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
    from .text.vectors import contrast_losses, encoded, score_losses

    vectors = encoded(model, batch)
    if "scores" in batch:
        first, second = vectors.chunk(2)
        return score_losses(first, second, batch["scores"])
    rows = len(batch["masked"])
    return contrast_losses(vectors[:rows], vectors[rows:], batch["masked"], batch["temperature"])


def evaluate(base: Base, items: Sequence[ContrastItem], batch_size: int) -> dict[str, float]:
    """Return the loss, and Spearman's correlation of cosines and scores; or recall@1, 5 and 10.

    All rows are contrasted with each other: a row's candidates are the positives and negatives of all of them. So the
    loss grows with their number, and a training step's, over a batch, is lower.
    """
    import torch

    from .metrics.retrieval import ranks_of, recall_at
    from .metrics.values import spearman
    from .text.vectors import contrast_losses, masked, score_losses

    first, second, others = vectors_of(
        base,
        [item.texts[0] for item in items],
        [item.texts[1] for item in items],
        [text for item in items for text in item.texts[2:]],
        batch_size=batch_size,
    )
    if items[0].score is not None:
        scores = [float(item.score or 0.0) for item in items]
        losses = score_losses(first, second, torch.tensor(scores))
        loss = _mean(losses, items)
        return {"loss": loss, "spearman": spearman(scores, (first * second).sum(1).tolist())}
    candidates, hidden = torch.cat([second, others]), masked(items)
    temperature = torch.tensor(part(base.config, Vectors).contrast_temperature)
    loss = _mean(contrast_losses(first, candidates, hidden, temperature), items)
    cosines = (first @ candidates.T).masked_fill(hidden, -math.inf)  # [rows, candidates]
    ranks = ranks_of(cosines, torch.arange(len(items)))
    return {"loss": loss, **{f"recall_at_{k}": recall_at(ranks, k) for k in RECALLS}}


def _mean(losses: Tensor, items: Sequence[ContrastItem]) -> float:
    values = losses.tolist()
    for item, loss in zip(items, values, strict=True):
        if not math.isfinite(loss):
            raise NotFiniteError(
                f"{item.where}: the loss is {loss}\n  load the model in bfloat16 or float32 rather than float16"
            )
    return math.fsum(values) / len(values)


def vectors_of(base: Base, *sides: Sequence[Sequence[int]], batch_size: int) -> list[Tensor]:
    """Return the vectors of several lists of texts (token ids), [texts, width] each, on the CPU; equal texts once."""
    import torch

    from ..data.batches import pad_id
    from ..generate.eval_mode import evaluating
    from .text.vectors import encoded, pooled

    own = part(base.config, Vectors)
    texts = sorted({tuple(text) for side in sides for text in side}, key=lambda text: (-len(text), text))
    found: list[Tensor] = []
    with evaluating(base.model), torch.inference_mode():
        for start in range(0, len(texts), batch_size):
            batch = pooled(texts[start : start + batch_size], own.pooling, pad_id(base.processor))
            batch = {name: tensor.to(base.model.device) for name, tensor in batch.items()}
            found.append(encoded(base.model, batch).cpu())
    every = torch.cat(found)  # [texts, width]
    place = {text: i for i, text in enumerate(texts)}
    return [every[[place[tuple(text)] for text in side]] for side in sides]


# ------------------------------------------------------------------------------------- vectors to use


def to_predict(config: RunSettings, processor: Any) -> list[ContrastItem]:
    from ..data.contrasts import read_texts
    from .text.headed import longest_input

    own = part(config, EmbeddingSettings)
    rows = rows_of(config, config.data, config.split)
    return read_texts(rows, _encoding(own, processor), own.columns, longest_input(config))


def predict(config: RunSettings, base: Base, items: Sequence[ContrastItem], batch_size: int) -> list[dict[str, Any]]:
    """Return {"vector": [...]} for each row; for one of two texts also "vector_pair" and their cosine, "similarity"."""
    firsts, seconds = [item.texts[0] for item in items], [item.texts[-1] for item in items]
    first, second = vectors_of(base, firsts, seconds, batch_size=batch_size)
    found = []
    for item, v, w in zip(items, first, second, strict=True):
        row: dict[str, Any] = {"vector": _written(v)}
        if len(item.texts) > 1:
            row |= {"vector_pair": _written(w), "similarity": float(f"{float(v @ w):.6g}")}
        found.append(row)
    return found


def _written(vector: Tensor) -> list[float]:
    return [float(f"{value:.8g}") for value in vector.tolist()]  # float32 has no more digits


def prompts(config: RunSettings, base: Base, data: Data) -> list[Any]:
    return []


def samples(config: RunSettings, base: Base, prompts: Sequence[Any]) -> list[TextSample]:
    return []
