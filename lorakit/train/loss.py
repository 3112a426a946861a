"""The language-model loss over trained positions only.

    loss = Σ −log p(label | prefix) / N        over positions whose label is not −100; N is the whole accumulated step's count

The sum is also given row by row: of a batch whose rows belong to several adapters each row is divided by its own adapter's N.

Only the hidden states of trained positions reach the output projection: a hook on the model's own output layer picks them,
so whatever the architecture does before or after it (scaling, soft-capping) still happens. Where the logits of those rows
would be large they are made, and in backward made again, in chunks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..data.batches import IGNORED
from ..errors import TrainError

# Logits of at most so many bytes (as float32) are made at once: beyond, chunks of this size are recomputed in backward.
# Recomputing costs one more projection, so it is for large vocabularies and long batches only.
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
    """The positions whose logits are made, [rows, length − 1]: the trained ones, and as many more as `POSITIONS` asks for."""
    chosen = batch["labels"][:, 1:] != IGNORED
    more = -int(chosen.sum()) % POSITIONS
    if more:
        chosen.view(-1)[(~chosen).view(-1).nonzero()[:more, 0]] = True  # their labels say that they count for nothing
    return chosen


def _losses(model: nn.Module, batch: dict[str, Tensor], chosen: Tensor) -> Tensor:
    """−log p of each of the N chosen positions (`chosen`: [rows, length − 1]), row after row, zero where untrained: [N], float32."""
    targets = batch["labels"][:, 1:][chosen]
    picked = Picked(chosen)
    layer = _output_layer(model)
    handles = [layer.register_forward_pre_hook(picked), layer.register_forward_hook(picked.note)]
    try:
        # No attention mask: rows are padded on the right, and a causal model never looks there; the plain causal kernel is
        # faster. The last position predicts nothing that is known, so it is not computed.
        logits = model(input_ids=batch["input_ids"][:, :-1], use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    if picked.hidden is None:
        raise TrainError(f"{type(model).__name__} did not call its output layer, so the loss over trained positions cannot be computed")
    if logits.dim() == 2:
        return F.cross_entropy(logits.float(), targets, reduction="none")
    if picked.made is None or not torch.equal(picked.made, logits):  # found by comparing, so no list of architectures has to be right
        raise TrainError(
            "this architecture changes its logits after the output layer, so its loss cannot be made in chunks\n"
            f"  use a smaller micro_batch (the logits of this one would be over {MAX_LOGITS_BYTES >> 20} MiB)"
        )
    return _chunked(layer, picked.hidden, targets, rows=max(1, MAX_LOGITS_BYTES // (4 * logits.shape[-1])))


class Picked:
    """The hook: hands the output layer the trained positions only, flattened, or, where their logits are too large, one of them."""

    def __init__(self, chosen: Tensor):
        self.chosen = chosen
        self.hidden: Tensor | None = None
        self.made: Tensor | None = None

    def __call__(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = self.hidden = args[0][self.chosen]  # [N, width]
        rows, vocabulary = hidden.shape[0], getattr(layer, "out_features", 0)
        if rows * vocabulary * 4 <= MAX_LOGITS_BYTES:
            return hidden, *args[1:]
        return hidden[:1, None], *args[1:]  # [1, 1, width]: three axes tell that there is more

    def note(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """What the output layer made of the one position, to be compared with what the model returns."""
        if output.dim() == 3:
            self.made = output.detach().clone()  # a copy, as the model may go on with it in place


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
        raise TrainError(f"{type(inner).__name__} has no output embeddings (get_output_embeddings); a language model is expected")
    return layer
