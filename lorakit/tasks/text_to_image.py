"""Text to image: what a diffusion pipeline draws for a caption, learnt from pictures with captions.

    loss of a row = weight(t) · mean (prediction - target)²        see image/loss.py

The base is any text-to-image pipeline of diffusers (`bases/pipeline.py`). Noise and timesteps are drawn in `losses`,
from torch's default generator; crops, flips and captions are functions of (seed, epoch, picture).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, PositiveFloat, model_validator

from ..config import Choice, RunSettings, part
from ..data.pictures.settings import PictureSettings
from ..errors import ConfigError, TrainError, did_you_mean
from ..nondefault import nondefault
from .image.settings import DiffusionSettings
from .image.sliding import Sliding, check_slider
from .task import Asked, Base, Data, Shown
from .text.settings import Columns, Prompts

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .image.encoded import PictureRow, Pictures
    from .image.samples import PicturePrompt, PictureSample

# Pixels of a micro-batch on a CPU: one picture of 512 x 512.
CPU_PIXELS = 512 * 512
# A loss this many times the base's is that of a run that has diverged: the mean squared errors of one pipeline differ
# by less between any two styles.
DIVERGED = 2.0


class TextToImageSettings(PictureSettings, DiffusionSettings, Sliding, Columns, Prompts):
    free: ClassVar = {"sample_steps", "sample_guidance", "sample_negative", "sample_seed", "cache"}
    rows: ClassVar = {"prior_count"}

    text_encoder_learning_rate: PositiveFloat | dict[str, PositiveFloat] | None = Field(
        None,
        description="peak learning rate of text encoders, where they are trained, or one each: {text_encoder_2: 1e-5}; "
        "default: the run's",
    )
    prior_weight: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="weight of the class's pictures in the loss (prior preservation)"
    )
    prior_count: int = Field(
        0, ge=0, description="number of class pictures that the base draws of prior_caption before training"
    )
    cache: str = Field(
        "auto",
        description="folder for encoded pictures and captions, which several runs may share; auto: in the run's "
        "folder; none: encode them anew at each step",
    )
    new_tokens: dict[str, str] = Field(
        default_factory=dict,
        description="words to learn (textual inversion), each with what it starts as: {<sks>: cat}; '' is random",
    )
    token_vectors: int = Field(1, ge=1, description="vectors of each of new_tokens")
    save_as: Literal["auto", "diffusers", "kohya", "comfyui"] = Field(
        "auto", description="format of the result; auto: the one that most image programs read (docs/images.md)"
    )
    sample_steps: int = Field(20, ge=0, description="sampler steps of pictures drawn in training; 0: draw none")
    sample_guidance: float | None = Field(
        None, ge=0, description="guidance of pictures drawn in training; default: the pipeline's own"
    )
    sample_negative: str = Field("", description="negative prompt of pictures drawn in training")
    sample_seed: int = Field(0, ge=0, lt=1 << 31, description="seed of pictures drawn in training")

    @model_validator(mode="after")
    def _used(self) -> TextToImageSettings:
        prior = nondefault(self, ("prior_caption", "prior_weight"))
        if prior and self.prior_data is None and not self.prior_count:
            raise ValueError(
                f"{prior[0]} is for pictures of the class; give them (prior_data), or how many to draw (prior_count)"
            )
        if nondefault(self, ["token_vectors"]) and not self.new_tokens:
            raise ValueError("token_vectors is for words to learn; give new_tokens")
        return self


settings = TextToImageSettings
peft_type = "TEXT_TO_IMAGE"
summary = "draw pictures for captions (a diffusion pipeline)"
unit = "pictures"
size_unit = "pixels"
compares = True
writes = False
traced = False
shares = False
uses_all = False  # SDXL does not use the last layer of its first text encoder
tried_with = "image generate"

# Settings of every run that a run on pictures does not use.
_UNUSED = (
    *("compile", "add_tokens", "trainable_tokens", "trust_remote_code"),
    *("quantize", "double", "compute_dtype"),  # lorakit quantizes language models alone
)

# Text has other defaults for these. Rank and alpha: a scale of 1, as diffusers' and kohya's trainers have, so that
# learning rates found with those hold here. Targets: what these two and A1111 call a LoRA. The held-out loss says
# little of a style or a subject, so no run ends early or goes back for it.
_DEFAULTS: dict[str, Any] = {
    "rank": 16,
    "alpha": 16.0,
    "targets": "kohya",
    "batch_size": 4,
    "steps": 1000,
    "validation": 0.0,
    "patience": 0,
    "keep_best": False,
}


def defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return this task's own defaults. Epochs that are given decide the number of steps."""
    return {name: value for name, value in _DEFAULTS.items() if name != "steps" or "epochs" not in given}


# ------------------------------------------------------------------------------------- pictures


def processor(config: RunSettings) -> Pictures:
    from .image.encoded import Pictures
    from .image.slider_run import Slider

    _check_settings(config)
    own = part(config, TextToImageSettings)
    if own.slider_positive:
        check_slider(config)
        return Slider(config, own)
    return Pictures(config, own)


def for_run(processor: Pictures, config: RunSettings) -> Pictures:
    return processor.for_run(config, part(config, TextToImageSettings))


def resolved(config: RunSettings, processor: Pictures, earlier: Mapping[str, Any]) -> RunSettings:
    return config


def _check_settings(config: RunSettings) -> None:
    """Raise ConfigError for settings that this task does not have, or that would have no effect."""
    from ..bases.pipeline import is_text_encoder

    if config.method != "lora":
        raise ConfigError(f"method: {config.method}: task text_to_image trains adapters\n  use method: lora")
    if getattr(config, "adapter", None) is not None:
        raise ConfigError("adapter: task text_to_image starts anew\n  remove adapter")
    for name in nondefault(config, _UNUSED):
        raise ConfigError(f"{name}: task text_to_image does not have it\n  remove {name}")
    own = part(config, TextToImageSettings)
    components = getattr(config, "components", None) or ()
    rates = own.text_encoder_learning_rate
    trained = [name for name in components if is_text_encoder(name)]
    if isinstance(rates, dict) and not own.new_tokens and (wrong := [name for name in rates if name not in trained]):
        raise ConfigError(
            f"text_encoder_learning_rate: '{wrong[0]}' is not trained{did_you_mean(wrong[0], trained)}\n"
            f"  trained text encoders: {', '.join(trained) or 'none; name them in components'}"
        )
    if rates and not own.new_tokens and not trained:
        raise ConfigError(
            "text_encoder_learning_rate: no text encoder is trained\n"
            "  name it beside the denoiser, such as components: [unet, text_encoder], or remove the rate"
        )


def data(config: RunSettings, processor: Pictures) -> Data:
    return for_run(processor, config).data()


def drawn(item: Any, seed: int, epoch: int) -> PictureRow:
    return item.in_epoch(seed, epoch)


def recognizes(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]] = ()) -> bool:
    return False


def remembered(about: Mapping[str, Any], base: Any) -> dict[str, Any]:
    return {}


# ------------------------------------------------------------------------------------- the base


def blueprint(config: RunSettings) -> Any:
    from .image.skeleton import index

    return index(config.model, config.revision)


def load(config: RunSettings, processor: Pictures, data: Data, dtype: torch.dtype, device: torch.device) -> Any:
    return processor.load()


def to_attach(config: RunSettings, processor: Pictures) -> RunSettings:
    return config.replace(trainable_tokens=processor.trainable_tokens()) if processor.added is not None else config


def skeleton(config: RunSettings, base: Any, dtype: torch.dtype) -> Any:
    from .image.skeleton import skeleton

    return skeleton(config.model, config.revision, base, dtype)


def configure(model: Any, device: torch.device, longest: int) -> None:
    """Do nothing: pipelines choose their attention themselves."""


def checkpoint(model: Any) -> None:
    from .image.checkpointing import checkpoint

    checkpoint(model)


def size_at_once(device: torch.device) -> int | None:
    return CPU_PIXELS if device.type == "cpu" else None


def learning_rate(config: RunSettings, model: Any) -> Choice:
    from .image.rate import suited_rate

    return suited_rate(model)


def rate_factor(config: RunSettings, parameter: str, rate: float) -> tuple[str, float]:
    from ..bases.pipeline import is_text_encoder

    own = part(config, TextToImageSettings).text_encoder_learning_rate
    component = parameter.partition(".")[0]
    if own is None or not is_text_encoder(component):
        return "", 1.0
    if isinstance(own, dict):
        return (component, own[component] / rate) if component in own else ("", 1.0)
    return "text_encoder", own / rate


def margin(base: float) -> float:
    return (DIVERGED - 1) * base


def check(config: RunSettings, model: Any, items: Iterable[Any]) -> None:
    """Do nothing: `prepare` finds out how the pipeline takes its latents."""


def prepare(base: Base, items: Iterable[Any]) -> None:
    """Find out how the pipeline takes its latents."""
    base.processor.prepare(base.model, items)


def check_together(model: Any) -> None:
    """Do nothing: runs on pictures share no forward pass."""


def alone(config: RunSettings) -> str | None:
    own = part(config, TextToImageSettings)
    name = "new_tokens" if own.new_tokens else "slider_positive" if own.slider_positive else None
    if name is None:
        return None
    return (
        f"{name}: a sweep does not train words or sliders side by side yet\n"
        "  start these runs one by one with lorakit train"
    )


# ------------------------------------------------------------------------------------- batches and losses


def packs(config: RunSettings) -> bool:
    return False


def saved_padding(batches: Sequence[Sequence[Any]]) -> str:
    raise TrainError("pictures are not packed")


def loss_labels(items: Sequence[PictureRow]) -> list[str]:
    return ["prior" if item.is_prior else "" for item in items]


def collate(items: Sequence[PictureRow], base: Base, packed: bool = False) -> dict[str, Any]:
    return base.processor.collate(items)


def example(rows: int, size: int, share: float = 1.0, packed: bool = False) -> dict[str, Tensor]:
    raise TrainError("a pipeline's step cannot run on shapes alone")


def losses(model: Any, batch: dict[str, Any]) -> Tensor:
    return batch["of"].losses(model, batch)


def evaluate(base: Base, items: Sequence[Any], batch_size: int) -> dict[str, float]:
    from .image.validation import validate

    return validate(base, items, batch_size)


def to_predict(config: RunSettings, processor: Pictures) -> list[Any]:
    raise ConfigError(
        "predict: task text_to_image draws pictures, and says nothing of rows\n"
        f"  lorakit image generate 'a prompt' --model {config.model} --adapter ADAPTER"
    )


def predict(config: RunSettings, base: Base, items: Sequence[Any], batch_size: int) -> list[dict[str, Any]]:
    raise ConfigError("predict: task text_to_image draws pictures\n  use lorakit image generate 'a prompt'")


# ------------------------------------------------------------------------------------- samples


def asked(base: Base, items: Sequence[Any]) -> list[Asked]:
    """Return none: pictures are drawn, not written."""
    return []


def prompts(config: RunSettings, base: Base, data: Data) -> list[PicturePrompt]:
    from .image.samples import prompts

    return prompts(part(config, TextToImageSettings), data)


def samples_from_file(config: RunSettings) -> bool:
    """Learned words cannot be added a second time to the pipeline that has them."""
    return not part(config, TextToImageSettings).new_tokens


def samples(config: RunSettings, base: Base, prompts: Sequence[PicturePrompt]) -> list[PictureSample]:
    from .image.samples import draw

    return draw(part(config, TextToImageSettings), base, prompts)


def base_samples(
    folder: Path, config: RunSettings, base: Base, prompts: Sequence[PicturePrompt]
) -> list[PictureSample]:
    from .image.samples import base_samples

    return base_samples(folder, part(config, TextToImageSettings), base, prompts)


def write_samples(folder: Path, step: int, base: Sequence[PictureSample], tuned: Sequence[PictureSample]) -> Path:
    from .image.samples import write_samples

    return write_samples(folder, step, base, tuned)


def read_samples(path: Path) -> Shown:
    return Shown(picture=path.read_bytes())


# ------------------------------------------------------------------------------------- the result


def save_adapter(config: RunSettings, processor: Pictures, adapter: Any, folder: Path) -> None:
    """Write one file that image programs read, and lorakit.json."""
    from .image.result import write

    name = Path(config.out).expanduser().resolve().name
    write(_with_words(adapter, processor), folder, part(config, TextToImageSettings).save_as, name)


def unsaved(config: RunSettings, processor: Pictures, adapter: Any) -> str | None:
    """Say what a file of the format `save_as` cannot hold of the adapter; None if it holds all of it."""
    from .image.result import unsaved

    return unsaved(_with_words(adapter, processor), part(config, TextToImageSettings).save_as)


def _with_words(adapter: Any, processor: Pictures) -> Any:
    """Return the adapter with the words that the run learns as its textual-inversion embeddings."""
    from .image.tokens import bundled

    return adapter if processor.added is None else bundled(adapter, processor.pipe, processor.added)


def recorded(config: RunSettings, processor: Pictures) -> dict[str, Any]:
    return {}


def save_beside(config: RunSettings, processor: Pictures, folder: Path) -> None:
    """Write nothing: one file is what users of such adapters expect."""
