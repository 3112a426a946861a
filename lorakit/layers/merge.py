"""Add a module's active updates to its weight, and remove them again bit for bit (see `ops.exact`).

    W' = (1 + Σ weight · (g - 1)) ∘ W + Σ weight · g ∘ D        g: a DoRA's gain, 1 for kinds that only add

    b' = (1 + Σ weight · (h - 1)) ∘ b                         h: the factors of the bias, for kinds that scale it

So a weight scales the change that the adapter alone would make, as it does in the forward.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import StateError
from ..ops.exact import Added, Change, Scaled, Undo, add_, subtract_
from .bases import base_of
from .layer import LoraLayer
from .saved import saved_of


class Merge(NamedTuple):
    """What undoes a merge. `gains`: of each update in use (`LiveUpdate.weight_gain`), which the merged weight no longer
    shows; `bias`: what undoes that of the bias, and its factors [out, 1]; None if it stays.
    """

    undo: Undo
    gains: list[Tensor | None]
    bias: tuple[Undo, Tensor] | None = None

    def nbytes(self) -> int:
        bias = 0 if self.bias is None else self.bias[0].nbytes() + self.bias[1].nbytes
        return self.undo.nbytes() + sum(gain.nbytes for gain in self.gains if gain is not None) + bias


TIED = Merge(Undo(0), [])  # of a module whose weight another one has merged for it


def merge_module(layer: LoraLayer, name: str) -> None:
    """Add Σ weight · ΔW to the module's weight in place. `name`: the module's, for errors.

    Raises StateError for a weight or an update that cannot be merged (quantized, offloaded, ...), and for an update
    that is not finite.
    """
    for update, _ in layer.lora_in_use():
        value = update.value(layer)
        why = value.unmergeable()
        if why is not None:
            raise StateError(f"'{name}' {why}")
        for key, tensor in value.tensors().items():
            check_finite(tensor, f"{key} of '{name}'")
    weight = base_of(layer).writable(layer, name)
    with torch.no_grad():
        gains = [update.weight_gain(layer) for update, _ in layer.lora_in_use()]
        factors = _bias_factors(layer, name)
        # The bias first, which is small: if the weight then cannot be changed, it is quickly as it was.
        bias = None if factors is None else (add_(_bias(layer), _scaling(factors), f"the bias of '{name}'"), factors)
        try:
            undo = add_(weight, _change(layer, weight, gains), f"'{name}'")
        except StateError:
            _restore_bias(layer, bias, name)
            raise
        layer.lora_merged = Merge(undo, gains, bias)


def _bias_factors(layer: LoraLayer, name: str) -> Tensor | None:
    """Return the factors of the module's bias, [out, 1] in float64; None if it stays. Raises StateError for a bias that
    an adapter has a copy of, which would keep them.
    """
    bias = getattr(layer, "bias", None)
    own = [(gain, share) for u, share in layer.lora_in_use() if (gain := u.bias_gain(layer)) is not None]
    if bias is None or not own:
        return None
    child = saved_of(layer)
    if child is not None and any("bias" in child.get(adapter) for adapter in child.adapters()):
        raise StateError(
            f"'{name}' has a bias that an adapter trained, and factors of another kind that scale it, so it cannot be "
            "merged\n  keep the adapter unmerged"
        )
    total = torch.ones_like(own[0][0])
    for gain, share in own:
        total = total + share * (gain - 1)
    return total[:, None]


def _bias(layer: LoraLayer) -> Tensor:
    """Return the module's bias as one column, in the same memory."""
    assert layer.bias is not None
    return layer.bias.detach()[:, None]


def _restore_bias(layer: LoraLayer, bias: tuple[Undo, Tensor] | None, name: str) -> None:
    """Undo what a merge did to the bias. `bias`: see `Merge`. Raises StateError, and changes nothing, if that is not
    possible.
    """
    if bias is not None:
        undo, factors = bias
        subtract_(_bias(layer), _scaling(factors), undo, f"the bias of '{name}'")


def _scaling(factors: Tensor) -> Change:
    return lambda rows: Scaled(factors[rows], torch.zeros_like(factors[rows]))


def check_finite(tensor: Tensor, where: str) -> None:
    """Raise StateError for a tensor with NaN or infinity in it, which merging would spread over the weight."""
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise StateError(
            f"{where} has {bad} NaN or infinite element{'s' if bad > 1 else ''}, so it cannot be merged\n"
            "  training diverged: take an earlier checkpoint, or a lower learning rate"
        )


def unmerge_module(layer: LoraLayer, name: str) -> None:
    """Restore the weight's original bits. Raises StateError, and changes nothing, if that is not possible."""
    merge: Merge = layer.lora_merged
    layer.lora_merged = None  # so that lora_in_use returns the merged updates
    try:
        with torch.no_grad():
            weight = base_of(layer).writable(layer, name)
            _restore_bias(layer, merge.bias, name)
            try:
                if merge.undo.blocks:
                    subtract_(weight, _change(layer, weight, merge.gains), merge.undo, f"'{name}'")
            except StateError:
                if merge.bias is not None:
                    add_(_bias(layer), _scaling(merge.bias[1]))  # the same bits as the first time, so `undo` stands
                raise
    except StateError:
        layer.lora_merged = merge
        raise


def _change(layer: LoraLayer, weight: Tensor, gains: list[Tensor | None]) -> Change:
    """Return what the updates in use do to the weight's rows. `gains`: of each."""
    changes = [
        (update.rows(layer, share), gain, share)
        for (update, share), gain in zip(layer.lora_in_use(), gains, strict=True)
    ]
    scaled = any(gain is not None for gain in gains)
    # In 32 bits, the product and the sum would each be rounded, and take more codes to undo.
    wide = torch.float64 if scaled and weight.dtype in (torch.float32, torch.float64) else torch.float32

    def of(rows: slice) -> Added | Scaled:
        block = weight[rows]
        total: Tensor | None = None
        factor = torch.ones(1, 1, dtype=wide, device=weight.device)
        for change, gain, share in changes:
            part = change(rows, block)
            if scaled:
                part = part.to(wide)
            if gain is not None:
                own = (gain[rows] if len(gain) > 1 else gain).to(wide)
                part, factor = part * own, factor + share * (own - 1)
            total = part if total is None else total.add_(part)
        assert total is not None
        return Scaled(factor, total) if scaled else Added(total)

    return of
