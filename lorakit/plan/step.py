"""Measure the peak memory of a training step and of an evaluation by running them on shapes (`live.py`).

    equal layers:  peak(n) = peak(2) + (n - 2) · (peak(3) - peak(2))        in each stretch, for n layers

This is exact, not an approximation: within a stretch the peak is at the first or at the last layer, and either grows by
the same amount with each layer. The step is divided into the stretches between which the peak may move: forward, the
loss with its own backward, the backward through the layers, and that of what precedes them (embeddings).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .live import Live
from .shell import Shell, plan_errors
from .weightless import without_memory

Loss = Callable[[nn.Module, dict[str, Tensor]], Tensor]
Parts = dict[str, int]  # bytes by purpose: gradients, activations, loss, working


@dataclass(frozen=True)
class Traced:
    """`stretches`: bytes by purpose at the peak of each, without parameters and optimizer; `flops`: of the step."""

    stretches: dict[str, Parts]
    flops: int


def training_step(shell: Shell, batch: Mapping[str, Tensor], loss: Loss, accumulating: bool) -> Traced:
    """Trace forward and backward of one micro-batch. `accumulating`: gradients exist already.

    Raises PlanError if the model cannot run on shapes.
    """
    return _over_layers(shell, lambda: _training_step(shell, batch, loss, accumulating))


def evaluation(shell: Shell, batch: Mapping[str, Tensor], losses: Callable[[Any, dict[str, Tensor]], object]) -> Traced:
    """Trace a forward without gradients, through `losses`. Raises PlanError if the model cannot run on shapes."""

    def run() -> Traced:
        live = Live([*without_memory(shell.model), *_tensors(batch)], shell.shapes)
        live.stretch = "evaluation"
        shell.model.eval()
        try:
            with live, torch.no_grad(), plan_errors(shell.name):
                losses(shell.model, dict(batch))
        finally:
            shell.model.train()
        return Traced(live.peaks, live.flops)

    return _over_layers(shell, run)


def _tensors(batch: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors of a batch, which may have other things in it."""
    return [value for value in batch.values() if isinstance(value, Tensor)]


def _training_step(shell: Shell, batch: Mapping[str, Tensor], loss: Loss, accumulating: bool) -> Traced:
    model, handles = shell.model, []
    live = Live([*without_memory(model), *_tensors(batch)], shell.shapes)

    def gradient_ready(parameter: Tensor) -> None:
        if parameter.grad is not None:
            live.rename(parameter.grad, "gradients")

    for parameter in shell.trained():
        if not parameter.is_meta:
            handles.append(parameter.register_post_accumulate_grad_hook(gradient_ready))
            if accumulating:
                with shell.shapes:
                    parameter.grad = torch.empty_like(parameter)
                live.note(parameter.grad, "gradients")
    if shell.stack is not None:
        handles.append(shell.stack[0].register_forward_pre_hook(_before_layers(live), with_kwargs=True))
    head = model.get_output_embeddings()
    # not on the output layer: a hook there would keep the loss from being fused with it
    if head is not None and model.base_model is not model:
        handles.append(model.base_model.register_forward_hook(_before_loss(live)))
    live.purpose = "activations"
    try:
        with live, plan_errors(shell.name):
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
    """Build a hook for the model's body: after it, and until its output's gradient arrives, tensors are the loss's."""

    def hook(body: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if live.stretch == "forward" and torch.is_grad_enabled():
            live.stretch = live.purpose = "loss"
            if out[0].requires_grad:
                out[0].register_hook(lambda g: _begin(live, "layers"))

    return hook


def _before_layers(live: Live) -> Callable[..., None]:
    """Build a hook for the first layer: when its input's gradient arrives, only the embeddings' backward remains."""

    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if isinstance(hidden, Tensor) and hidden.requires_grad and live.stretch == "forward":
            hidden.register_hook(lambda g: _begin(live, "embeddings"))

    return hook


def _begin(live: Live, stretch: str) -> None:
    live.stretch, live.purpose = stretch, "working"


def _over_layers(shell: Shell, run: Callable[[], Traced]) -> Traced:
    """Trace all layers by running them, or only two and three of them if all are alike."""
    if not shell.foldable:
        return run()
    assert shell.stack is not None
    with shell.first(2):
        two = run()
    with shell.first(3):
        three = run()
    further_layers = len(shell.stack) - 2

    def extrapolated(a: int, b: int) -> int:
        return max(0, a + further_layers * (b - a))

    stretches = {
        stretch: {
            p: extrapolated(parts.get(p, 0), three.stretches[stretch].get(p, 0))
            for p in parts.keys() | three.stretches[stretch].keys()
        }
        for stretch, parts in two.stretches.items()
    }
    return Traced(stretches, extrapolated(two.flops, three.flops))
