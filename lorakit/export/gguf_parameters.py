"""A model's hyper-parameters as GGUF's pairs, from its transformers config; and the one tensor that is made of them, `rope_freqs`.

rope: type default; linear and yarn (`rope.scaling.*`); llama3 (Llama 3.1), whose frequencies are divided by `rope_freqs.weight`:

    wavelength λ = 2π / f     1 where λ < L/high, factor where λ > L/low, else 1 / ((1 - t) / factor + t),
    t = (L/λ - low) / (high - low)     L: original_max_position_embeddings

What a config asks of an architecture that llama.cpp computes otherwise (another activation, partial rotation) is an error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import LorakitError

# model_type -> what its config must say, where llama.cpp has one way only
_ONLY: dict[str, dict[str, tuple[Any, ...]]] = {
    "llama": {"hidden_act": ("silu", "swish")},
    "mistral": {"hidden_act": ("silu", "swish")},
    "qwen2": {"hidden_act": ("silu", "swish")},
    "qwen3": {"hidden_act": ("silu", "swish"), "attention_bias": (False,)},
    # transformers 5 computes with hidden_act alone (and takes "gelu" for the other); older ones with hidden_activation, where it is there.
    "gemma": {
        "hidden_act": ("gelu_pytorch_tanh", "gelu_new"), "hidden_activation": ("gelu_pytorch_tanh", "gelu_new", None),
        "attention_bias": (False,),
    },
    "gpt2": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
    },
}  # fmt: skip
SUPPORTED = tuple(_ONLY)


@dataclass(frozen=True)
class Parameters:
    """`pairs`: by their keys without the architecture before them."""

    pairs: dict[str, Any]
    rope_freqs: Tensor | None = None
    warnings: list[str] = field(default_factory=list)


def parameters(config: Any) -> Parameters:
    """Of a transformers config. LorakitError for a model that llama.cpp would not compute as transformers does."""
    kind = config.model_type
    check_supported(kind)
    for key, allowed in _ONLY[kind].items():
        if getattr(config, key, allowed[0]) not in allowed:
            raise LorakitError(
                f"the base's {key} is {getattr(config, key)!r}; llama.cpp computes a {kind} with {' or '.join(map(repr, allowed))} only"
            )
    width, heads, layers = config.hidden_size, config.num_attention_heads, config.num_hidden_layers
    pairs: dict[str, Any] = {
        "vocab_size": config.vocab_size, "context_length": config.max_position_embeddings, "embedding_length": width,
        "block_count": layers, "attention.head_count": heads,
    }  # fmt: skip
    if kind == "gpt2":
        pairs |= {"feed_forward_length": config.n_inner or 4 * width, "attention.layer_norm_epsilon": float(config.layer_norm_epsilon)}
        return Parameters(pairs)
    dim = getattr(config, "head_dim", None) or width // heads
    rope, freqs = _rope(config, dim)
    pairs |= {
        "feed_forward_length": config.intermediate_size,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", None) or heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": dim, "attention.value_length": dim, "rope.dimension_count": dim,
    }  # fmt: skip
    return Parameters(pairs | rope, freqs, _window(config))


def check_supported(kind: Any) -> None:
    if kind not in SUPPORTED:
        raise LorakitError(
            f"a whole model as GGUF is written of {', '.join(SUPPORTED)}; the base is a {kind}\n"
            "  lorakit merge writes a transformers folder, which llama.cpp's own converter (convert_hf_to_gguf.py) may take"
        )


def _rope(config: Any, dim: int) -> tuple[dict[str, Any], Tensor | None]:
    rope = dict(config.rope_parameters or {})
    kind = rope.get("rope_type", "default")
    theta = float(rope.get("rope_theta", 10_000.0))
    if float(rope.get("partial_rotary_factor") or 1.0) != 1.0:
        raise LorakitError(
            "the base rotates a part of each head only (partial_rotary_factor), which llama.cpp does not for this architecture"
        )
    pairs: dict[str, Any] = {"rope.freq_base": theta}
    if kind == "default":
        return pairs, None
    if kind == "llama3":
        return pairs, llama3_factors(rope, theta, dim)
    if kind == "linear":
        return pairs | {"rope.scaling.type": "linear", "rope.scaling.factor": _number(rope, "factor")}, None
    usual = {"beta_fast": 32, "beta_slow": 1, "attention_factor": None, "mscale": None, "mscale_all_dim": None, "truncate": True}
    odd = [k for k, v in usual.items() if rope.get(k) not in (None, v)]
    if kind == "yarn" and not odd:
        original = int(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
        return pairs | {
            "rope.scaling.type": "yarn", "rope.scaling.factor": _number(rope, "factor"), "rope.scaling.original_context_length": original,
        }, None  # fmt: skip
    raise LorakitError(
        f"the base's rope_type is '{kind}'{f' with {odd[0]} = {rope[odd[0]]!r}' if odd else ''}; written are default, linear, llama3, and yarn with its usual settings"
    )


def llama3_factors(rope: dict[str, Any], theta: float, dim: int) -> Tensor:
    """What llama.cpp divides each frequency by. [dim / 2]"""
    factor, low, high = (_number(rope, k) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    length = _number(rope, "original_max_position_embeddings")
    made = []
    for i in range(0, dim, 2):
        wave = 2 * math.pi * theta ** (i / dim)
        if wave < length / high:
            made.append(1.0)
        elif wave > length / low:
            made.append(factor)
        else:
            t = (length / wave - low) / (high - low)
            made.append(1 / ((1 - t) / factor + t))
    return torch.tensor(made, dtype=torch.float32)


def _number(rope: dict[str, Any], key: str) -> float:
    value = rope.get(key)
    if not isinstance(value, int | float) or not value > 0:
        raise LorakitError(f"the base's rotary scaling ({rope.get('rope_type')}) has {key} = {value!r}; expected a positive number")
    return float(value)


def _window(config: Any) -> list[str]:
    """A warning for attention within a window, which llama.cpp does not have for these architectures."""
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False or not window or window >= config.max_position_embeddings:
        return []
    return [f"the base attends to the last {window:,} tokens only, llama.cpp to all: texts up to that length come out the same"]
