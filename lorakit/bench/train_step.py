"""Time a training step of a Llama-shaped model with lorakit, PEFT, loralib and full fine-tuning, relative to a floor.

The floor is the frozen model's forward and its backward to the inputs, which every adapter method has to pay. All sides
run the same model with the Hugging Face loss over all positions, and rank 16 on all seven linears of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import lorakit as lk

from ..layers.fused.fused import report
from ..train.compile import no_compiler
from .measure import PRECISIONS, in_turn, kept_bytes

TITLE = (
    "A training step (forward and backward, Hugging Face loss) of a Llama-shaped model with rank 16 on all seven "
    "linears of each layer.\n"
    "'over floor': time over the frozen model's forward and backward to its inputs. 'over PEFT': time, or bytes kept "
    "for backward, over\n"
    "PEFT's with adapters in the base's dtype, its faster setting."
)
RANK = 16
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Shape:
    """The shape of the Llama, and of its batch: rows of `length` tokens."""

    hidden: int = 512
    layers: int = 8
    ffn: int = 1408
    vocabulary: int = 8192
    rows: int = 4
    length: int = 256


def llama(shape: Shape, dtype: torch.dtype) -> Any:
    """Return a frozen Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=max(1, shape.hidden // 64),
        num_key_value_heads=max(1, shape.hidden // 64),
        max_position_embeddings=4096,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = LlamaForCausalLM(config)
    return model.to(device, dtype).train().requires_grad_(False)


def lorakit_side(shape: Shape, dtype: torch.dtype, dropout: float) -> nn.Module:
    """Return the model with lorakit's LoRA."""
    return lk.attach(llama(shape, dtype), lk.LoraConfig(rank=RANK, dropout=dropout))


def peft_side(shape: Shape, dtype: torch.dtype, dropout: float) -> nn.Module:
    """Return the model with PEFT's LoRA."""
    import peft

    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=dropout, target_modules=PROJECTIONS)
    return peft.get_peft_model(llama(shape, dtype), config, autocast_adapter_dtype=False)


def loralib_side(shape: Shape, dtype: torch.dtype, dropout: float) -> nn.Module:
    """Return the model with loralib's linears."""
    import loralib

    model = llama(shape, dtype)
    for name, module in list(model.named_modules()):
        if name.rsplit(".", 1)[-1] in PROJECTIONS:
            size_in, size_out = module.in_features, module.out_features
            layer = loralib.Linear(size_in, size_out, r=RANK, lora_alpha=2 * RANK, lora_dropout=dropout, bias=False)
            layer = layer.to(module.weight.device, dtype)
            layer.weight = module.weight
            model.set_submodule(name, layer)
    return model


def full_side(shape: Shape, dtype: torch.dtype, dropout: float) -> nn.Module:
    """Return the model with all weights trainable."""
    return llama(shape, dtype).requires_grad_(True)


def compiled(
    build: Callable[[Shape, torch.dtype, float], nn.Module],
) -> Callable[[Shape, torch.dtype, float], nn.Module]:
    """Wrap a side: compile its layers with inductor, as `lorakit train --compile` does."""

    def side(shape: Shape, dtype: torch.dtype, dropout: float) -> nn.Module:
        model = build(shape, dtype, dropout)
        for layer in next(m for m in model.modules() if isinstance(m, nn.ModuleList)):
            layer.compile(dynamic=True)
        return model

    return side


SIDES: dict[str, Callable[[Shape, torch.dtype, float], nn.Module]] = {
    "lorakit": lorakit_side,
    "PEFT": peft_side,
    "loralib": loralib_side,
    "full fine-tuning": full_side,
}
COMPILED: dict[str, Callable[[Shape, torch.dtype, float], nn.Module]] = {
    f"{name}, compiled": compiled(build)
    for name, build in {
        "floor": lambda shape, dtype, _: llama(shape, dtype),
        "lorakit": lorakit_side,
        "PEFT": peft_side,
    }.items()
}


def step(model: nn.Module, ids: Tensor) -> Callable[[], Tensor]:
    """Return a forward that gives the loss. For the floor, the embeddings require a gradient: backward reaches them."""
    trains = any(p.requires_grad for p in model.parameters())
    floor: Any = model  # transformers' model; PEFT's wrapper has the same methods
    embeddings = floor.get_input_embeddings()(ids).detach()

    def forward() -> Tensor:
        if trains:
            return model(input_ids=ids, labels=ids, use_cache=False).loss
        return model(inputs_embeds=embeddings.requires_grad_(), labels=ids, use_cache=False).loss

    return forward


def measure(
    shape: Shape, dtype: torch.dtype, dropout: float, names: list[str], rounds: int, draws: int = 1
) -> dict[str, tuple[float, int]]:
    """Return (seconds, bytes kept for backward) of the floor and of each side.

    draws: how many times the models are built anew. The median over draws is taken, as a model's placement in memory
    alone changes its time by a few percent.
    """
    results = [_draw(shape, dtype, dropout, names, rounds) for _ in range(draws)]
    return {name: (median(result[name][0] for result in results), results[0][name][1]) for name in results[0]}


def _draw(
    shape: Shape, dtype: torch.dtype, dropout: float, names: list[str], rounds: int
) -> dict[str, tuple[float, int]]:
    models = {"floor": llama(shape, dtype)} | {name: (SIDES | COMPILED)[name](shape, dtype, dropout) for name in names}
    ids = torch.randint(
        2, shape.vocabulary, (shape.rows, shape.length), device=next(models["floor"].parameters()).device
    )
    forwards = {name: step(model, ids) for name, model in models.items()}
    for forward in forwards.values():  # compiles the compiled sides
        forward()
    kept = {name: kept_bytes(models[name], forward) for name, forward in forwards.items()}

    def full_step(name: str) -> Callable[[], None]:
        def run() -> None:
            forwards[name]().backward()
            models[name].zero_grad()

        return run

    seconds = in_turn({name: full_step(name) for name in forwards}, rounds)
    return {name: (seconds[name], kept[name]) for name in forwards}


def run(quick: bool = False, precisions: Sequence[torch.dtype] = PRECISIONS) -> list[dict[str, Any]]:
    """Return a row for each precision, dropout and side."""
    shape = Shape(layers=2, length=128) if quick else Shape()
    rows = []
    for dtype, dropout in product(precisions, (0.0, 0.1)):
        names = ["lorakit", "PEFT"] if quick else [*SIDES, *(COMPILED if not dropout and no_compiler() is None else ())]
        results = measure(shape, dtype, dropout, names, *((3, 1) if quick else (5, 3)))
        floor, peft = results["floor"], results["PEFT"]
        fused = "; ".join(map(str, report(lorakit_side(shape, dtype, dropout))))
        for name, (seconds, kept) in results.items():
            rows.append(
                {
                    "precision": str(dtype).removeprefix("torch."),
                    "dropout": dropout,
                    "side": name,
                    "milliseconds": round(1e3 * seconds, 1),
                    "over floor": round(seconds / floor[0], 2),
                    "over PEFT": round(seconds / peft[0], 2),
                    "kept MB": round(kept / 1e6, 1),
                    "kept over PEFT": round(kept / peft[1], 2),
                    "fused": fused if name == "lorakit" else None,
                }
            )
    return rows


def plot(rows: list[dict[str, Any]], axes: Any) -> None:
    """Draw times over the floor as grouped bars."""
    settings = list(dict.fromkeys((row["precision"], row["dropout"]) for row in rows))
    sides = list(dict.fromkeys(row["side"] for row in rows))
    width = 0.8 / len(sides)
    for k, side in enumerate(sides):
        times = {(r["precision"], r["dropout"], r["side"]): r["over floor"] for r in rows}
        heights = [times[(*setting, side)] for setting in settings]
        bars = axes.bar([i + k * width for i in range(len(settings))], heights, width, label=side)
        axes.bar_label(bars, fmt="%.2f", fontsize=7)
    labels = [f"{precision}{f', dropout {d:g}' if d else ''}" for precision, d in settings]
    axes.set_xticks([i + 0.4 - width / 2 for i in range(len(settings))], labels)
    axes.set_ylabel("time of a step over the floor's")
    axes.legend(fontsize=8)
