"""A diffusers pipeline as one model: its trainable components, and its denoiser's prediction with gradient.

A pipeline is no `nn.Module`, so `as_module` gives it one, `PipelineModel`, whose children are the pipeline's own
denoisers and text encoders under the names that adapter files use: "unet.down_blocks.0...",
"text_encoder.text_model.encoder...". transformers 5's CLIPTextModel has no level `text_model` any more, so a
ModuleDict of that one entry stands in for it.

No family of models has code here. `PipelineModel.forward` runs the pipeline's own `__call__`, which encodes prompts,
packs latents and scales time as the family needs, under a scheduler that hands out our timesteps and keeps what the
denoiser returned. Tested with SD1, SDXL, SD3, Flux, Chroma, Flux.2, Qwen-Image, Z-Image and Wan.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import StateError, TrainError, listing
from ..module_names import is_language_trunk

ATTACHED = "_lorakit"  # the attribute in which a model keeps its adapters (model/state.py)
TEXT_LEVEL = "text_model"
_OURS = "_lorakit_model"  # where a pipeline keeps its PipelineModel
_COMPONENT = re.compile(r"(unet|transformer|text_encoder|prior)(_\d+)?$")
_TEXT_PARTS = {"embeddings", "encoder", "final_layer_norm"}  # what the level held


class Prediction(NamedTuple):
    """What the scheduler was given. `output`: the denoiser's prediction; `sample`: the latents it belongs to; both in
    the layout of the scheduler's side: [rows, channels, height, width], or packed as the family packs them.
    """

    output: Tensor
    sample: Tensor


@dataclass(frozen=True)
class Probe:
    """What a pipeline's call did with a stand-in for its denoiser (`PipelineModel.probe`).

    `sample`: the latents that the scheduler's step was given; `rows`: how many rows the denoiser was given before it,
    twice the batch with guidance; `dtype`: in which precision; `arguments`: the other tensors that the denoiser was
    given, by name; `mu`: the shift of the timesteps that the pipeline computed for this picture size, if any.
    """

    sample: Tensor
    rows: int
    dtype: torch.dtype
    arguments: Mapping[str, Tensor]
    mu: float | None


class PipelineModel(nn.Module):
    """The denoisers and text encoders of a pipeline, as children of one module. The VAE is not among them."""

    pipe: Any
    components: dict[str, nn.Module]
    layouts: dict[Any, Any]

    def __init__(self, pipe: Any):
        super().__init__()
        self.__dict__["pipe"] = pipe  # not a child
        self.__dict__["components"] = components_of(pipe)  # their live modules, without the level in front
        self.__dict__["layouts"] = {}  # what `tasks.image.packing` has found out about this pipeline
        for name, component in self.components.items():
            flat = is_text_encoder(name) and component._modules.keys() >= _TEXT_PARTS
            self.add_module(name, nn.ModuleDict({TEXT_LEVEL: component}) if flat else component)

    def forward(self, latents: Tensor, timesteps: Tensor, **call: Any) -> Prediction:
        """Predict with the pipeline's denoiser. The pipeline itself is unchanged afterwards, also after an error.

        `latents`: noised, as the pipeline's argument of this name; `timesteps`: [rows], or [] for all rows;
        `call`: further arguments of the pipeline's call, such as `prompt_embeds`.

        Raises TrainError if the pipeline has no denoiser or no argument `latents`, never reaches its scheduler's
        step, or predicts for another number of rows than it was given.
        """
        pipe = self.pipe
        if "num_inference_steps" in arguments_of(pipe):
            call = {"num_inference_steps": 1, **call}
        with _unchanged(pipe):
            prediction = _call(pipe, latents, timesteps, call).prediction
        if len(prediction.output) != len(latents):
            raise TrainError(
                f"{type(pipe).__name__} predicted {len(prediction.output)} rows for {len(latents)} rows of latents\n"
                "  switch off its guidance, and pass one prompt a row"
            )
        return prediction

    @torch.no_grad()
    def probe(self, latents: Tensor | None, timesteps: Tensor, **call: Any) -> Probe:
        """Run the pipeline's call with a stand-in for its denoiser, which returns its input: it costs nothing.

        `latents` None: the pipeline draws its own. Errors of the pipeline's call are passed on; TrainError if it never
        reaches its scheduler's step.
        """
        pipe = self.pipe
        echo = _Echo(components_of(pipe)[denoisers_of(pipe)[0]])
        with _unchanged(pipe):
            vars(pipe).update(dict.fromkeys(denoisers_of(pipe), echo))
            caught = _call(pipe, latents, timesteps, call)
        if not echo.inputs:
            raise TrainError(f"{type(pipe).__name__} never called its denoiser ({', '.join(denoisers_of(pipe))})")
        rows = sum(len(given) for given in echo.inputs)
        return Probe(caught.prediction.sample, rows, echo.inputs[0].dtype, echo.arguments, caught.mu)


def is_pipeline(model: Any) -> bool:
    """Whether `model` is a pipeline of diffusers."""
    return not isinstance(model, nn.Module) and isinstance(getattr(model, "components", None), Mapping)


def components_of(pipe: Any) -> dict[str, nn.Module]:
    """Return a pipeline's denoisers and text encoders by name, denoisers first; a compiled one as it was before."""
    own = {name: c for name, c in pipe.components.items() if isinstance(c, nn.Module) and _COMPONENT.match(name)}
    own = {name: getattr(c, "_orig_mod", c) for name, c in own.items()}
    return dict(sorted(own.items(), key=lambda item: is_text_encoder(item[0])))


def is_text_encoder(component: str) -> bool:
    """Whether a component's name is that of a text encoder; others are denoisers."""
    return component.startswith("text_encoder")


def component_of(name: str) -> str | None:
    """Return the component that a module's name begins with; None if it begins with none."""
    first, _, rest = name.partition(".")
    return first if rest and _COMPONENT.match(first) and not is_language_trunk(name) else None


def denoisers_of(pipe: Any) -> list[str]:
    """Return the names of a pipeline's denoisers: ["unet"], or ["transformer", "transformer_2"].

    Raises TrainError if it has none.
    """
    names = [name for name in components_of(pipe) if not is_text_encoder(name)]
    if not names:
        raise TrainError(
            f"{type(pipe).__name__} has no denoiser: none of its components is a unet or a transformer\n"
            f"  its components: {listing(pipe.components, 8)}"
        )
    return names


def arguments_of(pipe: Any) -> Mapping[str, inspect.Parameter]:
    """Return the arguments of a pipeline's call, by name."""
    return inspect.signature(inspect.unwrap(type(pipe).__call__)).parameters


def as_module(model: Any) -> Any:
    """Return a pipeline's `PipelineModel`, always the same one; anything else as it is.

    Raises StateError if one of its components was replaced while adapters are attached.
    """
    if not is_pipeline(model):
        return model
    kept, own = model.__dict__.get(_OURS), components_of(model)
    if kept is not None and kept.components == own:
        return kept
    if kept is not None and ATTACHED in kept.__dict__:
        changed = [name for name in {**kept.components, **own} if kept.components.get(name) is not own.get(name)]
        raise StateError(
            f"the pipeline's {listing(changed)} was replaced while adapters are attached, so they would have no effect "
            "there\n"
            "  put the component back and call lorakit.detach(pipe), then replace it and attach them again"
        )
    model.__dict__[_OURS] = kept = PipelineModel(model)
    return kept


class _Caught(Exception):
    """Ends a pipeline's call once its denoiser has predicted."""


@dataclass
class _Catch:
    """What the catching scheduler hands out, and what it was given."""

    timesteps: Tensor
    mu: float | None = None
    found: Prediction | None = None
    pipeline: str = ""

    @property
    def prediction(self) -> Prediction:
        if self.found is None:
            raise TrainError(f"{self.pipeline} never called its scheduler's step, so it cannot be trained this way")
        return self.found


def _call(pipe: Any, latents: Tensor | None, timesteps: Tensor, call: Mapping[str, Any]) -> _Catch:
    """Run the pipeline's call, without its no_grad, until its scheduler's first step. Leaves our scheduler in it."""
    if "latents" not in arguments_of(pipe):
        raise TrainError(
            f"{type(pipe).__name__} takes no latents, so it cannot be trained this way\n"
            "  expected a text-to-image pipeline of diffusers, whose call has an argument `latents`"
        )
    denoisers_of(pipe)
    catch = _Catch(timesteps, pipeline=type(pipe).__name__)
    vars(pipe)["scheduler"] = _catching(pipe.scheduler, catch)  # setattr would write it into the pipeline's config
    vars(pipe)["_progress_bar_config"] = {"disable": True}
    quietly = {"output_type": "latent"} if "output_type" in arguments_of(pipe) else {}
    with suppress(_Caught):
        inspect.unwrap(type(pipe).__call__)(pipe, latents=latents, **{**quietly, **call})
    return catch


@contextmanager
def _unchanged(pipe: Any) -> Iterator[None]:
    """Give the pipeline back all attributes that it had: a call leaves its settings on it, and we our scheduler."""
    before = dict(vars(pipe))
    try:
        yield
    finally:
        vars(pipe).clear()
        vars(pipe).update(before)


def _catching(real: Any, catch: _Catch) -> Any:
    """Return a copy of a scheduler that hands out `catch.timesteps` and keeps the first prediction."""
    cls = _catching_class(type(real))
    scheduler = cls.__new__(cls)
    vars(scheduler).update(vars(real))  # not from its config: betas and sigmas would be computed at every step
    vars(scheduler).pop("init_noise_sigma", None)
    scheduler.catch = catch
    scheduler.timesteps = catch.timesteps[None]  # one step, with a timestep for each row
    scheduler.num_inference_steps = 1
    return scheduler


@cache
def _catching_class(base: type) -> type:
    class Catching(base):  # type: ignore[misc, valid-type]  # the pipeline's own scheduler's class
        catch: _Catch
        init_noise_sigma = 1.0  # pipelines multiply the latents by it; ours are noised already

        # The names are those that pipelines look for in the signature.
        def set_timesteps(
            self,
            num_inference_steps: Any = None,
            device: Any = None,
            timesteps: Any = None,
            sigmas: Any = None,
            mu: float | None = None,
            **others: Any,
        ) -> None:
            self.catch.mu = mu

        def scale_model_input(self, sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return sample

        def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.catch.found = Prediction(model_output, sample)
            raise _Caught

    return Catching


class _Echo(nn.Module):
    """Stands in for a denoiser: notes what it is given and returns the latents. All else is asked of the denoiser."""

    def __init__(self, real: nn.Module):
        super().__init__()
        first = next(iter(inspect.signature(real.forward).parameters))
        self.__dict__.update(real=real, first=first, inputs=[], arguments={})  # no child: it may not be counted twice

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["real"], name)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        latents = args[0] if args else kwargs.get(self.first, next(iter(kwargs.values())))
        if not self.inputs:
            self.arguments.update({n: v for n, v in kwargs.items() if isinstance(v, Tensor) and n != self.first})
        self.inputs.append(latents if isinstance(latents, Tensor) else torch.stack(list(latents)))
        return (latents,)
