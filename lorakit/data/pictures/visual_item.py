"""A conversation with pictures as training sees it: token ids with a run of ids for each picture, a loss mask, files.

    ids       <user> ▢ ▢ ▢ ▢ what is it <assistant> a cat <end>        ▢: a picture's, as many as the base makes of it
    trained   no     no ...                         yes   yes

The ids of pictures are put in after rendering, where the chat template wrote the one id that stands for a picture, so
the mask can never be shifted against the ids.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from ...errors import DataError
from ..dataset import Item
from .check import Checked
from .decode import decode

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class VisualItem(Item):
    """An item whose conversation has these pictures, in the order in which its ids have them."""

    pictures: tuple[Checked, ...] = ()
    background: tuple[int, int, int] = (255, 255, 255)
    animated: Literal["refuse", "first"] = field(default="refuse")

    @property
    def split_key(self) -> tuple[int, ...]:
        """Rows of the same pictures are held out together; those without pictures by prompt."""
        return tuple(int(picture.content, 16) for picture in self.pictures) or super().split_key

    def digest(self) -> bytes:
        """Ids, mask, and the content of the pictures."""
        facts = (tuple(picture.content for picture in self.pictures), self.background, self.animated)
        return super().digest() + hashlib.sha256(repr(facts).encode()).digest()

    def images(self) -> list[Image]:
        """Return the pictures in RGB. Raises DataError if a file has gone or is broken."""
        made = []
        for picture in self.pictures:
            try:
                data = picture.found.read()
            except OSError as error:
                raise DataError(f"{picture.where}: cannot be read: {error.strerror or error}") from error
            made.append(decode(data, picture.where, self.background, self.animated).rgb)
        return made


def expanded(item: Item, place: int, runs: Sequence[Sequence[int]]) -> Item:
    """Return the item with a run of ids at each id `place`, in their order. None of these ids is trained.

    runs: one for each picture. Raises DataError if the item has another number of places.
    """
    count = item.ids.count(place)
    if count != len(runs):
        raise DataError(
            f"{item.where}: {len(runs)} pictures, and its rendered text has {count} places for them\n"
            "  the chat template must write one for each, and texts must not contain the token that stands for one"
        )
    ids: list[int] = []
    trained: list[bool] = []
    prompt, waiting = item.prompt, list(runs)
    for index, (token, is_trained) in enumerate(zip(item.ids, item.trained, strict=True)):
        run = waiting.pop(0) if token == place else None
        if run is not None and item.prompt is not None and index < item.prompt:
            prompt = (prompt or 0) + len(run) - 1
        ids += [token] if run is None else run
        trained += [is_trained] if run is None else [False] * len(run)
    return replace(item, ids=ids, trained=trained, prompt=prompt)
