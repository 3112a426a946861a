"""Convert a transformers config to GGUF key-value pairs, and to the tensor `rope_freqs` for Llama 3.1.

rope types: default; linear and yarn (`rope.scaling.*`); llama3 (Llama 3.1), whose frequencies f are divided by
`rope_freqs.weight`:

    wavelength λ = 2π / f     1 where λ < L/high, factor where λ > L/low, otherwise 1 / ((1 - t) / factor + t),
    t = (L/λ - low) / (high - low)     L: original_max_position_embeddings

A config that llama.cpp would compute differently (another activation, partial rotation) is an error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import LorakitError

# model_type -> the config values that llama.cpp supports, where it supports only some
_ONLY: dict[str, dict[str, tuple[Any, ...]]] = {
    "llama": {"hidden_act": ("silu", "swish")},
    "mistral": {"hidden_act": ("silu", "swish")},
    "qwen2": {"hidden_act": ("silu", "swish")},
    "qwen3": {"hidden_act": ("silu", "swish"), "attention_bias": (False,)},
    # transformers 5 uses only hidden_act (and reads "gelu" as gelu_pytorch_tanh); older releases use hidden_activation
    # if present.
    "gemma": {
        "hidden_act": ("gelu_pytorch_tanh", "gelu_new"),
        "hidden_activation": ("gelu_pytorch_tanh", "gelu_new", None),
        "attention_bias": (False,),
    },
    "gpt2": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
}
SUPPORTED = tuple(_ONLY)


@dataclass(frozen=True)
class Parameters:
    """`pairs`: keyed without the architecture prefix. `rope_freqs`: [head_dim / 2], for Llama 3.1 only."""

    pairs: dict[str, Any]
    rope_freqs: Tensor | None = None
    warnings: list[str] = field(default_factory=list)


def parameters(config: Any) -> Parameters:
    """Read the parameters of a transformers config. Raises LorakitError for a model that llama.cpp would compute
    differently.
    """
    kind = config.model_type
    check_supported(kind)
    for key, allowed in _ONLY[kind].items():
        if getattr(config, key, allowed[0]) not in allowed:
            raise LorakitError(
                f"the base's {key} is {getattr(config, key)!r}; llama.cpp computes a {kind} only with "
                f"{' or '.join(map(repr, allowed))}"
            )
    width, heads, layers = config.hidden_size, config.num_attention_heads, config.num_hidden_layers
    pairs: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": width,
        "block_count": layers,
        "attention.head_count": heads,
    }
    if kind == "gpt2":
        pairs |= {
            "feed_forward_length": config.n_inner or 4 * width,
            "attention.layer_norm_epsilon": float(config.layer_norm_epsilon),
        }
        return Parameters(pairs)
    dim = getattr(config, "head_dim", None) or width // heads
    rope, freqs = _rope(config, dim)
    pairs |= {
        "feed_forward_length": config.intermediate_size,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", None) or heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": dim,
        "attention.value_length": dim,
        "rope.dimension_count": dim,
    }
    return Parameters(pairs | rope, freqs, _window(config))


def check_supported(kind: Any) -> None:
    """Raise LorakitError if lorakit cannot write this model_type as a GGUF model."""
    if kind not in SUPPORTED:
        raise LorakitError(
            f"lorakit writes GGUF models of {', '.join(SUPPORTED)}; the base is a {kind}\n"
            "  lorakit merge writes a transformers folder, which llama.cpp's own converter (convert_hf_to_gguf.py) may "
            "support"
        )


def _rope(config: Any, dim: int) -> tuple[dict[str, Any], Tensor | None]:
    rope = dict(config.rope_parameters or {})
    kind = rope.get("rope_type", "default")
    theta = float(rope.get("rope_theta", 10_000.0))
    if float(rope.get("partial_rotary_factor") or 1.0) != 1.0:
        raise LorakitError(
            "the base rotates only part of each head (partial_rotary_factor), which llama.cpp does not support for "
            "this architecture"
        )
    pairs: dict[str, Any] = {"rope.freq_base": theta}
    if kind == "default":
        return pairs, None
    if kind == "llama3":
        return pairs, llama3_factors(rope, theta, dim)
    if kind == "linear":
        return pairs | {"rope.scaling.type": "linear", "rope.scaling.factor": _number(rope, "factor")}, None
    defaults = {
        "beta_fast": 32,
        "beta_slow": 1,
        "attention_factor": None,
        "mscale": None,
        "mscale_all_dim": None,
        "truncate": True,
    }
    unusual = [k for k, v in defaults.items() if rope.get(k) not in (None, v)]
    if kind == "yarn" and not unusual:
        original = int(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
        return pairs | {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": _number(rope, "factor"),
            "rope.scaling.original_context_length": original,
        }, None
    raise LorakitError(
        f"the base's rope_type is '{kind}'{f' with {unusual[0]} = {rope[unusual[0]]!r}' if unusual else ''}; "
        "expected default, linear, llama3, or yarn with its default settings"
    )


def llama3_factors(rope: dict[str, Any], theta: float, dim: int) -> Tensor:
    """Return the factors [dim / 2] by which llama.cpp divides the rotary frequencies.

    `theta`: their base; `dim`: the head size.
    """
    factor, low, high = (_number(rope, k) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    length = _number(rope, "original_max_position_embeddings")
    factors = []
    for i in range(0, dim, 2):
        wave = 2 * math.pi * theta ** (i / dim)
        if wave < length / high:
            factors.append(1.0)
        elif wave > length / low:
            factors.append(factor)
        else:
            t = (length / wave - low) / (high - low)
            factors.append(1 / ((1 - t) / factor + t))
    return torch.tensor(factors, dtype=torch.float32)


def _number(rope: dict[str, Any], key: str) -> float:
    value = rope.get(key)
    if not isinstance(value, int | float) or not value > 0:
        raise LorakitError(
            f"the base's rotary scaling ({rope.get('rope_type')}) has {key} = {value!r}; expected a positive number"
        )
    return float(value)


def _window(config: Any) -> list[str]:
    """Return a warning for sliding-window attention, which llama.cpp does not support for these architectures."""
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False or not window or window >= config.max_position_embeddings:
        return []
    return [f"the base attends only to the last {window:,} tokens, llama.cpp to all: results agree up to that length"]
