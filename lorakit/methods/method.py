"""What a method is to a training run. A file of this folder offers these names; it imports torch inside its functions
only.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..config import Choice, RunSettings, Strict

if TYPE_CHECKING:
    import torch


class Method(Protocol):
    """`config` is a run's, which holds the method's own settings too."""

    settings: type[Strict]
    title: str  # over a column: "LoRA"
    summary: str  # in the help of --method
    result: str  # what comes out, "adapter" or "model", and its folder in the run's
    keeps_base: bool  # whether the base can still be had beside what is trained

    def precision(self, config: RunSettings, device: torch.device) -> Choice:
        """The base's dtype."""

    def learning_rate(self, rate: float, why: str) -> tuple[float, str]:
        """The peak rate for `auto`, of the rate that suits LoRA, and why."""

    def attach(self, model: Any, config: RunSettings, name: str, task_type: str) -> None:
        """Put on the model what is trained, and say what takes gradients. `name`: of several on one model; `task_type`:
        PEFT's.
        """

    def activate(self, model: Any, name: str) -> None:
        """Have the model compute with what was attached as `name`."""

    def base_alone(self, model: Any) -> AbstractContextManager[None]:
        """Within it the model is its base. For methods that keep it."""

    def save(self, model: Any, processor: Any, name: str, folder: Path, metadata: dict[str, Any]) -> None:
        """Write the result. `processor`: the base's tokenizer;
        `metadata`: recipe, data and metrics, to travel along.
        """

    def trained(self, config: RunSettings) -> str:
        """What is trained, for the start panel."""

    def note_together(self, config: RunSettings) -> str | None:
        """What is otherwise in a run that trains beside others."""

    def alone(self, config: RunSettings) -> tuple[str, str] | None:
        """Which setting keeps a run from training beside others on one base, and the error of a sweep.
        None if it can.
        """

    def cheaper(self) -> str | None:
        """What takes less memory, for a run that does not fit."""

    def flags(self, model: str, result: str) -> str:
        """The flags of `lorakit eval` that judge the result."""
