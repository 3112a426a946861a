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
from typing import Any, NamedTuple

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


class PipelineModel(nn.Module):
    """The denoisers and text encoders of a pipeline, as children of one module. The VAE is not among them."""

    def __init__(self, pipe: Any):
        super().__init__()
        self.__dict__["pipe"] = pipe  # not a child
        self.__dict__["components"] = components_of(pipe)  # their live modules, without the level in front
        for name, component in self.components.items():
            flat = name.startswith("text_encoder") and component._modules.keys() >= _TEXT_PARTS
            self.add_module(name, nn.ModuleDict({TEXT_LEVEL: component}) if flat else component)

    pipe: Any
    components: dict[str, nn.Module]

    def forward(self, latents: Tensor, timesteps: Tensor, **call: Any) -> Prediction:
        """Predict with the pipeline's denoiser. `latents`: noised, as the pipeline's argument of this name;
        `timesteps`: [rows]; `call`: further arguments of the pipeline's call, such as `prompt_embeds`.

        Raises TrainError if the pipeline has no argument `latents`, or never reaches its scheduler's step.
        """
        pipe = self.pipe
        run = inspect.unwrap(type(pipe).__call__)  # without its no_grad
        if "latents" not in inspect.signature(run).parameters:
            raise TrainError(
                f"{type(pipe).__name__} takes no latents, so it cannot be trained this way\n"
                "  expected a text-to-image pipeline of diffusers"
            )
        call = {"num_inference_steps": 1, "output_type": "latent", **call}
        with _catching(pipe, timesteps) as caught, suppress(_Caught):
            run(pipe, latents=latents, **call)
        if not caught:
            raise TrainError(
                f"{type(pipe).__name__} never called its scheduler's step, so it cannot be trained this way"
            )
        return caught[0]


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


@contextmanager
def _catching(pipe: Any, timesteps: Tensor) -> Iterator[list[Prediction]]:
    """Give the pipeline a scheduler that hands out `timesteps` and keeps the first prediction, in the list."""
    real, caught = pipe.scheduler, []
    bar = getattr(pipe, "_progress_bar_config", None)

    class Catching(type(real)):  # type: ignore[misc]  # the pipeline's own scheduler's class
        def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
            shift = {"mu": 1.0} if self.config.get("use_dynamic_shifting") else {}
            super().set_timesteps(1, **shift)
            self.timesteps = timesteps[None]  # one timestep a row

        def scale_model_input(self, sample: Tensor, *args: Any) -> Tensor:
            return sample

        def step(self, output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            caught.append(Prediction(output, sample))
            raise _Caught

    pipe.scheduler = Catching.from_config(real.config)
    pipe.set_progress_bar_config(disable=True)
    try:
        yield caught
    finally:
        pipe.scheduler = real
        if bar is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = bar
