"""The language-model loss over trained positions only.

    loss = Σ −log p(label | prefix) / N        over positions whose label is not −100; N is the whole accumulated step's
                                               count

The sum is also given row by row: of a batch whose rows belong to several adapters each row is divided by its own
adapter's N.

Only the hidden states of trained positions reach the output layer: a hook on the model's own picks them, so whatever
the architecture does before or after it (scaling, soft-capping) still happens. Where nothing comes after it, the logits
need not be there all at once: a frozen output layer is one operation with the loss (`ops.cross_entropy`); of another
one they are made, and in backward made again, in chunks, if they are large.
"""

from __future__ import annotations

from typing import Any
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

# Logits of at most so many bytes (as float32) are made at once of an output layer that is not frozen: beyond, chunks of
# this size are recomputed in backward. Recomputing costs one more projection, so it is for large vocabularies and long
# batches only.
MAX_LOGITS_BYTES = 1 << 29
# Logits are made for a multiple of so many positions. Ever other sizes leave holes in the C allocator's memory.
POSITIONS = 64


def summed_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Σ −log p over the trained positions of a right-padded batch (`input_ids`, `labels`: [rows, length]), float32."""
    return _losses(model, batch, _chosen(batch)).sum()


def row_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The same sum for each row by itself: [rows], float32."""
    chosen = _chosen(batch)
    losses = _losses(model, batch, chosen)
    return losses.new_zeros(chosen.shape).masked_scatter(chosen, losses).sum(1)


def _chosen(batch: dict[str, Tensor]) -> Tensor:
    """The positions whose logits are made, [rows, length − 1]: the trained ones, and as many more as `POSITIONS` asks
    for.
    """
    chosen = batch["labels"][:, 1:] != IGNORE_INDEX
    more = -int(chosen.sum()) % POSITIONS
    if more:
        chosen.view(-1)[(~chosen).view(-1).nonzero()[:more, 0]] = True  # their labels say that they count for nothing
    return chosen


def _losses(model: nn.Module, batch: dict[str, Tensor], chosen: Tensor) -> Tensor:
    """−log p of each of the N chosen positions (`chosen`: [rows, length − 1]), row after row, zero where untrained:
    [N], float32.
    """
    targets = batch["labels"][:, 1:][chosen]
    layer = _output_layer(model)
    picked = Picked(
        chosen,
        _is_frozen_end(model, layer, batch["input_ids"]),
        _in_one(model, layer, batch["input_ids"], len(targets)),
    )
    handle = layer.register_forward_pre_hook(picked)
    try:
        # No attention mask: rows are padded on the right, and a causal model never looks there; the plain causal kernel
        # is faster. The last position predicts nothing that is known, so it is not computed.
        logits = model(input_ids=batch["input_ids"][:, :-1], use_cache=False).logits
    finally:
        handle.remove()
    if picked.hidden is None:
        raise TrainError(
            f"{type(model).__name__} did not call its output layer, so the loss over trained positions cannot be "
            "computed"
        )
    if picked.fused:
        return linear_cross_entropy(picked.hidden, layer.weight, layer.bias, targets)  # type: ignore[arg-type]
    if logits.dim() == 2:
        # Without gradients their float32 copy and its softmax need not be there for all of them.
        rows = len(logits) if torch.is_grad_enabled() else POSITIONS
        parts = zip(logits.split(rows), targets.split(rows), strict=True)
        return torch.cat([F.cross_entropy(part.float(), wanted, reduction="none") for part, wanted in parts])
    if not _is_last(model, layer, batch["input_ids"]):
        raise TrainError(
            "this architecture changes its logits after the output layer, so its loss cannot be made in chunks\n"
            f"  use a smaller micro_batch (the logits of this one would be over {MAX_LOGITS_BYTES >> 20} MiB)"
        )
    return _chunked(layer, picked.hidden, targets, rows=max(1, MAX_LOGITS_BYTES // (4 * logits.shape[-1])))


class Picked:
    """The hook: hands the output layer the trained positions only, flattened, or, where that is not to make their
    logits, one of them.
    """

    def __init__(self, chosen: Tensor, fused: bool, in_one: bool):
        self.chosen, self.fused, self.in_one = chosen, fused, in_one
        self.hidden: Tensor | None = None

    def __call__(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = self.hidden = args[0][self.chosen]  # [N, width]
        self.fused = self.fused and frozen_linear(layer, hidden) is not None
        if not self.fused and self.in_one:
            return hidden, *args[1:]
        return hidden[:1, None], *args[1:]  # [1, 1, width]: three axes tell that there is more


def _is_frozen_end(model: nn.Module, layer: nn.Module, ids: Tensor) -> bool:
    """Whether the output layer is a plain linear that nothing waits for or comes after. That it is frozen is seen when
    it is called.
    """
    return (
        type(layer) is nn.Linear
        and not layer.weight.requires_grad
        and not is_hooked(layer)
        and not needs_plain()
        and _is_last(model, layer, ids)
    )


def _in_one(model: nn.Module, layer: nn.Module, ids: Tensor, count: int) -> bool:
    """Whether an output layer that is not fused makes the logits of all `count` positions at once. Where something
    comes after it, it has to: too many of them are an error in training, where they are kept for backward, and none in
    an evaluation."""
    if count * getattr(layer, "out_features", 0) * 4 <= MAX_LOGITS_BYTES:
        return True
    return not torch.is_grad_enabled() and not _is_last(model, layer, ids)


_last: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # by output layer


def _is_last(model: nn.Module, layer: nn.Module, ids: Tensor) -> bool:
    """Whether the model returns its output layer's logits as they are: found by comparing, so no list of architectures
    has to be right.
    """
    if layer in _last:
        return _last[layer]
    made: list[Tensor] = []
    # it may be written into
    handle = layer.register_forward_hook(lambda layer, args, out: made.extend((out, out.detach().clone())))
    devices = [ids.device] if ids.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            logits = model(input_ids=ids[:, :1], use_cache=False).logits
    finally:
        handle.remove()
    if not made:
        return False
    out, copy = made[-2:]
    # for planning: no numbers to compare. Not noted, so that each plan counts the same work
    if type(logits) is not Tensor:
        return logits is out
    if not logits.any():  # a change may be one that leaves zero as it is
        return False
    _last[layer] = logits.dtype == copy.dtype and torch.equal(logits, copy)
    return _last[layer]


def _chunked(layer: nn.Module, hidden: Tensor, targets: Tensor, rows: int) -> Tensor:
    """The losses of all `hidden`, so many rows of logits at once."""

    def chunk_losses(part: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(layer(part).float(), wanted, reduction="none")

    parts = zip(hidden.split(rows), targets.split(rows), strict=True)
    return torch.cat([checkpoint(chunk_losses, part, wanted, use_reentrant=False) for part, wanted in parts])  # type: ignore[misc]


def _output_layer(model: nn.Module) -> nn.Module:
    inner: Any = getattr(model, "module", model)  # DistributedDataParallel
    layer = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if layer is None:
        raise TrainError(
            f"{type(inner).__name__} has no output embeddings (get_output_embeddings); a language model is expected"
        )
    return layer
