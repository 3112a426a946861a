"""A diffusers pipeline as one model: its trainable components, and its denoiser's prediction with gradient.

A pipeline is no `nn.Module`, so `as_module` gives it one, `PipelineModel`, whose children are the pipeline's own
denoisers and text encoders under the names that adapter files use: "unet.down_blocks.0...",
"text_encoder.text_model.encoder...". transformers 5's CLIPTextModel has no level `text_model` any more, so a
ModuleDict of that one entry stands in for it.

No family of models has code here. `PipelineModel.forward` runs the pipeline's own `__call__`, which encodes prompts,
packs latents and scales time as the family needs, up to the scheduler's step (`catching`). Tested with SD1, SDXL, SD3,
Flux, Chroma, Flux.2, Qwen-Image, Z-Image and Wan.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import StateError, TrainError, listing
from ..module_names import is_language_trunk
from .catching import Echo, Prediction, arguments_of, catch

TEXT_LEVEL = "text_model"
_OURS = "_lorakit_model"  # where a pipeline keeps its PipelineModel
_COMPONENT = re.compile(r"(unet|transformer|text_encoder|prior)(_\d+)?$")
_TEXT_PARTS = {"embeddings", "encoder", "final_layer_norm"}  # what the level held


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
    in_use: frozenset[str]

    def __init__(self, pipe: Any):
        super().__init__()
        self.__dict__["pipe"] = pipe  # not a child
        self.__dict__["in_use"] = frozenset()  # the components that adapters change (model/state.py)
        self.hold(components_of(pipe))

    def hold(self, components: dict[str, nn.Module]) -> None:
        """Have these components as children, and no other."""
        self.__dict__["components"] = components  # their live modules, without the level in front
        self.__dict__["placed"] = (None, None)  # the denoiser's device, the pipeline's device
        self.__dict__["layouts"] = {}  # what `tasks.image.packing` has found out about this pipeline
        self._modules.clear()
        for name, component in components.items():
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
        self._denoisers()
        prediction = catch(pipe, latents, timesteps, call, self._device()).prediction
        if len(prediction.output) != len(latents):
            raise TrainError(
                f"{type(pipe).__name__} predicted {len(prediction.output)} rows for {len(latents)} rows of latents\n"
                "  switch off its guidance, and pass one prompt a row"
            )
        return prediction

    def train(self, mode: bool = True) -> PipelineModel:
        """Put the model into training mode, except for components without trained parameters: a frozen text encoder
        such as T5 would drop out parts of its embeddings. False: all into evaluation mode.
        """
        super().train(mode)
        for component in self.components.values():
            if not any(p.requires_grad for p in component.parameters()):
                component.eval()
        return self

    @torch.no_grad()
    def probe(self, latents: Tensor | None, timesteps: Tensor, **call: Any) -> Probe:
        """Run the pipeline's call with a stand-in for its denoiser, which returns its input: it costs nothing.

        `latents` None: the pipeline draws its own. Errors of the pipeline's call are passed on; TrainError if it never
        reaches its scheduler's step.
        """
        names = self._denoisers()
        echo = Echo(self.components[names[0]])
        caught = catch(self.pipe, latents, timesteps, call, self._device(), dict.fromkeys(names, echo))
        if not echo.inputs:
            raise TrainError(f"{type(self.pipe).__name__} never called its denoiser ({', '.join(names)})")
        rows = sum(len(given) for given in echo.inputs)
        return Probe(caught.prediction.sample, rows, echo.inputs[0].dtype, echo.arguments, caught.mu)

    def _denoisers(self) -> list[str]:
        names = [name for name in self.components if not is_text_encoder(name)]
        return names or denoisers_of(self.pipe)  # which says what is missing

    def _device(self) -> torch.device:
        """Return the device that the pipeline computes on, asking it again whenever its denoiser has moved."""
        here = next(self.parameters()).device
        if self.__dict__["placed"][0] != here:
            self.__dict__["placed"] = (here, self.pipe._execution_device)
        device: torch.device = self.__dict__["placed"][1]
        return device


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


def as_module(model: Any) -> Any:
    """Return a pipeline's `PipelineModel`, always the same one; anything else as it is.

    Raises StateError if a component that adapters change was replaced; any other may be, or be set to None.
    """
    if not is_pipeline(model):
        return model
    kept, own = model.__dict__.get(_OURS), components_of(model)
    if kept is None:
        kept = model.__dict__[_OURS] = PipelineModel(model)
    if kept.components != own:
        lost = [name for name in kept.components if name in kept.in_use and own.get(name) is not kept.components[name]]
        if lost:
            raise StateError(
                f"the pipeline's {listing(lost)} was replaced while adapters are attached to it, so they would have no "
                "effect there\n"
                "  put the component back and call lorakit.detach(pipe), then replace it and attach them again"
            )
        kept.hold(own)
    return kept
