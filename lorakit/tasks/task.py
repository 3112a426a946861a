"""The interface of a task. Each file of this folder defines these names.

    rows → `data` → items → `collate` → a batch → `losses`, [rows] → the training loop

Such a file imports torch inside its functions only, so that `lorakit --help` stays quick.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..config import Choice, RunSettings, Strict

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Item(Protocol):
    """One training example, ready to be collated."""

    @property
    def size(self) -> int:
        """Its cost; items of similar size share a batch. For text the number of tokens, for a picture its pixels."""

    @property
    def group(self) -> Any:
        """Items of different groups never share a forward pass, such as pictures of different shapes; None for text."""

    @property
    def weight(self) -> int:
        """How many terms its loss sums; a step's loss is divided by the total. For a language model, trained tokens."""

    @property
    def where(self) -> str:
        """Its file and row, for error messages."""

    def digest(self) -> bytes:
        """Return a digest of all that affects training, to tell whether two runs see the same rows."""


class Sample(Protocol):
    """What a model makes of a prompt during training: a text or a picture."""

    @property
    def prompt(self) -> str: ...

    @property
    def text(self) -> str | None:
        """What a terminal can show of it: the text, or None for a picture."""


@dataclass(frozen=True)
class Asked:
    """A prompt for a text, with all its correct answers. `ids`: token ids; `text`: to show; `where`: its first row."""

    ids: list[int]
    text: str
    references: tuple[str, ...]
    where: str


@dataclass(frozen=True)
class Shown:
    """A file of samples, for the report: rows of {"prompt", "base", "tuned"}, or a picture (PNG)."""

    texts: Sequence[Mapping[str, str]] = ()
    picture: bytes | None = None


class Epochs(Protocol):
    """Which items an epoch has, where that is not each item once."""

    @property
    def rows(self) -> int:
        """Items of an epoch."""

    def epoch(self, seed: int, epoch: int) -> Sequence[int]:
        """Return the indices of an epoch's items."""


@dataclass
class Base:
    """A model and its processor: a tokenizer or a pipeline. `config`: the run's, for tasks whose batches need it;
    `kept`: what `Data.before_step` keeps for the step's batches.
    """

    model: Any
    processor: Any
    config: Any = None
    kept: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Data:
    """A run's items, in training and held-out parts.

    `shape`: a description for the start panel; `facts`: further lines of it, by name; `about`: stored in the result's
    metadata; `notes`: message -> number of rows it concerns; `files`: file name -> text to write into the result's
    folder; `watched`: training items that are evaluated where none are held out; `before_step`: for losses of items
    that depend on all items of their step: computes that before the step's first batch, and keeps it in `Base.kept`.
    It gets the step's items, in every process those of all processes, while the run's adapter is active.
    """

    train: list[Any]
    held_out: list[Any]
    shape: str
    facts: Sequence[tuple[str, str]]
    about: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, int] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    watched: Sequence[Any] = ()
    mixture: Epochs | None = None  # what an epoch has of several data sets; None: all training items
    before_step: Callable[[Base, Sequence[Any]], None] | None = None

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
    size_unit: str  # what `Item.size` counts
    tried_with: str | None  # the command that tries a result; None: `lorakit eval` and those of language models
    shares: bool  # whether rows of several runs may share a forward pass; else each run draws what it would alone
    traced: bool  # whether a step runs on shapes alone, for `lorakit plan`
    uses_all: bool  # whether each step gives every trained parameter a gradient
    writes: bool  # whether it answers prompts in text, which `lorakit eval` scores against references
    compares: bool  # whether the base is evaluated too, before the first step

    def defaults(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return settings of a run that have another default with this task. `given`: those that were given."""

    def processor(self, config: RunSettings) -> Any:
        """Load the processor (a tokenizer for text). It is loaded before the base, so that data errors come early.

        Raises ConfigError for settings that the task does not have.
        """

    def for_run(self, processor: Any, config: RunSettings) -> Any:
        """Return the processor for another run on the same base, with that run's settings."""

    def resolved(self, config: RunSettings, processor: Any, earlier: Mapping[str, Any]) -> RunSettings:
        """Return the config with what only the processor knows, such as the ids of tokens.

        `earlier`: the settings of the run that is resumed; empty for a new run.
        """

    def data(self, config: RunSettings, processor: Any) -> Data:
        """Read, tokenize and split the rows. Raises DataError for rows that cannot be used."""

    def drawn(self, item: Any, seed: int, epoch: int) -> Any:
        """Return an item as an epoch sees it, such as with another crop: a function of the arguments alone."""

    def recognizes(self, row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]] = ()) -> bool:
        """Whether data with such a row can be of this task. If no other task says so too, it need not be named.

        `rows`: the data's first rows, with this one, for what one row cannot tell, such as whether labels are classes.
        """

    def remembered(self, about: Mapping[str, Any], base: Any) -> dict[str, Any]:
        """Return the settings to evaluate a result with, so that they need not be given again.

        `about`: `Data.about` from the result's metadata; `base`: what `blueprint` returns.
        """

    def blueprint(self, config: RunSettings) -> Any:
        """Read the base's config, without weights: for text, transformers'; for a pipeline, its model_index.json.

        None if it is not known without loading the base.
        """

    def load(self, config: RunSettings, processor: Any, data: Data, dtype: torch.dtype, device: torch.device) -> Any:
        """Load the base model, in eval mode."""

    def skeleton(self, config: RunSettings, base: Any, dtype: torch.dtype) -> Any:
        """Build the base model without loading weights, for `lorakit plan`. `base`: what `blueprint` returns."""

    def to_attach(self, config: RunSettings, processor: Any) -> RunSettings:
        """Return the config that the method attaches with: with what is known only now that the base is loaded."""

    def configure(self, model: Any, device: torch.device, longest: int) -> None:
        """Choose how the model computes, such as its attention. `longest`: size of the largest item."""

    def prepare(self, base: Base, items: Iterable[Any]) -> None:
        """Do before the first step what needs the model and the items. Raises TrainError for what would fail later.

        `items`: the run's, training and held out. Its adapter is attached and active, as it is before training. Called
        before the adapter is attached too, with the training items, if that starts from data (`LoraConfig.init`).
        """

    def checkpoint(self, model: Any) -> None:
        """Let the model recompute activations in backward. Raises TrainError if it cannot."""

    def size_at_once(self, device: torch.device) -> int | None:
        """Return the total size of a micro-batch beyond which the device is no faster; None: no limit."""

    def learning_rate(self, config: RunSettings, model: Any) -> Choice:
        """Return the peak learning rate that suits LoRA on this base, and why."""

    def rate_factor(self, config: RunSettings, parameter: str, rate: float) -> tuple[str, float]:
        """Return a parameter's learning rate as a factor of the run's, with a name of the parameters that share it.

        `parameter`: its name on the model; `rate`: the run's peak rate. ("", 1.0) for those at the run's own rate.
        """

    def margin(self, base: float) -> float:
        """Return how far above the base's loss a run's loss shows that it has diverged. `base`: the base's."""

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

        Random numbers must come from torch's default generator, which the loop seeds by run and step. Further figures
        of each item go into the batch, as `batch["logged"]`: name -> [items], NaN where a figure does not concern an
        item. A step logs their means.
        """

    def loss_labels(self, items: Sequence[Any]) -> list[str]:
        """Return a label for each item whose loss is logged apart, as `<label>_loss`; "" for the others.

        Where a batch has a `weight` [rows], by which `losses` multiplies, the loss that is logged apart is without it.
        """

    def evaluate(self, base: Base, items: Sequence[Any], batch_size: int) -> dict[str, float]:
        """Evaluate the model: metric name -> value. The first metric is a loss, which early stopping uses."""

    def asked(self, base: Base, items: Sequence[Any]) -> list[Asked]:
        """Return the items' distinct prompts with their correct answers, for a task that `writes`; else none.

        Raises DataError for an item without a prompt.
        """

    def to_predict(self, config: RunSettings, processor: Any) -> list[Any]:
        """Read the rows of `config.data`, which need no labels or answers, as items to predict, in their order.

        Raises DataError for a row that cannot be predicted: none is dropped.
        """

    def predict(self, config: RunSettings, base: Base, items: Sequence[Any], batch_size: int) -> list[dict[str, Any]]:
        """Return what the model predicts for each item, in their order, as plain data to write as JSON.

        Such as {"label": "ENTY", "score": 0.93, "scores": {...}}. Raises ConfigError if the task predicts nothing.
        """

    def prompts(self, config: RunSettings, base: Base, data: Data) -> Sequence[Any]:
        """Return the prompts to sample from at each evaluation; empty for no samples."""

    def samples_from_file(self, config: RunSettings) -> bool:
        """Return whether samples are taken from the result as written and loaded again."""

    def samples(self, config: RunSettings, base: Base, prompts: Sequence[Any]) -> list[Sample]:
        """Generate one sample per prompt with the model as it is now."""

    def base_samples(self, folder: Path, config: RunSettings, base: Base, prompts: Sequence[Any]) -> list[Sample]:
        """Read the base's samples that `write_samples` has kept in this folder, where they are those that `samples`
        would return; empty if they are not, or there are none.
        """

    def write_samples(self, folder: Path, step: int, base: Sequence[Any], tuned: Sequence[Any]) -> Path:
        """Write `folder/step-N.<suffix>`, samples of the base beside those of the tuned model. Returns its path."""

    def read_samples(self, path: Path) -> Shown:
        """Read a file of `write_samples`. Raises TrainError if it is damaged."""

    def save_adapter(self, config: RunSettings, processor: Any, adapter: Any, folder: Path) -> None:
        """Write a run's adapter into `folder`, in the format that users of this task expect."""

    def unsaved(self, config: RunSettings, processor: Any, adapter: Any) -> str | None:
        """Say what `save_adapter` cannot write of a run's adapter, a line for each loss; None if it can write all."""

    def recorded(self, config: RunSettings, processor: Any) -> dict[str, Any]:
        """Return further entries of the result's metadata."""

    def save_beside(self, config: RunSettings, processor: Any, folder: Path) -> None:
        """Write what belongs into the result's folder besides the adapter."""


def weight_of(items: Iterable[Item]) -> int:
    """Sum the items' weights: what a step's summed loss is divided by."""
    return sum(item.weight for item in items)
