"""Validated settings, without torch: an adapter's (`LoraConfig`) and a training run's (`RunSettings`).

`LoraConfig` uses lorakit's names; `lorakit/formats/peft_config.py` maps them to PEFT's `adapter_config.json`. A run's
config, flat in YAML, joins `RunSettings` with the settings of all methods and tasks: see `lorakit/train/config.py`.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator, model_validator

from .errors import ConfigError, did_you_mean, expectation
from .module_names import Patterns, ends_with, plain

ALL_LINEAR = "all-linear"
PRESETS = (ALL_LINEAR, "attention", "kohya", "locon")  # sets of targets by name, the others in layers/presets.py
MAX_RANK = 65536  # beyond any sensible rank
Auto = Literal["auto"]
Tokens = list[int | str]  # token ids, or the tokens themselves where there is a tokenizer to look them up

# PEFT's names of settings with the same values.
PEFT_NAMES = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "bias": "bias",
    "target_modules": "targets",
    "exclude_modules": "exclude",
    "layers_to_transform": "layers",
    "layers_pattern": "layers_pattern",
    "trainable_token_indices": "trainable_tokens",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "use_rslora": "rslora",
    "modules_to_save": "save_modules",
    "task_type": "task",
    "base_model_name_or_path": "base",
    "revision": "revision",
}


@dataclass(frozen=True)
class Choice:
    """A chosen value and the reason for it."""

    value: Any
    reason: str


class Strict(BaseModel):
    """A frozen settings object. ConfigError for unknown keys, with the nearest name, and for invalid values."""

    # Names of a class's own settings: `free` do not affect the result, `rows` determine the training rows.
    free: ClassVar[Collection[str]] = ()
    rows: ClassVar[Collection[str]] = ()
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, arbitrary_types_allowed=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(explain(type(self), error)) from None

    def replace(self, **changes: Any):
        """Return a copy with some fields changed, validated again. Fields that were not given are still not given."""
        return type(self)(**{name: getattr(self, name) for name in self.model_fields_set} | changes)


def explain(cls: type[BaseModel], error: ValidationError) -> str:
    """Format a pydantic error as lines of `Class.field: what is wrong (got ...)`, one for each mistake."""
    lines: list[str] = []
    mistakes: dict[tuple[str, str], list[Any]] = {}  # a value that fits no member of a union has an error for each
    for item in error.errors():
        mistakes.setdefault((str(item["loc"][:1]), repr(item.get("input"))), []).append(item)
    for items in mistakes.values():
        item = items[0]
        union = len(items) > 1
        where = ".".join(str(part) for part in (item["loc"][:1] if union else item["loc"])) or "settings"
        if item["type"] == "extra_forbidden":
            ours = PEFT_NAMES.get(where)
            hint = (
                f"; PEFT's '{where}' is '{ours}' here"
                if ours in cls.model_fields
                else did_you_mean(where, cls.model_fields)
            )
            lines.append(f"{cls.__name__} has no setting '{where}'{hint}")
        elif item["type"] == "value_error":
            lines.append(f"{cls.__name__}.{where}: {item['ctx']['error']!s}")
        else:
            lines.append(f"{cls.__name__}.{where}: {expectation(items)} (got {item.get('input')!r})")
    return "\n".join(dict.fromkeys(lines))


_Part = TypeVar("_Part", bound=Strict)


def part(config: Strict, cls: type[_Part]) -> _Part:
    """Return the settings of one class from a config that includes them."""
    return cls(**{name: getattr(config, name) for name in cls.model_fields})


def at_least_one(value: int | str) -> int | str:
    """Validate a setting that is a positive integer or 'auto'. Raises ValueError otherwise."""
    if value != "auto" and (not isinstance(value, int) or value < 1):
        raise ValueError(f"expected a positive integer or 'auto' (got {value})")
    return value


def joined(name: str, parts: Iterable[type[Strict]]) -> type[Strict]:
    """Join settings classes into one. Raises TypeError if two of them define the same setting or validator."""
    parts = tuple(parts)
    owners: dict[str, type] = {}
    for cls in dict.fromkeys(cls for part in parts for cls in part.__mro__ if issubclass(cls, Strict)):
        checks = {
            *cls.__pydantic_decorators__.field_validators,
            *cls.__pydantic_decorators__.model_validators,
        } & cls.__dict__.keys()
        for setting in (cls.model_fields.keys() & inspect.get_annotations(cls).keys()) | checks:
            if setting in owners:
                raise TypeError(
                    f"'{setting}' is a setting of {owners[setting].__name__} and of {cls.__name__}; give one of them "
                    "another name"
                )
            owners[setting] = cls
    return create_model(name, __base__=parts)


class LoraSettings(Strict):
    """Which modules get a low-rank update, and of what shape (Hu et al. 2021, section 4).

    ΔW = scale · B A with A: [rank, in], B: [out, rank]; scale = alpha / rank, or alpha / √rank with `rslora`.
    """

    rank: int = Field(16, ge=1, le=MAX_RANK, description="rank of the update")
    # 32 whatever the rank ("LoRA Without Regret", 2025): the best learning rate then hardly depends on the rank.
    alpha: float = Field(32.0, gt=0, allow_inf_nan=False, description="numerator of the update's scale, alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input of the low-rank branch, in training")
    bias: Literal["none", "all", "lora_only"] = Field(
        "none", description="biases to train: none, all, or those of adapted modules"
    )
    targets: str | list[str] = Field(
        ALL_LINEAR,
        description="modules to adapt: all-linear, attention, kohya, locon, name endings, or one regular expression "
        "for full names",
    )
    components: list[str] | None = Field(
        None, min_length=1, description="components of a pipeline to adapt, such as unet; default: its denoiser"
    )
    exclude: str | list[str] | None = Field(
        None, description="modules to skip: name endings, or one regular expression"
    )
    layers: list[int] | None = Field(
        None, description="only these layer numbers: the first number in a module's name, after two names at least"
    )
    layers_pattern: list[str] = Field(
        default_factory=list,
        description="with layers: the names before the layer's number, such as h or blocks (default: any)",
    )
    strict_targets: bool = Field(True, description="a target that no module matches is an error; false: list it")
    rank_pattern: dict[str, int] = Field(
        default_factory=dict, description="other ranks: {name ending or regular expression: rank}"
    )
    alpha_pattern: dict[str, float] = Field(
        default_factory=dict, description="other alphas: {name ending or regular expression: alpha}"
    )
    rslora: bool = Field(False, description="scale by alpha / √rank (Kalajdzievski 2023)")
    variant: str = Field("lora", description="kind of update to train (docs/python.md lists them)")
    init: Literal["default", "gaussian"] = Field(
        "default", description="initialization of A: kaiming-uniform, or gaussian; B is zero, so that ΔW starts at zero"
    )
    save_modules: list[str] = Field(
        default_factory=list, description="modules to train and save in full (PEFT's modules_to_save)"
    )
    trainable_tokens: Tokens | dict[str, Tokens] = Field(
        default_factory=list,
        description="tokens whose rows of the embedding are trained: ids or tokens, or {name ending: tokens}",
    )
    packed: dict[str, list[bool]] = Field(
        default_factory=dict,
        description="packed projections: {name ending: which of its equal parts to adapt}, e.g. c_attn: [true, false, "
        "true]",
    )

    @field_validator("targets", "exclude")
    @classmethod
    def _names_or_regex(cls, value: str | list[str] | None) -> str | list[str] | None:
        if isinstance(value, list):
            if not value or not all(value):
                raise ValueError("expected at least one name ending, and none of them empty")
            return sorted(dict.fromkeys(value))
        if isinstance(value, str) and value not in PRESETS:
            _compile(value)
        return value

    @field_validator("variant")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in variants():
            raise ValueError(
                f"there is no '{value}'{did_you_mean(value, variants())}; it is one of {', '.join(variants())}"
            )
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
                raise ValueError(f"no part of '{key}' is adapted; remove it from the targets instead")
        return value

    @model_validator(mode="after")
    def _pattern_needs_layers(self):
        for pattern in self.layers_pattern:
            _compile(pattern)
        if self.layers_pattern and self.layers is None:
            raise ValueError("layers_pattern says where the numbers of layers are; give layers too")
        return self

    def rank_of(self, module: str) -> int:
        """Return the rank for a module's full name."""
        return self._ranks_by_name.value(module, self.rank)

    def alpha_of(self, module: str) -> float:
        """Return the alpha for a module's full name."""
        return self._alphas_by_name.value(module, self.alpha)

    @cached_property
    def _ranks_by_name(self) -> Patterns:
        return Patterns(self.rank_pattern)

    @cached_property
    def _alphas_by_name(self) -> Patterns:
        return Patterns(self.alpha_pattern)

    def parts_of(self, module: str) -> tuple[bool, ...] | None:
        """Return which equal parts of a packed projection are adapted; None for an ordinary module."""
        return next((tuple(parts) for key, parts in self.packed.items() if ends_with(module, key)), None)


class LoraConfig(LoraSettings):
    """An adapter's settings: those of its updates, its task and its base."""

    task: str | None = Field(None, description="PEFT's task_type: CAUSAL_LM, SEQ_CLS, SEQ_2_SEQ_LM, ...")
    base: str | None = Field(None, description="the base model's hub id or folder")
    revision: str | None = Field(None, description="the base model's revision on the hub")


@cache
def variants() -> tuple[str, ...]:
    """List the kinds of update that can be attached to a live model: the files of layers/updates/ (not imported)."""
    files = (Path(__file__).parent / "layers" / "updates").glob("*.py")
    return tuple(sorted(file.stem for file in files if file.stem not in ("__init__", "update")))


def scale_of(alpha: float, rank: int, rslora: bool) -> float:
    """Return the scale of B A: alpha / rank, or alpha / √rank with `rslora`."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


class Source(Strict):
    """The task, the base and the data of a run."""

    free: ClassVar = {"data"}  # the rows are compared by hash
    rows: ClassVar = {"task", "data", "split"}

    task: str = Field("causal_lm", description="the task")
    base: str | None = Field(None, description="the base model's hub id or folder")
    revision: str | None = Field(None, description="the base model's revision on the hub")
    model: str = Field("embedded", description="the base: 'embedded', a folder, or a hub id such as Qwen/Qwen3-0.6B")
    data: str = Field(..., description="training data: a JSONL, JSON, CSV or Parquet file, a folder, or a hub id")
    split: str | None = Field(None, description="the data's split, if it has several")


class RunSettings(Source):
    """The settings of a training run that do not depend on the method or the task."""

    free: ClassVar = {"out", "track", "keep", "threads", "save_every", "memory", "diverged"}
    rows: ClassVar = {"validation", "add_tokens"}

    validation: float | str = Field(0.05, description="held-out rows: a share of the data, another file, or 0 for none")
    method: str = Field("lora", description="how to fine-tune")
    out: str = Field("runs/default", description="the run's folder; started on its own folder, a run resumes")
    add_tokens: list[str] = Field(
        default_factory=list, description="new tokens, or a file of them: learnt by the tokenizer, their rows trained"
    )
    epochs: float = Field(3.0, gt=0, allow_inf_nan=False, description="passes over the data")
    steps: int | None = Field(None, ge=1, description="optimizer steps, instead of epochs")
    batch_size: int = Field(16, ge=1, description="sequences per optimizer step, over all devices")
    micro_batch: int | Auto = Field(
        "auto", description="sequences computed at once on one device; the rest is accumulated"
    )
    group_by_length: bool = Field(True, description="put rows of similar length into the same batch: less padding")
    learning_rate: float | Auto = Field(
        "auto", description="peak learning rate; auto picks one from the model's width and says why"
    )
    find_lr: bool = Field(
        False, description="with learning_rate auto: try several rates in a short joint run first, and take the best"
    )
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="how the learning rate falls after warm-up"
    )
    warmup: float = Field(0.03, ge=0, le=1, description="share of the steps in which the learning rate rises")
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False, description="AdamW's weight decay")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first beta")
    beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's second beta")
    clip: float = Field(1.0, ge=0, allow_inf_nan=False, description="maximum gradient norm; 0: no clipping")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="the base's precision; the adapter trains in float32"
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in backward: less memory, a third more time"
    )
    compile: bool = Field(
        False, description="compile the layers with torch.compile first (for long runs; a CPU needs a C++ compiler)"
    )
    seed: int = Field(0, ge=0, lt=1 << 31, description="seed of the factors, the data order and dropout")
    threads: int | Auto = Field("auto", description="CPU threads; auto: torch's own choice")
    eval_every: int | Auto = Field(
        "auto", description="steps between evaluations on the held-out rows; auto: about ten per run"
    )
    patience: int = Field(
        3, ge=0, description="stop after this many evaluations without a better held-out loss; 0: never"
    )
    diverged: Literal["stop", "continue"] = Field(
        "stop",
        description="what to do when the held-out loss is more than 1.0 above the base's, or the gradient exactly zero",
    )
    save_every: int | Auto = Field("auto", description="steps between checkpoints; auto: at each evaluation")
    keep: int = Field(2, ge=1, description="number of newest checkpoints to keep")
    track: list[Literal["tensorboard", "wandb"]] = Field(default_factory=list, description="also log to these")
    memory: str = Field(
        "auto",
        description="memory the run may use, such as 24GB; auto: what the device has; unchecked: start in any case",
    )
    trust_remote_code: bool = Field(False, description="run code from a hub model's repository, which you trust")

    @model_validator(mode="before")
    @classmethod
    def _no_base(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("base") is not None:
            raise ValueError("'base' is set from 'model' in a training run; give 'model'")
        return values

    @model_validator(mode="after")
    def _compiled(self) -> RunSettings:
        if self.compile and self.gradient_checkpointing:
            raise ValueError("compile is not tested with gradient_checkpointing; remove one of the two")
        return self

    @field_validator("learning_rate")
    @classmethod
    def _positive(cls, value: float | str) -> float | str:
        if value != "auto" and not (isinstance(value, float | int) and 0 < value < float("inf")):
            raise ValueError(f"expected a positive number or 'auto' (got {value})")
        return value

    _at_least_one = field_validator("micro_batch", "eval_every", "save_every", "threads")(at_least_one)

    @field_validator("validation")
    @classmethod
    def _share_or_file(cls, value: float | str) -> float | str:
        if isinstance(value, float) and not 0 <= value < 1:
            raise ValueError(f"expected a share of at least 0 and below 1, or a file (got {value})")
        return value


def _compile(pattern: str) -> None:
    if plain(pattern):
        return
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"'{pattern}' is not a regular expression: {error}") from None
