"""Tiny mixtures of experts in the three layouts that transformers has, with an adapter on their experts."""

from __future__ import annotations

import torch
from architectures import causal_lm
from torch import nn

import lorakit as lk

# Mixtral's layout with files of an expert each; the same with shared experts; transposed, interleaved and with biases.
LAYOUTS = ("mixtral", "qwen2_moe", "gpt_oss")


def moe(architecture: str = "mixtral") -> nn.Module:
    """A model in evaluation mode, whose experts differ and whose biases are not zero."""
    model = causal_lm(architecture)
    with torch.no_grad():
        for i, (name, parameter) in enumerate(model.named_parameters()):
            if "experts" in name:
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
                parameter.copy_(0.1 * noise)
    return model


def llama4() -> nn.Module:
    """A mixture of experts whose experts module is not of transformers' experts interface."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    torch.manual_seed(0)
    config = Llama4TextConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=16,
        intermediate_size_mlp=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        pad_token_id=0,
    )
    return Llama4ForCausalLM(config).eval()


def ids(rows: int = 3, length: int = 11) -> torch.Tensor:
    return torch.randint(1, 60, (rows, length), generator=torch.Generator().manual_seed(5))


def randomise(model: nn.Module, name: str = "default", seed: int = 1, size: float = 0.2) -> nn.Module:
    """Give an attached adapter values that change the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for full, parameter in model.named_parameters():
            if f".lora_{name}." in full:
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return model


def adapted(architecture: str = "mixtral", **settings) -> nn.Module:
    """A model with a trained-like adapter of rank 3 on all linears and experts."""
    config = lk.LoraConfig(**{"rank": 3, "alpha": 6.0} | settings)
    return randomise(lk.attach(moe(architecture), config))


def logits(model: nn.Module, batch: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(ids() if batch is None else batch).logits


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to 1e-6 of the largest element: float32's rounding is half of that."""
    torch.testing.assert_close(found, expected, atol=1e-6 * max(1.0, float(expected.detach().abs().max())), rtol=0)
