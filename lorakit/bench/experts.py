"""Time LoRA on the experts of a mixture of experts against PEFT's `target_parameters`, and against the frozen base.

Both adapt the attention's four linears and the experts' two weights, at the same rank. PEFT adds every expert's ΔW to a
copy of the experts in each forward; lorakit multiplies the tokens that are routed to an expert by its factors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import lorakit as lk

from .measure import in_turn, kept_bytes
from .suite import need

TITLE = (
    "LoRA on a mixture of experts (Mixtral's layout, float32, two layers, each token to 2 experts), rank 4 on "
    "attention and experts:\n"
    "one token without gradients, and a training step; over PEFT below 1 is faster"
)
RANK = 4
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def run(quick: bool = False) -> list[dict[str, Any]]:
    """Return a row for each number of experts, width and number of tokens."""
    sizes = [(8, 256, 1), (8, 256, 16)]
    if not quick:
        sizes += [(8, 256, 256), (8, 1024, 1), (8, 1024, 16), (64, 256, 1), (64, 256, 256)]
    return [measure(experts, hidden, tokens, 5 if quick else 15) for experts, hidden, tokens in sizes]


def mixtral(experts: int, hidden: int) -> nn.Module:
    """Return a Mixtral of two layers, with random weights. Each expert is twice as wide inside as the model."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=experts,
        num_experts_per_tok=2,
    )
    return MixtralForCausalLM(config)


def measure(experts: int, hidden: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Measure one row. A single token is decoded without gradients; more are a training step."""
    need("peft")
    from peft import LoraConfig, get_peft_model

    ours, base = mixtral(experts, hidden), mixtral(experts, hidden).requires_grad_(False)
    lk.attach(ours, lk.LoraConfig(rank=RANK, alpha=2 * RANK))
    peft_config = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=ATTENTION,
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    theirs = get_peft_model(mixtral(experts, hidden), peft_config)
    ids = torch.randint(2, 512, (1, tokens), generator=torch.Generator().manual_seed(0))
    sides = {"lorakit": ours, "PEFT": theirs, "base": base}
    if tokens == 1:
        calls = {name: _decode(model.eval(), ids) for name, model in sides.items()}
    else:
        calls = {name: _step(model.train(), ids) for name, model in sides.items()}
    ms = {name: 1e3 * s for name, s in in_turn(calls, rounds).items()}
    row: dict[str, Any] = {
        "experts": experts,
        "width": hidden,
        "tokens": tokens,
        "measured": "one token" if tokens == 1 else "a step",
        "lorakit ms": round(ms["lorakit"], 2),
        "PEFT ms": round(ms["PEFT"], 2),
        "frozen base ms": round(ms["base"], 2),
        "over PEFT": round(ms["lorakit"] / ms["PEFT"], 2),
    }
    kept = [None if tokens == 1 else round(kept_bytes(m, partial(_loss, m, ids)) / 1e6, 2) for m in (ours, theirs)]
    return row | {"kept MB": kept[0], "PEFT kept MB": kept[1]}


def _decode(model: nn.Module, ids: Tensor) -> Callable[[], object]:
    def run() -> Tensor:
        with torch.no_grad():
            out: Tensor = model(input_ids=ids, use_cache=False).logits
            return out

    return run


def _loss(model: nn.Module, ids: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def _step(model: nn.Module, ids: Tensor) -> Callable[[], object]:
    """Forward, backward and AdamW; of a frozen base, forward and the backward down to the embedded tokens."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        embedded = model.get_input_embeddings()(ids)  # type: ignore[operator]

        def base() -> None:
            x = embedded.detach().requires_grad_()
            model(inputs_embeds=x, labels=ids, use_cache=False).loss.backward()

        return base
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step() -> None:
        _loss(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
