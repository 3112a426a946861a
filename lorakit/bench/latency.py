"""Time one forward pass with an adapter, in the form of the LoRA paper's table 1 (Hu et al. 2021).

    base             the model alone
    LoRA, merged     ΔW added to the weights: the same computation as the base
    LoRA q,v         unmerged, rank 4 on the query and value parts of the packed projection (the paper's for GPT-2)
    LoRA all         unmerged, rank 16 on all linears (lorakit's default)
    adapter L        one bottleneck per layer, after the feed-forward block, with a layer norm (Lin et al. 2020)
    adapter H        two bottlenecks per layer, after attention and feed-forward (Houlsby et al. 2019)

A bottleneck is h + W_up gelu(W_down h) and has to wait for the block before it: with a batch of one, no other work
hides its latency. GPT-2 without its output projection, random weights, float32, no gradients; all sides interleaved.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorakit as lk

from .measure import in_turn
from .suite import Row

TITLE = (
    "One forward pass of a GPT-2 with random weights: milliseconds for the base, and the time that each adapter adds, "
    "in percent of\n"
    "that. Merged LoRA runs the base's own computation, so its column shows the noise. Bottlenecks have the paper's "
    "share of the\n"
    "width (Hu et al. 2021, table 1)."
)
SHARE_H, SHARE_L = 112 / 1024, 224 / 1024  # of the width: 11 million parameters on GPT-2 medium, as in the paper
BASE = "base"


def gpt2(width: int, layers: int, heads: int, device: torch.device) -> Any:
    """Return a frozen GPT-2 with random weights, without its output projection."""
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=1024, n_embd=width, n_layer=layers, n_head=heads, n_positions=512, bos_token_id=0, eos_token_id=0
    )
    model: Any = GPT2Model(config)
    return model.to(device).eval().requires_grad_(False)


class Bottleneck(nn.Module):
    """A block and its bottleneck adapter: y = h + W_up gelu(W_down n(h)); h: the block's output, n: L's layer norm."""

    def __init__(self, block: nn.Module, width: int, size: int, norm: bool):
        super().__init__()
        self.block = block
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.down, self.up = nn.Linear(width, size), nn.Linear(size, width)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.block(*args, **kwargs)
        if isinstance(out, tuple):  # attention also returns its weights
            return self.bottleneck(out[0]), *out[1:]
        return self.bottleneck(out)

    def bottleneck(self, h: Tensor) -> Tensor:
        return h + self.up(F.gelu(self.down(self.norm(h))))


def with_bottlenecks(model: Any, kind: str) -> Any:
    """Put adapters of kind H or L into every layer."""
    width = model.config.n_embd
    device = next(model.parameters()).device
    share = SHARE_H if kind == "H" else SHARE_L
    for layer in model.h:
        if kind == "H":
            layer.attn = Bottleneck(layer.attn, width, round(width * share), norm=False)
        layer.mlp = Bottleneck(layer.mlp, width, round(width * share), norm=kind == "L")
    return model.to(device).eval().requires_grad_(False)


def with_lora(model: Any, config: lk.LoraConfig) -> Any:
    """Attach a LoRA with nonzero factors."""
    torch.manual_seed(1)
    lk.attach(model, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.01)
    return model.requires_grad_(False)


def sides(base: Any) -> dict[str, Any]:
    """Return copies of the base, one for each row of the list above."""
    q_and_v = lk.LoraConfig(rank=4, alpha=4, targets=["c_attn"], packed={"c_attn": [True, False, True]})
    merged = with_lora(copy.deepcopy(base), q_and_v)
    lk.merge(merged)
    return {
        BASE: base,
        "LoRA, merged": merged,
        "LoRA q,v": with_lora(copy.deepcopy(base), q_and_v),
        "LoRA all": with_lora(copy.deepcopy(base), lk.LoraConfig(rank=16)),
        "adapter L": with_bottlenecks(copy.deepcopy(base), "L"),
        "adapter H": with_bottlenecks(copy.deepcopy(base), "H"),
    }


def run(quick: bool = False, clock: Callable[[], float] = time.perf_counter) -> list[Row]:
    """Return a row for each batch size and length. clock: time.process_time on a busy machine without a GPU."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    # GPT-2 medium on a GPU; on a CPU a size for which the table takes about two minutes on two cores.
    width, layers, heads = (64, 2, 2) if quick else (1024, 24, 16) if on_gpu else (256, 6, 4)
    models = sides(gpt2(width, layers, heads, device))
    rows = []
    for batch, length in (
        [(1, 64), (2, 64)] if quick else [(1, 64), (1, 128), (1, 256), (1, 512), (32, 64), (32, 128), (32, 512)]
    ):
        ids = torch.randint(0, 1024, (batch, length), device=device)
        rounds = 3 if quick else 100 if on_gpu else max(3, min(50, 20_000 // (batch * length)))
        with torch.inference_mode():
            seconds = in_turn(
                {name: _pass(model, ids) for name, model in models.items()}, rounds=rounds, warm=1, clock=clock
            )
        slowdowns = {f"{name} +%": 100 * (seconds[name] / seconds[BASE] - 1) for name in seconds if name != BASE}
        shape = {"batch": batch, "length": length, "layers x width": f"{layers} x {width}"}
        rows.append({**shape, "base ms": seconds[BASE] * 1e3, **slowdowns})
    return rows


def plot(rows: list[Row], axes: Any) -> None:
    """Draw the slowdowns as grouped bars."""
    kinds = [column for column in rows[0] if column.endswith("+%")]
    step = 1 / (len(kinds) + 1)
    for k, kind in enumerate(kinds):
        positions = [i + k * step for i in range(len(rows))]
        axes.bar(positions, [row[kind] for row in rows], width=step, label=kind.removesuffix(" +%"))
    middles = [i + step * (len(kinds) - 1) / 2 for i in range(len(rows))]
    axes.set_xticks(middles, [f"{row['batch']} x {row['length']}" for row in rows])
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlabel("batch x length")
    axes.set_ylabel("slower than the base, %")
    axes.legend(fontsize="small")


def _pass(model: Any, ids: Tensor) -> Callable[[], object]:
    return lambda: model(ids, use_cache=False)
