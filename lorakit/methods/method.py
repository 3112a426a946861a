"""The interface of a fine-tuning method. Each file of this folder defines these names.

Such a file imports torch inside its functions only, so that `lorakit --help` stays quick.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..config import Choice, RunSettings, Strict

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True)
class Start:
    """An earlier result that a run starts from.

    `source`: its path or id; `settings`: the run's settings that it fixes; `spellings`: setting -> another value that
    means the same; `task`: PEFT's task_type; `base`, `revision`: what it was trained on; `about`: what its run stored
    of its data (`Data.about`). None where the result does not say.
    """

    source: str
    settings: Mapping[str, Any]
    spellings: Mapping[str, Any]
    task: str | None
    base: str | None
    revision: str | None
    about: Mapping[str, Any]
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StartData:
    """What the start of a run's adapter may be made from (`LoraConfig.init`).

    `batches`: yields the first training batches; `loss`: of the model and a batch, a scalar; `ranks`: of a resumed run
    whose checkpoint holds the start, module -> rank.
    """

    batches: Callable[[], Iterable[Any]]
    loss: Callable[[Any, Any], Tensor]
    ranks: Mapping[str, int] | None = None


class Method(Protocol):
    """A fine-tuning method. `config` is always a run's config, which includes the method's own settings."""

    settings: type[Strict]
    defaults: Mapping[str, Any]  # settings of a run that have another default with this method
    title: str  # column heading: "LoRA"
    summary: str  # in the help of --method
    result: str  # what is saved, "adapter" or "model"; also its folder inside the run folder
    keeps_base: bool  # whether the unchanged base is still available during and after training

    def start(self, config: RunSettings) -> Start | None:
        """Read the earlier result that the run starts from; None for a run that starts anew. Raises LorakitError."""

    def precision(self, config: RunSettings, device: torch.device) -> Choice:
        """Choose the dtype in which the base is loaded, and say why."""

    def learning_rate(self, rate: float, why: str) -> tuple[float, str]:
        """Return the peak learning rate for `auto`, and why. `rate`, `why`: what suits LoRA."""

    def rate_factors(self, model: Any, config: RunSettings, name: str) -> Mapping[nn.Parameter, tuple[str, float]]:
        """Return the parameters that are not trained at the run's own learning rate: each with a name of those that
        share its rate, and the rate as a factor of the run's.

        `name`: the adapter's, as for `attach`.
        """

    def penalty(self, model: Any, name: str) -> Tensor | None:
        """Return what is added to the loss of a step, a scalar with a gradient; None if there is nothing.

        `name`: the adapter's, as for `attach`.
        """

    def after_step(self, model: Any, name: str, step: int, steps: int) -> None:
        """Adjust what is trained, after optimizer step `step` (from 1) of `steps`; its gradients are still there.

        `name`: the adapter's, as for `attach`.
        """

    def attach(
        self, model: Any, config: RunSettings, name: str, task_type: str, first: StartData | None = None
    ) -> None:
        """Add the trained parameters to the model and set `requires_grad`.

        `name`: the adapter's, as a sweep attaches several; `task_type`: PEFT's; `first`: for starts that are made from
        data. None on a model without values, for `lorakit plan`.
        """

    def check_result(self, model: Any, config: RunSettings, name: str, unsaved: Callable[[Any], str | None]) -> None:
        """Raise ConfigError if the result of what is attached could not be saved. Called before the first step.

        `name`: the adapter's, as for `attach`; `unsaved`: says what its task cannot write of an adapter
        (`Task.unsaved`), for methods whose result is one.
        """

    def activate(self, model: Any, name: str) -> None:
        """Make the adapter that was attached as `name` the active one."""

    def base_alone(self, model: Any) -> AbstractContextManager[None]:
        """Return a context in which the model is its base. Raises StateError unless `keeps_base`."""

    def reloaded(self, model: Any, folder: Path) -> AbstractContextManager[None]:
        """Return a context in which the model computes with the result that `save` wrote into this folder.

        Raises StateError unless `keeps_base`.
        """

    def save(
        self,
        model: Any,
        processor: Any,
        name: str,
        folder: Path,
        metadata: dict[str, Any],
        write: Callable[[Any, Path], None] | None = None,
    ) -> None:
        """Write the result into `folder`.

        `processor`: the base's tokenizer; `metadata`: recipe, data and metrics to store in the result; `write`: writes
        an adapter as its task does (`Task.save_adapter`), for methods whose result is one; None: in PEFT's format.
        """

    def trained(self, config: RunSettings) -> str:
        """Describe what is trained, for the start panel: "rank 16, alpha 32"."""

    def note_together(self, config: RunSettings) -> str | None:
        """Say how a run of a sweep differs from the same run alone; None if it does not."""

    def alone(self, config: RunSettings) -> tuple[str, str] | None:
        """Return the setting that keeps a run out of a sweep, and the sweep's error message; None if it can join."""

    def cheaper(self) -> str | None:
        """Suggest what needs less memory, for a run that does not fit; None without a suggestion."""

    def flags(self, model: str, result: str) -> str:
        """Return the flags with which `lorakit eval` evaluates the result. `model`, `result`: paths or ids."""
