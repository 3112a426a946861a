"""Read a run's pictures into training and held-out items, with those of a class (prior preservation)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...config import RunSettings
from ...data.pictures.read import PictureData, held_out_of, other_folders, read_pictures
from ...data.pictures.settings import PictureSettings
from ...errors import ConfigError, DataError
from ..task import Data

if TYPE_CHECKING:
    from ..text_to_image import TextToImageSettings
    from .encoded import Pictures

WATCHED = 16  # training pictures whose loss on fixed noise is logged where none are held out


def read_data(config: RunSettings, own: TextToImageSettings, pictures: Pictures) -> Data:
    """Read and split the pictures. Raises DataError for pictures that cannot be used."""
    from .encoded import PictureRow
    from .prior import with_prior

    settings = with_prior(config, own, pictures)
    resolution, multiple = pictures.sizes()
    how: dict[str, Any] = {"resolution": resolution, "multiple": multiple, "columns": own.columns or None}
    apart = [config.validation] if isinstance(config.validation, str) else []
    found = read_pictures(config.data, settings, split=config.split, leave_out=apart, **how)
    notes = dict(found.notes)
    _check_words(own.new_tokens, [item.caption for item in found.items])
    if isinstance(config.validation, str):
        validation = _validation(config.validation, config.data, settings, how)
        trained, evaluated = found.items, validation.pictures
        notes |= {f"{note} (in {config.validation})": count for note, count in validation.notes.items()}
        contents = {item.content for item in trained}
        if both := sum(item.content in contents for item in evaluated):
            notes[f"in {config.validation}, and among the training pictures as well"] = both
    else:
        trained, evaluated = held_out_of(found.items, config.validation)
    train, held_out = ([PictureRow(item, item.plain) for item in part] for part in (trained, evaluated))
    epochs = None
    prior = sum(item.is_prior for item in train)
    if prior:
        epochs = WithPrior(len(train) - prior, prior)
    watched = [row for row in train if not row.is_prior and not row.item.repeat][:WATCHED]
    facts = [("pictures", found.length)]
    return Data(train, held_out, found.shape, facts, found.about, notes, watched=watched, mixture=epochs)


def _validation(source: str, data: str, settings: PictureSettings, how: Mapping[str, Any]) -> PictureData:
    """Read pictures to evaluate, which need no masks, no repeats and no others of their class. Raises ConfigError if
    they are the training pictures.
    """
    if Path(source).expanduser().resolve() == Path(data).expanduser().resolve():
        raise ConfigError(
            f"validation: {source} is the training data itself\n"
            "  give other pictures, or a share of these to hold out: --validation 0.1"
        )
    plain = settings.replace(prior_data=None, mask=None, repeats={})
    return read_pictures(source, plain, leave_out=[data, *other_folders(settings)], **how)


def _check_words(words: Iterable[str], captions: Sequence[str]) -> None:
    """Raise DataError for a word to learn that no caption has: it would stay as it starts."""
    for word in words:
        if not any(word in caption for caption in captions):
            raise DataError(
                f"new_tokens: '{word}' is in none of {len(captions)} captions, so nothing would be learnt\n"
                f"  write it into the captions, or put it before all of them: trigger: '{word}'"
            )


@dataclass(frozen=True)
class WithPrior:
    """An epoch of pictures and as many of their class, which follow them: all of the class's are used in turn."""

    own: int
    prior: int

    @property
    def rows(self) -> int:
        return 2 * self.own

    def epoch(self, seed: int, epoch: int) -> Sequence[int]:
        indices = list(range(self.own))
        for position in range(epoch * self.own, (epoch + 1) * self.own):
            turn, at = divmod(position, self.prior)
            order = np.random.default_rng((seed, turn)).permutation(self.prior)
            indices.append(self.own + int(order[at]))
        return indices
