"""How a pipeline takes its latents, found out by running its call with a stand-in for the denoiser.

Some pipelines (Flux, Chroma, Qwen-Image) take latents packed as [rows, patches, channels of a patch], one (Flux.2)
packs them itself, most do not. What the scheduler is given of numbered latents shows the order of elements, which the
target needs too. How many rows the denoiser is given shows which arguments switch guidance off, and whether a change of
the guidance changes what it is given shows a guidance-distilled model. No pipeline is known by its name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...bases.catching import arguments_of
from ...bases.pipeline import PipelineModel, Probe, denoisers_of
from ...errors import LorakitError, TrainError
from .latents import latent_scale
from .objective import Objective
from .prompts import batch_prompts, encode_prompts, take_rows

_DIGIT = 256  # whole numbers below it are exact in every precision that a pipeline may cast its latents to


@dataclass(frozen=True)
class Layout:
    """How one pipeline takes latents of one size.

    `call`: arguments of its call: the picture's size, and what switches guidance off. `embedded`: the names of the
    guidance that a distilled model is given as an input. `mu`: the pipeline's shift of timesteps for this size, None
    if it computes none. `together`: whether the rows of a call may have timesteps of their own. `dtype`: that the
    latents are to be cast to, None if the pipeline does so. `order`: the permutation of a row's elements from
    `encode_pictures`' layout to the scheduler's, None if they are the same; `shape`: a row's shape there.
    """

    call: Mapping[str, Any]
    embedded: tuple[str, ...]
    mu: float | None
    together: bool
    dtype: torch.dtype | None
    order: Tensor | None
    shape: tuple[int, ...]
    latents: tuple[int, ...]
    pack: Callable[[Tensor], Tensor]

    def argument(self, latents: Tensor) -> Tensor:
        """Return latents as the pipeline's argument `latents`."""
        return self.pack(latents if self.dtype is None else latents.to(self.dtype))

    def packed(self, latents: Tensor) -> Tensor:
        """Return latents, or anything of their shape, as the scheduler sees them."""
        if self.order is None:
            return latents.reshape(len(latents), *self.shape)
        return latents.flatten(1)[:, self.order.to(latents.device)].view(len(latents), *self.shape)

    def unpacked(self, packed: Tensor) -> Tensor:
        """Undo `packed`."""
        if self.order is None:
            return packed.reshape(len(packed), *self.latents)
        flat = torch.empty_like(packed.flatten(1))
        flat[:, self.order.to(packed.device)] = packed.flatten(1)
        return flat.view(len(packed), *self.latents)


def layout_of(model: PipelineModel, latents: Tensor, prompts: Mapping[str, Any]) -> Layout:
    """Return the layout for latents of this size, found at the first call for a size.

    `latents`: [rows, ...] as `encode_pictures` returns them; `prompts`: arguments for any number of rows.

    Raises TrainError for a pipeline that cannot be trained this way, with what it lacks.
    """
    key = (tuple(latents.shape[1:]), model.pipe.scheduler, next(model.parameters()).dtype, "prompt" in prompts)
    if key not in model.layouts:
        model.layouts[key] = _found(model, latents, prompts)
    return model.layouts[key]


# ------------------------------------------------------------------------------------- finding out


@dataclass(frozen=True)
class _Prober:
    """Runs the call of one pipeline for two rows of one size."""

    model: PipelineModel
    call: Mapping[str, Any]
    timesteps: Tensor

    def __call__(self, latents: Tensor | None, **arguments: Any) -> Probe:
        return self.model.probe(latents, self.timesteps, **{**self.call, **arguments})


def _found(model: PipelineModel, latents: Tensor, prompts: Mapping[str, Any]) -> Layout:
    pipe = model.pipe
    if "prompt" in prompts:  # encoded once here, not at every probe
        prompts = batch_prompts(encode_prompts(pipe, prompts["prompt"][:1]))
    call = take_rows(prompts, [0, 0]) | _sizes(pipe, latents)
    if "generator" in arguments_of(pipe):
        call["generator"] = torch.Generator().manual_seed(0)  # torch's own stays where it is
    objective = Objective.of(pipe.scheduler)
    times = torch.tensor([0.25, 0.75], device=latents.device) * objective.steps
    times = times if objective.kind == "flow" else times.long()
    errors: list[Exception] = []
    for together in (True, False):
        prober = _Prober(model, call, times if together else times[0])
        try:
            return _layout(prober, latents, together)
        except LorakitError:
            raise
        except Exception as error:  # whatever a pipeline's code raises at arguments that do not suit it
            errors.append(error)
    raise TrainError(
        f"{type(pipe).__name__} cannot be trained this way: its call fails with {type(errors[0]).__name__}: "
        f"{errors[0]}\n  it was given: {', '.join(call)}"
    ) from errors[0]


def _layout(prober: _Prober, latents: Tensor, together: bool) -> Layout:
    pipe = prober.model.pipe
    off, own = _without_guidance(prober)
    shape = tuple(latents.shape[1:])
    problem: Exception | None = None
    for pack in _packings(pipe):
        try:
            order = _order(prober, off, pack, latents, own.sample.shape)
        except Exception as error:  # whatever a pipeline's code raises at latents of the wrong shape
            problem = error
            continue
        if order is None:
            continue
        zeros = torch.zeros_like(latents[:1]).float().expand(2, *shape)
        plain = prober(pack(zeros), **off)
        embedded = tuple(n for n in off if _differs(plain, prober, pack(zeros), {**off, n: off[n] - 0.5}))
        dtype = getattr(pipe, denoisers_of(pipe)[0]).dtype
        return Layout(
            call={**_sizes(pipe, latents), **{n: v for n, v in off.items() if n not in embedded}},
            embedded=embedded,
            mu=plain.mu,
            together=together,
            dtype=dtype if plain.dtype != dtype else None,
            order=None if torch.equal(order, torch.arange(len(order))) else order,
            shape=tuple(plain.sample.shape[1:]),
            latents=shape,
            pack=pack,
        )
    raise TrainError(
        f"{type(pipe).__name__} cannot be trained this way: latents of its autoencoder, {list(shape)} for a picture,"
        f"\n  are not what its scheduler is given, {list(own.sample.shape[1:])}, nor does its _pack_latents turn them "
        f"into that{f' ({problem})' if problem is not None else ''}\n"
        "  expected pictures whose height and width the pipeline can divide into patches"
    )


def _order(
    prober: _Prober, off: Mapping[str, float], pack: Callable[[Tensor], Tensor], latents: Tensor, expected: torch.Size
) -> Tensor | None:
    """Return the permutation of a row's elements that the scheduler is given, None if it is given anything else."""
    shape, elements = latents.shape[1:], latents[0].numel()
    order = torch.zeros(elements, dtype=torch.long)
    for place in (1, _DIGIT, _DIGIT**2):
        digits = (torch.arange(elements) // place % _DIGIT).view(1, *shape).expand(2, *shape)
        seen = prober(pack(digits.to(latents.device, torch.float32)), **off)
        if seen.sample.shape != expected or seen.rows != 2 or not torch.equal(seen.sample[0], seen.sample[1]):
            return None
        order += seen.sample[0].flatten().cpu().long() * place
    return order if torch.equal(order.sort().values, torch.arange(elements)) else None


def _without_guidance(prober: _Prober) -> tuple[dict[str, float], Probe]:
    """Return the arguments with which the denoiser is given each row once, and what the pipeline's own latents were."""
    pipe = prober.model.pipe
    first: Exception | None = None
    rows = 0
    for off in _guidance(arguments_of(pipe)):
        try:
            probe = prober(None, **off)
        except LorakitError:
            raise
        except Exception as error:  # whatever a pipeline's code raises at guidance without a negative prompt
            first = first or error
            continue
        if probe.rows == 2 and len(probe.sample) == 2:
            return off, probe
        rows = rows or probe.rows
    if first is not None and not rows:
        raise first
    raise TrainError(
        f"{type(pipe).__name__} gives its denoiser {rows} rows for 2, and no guidance_scale switches that off\n"
        "  expected a pipeline whose call has an argument for guidance, and takes one prompt a row"
    )


def _guidance(arguments: Mapping[str, inspect.Parameter]) -> Iterator[dict[str, float]]:
    """Yield values for the arguments of guidance, the likeliest first. Those whose default is None are left out first:
    pipelines warn of them where they have no effect.
    """
    names = [name for name in arguments if name.endswith(("guidance_scale", "cfg_scale"))]
    stated = [name for name in names if arguments[name].default is not None]
    for value in (1.0, 0.0):
        yield dict.fromkeys(stated, value)
        if names != stated:
            yield dict.fromkeys(names, value)


def _differs(seen: Probe, prober: _Prober, latents: Tensor, guidance: Mapping[str, float]) -> bool:
    """Whether the denoiser is given something else, for each row once, with this guidance."""
    try:
        other = prober(latents, **guidance)
    except Exception:  # as in `_without_guidance`: then the guidance is no input of the model
        return False
    return other.rows == seen.rows and any(
        value.shape != other.arguments[name].shape or not torch.equal(value, other.arguments[name])
        for name, value in seen.arguments.items()
        if name in other.arguments
    )


def _packings(pipe: Any) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yield what may turn latents into the pipeline's argument: nothing, or its own packing."""
    yield lambda latents: latents
    own = getattr(pipe, "_pack_latents", None)
    if own is None:
        return
    asked = inspect.signature(own).parameters

    def pack(latents: Tensor) -> Tensor:
        if latents.dim() == 5:  # one frame
            latents = latents[:, :, 0]
        sizes = dict(zip(("batch_size", "num_channels_latents", "height", "width"), latents.shape))
        return own(latents.contiguous(), **{name: size for name, size in sizes.items() if name in asked})

    yield pack


def _sizes(pipe: Any, latents: Tensor) -> dict[str, Any]:
    """Return the arguments of the pipeline's call for the picture's size: pixels, one frame, no standard sizes."""
    scale = latent_scale(pipe)
    sizes = {"height": latents.shape[-2] * scale, "width": latents.shape[-1] * scale, "num_frames": 1}
    sizes |= {"use_resolution_binning": False}
    return {name: size for name, size in sizes.items() if name in arguments_of(pipe)}
