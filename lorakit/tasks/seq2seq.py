"""Sequence to sequence: an encoder reads a source, a decoder learns to write its target (T5, BART, mBART, Pegasus).

    loss = Σ −log p(target token | source, target tokens before it) / N        N: target tokens of the step

The rows are pairs (`data/pairs.py`). LoRA goes onto the linears of both halves, cross-attention included.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator

from ..config import Auto, Quantization, RunSettings, Strict, at_least_one, part
from ..errors import NotFiniteError, TrainError
from .task import Asked, Base, Data
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
from .text.settings import Columns, Lengths, Prompts, Sampling

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..data.pairs import PairItem
    from ..data.questions import Question


class Sides(Strict):
    """How the two sides of a row are written."""

    rows: ClassVar = {"max_target_length", "source_prefix", "source_language", "target_language"}

    max_target_length: int | Auto = Field(
        "auto", description="longest target in tokens (seq2seq); max_length is the source's there"
    )
    source_prefix: str = Field("", description="text before every source, such as 'summarize: ' for T5")
    source_language: str | None = Field(None, description="the sources' language, for tokenizers that have several")
    target_language: str | None = Field(None, description="the targets' language, for tokenizers that have several")

    _max_target_length = field_validator("max_target_length")(at_least_one)


class Seq2SeqSettings(Lengths, Sides, Columns, Prompts, Sampling):
    pass


settings = Seq2SeqSettings
peft_type = "SEQ_2_SEQ_LM"
summary = "write a text from another with an encoder-decoder (T5, BART)"
unit = "tokens"
writes = True
DEFAULT_PROMPTS = 2
_RECORDED = ("source_prefix", "source_language", "target_language")


# ------------------------------------------------------------------------------------- rows


def processor(config: RunSettings) -> Any:
    from ..data.pairs import with_languages
    from .text.kind import check_encoder_decoder
    from .text.vocabulary import load_extended_tokenizer

    check_encoder_decoder(config.model, blueprint(config))
    own = part(config, Sides)
    return with_languages(load_extended_tokenizer(config), own.source_language, own.target_language)


def resolved(config: RunSettings, processor: Any, earlier: Mapping[str, Any]) -> RunSettings:
    from .text.token_ids import with_token_ids

    return with_token_ids(config, processor)


def data(config: RunSettings, processor: Any) -> Data:
    from ..data.dataset import held_out_of
    from ..data.pairs import read_pairs
    from ..data.read import read_rows
    from .text.held_out import held_out_notes
    from .text.lengths import check_limit, described

    own = part(config, Seq2SeqSettings)
    check_limit(config)
    how: dict[str, Any] = {"columns": own.columns, "prefix": own.source_prefix, "on_long": own.on_long}
    pairs = read_pairs(
        read_rows(config.data, config.split, columns=own.columns),
        processor,
        max_length=own.max_length,
        max_target_length=own.max_target_length,
        **how,
    )
    notes = dict(pairs.notes)
    if isinstance(config.validation, str):
        limits: dict[str, Any] = {"max_length": pairs.source.limit, "max_target_length": pairs.target.limit}
        other = read_pairs(read_rows(config.validation, columns=own.columns), processor, **limits, **how)
        train, held_out = pairs.items, other.items
        both = f"{pairs.source.limit} and {pairs.target.limit}"
        notes |= held_out_notes(config.validation, other.notes, both, other.cut, other.dropped)
    else:
        train, held_out = held_out_of(pairs.items, config.validation)
    _check_ids(config, processor, [*train, *held_out])
    counts = {"dropped": pairs.dropped, "cut": pairs.cut}
    facts = [
        (side, described(limit.lengths, limit.limit, limit.reason, counts, config))
        for side, limit in (("sources", pairs.source), ("targets", pairs.target))
    ]
    about = {name: value for name in _RECORDED if (value := getattr(own, name))}
    return Data(train, held_out, "shape source/target", facts, about, notes)


def _check_ids(config: RunSettings, processor: Any, items: Sequence[PairItem]) -> None:
    """Raise ConfigError if a token of either side has no row in the base."""
    from dataclasses import replace

    from .text.vocabulary import check_vocabulary

    check_vocabulary(config, processor, [*items, *(replace(item, ids=item.target) for item in items)])


def recognizes(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]] = ()) -> bool:
    return False  # a decoder-only model learns the same rows: the base decides


def remembered(about: Mapping[str, Any], base: Any) -> dict[str, Any]:
    return {name: str(about[name]) for name in _RECORDED if about.get(name)}


# ------------------------------------------------------------------------------------- the base


def load(config: RunSettings, processor: Any, data: Data, dtype: torch.dtype, device: torch.device) -> Any:
    from ..bases.load import load_model
    from .text.start_token import start_as_trained
    from .text.vocabulary import grow_for

    model = load_model(
        config.model, dtype, device, config.revision, config.trust_remote_code, part(config, Quantization)
    )
    grow_for(config, model, processor)
    start_as_trained(model, processor)
    return model


def skeleton(config: RunSettings, base: Any, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForSeq2SeqLM

    from .text.kind import check_encoder_decoder
    from .text.vocabulary import grow_skeleton

    check_encoder_decoder(config.model, base)
    grow_skeleton(config, base)
    return AutoModelForSeq2SeqLM.from_config(base, dtype=dtype, trust_remote_code=config.trust_remote_code)


def check(config: RunSettings, model: Any, items: Iterable[PairItem]) -> None:
    from .text.positions import left_by

    positions = left_by(config, model)
    if positions is None:
        return
    for item in items:
        for side, ids, setting in (("source", item.ids, "max_length"), ("target", item.target, "max_target_length")):
            if len(ids) > positions:
                raise TrainError(
                    f"{item.where}: its {side} has {len(ids)} tokens, but {config.model} has {positions} positions\n"
                    f"  set {setting} to {positions} or less; on_long says whether longer rows are dropped or cut"
                )


def check_together(model: Any) -> None:
    """Raise TrainError if the output layer is adapted: it sees trained positions, without the rows they belong to."""
    from .causal_lm import check_together

    check_together(model)


def alone(config: RunSettings) -> str | None:
    return None


# ------------------------------------------------------------------------------------- batches and losses


def packs(config: RunSettings) -> bool:
    return False


def saved_padding(batches: Sequence[Sequence[PairItem]]) -> str:
    raise TrainError("seq2seq does not pack rows: an encoder's attention would reach from one source to the next")


def collate(items: Sequence[PairItem], base: Base, packed: bool = False) -> dict[str, Tensor]:
    from ..data.batches import pad_id
    from ..data.pairs import collate_pairs

    return collate_pairs(items, pad_id(base.processor))


def example(rows: int, size: int, share: float = 1.0, packed: bool = False) -> dict[str, Tensor]:
    """Return rows whose target is the last `share` of their `size` tokens; of a share of 1, half."""
    import torch

    target = max(1, round(size * (share if share < 1 else 0.5)))
    ids = torch.ones(rows, max(1, size - target), dtype=torch.long)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.ones(rows, target, dtype=torch.long),
    }


def losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
    from .text.target_loss import target_losses

    return target_losses(model, batch)


def evaluate(base: Base, items: Sequence[PairItem], batch_size: int) -> dict[str, float]:
    """Return the loss per target token and its perplexity. Raises NotFiniteError if a row's loss is not finite."""
    import torch

    from ..generate.eval_mode import evaluating

    ordered = sorted(items, key=lambda item: -item.size)  # similar lengths together need little padding
    total = 0.0
    with evaluating(base.model), torch.inference_mode():
        for start in range(0, len(ordered), batch_size):
            rows = ordered[start : start + batch_size]
            batch = {name: tensor.to(base.model.device) for name, tensor in collate(rows, base).items()}
            for item, loss in zip(rows, losses(base.model, batch).tolist(), strict=True):
                if not math.isfinite(loss):
                    raise NotFiniteError(
                        f"{item.where}: the loss is {loss}\n"
                        "  T5 and its kin overflow in float16: load the model in bfloat16 or float32 (--precision)"
                    )
                total += loss
    loss = total / sum(item.weight for item in items)
    return {"loss": loss, "perplexity": math.exp(loss) if loss < 709 else math.inf}  # exp(710) is beyond float64


# ------------------------------------------------------------------------------------- answers


def asked(base: Base, items: Sequence[PairItem]) -> list[Asked]:
    """Return the distinct sources, each with the distinct targets and references of its rows."""
    groups: dict[tuple[int, ...], list[PairItem]] = {}
    for item in items:
        groups.setdefault(item.split_key, []).append(item)
    return [
        Asked(
            list(ids),
            base.processor.decode(list(ids), skip_special_tokens=True),
            tuple(dict.fromkeys(answer.strip() for item in rows for answer in item.references)),
            rows[0].where,
        )
        for ids, rows in groups.items()
    ]


def to_predict(config: RunSettings, processor: Any) -> list[Question]:
    from ..data.pairs import read_sources
    from ..data.questions import Question
    from ..data.read import read_rows

    own = part(config, Seq2SeqSettings)
    rows = read_rows(config.data, config.split, columns=own.columns)
    ids = read_sources(rows, processor, own.columns, own.source_prefix)
    return [Question(each, row) for each, row in zip(ids, rows, strict=True)]


def predict(config: RunSettings, base: Base, items: Sequence[Question], batch_size: int) -> list[dict[str, Any]]:
    """Return {"answer": text} for each row; "cut": true where `sample_tokens` ended it."""
    from .text.answers import answers

    return answers(config, base, items, batch_size)


def prompts(config: RunSettings, base: Base, data: Data) -> list[Asked]:
    """Return the configured sources, or those of the first held-out rows."""
    from ..data.pairs import source_ids
    from ..generate.generate import check_prompts

    own = part(config, Seq2SeqSettings)
    if own.sample_tokens == 0:
        return []
    if not own.sample_prompts:
        return asked(base, data.held_out)[:DEFAULT_PROMPTS]
    ids = [source_ids(base.processor, text, own.source_prefix) for text in own.sample_prompts]
    check_prompts(base.model, ids, own.sample_tokens, [f"sample prompt {text!r}" for text in own.sample_prompts])
    return [Asked(each, text, (), "sample_prompts") for each, text in zip(ids, own.sample_prompts, strict=True)]


def samples(config: RunSettings, base: Base, prompts: Sequence[Asked]) -> list[TextSample]:
    from .text.answers import sampled

    return sampled(config, base, prompts)
