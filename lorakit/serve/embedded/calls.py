"""How a model calls its modules: which get an axis with the batch's rows first, and return a tensor.

Inside `route` an adapted module finds each row's adapter by that axis, or each token's where rows and positions are one
axis. A module that gets only some of the tokens (one expert of several), or is called once for all rows, cannot tell
them apart; one that returns several tensors cannot have weights of its own for each row. Such an adapter would fail in
the middle of a batch with others, so it is refused when it is loaded. One forward of the base tells.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...layers.walk import base_modules

ROWS, LENGTH = 3, 5  # of the batch that is tried


class Calls:
    """What a forward showed. Made before anything is attached."""

    def __init__(self, model: nn.Module):
        self._rows: dict[nn.Module, bool] = {}  # module -> whether it gets all rows, or all tokens
        self._tensor: dict[nn.Module, bool] = {}  # module -> whether it returns a tensor
        handles = [
            module.register_forward_hook(self._see, with_kwargs=True) for name, module in base_modules(model) if name
        ]
        options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
        try:
            with torch.inference_mode():
                ids = torch.arange(1, 1 + ROWS * LENGTH, device=_device(model)).view(ROWS, LENGTH)
                model(input_ids=ids, **options)
        finally:
            for handle in handles:
                handle.remove()

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        rows = first is not None and first.dim() > 1 and first.shape[0] in (ROWS, ROWS * LENGTH)
        self._rows[module] = self._rows.get(module, True) and rows
        self._tensor[module] = self._tensor.get(module, True) and isinstance(output, Tensor)

    def why_not_adapted(self, module: nn.Module) -> str | None:
        """Say why this module's rows cannot have updates of their own; None if they can."""
        if self._rows.get(module, True):
            return None
        return "it is not given all rows of a batch, or all their tokens, as its first axis"

    def why_not_saved(self, module: nn.Module) -> str | None:
        """Say why this module's rows cannot have weights of their own; None if they can."""
        if not self._tensor.get(module, True):
            return "it returns more than one tensor"
        return self.why_not_adapted(module)


def _device(model: nn.Module) -> torch.device:
    embedding: Any = getattr(model, "get_input_embeddings", lambda: None)()
    return next((embedding if embedding is not None else model).parameters()).device
