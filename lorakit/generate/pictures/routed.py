"""Pictures with different adapters in one pass: a choice for each picture, whatever rows a component is given.

A text encoder is given a row for each prompt, and the denoiser one for each picture, or with guidance two: all without
the prompt, then all with it. Each adapted component therefore has its own `route`, made when it is called, from the
number of its rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...bases.pipeline import PipelineModel, components_of
from ...errors import LorakitError
from ...layers.layer import LoraLayer
from ...model.route import Which, route


class NotByRow(LorakitError):
    """A component was called in a way that does not say which row is whose: make the pictures one by one."""


@contextmanager
def routed(model: PipelineModel, choices: Sequence[Which]) -> Iterator[None]:
    """Within the block, picture n of a pipeline's batch uses `choices[n]`. `model`: the pipeline's `as_module`.

    Raises NotByRow, inside the block, from a component whose rows are not blocks of one for each picture; StateError
    for an unknown adapter, and others as `route`.
    """
    with route(model, choices):  # checks the choices before anything runs
        pass
    with ExitStack() as hooks:
        for name, component in components_of(model.pipe).items():
            if any(isinstance(module, LoraLayer) for module in component.modules()):
                _hook(model, name, component, choices, hooks)
        yield


def _hook(model: nn.Module, name: str, component: nn.Module, choices: Sequence[Which], hooks: ExitStack) -> None:
    """Have the component run inside `route`, for as many blocks as its input has."""
    entered: list[AbstractContextManager[None]] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        context = route(model, [*choices] * _blocks(name, (*args, *kwargs.values()), len(choices)))
        context.__enter__()
        entered.append(context)

    def after(*_: Any) -> None:
        if entered:
            entered.pop().__exit__(None, None, None)

    hooks.callback(after)
    hooks.callback(component.register_forward_pre_hook(before, with_kwargs=True).remove)
    hooks.callback(component.register_forward_hook(after, always_call=True).remove)


def _blocks(name: str, inputs: Sequence[Any], count: int) -> int:
    """Return how often the batch occurs in a component's rows. NotByRow unless it is in blocks: [a, b, a, b]."""
    rows = next(filter(None, map(_rows, inputs)), [])
    blocks, rest = divmod(len(rows), count)
    if rest or not blocks:
        raise NotByRow(f"{name} was given {len(rows)} rows for {count} pictures")
    # With guidance the denoiser is given the same latents twice: this tells blocks from neighbours.
    if any(not torch.equal(row, rows[n % count]) for n, row in enumerate(rows[count:])):
        raise NotByRow(f"{name} was given {len(rows)} rows, and which of the {count} pictures they are is not known")
    return blocks


def _rows(value: Any) -> list[Tensor]:
    """Return the rows of a batch, a tensor [rows, ...] or a list with a tensor a row; empty for anything else."""
    if isinstance(value, Tensor):
        return list(value) if value.dim() > 1 else []
    if isinstance(value, list | tuple) and all(isinstance(each, Tensor) for each in value):
        return list(value)
    return []
