"""Time DoRA against LoRA, lorakit's and PEFT's (Liu et al. 2024), and count what each keeps.

    step        forward and backward of one linear, or of a Llama, with gradients of the factors and of the input
    one token   forward of one token in eval mode without gradients; PEFT's also with its cache (`peft.helpers`)
    merge       bytes that undo a merge of the linear; PEFT keeps none, and restores the weight but for rounding

DoRA needs the norms of W + s B A. PEFT forms that sum in each forward; lorakit computes the norms by factoring
(`ops.row_norms`), and once for all tokens if nothing changes. All sides have the same rank and are interleaved.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import lorakit as lk

from .measure import PRECISIONS, in_turn, kept_bytes, training_step
from .suite import Row, need

TITLE = (
    "DoRA against LoRA, lorakit's and PEFT's, rank 16 (Liu et al. 2024): milliseconds of a training step (forward and "
    "backward) and of\n"
    "one token in eval mode; ratios; MB that autograd keeps for backward, and KB that undo a merge. The base is the "
    "same without adapters."
)
RANK = 16
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA, DORA, PEFT_LORA, PEFT_DORA, PEFT_CACHED = "LoRA", "DoRA", "PEFT LoRA", "PEFT DoRA", "PEFT DoRA, cached"


def linear(width: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Return a frozen linear in a Sequential."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, width)).to(device, dtype).requires_grad_(False)


def llama(width: int, layers: int, dtype: torch.dtype, device: torch.device) -> Any:
    """Return a frozen Llama with random weights."""
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
    )
    model: Any = LlamaModel(config)
    return model.to(device, dtype).requires_grad_(False)


def sides(base: nn.Module, targets: list[str] | str) -> dict[str, Any]:
    """Return a copy of the base with each adapter, of nonzero factors, and the base itself."""
    import peft

    models: dict[str, Any] = {"base": base}
    for variant in ("lora", "dora"):
        ours = lk.attach(copy.deepcopy(base), lk.LoraConfig(variant=variant, rank=RANK, targets=targets))
        config = peft.LoraConfig(r=RANK, lora_alpha=32, target_modules=targets, use_dora=variant == "dora")
        theirs: Any = peft.get_peft_model(copy.deepcopy(base), config)  # type: ignore[arg-type]
        models[LORA if variant == "lora" else DORA] = ours
        models[PEFT_LORA if variant == "lora" else PEFT_DORA] = theirs
    with torch.no_grad():
        for model in models.values():
            torch.manual_seed(1)
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "magnitude" not in name:
                    parameter.normal_(std=0.01)
    return models


def run(quick: bool = False, precisions: Sequence[torch.dtype] = PRECISIONS) -> list[Row]:
    """Return the rows of each precision."""
    need("peft")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    width, tokens, rounds = (64, 16, 2) if quick else (1024, 256, 25)
    rows = []
    for dtype in precisions:
        models = sides(linear(width, dtype, device), ["0"])
        x = torch.randn(tokens, width, device=device).to(dtype).requires_grad_()
        shape = {"dtype": str(dtype)[6:], "model": f"linear {width} x {width}"}
        rows.append(shape | {"what": f"step of {tokens}"} | _step(models, _output(x), rounds))
        rows.append(shape | {"what": "one token"} | _one_token(models, x[:1].detach(), rounds))
        rows.append(shape | {"what": "merge"} | _undo(models))
        size, layers = (64, 1) if quick else (512, 3)
        models = sides(llama(size, layers, dtype, device), PROJECTIONS)
        ids = torch.randint(0, 256, (2, tokens), device=device)
        shape = {"dtype": str(dtype)[6:], "model": f"Llama {layers} x {size}"}
        forward = _last_hidden(ids)
        rows.append(shape | {"what": f"step of 2 x {tokens}"} | _step(models, forward, max(2, rounds // 3)))
    return rows


def _output(x: Tensor) -> Callable[[Any], Tensor]:
    return lambda model: model(x)


def _last_hidden(ids: Tensor) -> Callable[[Any], Tensor]:
    return lambda model: model(ids, use_cache=False).last_hidden_state


def _step(models: Mapping[str, Any], forward: Callable[[Any], Tensor], rounds: int) -> Row:
    for model in models.values():
        model.train()
    row = _ratios(in_turn({name: training_step(model, forward) for name, model in models.items()}, rounds))
    for name, model in models.items():
        if name != "base":
            row[f"{name} kept MB"] = kept_bytes(model, partial(forward, model)) / 1e6
    return row


def _one_token(models: Mapping[str, Any], x: Tensor, rounds: int, times: int = 20) -> Row:
    from peft.helpers import DoraCaching

    def decode(model: Any, cached: bool = False) -> Callable[[], None]:
        def run_once() -> None:
            with torch.no_grad(), DoraCaching() if cached else nullcontext():
                for _ in range(times):
                    model(x)

        return run_once

    for model in models.values():
        model.eval()
    timed = {name: decode(model) for name, model in models.items()}
    timed[PEFT_CACHED] = decode(models[PEFT_DORA], cached=True)
    return _ratios({name: seconds / times for name, seconds in in_turn(timed, rounds).items()})


def _undo(models: Mapping[str, Any]) -> Row:
    row: Row = {}
    for name in (LORA, DORA):
        lk.merge(models[name])
        row[f"{name} undo KB"] = models[name][0].lora_merged.nbytes() / 1e3
        lk.unmerge(models[name])
    return row | {"DoRA / LoRA": row[f"{DORA} undo KB"] / row[f"{LORA} undo KB"]}


def _ratios(seconds: Mapping[str, float]) -> Row:
    row: Row = {f"{name} ms": value * 1e3 for name, value in seconds.items()}
    row["DoRA / LoRA"] = seconds[DORA] / seconds[LORA]
    row["PEFT DoRA / LoRA"] = seconds[PEFT_DORA] / seconds[LORA]
    row["DoRA / PEFT DoRA"] = seconds[DORA] / seconds[PEFT_DORA]
    return row
