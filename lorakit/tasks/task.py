"""What a task is to a training run. A file of this folder offers these names; it imports torch inside its functions
only.

rows → data → Data of items → collate → losses, [rows] → the loop
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from ..config import RunSettings, Strict

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Item(Protocol):
    """A row, ready to train on."""

    @property
    def size(self) -> int:
        """What it costs: rows of like size share a batch. Of text, its tokens."""

    @property
    def weight(self) -> int:
        """How many losses are summed in its own: a step's loss is divided by the weights of its rows. Of text, its
        trained tokens.
        """

    @property
    def where(self) -> str:
        """Its file and row, for errors."""

    def digest(self) -> bytes:
        """All of it that decides what is trained."""


class Prompt(Protocol):
    """What a sample is made from."""

    @property
    def text(self) -> str: ...


@dataclass
class Base:
    """A model and what its inputs are made with: a tokenizer, an image processor, a pipeline."""

    model: Any
    processor: Any


@dataclass(frozen=True)
class Data:
    """A run's items. `about`: what travels with the result; `notes`: what happened to some rows, and to how many.
    `files`: texts to write beside the result, by name.
    """

    train: list[Any]
    held_out: list[Any]
    shape: str
    length: str
    about: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, int] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)


class Task(Protocol):
    """`config` is a run's, which holds the task's own settings too."""

    settings: type[Strict]
    peft_type: str  # PEFT's task_type
    summary: str  # in the help of --task
    unit: str  # what weights count: "tokens"

    def processor(self, config: RunSettings) -> Any:
        """What the base's inputs are made with. It comes before the base, which takes longer to load."""

    def data(self, config: RunSettings, processor: Any) -> Data:
        """The rows, read, rendered, measured, and some of them held out."""

    def remembered(self, about: Mapping[str, Any], base: Any) -> dict[str, Any]:
        """Settings that a result brings: `about` it, as `data` said; `base`: the model's transformers config."""

    def load(self, config: RunSettings, processor: Any, data: Data, dtype: torch.dtype, device: torch.device) -> Any:
        """The base model, in eval mode."""

    def skeleton(self, config: RunSettings, base: Any, dtype: torch.dtype) -> Any:
        """The base model without its weights. `base`: transformers' config."""

    def check(self, config: RunSettings, model: Any, items: Sequence[Any]) -> None:
        """TrainError for what would fail at the first batch or, worse, at the first evaluation."""

    def check_together(self, model: Any) -> None:
        """TrainError if rows of several adapters cannot share a batch."""

    def alone(self, config: RunSettings) -> str | None:
        """The error of a sweep, for a task whose runs cannot train beside others; None if they can."""

    def collate(self, items: Sequence[Any], base: Base) -> dict[str, Tensor]:
        """A batch."""

    def example(self, rows: int, size: int, share: float = 1.0) -> dict[str, Tensor]:
        """A batch as `collate` makes it, of any values. `share`: weight by size."""

    def losses(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """The summed loss of each row: [rows], float32. The one loss, of training and of evaluation.

        Random numbers come from torch's own generator, which the loop seeds by run and step.
        """

    def evaluate(self, base: Base, items: Sequence[Any], batch_size: int) -> dict[str, float]:
        """How well the model does, by name; the first is a loss, and decides early stopping."""

    def prompts(self, config: RunSettings, base: Base, data: Data) -> Sequence[Prompt]:
        """What samples are made from at each evaluation; none if there are to be no samples."""

    def samples(self, config: RunSettings, base: Base, prompts: Sequence[Any]) -> list[str]:
        """One for each prompt, by the model as it is now."""


def weight_of(items: Iterable[Item]) -> int:
    """What a step's summed loss is divided by."""
    return sum(item.weight for item in items)
