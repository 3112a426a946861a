"""Time LoHa, LoKr, VeRA and adapted attention against LoRA's step and PEFT's, and count what each keeps.

    step        forward and backward of one linear (or one nn.MultiheadAttention), with gradients of factors and input
    one token   forward of one token in eval mode, without gradients

PEFT forms ΔW of a LoKr in each forward; lorakit applies W1 ⊗ W2 without it. VeRA has the matrices of a LoRA of its
rank, 256 as in PEFT. All sides have the same factors' shapes and are interleaved.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import lorakit as lk

from .measure import PRECISIONS, in_turn, kept_bytes
from .suite import Row, need

TITLE = (
    "LoHa, LoKr, VeRA, and LoRA of an nn.MultiheadAttention, lorakit's and PEFT's: milliseconds of a training step "
    "(forward and\nbackward) and of one token in eval mode, ratios, and MB that autograd keeps for backward; lorakit's "
    "LoRA of rank 16 beside them."
)
RANK, VERA_RANK = 16, 256


class Attended(nn.Module):
    """An attention of torch's own kind over one sequence."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, max(1, width // 64), batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attn(x[None], x[None], x[None], need_weights=False)[0][0]
        return y


def run(quick: bool = False, precisions: Sequence[torch.dtype] = PRECISIONS) -> list[Row]:
    """Return the rows of each precision and kind."""
    need("peft")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    width, tokens, rounds = (64, 16, 2) if quick else (1024, 256, 25)
    rows = []
    for dtype in precisions:
        torch.manual_seed(0)
        linear = nn.Sequential(nn.Linear(width, width)).to(device, dtype).requires_grad_(False)
        attention = Attended(width).to(device, dtype).requires_grad_(False)
        x = torch.randn(tokens, width, device=device).to(dtype)
        for kind in ("loha", "lokr", "vera", "attention"):
            base: nn.Module = attention if kind == "attention" else linear
            rows.append({"dtype": str(dtype)[6:], "kind": kind} | _row(kind, base, x, rounds))
    return rows


def _row(kind: str, base: nn.Module, x: Tensor, rounds: int) -> Row:
    targets = ["attn"] if kind == "attention" else ["0"]
    ours = {"rank": VERA_RANK if kind == "vera" else RANK, "variant": "lora" if kind == "attention" else kind}
    models = {
        "lorakit": lk.attach(copy.deepcopy(base), lk.LoraConfig(targets=targets, **ours)),
        "PEFT": _in_peft(kind, copy.deepcopy(base), targets),
        "LoRA": lk.attach(copy.deepcopy(base), lk.LoraConfig(targets=targets, rank=RANK)),
        "base": copy.deepcopy(base),
    }
    with torch.no_grad():
        for model in models.values():
            torch.manual_seed(1)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.01)
    wide = x.clone().requires_grad_()
    row: Row = {}
    steps = in_turn({name: _step(model.train(), wide) for name, model in models.items()}, rounds)
    tokens = in_turn({name: _one_token(model.eval(), x[:1]) for name, model in models.items()}, rounds)
    for what, seconds in (("step", steps), ("one token", tokens)):
        row |= {f"{what}, {name} ms": value * 1e3 for name, value in seconds.items()}
        row[f"{what}, lorakit / PEFT"] = seconds["lorakit"] / seconds["PEFT"]
    for name in ("lorakit", "PEFT"):
        model = models[name].train()
        row[f"{name} kept MB"] = kept_bytes(model, partial(model, wide)) / 1e6
    return row


def _in_peft(kind: str, base: nn.Module, targets: list[str]) -> Any:
    import peft

    config: Any = {
        "loha": lambda: peft.LoHaConfig(r=RANK, alpha=32, target_modules=targets),
        "lokr": lambda: peft.LoKrConfig(r=RANK, alpha=32, target_modules=targets),
        "vera": lambda: peft.VeraConfig(r=VERA_RANK, target_modules=targets),
        "attention": lambda: peft.LoraConfig(r=RANK, lora_alpha=32, target_modules=targets),
    }[kind]()
    return peft.get_peft_model(base, config)  # type: ignore[arg-type]


def _step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    def once() -> None:
        model(x).square().mean().backward()
        x.grad = None
        model.zero_grad()

    return once


def _one_token(model: nn.Module, x: Tensor, times: int = 10) -> Callable[[], None]:
    def once() -> None:
        with torch.no_grad():
            for _ in range(times):
                model(x)

    return once
