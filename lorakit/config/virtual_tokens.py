"""Settings of virtual tokens: trained vectors in front of each row, alone or beside LoRA.

prefix     trained keys and values in front of each layer's own (Li & Liang 2021)
prompt     trained input embeddings in front of the tokens' own (Lester et al. 2021)
p_tuning   the same, computed by a small network, the encoder (Liu et al. 2021)
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from .strict import Strict

VirtualKind = Literal["prefix", "prompt", "p_tuning"]
VIRTUAL: tuple[VirtualKind, ...] = ("prefix", "prompt", "p_tuning")
_ENCODERS = {"prefix": ("none", "mlp"), "prompt": ("none",), "p_tuning": ("mlp", "lstm")}  # the default first


class VirtualTokenSettings(Strict):
    virtual_tokens: int = Field(20, ge=1, le=65536, description="virtual tokens: how many are in front of each row")
    prompt_encoder: Literal["auto", "none", "mlp", "lstm"] = Field(
        "auto",
        description="virtual tokens: the network that computes them in training. prefix: none or mlp; p_tuning: mlp or "
        "lstm; prompt: none (auto: the first)",
    )
    encoder_size: int | None = Field(
        None, ge=1, description="virtual tokens: hidden size of their encoder (default: the model's)"
    )
    encoder_layers: int = Field(2, ge=1, description="virtual tokens: layers of an lstm encoder")
    encoder_dropout: float = Field(
        0.0, ge=0, lt=1, description="virtual tokens: dropout between the layers of an lstm encoder, in training"
    )
    prompt_start: Literal["vocabulary", "random"] = Field(
        "vocabulary", description="virtual tokens: start from random tokens of the vocabulary, or normal noise"
    )
    prompt_text: str | list[int] | None = Field(
        None, description="virtual tokens: start from the tokens of this text, repeated or cut to virtual_tokens"
    )

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        kind = virtual_kind(self)
        if kind is not None and self.prompt_encoder not in ("auto", *_ENCODERS[kind]):
            raise ValueError(
                f"prompt_encoder='{self.prompt_encoder}' is none of {kind}'s, which has {' or '.join(_ENCODERS[kind])}"
            )
        encoder = "none" if kind is None else encoder_of(kind, self)
        if kind is not None and encoder == "none" and self.encoder_size is not None:
            raise ValueError("encoder_size is the hidden size of an encoder, and prompt_encoder is none")
        for name in ("encoder_layers", "encoder_dropout"):
            default = type(self).model_fields[name].default
            if kind is not None and encoder != "lstm" and getattr(self, name) != default:
                raise ValueError(f"{name} has an effect with prompt_encoder='lstm' only; remove it, or give that")
        starts = [name for name in ("prompt_text", "prompt_start") if getattr(self, name) not in (None, "vocabulary")]
        if kind is not None and encoder != "none" and starts:
            raise ValueError(
                f"{starts[0]} is the start of virtual tokens without an encoder, and prompt_encoder is {encoder}; "
                "remove it"
            )
        if len(starts) > 1:
            raise ValueError("prompt_text and prompt_start are both a start; give one of them")
        if self.prompt_text is not None and len(self.prompt_text) == 0:
            raise ValueError("prompt_text is empty; expected at least one token")
        return self


def virtual_kind(config: object) -> VirtualKind | None:
    """Return the kind of an adapter's virtual tokens; None if it has none.

    `config`: a LoraConfig, or a run's config: the kind is its method, its variant, or its `prompt` (beside LoRA).
    """
    for name in ("prompt", "variant", "method"):
        value = getattr(config, name, None)
        if value in VIRTUAL:
            return value
    return None


def encoder_of(kind: VirtualKind, config: VirtualTokenSettings) -> str:
    """Return the network that computes virtual tokens of this kind in training: "none", "mlp" or "lstm"."""
    return _ENCODERS[kind][0] if config.prompt_encoder == "auto" else config.prompt_encoder
