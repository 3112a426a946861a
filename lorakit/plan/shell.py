"""A model that cannot be loaded here, as far as memory and time go: built from its config on the meta device, adapter
attached.

Where all decoder layers are alike, a step through two and through three of them tells the step through all (`step.py`);
`first` cuts the stack of layers to so many for a while.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LorakitError
from ..layers.fused import attention
from ..layers.layer import LoraLayer
from ..layers.targets import is_linear
from .weightless import Shapes


class PlanError(LorakitError, RuntimeError):
    """A model whose step cannot be run on shapes alone."""


@contextmanager
def spoken(name: str) -> Iterator[None]:
    """Turns what goes wrong inside a model that has no weights into a PlanError that says so."""
    try:
        yield
    except LorakitError:
        raise
    except Exception as error:  # a model's own code may raise anything
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PlanError(
            f"the memory of a {name} cannot be estimated, as it does not run on shapes alone: {first}"
        ) from error


FEW = 3  # with no more layers than this, nothing is won by leaving some out


class Shell:
    """`model`: on the meta device, in training mode, as `train` would set it up."""

    def __init__(
        self, name: str, build: Callable[[], Any], attach: Callable[[nn.Module], object], *, checkpointing: bool = False
    ):
        """`name`: what to call the base if it cannot be built; `build`: makes it; `attach`: puts on the model what is
        trained.
        """
        with spoken(name), torch.device("meta"):
            self.model = build()
        self.name = type(self.model).__name__
        own = list(self.model.parameters())
        self._base_parameters = sum(p.numel() for p in own)
        attach(self.model)
        # A parameter that is trained is the base's own, or one that was put beside it.
        added = {id(p) for p in self.trained()} - {id(p) for p in own}
        self.added_bytes = _bytes(p for p in self.trained() if id(p) in added)
        self.weight_bytes = self.frozen_bytes() + self.trained_bytes() - self.added_bytes
        if checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            self.model.enable_input_require_grads()
        self.model.train()
        self._attention = self.model.config._attn_implementation
        self.shapes = Shapes()
        self.stack = _stack(self.model)
        self.foldable = self.stack is not None and len(self.stack) > FEW and _alike(self.model, self.stack)

    def attention(self, plain: bool) -> None:
        """Plain attention (unless its backward is ours), or the one that transformers chose."""
        self.model.set_attn_implementation("eager" if plain and not attention.is_used(self.model) else self._attention)

    @contextmanager
    def first(self, layers: int) -> Iterator[None]:
        """Only so many of the stack's layers."""
        assert self.stack is not None
        every = list(self.stack)
        del self.stack[layers:]
        try:
            yield
        finally:
            self.stack.extend(every[layers:])

    # ---- what is there before the first step ----

    def trained(self) -> list[nn.Parameter]:
        """The parameters that are trained."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def trained_bytes(self) -> int:
        """Of the same."""
        return _bytes(self.trained())

    def frozen_bytes(self) -> int:
        """Of parameters that are not trained, and of buffers."""
        return _bytes(p for p in self.model.parameters() if not p.requires_grad) + _bytes(self.model.buffers())

    def base_parameters(self) -> int:
        """Parameters without an adapter's."""
        return self._base_parameters

    def linear_weights(self) -> list[Tensor]:
        """The frozen weights of linear modules but the output layer: what a 4-bit base holds in 4 bits."""
        head = self.model.get_output_embeddings()
        embedded = {id(m.weight) for m in self.model.modules() if isinstance(m, nn.Embedding)}
        modules = (m for m in self.model.modules() if m is not head and (isinstance(m, LoraLayer) or is_linear(m)))
        weights = {
            id(w): w for w in (getattr(m, "weight", None) for m in modules) if isinstance(w, Tensor) and w.dim() == 2
        }
        return [w for key, w in weights.items() if key not in embedded and not w.requires_grad]


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _stack(model: nn.Module) -> nn.ModuleList | None:
    """The list of decoder layers: the one as long as the config says, the heaviest if there are several."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)  # type: ignore[operator, union-attr]
    found = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    return max(found, key=lambda m: _bytes(m.parameters()), default=None)


def _alike(model: nn.Module, stack: nn.ModuleList) -> bool:
    """Whether every layer of the stack costs the same: equal modules, parameters, flags, and equal kinds where the
    config names kinds.
    """
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    kinds = [v for v in vars(config).values() if isinstance(v, list) and len(v) == len(stack)]
    marks = [
        (
            [(n, type(m).__name__, getattr(m, "rank", None)) for n, m in layer.named_modules()],
            [(n, p.shape, p.dtype, p.requires_grad) for n, p in layer.named_parameters()],
        )
        for layer in stack
    ]
    return all(mark == marks[0] for mark in marks) and all(v == kind[0] for kind in kinds for v in kind)
