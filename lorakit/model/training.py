"""What training an attached adapter asks for besides its loss: learning rates of its own (LoRA+), a penalty, and work
after each step (AdaLoRA). `lorakit train` calls these, and so does a loop of your own:

    optimizer = torch.optim.AdamW(lk.parameter_groups(model, 1e-4))
    for step, batch in enumerate(batches, start=1):
        loss = model(**batch).loss + lk.penalty(model)
        loss.backward()
        optimizer.step()
        lk.after_step(model, step, steps)
        optimizer.zero_grad()

Adapters without such settings need none of it: the penalty is zero, and `after_step` does nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..bases.pipeline import as_module
from ..errors import ConfigError, StateError
from ..layers.layer import LoraLayer, child_name
from ..layers.updates.update import LiveUpdate
from .state import attached_of, layer_at, state_of


def parameter_groups(
    model: Any, learning_rate: float, lora_plus: float | None = None, name: str | None = None
) -> list[dict[str, Any]]:
    """Return the trained parameters as groups for a torch optimizer, each with its learning rate: {"params", "lr"}.

    With LoRA+ (Hayou et al. 2024), B and the factors that take its place are a second group at `lora_plus` times
    `learning_rate`. lora_plus: None for the one in the adapter's config, 1 for a single rate. `name`: the adapter that
    it is for; may be omitted if only one is attached. Biases, saved modules and embeddings keep the first rate. Raises
    StateError if nothing is trained; ConfigError if LoRA+ has no parameter to train faster.
    """
    module = as_module(model)
    trained = [p for p in module.parameters() if p.requires_grad]
    if not trained:
        raise StateError("no parameter of the model is trained\n  attach an adapter with trainable=True")
    ratio = attached_of(state_of(module), name).config.lora_plus if lora_plus is None else lora_plus
    if ratio is None:
        return [{"params": trained, "lr": learning_rate}]
    if not (math.isfinite(ratio) and ratio > 0):
        raise ConfigError(f"lora_plus is {ratio}: B's learning rate as a multiple of A's, such as 16, was expected")
    faster = faster_parameters(module, name)
    return [
        {"params": [p for p in trained if p not in faster], "lr": learning_rate},
        {"params": [p for p in trained if p in faster], "lr": learning_rate * ratio},
    ]


def faster_parameters(model: nn.Module, name: str | None = None) -> set[nn.Parameter]:
    """Return the parameters of an adapter that LoRA+ trains faster. Raises ConfigError if there are none."""
    found = {
        parameter
        for _, layer, update in _updates(model, name)
        for own in update.faster(layer)
        if (parameter := update.get_parameter(own)).requires_grad
    }
    if not found:
        kinds = sorted({type(update).__name__ for _, _, update in _updates(model, name)})
        raise ConfigError(
            f"lora_plus has no effect: no update of this adapter ({', '.join(kinds)}) has a factor B to train faster\n"
            "  omit lora_plus"
        )
    return found


def penalty(model: Any, name: str | None = None) -> Tensor:
    """Return what the adapter's kinds of update add to the loss of a step; zero for those that add nothing.

    AdaLoRA: its penalty on factors that are not orthogonal. With accumulated gradients, add it once in each optimizer
    step, not to each micro-batch. `name`: the adapter's; may be omitted if only one is attached.
    """
    module = as_module(model)
    found = penalties(module, name)
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    return sum(found[1:], start=found[0]) if found else torch.zeros((), device=device)


def penalties(model: nn.Module, name: str | None = None) -> list[Tensor]:
    """Return the penalties of an adapter's kinds that have one."""
    return [p for kind, updates in _by_kind(model, name).items() if (p := kind.penalty(updates)) is not None]


def after_step(model: Any, step: int, steps: int, name: str | None = None) -> None:
    """Adjust an adapter after optimizer step `step` (from 1) of `steps`, before the gradients are set to None.

    AdaLoRA: update the importances, and reduce the ranks when it is time. `name`: the adapter's; may be omitted if only
    one is attached.
    """
    for kind, updates in _by_kind(as_module(model), name).items():
        kind.after_step(updates, step, steps)


def cannot_average(model: nn.Module, name: str) -> str | None:
    """Return the first kind of an adapter of which moving averages are no update; None if there is none."""
    return next((kind.__name__ for kind in _by_kind(model, name) if not kind.averages), None)


def _by_kind(model: nn.Module, name: str | None) -> dict[type[LiveUpdate], list[LiveUpdate]]:
    kinds: dict[type[LiveUpdate], list[LiveUpdate]] = {}
    for _, _, update in _updates(model, name):
        kinds.setdefault(type(update), []).append(update)
    return kinds


def _updates(model: nn.Module, name: str | None) -> Iterator[tuple[str, LoraLayer, LiveUpdate]]:
    """Yield (module's name, layer, update) of an adapter, those of tied weights once."""
    state = state_of(model)
    attached = attached_of(state, name)
    child = child_name(name or next(iter(state.adapters)))
    for module in attached.modules:
        layer = layer_at(model, module)
        update: LiveUpdate = layer._modules[child]
        if not update.tied:
            yield module, layer, update
