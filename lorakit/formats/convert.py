"""Convert an adapter to another format: what that cannot hold is an error, or is left out with `allow_loss`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from ..adapter.adapter import Adapter
from ..adapter.algebra.edit import as_lora
from ..errors import AdapterError


@dataclass(frozen=True)
class Converted:
    """What was written. `lost`: what was left out, one line each."""

    path: Path
    format: str
    adapter: Adapter
    lost: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "to": self.format,
            "path": str(self.path),
            "modules": len(self.adapter.updates),
            "parameters": self.adapter.parameters,
            "left_out": self.lost,
        }


def convert(
    adapter: Adapter,
    out: str | Path,
    to: str,
    *,
    base: Any = None,
    dtype: torch.dtype | Literal["q8_0"] | None = None,
    allow_loss: bool = False,
    keep_alpha: bool = False,
) -> Converted:
    """Write `adapter` to `out` in the format `to`. `base`, `dtype`, `keep_alpha`: as in `save`.

    A VeRA becomes the LoRA that it is where the format has no VeRA. AdapterError lists what the format cannot hold;
    with `allow_loss` that is left out and listed in the result.
    """
    from . import losses, save

    lost = losses(adapter, to)
    plain = as_lora(adapter) if lost else adapter
    if plain is not adapter:
        adapter, lost = plain, losses(plain, to)
    of_path = [line for line in losses(adapter, to, Path(out)) if line not in lost]
    if of_path:  # because of the file's ending: leaving something out would not help
        raise AdapterError(f"{out} cannot hold this adapter:\n  " + "\n  ".join(of_path))
    if lost and not allow_loss:
        raise AdapterError(
            f"{to} cannot hold all of this adapter:\n  "
            + "\n  ".join(lost)
            + "\n  --allow-loss (allow_loss=True) leaves that out"
        )
    ready = without_losses(adapter, lambda a: losses(a, to)) if lost else adapter
    return Converted(save(ready, out, to, dtype=dtype, base=base, keep_alpha=keep_alpha), to, ready, lost)


def without_losses(adapter: Adapter, losses: Callable[[Adapter], list[str]]) -> Adapter:
    """The adapter without the updates, saved weights and embeddings that `losses` objects to, each judged by itself.
    AdapterError if nothing is left, or the rest still cannot be held.
    """
    alone = replace(adapter, updates={}, saved={}, embeddings={})
    left = replace(
        adapter,
        updates={m: u for m, u in adapter.updates.items() if not losses(replace(alone, updates={m: u}))},
        saved={n: t for n, t in adapter.saved.items() if not losses(replace(alone, saved={n: t}))},
        embeddings={n: t for n, t in adapter.embeddings.items() if not losses(replace(alone, embeddings={n: t}))},
    )
    if not (left.updates or left.saved or left.embeddings):
        raise AdapterError("the format cannot hold any part of this adapter")
    low_rank = {m: u for m, u in left.updates.items() if u.factors is not None}
    if low_rank and len(low_rank) < len(left.updates) and losses(left):
        left = replace(left, updates=low_rank)  # each fits by itself, and the format holds one kind a file
    still = losses(left)
    if still:
        raise AdapterError(
            "what the format cannot hold is not a single part that could be left out:\n  " + "\n  ".join(still)
        )
    return left
