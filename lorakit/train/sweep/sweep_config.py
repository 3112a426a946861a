"""Expand a sweep's settings into runs. A setting may have a list of values; the runs are the product of all lists.

    rank: [4, 16]
    learning_rate: [1e-4, 2e-4, 4e-4]      # six runs: rank=4,lr=1e-4 and so on

A setting that is a list itself (targets, layers, ...) is swept with a list of lists:
`targets: [all-linear, [q_proj, v_proj]]`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

from ...config import PRESETS
from ...config.kinds import has_effect, needed
from ...config.short_names import SHORT_NAMES
from ...errors import ConfigError, did_you_mean, listing
from ...methods import method_of
from ...tasks import task_of
from ..config import TrainConfig, home

MAX_RUNS = 64
OUT = "sweeps/default"
# Defaults that differ from a single run's. No samples: generating them for every run costs more than they are worth.
DEFAULTS: dict[str, Any] = {"out": OUT, "sample_tokens": 0}

_ONE_BASE = "all runs train on one base, which is loaded once"
_ONE_PASS = "all runs share one forward pass"
_ONE_FOLDER = "it does not affect training"
NOT_SWEPT = {
    "task": _ONE_BASE,
    "model": _ONE_BASE,
    "revision": _ONE_BASE,
    "trust_remote_code": _ONE_BASE,
    "precision": _ONE_BASE,
    "quantize": _ONE_BASE,
    "double": _ONE_BASE,
    "compute_dtype": _ONE_BASE,
    "rope_scaling": _ONE_BASE,
    "method": _ONE_BASE,
    "base": _ONE_BASE,
    "gradient_checkpointing": _ONE_PASS,
    "offload_activations": _ONE_PASS,
    "threads": _ONE_PASS,
    "micro_batch": _ONE_PASS,
    "memory": _ONE_PASS,
    "out": _ONE_FOLDER,
    "keep": _ONE_FOLDER,
    "save_every": _ONE_FOLDER,
    "track": _ONE_FOLDER,
    "diverged": _ONE_FOLDER,
    "sample_prompts": _ONE_FOLDER,
    "sample_tokens": _ONE_FOLDER,
    "find_lr": "the sweep itself compares learning rates",
}
_SHORT = {"learning_rate": "lr", "batch_size": "batch", "validation": "val"}
_LONGEST_VALUE, _LONGEST_NAME = 40, 120  # bytes in a folder's name, of which file systems allow 255


@dataclass(frozen=True)
class Sweep:
    """A sweep's settings (lists where swept), the names of the swept ones, and by run name: each run's config, and its
    values of the swept settings as they were given.
    """

    settings: Mapping[str, Any]
    swept: tuple[str, ...]
    runs: Mapping[str, TrainConfig]
    points: Mapping[str, Mapping[str, Any]]

    @property
    def out(self) -> Path:
        """The sweep's folder."""
        return Path(self.settings["out"])

    def values_of(self, name: str) -> dict[str, Any]:
        """Return a run's values of the swept settings."""
        return dict(self.points[name])


def expand(values: Mapping[str, Any], max_runs: int = MAX_RUNS) -> Sweep:
    """Expand settings into a sweep.

    Raises ConfigError for unknown settings, invalid values, settings that cannot be swept, more than `max_runs` runs,
    or if no setting is swept.
    """
    fields = TrainConfig.model_fields
    for name in values:
        if name not in fields:
            raise ConfigError(f"a sweep has no setting '{name}'{did_you_mean(name, fields)}")
    values = DEFAULTS | dict(values)
    # In the order of the config's fields, so that the runs' names do not depend on the order given.
    axes = {name: _values(name, values[name]) for name in fields if name in values and _is_swept(name, values[name])}
    if not axes:
        TrainConfig(**values)  # report invalid values first
        nested = next(
            (
                name
                for name in fields
                if _holds_list(name) and isinstance(values.get(name), list) and len(values[name]) > 1
            ),
            None,
        )
        hint = f"; {nested} is a list itself: [[...], [...]] sweeps it" if nested else ""
        raise ConfigError(
            f"nothing to sweep: no setting has a list of values{hint}\n"
            "  give one, such as --learning-rate 1e-4,2e-4,4e-4, or use lorakit train"
        )
    count = 1
    for axis in axes.values():
        count *= len(axis)
    if count > max_runs:
        sizes = " x ".join(f"{len(axis)} ({name})" for name, axis in axes.items())
        raise ConfigError(
            f"{count} runs ({sizes}) are more than {max_runs}\n  shorten a list, or raise the limit: --max-runs {count}"
        )
    fixed = {name: value for name, value in values.items() if name not in axes}
    points = [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]
    applicable = [_applicable(fixed, point, points) for point in points]
    configs = _configs(applicable, points)
    for config in configs:
        check_joint(config)
    first = configs[0]
    settings = {n: axes[n] if n in axes else getattr(first, n) for n in fields if n != "base"}
    # A setting that differs between the runs because of another one is written as it was given.
    for name in [n for n in settings if n not in axes and any(getattr(c, n) != settings[n] for c in configs)]:
        given = [getattr(config, name) for config, own in zip(configs, applicable) if name in own]
        settings[name] = given[0] if given else fields[name].get_default(call_default_factory=True)
    by_name = dict(zip(names(points), points, strict=True))
    runs = {
        name: config.replace(out=str(Path(first.out) / "runs" / name))
        for name, config in zip(by_name, configs, strict=True)
    }
    return Sweep(settings, tuple(axes), runs, by_name)


def _configs(fixed: Sequence[Mapping[str, Any]], points: Sequence[Mapping[str, Any]]) -> list[TrainConfig]:
    """Build each run's config. Raises ConfigError, naming the run where other runs are sound."""
    configs, errors = [], {}
    for name, own, point in zip(names(points), fixed, points, strict=True):
        try:
            configs.append(TrainConfig(**{**own, **point}))
        except ConfigError as error:
            errors[name] = str(error)
    if not errors:
        return configs
    name, first = next(iter(errors.items()))
    raise ConfigError(f"the run {name}: {first}" if configs or len({*errors.values()}) > 1 else first)


def _applicable(
    fixed: Mapping[str, Any], point: Mapping[str, Any], points: Iterable[Mapping[str, Any]]
) -> dict[str, Any]:
    """Leave out the fixed settings that have no effect in this run, but have one in another run of the sweep: LoKr's
    in a sweep over LoRA and LoKr.
    """
    return {
        name: value
        for name, value in fixed.items()
        if has_effect(name, {**fixed, **point}) or not any(has_effect(name, {**fixed, **other}) for other in points)
    }


def check_joint(config: TrainConfig) -> None:
    """Raise ConfigError for settings with which a run cannot share its forward pass with others."""
    if config.find_lr:
        raise ConfigError(
            f"find_lr: {NOT_SWEPT['find_lr']}\n  give learning_rate a list of values, or use lorakit train"
        )
    if config.compile:
        raise ConfigError(
            "compile: a sweep needs a new graph for each mix of runs\n  remove compile, or use lorakit train"
        )
    alone = method_of(config.method).alone(config)
    if alone:
        raise ConfigError(alone[1])
    if why := task_of(config.task).alone(config):
        raise ConfigError(why)
    if config.memory not in ("auto", "unchecked"):
        raise ConfigError(
            f"memory: {config.memory}: a sweep's memory is not estimated\n"
            "  remove memory; lorakit plan estimates a single run"
        )
    if "wandb" in config.track:
        raise ConfigError(
            "track: wandb supports one run per process, but a sweep has several\n  use tensorboard, or remove wandb"
        )


def names(settings: Iterable[Mapping[str, Any]]) -> list[str]:
    """Name each run after its swept settings, as a folder name: `rank=4,lr=2e-4`."""
    result: list[str] = []
    for swept in settings:
        name = ",".join(f"{_SHORT.get(setting, setting)}={short(value)}" for setting, value in swept.items())
        if (beginning := _beginning(name, _LONGEST_NAME)) != name:
            name = f"{beginning}~{_digest(swept)}"
        if name in result:  # files of the same name in two folders, or long lists that begin alike
            name = f"{name}~{_digest(swept)}"
        result.append(name)
    return result


def short(value: Any) -> str:
    """Abbreviate a value to a few characters that are safe in file names."""
    if isinstance(value, bool) or value is None:
        text = str(value).lower()
    elif isinstance(value, float):
        text = _number(value)
    elif isinstance(value, list):
        text = "+".join(map(short, value)) or "none"
    elif isinstance(value, dict):
        text = "+".join(f"{k}-{short(v)}" for k, v in value.items()) or "none"
    else:
        text = Path(value).stem if isinstance(value, str) and ("/" in value or Path(value).suffix) else str(value)
    text = re.sub(r"[^\w.+-]+", "_", text).strip("._") or "_"  # \w: letters of every script
    beginning = _beginning(text, _LONGEST_VALUE)
    return text if beginning == text else beginning + "~"


def _beginning(text: str, limit: int) -> str:
    """Return as much of the text as fits into `limit` bytes of UTF-8."""
    return text.encode()[:limit].decode(errors="ignore")


def _number(value: float) -> str:
    plain = f"{value:g}"
    mantissa, _, exponent = f"{value:e}".partition("e")
    scientific = f"{float(mantissa):g}e{int(exponent)}"
    return scientific if len(scientific) < len(plain) else plain


def _digest(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:6]


def _is_swept(name: str, value: Any) -> bool:
    if not isinstance(value, list):
        return False
    if _holds_list(name):
        return any(isinstance(one, list) or one is None or (one in PRESETS and name == "targets") for one in value)
    return True


def _values(name: str, values: list[Any]) -> list[Any]:
    """Parse the values of a swept setting. Raises ConfigError for one listed twice, none at all, or a setting that
    cannot be swept.
    """
    if name in NOT_SWEPT:
        raise ConfigError(
            f"{name} cannot be swept: {NOT_SWEPT[name]}\n  give a single value (got {listing(map(repr, values))})"
        )
    if not values:
        raise ConfigError(f"{name}: the list is empty; give the values to try")
    parsed = [_parsed(name, value) for value in values]
    duplicate = next((value for i, value in enumerate(parsed) if value in parsed[:i]), None)
    if duplicate is not None:
        raise ConfigError(f"{name}: {duplicate!r} is listed twice; list each value once")
    return parsed


def _parsed(name: str, value: Any) -> Any:
    """Validate one value of a setting. A short name, such as the variant "pissa", stays as it is."""
    own = getattr(TrainConfig(**{"data": "-", **home(name), **needed(name), name: value}), name)
    return value if name == "variant" and value in SHORT_NAMES else own


def _holds_list(name: str) -> bool:
    annotation = TrainConfig.model_fields[name].annotation
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return any(get_origin(kind) is list for kind in kinds)
