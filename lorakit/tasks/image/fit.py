"""Whether a run's settings of the objective fit its pipeline: known before a picture is encoded or drawn."""

from __future__ import annotations

from typing import Any

import torch

from ...bases.pipeline import PipelineModel
from ...errors import ConfigError
from ...nondefault import nondefault
from .loss import trained_timesteps
from .objective import Objective
from .settings import LOGIT_NORMAL, DiffusionSettings
from .timesteps import timesteps_at


def check_scheduler(scheduler: Any, settings: DiffusionSettings) -> None:
    """Raise ConfigError for settings that the scheduler cannot train with or would not use; TrainError for a scheduler
    that cannot be trained with.
    """
    objective = Objective.of(scheduler)
    objective.weights(timesteps_at(torch.tensor([0.5]), scheduler, settings), settings.min_snr)
    unused = nondefault(settings, LOGIT_NORMAL)
    if unused and settings.timestep_sampling == "auto" and objective.kind != "flow":
        raise ConfigError(
            f"{unused[0]} is for logit-normal timesteps, and with {type(scheduler).__name__} auto is uniform\n"
            "  set timestep_sampling: logit-normal"
        )


def check_fit(model: PipelineModel, settings: DiffusionSettings) -> None:
    """The same for a pipeline with its adapter: timesteps must be among those of the expert that is trained, too."""
    check_scheduler(model.pipe.scheduler, settings)
    trained_timesteps(model, settings)
