"""A model for planning: built from its config on the meta device, without weights, with the adapter attached.

If all decoder layers are alike, a step through two and through three of them determines the step through all
(`step.py`); `first` truncates the stack of layers for that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from ..errors import LorakitError
from ..layers.fused import attention
from ..layers.offload import is_moved
from ..layers.offload import offload as offload_to
from .packed import PackedLinear, Packing, pack
from .weightless import Shapes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PlanError(LorakitError, RuntimeError):
    """A model's step cannot run on shapes alone."""


@contextmanager
def plan_errors(name: str) -> Iterator[None]:
    """Turn an exception from a model without weights into a PlanError. `name`: the model's, for the message."""
    try:
        yield
    except LorakitError:
        raise
    except Exception as error:  # a model's own code may raise anything
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PlanError(
            f"the memory of a {name} cannot be estimated, since it does not run without weights: {first}"
        ) from error


class Gone(saved_tensors_hooks):
    """Saved tensors that are moved leave the device's memory, and come back as new tensors of the same shape."""

    def __init__(self) -> None:
        super().__init__(
            lambda tensor: (tensor.shape, tensor.dtype) if is_moved(tensor) else tensor,
            lambda kept: kept if isinstance(kept, torch.Tensor) else torch.empty(kept[0], dtype=kept[1]),
        )


FEW = 3  # with this many layers or fewer, leaving some out saves nothing


class Shell:
    """A model without weights. `model`: on the meta device, in training mode, set up as `train` does."""

    def __init__(
        self,
        name: str,
        build: Callable[[], Any],
        attach: Callable[[nn.Module], object],
        *,
        checkpointing: bool = False,
        offload: bool = False,
        packing: Packing | None = None,
    ):
        """`name`: the base's, for errors; `build`: builds the model; `attach`: adds what is trained to it; `packing`:
        how its linears are stored, None if they are not quantized; `offload`: see `PlanSettings`.

        Raises PlanError if the model cannot be built, or the size of such weights is not known.
        """
        if packing is not None and packing.storage.size is None:
            raise PlanError(f"the bytes of weights that are stored as {packing.storage.title} are not known")
        with plan_errors(name), torch.device("meta"):
            self.model = build()
            self._base_parameters = sum(p.numel() for p in self.model.parameters())
            self.packed = 0 if packing is None else pack(self.model, packing)  # how many linears are quantized
        self.name = type(self.model).__name__
        own = list(self.model.parameters())
        attach(self.model)
        # Trained parameters may be the base's own or added ones.
        added = {id(p) for p in self.trained()} - {id(p) for p in own}
        self.added_bytes = _bytes(p for p in self.trained() if id(p) in added)
        self.trained_bytes, self.trained_parameters = _bytes(self.trained()), sum(p.numel() for p in self.trained())
        self.weight_bytes = self.frozen_bytes() + self.trained_bytes - self.added_bytes
        if checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            self.model.enable_input_require_grads()
        if offload:
            offload_to(self.model, Gone)
        self.model.train()
        self._attention = self.model.config._attn_implementation
        self.shapes = Shapes()
        self.stack = _stack(self.model)
        self.foldable = self.stack is not None and len(self.stack) > FEW and _alike(self.model, self.stack)

    def attention(self, plain: bool) -> None:
        """Use plain attention (unless the model uses our backward), or else the one that transformers chose."""
        self.model.set_attn_implementation("eager" if plain and not attention.is_used(self.model) else self._attention)

    @contextmanager
    def first(self, layers: int) -> Iterator[None]:
        """Truncate the stack to its first `layers` layers inside the context."""
        assert self.stack is not None
        all_layers = list(self.stack)
        del self.stack[layers:]
        try:
            yield
        finally:
            self.stack.extend(all_layers[layers:])

    # ---- what is allocated before the first step ----

    def trained(self) -> list[nn.Parameter]:
        """List the trained parameters."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def frozen_bytes(self) -> int:
        """Return the bytes of frozen parameters and buffers."""
        dense = _bytes(p for p in self.model.parameters() if not p.requires_grad) + _bytes(self.model.buffers())
        return dense - sum(m.saved_bytes for m in self.model.modules() if isinstance(m, PackedLinear))

    def base_parameters(self) -> int:
        """Return the number of elements in the base's parameters."""
        return self._base_parameters


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _stack(model: PreTrainedModel) -> nn.ModuleList | None:
    """Find the decoder layers: the ModuleList of the length in the config, the largest if there are several."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    return max(stacks, key=lambda m: _bytes(m.parameters()), default=None)


def _alike(model: PreTrainedModel, stack: nn.ModuleList) -> bool:
    """Whether all layers of the stack cost the same: equal modules, parameters and flags, and no setting of the config
    that differs by layer (layer_types).
    """
    config = model.config.get_text_config()
    kinds = [v for v in vars(config).values() if isinstance(v, list) and len(v) == len(stack)]
    marks = [
        (
            [(n, type(m).__name__, getattr(m, "rank", None)) for n, m in layer.named_modules()],
            [(n, p.shape, p.dtype, p.requires_grad) for n, p in layer.named_parameters()],
        )
        for layer in stack
    ]
    return all(mark == marks[0] for mark in marks) and all(v == kind[0] for kind in kinds for v in kind)
