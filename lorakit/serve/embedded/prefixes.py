"""Keys and values of prompts that were computed before, by choice of adapters and token ids.

    found = prefixes.find(choice, ids)             # KeptStart(length, keys_values) of the longest known start, or None
    prefixes.keep(choice, ids, keys_values)        # copies what is not known yet

Each choice has a radix tree: an edge is a run of token ids with the keys and values of their positions, so prompts with
the same start share them, and a start may end at any token. A choice names adapters by content hash, and their weights:
after a reload, or with another scale, nothing of the old is found. Used by the engine's thread alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..engine import Choice

KeysValues = list[tuple[Tensor, Tensor]]  # for each layer: keys and values, each [heads, positions, head_dim]
LEAST = 16  # tokens; a shorter start is computed about as fast as it is copied
_ID_BYTES = 36  # of a token id, as a Python integer in a tuple


@dataclass(frozen=True)
class KeptStart:
    """The first `length` positions of a prompt. The tensors may be shared with the cache: to be read, not written."""

    length: int
    keys_values: KeysValues


@dataclass(eq=False)
class _Node:
    """A run of tokens after the parent's. A root has no tokens."""

    choice: Choice
    ids: tuple[int, ...] = ()
    keys_values: KeysValues = field(default_factory=list)
    parent: _Node | None = None
    children: dict[int, _Node] = field(default_factory=dict)  # by their first token

    def size(self) -> int:
        """Bytes."""
        tensors = sum(tensor.numel() * tensor.element_size() for layer in self.keys_values for tensor in layer)
        return tensors + _ID_BYTES * len(self.ids)


class Prefixes:
    """Starts of prompts, the most recently used ones, in at most `budget_bytes` (0: nothing is kept)."""

    def __init__(self, budget_bytes: int):
        self.budget_bytes = budget_bytes
        self.bytes = 0
        self._roots: dict[Choice, _Node] = {}
        # By last use, and a parent always after its children, so that the first is a leaf.
        self._order: OrderedDict[_Node, None] = OrderedDict()

    def find(self, choice: Choice, ids: Sequence[int]) -> KeptStart | None:
        """Return the longest known start of `ids`, of at least `LEAST` tokens, and never all: the last is computed."""
        root = self._roots.get(choice)
        if root is None or len(ids) <= LEAST:
            return None
        path, length = _walk(root, tuple(ids[:-1]))
        self._touch(path)
        if length < LEAST:
            return None
        excess = sum(len(node.ids) for node in path) - length  # of the last run, which may agree in part
        runs = [node.keys_values for node in path]
        runs[-1] = _positions(runs[-1], 0, len(path[-1].ids) - excess)
        return KeptStart(length, _joined(runs))

    def keep(self, choice: Choice, ids: Sequence[int], keys_values: KeysValues) -> None:
        """Remember the positions of `ids`. keys_values: of these positions; more that follow them are ignored.

        What is new is copied, so the tensors may be views of a buffer that changes later. New positions at the end
        count from `LEAST` of them on; of a prompt larger than the budget the start is kept.
        """
        if not ids or not keys_values:
            return
        per_token = _ID_BYTES + sum(
            tensor[:, 0].numel() * tensor.element_size() for pair in keys_values for tensor in pair
        )
        known = tuple(ids[: self.budget_bytes // per_token])
        if len(known) < LEAST:
            return
        root = self._roots.get(choice) or _Node(choice)
        path, length = _walk(root, known)
        new = known[length:]
        if len(new) >= LEAST:
            end = path[-1] if path else root
            excess = sum(len(node.ids) for node in path) - length
            # Memory may be short for any of the copies, so all are made before the tree changes.
            copied = _copied(_positions(keys_values, length, len(known)))
            if excess:  # the prompts part within a run
                end = self._split(end, len(end.ids) - excess)
                path[-1] = end
            self._roots[choice] = root
            path.append(self._add(end, new, copied))
        self._touch(path)
        while self.bytes > self.budget_bytes:
            self._drop(next(iter(self._order)))

    def forget(self, key: str) -> int:
        """Drop all that was computed with this adapter, in mixes too. Return the bytes freed."""
        before = self.bytes
        for node in [node for node in self._order if any(name == key for name, _ in node.choice)]:
            self._drop(node)  # children come first in the order
        return before - self.bytes

    def _touch(self, path: Sequence[_Node]) -> None:
        for node in reversed(path):
            self._order.move_to_end(node)

    def _add(self, parent: _Node, ids: tuple[int, ...], keys_values: KeysValues) -> _Node:
        node = _Node(parent.choice, ids, keys_values, parent)
        parent.children[ids[0]] = node
        self._order[node] = None
        self.bytes += node.size()
        return node

    def _split(self, node: _Node, at: int) -> _Node:
        """Cut a run before its token `at`. Return its first part, a new node; the second part keeps the children."""
        assert node.parent is not None
        before = _copied(_positions(node.keys_values, 0, at))
        after = _copied(_positions(node.keys_values, at, len(node.ids)))
        self.bytes -= node.size()
        first = self._add(node.parent, node.ids[:at], before)
        node.keys_values = after
        node.ids = node.ids[at:]
        node.parent = first
        first.children[node.ids[0]] = node
        self.bytes += node.size()
        return first

    def _drop(self, leaf: _Node) -> None:
        assert leaf.parent is not None
        del self._order[leaf]
        del leaf.parent.children[leaf.ids[0]]
        self.bytes -= leaf.size()
        if leaf.parent.parent is None and not leaf.parent.children:
            del self._roots[leaf.choice]


def _walk(root: _Node, ids: tuple[int, ...]) -> tuple[list[_Node], int]:
    """Return the nodes that agree with `ids` and how many tokens agree; of the last node, it may be some."""
    path: list[_Node] = []
    node, length = root, 0
    while length < len(ids) and (child := node.children.get(ids[length])) is not None:
        path.append(child)
        agreed = _common(child.ids, ids[length : length + len(child.ids)])
        length += agreed
        if agreed < len(child.ids):
            break
        node = child
    return path, length


def _common(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """Return how many first tokens are equal."""
    if left == right:
        return len(left)
    return next((at for at, (a, b) in enumerate(zip(left, right)) if a != b), min(len(left), len(right)))


def _positions(keys_values: KeysValues, start: int, end: int) -> KeysValues:
    return [(keys[:, start:end], values[:, start:end]) for keys, values in keys_values]


def _copied(keys_values: KeysValues) -> KeysValues:
    """Return contiguous copies, so that what they were cut from can be freed."""
    return [(_copy(keys), _copy(values)) for keys, values in keys_values]


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _joined(runs: Sequence[KeysValues]) -> KeysValues:
    if len(runs) == 1:
        return runs[0]
    return [
        (torch.cat([run[layer][0] for run in runs], 1), torch.cat([run[layer][1] for run in runs], 1))
        for layer in range(len(runs[0]))
    ]
