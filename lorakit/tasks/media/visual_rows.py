"""Read conversations with pictures into items: rendered, with each picture's run of ids in its place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ...data.dataset import MULTIPLE, Item, unused_columns
from ...data.parse import Row
from ...data.pictures.check import Checked, check_pictures
from ...data.pictures.decode import colour
from ...data.pictures.found import Found, Source
from ...data.pictures.messages import PICTURE, with_pictures
from ...data.pictures.visual_item import VisualItem, expanded
from ...data.questions import read_questions
from ...data.render import Rendered, Renderer
from ...data.shapes import read_examples
from ...errors import DataError

if TYPE_CHECKING:
    from ..vision_language import VisionLanguageSettings
    from .visual import Visual


@dataclass(frozen=True)
class Conversations:
    """`length`: the limit and its reason, for the start panel; `pictures`: how many the rows have; `dropped`: rows over
    the limit.
    """

    items: list[VisualItem]
    limit: int
    length: str
    pictures: int
    notes: dict[str, int]
    dropped: int


def read_conversations(
    rows: Sequence[Row], visual: Visual, settings: VisionLanguageSettings, ends: Sequence[int], limit: int | None = None
) -> Conversations:
    """Read, render and check all rows. `ends`: the ids that end the model's generation; `limit`: the longest row in
    tokens, None for what the settings say.

    Raises DataError, naming file and row, for a row that cannot be trained on, and for pictures that are broken.
    """
    made = [with_pictures(row, settings.columns) for row in rows]
    _, examples = read_examples([row for row, _ in made], media=(PICTURE,))
    of_row = {id(row): (given, found) for (row, found), given in zip(made, rows, strict=True)}
    good, notes = _checked(rows[0].file, [found for _, found in made], settings)
    notes |= unused_columns([example.unused for example in examples])
    renderer = Renderer(visual.tokenizer, "chat", settings.train_on, settings.turns, None, ends)
    items, said = list[VisualItem](), Counter[str]()
    for example in examples:
        given, found = of_row[id(example.row)]
        pictures = [good[id(each)] for each in found if id(each) in good]
        if len(pictures) < len(found):
            continue  # `check_pictures` notes the broken ones
        rendered = renderer.rows(example)
        said.update({note for each in rendered for note in each.notes})
        items += [_item(each, given, pictures, visual, settings, len(rendered) > 1) for each in rendered]
    if not items:
        raise DataError(f"{rows[0].file}: no row is left whose pictures can be read")
    longest = max(item.size for item in items)
    reason = "the longest row, rounded up" if limit is None and settings.max_length == "auto" else "as given"
    if limit is None:
        limit = -(-longest // MULTIPLE) * MULTIPLE if settings.max_length == "auto" else int(settings.max_length)
    kept = [item for item in items if item.size <= limit]
    if not kept:
        raise DataError(
            f"{rows[0].file}: every row is longer than max_length {limit}\n"
            f"  raise max_length (the longest row has {longest:,} tokens), or make the pictures smaller"
        )
    dropped = len(items) - len(kept)
    length = f"at most {limit} tokens, pictures included ({reason})" + (f", {dropped} dropped" if dropped else "")
    return Conversations(kept, limit, length, sum(len(found) for _, found in made), notes | dict(said), dropped)


def read_asked(rows: Sequence[Row], visual: Visual, settings: VisionLanguageSettings) -> list[VisualItem]:
    """Return each row's conversation up to the answer that is asked for, as an item without an answer."""
    made = [with_pictures(row, settings.columns) for row in rows]
    examples = read_questions([row for row, _ in made], media=(PICTURE,))
    good, _ = _checked(rows[0].file, [found for _, found in made], settings.model_copy(update={"broken": "refuse"}))
    renderer = Renderer(visual.tokenizer, "chat")
    items = []
    for given, (_, found), example in zip(rows, made, examples, strict=True):
        ids = renderer.prompt(example)
        pictures = [good[id(each)] for each in found]
        items.append(_item(Rendered(ids, [False] * len(ids), len(ids)), given, pictures, visual, settings, False))
    return items


def _checked(
    name: str, of_rows: Sequence[Sequence[Found]], settings: VisionLanguageSettings
) -> tuple[dict[int, Checked], dict[str, int]]:
    """Decode each picture once. Returns those that can be used, by the id of what was found, and notes."""
    found = [each for row in of_rows for each in row]
    if not found:
        raise DataError(f"{name}: no row has a picture\n  for text alone use --task causal_lm")
    good, notes = check_pictures(Source(name, found), settings, colour(settings.background))
    return {id(one.found): one for one in good}, notes


def _item(
    rendered: Rendered,
    row: Row,
    pictures: Sequence[Checked],
    visual: Visual,
    settings: VisionLanguageSettings,
    is_part: bool,
) -> VisualItem:
    """`is_part`: whether the conversation has further rows, of which earlier ones have only its first pictures."""
    item = Item(rendered.ids, rendered.trained, row, rendered.prompt, rendered.opening)
    own = pictures[: rendered.ids.count(visual.place)] if is_part else pictures
    item = expanded(item, visual.place, visual.runs([picture.size for picture in own]))
    return VisualItem(
        item.ids,
        item.trained,
        row,
        item.prompt,
        item.opening,
        tuple(own),
        colour(settings.background),
        settings.animated,
    )


def prompt_of(item: VisualItem) -> VisualItem:
    """Return the item up to its first answer, with the pictures that stand there."""
    length = item.prompt_length
    return replace(item, ids=item.ids[:length], trained=[False] * length)


def shown(item: VisualItem, tokenizer: Any) -> str:
    """Return a prompt's text, with the names of its pictures."""
    text = tokenizer.decode(item.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
    return " ".join([*(picture.where.rpartition(": ")[2] for picture in item.pictures), text])
