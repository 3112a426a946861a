"""What text tasks do alike with a base and its tokenizer, behind the interface of `tasks/task.py`.

A task's file imports these names, so that they are its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...config import Choice, RunSettings
from ..task import Asked

if TYPE_CHECKING:
    import torch

BASE_RATE = 2e-4
# "LoRA Without Regret" (Thinking Machines, 2025) fits 5e-4 · (2000 / width)^0.775 for Llama models.
WIDTH_RATE, WIDTH, WIDTH_POWER = 5e-4, 2000, 0.775
# On a CPU, plain attention is used up to this row length (tokens) where the backward is not ours
# (`layers/fused/attention.py`), because the kernel's backward is slow: a step takes 0.81 to 0.90 of its CPU time
# (bench/short_attention.py). For longer rows, plain attention's memory grows with the square of the length.
PLAIN_ATTENTION = 256
CPU_TOKENS = 4096  # per micro-batch on a CPU: larger matrices are no faster there, and cost memory
# Nats. A held-out loss this far above the base's is a perplexity e times as high. Overfitting gets there only long
# after `patience` has stopped a run, and a fresh classifier's first steps stay below; rates that are too high get there
# within a few steps.
MARGIN = 1.0

compares = False
writes = False
traced = True
shares = True
uses_all = True
tried_with: str | None = None
size_unit = "tokens"


def defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    return {}


def drawn(item: Any, seed: int, epoch: int) -> Any:
    return item


def samples_from_file(config: RunSettings) -> bool:
    return False


def to_attach(config: RunSettings, processor: Any) -> RunSettings:
    return config


def for_run(processor: Any, config: RunSettings) -> Any:
    return processor


def asked(base: Any, items: Any) -> list[Asked]:
    """Return none: the task does not answer in text."""
    return []


def prepare(base: Any, items: Any) -> None:
    """Do nothing: rows are ready."""


def blueprint(config: RunSettings) -> Any:
    from ...bases.load import load_config

    scaling = getattr(config, "rope_scaling", None)
    return load_config(config.model, config.revision, config.trust_remote_code, scaling)


def checkpoint(model: Any) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()


def configure(model: Any, device: torch.device, longest: int) -> None:
    """Use plain attention where it is faster."""
    from ...layers.fused import attention

    if longest <= plain_attention(device) and not attention.is_used(model):
        model.set_attn_implementation("eager")


def plain_attention(device: torch.device) -> int:
    """Return up to how many tokens a row has plain attention."""
    return PLAIN_ATTENTION if device.type == "cpu" else 0


def size_at_once(device: torch.device) -> int | None:
    return CPU_TOKENS if device.type == "cpu" else None


def learning_rate(config: RunSettings, model: Any) -> Choice:
    return suited_rate(getattr(model.config.get_text_config(), "hidden_size", None))


def suited_rate(width: int | None) -> Choice:
    """Return the rate that suits LoRA on a base of this hidden size: 5e-4 · (2000 / width)^0.775 ("LoRA Without
    Regret", 2025). `width`: None if unknown.
    """
    if not width:
        return Choice(BASE_RATE, "a common rate for LoRA")
    return Choice(WIDTH_RATE * (WIDTH / width) ** WIDTH_POWER, f"for a model of width {width}")


def rate_factor(config: RunSettings, parameter: str, rate: float) -> tuple[str, float]:
    return "", 1.0


def margin(base: float) -> float:
    return MARGIN


def loss_labels(items: Any) -> list[str]:
    return [""] * len(items)


def save_adapter(config: RunSettings, processor: Any, adapter: Any, folder: Path) -> None:
    """Write PEFT's folder."""
    adapter.save(folder)


def unsaved(config: RunSettings, processor: Any, adapter: Any) -> str | None:
    """Say what PEFT's folder cannot hold of the adapter; None if it holds all of it."""
    from ...formats import losses

    lost = losses(adapter, "peft")
    return "\n  ".join(["PEFT's folder cannot hold what this run trains:", *lost]) if lost else None


def recorded(config: RunSettings, processor: Any) -> dict[str, Any]:
    """Return the ids of the tokens that the run added."""
    if not config.add_tokens:
        return {}
    return {"added_tokens": {token: processor.convert_tokens_to_ids(token) for token in config.add_tokens}}


def save_beside(config: RunSettings, processor: Any, folder: Path) -> None:
    """Write the tokenizer if the run added tokens: readers of PEFT's folders find it there."""
    if config.add_tokens:
        processor.save_pretrained(folder)
