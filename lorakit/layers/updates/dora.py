"""DoRA on a live module (Liu et al. 2024, equation 5): the magnitude m of W + D is trained apart from its direction.

    y = base(x) + (g - 1)(base(x) - b) + g ∘ D x        g = m / ‖W + D‖

m has one element for each output, and the norms are those of the rows of W + D. D is another update: s · B A, or any
kind that can be attached. As in the paper and in PEFT, the norm counts as a constant in the gradient. For a pair of
low-rank matrices it is computed by factoring (`ops.row_norms`), and DoRA is a pair with a gain, so that layers can fuse
and batch it. Without gradients, g and g ∘ B are computed once, until a parameter or the layer's weight changes.

Some files have one m for each input instead (kohya's "dora_scale" [1, in]): y = base(g ∘ x) + D (g ∘ x).

PEFT drops elements of x in (g - 1) W x too where there is dropout; here only D's input has dropout, so the base's
product is not computed twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...adapter.dora import Dora
from ...adapter.lora import Factors
from ...adapter.update import Rows
from ...config import LoraConfig
from ...errors import AdapterError, StateError
from ...ops.delta import as_matrices, row_blocks
from ...ops.row_norms import row_norms, row_squares
from ..bases import base_of
from ..versions import Versions
from .update import LiveUpdate, Pair, device_of, live, master_dtype

if TYPE_CHECKING:
    from ..layer import LoraLayer


class GainedPair(NamedTuple):
    """s · B A with a gain g [out], which B includes."""

    A: Tensor
    B: Tensor
    scale: float
    dropout: float
    gain: Tensor


class _Kept(NamedTuple):
    """What was computed from tensors of these versions."""

    versions: Versions
    gain: Tensor
    pair: GainedPair | None


class DoraFactors(LiveUpdate):
    """One adapter's DoRA of one module. `inner`: D; `magnitude`: m, [out, 1], or [1, in] with `by_output` False."""

    starts = True

    def __init__(self, inner: LiveUpdate, magnitude: Tensor, by_output: bool, trainable: bool):
        super().__init__()
        self.inner = inner
        self.magnitude = nn.Parameter(magnitude, requires_grad=trainable)
        self.by_output, self.rank = by_output, inner.rank
        self.width = inner.width if by_output else 0
        self._squares: tuple[Versions, Tensor] | None = None  # ‖W‖² of each output (input), while W is the same
        self._kept: _Kept | None = None

    @classmethod
    def fresh(cls, layer: LoraLayer, name: str, config: LoraConfig, trainable: bool) -> Self:
        """Create an update of a fresh LoRA and m = ‖W‖. Raises as LoRA does, and StateError if W is offloaded."""
        if base_of(layer).device(layer).type == "meta" != device_of(layer).type:
            raise StateError(
                f"'{name}' is offloaded, and DoRA starts from the norms of its weight\n"
                "  keep this module in memory while the adapter is attached, or use variant='lora'"
            )
        inner = live("lora").fresh(layer, name, config, trainable)
        out = layer.lora_shapes(1)[1][0]
        update = cls(inner, torch.zeros(out, 1, dtype=master_dtype(layer), device=device_of(layer)), True, trainable)
        with torch.no_grad():
            update.magnitude.copy_(update.norm(layer).view(-1, 1))
        return update

    @classmethod
    def of(cls, layer: LoraLayer, name: str, value: Dora, config: LoraConfig, trainable: bool) -> Self:
        inner = value.inner
        if isinstance(inner, Factors) and inner.A.shape[0] != inner.B.shape[1]:
            raise AdapterError(
                f"'{name}' is a DoRA of a grouped convolution in PEFT's form, whose A reads across the groups, so that "
                "W + D has no norm\n  train it again with lorakit, whose A reads the inputs of a group"
            )
        if not value.by_output and layer.lora_kind == "conv" and any(size > 1 for size in layer.weight.shape[2:]):
            raise AdapterError(
                f"'{name}' is a DoRA with a magnitude for each input of a convolution's kernel, which cannot be "
                "attached to a live model\n  merge it into the base's files: lorakit merge"
            )
        held = live(inner.variant).of(layer, name, inner, config, trainable)
        dtype = master_dtype(layer) if trainable else None
        return cls(held, value.magnitude.detach().to(device_of(layer), dtype, copy=True), value.by_output, trainable)

    def begin(self, layer: LoraLayer, values: tuple[Tensor, Tensor] | None, subtracted: bool) -> None:
        self.inner.begin(layer, values, subtracted)
        self.width = self.inner.width
        with torch.no_grad():
            self.magnitude.copy_(self.norm(layer).view(-1, 1))  # D may not be zero any more (LoftQ)

    def faster(self, layer: LoraLayer) -> tuple[str, ...]:
        """Those of D, and the magnitude, as PEFT has it."""
        inner = self.inner.faster(layer)
        return (*(f"inner.{name}" for name in inner), "magnitude") if inner else ()

    def freeze_a(self, layer: LoraLayer, name: str) -> None:
        self.inner.freeze_a(layer, name)

    def value(self, layer: LoraLayer) -> Dora:
        return Dora(self.inner.value(layer), self.magnitude.detach())

    # The forward

    def pair(self, layer: LoraLayer) -> Pair | None:
        if not self.width:
            return None
        kept = self._known(layer)
        return self._paired(layer, self._gain(layer)) if kept is None else kept.pair

    def change(self, layer: LoraLayer, x: Tensor, y0: Tensor) -> Tensor:
        kept = self._known(layer)
        g = self._gain(layer) if kept is None else kept.gain
        if self.by_output:
            low = self.inner.change(layer, x, y0) * layer.lora_by_output(g, y0).to(y0.dtype)
            return layer.lora_gained(low, y0, g - 1)
        if layer.lora_kind == "embedding":
            own = F.embedding(x, g.view(-1, 1))
            return torch.addcmul(own.to(y0.dtype) * self._inner(layer, x, y0), y0, (own - 1).to(y0.dtype))
        g = g.view(-1, *(1,) * (x.dim() - 2)) if layer.lora_kind == "conv" else g
        W = _dense(layer).to(x.dtype)  # that of a quantized base is float32, and would make the activations so
        base = layer.lora_apply(x * (g - 1).to(x.dtype), W).to(y0.dtype)
        return base + self._inner(layer, x * g.to(x.dtype), y0)

    def _inner(self, layer: LoraLayer, x: Tensor, y0: Tensor) -> Tensor:
        """Return D x."""
        pair = self.inner.pair(layer)
        if pair is None:
            return self.inner.change(layer, x, y0)
        return layer.lora_branch(x, pair, y0) * pair.scale

    def _paired(self, layer: LoraLayer, g: Tensor) -> GainedPair:
        pair = self.inner.pair(layer)
        assert pair is not None
        return GainedPair(pair.A, layer.lora_times_outputs(pair.B, g), pair.scale, pair.dropout, g)

    def _gain(self, layer: LoraLayer) -> Tensor:
        """Return g [out] or [in], in float32 or float64. A row of zeros has no direction, and stays zero."""
        norm = self.norm(layer)
        return self.magnitude.to(norm.dtype).flatten() / torch.where(norm > 0, norm, torch.inf)

    def _known(self, layer: LoraLayer) -> _Kept | None:
        """Return g and the pair from the last call, or computed now to be kept; None if they must not be kept."""
        trains = self.training or torch.is_grad_enabled()
        if torch.compiler.is_compiling() or (trains and any(p.requires_grad for p in self.parameters())):
            self._kept = None
            return None
        tensors = [*_tensors(layer), *_tensors(self), *_tensors(self.inner)]
        if self._kept is not None and self._kept.versions.are(tensors):
            return self._kept
        self._kept = None
        versions = Versions.of(tensors) if _is_stored(layer) else None
        if versions is None:
            return None
        with torch.inference_mode(False), torch.no_grad():  # it outlives the call, which may be in inference mode
            g = self._gain(layer)
            pair = self._paired(layer, g) if self.width else None
            base = base_of(layer)
            if pair is not None and base.quantization is None and base.dtype(layer).itemsize == 2:
                pair = pair._replace(B=pair.B.to(base.dtype(layer)))  # as each product would round it
        self._kept = _Kept(versions, g, pair)
        return self._kept

    # The norm

    def norm(self, layer: LoraLayer) -> Tensor:
        """Return ‖W + D‖ of each output, or of each input: [out] or [in], in float32 or float64, without gradients."""
        with torch.no_grad():
            pair = self.inner.pair(layer)
            if pair is None:
                return self._exact_norm(layer).to(master_dtype(layer))
            W = _dense(layer).flatten(1)  # [out, in·k], or [in·k, out] for the norm of each input
            W = W if self.by_output != layer.lora_transposed else W.T
            A, B = as_matrices(*layer.lora_full(pair))
            if W.dtype == torch.float64:
                A, B = A.double(), B.double()
            if not self.by_output:
                A, B = B.T, A.T
            return row_norms(W, self._squares_of(layer, W), A, B, pair.scale)

    def _squares_of(self, layer: LoraLayer, W: Tensor) -> Tensor:
        tensors = _tensors(layer)
        if self._squares is not None and not torch.compiler.is_compiling() and self._squares[0].are(tensors):
            return self._squares[1]
        self._squares = None
        with torch.inference_mode(False), torch.no_grad():
            squares = row_squares(W)
        if not torch.compiler.is_compiling() and _is_stored(layer):
            versions = Versions.of(tensors)
            self._squares = None if versions is None else (versions, squares)
        return squares

    def _exact_norm(self, layer: LoraLayer) -> Tensor:
        """Return the norms in float64, of W + D formed by blocks of rows."""
        W = _dense(layer)
        change = self.inner.rows(layer, 1.0)
        by_row = self.by_output != layer.lora_transposed
        norms, total = [], torch.zeros(1, dtype=torch.float64, device=W.device)
        for rows in row_blocks(W.shape):
            V = W[rows].flatten(1).double() + change(rows, W[rows])
            if by_row:
                norms.append(V.norm(dim=1))
            else:
                total = total + V.square().sum(0)
        return torch.cat(norms) if by_row else total.sqrt()

    # Merging

    def rows(self, layer: LoraLayer, weight: float) -> Rows:
        return self.inner.rows(layer, weight)

    def weight_gain(self, layer: LoraLayer) -> Tensor:
        with torch.no_grad():
            norm = self._exact_norm(layer)
            g = self.magnitude.to(norm).flatten() / torch.where(norm > 0, norm, torch.inf)
            return g.view(-1, 1) if self.by_output != layer.lora_transposed else g.view(1, -1)

    def forget_computed(self) -> None:
        self._squares = self._kept = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_squares": None, "_kept": None}  # a copy has other tensors

    def extra_repr(self) -> str:
        return f"magnitude={list(self.magnitude.shape)}"


Live = DoraFactors


def _dense(layer: LoraLayer) -> Tensor:
    """Return the layer's weight, dense and detached."""
    weight: Tensor | None = layer._parameters.get("weight")
    # What torch.compile can follow. A weight of 8-bit floats has scales besides.
    if type(weight) is nn.Parameter and weight.is_floating_point() and weight.itemsize > 1:
        return weight.detach()
    return base_of(layer).dense(layer)


def _tensors(module: nn.Module) -> list[Tensor]:
    """Return a module's own parameters and buffers."""
    return [t for own in (module._parameters, module._buffers) for t in own.values() if t is not None]


def _is_stored(layer: LoraLayer) -> bool:
    """Whether the layer's tensors show every change of its weight: it is not computed from another module's, as
    parametrizations do, and not trained.
    """
    if base_of(layer).quantization is not None:
        return True
    weight = layer.weight
    return not weight.requires_grad and any(own is weight for own in layer._parameters.values())
