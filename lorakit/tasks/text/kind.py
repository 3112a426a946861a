"""Tell decoder-only models from encoder-decoders, by their config, before any weights are loaded."""

from __future__ import annotations

from typing import Any

from ...errors import TrainError


def check_decoder_only(name: str, base: Any) -> None:
    """Raise TrainError for an encoder-decoder, which the task causal_lm cannot train."""
    if base.is_encoder_decoder:
        other = "--task seq2seq" if writes_from_source(base) else "another task"
        raise TrainError(
            f"{name} is an encoder-decoder ({type(base).__name__}); the task causal_lm needs a decoder-only model\n"
            f"  use {other}, or choose another base (--model)"
        )


def check_encoder_decoder(name: str, base: Any) -> None:
    """Raise TrainError for a base that the task seq2seq cannot train."""
    if not writes_from_source(base):
        kind = "not an encoder-decoder of texts" if base.is_encoder_decoder else "no encoder-decoder"
        raise TrainError(
            f"{name} is {kind} ({type(base).__name__}); the task seq2seq needs one, such as T5 or BART\n"
            "  a decoder-only model learns such rows with --task causal_lm (--columns prompt=source,completion=target)"
        )


def writes_from_source(base: Any) -> bool:
    """Whether transformers loads it as AutoModelForSeq2SeqLM."""
    from transformers import AutoModelForSeq2SeqLM

    own_code = "AutoModelForSeq2SeqLM" in (getattr(base, "auto_map", None) or {})
    return bool(base.is_encoder_decoder) and (own_code or type(base) in AutoModelForSeq2SeqLM._model_mapping)
