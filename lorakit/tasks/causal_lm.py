"""Causal language modelling: predict each trained token from the tokens before it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from ..config import RunSettings, Strict, part
from ..errors import TrainError
from .task import Base, Data
from .text.settings import Columns, Lengths

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..data.dataset import Dataset, Item

DEFAULT_PROMPTS = 2


class Writing(Strict):
    rows: ClassVar = {"template", "train_on"}

    template: Literal["auto", "chat", "plain"] = Field(
        "auto", description="chat: the tokenizer's template; plain: ours; auto: chat if there is one"
    )
    train_on: Literal["completion", "all"] = Field(
        "completion", description="train on the answers only, or on all tokens"
    )


class CausalSettings(Lengths, Writing, Columns):
    free: ClassVar = {"sample_prompts", "sample_tokens"}

    sample_prompts: list[str] = Field(
        default_factory=list,
        description="prompts answered at each evaluation by base and adapter; default: two held-out rows",
    )
    sample_tokens: int = Field(64, ge=0, description="tokens per sample; 0: no samples")


settings = CausalSettings
peft_type = "CAUSAL_LM"
summary = "predict the next token (a language model)"
unit = "tokens"


@dataclass(frozen=True)
class Prompt:
    text: str
    ids: list[int]


# ------------------------------------------------------------------------------------- rows


def processor(config: RunSettings) -> Any:
    from ..bases.load import load_tokenizer

    return load_tokenizer(config.model, config.revision, config.trust_remote_code)


def data(config: RunSettings, processor: Any) -> Data:
    from ..data.dataset import build, held_out_of
    from ..data.read import read_rows
    from .text.lengths import check_limit, described

    own = part(config, CausalSettings)
    check_limit(config)

    def read(source: str, split: str | None, max_length: int | Literal["auto"]) -> Dataset:
        return build(
            read_rows(source, split),
            processor,
            columns=own.columns or None,
            template=own.template,
            train_on=own.train_on,
            max_length=max_length,
            on_long=own.on_long,
        )

    dataset = read(config.data, config.split, own.max_length)
    counts = {"dropped": dataset.dropped, "cut": dataset.cut, "split": dataset.split}
    length = described(dataset.lengths, dataset.max_length, dataset.max_length_reason, counts, config)
    notes = dict(dataset.notes)
    if isinstance(config.validation, str):
        validation = read(config.validation, None, dataset.max_length)
        train, held_out = dataset.items, validation.items
        if validation.dropped:
            notes[f"of {config.validation} are longer than {dataset.max_length} tokens and are not evaluated"] = (
                validation.dropped
            )
    else:
        train, held_out = held_out_of(dataset.items, config.validation)
    return Data(train, held_out, dataset.shape, length, {"template": dataset.style}, notes)


def remembered(about: Mapping[str, Any], base: Any) -> dict[str, Any]:
    return {}


# ------------------------------------------------------------------------------------- the base


def load(config: RunSettings, processor: Any, data: Data, dtype: torch.dtype, device: torch.device) -> Any:
    from ..bases.load import load_model

    return load_model(config.model, dtype, device, config.revision, config.trust_remote_code)


def skeleton(config: RunSettings, base: Any, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(base, dtype=dtype, trust_remote_code=config.trust_remote_code)


def check(config: RunSettings, model: Any, items: Sequence[Item]) -> None:
    from .text.positions import check_positions

    if model.config.is_encoder_decoder:
        raise TrainError(
            f"{config.model} is an encoder-decoder ({type(model).__name__}); expected a decoder-only model\n"
            "  choose another base (--model)"
        )
    check_positions(config, model, items)


def check_together(model: Any) -> None:
    """Raise TrainError if the output layer is adapted: it sees trained positions, without the rows they belong to."""
    from ..layers.layer import LoraLayer

    if isinstance(model.get_output_embeddings(), LoraLayer):
        raise TrainError(
            "the targets include the output layer, which gets trained positions rather than rows, so runs cannot share "
            "its forward pass\n"
            "  remove it from the targets, or start these runs one by one with lorakit train"
        )


def alone(config: RunSettings) -> str | None:
    return None


# ------------------------------------------------------------------------------------- batches and losses


def collate(items: Sequence[Item], base: Base) -> dict[str, Tensor]:
    from ..data.batches import collate, pad_id

    return collate(items, pad_id(base.processor))


def example(rows: int, size: int, share: float = 1.0) -> dict[str, Tensor]:
    """Return rows of token 0, of which the last `share` is trained."""
    import torch

    from ..ops import IGNORE_INDEX

    ids = torch.zeros(rows, size, dtype=torch.long)
    labels = ids.clone()
    labels[:, : min(size - 1, round((1 - share) * size))] = IGNORE_INDEX
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
    from .text.causal_loss import row_losses

    return row_losses(model, batch)


def evaluate(base: Base, items: Sequence[Item], batch_size: int) -> dict[str, float]:
    from ..data.batches import pad_id
    from .text.perplexity import perplexity

    measured = perplexity(base.model, items, pad_id(base.processor), batch_size)
    return {"loss": measured.loss, "perplexity": measured.perplexity}


# ------------------------------------------------------------------------------------- samples


def prompts(config: RunSettings, base: Base, data: Data) -> list[Prompt]:
    """Return the configured prompts in the data's template, or those of the first held-out rows.

    Held-out rows are used if they have a prompt and the model has positions left for an answer.
    """
    from ..data.render import question_ids
    from ..generate.generate import check_prompts, positions_of

    own = part(config, CausalSettings)
    if own.sample_tokens == 0:
        return []
    if own.sample_prompts:
        ids = [question_ids(text, base.processor, data.about["template"]) for text in own.sample_prompts]
        check_prompts(base.model, ids, own.sample_tokens, [f"sample prompt {text!r}" for text in own.sample_prompts])
        return [Prompt(text, i) for text, i in zip(own.sample_prompts, ids, strict=True)]
    positions = positions_of(base.model)
    room = math.inf if positions is None else positions - own.sample_tokens
    chosen: list[Prompt] = []
    for item in data.held_out:
        prompt = item.ids[: item.prompt_length]
        if 0 < len(prompt) <= room and prompt not in [p.ids for p in chosen]:
            chosen.append(Prompt(base.processor.decode(prompt), prompt))
        if len(chosen) == DEFAULT_PROMPTS:
            break
    return chosen


def samples(config: RunSettings, base: Base, prompts: Sequence[Prompt]) -> list[str]:
    """Generate one greedy answer per prompt."""
    from ..generate.generate import generate

    tokens = part(config, CausalSettings).sample_tokens
    return generate(base.model, base.processor, [p.ids for p in prompts], max_new_tokens=tokens) if prompts else []
