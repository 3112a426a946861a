"""An adapter's settings: which modules get which update, of what shape, from what start."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from ..errors import did_you_mean
from ..module_names import Patterns, ends_with
from .bottleneck import BottleneckShape
from .ia3 import Ia3Settings
from .kinds import KindSettings
from .placement import Placement
from .short_names import SHORT_NAMES, spelled_out
from .strict import Strict, check_pattern
from .virtual_tokens import VIRTUAL, VirtualKind, VirtualTokenSettings

EXPERTS = "experts"
MAX_RANK = 65536  # beyond any sensible rank
Tokens = list[int | str]  # token ids, or the tokens themselves where there is a tokenizer to look them up
Init = Literal["default", "gaussian", "pissa", "olora", "milora", "eva", "lora_ga", "loftq"]
_OF_STARTS = ("eva_rho", "init_batches")
_RANDOM = ("default", "gaussian")
# Settings of kinds that are methods of their own, which a run by LoRA does not have.
_OF_KINDS: dict[str, type[Strict]] = {"bottleneck": BottleneckShape, "ia3": Ia3Settings}


class LowRank(Strict):
    """The shape of a low-rank update, and how it is trained."""

    rank: int = Field(16, ge=1, le=MAX_RANK, description="rank of the update")
    # 32 whatever the rank ("LoRA Without Regret", 2025): the best learning rate then hardly depends on the rank.
    alpha: float = Field(32.0, gt=0, allow_inf_nan=False, description="numerator of the update's scale, alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input of the low-rank branch, in training")
    bias: Literal["none", "all", "lora_only"] = Field(
        "none", description="biases to train: none, all, or those of adapted modules"
    )


class LoraSettings(KindSettings, Placement, LowRank):
    """Which modules get a low-rank update, and of what shape (Hu et al. 2021, section 4).

    ΔW = scale · B A with A: [rank, in], B: [out, rank]; scale = alpha / rank, or alpha / √rank with `rslora`.
    """

    rank_pattern: dict[str, int] = Field(
        default_factory=dict, description="other ranks: {name ending or regular expression: rank}"
    )
    alpha_pattern: dict[str, float] = Field(
        default_factory=dict, description="other alphas: {name ending or regular expression: alpha}"
    )
    rslora: bool = Field(False, description="scale by alpha / √rank (Kalajdzievski 2023)")
    variant: str = Field("lora", description="kind of update to train (docs/variants.md lists them)")
    init: Init = Field(
        "default",
        description="start: A kaiming-uniform, or gaussian; pissa, olora, milora, loftq (of W); eva, lora_ga (of data)",
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

    @model_validator(mode="before")
    @classmethod
    def _short_name(cls, values: Any) -> Any:
        return spelled_out(values)

    @field_validator("variant")
    @classmethod
    def _known(cls, value: str) -> str:
        known = (*variants(), *SHORT_NAMES, *VIRTUAL)
        if value not in known:
            names = ", ".join(f"'{name}'" for name in known)
            raise ValueError(f"there is no '{value}'{did_you_mean(value, known)}; it is one of {names}")
        return value

    @field_validator("rank_pattern")
    @classmethod
    def _ranks(cls, value: dict[str, int]) -> dict[str, int]:
        for key, rank in value.items():
            check_pattern(key)
            if not 1 <= rank <= MAX_RANK:
                raise ValueError(f"the rank for '{key}' must be at least 1 and at most {MAX_RANK} (got {rank})")
        return value

    @field_validator("alpha_pattern")
    @classmethod
    def _alphas(cls, value: dict[str, float]) -> dict[str, float]:
        for key, alpha in value.items():
            check_pattern(key)
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

    def rank_of(self, module: str) -> int:
        """Return the rank for a module's full name."""
        return self._ranks_by_name.value(module, self.rank)

    def alpha_of(self, module: str) -> float:
        """Return the alpha for a module's full name."""
        return self._alphas_by_name.value(module, self.alpha)

    def of_values(self, ranks: Mapping[str, int], alphas: Mapping[str, float], variant: str | None = None) -> Self:
        """Return the settings of an adapter with values, of these ranks and alphas by module's full name.

        How it started is no setting of it any more, unless at random; a start that was subtracted has twice the rank.
        variant: the kind that its values are of, if that is another than the one that was trained.
        """
        if variant is None and self.init in _RANDOM:
            return self
        own = self if variant is None else self.of_variant(variant)
        changes: dict[str, Any] = {name: type(own).model_fields[name].default for name in ("init", *_OF_STARTS)}
        if any(own.rank_of(m) != r for m, r in ranks.items()) or any(own.alpha_of(m) != a for m, a in alphas.items()):
            rank, alpha = (Counter(of.values()).most_common(1)[0][0] for of in (ranks, alphas))
            changes |= {
                "rank": rank,
                "alpha": alpha,
                "rank_pattern": {f"^{m}": r for m, r in ranks.items() if r != rank},
                "alpha_pattern": {f"^{m}": a for m, a in alphas.items() if a != alpha},
            }
        return own.replace(**changes)

    @cached_property
    def _ranks_by_name(self) -> Patterns:
        return Patterns(self.rank_pattern)

    @cached_property
    def _alphas_by_name(self) -> Patterns:
        return Patterns(self.alpha_pattern)

    def parts_of(self, module: str) -> tuple[bool, ...] | None:
        """Return which equal parts of a packed projection are adapted; None for an ordinary module."""
        return next((tuple(parts) for key, parts in self.packed.items() if ends_with(module, key)), None)


class LoraConfig(LoraSettings, BottleneckShape, Ia3Settings):
    """An adapter's settings: those of its updates, its task and its base."""

    task: str | None = Field(
        None, description="PEFT's task_type: CAUSAL_LM, SEQ_CLS, SEQ_2_SEQ_LM, ..., or IMAGE_CLASSIFICATION"
    )
    base: str | None = Field(None, description="the base model's hub id or folder")
    revision: str | None = Field(None, description="the base model's revision on the hub")

    @model_validator(mode="after")
    def _of_kinds(self) -> LoraConfig:
        for variant, settings in _OF_KINDS.items():
            for name, field in settings.model_fields.items():
                if self.variant != variant and getattr(self, name) != field.default:
                    raise ValueError(f"{name} has an effect with variant='{variant}' only; remove it, or give that")
        return self

    def of_variant(self, variant: str) -> Self:
        """Return the settings of updates of another kind, without those that only the kind so far has."""
        if variant == self.variant:
            return self
        fields = _OF_KINDS[self.variant].model_fields if self.variant in _OF_KINDS else {}
        return super(LoraConfig, self.replace(**{n: field.default for n, field in fields.items()})).of_variant(variant)

    def without_virtual_tokens(self) -> LoraConfig:
        """Return the settings of the adapter without its virtual tokens."""
        kept = self.model_fields_set - {"prompt", *VirtualTokenSettings.model_fields}
        kept -= {"variant"} if self.variant in VIRTUAL else set()
        return LoraConfig(**{name: getattr(self, name) for name in kept})

    def virtual_tokens_alone(self, kind: VirtualKind) -> LoraConfig:
        """Return the settings of the adapter's virtual tokens, which are of this kind, as an adapter of their own."""
        kept = self.model_fields_set & {"task", "base", "revision", *VirtualTokenSettings.model_fields}
        return LoraConfig(**{name: getattr(self, name) for name in kept} | {"variant": kind})


@cache
def live_kinds() -> tuple[str, ...]:
    """List the kinds of update that can be attached to a live model: the files of layers/updates/ (not imported)."""
    files = (Path(__file__).parent.parent / "layers" / "updates").glob("*.py")
    return tuple(sorted(file.stem for file in files if file.stem not in ("__init__", "update")))


@cache
def variants() -> tuple[str, ...]:
    """List the kinds of update of a module that `variant` may name: all but the form that LoRA has on experts, which
    such a layer chooses, and virtual tokens, which are in front of the whole model.
    """
    return tuple(kind for kind in live_kinds() if kind not in (EXPERTS, *VIRTUAL))


def scale_of(alpha: float, rank: int, rslora: bool) -> float:
    """Return the scale of B A: alpha / rank, or alpha / √rank with `rslora`."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank
