"""Generate pictures with any diffusers pipeline, by its own call: several in a pass, each with its own noise, prompt
and adapters.

    pipe = load_pipeline("embedded", torch.float32, torch.device("cpu"))
    attach(pipe, Adapter.load("ink.safetensors"), name="ink")
    generate_pictures(pipe, ["a panda in a meadow"] * 3, seed=7, weights=[None, {"ink": 0.5}, {"ink": 1.0}])

Noise is drawn on the CPU by a generator of its own for each picture, so that a picture depends neither on the device
nor on the pictures beside it. What is left of the batch is the rounding of matrix products: in passes of 1, 3 and 8
pictures of the embedded pipeline all 24,576 values are equal in bfloat16, and at most 2 differ in float32, by 1 of 255.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from ...bases.pipeline import as_module
from ...errors import ConfigError, LorakitError, LorakitWarning, NotFiniteError, StateError
from ...model.activate import activate, active, adapters
from ...model.merge import merge, unmerge
from ...model.state import Weights, state_of
from ..eval_mode import evaluating
from .call import SETTINGS, call_arguments, cut_prompts, defaults_of, guided
from .routed import NotByRow, routed

# Pictures in one pass: at most this many, of at most this many pixels. On the embedded pipeline (32 x 32, two
# slow cores) 8 in a pass take 0.37 of the time of one by one; at 1024 x 1024 one picture fills any device by itself.
BATCH, PIXELS = 8, 4 * 512 * 512


Selection = str | Mapping[str, Weights] | None


class Row(NamedTuple):
    """One picture of a batch. `weights`: adapter -> weight, none of them 0, or weights of parts as in `activate`."""

    prompt: str
    seed: int
    weights: Mapping[str, Weights]


def generate_pictures(pipe: Any, prompts: Sequence[str], **settings: Any) -> list[Image.Image]:
    """Return a picture for each prompt; `settings` as in `stream_pictures`."""
    return list(stream_pictures(pipe, prompts, **settings))


def stream_pictures(
    pipe: Any,
    prompts: Sequence[str],
    *,
    seed: int | Sequence[int] = 0,
    steps: int | None = None,
    guidance: float | None = None,
    negative: str | None = None,
    width: int | None = None,
    height: int | None = None,
    weights: Sequence[Selection] | None = None,
    scale: float | Sequence[float] = 1.0,
    merged: bool = False,
    batch_size: int | None = None,
    bar: bool = False,
    **further: Any,
) -> Iterator[Image.Image]:
    """Check the settings, and return an iterator of the pictures (RGB), each as soon as its pass is done. Afterwards
    the pipeline is as it was.

    seed: one for all pictures, or one each. steps, guidance, width, height: None is the pipeline's default.
    weights: for each picture an adapter's name, {name: weight} as in `activate`, or None for the base; default: the
        adapters that are active now.
    scale: multiplies the weights, one for all pictures or one each; at 0 a picture is the base's.
    merged: merge the adapters into the weights first, and unmerge afterwards.
    batch_size: pictures in one pass; default: up to `BATCH`, as their size allows.
    bar: show the pipeline's own progress bar. further: other arguments of the pipeline's call.

    Raises ConfigError for a setting that the pipeline cannot use, StateError for an unknown adapter, NotFiniteError for
    a picture with NaN. LorakitWarning for a prompt that is cut, a negative prompt without effect, a picture that the
    pipeline's safety checker has blackened, and one of another size than asked for.
    """
    model, own = as_module(pipe), defaults_of(pipe)
    steps, guidance = own.steps if steps is None else steps, own.guidance if guidance is None else guidance
    rows = _rows(model, prompts, seed, weights, scale)
    call = call_arguments(
        pipe, steps=steps, guidance=guidance, negative=negative or "", width=width, height=height, further=further
    )
    for line in cut_prompts(pipe, [*prompts, negative or ""], further.get("max_sequence_length")):
        warnings.warn(line, LorakitWarning, stacklevel=2)
    if negative and not guided(pipe, guidance):
        warnings.warn("the negative prompt has no effect without guidance above 1", LorakitWarning, stacklevel=2)
    most = batch_size or _batch_size(width or own.width, height or own.height)
    if most < 1:
        raise ConfigError(f"batch_size is {most}; expected at least 1")

    def pictures() -> Iterator[Image.Image]:
        with _generating(pipe, model, bar):
            for chunk in _chunks(rows, most, merged):
                yield from _checked(_passes(pipe, model, chunk, call, merged), chunk, width, height)

    return pictures()


def _rows(
    model: Any, prompts: Sequence[str], seed: int | Sequence[int], weights: Sequence[Selection] | None, scale: Any
) -> list[Row]:
    """Return what each picture needs. Raises ConfigError for lists of other lengths, StateError for unknown names."""
    if isinstance(prompts, str):
        raise ConfigError(f"prompts is the text {prompts!r}\n  expected a list of prompts")
    count = len(prompts)
    if weights is None:
        weights = [active(model) if adapters(model) else None] * count
    seeds = [seed] * count if isinstance(seed, int) else list(seed)
    scales = [scale] * count if isinstance(scale, int | float) else list(scale)
    for name, values in (("seed", seeds), ("weights", weights), ("scale", scales)):
        if len(values) != count:
            raise ConfigError(f"{name} has {len(values)} values for {count} prompts\n  expected one for each prompt")
    for number in seeds:
        if not 0 <= number < 2**63:
            raise ConfigError(f"seed is {number}; expected a whole number from 0 to 2^63 - 1")
    return [Row(p, s, scaled_weights(model, w, f)) for p, s, w, f in zip(prompts, seeds, weights, scales)]


def scaled_weights(model: Any, which: Selection, scale: float) -> dict[str, Weights]:
    """Multiply adapters' weights, on a pipeline; those that are 0 everywhere are left out."""
    model = as_module(model)
    weights = {} if which is None else {which: 1.0} if isinstance(which, str) else which
    scaled: dict[str, Weights] = {}
    for name, weight in weights.items():
        if isinstance(weight, Mapping):
            # What none of the parts names has weight 1: it is multiplied too.
            own = state_of(model).adapters[name].modules if scale != 1 and name in adapters(model) else []
            rest = dict.fromkeys((module.partition(".")[0] for module in own), scale)
            weight = {**rest, **{part: each * scale for part, each in weight.items()}}
        else:
            weight = weight * scale
        if weight and scale:
            scaled[name] = weight
    return scaled


def _batch_size(width: int | None, height: int | None) -> int:
    return 1 if width is None or height is None else max(1, min(BATCH, PIXELS // (width * height)))


def _chunks(rows: Sequence[Row], most: int, merged: bool) -> Iterator[list[Row]]:
    """Split the rows into passes; merged ones have one set of weights."""
    for _, group in groupby(rows, (lambda row: row.weights) if merged else (lambda row: None)):
        same = list(group)
        yield from (same[at : at + most] for at in range(0, len(same), most))


@contextmanager
def _generating(pipe: Any, model: Any, bar: bool) -> Iterator[None]:
    """Put the components into evaluation mode, and silence the libraries; restore both at the end."""
    from diffusers.utils import logging

    verbosity, shown = logging.get_verbosity(), vars(pipe).get("_progress_bar_config")
    before = active(model) if adapters(model) else None
    logging.set_verbosity_error()  # what it warns of, such as a prompt's length, is said by `stream_pictures`
    pipe.set_progress_bar_config(disable=not bar)
    try:
        with evaluating(model):
            yield
    finally:
        logging.set_verbosity(verbosity)
        vars(pipe).pop("_progress_bar_config")
        if shown is not None:
            pipe.set_progress_bar_config(**shown)
        if before is not None and active(model) != before:
            activate(model, before)


def _passes(pipe: Any, model: Any, rows: Sequence[Row], call: Mapping[str, Any], merged: bool) -> np.ndarray:
    """Return the pictures of one pass [rows, height, width, 3], in 0..1."""
    first = rows[0].weights
    if any(row.weights != first for row in rows):
        parts = any(isinstance(weight, Mapping) for row in rows for weight in row.weights.values())
        choices: list[Any] = [row.weights or None for row in rows]
        if not parts:  # `route` has one weight an adapter
            # Where rows cannot be told apart they are run one by one; there an unknown adapter is an error again.
            with suppress(NotByRow, StateError), routed(model, choices):
                return _run(pipe, rows, call)
        return np.concatenate([_passes(pipe, model, [row], call, merged) for row in rows])
    if first != (active(model) if adapters(model) else {}):
        activate(model, first or None)
    if not merged or not first:
        return _run(pipe, rows, call)
    merge(model)
    try:
        return _run(pipe, rows, call)
    finally:
        unmerge(model)


def _run(pipe: Any, rows: Sequence[Row], call: Mapping[str, Any]) -> np.ndarray:
    generators = [torch.Generator().manual_seed(row.seed) for row in rows]
    texts: dict[str, Any] = {"prompt": [row.prompt for row in rows]}
    if "negative_prompt" in call:
        texts["negative_prompt"] = [call["negative_prompt"]] * len(rows)
    try:
        result = pipe(**{**call, **texts}, generator=generators, output_type="np")
    except ValueError as error:  # the pipeline's own checks
        if isinstance(error, LorakitError):
            raise
        raise ConfigError(f"{type(pipe).__name__}: {error}") from error
    except (AttributeError, TypeError) as error:
        # Such as clip_skip in diffusers 0.42 with transformers 5, whose text encoder has another structure.
        further = [name for name, value in call.items() if value is not None and name not in SETTINGS]
        if not further:
            raise
        raise ConfigError(
            f"{type(pipe).__name__} cannot use {', '.join(further)} with the installed libraries: {error}\n"
            f"  leave it out; of a picture that is made again: --argument {further[0]}=null"
        ) from error
    for row, flagged in zip(rows, getattr(result, "nsfw_content_detected", None) or ()):
        if flagged:
            warnings.warn(
                f"the pipeline's safety checker has blackened '{row.prompt}', seed {row.seed}",
                LorakitWarning,
                stacklevel=2,
            )
    if hasattr(result, "images"):
        return np.asarray(result.images)
    return np.asarray(result.frames)[:, 0]  # [rows, frames, height, width, 3]


def _checked(pictures: np.ndarray, rows: Sequence[Row], width: int | None, height: int | None) -> Iterator[Image.Image]:
    """Turn arrays into pictures, as diffusers does. Raises NotFiniteError."""
    for row, values in zip(rows, pictures):
        if not np.isfinite(values).all():
            raise NotFiniteError(
                f"the picture of '{row.prompt}' (seed {row.seed}) has values that are not finite\n"
                "  load the pipeline in float32 or bfloat16 (--precision fp32): its autoencoder may overflow in float16"
            )
        image = Image.fromarray((values * 255).round().astype("uint8"))
        if (width or image.width, height or image.height) != image.size:
            warnings.warn(
                f"the picture is {image.width} x {image.height} pixels: the pipeline does not make the size asked for",
                LorakitWarning,
                stacklevel=2,
            )
        yield image
