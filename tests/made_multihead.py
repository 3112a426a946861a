"""A model of two `nn.MultiheadAttention`, inputs and masks for it, and a config for adapters of both."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import lorakit as lk

DIM, HEADS = 8, 2


class Attended(nn.Module):
    """A self-attention and a cross-attention, as OpenCLIP's blocks and its pooling have them."""

    def __init__(self, batch_first: bool = True, **settings) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(DIM, HEADS, batch_first=batch_first, **settings)
        self.pool = nn.MultiheadAttention(DIM, HEADS, batch_first=batch_first)
        self.probe = nn.Parameter(torch.randn(1, 3, DIM))
        self.head = nn.Linear(DIM, 4)
        self.batch_first = batch_first

    def forward(self, x: Tensor, **masks) -> Tensor:
        """x: [rows, tokens, dim]"""
        probe = self.probe.expand(len(x), -1, -1)
        if not self.batch_first:
            x, probe = x.transpose(0, 1), probe.transpose(0, 1)
        x, shares = self.attn(x, x, x, **masks)
        y, _ = self.pool(probe, x, x, need_weights=False)
        y = y if self.batch_first else y.transpose(0, 1)
        return self.head(y) + (0 if shares is None else shares.square().sum())


def made(batch_first: bool = True, dtype: torch.dtype = torch.float32, **settings) -> Attended:
    torch.manual_seed(0)
    model = Attended(batch_first, **settings).to(dtype).eval()
    with torch.no_grad():  # torch starts the biases at zero
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_()
    return model


def given(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 5, DIM, generator=torch.Generator().manual_seed(1)).to(dtype)


def config(**settings) -> lk.LoraConfig:
    scale = {} if settings.get("variant") == "vera" else {"alpha": 6.0}  # VeRA has none
    return lk.LoraConfig(**{"rank": 2, "targets": ["attn", "pool"], **scale, **settings})


def randomise(model: nn.Module, name: str = "default", seed: int = 3, size: float = 0.5) -> nn.Module:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for full, p in model.named_parameters():
            if f".lora_{name}." in full:
                p.copy_(torch.randn(p.shape, generator=draw) * size)
    return model


def masks_of(kind: str, dtype: torch.dtype = torch.float32) -> dict:
    padding = torch.tensor([[False] * 5, [False] * 4 + [True], [False, False] + [True] * 3])
    causal = torch.triu(torch.full((5, 5), float("-inf"), dtype=dtype), diagonal=1)
    return {
        "no masks": {},
        "no weights": {"need_weights": False},
        "padding": {"key_padding_mask": padding},
        "causal": {"attn_mask": causal, "is_causal": True, "need_weights": False},
        "both": {"attn_mask": causal, "key_padding_mask": padding.to(dtype).masked_fill(padding, float("-inf"))},
        "a mask for each row": {"attn_mask": torch.randn(3 * HEADS, 5, 5, dtype=dtype), "average_attn_weights": False},
    }[kind]


MASKS = ["no masks", "no weights", "padding", "causal", "both", "a mask for each row"]
