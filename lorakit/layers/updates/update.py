"""The interface of an update on an adapted module. The update is a child of the module; layers know no kinds.

    y = base(x) + Σ weight · change(x, base(x))

An update that is a pair of low-rank matrices returns it from `pair`, and the layers compute s · B A x themselves: fused
with the base, for many adapters of a batch at once, in place. A pair may come with a gain, a factor g for each output
that multiplies the base's too (DoRA): (g - 1)(base(x) - b) + s · B A x, where B includes g. Any other kind computes its
own `change`.

Merged, the weight is W + weight · ((g - 1) W + g D): `rows` gives weight · D, and `weight_gain` g, None for kinds that
only add.

Each kind is a file in this folder, with the name that `LoraConfig.variant` and the value's `variant` use; its class is
`Live`.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import Tensor, nn

from ...adapter.update import Rows, Update
from ...config import LoraConfig
from ...errors import AdapterError, TargetError
from ..bases import base_of
from ..layer import Own

if TYPE_CHECKING:
    from ..layer import LoraLayer


class Pair(Protocol):
    """s · B A, with dropout on its input. A and B have the layer's shapes: a packed B is [n, out/parts, r]. They may be
    computed from the parameters by each call of `pair`.
    """

    @property
    def A(self) -> Tensor: ...
    @property
    def B(self) -> Tensor: ...
    @property
    def scale(self) -> float: ...
    @property
    def dropout(self) -> float: ...
    @property
    def gain(self) -> Tensor | None:
        """g [out], which B includes already; None: 1."""
        ...


class LiveUpdate(Own):
    """One adapter's update of one module, with its parameters.

    A buffer registered with `persistent=True` is part of a run's checkpoints, which restore it to the bit. One with
    `persistent=False` is computed again when a run resumes. `value` must not depend on buffers that change in training:
    the result may have the parameters of an earlier step, or their averages.
    """

    rank: int
    counted = "rank"  # what `rank` is, for people
    width = 0  # the ranks of its pair in a stack of adapters; 0 without a pair
    averages = True  # whether averages of its parameters over steps (EMA) are an update of its kind
    captured_as: str | None = None  # the kind that its value is, if that is another
    tied = False  # whether it is the update of another module, whose weight this one shares
    lacks: tuple[str, ...] = ()  # settings of `LoraConfig` that have no effect on a new update of its kind
    lacking = ""  # why, after its name: "trains factors alone"
    starts = False  # whether it can start from given factors A and B (`begin`)

    @classmethod
    def settled(
        cls, config: LoraConfig, names: Mapping[str, nn.Module], modules: Mapping[str, nn.Module]
    ) -> LoraConfig:
        """Return a new adapter's config with what follows from the model. Raises TargetError for what does not fit it.

        `names`: all of the model's modules; `modules`: those that the config adapts.
        """
        return config

    @classmethod
    def fresh(cls, layer: LoraLayer, name: str, config: LoraConfig, trainable: bool) -> Self:
        """Create an update with ΔW = 0 for the layer `name`. Raises TargetError or StateError if it cannot have one."""
        raise NotImplementedError

    @classmethod
    def of(cls, layer: LoraLayer, name: str, value: Any, config: LoraConfig, trainable: bool) -> Self:
        """Create an update from a value, copied to the layer's device. Raises AdapterError if it does not fit.

        `config`: the adapter's, for what acts in training only and is not in a value (dropout).
        """
        raise NotImplementedError

    @classmethod
    def join(cls, updates: Sequence[Self]) -> None:
        """Make what the modules of an adapter share. Called once, with all its updates of this kind, also those that a
        DoRA is built on, before they are registered. Raises AdapterError if they cannot share it.
        """

    def begin(self, layer: LoraLayer, values: tuple[Tensor, Tensor] | None, subtracted: bool) -> None:
        """Start from these A and B instead of random ones (`layers.init`). Called once, before it is registered.

        values: in the layer's layout; None: keep the random ones. subtracted: from now on ΔW is the difference from the
        start, which is kept as a frozen pair.
        """
        raise NotImplementedError

    def value(self, layer: LoraLayer) -> Update:
        """Return the update as a value, with its own tensors, detached and not copied."""
        raise NotImplementedError

    def pair(self, layer: LoraLayer) -> Pair | None:
        """Return the update as a pair of matrices; None if it is not one.

        Without gradients, a pair with a gain is the same object as long as nothing that it depends on has changed.
        """
        return None

    def change(self, layer: LoraLayer, x: Tensor, y0: Tensor) -> Tensor:
        """Return what to add to the base's output y0, in y0's dtype. Called only if there is no pair."""
        raise NotImplementedError

    def of_input(self, layer: LoraLayer, x: Tensor, weight: float) -> Tensor | None:
        """Return the input x' with which the base alone computes what it does with this update; None if there is none.

        Called only if the update is the only one in use, and there is no pair.
        """
        return None

    def twin(self) -> LiveUpdate:
        """Return the same update for another module that shares the weight (tied embeddings)."""
        raise NotImplementedError

    def forget_computed(self) -> None:
        """Drop what was computed from the parameters and is kept for the next call."""

    # Training

    def faster(self, layer: LoraLayer) -> tuple[str, ...]:
        """Return the names of its parameters that LoRA+ trains at B's learning rate: B, and what takes B's place on the
        output's side. Empty if it has none.
        """
        return ()

    def freeze_a(self, layer: LoraLayer, name: str) -> None:
        """Stop training A (LoRA-FA). Raises TargetError if there is no A, or B alone could not learn."""
        raise TargetError(f"'{name}' has an update without a factor A, so freeze_a has nothing to freeze\n  omit it")

    @classmethod
    def penalty(cls, updates: Sequence[Self]) -> Tensor | None:
        """Return what is added to the loss of a step, a scalar with a gradient; None if the kind has no penalty.

        `updates`: all of an adapter's updates of this kind.
        """
        return None

    @classmethod
    def after_step(cls, updates: Sequence[Self], step: int, steps: int) -> None:
        """Adjust the updates after optimizer step `step` (from 1) of `steps`; the gradients are still there."""

    def shape_on(self, layer: LoraLayer) -> tuple[int, ...]:
        """Return the shape of what it changes: the layer's dense weight."""
        return base_of(layer).shape(layer)

    def rows(self, layer: LoraLayer, weight: float) -> Rows:
        """Return `weight` · ΔW by blocks of rows of the layer's weight, on its device; with a `weight_gain`, `weight` ·
        D.
        """
        base = base_of(layer)
        device = base.device(layer)
        value = self.value(layer).map(lambda _, t: t.to(device))
        return value.rows(base.shape(layer), layer.lora_transposed, weight)

    def weight_gain(self, layer: LoraLayer) -> Tensor | None:
        """Return g for merging, in float64: a column for the rows of the layer's weight, or a row for its columns (both
        with the other axes flattened); None if the update only adds. The weight must be unmerged.
        """
        return None

    def bias_gain(self, layer: LoraLayer) -> Tensor | None:
        """Return the factors of the module's bias for merging, [out] in float64; None if it keeps its bias."""
        return None


def live(variant: str) -> type[LiveUpdate]:
    """Return the class of a kind. `variant`: one of `config.live_kinds()`."""
    return importlib.import_module(f".{variant}", __package__).Live


def master_dtype(layer: LoraLayer) -> torch.dtype:
    """Return the dtype of trained factors: float32 (float64 for a float64 base)."""
    return torch.float64 if base_of(layer).dtype(layer) == torch.float64 else torch.float32


def device_of(layer: LoraLayer) -> torch.device:
    """Return the device the layer computes on. With accelerate's offload, its weight is on "meta" between calls."""
    hook = layer.__dict__.get("_hf_hook")
    device = getattr(hook, "execution_device", None)
    return torch.device(device) if device is not None else base_of(layer).device(layer)


def matrix_shape(layer: LoraLayer) -> tuple[int, int]:
    """Return (out, in·k) of the layer's dense weight."""
    out, *sizes = base_of(layer).shape(layer)
    size_in = math.prod(sizes)
    return (size_in, out) if layer.lora_transposed else (out, size_in)


def check_fits(layer: LoraLayer, name: str, value: Update, kind: str) -> None:
    """Raise AdapterError unless a value of this kind ("LoHa") is for a weight of the layer's shape."""
    if value.layout(base_of(layer).shape(layer), conv1d=layer.lora_transposed) is not layer.lora_transposed:
        raise AdapterError(
            f"the adapter's {kind} factors do not fit '{name}' ({type(layer).__name__.removeprefix('Lora')}): they are "
            f"for a weight of {list(value.weight_shape())}; it has {list(matrix_shape(layer))}"
        )


def check_not_packed(name: str, config: LoraConfig, kind: str) -> None:
    """Raise TargetError for a packed projection. `kind`: of update, which cannot adapt parts of one."""
    if config.parts_of(name) is not None:
        raise TargetError(
            f"'{name}' is a packed projection, and {kind} cannot adapt parts of one\n  remove it from `packed`"
        )
