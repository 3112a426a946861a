"""A pipeline's call: its settings under their names there, its own defaults, and what of a prompt it reads.

Everything is read from the signature, the configs and the tokenizers; no family of models has code here.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ...bases.load_pipeline import embedded_pipeline
from ...bases.native_size import MULTIPLE
from ...bases.pipeline import arguments_of, denoisers_of
from ...errors import ConfigError, did_you_mean

EMBEDDED_CALL = (20, 3.0)  # steps and guidance (assets/tiny-diffusion/README.md)
_GUIDANCE = ("guidance_scale", "true_cfg_scale")
# The arguments that `call_arguments` itself may return, and others that `generate_pictures` sets.
SETTINGS = {"negative_prompt", "num_inference_steps", "width", "height", "num_frames", *_GUIDANCE}
_OURS = {
    "prompt",
    "generator",
    "output_type",
    "latents",
    "num_images_per_prompt",
    "num_videos_per_prompt",
    "return_dict",
}


@dataclass(frozen=True)
class Defaults:
    """What a pipeline's call uses where nothing is given; None where that is not known, or there is no such thing."""

    steps: int | None
    guidance: float | None
    width: int | None
    height: int | None


def defaults_of(pipe: Any) -> Defaults:
    """Read the defaults from the call's signature, and the size from the denoiser's config.

    The embedded pipeline is drawn with what its card was measured with; its call's defaults are Stable Diffusion's.
    """
    own = arguments_of(pipe)
    guidance = guidance_argument(pipe)
    width, height = default_size(pipe) or (None, None)
    if str(getattr(pipe, "config", {}).get("_name_or_path")) == str(embedded_pipeline()):
        return Defaults(*EMBEDDED_CALL, width, height)
    return Defaults(
        steps=_number(own.get("num_inference_steps")),
        guidance=None if guidance is None else _number(own[guidance]),
        width=width,
        height=height,
    )


def guidance_argument(pipe: Any) -> str | None:
    """Return the name of the argument for classifier-free guidance; None if the call has none.

    Usually `guidance_scale`. Where that is embedded into the denoiser instead, and a `true_cfg_scale` is in use by
    default (Qwen-Image), it is the latter.
    """
    own = arguments_of(pipe)
    if (_number(own.get("true_cfg_scale")) or 0) > 1:
        return "true_cfg_scale"
    return "guidance_scale" if "guidance_scale" in own else None


def default_size(pipe: Any) -> tuple[int, int] | None:
    """Return the width and height in pixels that the pipeline makes by default; None if it does not say."""
    own = arguments_of(pipe)
    width, height = _number(own.get("width")), _number(own.get("height"))
    if width and height:
        return int(width), int(height)
    factor = getattr(pipe, "vae_scale_factor", None)
    sample = getattr(pipe, "default_sample_size", None)
    if sample is None:
        sample = getattr(getattr(pipe, denoisers_of(pipe)[0]).config, "sample_size", None)
    rows, columns = sample if isinstance(sample, list | tuple) and len(sample) == 2 else (sample, sample)
    if not (isinstance(factor, int) and isinstance(rows, int) and isinstance(columns, int)):
        return None
    return columns * factor, rows * factor


def call_arguments(
    pipe: Any,
    *,
    steps: int | None,
    guidance: float | None,
    negative: str,
    width: int | None,
    height: int | None,
    further: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the arguments of the pipeline's call that are the same for every picture; None leaves its default.

    `further`: any others by their names there. Raises ConfigError for one it does not have, a value out of range, and
    a size that its autoencoder cannot make.
    """
    own, name, guiding = arguments_of(pipe), type(pipe).__name__, guidance_argument(pipe)
    for key in further:
        if key == guiding or key in _OURS | SETTINGS - {*_GUIDANCE}:
            raise ConfigError(f"'{key}' is not set as a further argument of {name}\n  give its own setting")
        if key not in own:
            raise ConfigError(f"{name} has no argument '{key}'{did_you_mean(key, own)}")
    if steps is not None and steps < 1:
        raise ConfigError(f"steps is {steps}; expected at least 1")
    call: dict[str, Any] = {}
    if guidance is not None and guiding is None:
        raise ConfigError(f"{name} has no guidance\n  leave out guidance (--guidance)")
    if negative and "negative_prompt" not in own:
        raise ConfigError(f"{name} takes no negative prompt\n  leave out negative (--negative)")
    for side, length in (("width", width), ("height", height)):
        if length is not None:
            check_side(pipe, side, length)
            call[side] = length
    if steps is not None and "num_inference_steps" in own:
        call["num_inference_steps"] = steps
    if guidance is not None and guiding is not None:
        call[guiding] = float(guidance)
    if negative or guiding == "true_cfg_scale":  # which works only beside a negative prompt, an empty one too
        call["negative_prompt"] = negative or " "
    call |= {key: 1 for key in ("num_frames",) if key in own}  # one frame of a video is a picture
    return call | dict(further)


def check_side(pipe: Any, side: str, length: int) -> None:
    """Raise ConfigError unless a width or height in pixels is a positive multiple of what the pipeline needs."""
    factor = getattr(pipe, "vae_scale_factor", 1)
    if denoisers_of(pipe)[0] == "unet":
        factor = math.lcm(factor, MULTIPLE)
    if length >= factor and length % factor == 0:
        return
    below, above = length // factor * factor, -(-max(length, 1) // factor) * factor
    near = " or ".join(str(n) for n in dict.fromkeys((below, above)) if n > 0)
    raise ConfigError(
        f"{side} is {length}; {type(pipe).__name__} makes multiples of {factor} pixels\n  nearest: {near}"
    )


def guided(pipe: Any, guidance: float | None) -> bool:
    """Whether the pipeline uses a negative prompt: guidance above 1, and in the argument that is classifier-free."""
    value = defaults_of(pipe).guidance if guidance is None else guidance
    # Beside a `true_cfg_scale` that is off, guidance_scale is only embedded (Flux).
    embedded = "true_cfg_scale" in arguments_of(pipe) and guidance_argument(pipe) != "true_cfg_scale"
    return value is not None and value > 1 and not embedded


def cut_prompts(pipe: Any, texts: Iterable[str], longest: int | None = None) -> list[str]:
    """Say which prompts are longer than a text encoder of the pipeline reads, a line each: the rest has no effect.

    `longest`: the call's `max_sequence_length`, if it is given.
    """
    said: dict[str, list[str]] = {}
    parameter = arguments_of(pipe).get("max_sequence_length")
    longest = longest or (int(_number(parameter) or 0) if parameter is not None else None)
    for component, tokenizer in pipe.components.items():
        if not component.startswith("tokenizer") or not callable(tokenizer):
            continue
        lengths = [n for n in (longest, getattr(tokenizer, "model_max_length", None)) if n]
        if not lengths:
            continue  # nothing says how much is read
        limit = min(lengths)
        for text in dict.fromkeys(texts):
            converted = pipe.maybe_convert_prompt(text, tokenizer) if hasattr(pipe, "maybe_convert_prompt") else text
            ids = _ids(tokenizer, converted)
            if len(ids) > limit:
                ends = len(tokenizer("").input_ids) // 2  # the end token, which is always read
                cut = tokenizer.decode(ids[limit - ends : len(ids) - ends]).strip()
                line = (
                    f"the prompt '{text}' has {len(ids)} tokens and the first {limit} are read: '{cut}' has no effect"
                )
                said.setdefault(line, []).append(component.replace("tokenizer", "text_encoder"))
    return [f"{', '.join(encoders)}: {line}" for line, encoders in said.items()]


def _ids(tokenizer: Any, text: str) -> list[int]:
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns of the length that is asked for here
    try:
        return list(tokenizer(text, truncation=False).input_ids)
    finally:
        logging.set_verbosity(before)


def _number(parameter: inspect.Parameter | None) -> Any:
    default = None if parameter is None else parameter.default
    return default if isinstance(default, int | float) and not isinstance(default, bool) else None
