"""A pipeline's own call, run with gradient up to its scheduler's first step: what the step is given is kept.

The scheduler is a copy of the pipeline's own, of a class that hands out our timesteps and ends the call at its step.
Whatever the pipeline does before (prompts, packing, position ids, guidance as an input, scaling of time) is its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import TrainError

_DEVICE = "_lorakit_device"  # where a pipeline finds its device while it is called


class Prediction(NamedTuple):
    """What the scheduler was given. `output`: the denoiser's prediction; `sample`: the latents it belongs to; both in
    the layout of the scheduler's side: [rows, channels, height, width], or packed as the family packs them.
    """

    output: Tensor
    sample: Tensor


@dataclass
class Catch:
    """`timesteps`: what the scheduler hands out; `mu`: the shift of timesteps that the pipeline computed, if any."""

    timesteps: Tensor
    pipeline: str
    mu: float | None = None
    found: Prediction | None = None

    @property
    def prediction(self) -> Prediction:
        """What the first step was given. Raises TrainError if there was none."""
        if self.found is None:
            raise TrainError(f"{self.pipeline} never called its scheduler's step, so it cannot be trained this way")
        return self.found


class Echo(nn.Module):
    """Stands in for a denoiser: notes what it is given and returns the latents. All else is asked of the denoiser.

    `inputs`: the latents of each call; `arguments`: the other tensors of the first call, by name.
    """

    inputs: list[Tensor]
    arguments: dict[str, Tensor]

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


def arguments_of(pipe: Any) -> Mapping[str, inspect.Parameter]:
    """Return the arguments of a pipeline's call, by name."""
    return _arguments(type(pipe).__call__)


def catch(
    pipe: Any,
    latents: Tensor | None,
    timesteps: Tensor,
    call: Mapping[str, Any],
    device: torch.device,
    denoisers: Mapping[str, nn.Module] | None = None,
) -> Catch:
    """Run a pipeline's call, without its no_grad, until its scheduler's first step. The pipeline is unchanged
    afterwards, also after an error.

    `latents`: its argument of this name; `timesteps`: [rows], or [] for all rows; `call`: its other arguments;
    `device`: that it would compute on; `denoisers`: what stands in for its own, by their names.

    Raises TrainError if it takes no latents. Errors of the call are passed on.
    """
    arguments = arguments_of(pipe)
    if "latents" not in arguments:
        raise TrainError(
            f"{type(pipe).__name__} takes no latents, so it cannot be trained this way\n"
            "  expected a text-to-image pipeline of diffusers, whose call has an argument `latents`"
        )
    own: Any = type(pipe)
    caught = Catch(timesteps, own.__name__)
    quietly = {"output_type": "latent"} if "output_type" in arguments else {}
    with _unchanged(pipe), suppress(_Ended):
        # Not by setattr, which would write it into the pipeline's config.
        vars(pipe).update({"scheduler": _catching(pipe.scheduler, caught), **(denoisers or {})})
        vars(pipe).update({"_progress_bar_config": {"disable": True}, _DEVICE: device})
        pipe.__class__ = _placed_class(own)
        inspect.unwrap(own.__call__)(pipe, latents=latents, **{**quietly, **call})
    return caught


class _Ended(Exception):
    """Ends a pipeline's call once its denoiser has predicted."""


@contextmanager
def _unchanged(pipe: Any) -> Iterator[None]:
    """Give the pipeline back its class and all attributes that it had: a call leaves its settings on it."""
    own, before = type(pipe), dict(vars(pipe))
    try:
        yield
    finally:
        pipe.__class__ = own
        vars(pipe).clear()
        vars(pipe).update(before)


def _catching(real: Any, caught: Catch) -> Any:
    """Return a copy of a scheduler that hands out the timesteps of `caught`, where it puts the first prediction."""
    own: Any = type(real)
    scheduler = object.__new__(_catching_class(own))
    vars(scheduler).update(vars(real))  # not from its config: betas and sigmas would be computed at every step
    vars(scheduler).pop("init_noise_sigma", None)
    vars(scheduler).update(catch=caught, timesteps=caught.timesteps[None], num_inference_steps=1)
    return scheduler


@cache
def _arguments(call: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(inspect.unwrap(call)).parameters


@cache
def _placed_class(base: Any) -> type[Any]:
    """Return a pipeline's class whose `_execution_device` is known. Its own walks over all modules at every call, which
    costs as much as a twentieth of a training step of the embedded pipeline.
    """
    placed = {"_execution_device": property(lambda pipe: vars(pipe)[_DEVICE]), "__module__": base.__module__}
    return type(base.__name__, (base,), placed)


@cache
def _catching_class(base: Any) -> type[Any]:
    class Catching(base):  # type: ignore[misc]  # the pipeline's own scheduler's class
        catch: Catch
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
            raise _Ended

    return Catching
