"""A decode step whose rows use different adapters: lorakit's `route` against PEFT's `adapter_names`.

32 rows of one token each; 1, 8 or 32 adapters of unequal ranks on all seven linears, four rows on the base, no two neighbouring
rows alike. Both sides have the same weights and factors, and have to agree. `route` is entered anew at every step, as a server does.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

import lorakit as lk

from .measure import in_turn
from .train_step import PROJECTIONS, Shape, llama

TITLE = (
    "A decode step of 32 rows with 1, 8 and 32 adapters of unequal ranks (4 to 64), four rows on the base. 'overhead': the step's time\n"
    "less that of the base alone; 'over PEFT': lorakit's overhead over that of PEFT's adapter_names."
)
ROWS = 32
RANKS = (16, 4, 64, 8, 32, 8, 16, 48)


def run(quick: bool = False) -> list[dict[str, Any]]:
    shapes = [Shape(layers=2)] if quick else [Shape(), Shape(hidden=2048, layers=2, ffn=5632)]
    return [
        row
        for shape in shapes
        for dtype in (torch.float32, torch.bfloat16)
        for row in measure(shape, dtype, (1, 8) if quick else (1, 8, 32), rounds=5 if quick else 21)
    ]


def measure(shape: Shape, dtype: torch.dtype, counts: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    """One row of the table for each number of adapters."""
    names = [f"adapter{i}" for i in range(max(counts))]
    base, ours, theirs = llama(shape, dtype).eval(), lorakit_side(shape, dtype, names), peft_side(shape, dtype, names)
    copy_factors(theirs, ours)
    ids = torch.randint(2, shape.vocabulary, (ROWS, 1), device=next(base.parameters()).device)
    rows = []
    for count in counts:
        choices = choices_for(names[:count])
        asked = [name or "__base__" for name in choices]

        def routed(choices: list[str | None] = choices) -> Tensor:
            with lk.route(ours, choices):
                return ours(input_ids=ids, use_cache=False).logits

        def peft(asked: list[str] = asked) -> Tensor:
            return theirs(input_ids=ids, adapter_names=asked, use_cache=False).logits

        with torch.inference_mode():
            apart = (routed() - peft()).abs().max().item() / peft().abs().max().item()
            seconds = in_turn({"base": lambda: base(input_ids=ids, use_cache=False), "lorakit": routed, "PEFT": peft}, rounds)
        if apart > (0.1 if dtype == torch.bfloat16 else 1e-3):
            raise RuntimeError(f"lorakit and PEFT disagree by {apart:.2g} of the largest logit: this would compare two different things")
        over = {name: 1e3 * (seconds[name] - seconds["base"]) for name in ("lorakit", "PEFT")}
        rows.append(
            {
                "model": f"{shape.hidden} x {shape.layers}", "precision": str(dtype).removeprefix("torch."), "adapters": count,
                "base ms": round(1e3 * seconds["base"], 1), "overhead ms": round(over["lorakit"], 2),
                "PEFT's overhead ms": round(over["PEFT"], 2), "over PEFT": round(over["lorakit"] / over["PEFT"], 2),
            }
        )  # fmt: skip
    return rows


def choices_for(names: list[str]) -> list[str | None]:
    """A choice per row: every eighth row is the base's, the others take the adapters in turn."""
    turn = itertools.cycle(names)
    return [None if row % 8 == 3 else next(turn) for row in range(ROWS)]


def lorakit_side(shape: Shape, dtype: torch.dtype, names: list[str]) -> nn.Module:
    model = llama(shape, dtype)
    for name, rank in zip(names, itertools.cycle(RANKS)):
        lk.attach(model, lk.LoraConfig(rank=rank, targets=PROJECTIONS), name=name, trainable=False)
    return model.eval()


def peft_side(shape: Shape, dtype: torch.dtype, names: list[str]) -> nn.Module:
    import peft

    configs = [peft.LoraConfig(r=rank, lora_alpha=32, target_modules=PROJECTIONS) for _, rank in zip(names, itertools.cycle(RANKS))]
    model = peft.get_peft_model(llama(shape, dtype), configs[0], adapter_name=names[0], autocast_adapter_dtype=False)
    for name, config in zip(names[1:], configs[1:], strict=True):
        model.add_adapter(name, config, autocast_adapter_dtype=False)
    return model.eval()


def copy_factors(theirs: nn.Module, ours: nn.Module) -> None:
    """The same random factors on both sides, small enough that the logits stay of the base's size."""
    made = torch.Generator().manual_seed(1)
    mine = dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if ".lora_" in name:  # base_model.model.<module>.lora_A.<adapter>.weight
                module, side, adapter, _ = name.removeprefix("base_model.model.").rsplit(".", 3)
                parameter.copy_(torch.randn(parameter.shape, generator=made) * 0.02)
                mine[f"{module}.lora_{adapter}.{side[-1]}"].copy_(parameter)
