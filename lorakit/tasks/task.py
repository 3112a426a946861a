"""The interface of a task. Each file of this folder defines these names.

    rows → `data` → items → `collate` → a batch → `losses`, [rows] → the training loop

Such a file imports torch inside its functions only, so that `lorakit --help` stays quick.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from ..config import RunSettings, Strict

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..data.mixing import Mixture


class Item(Protocol):
    """One training example, tokenized."""

    @property
    def size(self) -> int:
        """Its cost; items of similar size share a batch. For text, the number of tokens."""

    @property
    def weight(self) -> int:
        """How many terms its loss sums; a step's loss is divided by the total. For a language model, trained tokens."""

    @property
    def where(self) -> str:
        """Its file and row, for error messages."""

    def digest(self) -> bytes:
        """Return a digest of all that affects training, to tell whether two runs see the same rows."""


class Prompt(Protocol):
    """A prompt for samples during training."""

    @property
    def text(self) -> str: ...


@dataclass
class Base:
    """A model and its processor: a tokenizer, an image processor, or a pipeline."""

    model: Any
    processor: Any


@dataclass(frozen=True)
class Data:
    """A run's items, in training and held-out parts.

    `shape`, `length`: descriptions for the start panel; `about`: stored in the result's metadata; `notes`: message ->
    number of rows it concerns; `files`: file name -> text to write into the result's folder.
    """

    train: list[Any]
    held_out: list[Any]
    shape: str
    length: str
    about: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, int] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    mixture: Mixture | None = None  # what an epoch has of several data sets; None: all training items

    @property
    def rows(self) -> int:
        """Training items of an epoch."""
        return len(self.train) if self.mixture is None else self.mixture.rows

    def epoch(self, seed: int, epoch: int) -> Sequence[int]:
        """Return the indices of an epoch's training items."""
        return range(len(self.train)) if self.mixture is None else self.mixture.epoch(seed, epoch)


class Task(Protocol):
    """A task. `config` is always a run's config, which includes the task's own settings."""

    settings: type[Strict]
    peft_type: str  # PEFT's task_type
    summary: str  # in the help of --task
    unit: str  # what `Item.weight` counts: "tokens"

    def processor(self, config: RunSettings) -> Any:
        """Load the processor (a tokenizer for text). It is loaded before the base, so that data errors come early."""

    def data(self, config: RunSettings, processor: Any) -> Data:
        """Read, tokenize and split the rows. Raises DataError for rows that cannot be used."""

    def remembered(self, about: Mapping[str, Any], base: Any) -> dict[str, Any]:
        """Return the settings to evaluate a result with, so that they need not be given again.

        `about`: `Data.about` from the result's metadata; `base`: the model's transformers config.
        """

    def load(self, config: RunSettings, processor: Any, data: Data, dtype: torch.dtype, device: torch.device) -> Any:
        """Load the base model, in eval mode."""

    def skeleton(self, config: RunSettings, base: Any, dtype: torch.dtype) -> Any:
        """Build the base model without loading weights, for `lorakit plan`. `base`: its transformers config."""

    def check(self, config: RunSettings, model: Any, items: Iterable[Any]) -> None:
        """Raise TrainError for what would fail at the first batch or, later, at the first evaluation."""

    def check_together(self, model: Any) -> None:
        """Raise TrainError if rows of several adapters cannot share a batch."""

    def alone(self, config: RunSettings) -> str | None:
        """Return a sweep's error message if runs of this task cannot train together; None if they can."""

    def packs(self, config: RunSettings) -> bool:
        """Whether a batch has several items in one sequence, where the model allows it (`check` raises if not)."""

    def saved_padding(self, batches: Sequence[Sequence[Any]]) -> str:
        """Describe what packing saves, for the start panel. `batches`: the items that are computed at once."""

    def collate(self, items: Sequence[Any], base: Base, packed: bool = False) -> dict[str, Tensor]:
        """Pad items into a batch, or pack them, on the CPU."""

    def example(self, rows: int, size: int, share: float = 1.0, packed: bool = False) -> dict[str, Tensor]:
        """Return a batch of dummy values, as `collate` builds it. `size`: per item; `share`: weight / size."""

    def losses(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """Return the summed loss of each item: [items], float32. Training and evaluation use this same loss.

        Random numbers must come from torch's default generator, which the loop seeds by run and step.
        """

    def evaluate(self, base: Base, items: Sequence[Any], batch_size: int) -> dict[str, float]:
        """Evaluate the model: metric name -> value. The first metric is a loss, which early stopping uses."""

    def prompts(self, config: RunSettings, base: Base, data: Data) -> Sequence[Prompt]:
        """Return the prompts to sample from at each evaluation; empty for no samples."""

    def samples(self, config: RunSettings, base: Base, prompts: Sequence[Any]) -> list[str]:
        """Generate one sample per prompt with the model as it is now."""


def weight_of(items: Iterable[Item]) -> int:
    """Sum the items' weights: what a step's summed loss is divided by."""
    return sum(item.weight for item in items)
