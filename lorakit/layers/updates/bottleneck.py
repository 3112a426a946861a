"""A bottleneck adapter behind a live linear (Houlsby et al. 2019; Pfeiffer et al. 2021; Lin et al. 2020).

    y = y0 + s · (U f(D n(y0) + c) + b)       y0: the linear's output [..., out]   D: [r, out]   U: [out, r]

r is `rank`, or out / `reduction`. U and b start at zero, so that a new adapter changes nothing. It stands directly
behind the output projection of attention or feed-forward, before the residual connection.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...adapter.bottleneck import Bottleneck
from ...config import LoraConfig
from ...errors import AdapterError, ConfigError, TargetError
from ..layer import mixin_and_base
from ..linear import Conv1DLayer, LinearLayer
from .update import LiveUpdate, check_not_packed, device_of, master_dtype

if TYPE_CHECKING:
    from ..layer import LoraLayer

_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}
_SHAPED = ("down", "down_bias", "up", "up_bias", "norm", "norm_bias")


class BottleneckAdapter(LiveUpdate):
    """One adapter's bottleneck behind one linear. `norm`, `norm_bias`: None without a LayerNorm of its own."""

    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor
    norm: Tensor | None
    norm_bias: Tensor | None
    lacks = ("alpha", "rslora", "alpha_pattern", "lora_plus")
    lacking = "has no alpha and no factors A and B; bottleneck_scale is its factor"

    def __init__(self, tensors: Mapping[str, Tensor], activation: str, factor: float, dropout: float, trainable: bool):
        super().__init__()
        for name in _SHAPED:
            value = tensors.get(name)
            self.register_parameter(name, None if value is None else nn.Parameter(value, requires_grad=trainable))
        self.activation, self.factor, self.dropout = activation, factor, dropout
        self.rank = self.down.shape[0]

    @classmethod
    def fresh(cls, layer: LoraLayer, name: str, config: LoraConfig, trainable: bool) -> Self:
        _check_layer(layer, name)
        check_not_packed(name, config, "a bottleneck adapter")
        if config.reduction is not None and config.rank_of(name) != LoraConfig.model_fields["rank"].default:
            raise ConfigError(
                f"LoraConfig.rank has no effect: reduction ({config.reduction:g}) gives each bottleneck its size\n"
                "  remove one of the two"
            )
        size = layer.lora_sizes()[1]
        rank = max(1, round(size / config.reduction)) if config.reduction is not None else config.rank_of(name)
        shapes = {"down": (rank, size), "down_bias": (rank,), "up": (size, rank), "up_bias": (size,)}
        shapes |= {"norm": (size,), "norm_bias": (size,)} if config.bottleneck_norm else {}
        dtype, device = master_dtype(layer), device_of(layer)
        made = {n: torch.zeros(shape, dtype=dtype, device=device) for n, shape in shapes.items()}
        if not made["down"].is_meta:
            nn.init.kaiming_uniform_(made["down"], a=math.sqrt(5))  # as torch's linears
            if "norm" in made:
                made["norm"].fill_(1.0)
        return cls(made, config.activation, config.bottleneck_scale, config.dropout, trainable)

    @classmethod
    def of(cls, layer: LoraLayer, name: str, value: Bottleneck, config: LoraConfig, trainable: bool) -> Self:
        _check_layer(layer, name)
        size = layer.lora_sizes()[1]
        if value.up.shape[0] != size:
            raise AdapterError(
                f"the adapter's bottleneck does not fit '{name}' ({type(layer).__name__.removeprefix('Lora')}): it is "
                f"for {value.up.shape[0]} outputs; it has {size}"
            )
        dtype, device = master_dtype(layer) if trainable else None, device_of(layer)
        tensors = {n: t.detach().to(device, dtype, copy=True) for n, t in value.tensors().items()}
        return cls(tensors, value.activation, value.factor, config.dropout, trainable)

    def value(self, layer: LoraLayer) -> Bottleneck:
        own = {name: None if p is None else p.detach() for name, p in self._parameters.items()}
        return Bottleneck(**own, activation=self.activation, factor=self.factor)  # type: ignore[arg-type]

    def change(self, layer: LoraLayer, x: Tensor, y0: Tensor) -> Tensor:
        h = F.dropout(y0, self.dropout, self.training) if self.dropout else y0
        if self.norm is not None and self.norm_bias is not None:
            h = F.layer_norm(h.to(self.norm.dtype), h.shape[-1:], self.norm, self.norm_bias).to(y0.dtype)
        inner = _ACTIVATIONS[self.activation](F.linear(h, self.down.to(y0.dtype), self.down_bias.to(y0.dtype)))
        return F.linear(inner, self.up.to(y0.dtype), self.up_bias.to(y0.dtype)) * self.factor

    def extra_repr(self) -> str:
        own = ", own LayerNorm" if self.norm is not None else ""
        return f"{self.up.shape[0]} -> {self.rank} -> {self.up.shape[0]}, {self.activation}{own}"


Live = BottleneckAdapter


def _check_layer(layer: LoraLayer, name: str) -> None:
    if mixin_and_base(type(layer))[0] not in (LinearLayer, Conv1DLayer):
        raise TargetError(
            f"'{name}' is a {type(layer).__name__.removeprefix('Lora')}; a bottleneck adapter stands behind a linear\n"
            "  remove it from the targets, or use variant='lora'"
        )
