"""Speech recognition: write what is said in a sound, with a Whisper (Radford et al. 2022).

    loss = −Σ log p(token | sound, tokens before it) over the texts' tokens / their number

Rows are sounds with texts (`data/sound/rows.py`). The tokens that the decoder starts from (language, task) are given to
it and not trained, and transcripts are generated from the same ones. PEFT has no task_type for such adapters: its class
for encoder-decoders calls them with token ids. It writes null, and so does lorakit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from ..config import Quantization, RunSettings, Strict, part
from ..errors import ConfigError, NotFiniteError, TrainError
from ..nondefault import nondefault
from .task import Base, Data
from .text.base import (  # noqa: F401 (names of the task)
    asked,
    blueprint,
    compares,
    defaults,
    drawn,
    for_run,
    loss_labels,
    margin,
    prepare,
    rate_factor,
    samples_from_file,
    save_adapter,
    size_unit,
    to_attach,
    tried_with,
    unsaved,
    writes,
)
from .text.samples import TextSample, base_samples, read_samples, write_samples  # noqa: F401
from .text.settings import Columns, Sampling

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..data.sound.spoken_item import SpokenItem
    from .media.listening import Listening


class Spoken(Strict):
    rows: ClassVar = {"language", "translate"}

    language: str | None = Field(
        None, description="the language that is spoken, for speech models that know several: en, or english"
    )
    translate: bool = Field(False, description="the texts are English translations of what is said")


class SpeechSettings(Spoken, Columns, Sampling):
    evaluated: ClassVar = {"sample_tokens"}  # word error rates are of transcripts


settings = SpeechSettings
peft_type = "SPEECH"
summary = "write what is said in a sound (a Whisper)"
unit = "tokens"
traced = False
shares = False
uses_all = True

DEFAULT_SAMPLES = 2
CPU_SOUNDS = 2  # sounds of a micro-batch on a CPU: each is 1,500 frames for the encoder, whatever is said in it
TYPICAL_TOKENS = 64  # of a sound, for that
# Settings of every run that a run on sounds does not use.
_UNUSED = ("compile", "add_tokens", "trainable_tokens")


@dataclass(frozen=True)
class Prompt:
    """A sound to transcribe. `text`: its name, to show."""

    item: SpokenItem
    text: str


# ------------------------------------------------------------------------------------- rows


def processor(config: RunSettings) -> Listening:
    from .media.listening import load_listening

    for name in nondefault(config, _UNUSED):
        raise ConfigError(f"{name}: task speech does not have it\n  remove {name}")
    own = part(config, SpeechSettings)
    if own.sample_beams > 1 or own.sample_temperature:
        raise ConfigError(
            "sample_beams, sample_temperature: transcripts are the likeliest token each time\n  remove them"
        )
    return load_listening(config, own.language, own.translate, own.sample_tokens)


def resolved(config: RunSettings, processor: Listening, earlier: Mapping[str, Any]) -> RunSettings:
    return config


def data(config: RunSettings, processor: Listening) -> Data:
    from ..data.dataset import held_out_of

    own = part(config, SpeechSettings)
    items, notes = _items(config, config.data, config.split, processor)
    if isinstance(config.validation, str):
        held, of_held = _items(config, config.validation, None, processor)
        train, held_out = items, held
        notes |= {f"{config.validation}: {note}": count for note, count in of_held.items()}
    else:
        train, held_out = held_out_of(items, config.validation)
    seconds = sum(item.sound.seconds for item in items)
    start = " ".join(processor.tokenizer.convert_ids_to_tokens(list(processor.start)))
    facts = [("decoder", f"starts from {start}, which is not trained")]
    about = {"language": own.language, "translate": own.translate} if own.language else {}
    return Data(train, held_out, f"sounds with texts, {seconds / 60:,.1f} minutes", facts, about, notes)


def _items(
    config: RunSettings, source: str, split: str | None, processor: Listening, needed: bool = True
) -> tuple[list[SpokenItem], dict[str, int]]:
    """Return the items of a source, and notes. `needed`: whether each must have a text."""
    from ..data.read import read_rows
    from ..data.sound.rows import read_spoken
    from ..data.sound.spoken_item import SpokenItem

    rows, notes = read_spoken(read_rows(source, split), part(config, Columns).columns, processor.seconds, needed)
    items = [
        SpokenItem(
            each.sound,
            processor.start,
            processor.ids(each.text) if each.text is not None and needed else (),
            each.text,
            each.row,
        )
        for each in rows
    ]
    return items, notes


def recognizes(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]] = ()) -> bool:
    from ..data.sound.rows import is_spoken

    return is_spoken(row)


def remembered(about: Mapping[str, Any], base: Any) -> dict[str, Any]:
    return {name: about[name] for name in ("language", "translate") if about.get(name)}


# ------------------------------------------------------------------------------------- the base


def load(config: RunSettings, processor: Listening, data: Data, dtype: torch.dtype, device: torch.device) -> Any:
    from transformers import AutoModelForSpeechSeq2Seq

    from ..bases.load_head import load_with_head

    return load_with_head(
        AutoModelForSpeechSeq2Seq,
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
    from transformers import AutoModelForSpeechSeq2Seq

    with torch.device("meta"):
        return AutoModelForSpeechSeq2Seq.from_config(base, dtype=dtype, trust_remote_code=config.trust_remote_code)


def configure(model: Any, device: torch.device, longest: int) -> None:
    """Do nothing: the model chooses its attention itself."""


def checkpoint(model: Any) -> None:
    from .media.checkpointing import checkpoint

    checkpoint(model)


def size_at_once(device: torch.device) -> int | None:
    return CPU_SOUNDS * TYPICAL_TOKENS if device.type == "cpu" else None


def learning_rate(config: RunSettings, model: Any) -> Any:
    from .text.base import suited_rate

    return suited_rate(getattr(model.config, "d_model", None))


def check(config: RunSettings, model: Any, items: Iterable[SpokenItem]) -> None:
    """Raise TrainError for a text that is longer than the decoder's positions."""
    positions: float = getattr(model.config, "max_target_positions", math.inf)
    for item in items:
        if item.size > positions:
            raise TrainError(
                f"{item.where}: its text has {item.size} tokens with those before it, but {config.model} has "
                f"{positions} positions\n  cut the sound into pieces, each with its own text"
            )


def check_together(model: Any) -> None:
    """Do nothing: `alone` already keeps this task out of sweeps."""


def alone(config: RunSettings) -> str | None:
    return (
        "task: runs on sounds do not share a forward pass, so a sweep does not train them side by side\n"
        "  start these runs one by one with lorakit train"
    )


# ------------------------------------------------------------------------------------- batches and losses


def packs(config: RunSettings) -> bool:
    return False


def saved_padding(batches: Sequence[Sequence[Any]]) -> str:
    raise TrainError("sounds are not packed")


def collate(items: Sequence[SpokenItem], base: Base, packed: bool = False) -> dict[str, Tensor]:
    """Return `input_features` [rows, mel bands, frames], and `decoder_input_ids` and `labels` [rows, length]."""
    import torch

    from ..data.batches import pad_id
    from ..ops import IGNORE_INDEX

    length = max(item.size for item in items) - 1
    inputs = torch.full((len(items), length), pad_id(base.processor.tokenizer))
    labels = torch.full((len(items), length), IGNORE_INDEX)
    for row, item in enumerate(items):
        ids = torch.tensor([*item.start, *item.ids])
        inputs[row, : len(ids) - 1] = ids[:-1]
        labels[row, len(item.start) - 1 : len(ids) - 1] = ids[len(item.start) :]
    features = base.processor.features([item.sound for item in items])
    return {"input_features": features, "decoder_input_ids": inputs, "labels": labels}


def example(rows: int, size: int, share: float = 1.0, packed: bool = False) -> dict[str, Tensor]:
    raise TrainError("a speech model's step is not run on shapes alone")


def losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
    import torch.nn.functional as F

    logits = model(
        input_features=batch["input_features"].to(model.dtype),
        decoder_input_ids=batch["decoder_input_ids"],
        use_cache=False,
    ).logits  # [rows, length, vocabulary]; padding is on the right, where no trained token looks
    found = F.cross_entropy(logits.float().flatten(0, 1), batch["labels"].flatten(), reduction="none")
    return found.view(batch["labels"].shape).sum(1)


def evaluate(base: Base, items: Sequence[SpokenItem], batch_size: int) -> dict[str, float]:
    """Return the loss per token, its perplexity, and the word error rate of transcripts unless sample_tokens is 0, with
    how many of them that limit cut off.

    Raises NotFiniteError if a row's loss is not finite.
    """
    import torch

    from ..generate.eval_mode import evaluating
    from .metrics.words import word_error_rate

    total = 0.0
    with evaluating(base.model), torch.inference_mode():
        for rows in _batches(items, batch_size):
            batch = {name: tensor.to(base.model.device) for name, tensor in collate(rows, base).items()}
            for item, loss in zip(rows, losses(base.model, batch).tolist(), strict=True):
                if not math.isfinite(loss):
                    raise NotFiniteError(
                        f"{item.where}: the loss is {loss}\n  load the model in bfloat16 or float32 rather than float16"
                    )
                total += loss
    loss = total / sum(item.weight for item in items)
    measured = {"loss": loss, "perplexity": math.exp(loss) if loss < 709 else math.inf}  # exp(710): beyond float64
    if base.processor.tokens:
        made = _transcripts(base, items, batch_size, base.processor.tokens)
        measured["wer"] = word_error_rate([item.text or "" for item in items], [text for text, _ in made])
        measured["cut"] = sum(cut for _, cut in made)
    return measured


def _batches(items: Sequence[SpokenItem], batch_size: int) -> Iterator[Sequence[SpokenItem]]:
    for start in range(0, len(items), batch_size):
        yield items[start : start + batch_size]


# ------------------------------------------------------------------------------------- transcripts


def _transcripts(base: Base, items: Sequence[SpokenItem], batch_size: int, tokens: int) -> list[tuple[str, bool]]:
    """Return each sound's transcript, and whether the limit of tokens ended it. The likeliest token each time."""
    import torch
    from transformers import GenerationMixin

    from ..generate.eval_mode import evaluating

    model, tokenizer = base.model, base.processor.tokenizer
    room = getattr(model.config, "max_target_positions", 1 << 30) - len(base.processor.start)
    found: list[tuple[str, bool]] = []
    with evaluating(model), torch.inference_mode():
        for rows in _batches(items, batch_size):
            start = torch.tensor([item.start for item in rows], device=model.device)
            features = base.processor.features([item.sound for item in rows])
            # Not Whisper's own `generate`, which chooses the start from the language, and cuts long sounds itself.
            made = GenerationMixin.generate(
                model,
                input_features=features.to(model.device, model.dtype),
                decoder_input_ids=start,
                max_new_tokens=min(tokens, room),
                do_sample=False,
                num_beams=1,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.eos_token_id,
            )[:, start.shape[1] :]
            for ids in made.tolist():
                ended = tokenizer.eos_token_id in ids
                found.append((tokenizer.decode(ids, skip_special_tokens=True).strip(), not ended))
    return found


def to_predict(config: RunSettings, processor: Listening) -> list[SpokenItem]:
    return _items(config, config.data, config.split, processor, needed=False)[0]


def predict(config: RunSettings, base: Base, items: Sequence[SpokenItem], batch_size: int) -> list[dict[str, Any]]:
    """Return {"text": transcript} for each sound; "cut": true where `sample_tokens` ended it."""
    tokens = part(config, SpeechSettings).sample_tokens
    made = _transcripts(base, items, batch_size, tokens)
    return [{"text": text} | ({"cut": True} if cut else {}) for text, cut in made]


def prompts(config: RunSettings, base: Base, data: Data) -> list[Prompt]:
    """Return the first held-out sounds."""
    if not part(config, SpeechSettings).sample_tokens:
        return []
    return [Prompt(item, item.where.rpartition(": ")[2]) for item in data.held_out[:DEFAULT_SAMPLES]]


def samples(config: RunSettings, base: Base, prompts: Sequence[Prompt]) -> list[TextSample]:
    items = [prompt.item for prompt in prompts]
    made = _transcripts(base, items, max(1, len(items)), part(config, SpeechSettings).sample_tokens) if items else []
    return [TextSample(prompt.text, text) for prompt, (text, _) in zip(prompts, made, strict=True)]


# ------------------------------------------------------------------------------------- the result


def recorded(config: RunSettings, processor: Listening) -> dict[str, Any]:
    return {}


def save_beside(config: RunSettings, processor: Listening, folder: Path) -> None:
    """Write nothing: the processor is the base's."""
