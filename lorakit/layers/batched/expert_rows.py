"""Check the rows of a batch that reaches experts inside `lorakit.route`.

Experts get tokens without an axis of rows, [rows · length, h], so that a batch of twice as many rows as choices would
look like rows of twice the length. The block that holds them gets [rows, length, h], and is asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from ..layer import LoraLayer
from .routes import Routing


@contextmanager
def checked(model: nn.Module, routing: Routing, experts: Iterable[tuple[str, LoraLayer]]) -> Iterator[None]:
    """Return a context in which the blocks around these experts raise StateError for a batch of other rows.

    `experts`: adapted weights of experts, by full name (`...mlp.experts.down_proj`, of the block `...mlp`).
    """
    blocks: dict[str, LoraLayer] = {}
    for name, layer in experts:
        blocks.setdefault(".".join(name.split(".")[:-2]), layer)
    with ExitStack() as stack:
        for name, layer in blocks.items():
            if name:

                def check(module: nn.Module, args: tuple[Any, ...], layer: LoraLayer = layer) -> None:
                    if args and isinstance(args[0], Tensor) and args[0].dim() == 3:
                        routing.tokens(layer, args[0])

                stack.callback(model.get_submodule(name).register_forward_pre_hook(check).remove)
        yield
