"""The language-model loss over trained positions only.

    loss = Σ −log p(label | prefix) / N        over positions whose label is not −100; N counts those of the entire
                                               accumulated step

The sum is also available per row: in a batch that mixes adapters, each row is divided by its own adapter's N.

A hook selects the hidden states of trained positions at the model's output layer, so anything the architecture does
before or after that layer (scaling, soft-capping) still happens. If the model returns the output layer's logits
unchanged, they need not exist all at once: a frozen output layer is fused with the loss (`ops.fused.cross_entropy`);
with any other, large logits are computed in chunks and recomputed in backward.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...errors import TrainError
from ...layers.frozen import frozen_linear, is_hooked
from ...ops import IGNORE_INDEX
from ...ops.fused.cross_entropy import linear_cross_entropy
from ...ops.linear import needs_plain

# Logits of an output layer that is not frozen are computed at once up to this size (bytes, as float32); beyond, in
# chunks of this size that backward recomputes. Recomputing costs one more projection, so it is kept for large
# vocabularies and long batches.
MAX_LOGITS_BYTES = 1 << 29
# The number of positions is rounded up to a multiple of this: varying sizes fragment the C allocator's heap.
POSITIONS_MULTIPLE = 64


def summed_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return Σ −log p over the trained positions of a right-padded batch, a float32 scalar.

    `batch`: `input_ids` and `labels`, [rows, length]. Raises TrainError for a model without an output layer.
    """
    return _losses(model, batch, _selected(batch)).sum()


def row_losses(
    model: nn.Module, batch: dict[str, Tensor], besides: Mapping[str, Tensor] = MappingProxyType({})
) -> Tensor:
    """Return the same sum per row: [rows], float32. The batch may be packed (`data.packing.collate_packed`).

    besides: further inputs of the model, which it gets as they are, such as pictures.
    """
    selected = _selected(batch)
    losses = _losses(model, batch, selected, besides)
    if "row" in batch:
        of_row = F.one_hot(batch["row"][:, 1:][selected], len(batch["sizes"]))  # [N, rows]
        return (of_row * losses[:, None]).sum(0)
    return losses.new_zeros(selected.shape).masked_scatter(selected, losses).sum(1)


def _selected(batch: dict[str, Tensor]) -> Tensor:
    """Select the positions to compute logits for, [rows, length − 1]: all trained ones, padded with untrained ones to a
    multiple of `POSITIONS_MULTIPLE`.
    """
    selected = batch["labels"][:, 1:] != IGNORE_INDEX
    padding = -int(selected.sum()) % POSITIONS_MULTIPLE
    if padding:
        selected.view(-1)[(~selected).view(-1).nonzero()[:padding, 0]] = True  # their label gives them a loss of zero
    return selected


def _losses(
    model: nn.Module, batch: dict[str, Tensor], selected: Tensor, besides: Mapping[str, Tensor] = MappingProxyType({})
) -> Tensor:
    """Return −log p of the N selected positions (`selected`: [rows, length − 1]) in row order, zero where untrained:
    [N], float32.
    """
    # Without an attention mask the faster, plain causal kernel runs: no token attends to padding on its right. The last
    # position has no label, so it is not computed. Packed rows are told by their positions.
    inputs = {name: tensor[:, :-1] for name, tensor in batch.items() if name in ("input_ids", "position_ids")}
    return position_losses(model, {**inputs, **besides}, selected, batch["labels"][:, 1:][selected])


def position_losses(model: nn.Module, inputs: dict[str, Tensor], selected: Tensor, targets: Tensor) -> Tensor:
    """Return −log p of the targets [N] at the selected positions, in row order: [N], float32.

    inputs: what the model is called with. selected: positions of its output layer, [rows, length].
    """
    layer = _output_layer(model)
    select = SelectPositions(
        selected, _is_frozen_end(model, layer, inputs), _at_once(model, layer, inputs, len(targets))
    )
    handle = layer.register_forward_pre_hook(select)
    try:
        logits = model(**inputs, use_cache=False).logits
    finally:
        handle.remove()
    if select.hidden is None:
        raise TrainError(
            f"{type(model).__name__} did not call its output layer (get_output_embeddings), so the loss over trained "
            "positions cannot be computed\n"
            "  expected a forward that computes the logits with it; choose another base"
        )
    if select.fused:
        assert isinstance(layer, nn.Linear)
        return linear_cross_entropy(select.hidden, layer.weight, layer.bias, targets)
    if logits.dim() == 2:
        # Without gradients, a chunk at a time avoids a float32 copy and a softmax of all logits.
        rows = len(logits) if torch.is_grad_enabled() else POSITIONS_MULTIPLE
        chunks = zip(logits.split(rows), targets.split(rows), strict=True)
        return torch.cat([F.cross_entropy(chunk.float(), labels, reduction="none") for chunk, labels in chunks])
    if not _is_last(model, layer, inputs):
        raise TrainError(
            "this architecture changes its logits after the output layer, so its loss cannot be computed in chunks\n"
            f"  use a smaller micro_batch (its logits would take over {MAX_LOGITS_BYTES >> 20} MiB)"
        )
    return _chunked(layer, select.hidden, targets, rows=max(1, MAX_LOGITS_BYTES // (4 * logits.shape[-1])))


class SelectPositions:
    """A forward pre-hook of the output layer that passes on the selected positions only, as [N, width].

    If the layer is not to compute their logits now (fused, or in chunks), it gets a single position instead.
    """

    def __init__(self, selected: Tensor, fused: bool, at_once: bool):
        self.selected, self.fused, self.at_once = selected, fused, at_once
        self.hidden: Tensor | None = None

    def __call__(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = self.hidden = args[0][self.selected]  # [N, width]
        self.fused = self.fused and frozen_linear(layer, hidden) is not None
        if not self.fused and self.at_once:
            return hidden, *args[1:]
        return hidden[:1, None], *args[1:]  # [1, 1, width]: three axes mark that these are not all the logits


def _is_frozen_end(model: nn.Module, layer: nn.Module, inputs: dict[str, Tensor]) -> bool:
    """Whether the loss can be fused with the output layer: a plain, frozen linear without hooks whose logits the model
    returns unchanged. The hook checks once more, on the layer's actual input.
    """
    return (
        type(layer) is nn.Linear
        and not layer.weight.requires_grad
        and not is_hooked(layer)
        and not needs_plain()
        and _is_last(model, layer, inputs)
    )


def _at_once(model: nn.Module, layer: nn.Module, inputs: dict[str, Tensor], count: int) -> bool:
    """Whether an output layer that is not fused computes the logits of all `count` positions at once.

    Large logits are split unless the model changes them after the output layer. Then evaluation computes them at once,
    and training, which keeps them for backward, raises an error.
    """
    if count * getattr(layer, "out_features", 0) * 4 <= MAX_LOGITS_BYTES:
        return True
    return not torch.is_grad_enabled() and not _is_last(model, layer, inputs)


_last: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # output layer -> result of `_is_last`


def _is_last(model: nn.Module, layer: nn.Module, inputs: dict[str, Tensor]) -> bool:
    """Whether the model returns its output layer's logits unchanged. Compares the two once, which needs no list of
    architectures.
    """
    if layer in _last:
        return _last[layer]
    outputs: list[Tensor] = []
    # a clone, since the model may change the output in place
    handle = layer.register_forward_hook(lambda layer, args, out: outputs.extend((out, out.detach().clone())))
    first = {name: inputs[name][:, :1] for name in ("input_ids", "decoder_input_ids") if name in inputs}
    device = inputs["input_ids"].device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            logits = model(**first, use_cache=False).logits
    finally:
        handle.remove()
    if not outputs:
        return False
    out, copy = outputs[-2:]
    if type(logits) is not Tensor:  # `lorakit plan` has no values to compare
        _last[layer] = logits is out
        return _last[layer]
    if not logits.any():  # scaling would leave zeros unchanged, so they prove nothing
        return False
    _last[layer] = logits.dtype == copy.dtype and torch.equal(logits, copy)
    return _last[layer]


def _chunked(layer: nn.Module, hidden: Tensor, targets: Tensor, rows: int) -> Tensor:
    """Return the losses of `hidden` [N, width]: [N]. Computes `rows` rows of logits at a time, again in backward."""

    def chunk_losses(chunk: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(layer(chunk).float(), labels, reduction="none")

    losses: list[Tensor] = []
    for chunk, labels in zip(hidden.split(rows), targets.split(rows), strict=True):
        losses.append(cast(Tensor, checkpoint(chunk_losses, chunk, labels, use_reentrant=False)))
    return torch.cat(losses)


def _output_layer(model: nn.Module) -> nn.Module:
    inner: Any = getattr(model, "module", model)  # DistributedDataParallel
    layer = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if layer is None:
        raise TrainError(
            f"{type(inner).__name__} has no output embeddings (get_output_embeddings)\n"
            "  expected a language model, such as one of AutoModelForCausalLM"
        )
    return layer
