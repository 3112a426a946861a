"""Time the starts of LoRA that are made from the weights, and training steps with their frozen pair, beside PEFT's.

    attach    of one linear: lorakit's and PEFT's, each on a copy of its own
    step      forward and backward of one linear, or of a Llama, with gradients of the factors and of the input

lorakit subtracts the start in the update, which has r more columns for it; PEFT subtracts it from the base.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import lorakit as lk

from .dora import linear, llama
from .measure import PRECISIONS, in_turn, kept_bytes, training_step
from .suite import Row, need

TITLE = (
    "Starts of LoRA made from the weights, lorakit's and PEFT's, rank 16: milliseconds to attach, and of a training "
    "step (forward\n"
    "and backward); ratios; MB that autograd keeps for backward. The base is the same without adapters."
)
RANK = 16
INITS = ("pissa", "olora")
LORA, OURS, THEIRS = "LoRA", "PiSSA", "PEFT PiSSA"
_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def ours(base: nn.Module, targets: list[str], init: Any) -> Any:
    """Return a copy of the base with an adapter of lorakit."""
    return lk.attach(copy.deepcopy(base), lk.LoraConfig(rank=RANK, targets=targets, init=init))


def theirs(base: nn.Module, targets: list[str], init: Any) -> Any:
    """Return a copy of the base with an adapter of PEFT."""
    import peft

    config = peft.LoraConfig(r=RANK, lora_alpha=32, target_modules=targets, init_lora_weights=init)
    wrapped: Any = peft.get_peft_model(copy.deepcopy(base), config)  # type: ignore[arg-type]
    return wrapped


def run(quick: bool = False, precisions: Sequence[torch.dtype] = PRECISIONS) -> list[Row]:
    """Return the rows of each precision."""
    need("peft")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    width, tokens, rounds = (64, 16, 2) if quick else (1024, 256, 25)
    rows = []
    for dtype in precisions:
        base = linear(width, dtype, device)
        shape = {"dtype": str(dtype)[6:], "model": f"linear {width} x {width}"}
        rows += [shape | {"what": f"attach, {init}"} | _attach(base, init, max(2, rounds // 5)) for init in INITS]
        x = torch.randn(tokens, width, device=device).to(dtype).requires_grad_()
        rows.append(shape | {"what": f"step of {tokens}"} | _step(base, ["0"], _called_with(x), rounds))
        size, layers = (64, 1) if quick else (512, 3)
        ids = torch.randint(0, 256, (2, tokens), device=device)
        shape = {"dtype": str(dtype)[6:], "model": f"Llama {layers} x {size}"}
        step = _step(llama(size, layers, dtype, device), _PROJECTIONS, _last_hidden(ids), max(2, rounds // 3))
        rows.append(shape | {"what": f"step of 2 x {tokens}"} | step)
    return rows


def _called_with(x: Tensor) -> Callable[[Any], Tensor]:
    return lambda model: model(x)


def _last_hidden(ids: Tensor) -> Callable[[Any], Tensor]:
    return lambda model: model(ids, use_cache=False).last_hidden_state


def _attach(base: nn.Module, init: str, rounds: int) -> Row:
    seconds = in_turn(
        {OURS: lambda: ours(base, ["0"], init), THEIRS: lambda: theirs(base, ["0"], init)}, rounds, warm=1
    )
    return {f"{name} ms": value * 1e3 for name, value in seconds.items()} | {
        f"{OURS} / {THEIRS}": seconds[OURS] / seconds[THEIRS]
    }


def _step(base: nn.Module, targets: list[str], forward: Callable[[Any], Tensor], rounds: int) -> Row:
    models: Mapping[str, Any] = {
        "base": base,
        LORA: ours(base, targets, "default"),
        OURS: ours(base, targets, "pissa"),
        THEIRS: theirs(base, targets, "pissa"),
    }

    for model in models.values():
        model.train()
    seconds = in_turn({name: training_step(model, forward) for name, model in models.items()}, rounds)
    row: Row = {f"{name} ms": value * 1e3 for name, value in seconds.items()}
    for name in (OURS, THEIRS):
        row[f"{name} kept MB"] = kept_bytes(models[name], partial(forward, models[name])) / 1e6
    return row | {
        f"{OURS} / {LORA}": seconds[OURS] / seconds[LORA],
        f"{OURS} / {THEIRS}": seconds[OURS] / seconds[THEIRS],
    }
