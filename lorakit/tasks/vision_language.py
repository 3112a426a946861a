"""Vision-language modelling: predict the tokens of answers in conversations with pictures (LLaVA and others).

    loss = −Σ log p(token | pictures, tokens before it) over the answers' tokens / their number

Rows are conversations whose contents have pictures (`data/pictures/messages.py`). The base's processor decides how a
picture becomes ids and pixels (`media/visual.py`), its chat template how a conversation is written. By default the
linears of the language model are adapted; the vision tower and the layers between the two stay as they are, unless
`targets` or `exclude` say otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import Quantization, RunSettings, part
from ..data.pictures.settings import Decoding
from ..errors import ConfigError, NotFiniteError, TrainError
from ..nondefault import nondefault
from .causal_lm import Answers
from .task import Base, Data
from .text.base import (  # noqa: F401 (names of the task)
    asked,
    blueprint,
    compares,
    drawn,
    for_run,
    learning_rate,
    loss_labels,
    margin,
    prepare,
    rate_factor,
    samples_from_file,
    save_adapter,
    size_at_once,
    size_unit,
    to_attach,
    tried_with,
    unsaved,
    writes,
)
from .text.samples import TextSample, base_samples, read_samples, write_samples  # noqa: F401
from .text.settings import Columns, MaxLength, Sampling

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..data.pictures.visual_item import VisualItem
    from .media.visual import Visual


class VisionLanguageSettings(Decoding, MaxLength, Answers, Columns, Sampling):
    pass


settings = VisionLanguageSettings
peft_type = "CAUSAL_LM"
summary = "answer in conversations with pictures (a vision-language model)"
unit = "tokens"
traced = False
shares = False
uses_all = False  # a batch without pictures gives a trained vision tower no gradient

DEFAULT_PROMPTS = 2
_RECORDED = ("background", "animated", "train_on", "turns")
# What transformers calls the language model in a vision-language model; everything else is left as it is.
OUTSIDE = r"(?!(?:.*\.)?(?:language_model|text_model)\.).*"
_BY_TEXT = ("input_ids", "attention_mask", "labels")  # a batch's tensors that are not the pictures'
# Settings of every run that a run on pictures does not use.
_UNUSED = ("compile", "add_tokens", "trainable_tokens")


def defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what is not the language model, unless the run says itself what is adapted."""
    return {} if given.keys() & {"targets", "exclude"} else {"exclude": OUTSIDE}


@dataclass(frozen=True)
class Prompt:
    """A conversation up to an answer. `text`: to show."""

    item: VisualItem
    text: str


# ------------------------------------------------------------------------------------- rows


def processor(config: RunSettings) -> Visual:
    from .media.visual import load_visual

    for name in nondefault(config, _UNUSED):
        raise ConfigError(f"{name}: task vision_language does not have it\n  remove {name}")
    return load_visual(config)


def resolved(config: RunSettings, processor: Visual, earlier: Mapping[str, Any]) -> RunSettings:
    return config


def data(config: RunSettings, processor: Visual) -> Data:
    from ..bases.load import end_tokens
    from ..data.dataset import held_out_of
    from ..data.read import read_rows
    from .media.visual_rows import read_conversations
    from .text.held_out import held_out_notes
    from .text.lengths import check_limit

    own = part(config, VisionLanguageSettings)
    check_limit(config)
    ends = end_tokens(config.model, config.revision, config.trust_remote_code)
    read = read_conversations(read_rows(config.data, config.split), processor, own, ends)
    notes = read.notes
    if isinstance(config.validation, str):
        held = read_conversations(read_rows(config.validation), processor, own, ends, read.limit)
        train, held_out = read.items, held.items
        notes = notes | held_out_notes(config.validation, held.notes, read.limit, dropped=held.dropped)
    else:
        train, held_out = held_out_of(read.items, config.validation)
    facts = [("length", read.length)]
    if getattr(config, "exclude", None) == OUTSIDE:
        facts.append(("adapted", "the language model; its vision tower stays as it is (exclude)"))
    shape = f"conversations with {read.pictures:,} pictures"
    about = {"template": "chat"} | {name: getattr(own, name) for name in _RECORDED}
    return Data(train, held_out, shape, facts, about, notes)


def recognizes(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]] = ()) -> bool:
    from ..data.pictures.messages import has_picture

    return any(has_picture(each) for each in rows or [row])


def remembered(about: Mapping[str, Any], base: Any) -> dict[str, Any]:
    return {name: about[name] for name in _RECORDED if name in about}


# ------------------------------------------------------------------------------------- the base


def load(config: RunSettings, processor: Visual, data: Data, dtype: torch.dtype, device: torch.device) -> Any:
    from transformers import AutoModelForImageTextToText

    from ..bases.load_head import load_with_head

    return load_with_head(
        AutoModelForImageTextToText,
        config.model,
        dtype,
        device,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        trained=getattr(config, "save_modules", ()),
        quantization=part(config, Quantization),
    )


def skeleton(config: RunSettings, base: Any, dtype: torch.dtype) -> Any:
    import torch
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(base, dtype=dtype, trust_remote_code=config.trust_remote_code)


def configure(model: Any, device: torch.device, longest: int) -> None:
    """Do nothing: the model chooses its attention itself."""


def checkpoint(model: Any) -> None:
    from .media.checkpointing import checkpoint

    checkpoint(model)


def check(config: RunSettings, model: Any, items: Iterable[VisualItem]) -> None:
    from .text.positions import check_positions

    if model.config.is_encoder_decoder:
        raise TrainError(
            f"{config.model} is an encoder-decoder ({type(model).__name__}); expected a model that reads pictures and "
            "answers as one sequence\n  choose another base (--model)"
        )
    check_positions(config, model, items)


def check_together(model: Any) -> None:
    """Do nothing: `alone` already keeps this task out of sweeps."""


def alone(config: RunSettings) -> str | None:
    return (
        "task: runs on pictures do not share a forward pass, so a sweep does not train them side by side\n"
        "  start these runs one by one with lorakit train"
    )


# ------------------------------------------------------------------------------------- batches and losses


def packs(config: RunSettings) -> bool:
    return False


def saved_padding(batches: Sequence[Sequence[Any]]) -> str:
    raise TrainError("conversations with pictures are not packed")


def collate(items: Sequence[VisualItem], base: Base, packed: bool = False) -> dict[str, Tensor]:
    made: dict[str, Tensor] = base.processor.batch(items)
    return made


def example(rows: int, size: int, share: float = 1.0, packed: bool = False) -> dict[str, Tensor]:
    raise TrainError("a vision-language model's step is not run on shapes alone")


def losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
    from .media.visual import KINDS
    from .text.causal_loss import row_losses

    besides = {name: _as_computed(model, value) for name, value in batch.items() if name not in _BY_TEXT}
    if KINDS in besides:
        besides[KINDS] = besides[KINDS][:, :-1]  # as the ids: the last token predicts nothing
    return row_losses(model, batch, besides)


def _as_computed(model: Any, value: Tensor) -> Tensor:
    """Return pixels in the model's precision; ids, masks and sizes as they are."""
    return value.to(model.dtype) if value.is_floating_point() else value


def evaluate(base: Base, items: Sequence[VisualItem], batch_size: int) -> dict[str, float]:
    """Return the loss per trained token and its perplexity. Raises NotFiniteError if a row's loss is not finite."""
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
                        f"{item.where}: the loss is {loss}\n  load the model in bfloat16 or float32 rather than float16"
                    )
                total += loss
    loss = total / sum(item.weight for item in items)
    return {"loss": loss, "perplexity": math.exp(loss) if loss < 709 else math.inf}  # exp(710) is beyond float64


# ------------------------------------------------------------------------------------- answers


def to_predict(config: RunSettings, processor: Visual) -> list[VisualItem]:
    from ..data.read import read_rows
    from .media.visual_rows import read_asked

    return read_asked(read_rows(config.data, config.split), processor, part(config, VisionLanguageSettings))


def predict(config: RunSettings, base: Base, items: Sequence[VisualItem], batch_size: int) -> list[dict[str, Any]]:
    """Return {"answer": text} for each item; "cut": true where `sample_tokens` ended it."""
    cut: set[int] = set()
    texts = _answers(config, base, items, batch_size, on_cut=cut.add)
    return [{"answer": text.strip()} | ({"cut": True} if i in cut else {}) for i, text in enumerate(texts)]


def _answers(
    config: RunSettings, base: Base, items: Sequence[VisualItem], batch_size: int = 8, **options: Any
) -> list[str]:
    from ..generate.generate import check_prompts, generate
    from .text.answers import options_of

    def inputs(rows: Sequence[int], ids: Tensor) -> dict[str, Tensor]:
        pixels = base.processor.pixels([items[row] for row in rows])
        return {name: _as_computed(base.model, value) for name, value in pixels.items()} | base.processor.kinds(ids)

    prompts, settings = [item.ids for item in items], options_of(config)
    check_prompts(base.model, prompts, settings["max_new_tokens"], [item.where for item in items])
    return generate(
        base.model, base.processor.tokenizer, prompts, batch_size=batch_size, inputs=inputs, **settings, **options
    )


def prompts(config: RunSettings, base: Base, data: Data) -> list[Prompt]:
    """Return the conversations of the first held-out rows, up to their first answers."""
    from ..generate.generate import positions_of
    from .media.visual_rows import prompt_of, shown

    tokens = part(config, VisionLanguageSettings).sample_tokens
    positions = positions_of(base.model)
    room = math.inf if positions is None else positions - tokens
    found = [prompt_of(item) for item in data.held_out[:DEFAULT_PROMPTS]] if tokens else []
    return [Prompt(item, shown(item, base.processor.tokenizer)) for item in found if 0 < item.size <= room]


def samples(config: RunSettings, base: Base, prompts: Sequence[Prompt]) -> list[TextSample]:
    if not prompts:
        return []
    texts = _answers(config, base, [prompt.item for prompt in prompts], seed=config.seed)
    return [TextSample(prompt.text, text) for prompt, text in zip(prompts, texts, strict=True)]


# ------------------------------------------------------------------------------------- the result


def recorded(config: RunSettings, processor: Visual) -> dict[str, Any]:
    return {}


def save_beside(config: RunSettings, processor: Visual, folder: Path) -> None:
    """Write nothing: the processor is the base's."""
