"""(IA)³ on a live module (Liu et al. 2022): a learnt factor for each output, or for each input.

    y = l ∘ base(x)      of attention's keys and values                  l: [out], ones at the start
    y = base(l ∘ x)      of a feed-forward's output projection           l: [in]

The factors of the outputs scale the bias too, as in PEFT. Beside others, and in a batch that mixes adapters, an update
adds its change of the base's output, (l - 1) ∘ y0 or W ((l - 1) ∘ x); alone, the factors of the inputs are applied to
them, which saves that product.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from ...adapter.ia3 import Ia3
from ...adapter.update import Rows
from ...config import LoraConfig
from ...errors import AdapterError, TargetError, did_you_mean, listing
from ...module_names import ends_with
from ..bases import base_of
from ..conv import ConvLayer
from ..layer import mixin_and_base
from ..linear import Conv1DLayer, LinearLayer
from .update import LiveUpdate, check_not_packed, device_of, master_dtype

if TYPE_CHECKING:
    from ..layer import LoraLayer


class Ia3Factors(LiveUpdate):
    """One adapter's factors of one module. `feedforward`: whether they scale its inputs."""

    rank = 1
    lacks = ("rank", "alpha", "dropout", "rslora", "rank_pattern", "alpha_pattern", "lora_plus")
    lacking = "trains factors of inputs and outputs alone"

    def __init__(self, vector: Tensor, feedforward: bool, trainable: bool):
        super().__init__()
        self.vector = nn.Parameter(vector, requires_grad=trainable)
        self.feedforward = feedforward

    @classmethod
    def settled(
        cls, config: LoraConfig, names: Mapping[str, nn.Module], modules: Mapping[str, nn.Module]
    ) -> LoraConfig:
        """Return the config with the modules whose inputs are scaled: those it names, or the feed-forwards' output
        projections among the adapted ones.
        """
        from ..targets import shortest_endings
        from ..transformer_parts import feedforward_outputs

        if config.feedforward is None:
            found = [name for name in feedforward_outputs(names) if name in modules]
            return config.replace(feedforward=shortest_endings(found, list(modules)) if found else [])
        for entry in config.feedforward:
            if not any(ends_with(name, entry) for name in modules):
                raise TargetError(
                    f"no adapted module matches '{entry}' (LoraConfig.feedforward)"
                    f"{did_you_mean(entry, {name.rpartition('.')[2] for name in modules})}\n"
                    f"  adapted are {listing(modules, 4)}"
                )
        return config

    @classmethod
    def fresh(cls, layer: LoraLayer, name: str, config: LoraConfig, trainable: bool) -> Self:
        _check_layer(layer, name)
        check_not_packed(name, config, "(IA)³")
        feedforward = any(ends_with(name, entry) for entry in config.feedforward or ())
        size = _sizes(layer)[0 if feedforward else 1]
        return cls(torch.ones(size, dtype=master_dtype(layer), device=device_of(layer)), feedforward, trainable)

    @classmethod
    def of(cls, layer: LoraLayer, name: str, value: Ia3, config: LoraConfig, trainable: bool) -> Self:
        _check_layer(layer, name)
        if value.layout(base_of(layer).shape(layer), conv1d=layer.lora_transposed) is not layer.lora_transposed:
            size_in, size_out = _sizes(layer)
            raise AdapterError(
                f"the adapter's (IA)³ factors do not fit '{name}' ({type(layer).__name__.removeprefix('Lora')}): they "
                f"are for {value.vector.shape[0]} {'inputs' if value.feedforward else 'outputs'}; it has {size_in} "
                f"inputs and {size_out} outputs"
            )
        dtype = master_dtype(layer) if trainable else None
        return cls(value.vector.detach().to(device_of(layer), dtype, copy=True), value.feedforward, trainable)

    def value(self, layer: LoraLayer) -> Ia3:
        shape = base_of(layer).shape(layer)
        own = Ia3(self.vector.detach(), self.feedforward, len(shape), None, layer.lora_transposed)
        return own.on_weight(shape, layer.lora_transposed)

    def change(self, layer: LoraLayer, x: Tensor, y0: Tensor) -> Tensor:
        apart = self.vector - 1
        if not self.feedforward:
            return y0 * _by_channel(layer, apart, y0).to(y0.dtype)
        y = mixin_and_base(type(layer))[1].forward(layer, x * _by_channel(layer, apart, x).to(x.dtype))
        bias = getattr(layer, "bias", None)
        return y if bias is None else y - _by_channel(layer, bias, y).to(y.dtype)

    def of_input(self, layer: LoraLayer, x: Tensor, weight: float) -> Tensor | None:
        if not self.feedforward:
            return None
        # The product is rounded, and not the factors: near 1, bf16 has none that is less than 1/256 away.
        return (x * (1 + weight * _by_channel(layer, self.vector - 1, x))).to(x.dtype)

    def rows(self, layer: LoraLayer, weight: float) -> Rows:
        """Zeros: all of the change is in the gain."""
        return lambda rows, block: torch.zeros_like(block.flatten(1), dtype=torch.float32)

    def weight_gain(self, layer: LoraLayer) -> Tensor:
        return self.value(layer).factors_on(base_of(layer).shape(layer), layer.lora_transposed)

    def bias_gain(self, layer: LoraLayer) -> Tensor | None:
        return None if self.feedforward else self.vector.detach().double()

    def extra_repr(self) -> str:
        return f"{'inputs' if self.feedforward else 'outputs'}={self.vector.shape[0]}"


Live = Ia3Factors


def _sizes(layer: LoraLayer) -> tuple[int, int]:
    """(inputs, outputs) of a linear or a convolution."""
    if isinstance(layer, ConvLayer):
        return layer.in_channels, base_of(layer).shape(layer)[0]
    return layer.lora_sizes()


def _by_channel(layer: LoraLayer, vector: Tensor, like: Tensor) -> Tensor:
    """Return a vector over the inputs or outputs in a shape that broadcasts to such a tensor."""
    return vector.view(-1, *(1 for _ in layer.kernel_size)) if isinstance(layer, ConvLayer) else vector


def _check_layer(layer: LoraLayer, name: str) -> None:
    mixin = mixin_and_base(type(layer))[0]
    if mixin in (LinearLayer, Conv1DLayer, ConvLayer):
        return
    what = "an embedding" if layer.lora_kind == "embedding" else f"a {type(layer).__name__.removeprefix('Lora')}"
    raise TargetError(
        f"'{name}' is {what}, for which (IA)³ is not defined (nor is it in PEFT)\n"
        "  remove it from the targets, or use variant='lora'"
    )
