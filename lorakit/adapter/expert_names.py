"""Names of an expert's own matrices, in files and adapters that know each expert as a module.

    <experts>.gate_up_proj [E, 2·i, h]    <experts>.3.w1, <experts>.3.w3  or  <experts>.3.gate_proj, <experts>.3.up_proj
    <experts>.up_proj      [E, i, h]      <experts>.3.up_proj
    <experts>.down_proj    [E, h, i]      <experts>.3.w2                  or  <experts>.3.down_proj

where <experts> may be in a block of another name: Mixtral's block_sparse_moe is mlp in transformers 5.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

_BLOCKS = ("mlp", "block_sparse_moe", "feed_forward", "mixer")
PROJECTIONS: dict[str, tuple[tuple[str, ...], ...]] = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),  # the halves of its outputs
    "up_proj": (("up_proj",), ("w1",)),
    "down_proj": (("down_proj",), ("w2",)),
}


@dataclass(frozen=True)
class ExpertNames:
    """One way to name the experts of a parameter."""

    holder: str
    projections: tuple[str, ...]

    def of(self, expert: int) -> list[str]:
        """Return the names of an expert's matrices, whose outputs follow each other in the parameter."""
        return [f"{self.holder}.{expert}.{projection}" for projection in self.projections]


def ways(parameter: str) -> Iterator[ExpertNames]:
    """Yield the ways in which the experts of a parameter may be named. `parameter`: its full name."""
    holder, _, last = parameter.rpartition(".")
    front, _, experts = holder.rpartition(".")
    outer, _, block = front.rpartition(".")
    holders = [holder]
    if block in _BLOCKS:
        holders += [".".join(filter(None, (outer, other, experts))) for other in _BLOCKS if other != block]
    for each in holders:
        for projections in PROJECTIONS.get(last, ()):
            yield ExpertNames(each, projections)
