"""What to adapt and how: `LoraConfig`. Pure data, validated, without torch.

`LoraConfig` has our names; `lorakit/formats/peft_config.py` maps them to PEFT's `adapter_config.json`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from .errors import ConfigError, did_you_mean
from .module_names import Patterns, ends_with, plain

ALL_LINEAR = "all-linear"
MAX_RANK = 65536  # beyond any sensible rank


# PEFT's names of the settings that hold the same values.
PEFT_NAMES = {
    "r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "bias": "bias", "target_modules": "targets",
    "exclude_modules": "exclude", "layers_to_transform": "layers", "rank_pattern": "rank_pattern", "alpha_pattern": "alpha_pattern",
    "use_rslora": "rslora", "modules_to_save": "save_modules", "task_type": "task", "base_model_name_or_path": "base", "revision": "revision",
}  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """Something chosen, and why."""

    value: Any
    reason: str


class Strict(BaseModel):
    """A frozen settings object that refuses unknown keys (with the nearest name) and says what was wrong with a value."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, arbitrary_types_allowed=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(explain(type(self), error)) from None

    def replace(self, **changes: Any):
        """A copy with some fields changed, validated again."""
        return type(self)(**{name: getattr(self, name) for name in type(self).model_fields} | changes)


def explain(cls: type[BaseModel], error: ValidationError) -> str:
    """A pydantic error as lines of `Class.field: what is wrong (got ...)`."""
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"]) or "settings"
        if item["type"] == "extra_forbidden":
            ours = PEFT_NAMES.get(where)
            hint = f"; PEFT's '{where}' is '{ours}' here" if ours in cls.model_fields else did_you_mean(where, cls.model_fields)
            lines.append(f"{cls.__name__} has no setting '{where}'{hint}")
        elif item["type"] == "value_error":
            lines.append(f"{cls.__name__}.{where}: {item['ctx']['error']!s}")
        else:
            lines.append(f"{cls.__name__}.{where}: {item['msg'][0].lower()}{item['msg'][1:]} (got {item.get('input')!r})")
    return "\n".join(dict.fromkeys(lines))


class LoraConfig(Strict):
    """Which modules get a low-rank update, and of what shape (Hu et al. 2021, section 4).

    ΔW = scale · B A with A: [rank, in], B: [out, rank]; scale = alpha / rank, or alpha / √rank with `rslora`.
    """

    rank: int = Field(16, ge=1, le=MAX_RANK, description="rank of the update")
    # 32 whatever the rank ("LoRA Without Regret", 2025): the best learning rate then hardly depends on the rank.
    alpha: float = Field(32.0, gt=0, allow_inf_nan=False, description="strength of the update; the scale is alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input of the low-rank branch, in training")
    bias: Literal["none", "all", "lora_only"] = Field("none", description="biases to train: none, all, or those of adapted modules")
    targets: str | list[str] = Field(
        ALL_LINEAR, description="modules to adapt: 'all-linear', a list of name endings, or one regular expression for whole names"
    )
    exclude: str | list[str] | None = Field(None, description="modules to leave out: name endings, or one regular expression")
    layers: list[int] | None = Field(None, description="only these layer numbers (the first number in a module's name)")
    rank_pattern: dict[str, int] = Field(default_factory=dict, description="other ranks: {name ending or regular expression: rank}")
    alpha_pattern: dict[str, float] = Field(default_factory=dict, description="other alphas, likewise")
    rslora: bool = Field(False, description="scale by alpha / √rank (Kalajdzievski 2023)")
    variant: str = Field("lora", description="kind of update to train (docs/python.md lists them)")
    init: Literal["default", "gaussian"] = Field("default", description="A kaiming-uniform or gaussian; B zero, so that ΔW starts at zero")
    save_modules: list[str] = Field(default_factory=list, description="modules trained and saved whole (PEFT's modules_to_save)")
    packed: dict[str, list[bool]] = Field(
        default_factory=dict,
        description="packed projections: {name ending: which of its equal parts to adapt}, e.g. c_attn: [true, false, true]",
    )
    task: str | None = Field(None, description="what the model is for, PEFT's task_type: CAUSAL_LM, SEQ_CLS, SEQ_2_SEQ_LM, ...")
    base: str | None = Field(None, description="the base model's hub id or folder")
    revision: str | None = Field(None, description="the base model's revision on the hub")

    @field_validator("targets", "exclude")
    @classmethod
    def _names_or_regex(cls, value: str | list[str] | None) -> str | list[str] | None:
        if isinstance(value, list):
            if not value or not all(value):
                raise ValueError("expected at least one name ending, and none of them empty")
            return sorted(dict.fromkeys(value))
        if isinstance(value, str) and value != ALL_LINEAR:
            _compile(value)
        return value

    @field_validator("variant")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in variants():
            raise ValueError(f"there is no '{value}'{did_you_mean(value, variants())}; it is one of {', '.join(variants())}")
        return value

    @field_validator("rank_pattern")
    @classmethod
    def _ranks(cls, value: dict[str, int]) -> dict[str, int]:
        for key, rank in value.items():
            _compile(key)
            if not 1 <= rank <= MAX_RANK:
                raise ValueError(f"the rank for '{key}' must be at least 1 and at most {MAX_RANK} (got {rank})")
        return value

    @field_validator("alpha_pattern")
    @classmethod
    def _alphas(cls, value: dict[str, float]) -> dict[str, float]:
        for key, alpha in value.items():
            _compile(key)
            if not (math.isfinite(alpha) and alpha > 0):
                raise ValueError(f"the alpha for '{key}' must be a positive number (got {alpha})")
        return value

    @field_validator("packed")
    @classmethod
    def _packed(cls, value: dict[str, list[bool]]) -> dict[str, list[bool]]:
        for key, parts in value.items():
            if not any(parts):
                raise ValueError(f"no part of '{key}' is adapted; leave it out of the targets instead")
        return value

    def rank_of(self, module: str) -> int:
        """The rank for a module's full name."""
        return self._ranks_by_name.value(module, self.rank)

    def alpha_of(self, module: str) -> float:
        """The alpha for a module's full name."""
        return self._alphas_by_name.value(module, self.alpha)

    @cached_property
    def _ranks_by_name(self) -> Patterns:
        return Patterns(self.rank_pattern)

    @cached_property
    def _alphas_by_name(self) -> Patterns:
        return Patterns(self.alpha_pattern)

    def parts_of(self, module: str) -> tuple[bool, ...] | None:
        """Which equal parts of a packed projection are adapted, or None for an ordinary module."""
        return next((tuple(parts) for key, parts in self.packed.items() if ends_with(module, key)), None)


@cache
def variants() -> tuple[str, ...]:
    """The kinds of update that a live model takes: each is a file of layers/updates/, which is not imported here."""
    files = (Path(__file__).parent / "layers" / "updates").glob("*.py")
    return tuple(sorted(file.stem for file in files if file.stem not in ("__init__", "update")))


def scale_of(alpha: float, rank: int, rslora: bool) -> float:
    """The factor before B A."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def _compile(pattern: str) -> None:
    if plain(pattern):
        return
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"'{pattern}' is not a regular expression: {error}") from None
