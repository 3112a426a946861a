"""Image classification: predict a label for a picture with a head on a vision model.

    loss = −log softmax(head(h))[label], averaged over pictures        h: the model's pooled hidden state

The base is any class of transformers' AutoModelForImageClassification (ViT, DINOv2, Swin, ConvNeXt, ...), and its image
processor makes the pixels. The head (`classifier`) is fresh, from the run's seed, unless the base has one for as many
labels; it is trained in full and saved with the adapter, as in PEFT (modules_to_save). PEFT has no task_type for such
adapters, and writes null. Label names are stored in the adapter's metadata and in the model's config (id2label).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from ..config import Choice, Quantization, RunSettings, part
from ..data.pictures.settings import Decoding, Mirroring
from ..errors import ConfigError, NotFiniteError, TrainError
from ..nondefault import nondefault
from .task import Base, Data
from .text.base import (  # noqa: F401 (names of the task)
    asked,
    blueprint,
    compares,
    defaults,
    for_run,
    loss_labels,
    margin,
    prepare,
    rate_factor,
    samples_from_file,
    save_adapter,
    to_attach,
    tried_with,
    unsaved,
    writes,
)
from .text.samples import TextSample, base_samples, read_samples, write_samples  # noqa: F401
from .text.settings import Columns, Labels

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..data.pictures.labelled_item import LabelledPicture

# Pixels of a micro-batch on a CPU: as many patches of 16 x 16 as a language model has tokens there.
CPU_PIXELS = 4096 * 16 * 16
SHAPES = 8  # of pictures that are tried on the base before the first step


class ImageClassificationSettings(Decoding, Mirroring, Labels, Columns):
    rows: ClassVar = {"random_crop"}

    random_crop: float = Field(
        1.0,
        gt=0,
        le=1,
        description="random crops, drawn anew in each epoch, keep at least this share of a picture's area (0.5 is a "
        "common choice); 1: no crops",
    )


settings = ImageClassificationSettings
peft_type = "IMAGE_CLASSIFICATION"
summary = "predict a label for a picture (a vision model)"
unit = "pictures"
size_unit = "pixels"
traced = False
shares = False
uses_all = False  # DINOv2 has a mask token that only its pretraining uses

_RECORDED = ("background", "animated")  # what the model saw of a picture's transparent parts and frames

# Settings of every run that a run on pictures does not use.
_UNUSED = ("compile", "add_tokens", "trainable_tokens")


# ------------------------------------------------------------------------------------- pictures


def processor(config: RunSettings) -> Any:
    from ..bases.load_processor import load_image_processor

    for name in nondefault(config, _UNUSED):
        raise ConfigError(f"{name}: task image_classification does not have it\n  remove {name}")
    return load_image_processor(config.model, config.revision, config.trust_remote_code)


def resolved(config: RunSettings, processor: Any, earlier: Mapping[str, Any]) -> RunSettings:
    return config


def data(config: RunSettings, processor: Any) -> Data:
    from ..data.dataset import held_out_of
    from .media.pictures import read_labelled_pictures

    own = part(config, ImageClassificationSettings)
    read = read_labelled_pictures(config.data, config.split, own, processor, own.labels)
    if len(read.names) < 2:
        raise ConfigError(
            f"{config.data}: every picture has the label '{read.names[0]}'; classification needs two labels at least"
        )
    if isinstance(config.validation, str):
        held = read_labelled_pictures(config.validation, None, own, processor, read.names)
        train, held_out = read.items, held.items
        notes = read.notes | {f"{config.validation}: {note}": count for note, count in held.notes.items()}
    else:
        train, held_out = held_out_of(read.items, config.validation)
        notes = read.notes
    names = read.names
    shape = f"pictures with labels; {len(names)} labels: {', '.join(names[:12])}{' ...' * (len(names) > 12)}"
    augmenting = [f"crops of at least {own.random_crop:g} of the area"] if own.random_crop < 1 else []
    augmenting += ["mirrored with probability 1/2"] if own.flip else []
    facts = [("pictures", read.sizes), ("augmented", ", ".join(augmenting) or "no (flip, random_crop)")]
    about = {"labels": names} | {name: getattr(own, name) for name in _RECORDED}
    return Data(train, held_out, shape, facts, about, notes)


def drawn(item: LabelledPicture, seed: int, epoch: int) -> LabelledPicture:
    return item.drawn(seed, epoch)


def recognizes(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]] = ()) -> bool:
    from ..data.pictures.labelled import is_labelled_picture

    return is_labelled_picture(row)


def remembered(about: Mapping[str, Any], base: Any) -> dict[str, Any]:
    from .text.headed import names_of

    names = names_of(about, base)
    return {name: about[name] for name in _RECORDED if name in about} | ({"labels": names} if names else {})


# ------------------------------------------------------------------------------------- the base


def load(config: RunSettings, processor: Any, data: Data, dtype: torch.dtype, device: torch.device) -> Any:
    import torch
    from transformers import AutoModelForImageClassification

    from ..bases.load_head import labelled, load_with_head

    torch.manual_seed(config.seed)  # for the new head's initialization
    return load_with_head(
        AutoModelForImageClassification,
        config.model,
        dtype,
        device,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        changes=labelled(data.about["labels"]),
        trained=getattr(config, "save_modules", ()),
        quantization=part(config, Quantization),
    )


def skeleton(config: RunSettings, base: Any, dtype: torch.dtype) -> Any:
    import torch
    from transformers import AutoModelForImageClassification

    labels = part(config, ImageClassificationSettings).labels
    base.num_labels = len(labels) or max(2, base.num_labels)
    with torch.device("meta"):
        return AutoModelForImageClassification.from_config(
            base, dtype=dtype, trust_remote_code=config.trust_remote_code
        )


def configure(model: Any, device: torch.device, longest: int) -> None:
    """Do nothing: the model chooses its attention itself."""


def checkpoint(model: Any) -> None:
    from .media.checkpointing import checkpoint

    checkpoint(model)


def size_at_once(device: torch.device) -> int | None:
    return CPU_PIXELS if device.type == "cpu" else None


def learning_rate(config: RunSettings, model: Any) -> Choice:
    from .text.base import suited_rate

    return suited_rate(getattr(model.config, "hidden_size", None))


def check(config: RunSettings, model: Any, items: Iterable[LabelledPicture]) -> None:
    """Raise TrainError if the base has no head that is saved with the adapter, or does not take the pictures."""
    import torch

    if not any(name == "classifier" or name.endswith(".classifier") for name, _ in model.named_modules()):
        raise TrainError(
            f"{config.model} ({type(model).__name__}) has no module 'classifier', which would be trained and saved "
            "with the adapter\n  choose another base (--model)"
        )
    shapes = {item.group: item.where for item in reversed(list(items))}
    for shape, where in list(shapes.items())[:SHAPES]:
        try:
            with torch.inference_mode():
                _logits(model, {"pixel_values": torch.zeros(1, *shape, device=model.device)})
        except (ValueError, RuntimeError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise TrainError(
                f"{where}: {config.model} does not take the picture as its image processor makes it, "
                f"{' x '.join(map(str, shape))}: {reason}\n"
                "  the base's preprocessor_config.json must be the one that it was trained with"
            ) from error


def check_together(model: Any) -> None:
    """Do nothing: `alone` already keeps this task out of sweeps."""


def alone(config: RunSettings) -> str | None:
    return (
        "task: image_classification trains a head in full, and a sweep does not train several heads side by side yet\n"
        "  start these runs one by one with lorakit train"
    )


# ------------------------------------------------------------------------------------- batches and losses


def packs(config: RunSettings) -> bool:
    return False


def saved_padding(batches: Sequence[Sequence[Any]]) -> str:
    raise TrainError("pictures are not packed")


def collate(items: Sequence[LabelledPicture], base: Base, packed: bool = False) -> dict[str, Tensor]:
    import torch

    images = [item.image() for item in items]
    pixels = base.processor(images=images, return_tensors="pt")["pixel_values"]  # [rows, channels, height, width]
    return {"pixel_values": pixels, "labels": torch.tensor([item.label or 0 for item in items])}


def example(rows: int, size: int, share: float = 1.0, packed: bool = False) -> dict[str, Tensor]:
    raise TrainError("a vision model's step is not run on shapes alone")


def losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return _losses(_logits(model, batch), batch["labels"])


def _logits(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    return model(pixel_values=batch["pixel_values"].to(model.dtype)).logits.float()  # [rows, labels]


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    import torch.nn.functional as F

    return F.cross_entropy(logits, labels, reduction="none")  # [rows]


def evaluate(base: Base, items: Sequence[LabelledPicture], batch_size: int) -> dict[str, float]:
    """Return the mean loss, the accuracy and the macro F1. Raises NotFiniteError if a row's loss is not finite."""
    import torch

    from .metrics.classes import accuracy, macro_f1

    total, truth, predicted = 0.0, [], []
    for rows, logits in _in_batches(base, items, batch_size):
        labels = [items[row].label or 0 for row in rows]
        losses = _losses(logits, torch.tensor(labels, device=logits.device)).tolist()
        for row, loss in zip(rows, losses, strict=True):
            if not math.isfinite(loss):
                raise NotFiniteError(
                    f"{items[row].where}: the loss is {loss}\n"
                    "  load the model in bfloat16 or float32 rather than float16"
                )
        total += sum(losses)
        truth += labels
        predicted += logits.argmax(1).tolist()
    return {"loss": total / len(truth), "accuracy": accuracy(truth, predicted), "macro_f1": macro_f1(truth, predicted)}


def _in_batches(base: Base, items: Sequence[LabelledPicture], batch_size: int) -> Iterator[tuple[list[int], Tensor]]:
    """Yield batches of items of one shape, as their indices, with their logits, [rows, labels]."""
    import torch

    from ..generate.eval_mode import evaluating

    of_shape: dict[tuple[int, ...], list[int]] = {}
    for index, item in enumerate(items):
        of_shape.setdefault(item.group, []).append(index)
    with evaluating(base.model), torch.inference_mode():
        for indices in of_shape.values():
            for start in range(0, len(indices), batch_size):
                rows = indices[start : start + batch_size]
                pixels = collate([items[row] for row in rows], base)["pixel_values"]
                yield rows, _logits(base.model, {"pixel_values": pixels.to(base.model.device)})


def to_predict(config: RunSettings, processor: Any) -> list[LabelledPicture]:
    from .media.pictures import read_labelled_pictures

    own = part(config, ImageClassificationSettings)
    return read_labelled_pictures(config.data, config.split, own, processor, own.labels, needed=False).items


def predict(config: RunSettings, base: Base, items: Sequence[LabelledPicture], batch_size: int) -> list[dict[str, Any]]:
    names = base.model.config.id2label
    found: dict[int, dict[str, Any]] = {}
    for rows, logits in _in_batches(base, items, batch_size):
        for row, scores in zip(rows, logits.softmax(1).tolist(), strict=True):
            best = max(range(len(scores)), key=scores.__getitem__)
            by_name = {names[label]: round(score, 6) for label, score in enumerate(scores)}
            found[row] = {"label": names[best], "score": round(scores[best], 6), "scores": by_name}
    return [found[row] for row in range(len(items))]


# ------------------------------------------------------------------------------------- samples and the result


def prompts(config: RunSettings, base: Base, data: Data) -> list[Any]:
    return []


def samples(config: RunSettings, base: Base, prompts: Sequence[Any]) -> list[TextSample]:
    return []


def recorded(config: RunSettings, processor: Any) -> dict[str, Any]:
    return {}


def save_beside(config: RunSettings, processor: Any, folder: Path) -> None:
    """Write nothing: the image processor is the base's."""
