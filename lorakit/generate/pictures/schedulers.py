"""Samplers by name: A1111's ("Euler a", "DPM++ 2M Karras") or diffusers' (EulerAncestralDiscreteScheduler).

A scheduler that is chosen takes over the config of the pipeline's own (`from_config`), so that its training noise,
prediction type and spacing stay the model's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ...errors import ConfigError, did_you_mean


class Sampler(NamedTuple):
    """A class of diffusers, and what its config must say."""

    scheduler: str
    config: Mapping[str, Any]


# The names of A1111, and of Forge for flow models. Several may be one class: the first whose config fits is its name.
SAMPLERS = {
    "DDIM": Sampler("DDIMScheduler", {}),
    "DDPM": Sampler("DDPMScheduler", {}),
    "PLMS": Sampler("PNDMScheduler", {}),
    "LMS": Sampler("LMSDiscreteScheduler", {}),
    "Euler": Sampler("EulerDiscreteScheduler", {}),
    "Euler a": Sampler("EulerAncestralDiscreteScheduler", {}),
    "Heun": Sampler("HeunDiscreteScheduler", {}),
    "DPM2": Sampler("KDPM2DiscreteScheduler", {}),
    "DPM2 a": Sampler("KDPM2AncestralDiscreteScheduler", {}),
    "DPM++ 2M": Sampler("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "DPM++ 2M SDE": Sampler("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    "DPM++ 3M SDE": Sampler("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}),
    "DPM++ 2S": Sampler("DPMSolverSinglestepScheduler", {}),
    "DEIS": Sampler("DEISMultistepScheduler", {}),
    "UniPC": Sampler("UniPCMultistepScheduler", {}),
    "LCM": Sampler("LCMScheduler", {}),
}
FLOW_SAMPLERS = {
    "Euler": Sampler("FlowMatchEulerDiscreteScheduler", {}),
    "Heun": Sampler("FlowMatchHeunDiscreteScheduler", {}),
}
# A1111's "Schedule type" -> the switch in a scheduler's config.
SCHEDULES = {"Karras": "use_karras_sigmas", "Exponential": "use_exponential_sigmas", "Beta": "use_beta_sigmas"}
_AUTOMATIC = ("", "automatic", "uniform", "normal")


def name_of(scheduler: Any) -> tuple[str, str | None]:
    """Return a scheduler's name and its type of schedule, such as ("DPM++ 2M", "Karras"); None is the usual one.

    A class or config without a name in A1111 has its own, without "Scheduler".
    """
    kind, config = type(scheduler).__name__, scheduler.config
    schedule = next((name for name, switch in SCHEDULES.items() if config.get(switch)), None)
    for name, sampler in _samplers(scheduler).items():
        if sampler.scheduler == kind and all(config.get(key) == value for key, value in sampler.config.items()):
            return name, schedule
    return kind.removesuffix("Scheduler"), schedule


def choose_scheduler(current: Any, name: str, schedule: str | None = None) -> Any:
    """Return the scheduler of this name for a pipeline; `current`, its own one, if that has it.

    `name`: of A1111 or diffusers, in any case; it may end in a type of schedule, "Karras". `schedule`: that type.
    Raises ConfigError for an unknown name, and one that does not fit the model or lacks a library.
    """
    import diffusers

    first, _, last = name.rpartition(" ")
    if first and last.lower() in [s.lower() for s in SCHEDULES]:
        name, schedule = first, last
    switch = _switch(schedule)
    samplers = _samplers(current)
    # A name of A1111 first, then any class that the pipeline's own scheduler can be exchanged for.
    known = {_plain(key): sampler for key, sampler in samplers.items()}
    classes = {c.__name__ for c in current.compatibles} | {s.scheduler for s in samplers.values()}
    known |= {_plain(c): Sampler(c, {}) for c in {*classes, type(current).__name__}}
    sampler = known.get(_plain(name))
    if sampler is None:
        names = [*samplers, *sorted(c.removesuffix("Scheduler") for c in classes)]
        hint = did_you_mean(name.lower(), [n.lower() for n in names])
        raise ConfigError(
            f"unknown scheduler '{name}' (--scheduler){hint}\n"
            f"  for a pipeline with {type(current).__name__}: {', '.join(samplers)}, or a class of diffusers"
        )
    own = type(current).__name__ == sampler.scheduler and all(
        current.config.get(key) == value for key, value in sampler.config.items()
    )
    if own and _switched(current) == switch:
        return current
    settings = {**dict.fromkeys(SCHEDULES.values(), False), **({switch: True} if switch else {}), **sampler.config}
    try:
        made = getattr(diffusers, sampler.scheduler).from_config(current.config, **settings)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"scheduler '{name}' cannot be used here: {str(error).strip().splitlines()[0]}") from error
    if switch and not made.config.get(switch):
        raise ConfigError(f"scheduler '{name}' has no schedule of type '{schedule}'\n  leave it out")
    return made


def _samplers(scheduler: Any) -> dict[str, Sampler]:
    return FLOW_SAMPLERS if type(scheduler).__name__.startswith("FlowMatch") else SAMPLERS


def _switch(schedule: str | None) -> str | None:
    """Return the switch in the config for a type of schedule; None for the usual one."""
    plain = (schedule or "").lower()
    if plain in _AUTOMATIC:
        return None
    found = next((switch for name, switch in SCHEDULES.items() if name.lower() == plain), None)
    if found is None:
        raise ConfigError(
            f"unknown type of schedule '{schedule}'{did_you_mean(str(schedule), SCHEDULES)}\n"
            f"  known: {', '.join(SCHEDULES)}, or none"
        )
    return found


def _switched(scheduler: Any) -> str | None:
    return next((switch for switch in SCHEDULES.values() if scheduler.config.get(switch)), None)


def _plain(name: str) -> str:
    """Return a name as it is compared: DPM++2M, dpm++_2m and "DPM++ 2M" are one."""
    return "".join(c for c in name.lower().removesuffix("scheduler") if c.isalnum() or c == "+")
