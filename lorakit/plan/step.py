"""What one training step, and one evaluation, need at their largest moments: run on shapes, every tensor's birth and
death noted.

    layers alike:  peak(n) = peak(2) + (n - 2) · (peak(3) - peak(2))        in each stretch of the work, for n layers

is exact, not an approximation: within a stretch the largest moment is at its first or at its last layer, and either
grows by the same amount with each layer. The stretches are those where the moment may change places: forward, the loss
with its own backward, the backward through the layers, and what comes before them (embeddings).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .live import Live
from .shell import Shell, spoken
from .weightless import without_memory

Loss = Callable[[nn.Module, dict[str, Tensor]], Tensor]
Parts = dict[str, int]  # bytes by purpose: gradients, activations, loss, working


@dataclass(frozen=True)
class Traced:
    """`stretches`: bytes by purpose at the largest moment of each, without parameters and optimizer. `flops`: of the
    whole step.
    """

    stretches: dict[str, Parts]
    flops: int


def training_step(shell: Shell, batch: Mapping[str, Tensor], loss: Loss, accumulating: bool) -> Traced:
    """Forward and backward of one micro-batch. `accumulating`: gradients are there already."""
    return _over_layers(shell, lambda: _training_step(shell, batch, loss, accumulating))


def evaluation(shell: Shell, batch: Mapping[str, Tensor], losses: Callable[[Any, dict[str, Tensor]], object]) -> Traced:
    """A forward of held-out rows without gradients, to `losses`."""

    def run() -> Traced:
        live = Live([*without_memory(shell.model), *batch.values()], shell.shapes)
        live.stretch = "evaluation"
        shell.model.eval()
        try:
            with live, torch.no_grad(), spoken(shell.name):
                losses(shell.model, dict(batch))
        finally:
            shell.model.train()
        return Traced(live.peaks, live.flops)

    return _over_layers(shell, run)


def _training_step(shell: Shell, batch: Mapping[str, Tensor], loss: Loss, accumulating: bool) -> Traced:
    model, handles = shell.model, []
    live = Live([*without_memory(model), *batch.values()], shell.shapes)
    for parameter in shell.trained():
        if not parameter.is_meta:
            handles.append(parameter.register_post_accumulate_grad_hook(lambda p: live.rename(p.grad, "gradients")))  # type: ignore[arg-type]
            if accumulating:
                with shell.shapes:
                    parameter.grad = torch.empty_like(parameter)
                live.note(parameter.grad, "gradients")
    if shell.stack is not None:
        handles.append(shell.stack[0].register_forward_pre_hook(_before_layers(live), with_kwargs=True))
    head = model.get_output_embeddings()
    # a hook on the output layer would keep the loss from doing its work
    if head is not None and model.base_model is not model:
        handles.append(model.base_model.register_forward_hook(_before_loss(live)))
    live.purpose = "activations"
    try:
        with live, spoken(shell.name):
            value = loss(model, dict(batch))
            if head is None:
                live.stretch, live.purpose = "layers", "working"
            value.backward()
            del value
    finally:
        for handle in handles:
            handle.remove()
        for parameter in shell.trained():
            parameter.grad = None
    return Traced(live.peaks, live.flops)


def _before_loss(live: Live) -> Callable[..., None]:
    """A hook on the model without its output layer: from here on, and until its output's gradient is there, what is
    made is the loss's.
    """

    def reached(body: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if live.stretch == "forward" and torch.is_grad_enabled():
            live.stretch = live.purpose = "loss"
            if out[0].requires_grad:
                out[0].register_hook(lambda g: _turn(live, "layers"))

    return reached


def _before_layers(live: Live) -> Callable[..., None]:
    """A hook on the first layer: when its input's gradient is there, only the embeddings are left."""

    def reached(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if isinstance(hidden, Tensor) and hidden.requires_grad and live.stretch == "forward":
            hidden.register_hook(lambda g: _turn(live, "embeddings"))

    return reached


def _turn(live: Live, stretch: str) -> None:
    live.stretch, live.purpose = stretch, "working"


def _over_layers(shell: Shell, run: Callable[[], Traced]) -> Traced:
    """Of all layers: by running them, or, where they are alike, two and three of them."""
    if not shell.foldable:
        return run()
    assert shell.stack is not None
    with shell.first(2):
        two = run()
    with shell.first(3):
        three = run()
    more = len(shell.stack) - 2

    def line(a: int, b: int) -> int:
        return max(0, a + more * (b - a))

    stretches = {
        stretch: {
            p: line(parts.get(p, 0), three.stretches[stretch].get(p, 0))
            for p in parts.keys() | three.stretches[stretch].keys()
        }
        for stretch, parts in two.stretches.items()
    }
    return Traced(stretches, line(two.flops, three.flops))
