"""The first batches of a run's data, which the base computes once more before training, for starts made from data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError, TargetError
from ...ops import IGNORE_INDEX

Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class FirstBatches:
    """`module`: the base; `model`: what the user calls, the same or a pipeline; `loss`: (model, batch) -> a scalar;
    None: that of a transformers model, `model(**batch).loss`.
    """

    module: nn.Module
    model: Any
    batches: Sequence[Any]
    loss: Loss | None = None

    def __len__(self) -> int:
        return len(self.batches)

    def forward(self) -> Iterator[Any]:
        """Compute each batch. Yields the batch before it is computed.

        Gradients are enabled, but no parameter requires one. What a loss computes without (to find out how the model
        works) is not of the batch, and hooks leave it out.
        """
        for batch in self._on_device():
            yield batch
            with torch.enable_grad():
                if self.loss is not None:
                    self.loss(self.model, batch)
                else:
                    self._called(batch)

    def backward(self) -> None:
        """Compute each batch's loss and its gradients. Raises ConfigError if there is no loss to go back from."""
        for batch in self._on_device():
            with torch.enable_grad():
                loss = self.loss(self.model, batch) if self.loss is not None else self._own_loss(batch)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                raise ConfigError(
                    f"attach(..., loss=...): the loss is {_described(loss)}; expected a tensor with one element"
                )
            if not loss.requires_grad:
                raise ConfigError(
                    "attach(..., loss=...): the loss does not depend on the modules to adapt, so there are no "
                    "gradients to start from\n  compute it with the model that it is given, with gradients enabled"
                )
            loss.backward()

    def _on_device(self) -> Iterator[Any]:
        device = next((p.device for p in self.module.parameters() if not p.is_meta), torch.device("cpu"))
        for batch in self.batches:
            yield _moved(batch, device)

    def _called(self, batch: Any) -> Any:
        if isinstance(batch, Mapping):
            return self.model(**batch)
        if isinstance(batch, Tensor):
            return self.model(batch)
        raise ConfigError(
            f"attach(..., batches=...): how the model takes a batch is not known: it is a {type(batch).__name__}\n"
            "  give loss=lambda model, batch: ... too, the loss of a batch; or give batches of named tensors"
        )

    def _own_loss(self, batch: Any) -> Any:
        out = self._called(batch)
        loss = out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", None)
        if loss is None:
            raise ConfigError(
                f"the output of {type(self.model).__name__} has no loss, and this start is made from its gradients\n"
                "  give batches with labels, or loss=lambda model, batch: ..., to attach"
            )
        return loss


def input_of(name: str, args: Sequence[Any], y: Any) -> Tensor:
    """Return the input of a module that was called with `args` and returned y. Raises TargetError for one that does not
    map one tensor to one, such as nn.MultiheadAttention.
    """
    if not isinstance(y, Tensor) or not args or not isinstance(args[0], Tensor):
        raise TargetError(
            f"'{name}' does not map one tensor to another, so no start can be made from its inputs and outputs "
            f"(LoraConfig.init)\n  leave it out (exclude=['{name.rpartition('.')[2]}']), or use another init"
        )
    return args[0]


def trained_positions(batch: Any, shape: Sequence[int]) -> Tensor | None:
    """Return which positions of a layer's input count: those with a label, or else those that are not padding.

    `shape`: the input's without its features. None where the batch does not say, or the layer sees other positions than
    the batch has (images, pooled outputs): all count.
    """
    if not isinstance(batch, Mapping):
        return None
    mask = batch.get("attention_mask")
    mask = mask.bool() if isinstance(mask, Tensor) else None
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.dim() == 2:
        labelled = labels != IGNORE_INDEX
        mask = labelled if mask is None else mask & labelled if mask.shape == labelled.shape else mask
    if mask is None or mask.dim() != 2 or len(shape) != 2:
        return None
    if tuple(shape) == (mask.shape[0], mask.shape[1] - 1):  # a language model's loss leaves the last position out
        mask = mask[:, :-1]
    return mask if tuple(shape) == tuple(mask.shape) else None


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Compute in eval mode, without gradients of parameters. Restores modes, flags and random numbers."""
    modes = [(m, m.training) for m in module.modules()]
    trained = [p for p in module.parameters() if p.requires_grad]
    devices = sorted({p.device.index for p in module.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            for m, _ in modes:
                m.training = False
            for p in trained:
                p.requires_grad_(False)
            yield
        finally:
            for p in trained:
                p.requires_grad_(True)
            for m, training in modes:
                m.training = training


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: _moved(value, device) for name, value in batch.items()}
    if isinstance(batch, list | tuple):
        return [_moved(value, device) for value in batch]
    return batch


def _described(value: Any) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
